// What PDCR's tiles work on: the vectors of one image, sorted by ratio and packed (packed.h) in two layouts.
#pragma once

#include <cstdint>

namespace csf::pdcr {

constexpr int64_t kBlock = 96;   // vectors in a block: a multiple of every register tile's rows, and of kStripe
constexpr int64_t kStripe = 32;  // values in a stripe's row

template <class T>
struct Image {
  int64_t count;        // valid vectors
  int64_t padded;       // count rounded up to whole blocks; padding rows are zero
  int64_t channels;
  int64_t num_classes;  // ratios of a vector
  int64_t first_block;  // number of blocks of the images before
  bool bounded;         // exp never overflows, whatever the vectors: no running maximum is needed
  bool skips_equal;     // a tile pair whose ratios are all equal is skipped: d = 0 makes its exponents 0

  const T* rows;     // [channels / kStripe][padded][kStripe]: the vectors times powers of two; with AMX, backward only
  const T* columns;  // [padded / kStripe][channels][kStripe]: the same, transposed; null with AMX, which reads
  const int32_t* terms;        // the same as bf16 terms, in the form `left` of amx_terms.h
  const int32_t* right_terms;  // in the form `right`; null where memory does not allow it
  const T* scale;          // [padded]: 1 / length of the packed row, 0 for zero vectors and padding
  const T* present;        // [padded]: 1, or 0 for padding
  const T* ratios;         // [blocks][num_classes][kBlock]
  const uint8_t* uniform;  // [blocks]: all ratios of the block are equal

  // forward
  double* z;           // [padded]: sum of exp(x - maximum)
  double* maximum;     // [padded]: running maximum of x; stays 0 where exp is bounded
  double* attraction;  // [blocks]: sum of s d over the pairs whose first block this is

  // backward
  const T* z_term;  // [padded]: 1 / Z where exp is bounded, else log Z
  T* grad;          // [channels / kStripe][padded][kStripe]: gradient of the unit vectors, times `scale`

  int64_t block_rows(int64_t block) const {
    const int64_t left = count - block * kBlock;
    return left < kBlock ? left : kBlock;
  }

  int64_t blocks() const { return padded / kBlock; }

  // Whether the tile pair is skipped: d = 0 throughout, and exp(0) = 1 whatever the vectors.
  bool skips(int64_t a, int64_t b) const {
    if (!skips_equal || !uniform[a] || !uniform[b]) return false;
    for (int64_t m = 0; m < num_classes; ++m) {
      if (ratios[(a * num_classes + m) * kBlock] != ratios[(b * num_classes + m) * kBlock]) return false;
    }
    return true;
  }
};

}  // namespace csf::pdcr
