// Foreground ratios (Eq. 4) on the CPU: the labels are read once; no one-hot labels and no table of sums.
//
// The image is swept along its slowest axis with one plane of counters; see foreground_ratio_plan.h. A box is
// the difference of two sums over a rectangle of that plane, one where the box ends and one where it begins.
// Images, channels and parts of images go to different threads; all sums are of integers, so that the bits do
// not depend on how they are split.
#include "cpu/foreground_ratio_plan.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/capability.h"

namespace csf::foreground_ratio {
namespace {

#define CSF_KERNEL "cpu/foreground_ratio_kernel.h"
#include "cpu/foreach_capability.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kCounters = 1 << 17;     // of a block: they stay in the cache
constexpr int64_t kLayersAtOnce = 4;       // a sweep reads the labels once for as many
constexpr int64_t kTaskPixels = 1 << 14;   // a task is worth a thread
constexpr int64_t kRowWork = 24;           // pixels that a sweep reads while `count_box` turns to another row

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The labels' spatial axes as planes, rows and columns, slowest in memory first; axis -1 where there is none.
struct Axes {
  std::array<int64_t, 3> axis{-1, -1, -1};
  std::array<int64_t, 3> extent{1, 1, 1};
  std::array<int64_t, 3> stride{0, 0, 1};

  Axes(const Tensor& labels, int64_t dims) {
    const int64_t first = labels.dim() - dims;
    std::array<int64_t, 3> order{0, 1, 2};
    std::stable_sort(order.begin(), order.begin() + dims, [&](int64_t a, int64_t b) {
      return labels.stride(first + a) > labels.stride(first + b);
    });
    constexpr int64_t place[4][3] = {{}, {2}, {0, 2}, {0, 1, 2}};
    for (int64_t i = 0; i < dims; ++i) {
      const int64_t target = place[dims][i];
      axis[target] = order[i];
      extent[target] = labels.size(first + order[i]);
      stride[target] = labels.stride(first + order[i]);
    }
  }

  int64_t pixels() const { return extent[0] * extent[1] * extent[2]; }

  template <class T>
  Labels<T> view(const T* data) const {
    return {data, {stride[0], stride[1], stride[2]}};
  }
};

// The boxes of all images, their axes in the order of `axes`.
class Boxes {
 public:
  Boxes(const Tensor& starts, const std::vector<int64_t>& size, int64_t images, const Axes& axes)
      : starts_(torch::stable::contiguous(torch::stable::to(starts, ScalarType::Long))),
        data_(starts_.const_data_ptr<int64_t>()),
        axes_(axes),
        dims_(size.size()),
        images_(images),
        count_(starts.size(-2)),
        image_stride_(starts.dim() == 3 ? count_ * dims_ : 0) {
    for (int64_t i = 0; i < 3; ++i) size_[i] = axes.axis[i] < 0 ? 1 : size[axes.axis[i]];
  }

  const Axes& axes() const { return axes_; }
  int64_t images() const { return images_; }
  int64_t count() const { return count_; }
  bool same_in_all_images() const { return image_stride_ == 0; }
  int64_t size(int64_t axis) const { return std::min(size_[axis], axes_.extent[axis]); }

  // Pixels of a whole box, also outside the image.
  double area() const { return static_cast<double>(size_[0]) * size_[1] * size_[2]; }

  Box inside(int64_t image, int64_t index) const {
    const int64_t* start = data_ + image * image_stride_ + index * dims_;
    Box box;
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t begin =
          axes_.axis[i] < 0 ? 0 : std::clamp(start[axes_.axis[i]], -size_[i], axes_.extent[i]);
      box.begin[i] = std::max<int64_t>(begin, 0);
      box.end[i] = std::min(begin + size_[i], axes_.extent[i]);
    }
    return box;
  }

 private:
  Tensor starts_;
  const int64_t* data_;
  Axes axes_;
  int64_t size_[3];
  int64_t dims_, images_, count_, image_stride_;
};

// Memory of one thread for blocks of at most `rows` times `columns` pixels.
class ThreadMemory {
 public:
  ThreadMemory(int64_t layers, int64_t rows, int64_t columns)
      : counters_(allocate(layers * rows * columns + kReach)),
        integral_(allocate((rows + 1) * (columns + 1) * 2)),
        row_(allocate(columns)) {}

  Workspace get() const { return {counters_.get(), integral_.get(), row_.get()}; }

 private:
  struct Free {
    void operator()(uint64_t* data) const { ::operator delete[](data, std::align_val_t{64}); }
  };
  using Memory = std::unique_ptr<uint64_t[], Free>;
  static Memory allocate(int64_t words) { return Memory(new (std::align_val_t{64}) uint64_t[words]); }

