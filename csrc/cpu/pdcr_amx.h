// The tiles of PDCR with fp32 products by AMX, which multiplies bf16 tiles at many times the rate of fp32 vectors.
//
// A value is split exactly into bf16 terms of 8 bits each: three for fp32, two for fp16, one for bf16. Products of terms
// beyond the rounding of the result are left out. The unit adds 32 products before it adds them to an accumulator, so
// that its sums round less than a running fp32 sum. (It flushes subnormal numbers: 1e-38 next to rows of length 1.)
//
// Every operand is read from first to last: [panel of 32][step of 32 summands][term][two tiles of 16 x 16 pairs]. A pair
// holds two summands that are 16 apart, so that splitting and re-pairing are shifts and masks. The forms of X are
//   left    panels of rows, tiles [row][pair of channels]: the form that is packed and kept
//   right   panels of rows, tiles [pair of channels][row]: right operand of X_a X_b^T, from `left` by transposing tiles
//   summed  panels of channels, tiles [pair of rows][channel]: right operand of H X_b

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16")
#endif

namespace amx {

using avx512::load;
using avx512::store;
using csf::pdcr::Image;
using csf::pdcr::kBlock;
using csf::pdcr::kPanel;
using csf::pdcr::Score;

typedef avx512::Vector<float> Floats;
typedef avx512::Vector<int32_t> Pairs;

constexpr int64_t kPairs = kPanel / 2;            // pairs in a row of a tile
constexpr int64_t kTile = 16 * kPairs;            // pairs in a tile
constexpr int64_t kPiece = 2 * kTile;             // pairs of a term in a step of a panel
constexpr int64_t kSteps = kBlock / kPanel;       // panels in a block, or steps over its rows

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
constexpr int64_t scratch_size(int64_t panels) {
  return 2 * weights_size<TERMS>() + 2 * kSteps * panels * TERMS * kPiece;
}

// Eight tile registers of 16 rows of 64 bytes. (Not built on a stack: the compiler takes only the first bytes for read.)
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
alignas(64) constexpr TileConfig kTileConfig{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static inline void configure() { _tile_loadconfig(&kTileConfig); }

static inline void release() { _tile_release(); }

// Splits two vectors into terms and writes their pairs.
template <int TERMS>
static inline void split(Floats low, Floats high, int32_t* out) {
  const auto leading = [](Floats x) {
    return reinterpret_cast<Floats>((reinterpret_cast<Pairs>(x) + 0x8000) & static_cast<int32_t>(0xffff0000));
  };
  for (int term = 0; term < TERMS; ++term, out += kPiece) {
    const Floats low_term = leading(low), high_term = leading(high);
    store(out, (reinterpret_cast<Pairs>(low_term) >> 16 & 0xffff) | reinterpret_cast<Pairs>(high_term));
    low -= low_term;
    high -= high_term;
  }
}

// Two tiles below each other (pairs of columns) become two tiles next to each other (pairs of rows).
static inline void pair_rows(const int32_t* in, int32_t* out) {
  for (int64_t row = 0; row < kTile; row += kPairs) {
    const Pairs upper = load(in + row), lower = load(in + kTile + row);
    store(out + row, (upper & 0xffff) | (lower << 16));
    store(out + kTile + row, (upper >> 16 & 0xffff) | (lower & static_cast<int32_t>(0xffff0000)));
  }
}

static inline void transpose(const int32_t* in, int32_t* out) {
  __m512i rows[16], mixed[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {  // row i / 4 + 4 k of 128-bit lane k
    const int32_t* piece = in + i / 4 * kPairs + i % 4 * 4;
    __m512i row = _mm512_castsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i*>(piece)));
    row = _mm512_inserti32x4(row, _mm_load_si128(reinterpret_cast<const __m128i*>(piece + 4 * kPairs)), 1);
    row = _mm512_inserti32x4(row, _mm_load_si128(reinterpret_cast<const __m128i*>(piece + 8 * kPairs)), 2);
    rows[i] = _mm512_inserti32x4(row, _mm_load_si128(reinterpret_cast<const __m128i*>(piece + 12 * kPairs)), 3);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    mixed[i] = _mm512_maskz_unpacklo_epi32(-1, rows[i], rows[i + 4]);
    mixed[i + 4] = _mm512_maskz_unpackhi_epi32(-1, rows[i], rows[i + 4]);
    mixed[i + 8] = _mm512_maskz_unpacklo_epi32(-1, rows[i + 8], rows[i + 12]);
    mixed[i + 12] = _mm512_maskz_unpackhi_epi32(-1, rows[i + 8], rows[i + 12]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    int32_t* target = out + 4 * i * kPairs;
    _mm512_store_si512(target, _mm512_maskz_unpacklo_epi64(-1, mixed[i], mixed[i + 8]));
    _mm512_store_si512(target + kPairs, _mm512_maskz_unpackhi_epi64(-1, mixed[i], mixed[i + 8]));
    _mm512_store_si512(target + 2 * kPairs, _mm512_maskz_unpacklo_epi64(-1, mixed[i + 4], mixed[i + 12]));
    _mm512_store_si512(target + 3 * kPairs, _mm512_maskz_unpackhi_epi64(-1, mixed[i + 4], mixed[i + 12]));
  }
}

static void transpose_tiles(const int32_t* in, int64_t size, int32_t* out) {
  for (int64_t tile = 0; tile < size; tile += kTile) transpose(in + tile, out + tile);
}

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

static inline int64_t whole_steps(int64_t rows) { return (rows + kPanel - 1) / kPanel; }

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
  const int64_t steps = channel_steps(image), panel = steps * TERMS * kPiece / kPanel;
  const int32_t* left = left_form<TERMS>(image, a);
  const int32_t* right = right_form<TERMS>(image, b, scratch);
  for (int64_t j = 0; j < image.block_rows(b); j += kPanel) {
    for (int64_t i = 0; i < image.block_rows(a); i += kPanel) {
      multiply<TERMS, TERMS, 2, false>(left + i * panel, right + j * panel, steps, tile + i * kBlock + j, kBlock);
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
    float* out = image.grad + (c * image.padded + a * kBlock) * kPanel;
    for (int64_t i = 0; i < image.block_rows(a); i += kPanel) {
      multiply<kTerms, TERMS, kTerms - 1, true>(weights + i / kPanel * kSteps * kTerms * kPiece, summed, steps_b,
                                                out + i * kPanel, kPanel);
    }
  }
}

// The left forms of H and of H^T, zero beyond the vectors of both blocks.
template <int TERMS>
static void split_weights(float* tile, int64_t rows_a, int64_t rows_b, int32_t* weights, int32_t* transposed) {
  constexpr int kTerms = weight_terms(TERMS);
  const int64_t steps_a = whole_steps(rows_a), steps_b = whole_steps(rows_b);
  for (int64_t i = 0; i < rows_a; ++i) std::fill(tile + i * kBlock + rows_b, tile + i * kBlock + steps_b * kPanel, 0.0f);
  std::fill(tile + rows_a * kBlock, tile + steps_a * kPanel * kBlock, 0.0f);
  alignas(64) int32_t paired[kPiece];
  for (int64_t step_a = 0; step_a < steps_a; ++step_a) {
    for (int64_t step_b = 0; step_b < steps_b; ++step_b) {
      int32_t* in = weights + (step_a * kSteps + step_b) * kTerms * kPiece;
      const float* corner = tile + step_a * kPanel * kBlock + step_b * kPanel;
      for (int64_t i = 0; i < kPanel; ++i, corner += kBlock) split<kTerms>(load(corner), load(corner + 16), in + i * kPairs);
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

// The left form of one packed vector, given with whole steps of channels.
template <int TERMS>
void split_vector(const float* values, int64_t panels, int32_t* out) {
  for (int64_t panel = 0; panel < panels; ++panel, values += kPanel, out += TERMS * kPiece) {
    Floats low, high;
    std::memcpy(&low, values, sizeof(low));
    std::memcpy(&high, values + 16, sizeof(high));
    // The rounding could carry a NaN's bits over.
    const Floats nan = Floats{} + __builtin_nanf("");
    split<TERMS>(low == low ? low : nan, high == high ? high : nan, out);
  }
}

template <int TERMS>
void forward_pair(const Image<float>& image, const Score<float>& score, int64_t a, int64_t b, Scratch& scratch) {
  alignas(64) float tile[kBlock * kBlock];
  inner_products<TERMS>(image, a, b, scratch, tile);
  avx512::add_pairs(image, score, a, b, tile);
}

template <int TERMS>
void backward_pair(const Image<float>& image, const Score<float>& score, int64_t a, int64_t b, Scratch& scratch) {
  alignas(64) float tile[kBlock * kBlock];
  inner_products<TERMS>(image, a, b, scratch, tile);
  avx512::weigh_pairs(image, score, a, b, tile);
  int32_t* weights = scratch.memory;
  int32_t* transposed = a == b ? nullptr : weights + weights_size<TERMS>();
  split_weights<TERMS>(tile, image.block_rows(a), image.block_rows(b), weights, transposed);
  add_gradient<TERMS>(image, a, b, weights);
  if (a != b) add_gradient<TERMS>(image, b, a, transposed);
}

}  // namespace amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
