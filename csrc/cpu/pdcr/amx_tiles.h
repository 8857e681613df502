// The tiles of PDCR with fp32 products by AMX. Included by pdcr.cpp through for_amx.h, after tiles_kernel.h. Tested by
// tests/test_pdcr.py where the processor has AMX.
//
// Products of terms (amx_terms.h) that are smaller than the rounding of the result are left out. The unit adds 32
// products before it adds them to an accumulator, so that its sums round less than a running fp32 sum. (It flushes
// subnormal numbers: 1e-38 next to rows of length 1.)

#include "cpu/pdcr/amx_terms.h"

namespace amx {

// H is rounded before already: two terms are more than the result keeps where vectors have 16 bits.
constexpr int weight_terms(int terms) { return terms == 3 ? 3 : 2; }

// A thread's memory: H, H^T, and the right forms of the two blocks b it saw last, with the left forms they come from.
struct Scratch {
  int32_t* memory;
  const int32_t* seen[2];
};

template <int TERMS>
constexpr int64_t weights_size() {
  return kSteps * kSteps * weight_terms(TERMS) * kPiece;
}

template <int TERMS>
constexpr int64_t scratch_size(int64_t stripes) {
  return 2 * weights_size<TERMS>() + 2 * kSteps * stripes * TERMS * kPiece;
}

// Eight tile registers of 16 rows of 64 bytes. (Not on the stack: the compiler assumes that only the first bytes are
// read.)
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
alignas(64) constexpr TileConfig kTileConfig{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static inline void configure() { _tile_loadconfig(&kTileConfig); }

static inline void release() { _tile_release(); }

// out[0:32][0:32] (+)= sum of the products of terms p and q with p + q <= LIMIT, over `steps` steps.
template <int LEFT_TERMS, int RIGHT_TERMS, int LIMIT, bool ACCUMULATE>
static inline void multiply(const int32_t* left, const int32_t* right, int64_t steps, float* out, int64_t out_row) {
  asm volatile("" ::: "memory");  // tile loads do not tell the compiler that they read
  const int64_t stride = out_row * sizeof(float);
  float* below = out + 16 * out_row;
  if constexpr (ACCUMULATE) {
    _tile_loadd(0, out, stride);
    _tile_loadd(1, out + 16, stride);
    _tile_loadd(2, below, stride);
    _tile_loadd(3, below + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, left += LEFT_TERMS * kPiece, right += RIGHT_TERMS * kPiece) {
#pragma GCC unroll 3
    for (int p = LEFT_TERMS - 1, held = -1; p >= 0; --p) {  // ends with the largest, (0, 0)
      _tile_loadd(4, left + p * kPiece, 64);
      _tile_loadd(5, left + p * kPiece + kTile, 64);
      const int last = std::min(RIGHT_TERMS - 1, LIMIT - p);
#pragma GCC unroll 3
      for (int k = 0; k <= last; ++k) {
        const int q = p % 2 == 1 ? k : last - k;  // back and forth: where the direction turns, tiles stay
        if (q != held) {
          _tile_loadd(6, right + q * kPiece, 64);
          _tile_loadd(7, right + q * kPiece + kTile, 64);
          held = q;
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, out, stride);
  _tile_stored(1, out + 16, stride);
  _tile_stored(2, below, stride);
  _tile_stored(3, below + 16, stride);
}

static inline int64_t whole_steps(int64_t rows) { return (rows + kStripe - 1) / kStripe; }

static inline int64_t channel_steps(const Image<float>& image) { return whole_steps(image.channels); }

template <int TERMS>
static inline const int32_t* left_form(const Image<float>& image, int64_t block) {
  return image.terms + block * kSteps * channel_steps(image) * TERMS * kPiece;
}

template <int TERMS>
static const int32_t* right_form(const Image<float>& image, int64_t block, Scratch& scratch) {
  const int64_t size = kSteps * channel_steps(image) * TERMS * kPiece;
  if (image.right_terms != nullptr) return image.right_terms + block * size;
  const int32_t* left = left_form<TERMS>(image, block);
  int32_t* right = scratch.memory + 2 * weights_size<TERMS>() + block % 2 * size;
  if (scratch.seen[block % 2] != left) {
    transpose_tiles(left, size, right);
    scratch.seen[block % 2] = left;
  }
  return right;
}

// tile[i][j] = x_i . x_j for the vectors of blocks a and b.
template <int TERMS>
static void inner_products(const Image<float>& image, int64_t a, int64_t b, Scratch& scratch, float* tile) {
  const int64_t steps = channel_steps(image), stripe = steps * TERMS * kPiece / kStripe;
  const int32_t* left = left_form<TERMS>(image, a);
  const int32_t* right = right_form<TERMS>(image, b, scratch);
  for (int64_t j = 0; j < image.block_rows(b); j += kStripe) {
    for (int64_t i = 0; i < image.block_rows(a); i += kStripe) {
      multiply<TERMS, TERMS, 2, false>(left + i * stripe, right + j * stripe, steps, tile + i * kBlock + j, kBlock);
    }
  }
}

// grad_a += H X_b, with H in left form.
template <int TERMS>
static void add_gradient(const Image<float>& image, int64_t a, int64_t b, const int32_t* weights) {
  constexpr int kTerms = weight_terms(TERMS);
  const int64_t steps = channel_steps(image), steps_b = whole_steps(image.block_rows(b));
  const int32_t* left = left_form<TERMS>(image, b);
  alignas(64) int32_t summed[kSteps * TERMS * kPiece];
  for (int64_t c = 0; c < steps; ++c, left += TERMS * kPiece) {
    for (int64_t step = 0; step < steps_b; ++step) {
      for (int64_t piece = 0; piece < TERMS * kPiece; piece += kPiece) {
        pair_rows(left + step * steps * TERMS * kPiece + piece, summed + step * TERMS * kPiece + piece);
      }
    }
    float* out = image.grad + (c * image.padded + a * kBlock) * kStripe;
    for (int64_t i = 0; i < image.block_rows(a); i += kStripe) {
      multiply<kTerms, TERMS, kTerms - 1, true>(weights + i / kStripe * kSteps * kTerms * kPiece, summed, steps_b,
                                                out + i * kStripe, kStripe);
    }
  }
}

// The left forms of H and of H^T, zero beyond the vectors of both blocks.
template <int TERMS>
static void split_weights(float* tile, int64_t rows_a, int64_t rows_b, int32_t* weights, int32_t* transposed) {
  constexpr int kTerms = weight_terms(TERMS);
  const int64_t steps_a = whole_steps(rows_a), steps_b = whole_steps(rows_b);
  for (int64_t i = 0; i < rows_a; ++i) {
    std::fill(tile + i * kBlock + rows_b, tile + i * kBlock + steps_b * kStripe, 0.0f);
  }
  std::fill(tile + rows_a * kBlock, tile + steps_a * kStripe * kBlock, 0.0f);
  alignas(64) int32_t paired[kPiece];
  for (int64_t step_a = 0; step_a < steps_a; ++step_a) {
    for (int64_t step_b = 0; step_b < steps_b; ++step_b) {
      int32_t* in = weights + (step_a * kSteps + step_b) * kTerms * kPiece;
      const float* corner = tile + step_a * kStripe * kBlock + step_b * kStripe;
      for (int64_t i = 0; i < kStripe; ++i, corner += kBlock) {
        split<kTerms>(load(corner), load(corner + 16), in + i * kPairs);
      }
      if (transposed == nullptr) continue;
      int32_t* out = transposed + (step_b * kSteps + step_a) * kTerms * kPiece;
      for (int64_t piece = 0; piece < kTerms * kPiece; piece += kPiece) {
        pair_rows(in + piece, paired);
        transpose(paired, out + piece);
        transpose(paired + kTile, out + piece + kTile);
      }
    }
  }
}

template <int TERMS>
void forward_pair(const Image<float>& image, const Affinity<float>& affinity, int64_t a, int64_t b, Scratch& scratch) {
  alignas(64) float tile[kBlock * kBlock];
  inner_products<TERMS>(image, a, b, scratch, tile);
  avx512::add_pairs(image, affinity, a, b, tile);
}

template <int TERMS>
void backward_pair(const Image<float>& image, const Affinity<float>& affinity, int64_t a, int64_t b, Scratch& scratch) {
  alignas(64) float tile[kBlock * kBlock];
  inner_products<TERMS>(image, a, b, scratch, tile);
  avx512::weigh_pairs(image, affinity, a, b, tile);
  int32_t* weights = scratch.memory;
  int32_t* transposed = a == b ? nullptr : weights + weights_size<TERMS>();
  split_weights<TERMS>(tile, image.block_rows(a), image.block_rows(b), weights, transposed);
  add_gradient<TERMS>(image, a, b, weights);
  if (a != b) add_gradient<TERMS>(image, b, a, transposed);
}

}  // namespace amx