  Memory counters_, integral_, row_;
};

// How images are cut into blocks.
struct Cut {
  int64_t layers, groups;  // `layers` at once, so that the labels are read seldom
  int64_t rows, strips;    // along y, so that a block's counters stay in the cache
  int64_t lines, chunks;   // along z, so that no counter overflows and all threads have work

  Cut(const Boxes& boxes, int64_t all_layers) {
    const auto& extent = boxes.axes().extent;
    layers = std::min(all_layers, kLayersAtOnce);
    groups = divide_up(all_layers, layers);
    rows = std::clamp<int64_t>(kCounters / (layers * extent[2]), 1, extent[1]);
    strips = divide_up(extent[1], rows);
    const int64_t wanted = divide_up(2 * torch::stable::get_num_threads(), boxes.images() * groups * strips);
    lines = std::max(divide_up(extent[0], wanted), divide_up(kTaskPixels, rows * extent[2]));
    lines = std::min({lines, max_lines(std::min(rows, boxes.size(1)) * boxes.size(2)), extent[0]});
    chunks = divide_up(extent[0], lines);
  }

  int64_t blocks() const { return strips * chunks; }

  Block block(int64_t index, const Axes& axes) const {
    const int64_t z = index % chunks * lines, y = index / chunks * rows;
    return {z, std::min(z + lines, axes.extent[0]), y, std::min(y + rows, axes.extent[1]), axes.extent[2]};
  }
};

// The faces of an image's boxes in a block, sorted by plane.
class SortedFaces {
 public:
  void sort(const Boxes& boxes, int64_t image, const Block& block) {
    first_.assign(block.z_end - block.z_begin + 3, 0);
    for_each(boxes, image, block, [&](int64_t z, const Face&) { ++first_[z - block.z_begin + 2]; });
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    faces_.resize(first_.back());
    for_each(boxes, image, block,
             [&](int64_t z, const Face& face) { faces_[first_[z - block.z_begin + 1]++] = face; });
  }

  Faces get() const { return {faces_.data(), first_.data()}; }

 private:
  template <class Add>
  static void for_each(const Boxes& boxes, int64_t image, const Block& block, const Add& add) {
    for (int64_t index = 0; index < boxes.count(); ++index) {
      const Box box = boxes.inside(image, index);
      const int64_t z_begin = std::max(box.begin[0], block.z_begin);
      const int64_t z_end = std::min(box.end[0], block.z_end);
      const int64_t row = std::max(box.begin[1], block.y_begin) - block.y_begin;
      const int64_t rows = std::min(box.end[1], block.y_end) - block.y_begin - row;
      const Rectangle rectangle{row, rows, box.begin[2], box.end[2] - box.begin[2]};
      if (z_begin >= z_end || rectangle.rows <= 0 || rectangle.columns <= 0) continue;
      if (z_begin > block.z_begin) add(z_begin, Face{index, rectangle, false});
      add(z_end, Face{index, rectangle, true});
    }
  }

  std::vector<Face> faces_;
  std::vector<int64_t> first_;
};

// The sums of all boxes of all images, each box's classes first.
struct AllSums {
  int64_t boxes, stride;
  double unit;      // of the classes' sums
  int64_t ignored;  // which of a box's sums counts its ignored pixels, -1 for none; it may be a class's
  std::vector<uint64_t> data;

  AllSums(const Boxes& boxes, int64_t stride, double unit, int64_t ignored)
      : boxes(boxes.count()),
        stride(stride),
        unit(unit),
        ignored(ignored),
        data(boxes.images() * boxes.count() * stride) {}

