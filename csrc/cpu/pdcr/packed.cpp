// Packing vectors for PDCR's tiles, and unpacking their gradients; see packed.h.
#include "cpu/pdcr/packed.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/capability.h"

#if defined(CSF_AMX)
#include <immintrin.h>
#endif

namespace csf::pdcr {
namespace {

#define CSF_KERNEL "cpu/pdcr/rows_kernel.h"
#include "cpu/foreach_capability.h"
#undef CSF_KERNEL
#define CSF_KERNEL "cpu/pdcr/amx_terms.h"
#include "cpu/for_amx.h"

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// The valid vectors of every image, sorted by their ratios' bits.
std::vector<std::vector<int64_t>> sorted_rows(const Tensor& ratios, const std::optional<Tensor>& valid) {
  const int64_t batch = ratios.size(0), count = ratios.size(1), classes = ratios.size(2);
  const auto* ratio = static_cast<const char*>(ratios.const_data_ptr());
  const int64_t row_bytes = classes * (ratios.scalar_type() == ScalarType::Double ? sizeof(double) : sizeof(float));
  const bool* keep = valid.has_value() ? valid->const_data_ptr<bool>() : nullptr;
  std::vector<std::vector<int64_t>> rows(batch);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const char* base = ratio + image * count * row_bytes;
      for (int64_t i = 0; i < count; ++i) {
        if (keep == nullptr || keep[image * count + i]) rows[image].push_back(i);
      }
      std::sort(rows[image].begin(), rows[image].end(), [&](int64_t i, int64_t j) {
        const int order = std::memcmp(base + i * row_bytes, base + j * row_bytes, row_bytes);
        return order != 0 ? order < 0 : i < j;
      });
    }
  });
  return rows;
}

// See Packed::num_terms.
int exact_terms(ScalarType dtype) {
#if defined(CSF_AMX)
  if (capability() != Capability::amx) return 0;
  switch (dtype) {
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    case ScalarType::Float: return 3;
    default: return 0;
  }
#else
  return 0;
#endif
}

}  // namespace

template <class T>
Packed<T>::Packed(const Tensor& vectors, const Tensor& ratios, const std::optional<Tensor>& valid,
                  const Affinity<double>& affinity, bool backward)
    : order_(sorted_rows(ratios, valid)),
      first_block_(vectors.size(0) + 1, 0),
      channels_(vectors.size(2)),
      num_classes_(ratios.size(2)),
      num_terms_(exact_terms(vectors.scalar_type())),
      // With AMX only the gradient's last step reads the rows. Beside them, memory has room for the right form of bf16.
      keeps_rows_(num_terms_ == 0 || backward),
      keeps_right_(num_terms_ > 0 && !(backward && num_terms_ > 1)),
      skips_equal_(affinity.den_bias == 0) {
  for (int64_t image = 0; image < batch(); ++image) {
    first_block_[image + 1] = first_block_[image] + divide_up(order_[image].size(), kBlock);
  }
  rows_ = Buffer<T>(keeps_rows_ ? rows() * stripes() * kStripe : 0);
  terms_ = Buffer<int32_t>(rows() * row_pairs());
  right_terms_ = Buffer<int32_t>(keeps_right_ ? rows() * row_pairs() : 0);
  columns_ = Buffer<T>(num_terms_ == 0 ? rows() * channels_ : 0);
  scale_ = Buffer<T>(rows());
  powers_ = Buffer<int>(rows());
  present_ = Buffer<T>(rows());
  ratios_ = Buffer<T>(rows() * num_classes_);
  uniform_ = Buffer<uint8_t>(first_block_.back());
  block_sums_ = Buffer<double>(first_block_.back() * channels_);
  if (ratios.scalar_type() == ScalarType::Double) {
    pack_ratios<double>(ratios);
  } else {
    pack_ratios<float>(ratios);
  }
  if constexpr (std::is_same_v<T, double>) {
    pack<double>(vectors);
  } else {
    switch (vectors.scalar_type()) {
      case ScalarType::Float: pack<float>(vectors); break;
      case ScalarType::Half: pack<Half>(vectors); break;
      default: pack<BFloat16>(vectors);
    }
  }
  bounded_ = is_bounded(affinity);
}

