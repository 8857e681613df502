// Foreground ratios (Eq. 4) on the CPU: the labels are read once; no one-hot labels and no table of sums. Tested by
// tests/test_foreground_ratio.py.
//
// The image is swept along its slowest axis with one plane of counters; see plan.h. The count of a patch is the
// difference of two sums over a rectangle of that plane, one where the patch ends and one where it begins.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/capability.h"
#include "cpu/foreground_ratio/accumulate.h"
#include "cpu/foreground_ratio/labels.h"
#include "cpu/foreground_ratio/patches.h"
#include "cpu/foreground_ratio/plan.h"
#include "stable_string.h"

namespace csf::foreground_ratio {
namespace {

#define CSF_KERNEL "cpu/foreground_ratio/count_kernel.h"
#include "cpu/foreach_capability.h"

template <class Layer>
Kernels<Layer> kernels() {
  return {CSF_DISPATCH(sweep<Layer>), CSF_DISPATCH(count_patch<Layer>)};
}

// Which pixels of soft labels are ignored: those where all channels hold ignore_index.
template <class T>
std::vector<uint8_t> ignored_pixels(const Tensor& labels, const Axes& axes, double ignore_index) {
  const int64_t images = labels.size(0), channels = labels.size(1), rows = axes.extent[0] * axes.extent[1];
  std::vector<uint8_t> ignored(images * axes.pixels() + kReach, 1);
  torch::stable::parallel_for(0, images * rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / rows, z = index % rows / axes.extent[1], y = index % axes.extent[1];
      uint8_t* target = ignored.data() + index * axes.extent[2];
      for (int64_t channel = 0; channel < channels; ++channel) {
        const T* row = data_of<T>(labels) + image * labels.stride(0) + channel * labels.stride(1) +
                       z * axes.stride[0] + y * axes.stride[1];
        for (int64_t x = 0; x < axes.extent[2]; ++x) target[x] &= row[x * axes.stride[2]] == ignore_index;
      }
    }
  });
  return ignored;
}

// Class indices `(B, *spatial)`.
template <class T>
PatchSums count_classes(const Tensor& labels, const Patches& patches, int64_t num_classes,
                      std::optional<int64_t> ignore_index) {
  const Axes& axes = patches.axes();
  const int64_t mark = ignore_index.value_or(0);
  const bool separates_ignored = mark < 0 || mark >= num_classes;
  const int64_t ignored = !ignore_index.has_value() ? -1 : separates_ignored ? num_classes : mark;
  const int64_t layers = divide_up(num_classes + separates_ignored, 4);
  PatchSums sums(patches, 4 * layers, 1, ignored);
  const auto make_layer = [&](int64_t image, int64_t i) {
    const T* data = data_of<T>(labels) + image * labels.stride(0);
    return ClassLayer<T>{axes.view(data), 4 * i, num_classes, separates_ignored, mark};
  };
  accumulate(kernels<ClassLayer<T>>(), patches, layers, make_layer, sums, 0);
  return sums;
}

// See `_fraction_bits` in contrastseg_fast/ops/foreground_ratio.py.
double fixed_point_scale(const Patches& patches) {
  int area_bits;
  std::frexp(static_cast<double>(patches.size(0)) * patches.size(1) * patches.size(2), &area_bits);
  return std::ldexp(1.0, std::min(40, 52 - area_bits));
}

// Soft labels `(B, M, *spatial)`.
template <class T>
PatchSums sum_channels(const Tensor& labels, const Patches& patches, std::optional<int64_t> ignore_index) {
  const Axes& axes = patches.axes();
  const int64_t channels = labels.size(1);
  const bool ignores = ignore_index.has_value();
  const std::vector<uint8_t> ignored =
      ignores ? ignored_pixels<T>(labels, axes, *ignore_index) : std::vector<uint8_t>();
  const auto ignored_of = [&](int64_t image) {
    const uint8_t* data = ignores ? ignored.data() + image * axes.pixels() : nullptr;
    return Labels<uint8_t>{data, {axes.extent[1] * axes.extent[2], axes.extent[2], 1}};
  };
  const double scale = fixed_point_scale(patches);
  const int64_t values = channels + (ignores ? ClassLayer<uint8_t>::values : 0);
  PatchSums sums(patches, values, 1 / scale, ignores ? channels : -1);
  const auto make_layer = [&](int64_t image, int64_t channel) {
    const T* data = data_of<T>(labels) + image * labels.stride(0) + channel * labels.stride(1);
    return ChannelLayer<T>{axes.view(data), ignored_of(image), scale};
  };
  accumulate(kernels<ChannelLayer<T>>(), patches, channels, make_layer, sums, 0);
  if (ignores) {
    const auto make_ignored = [&](int64_t image, int64_t) {
      return ClassLayer<uint8_t>{ignored_of(image), 1, 2, false, 0};
    };
    accumulate(kernels<ClassLayer<uint8_t>>(), patches, 1, make_ignored, sums, channels);
  }
  return sums;
}