  Sums of_image(int64_t image, int64_t first, bool shared) {
    return {data.data() + image * boxes * stride + first, stride, shared};
  }
  double sum(int64_t box, int64_t index) const { return static_cast<int64_t>(data[box * stride + index]); }
};

// Adds `layers` layers, make_layer(image, i), of all images to the sums that start at `first`.
template <class MakeLayer>
void accumulate(const Boxes& boxes, int64_t layers, const MakeLayer& make_layer, AllSums& sums,
                int64_t first) {
  using Layer = decltype(make_layer(0, 0));
  const Axes& axes = boxes.axes();
  const int64_t images = boxes.images();
  if (images == 0 || boxes.count() == 0 || axes.pixels() == 0) return;

  const double box_work = static_cast<double>(boxes.size(0)) * boxes.size(1) * (boxes.size(2) + kRowWork);
  if (box_work * boxes.count() < axes.pixels()) {
    const auto count = CSF_DISPATCH(count_box<Layer>);
    torch::stable::parallel_for(0, images * boxes.count(), 16, [&](int64_t begin, int64_t end) {
      const ThreadMemory memory(1, 1, boxes.size(2));
      for (int64_t index = begin; index < end; ++index) {
        const int64_t image = index / boxes.count(), box = index % boxes.count();
        for (int64_t i = 0; i < layers; ++i) {
          count(make_layer(image, i), boxes.inside(image, box), box, memory.get(),
                sums.of_image(image, first + i * Layer::values, false));
        }
      }
    });
    return;
  }

  const Cut cut(boxes, layers);
  const auto run = CSF_DISPATCH(sweep<Layer>);
  const int64_t grain = divide_up(kTaskPixels, cut.lines * cut.rows * axes.extent[2]);
  torch::stable::parallel_for(0, cut.blocks() * images * cut.groups, grain, [&](int64_t begin, int64_t end) {
    const ThreadMemory memory(cut.layers, cut.rows, axes.extent[2]);
    SortedFaces faces;
    std::vector<Layer> group;
    int64_t sorted_block = -1, sorted_image = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task % cut.groups * cut.layers, image = task / cut.groups % images;
      const int64_t index = task / cut.groups / images;
      const Block block = cut.block(index, axes);
      if (index != sorted_block || (image != sorted_image && !boxes.same_in_all_images())) {
        faces.sort(boxes, image, block);
        sorted_block = index;
        sorted_image = image;
      }
      group.clear();
      const int64_t end_layer = std::min(layer + cut.layers, layers);
      for (int64_t i = layer; i < end_layer; ++i) group.push_back(make_layer(image, i));
      run(group.data(), group.size(), block, faces.get(), memory.get(),
          sums.of_image(image, first + layer * Layer::values, cut.blocks() > 1));
    }
  });
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
AllSums count_classes(const Tensor& labels, const Boxes& boxes, int64_t num_classes,
                      std::optional<int64_t> ignore_index) {
  const Axes& axes = boxes.axes();
  const int64_t mark = ignore_index.value_or(0);
  const bool separates_ignored = mark < 0 || mark >= num_classes;
  const int64_t ignored = !ignore_index.has_value() ? -1 : separates_ignored ? num_classes : mark;
  const int64_t layers = divide_up(num_classes + separates_ignored, 4);
  AllSums sums(boxes, 4 * layers, 1, ignored);
  const auto make_layer = [&](int64_t image, int64_t i) {
    const T* data = data_of<T>(labels) + image * labels.stride(0);
    return ClassLayer<T>{axes.view(data), 4 * i, num_classes, separates_ignored, mark};
  };
  accumulate(boxes, layers, make_layer, sums, 0);
  return sums;
}

// See `_fraction_bits` in contrastseg_fast/ops/foreground_ratio.py.
double fixed_point_scale(const Boxes& boxes) {
  int area_bits;
  std::frexp(static_cast<double>(boxes.size(0)) * boxes.size(1) * boxes.size(2), &area_bits);
  return std::ldexp(1.0, std::min(40, 52 - area_bits));
}

// Soft labels `(B, M, *spatial)`.
template <class T>
AllSums sum_channels(const Tensor& labels, const Boxes& boxes, std::optional<int64_t> ignore_index) {
  const Axes& axes = boxes.axes();
  const int64_t channels = labels.size(1);
  const bool ignores = ignore_index.has_value();
  const std::vector<uint8_t> ignored =
      ignores ? ignored_pixels<T>(labels, axes, *ignore_index) : std::vector<uint8_t>();
  const auto ignored_of = [&](int64_t image) {
    const uint8_t* data = ignores ? ignored.data() + image * axes.pixels() : nullptr;
    return Labels<uint8_t>{data, {axes.extent[1] * axes.extent[2], axes.extent[2], 1}};
  };
  const double scale = fixed_point_scale(boxes);
  const int64_t values = channels + (ignores ? ClassLayer<uint8_t>::values : 0);
  AllSums sums(boxes, values, 1 / scale, ignores ? channels : -1);
  const auto make_layer = [&](int64_t image, int64_t channel) {
    const T* data = data_of<T>(labels) + image * labels.stride(0) + channel * labels.stride(1);
    return ChannelLayer<T>{axes.view(data), ignored_of(image), scale};
  };
  accumulate(boxes, channels, make_layer, sums, 0);
  if (ignores) {
    const auto make_ignored = [&](int64_t image, int64_t) {
      return ClassLayer<uint8_t>{ignored_of(image), 1, 2, false, 0};
    };
    accumulate(boxes, 1, make_ignored, sums, channels);
  }
  return sums;
}

// Calls run(T()) for the C++ type T of a dtype that the kernels read.
template <class Run>
auto dispatch(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte: return run(uint8_t());
    case ScalarType::Char: return run(int8_t());
    case ScalarType::Short: return run(int16_t());
    case ScalarType::Int: return run(int32_t());
    case ScalarType::Long: return run(int64_t());
    case ScalarType::Float: return run(float());
    default: return run(double());
  }
}