template <class T>
Image<T> Packed<T>::image(int64_t index) const {
  const int64_t block = first_block_[index], row = block * kBlock;
  Image<T> image{};
  image.count = order_[index].size();
  image.padded = (first_block_[index + 1] - block) * kBlock;
  image.channels = channels_;
  image.num_classes = num_classes_;
  image.first_block = block;
  image.bounded = bounded_;
  image.skips_equal = skips_equal_;
  image.rows = keeps_rows_ ? rows_.get() + row * stripes() * kStripe : nullptr;
  image.columns = num_terms_ == 0 ? columns_.get() + row * channels_ : nullptr;
  image.terms = terms_.get() + row * row_pairs();
  image.right_terms = keeps_right_ ? right_terms_.get() + row * row_pairs() : nullptr;
  image.scale = scale_.get() + row;
  image.present = present_.get() + row;
  image.ratios = ratios_.get() + row * num_classes_;
  image.uniform = uniform_.get() + block;
  return image;
}

template <class T>
std::vector<double> Packed<T>::unit_sum(int64_t image) const {
  std::vector<double> sum(channels_, 0.0);
  for (int64_t block = first_block_[image]; block < first_block_[image + 1]; ++block) {
    for (int64_t c = 0; c < channels_; ++c) sum[c] += block_sums_[block * channels_ + c];
  }
  return sum;
}

template <class T>
void Packed<T>::release_columns() {
  columns_.release();
  terms_.release();
  right_terms_.release();
}

template <class T>
template <class Ratio>
void Packed<T>::pack_ratios(const Tensor& ratios) {
  const int64_t count = ratios.size(1);
  const Ratio* source = ratios.const_data_ptr<Ratio>();
  for (int64_t image = 0; image < batch(); ++image) {
    for (int64_t block = first_block_[image]; block < first_block_[image + 1]; ++block) {
      T* target = ratios_.get() + block * kBlock * num_classes_;
      const int64_t begin = (block - first_block_[image]) * kBlock;
      const int64_t rows = std::min<int64_t>(kBlock, order_[image].size() - begin);
      bool uniform = true;
      for (int64_t m = 0; m < num_classes_; ++m) {
        for (int64_t i = 0; i < kBlock; ++i) {
          // Padding repeats the first row, so that it never makes a block look mixed.
          const int64_t row = order_[image][begin + (i < rows ? i : 0)];
          target[m * kBlock + i] = static_cast<T>(source[(image * count + row) * num_classes_ + m]);
          uniform = uniform && target[m * kBlock + i] == target[m * kBlock];
        }
      }
      uniform_[block] = uniform;
    }
  }
}

template <class T>
template <class Input>
void Packed<T>::pack(const Tensor& vectors) {
  const Input* source = static_cast<const Input*>(vectors.const_data_ptr());
  const int64_t image_stride = vectors.stride(0), row_stride = vectors.stride(1), channel_stride = vectors.stride(2);
  const auto pack_vector = CSF_DISPATCH(pack_vector<Input, T>);
#if defined(CSF_AMX)
  const auto split_vector = num_terms_ == 1   ? &amx::split_vector<1>
                            : num_terms_ == 2 ? &amx::split_vector<2>
                                              : &amx::split_vector<3>;
#endif
  for (int64_t image = 0; image < batch(); ++image) {
    const int64_t first = first_block_[image], padded = (first_block_[image + 1] - first) * kBlock;
    T* rows = rows_.get() + first * kBlock * stripes() * kStripe;
    T* columns = columns_.get() + first * kBlock * channels_;
    torch::stable::parallel_for(first, first_block_[image + 1], 1, [&](int64_t begin, int64_t end) {
      std::vector<T> values(stripes() * kStripe, T(0));
      std::fill(block_sums_.get() + begin * channels_, block_sums_.get() + end * channels_, 0.0);
      for (int64_t row = (begin - first) * kBlock; row < (end - first) * kBlock; ++row) {
        const int64_t packed = first * kBlock + row;
        const bool present = row < int64_t(order_[image].size());
        const Input* vector = present ? source + image * image_stride + order_[image][row] * row_stride : nullptr;
        powers_[packed] = pack_vector(vector, channel_stride, channels_, values.data(), scale_[packed],
                                      block_sums_.get() + packed / kBlock * channels_);
        present_[packed] = present ? T(1) : T(0);
        for (int64_t stripe = 0; keeps_rows_ && stripe < stripes(); ++stripe) {
          std::copy_n(values.data() + stripe * kStripe, kStripe, rows + (stripe * padded + row) * kStripe);
        }
#if defined(CSF_AMX)
        if constexpr (std::is_same_v<T, float>) {
          if (num_terms_ > 0) {
            int32_t* terms = terms_.get() + packed / kStripe * kStripe * row_pairs();
            split_vector(values.data(), stripes(), terms + packed % kStripe * amx::kPairs);
            continue;
          }
        }
#endif
        T* column = columns + row / kStripe * channels_ * kStripe + row % kStripe;
        for (int64_t c = 0; c < channels_; ++c) column[c * kStripe] = values[c];
      }
#if defined(CSF_AMX)
      if (keeps_right_) {
        const int64_t offset = begin * kBlock * row_pairs();
        amx::transpose_tiles(terms_.get() + offset, (end - begin) * kBlock * row_pairs(), right_terms_.get() + offset);
      }
#endif
    });
  }
}

