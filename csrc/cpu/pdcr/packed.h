// The vectors of all images as PDCR's tiles read them. Tested by tests/test_pdcr.py.
//
// The valid vectors of an image are sorted by ratio, so that equal ratios stand together. They are multiplied by powers
// of two, and packed (image.h).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "affinity.h"
#include "cpu/buffer.h"
#include "cpu/pdcr/image.h"

namespace csf::pdcr {

using torch::stable::Tensor;

template <class T>
class Packed {
 public:
  // `backward`: for the gradient, which reads the packed rows again.
  Packed(const Tensor& vectors, const Tensor& ratios, const std::optional<Tensor>& valid,
         const Affinity<double>& affinity, bool backward);

  int64_t batch() const { return order_.size(); }
  int64_t channels() const { return channels_; }
  int64_t stripes() const { return divide_up(channels_, kStripe); }

  // Rows of all images, padding included; those of an image begin at first_row.
  int64_t rows() const { return first_block_.back() * kBlock; }
  int64_t first_row(int64_t image) const { return first_block_[image] * kBlock; }

  // For every row of an image that is no padding, the index of its vector.
  const std::vector<int64_t>& order(int64_t image) const { return order_[image]; }

  // The inputs of the tiles of an image; what they add to is still to be set.
  Image<T> image(int64_t index) const;

  // bf16 terms that hold a value exactly, where AMX multiplies them; 0 where SIMD code multiplies the values.
  int num_terms() const { return num_terms_; }

  // sum_i u_i of an image, by blocks in order: the rank-one part of the numerator.
  std::vector<double> unit_sum(int64_t image) const;

  // 2^-k of a packed row: the power of two it was multiplied by.
  double row_power(int64_t row) const { return std::ldexp(1.0, -powers_[row]); }

  // Frees what only the tiles need.
  void release_columns();

 private:
  template <class Input>
  void pack(const Tensor& vectors);
  template <class Ratio>
  void pack_ratios(const Tensor& ratios);
  bool is_bounded(const Affinity<double>& affinity) const;

  // Pairs of bf16 terms in a packed row.
  int64_t row_pairs() const { return stripes() * kStripe / 2 * num_terms_; }

  std::vector<std::vector<int64_t>> order_;
  std::vector<int64_t> first_block_;
  int64_t channels_, num_classes_;
  int num_terms_;
  bool keeps_rows_, keeps_right_, skips_equal_, bounded_ = false;
  Buffer<T> rows_, columns_, scale_, present_, ratios_;
  Buffer<int32_t> terms_, right_terms_;
  Buffer<int> powers_;  // k of every row
  Buffer<uint8_t> uniform_;
  Buffer<double> block_sums_;
};

// The gradient of the vectors, from the images' `grad` and the incoming gradient of L / n^2 of every image.
template <class T>
void write_gradient(const Packed<T>& packed, const std::vector<Image<T>>& images, const Affinity<double>& affinity,
                    const std::vector<double>& image_grads, Tensor& out);

}  // namespace csf::pdcr
