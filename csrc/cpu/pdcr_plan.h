// What PDCR's tiles work on: the vectors of one image, sorted by ratio and packed in two layouts.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace csf::pdcr {

constexpr int64_t kBlock = 96;  // vectors in a block: a multiple of every register tile's rows, and of kPanel
constexpr int64_t kPanel = 32;  // values in a panel's row

// How a pair is scored: see contrastseg_fast/ops/pdcr.py.
template <class T>
struct Score {
  T distance_scale;
  T num_slope;
  T den_bias;
  T den_slope;
  T exponent_bias;   // den_bias / temperature
  T exponent_slope;  // den_slope / temperature
  T shift;
  int64_t num_classes;
  bool categorical;
  bool bounded;  // exp never overflows, whatever the vectors: no running maximum is needed
};

template <class T>
struct Image {
  int64_t count;       // valid vectors
  int64_t padded;      // count rounded up to whole blocks; padding rows are zero
  int64_t channels;
  const T* rows;       // [channels / kPanel][padded][kPanel]: the vectors, scaled by powers of two; not in a forward with AMX
  const T* columns;    // [padded / kPanel][channels][kPanel]: the same, transposed; with AMX, in its place,
  const int32_t* terms;        // the same as bf16 terms, in the form `left` of pdcr_amx.h
  const int32_t* right_terms;  // in the form `right`; null where memory does not allow it
  const T* inverse;    // [padded]: 1 / length of the scaled vector, 0 for zero vectors and padding
  const T* present;    // [padded]: 1, or 0 for padding
  const T* ratios;     // [blocks][num_classes][kBlock]
  const uint8_t* uniform;  // [blocks]: all ratios of the block are equal

  // forward
  double* z;            // [padded]: sum of exp(x - maximum)
  double* maximum;      // [padded]: running maximum of x; stays 0 where exp is bounded
  double* attraction;   // [blocks]: sum of s d over the pairs whose first block this is

  // backward
  const T* partition;  // [padded]: 1 / Z where exp is bounded, else log Z
  T* grad;             // [channels / kPanel][padded][kPanel]: gradient of the unit vectors over `inverse`

  int64_t block_rows(int64_t block) const {
    const int64_t left = count - block * kBlock;
    return left < kBlock ? left : kBlock;
  }
  int64_t blocks() const { return padded / kBlock; }
};

// A pair of groups (by their first blocks, a <= b) of an image, and how many tasks must have touched each before.
struct Task {
  int32_t image;
  int32_t a, b;
  int32_t turn_a, turn_b;
};

}  // namespace csf::pdcr
