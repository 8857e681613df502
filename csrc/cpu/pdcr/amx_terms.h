// Values as bf16 terms for AMX, which multiplies bf16 tiles at many times the rate of fp32 vectors. Included by
// packed.cpp and amx_tiles.h, through for_amx.h. Tested by tests/test_pdcr.py where the processor has AMX.
//
// A value is split exactly into bf16 terms of 8 bits each: three for fp32, two for fp16, one for bf16. Every operand is
// read from first to last: [stripe of 32][step of 32 summands][term][two tiles of 16 x 16 pairs]. A pair holds two
// summands that are 16 apart, so that splitting and re-pairing are shifts and masks. The forms of X are
//   left    stripes of rows, tiles [row][pair of channels]: the form that is packed and kept
//   right   stripes of rows, tiles [pair of channels][row]: right operand of X_a X_b^T, the tiles of `left` transposed
//   summed  stripes of channels, tiles [pair of rows][channel]: right operand of H X_b

namespace amx {

using avx512::load;
using avx512::store;

typedef avx512::Vector<float> Floats;
typedef avx512::Vector<int32_t> Pairs;

constexpr int64_t kPairs = kStripe / 2;       // pairs in a row of a tile
constexpr int64_t kTile = 16 * kPairs;        // pairs in a tile
constexpr int64_t kPiece = 2 * kTile;         // pairs of a term in a step of a stripe
constexpr int64_t kSteps = kBlock / kStripe;  // stripes in a block, or steps over its rows

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

// The left form of one packed vector, given with whole steps of channels.
template <int TERMS>
void split_vector(const float* values, int64_t stripes, int32_t* out) {
  for (int64_t stripe = 0; stripe < stripes; ++stripe, values += kStripe, out += TERMS * kPiece) {
    Floats low, high;
    std::memcpy(&low, values, sizeof(low));
    std::memcpy(&high, values + 16, sizeof(high));
    // The rounding could carry a NaN's bits over.
    const Floats nan = Floats{} + __builtin_nanf("");
    split<TERMS>(low == low ? low : nan, high == high ? high : nan, out);
  }
}

}  // namespace amx