// Whether exp never overflows: the exponents are bounded by d_max, which the spread of the ratios bounds.
template <class T>
bool Packed<T>::is_bounded(const Affinity<double>& affinity) const {
  double spread = 0;
  int64_t longest = 1;
  for (int64_t index = 0; index < batch(); ++index) {
    const Image<T> view = image(index);
    longest = std::max(longest, view.count);
    double sum = 0;
    for (int64_t m = 0; m < num_classes_; ++m) {
      T low = std::numeric_limits<T>::infinity(), high = -low;
      for (int64_t i = 0; i < view.padded; ++i) {
        const T value = view.ratios[(i / kBlock * num_classes_ + m) * kBlock + i % kBlock];
        low = std::min(low, value);
        high = std::max(high, value);
      }
      if (view.count > 0) sum += high - low;
    }
    spread = std::max(spread, sum);
  }
  const double d_max = affinity.categorical ? 1 : affinity.distance_scale * spread;
  const double weight = std::max(std::abs(affinity.den_bias), std::abs(affinity.den_bias + affinity.den_slope * d_max));
  const double exponent = (1 + std::abs(affinity.shift)) * weight / affinity.temperature;
  return exponent + std::log(static_cast<double>(longest)) <= 85;
}

namespace {

template <class Output, class T>
void write_gradient_as(const Packed<T>& packed, const std::vector<Image<T>>& images, const Affinity<double>& affinity,
                       const std::vector<double>& image_grads, Tensor& out) {
  Output* target = static_cast<Output*>(out.mutable_data_ptr());
  const int64_t count = out.size(1), channels = packed.channels();
  const T bias = static_cast<T>(-2 * affinity.num_bias);
  const auto write_row = CSF_DISPATCH(write_gradient_row<Output, T>);
  for (int64_t index = 0; index < packed.batch(); ++index) {
    if (images[index].count < count) std::fill_n(target + index * count * channels, count * channels, Output(0));
  }
  for (int64_t index = 0; index < packed.batch(); ++index) {
    const Image<T>& image = images[index];
    const double n = static_cast<double>(image.count);
    const double factor = image.count == 0 ? 0 : image_grads[index] / (affinity.temperature * n * n);
    const std::vector<double> sum = packed.unit_sum(index);
    const std::vector<T> unit_sum(sum.begin(), sum.end());
    torch::stable::parallel_for(0, image.count, 64, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(2 * channels);
      for (int64_t row = begin; row < end; ++row) {
        const T scale = image.scale[row];
        const double row_factor = scale == 0 ? 0 : factor * packed.row_power(packed.first_row(index) + row);
        write_row(image.grad + row * kStripe, image.rows + row * kStripe, image.padded * kStripe, channels, scale, bias,
                  row_factor, unit_sum.data(), scratch.data(),
                  target + (index * count + packed.order(index)[row]) * channels);
      }
    });
  }
}

}  // namespace

template <class T>
void write_gradient(const Packed<T>& packed, const std::vector<Image<T>>& images, const Affinity<double>& affinity,
                    const std::vector<double>& image_grads, Tensor& out) {
  if constexpr (std::is_same_v<T, double>) {
    write_gradient_as<double>(packed, images, affinity, image_grads, out);
  } else {
    switch (out.scalar_type()) {
      case ScalarType::Float: return write_gradient_as<float>(packed, images, affinity, image_grads, out);
      case ScalarType::Half: return write_gradient_as<Half>(packed, images, affinity, image_grads, out);
      default: return write_gradient_as<BFloat16>(packed, images, affinity, image_grads, out);
    }
  }
}

template class Packed<float>;
template class Packed<double>;
template void write_gradient(const Packed<float>&, const std::vector<Image<float>>&, const Affinity<double>&,
                             const std::vector<double>&, Tensor&);
template void write_gradient(const Packed<double>&, const std::vector<Image<double>>&, const Affinity<double>&,
                             const std::vector<double>&, Tensor&);

}  // namespace csf::pdcr