// The dtype that the kernels read labels in.
ScalarType readable(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16: return ScalarType::Float;
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64: return ScalarType::Long;
    default: return dtype;
  }
}

// A string that the dispatcher hands over.
class String {
 public:
  explicit String(StringHandle handle) : handle_(handle) {}
  ~String() { torch_delete_string(handle_); }
  std::string_view view() const {
    const char* data;
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    return {data, length};
  }

 private:
  StringHandle handle_;
};

// The ratios and valid fractions of all boxes.
std::tuple<Tensor, Tensor> divide(const AllSums& sums, const Boxes& boxes, int64_t num_classes,
                                  std::string_view border, const Tensor& like) {
  const bool clip = border == "clip", background = border == "background";
  const int64_t images = boxes.images(), count = boxes.count();
  Tensor ratios = torch::stable::new_empty(like, {images, count, num_classes}, ScalarType::Float);
  Tensor valid_fraction = torch::stable::new_empty(like, {images, count}, ScalarType::Float);
  float* ratio = ratios.mutable_data_ptr<float>();
  float* valid = valid_fraction.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, images * count, 512, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const double inside = boxes.inside(index / count, index % count).pixels();
      const double ignored = sums.ignored < 0 ? 0 : sums.sum(index, sums.ignored);
      const double denominator = (clip ? inside : boxes.area()) - ignored;
      for (int64_t m = 0; m < num_classes; ++m) {
        double pixels = m == sums.ignored ? 0 : sums.sum(index, m) * sums.unit;
        if (m == 0 && background) pixels += boxes.area() - inside;
        ratio[index * num_classes + m] = denominator > 0 ? static_cast<float>(pixels / denominator) : 0;
      }
      valid[index] = inside > 0 ? static_cast<float>((inside - ignored) / inside) : 0;
    }
  });
  return {ratios, valid_fraction};
}

std::tuple<Tensor, Tensor> foreground_ratio(Tensor labels, Tensor starts, std::vector<int64_t> size,
                                            int64_t num_classes, StringHandle border_handle,
                                            std::optional<int64_t> ignore_index) {
  const String border(border_handle);
  const int64_t dims = size.size(), images = labels.size(0);
  const bool soft = labels.dim() == dims + 2;
  STD_TORCH_CHECK(1 <= dims && dims <= 3, "foreground_ratio: size must have 1 to 3 extents");
  STD_TORCH_CHECK(soft ? labels.size(1) == num_classes : labels.dim() == dims + 1,
                  "foreground_ratio: labels must be (B, *spatial) or (B, num_classes, *spatial)");
  STD_TORCH_CHECK(starts.size(-1) == dims && (starts.dim() == 2 || starts.size(0) == images),
                  "foreground_ratio: starts must be (B, N, D) or (N, D)");
  labels = torch::stable::to(labels, readable(labels.scalar_type()));
  const Boxes boxes(starts, size, images, Axes(labels, dims));
  const AllSums sums = dispatch(labels.scalar_type(), [&](auto label) {
    using T = decltype(label);
    return soft ? sum_channels<T>(labels, boxes, ignore_index)
                : count_classes<T>(labels, boxes, num_classes, ignore_index);
  });
  return divide(sums, boxes, num_classes, border.view(), labels);
}

// Whether the tensor's elements lie side by side, in whatever order of the axes.
bool is_dense(const Tensor& tensor) {
  std::vector<std::array<int64_t, 2>> axes;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1) axes.push_back({tensor.stride(i), tensor.size(i)});
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

template <class T>
bool all_in_range(const Tensor& labels, int64_t highest, bool integral, int64_t ignore_index) {
  const auto check = CSF_DISPATCH(in_range<T>);
  std::atomic<bool> right{true};
  torch::stable::parallel_for(0, labels.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    if (!check(data_of<T>(labels) + begin, end - begin, highest, integral, ignore_index)) right = false;
  });
  return right;
}

Tensor labels_in_range(Tensor labels, int64_t highest, bool integral, std::optional<int64_t> ignore_index) {
  if (!is_dense(labels)) labels = torch::stable::contiguous(labels);
  labels = torch::stable::to(labels, readable(labels.scalar_type()));
  const int64_t ignored = ignore_index.value_or(0);  // 0 is always in range
  const bool right = dispatch(labels.scalar_type(), [&](auto label) {
    return all_in_range<decltype(label)>(labels, highest, integral, ignored);
  });
  Tensor result = torch::stable::new_empty(labels, {}, ScalarType::Bool);
  *result.mutable_data_ptr<bool>() = right;
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(contrastseg_fast, CPU, m) {
  m.impl("foreground_ratio", TORCH_BOX(&foreground_ratio));
  m.impl("labels_in_range", TORCH_BOX(&labels_in_range));
}

}  // namespace
}  // namespace csf::foreground_ratio