// Ratios and valid fractions of all patches, and their ratios inside the image if these are asked for.
std::tuple<Tensor, Tensor, Tensor> divide(const PatchSums& sums, const Patches& patches, int64_t num_classes,
                                          std::string_view border, bool with_inside, const Tensor& like) {
  const bool clip = border == "clip", background = border == "background";
  const int64_t images = patches.images(), count = patches.count();
  const int64_t inside_classes = with_inside ? num_classes : 0;
  Tensor ratios = torch::stable::new_empty(like, {images, count, num_classes}, ScalarType::Float);
  Tensor valid_fraction = torch::stable::new_empty(like, {images, count}, ScalarType::Float);
  Tensor inside_ratios = torch::stable::new_empty(like, {images, count, inside_classes}, ScalarType::Float);
  float* ratio = ratios.mutable_data_ptr<float>();
  float* valid = valid_fraction.mutable_data_ptr<float>();
  float* inside_ratio = inside_ratios.mutable_data_ptr<float>();
  const auto quotient = [](double pixels, double denominator) {
    return denominator > 0 ? static_cast<float>(pixels / denominator) : 0;
  };
  torch::stable::parallel_for(0, images * count, 512, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const double inside = patches.inside(index / count, index % count).pixels();
      const double ignored = sums.ignored < 0 ? 0 : sums.sum(index, sums.ignored);
      const double outside = background ? patches.area() - inside : 0;  // counts as class 0
      const double denominator = (clip ? inside : patches.area()) - ignored;
      for (int64_t m = 0; m < num_classes; ++m) {
        const double pixels = m == sums.ignored ? 0 : sums.sum(index, m) * sums.unit;
        ratio[index * num_classes + m] = quotient(m == 0 ? pixels + outside : pixels, denominator);
        if (with_inside) inside_ratio[index * num_classes + m] = quotient(pixels, inside - ignored);
      }
      valid[index] = quotient(inside - ignored, inside);
    }
  });
  return {ratios, valid_fraction, inside_ratios};
}

std::tuple<Tensor, Tensor, Tensor> foreground_ratio(Tensor labels, Tensor starts, std::vector<int64_t> size,
                                                    int64_t num_classes, StringHandle border,
                                                    std::optional<int64_t> ignore_index, bool with_inside,
                                                    StringHandle backend) {
  const String border_word(border);
  check_runs_on_cpu(backend);
  const int64_t dims = size.size(), images = labels.size(0);
  const bool soft = labels.dim() == dims + 2;
  STD_TORCH_CHECK(1 <= dims && dims <= 3, "foreground_ratio: size must have 1 to 3 extents");
  STD_TORCH_CHECK(soft ? labels.size(1) == num_classes : labels.dim() == dims + 1,
                  "foreground_ratio: labels must be (B, *spatial) or (B, num_classes, *spatial)");
  STD_TORCH_CHECK(starts.size(-1) == dims && (starts.dim() == 2 || starts.size(0) == images),
                  "foreground_ratio: starts must be (B, N, D) or (N, D)");
  labels = torch::stable::to(labels, readable(labels.scalar_type()));
  const Patches patches(starts, size, images, Axes(labels, dims));
  const PatchSums sums = dispatch(labels.scalar_type(), [&](auto label) {
    using T = decltype(label);
    return soft ? sum_channels<T>(labels, patches, ignore_index)
                : count_classes<T>(labels, patches, num_classes, ignore_index);
  });
  return divide(sums, patches, num_classes, border_word.view(), with_inside, labels);
}

}  // namespace
}  // namespace csf::foreground_ratio

STABLE_TORCH_LIBRARY_IMPL(contrastseg_fast, CPU, m) {
  m.impl("foreground_ratio", TORCH_BOX(&csf::foreground_ratio::foreground_ratio));
}
