// Counting the labels of all patches: images, channels and parts of images go to different threads. All sums are of
// integers, so that the bits do not depend on how they are split. Tested by tests/test_foreground_ratio.py.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/foreground_ratio/patches.h"
#include "cpu/foreground_ratio/plan.h"

namespace csf::foreground_ratio {

constexpr int64_t kCounters = 1 << 17;    // of a block: they stay in the cache
constexpr int64_t kLayersAtOnce = 4;      // a sweep reads the labels once for as many
constexpr int64_t kTaskPixels = 1 << 14;  // a task is worth a thread
constexpr int64_t kRowWork = 24;          // pixels that a sweep reads while `count_patch` turns to another row

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

  Cut(const Patches& patches, int64_t all_layers) {
    const auto& extent = patches.axes().extent;
    layers = std::min(all_layers, kLayersAtOnce);
    groups = divide_up(all_layers, layers);
    rows = std::clamp<int64_t>(kCounters / (layers * extent[2]), 1, extent[1]);
    strips = divide_up(extent[1], rows);
    const int64_t wanted = divide_up(2 * torch::stable::get_num_threads(), patches.images() * groups * strips);
    lines = std::max(divide_up(extent[0], wanted), divide_up(kTaskPixels, rows * extent[2]));
    lines = std::min({lines, max_lines(std::min(rows, patches.size(1)) * patches.size(2)), extent[0]});
    chunks = divide_up(extent[0], lines);
  }

  int64_t blocks() const { return strips * chunks; }

  Block block(int64_t index, const Axes& axes) const {
    const int64_t z = index % chunks * lines, y = index / chunks * rows;
    return {z, std::min(z + lines, axes.extent[0]), y, std::min(y + rows, axes.extent[1]), axes.extent[2]};
  }
};

// The faces of an image's patches in a block, sorted by plane.
class SortedFaces {
 public:
  void sort(const Patches& patches, int64_t image, const Block& block) {
    first_.assign(block.z_end - block.z_begin + 3, 0);
    for_each(patches, image, block, [&](int64_t z, const Face&) { ++first_[z - block.z_begin + 2]; });
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    faces_.resize(first_.back());
    for_each(patches, image, block,
             [&](int64_t z, const Face& face) { faces_[first_[z - block.z_begin + 1]++] = face; });
  }

  Faces get() const { return {faces_.data(), first_.data()}; }

 private:
  template <class Add>
  static void for_each(const Patches& patches, int64_t image, const Block& block, const Add& add) {
    for (int64_t index = 0; index < patches.count(); ++index) {
      const Patch patch = patches.inside(image, index);
      const int64_t z_begin = std::max(patch.begin[0], block.z_begin);
      const int64_t z_end = std::min(patch.end[0], block.z_end);
      const int64_t row = std::max(patch.begin[1], block.y_begin) - block.y_begin;
      const int64_t rows = std::min(patch.end[1], block.y_end) - block.y_begin - row;
      const Rectangle rectangle{row, rows, patch.begin[2], patch.end[2] - patch.begin[2]};
      if (z_begin >= z_end || rectangle.rows <= 0 || rectangle.columns <= 0) continue;
      if (z_begin > block.z_begin) add(z_begin, Face{index, rectangle, false});
      add(z_end, Face{index, rectangle, true});
    }
  }

  std::vector<Face> faces_;
  std::vector<int64_t> first_;
};

// The sums of all patches of all images, each patch's classes first.
struct PatchSums {
  int64_t patches, stride;
  double unit;      // of the classes' sums
  int64_t ignored;  // which of a patch's sums counts its ignored pixels, -1 for none; it may be a class's
  std::vector<uint64_t> data;

  PatchSums(const Patches& patches, int64_t stride, double unit, int64_t ignored)
      : patches(patches.count()),
        stride(stride),
        unit(unit),
        ignored(ignored),
        data(patches.images() * patches.count() * stride) {}

  Sums of_image(int64_t image, int64_t first, bool shared) {
    return {data.data() + image * patches * stride + first, stride, shared};
  }
  double sum(int64_t patch, int64_t index) const { return static_cast<int64_t>(data[patch * stride + index]); }
};

// The kernels for a kind of layers (count_kernel.h), of the capability in use.
template <class Layer>
struct Kernels {
  void (*sweep)(const Layer* layers, int64_t count, const Block&, const Faces&, const Workspace&, const Sums&);
  void (*count_patch)(const Layer& layer, const Patch&, int64_t index, const Workspace&, const Sums&);
};

// Adds `layers` layers, make_layer(image, i), of all images to the sums that start at `first`.
template <class Layer, class MakeLayer>
void accumulate(const Kernels<Layer>& kernels, const Patches& patches, int64_t layers, const MakeLayer& make_layer,
                PatchSums& sums, int64_t first) {
  const Axes& axes = patches.axes();
  const int64_t images = patches.images();
  if (images == 0 || patches.count() == 0 || axes.pixels() == 0) return;

  const double patch_work = static_cast<double>(patches.size(0)) * patches.size(1) * (patches.size(2) + kRowWork);
  if (patch_work * patches.count() < axes.pixels()) {
    torch::stable::parallel_for(0, images * patches.count(), 16, [&](int64_t begin, int64_t end) {
      const ThreadMemory memory(1, 1, patches.size(2));
      for (int64_t index = begin; index < end; ++index) {
        const int64_t image = index / patches.count(), patch = index % patches.count();
        for (int64_t i = 0; i < layers; ++i) {
          kernels.count_patch(make_layer(image, i), patches.inside(image, patch), patch, memory.get(),
                sums.of_image(image, first + i * Layer::values, false));
        }
      }
    });
    return;
  }

  const Cut cut(patches, layers);
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
      if (index != sorted_block || (image != sorted_image && !patches.same_in_all_images())) {
        faces.sort(patches, image, block);
        sorted_block = index;
        sorted_image = image;
      }
      group.clear();
      const int64_t end_layer = std::min(layer + cut.layers, layers);
      for (int64_t i = layer; i < end_layer; ++i) group.push_back(make_layer(image, i));
      kernels.sweep(group.data(), group.size(), block, faces.get(), memory.get(),
                    sums.of_image(image, first + layer * Layer::values, cut.blocks() > 1));
    }
  });
}

}  // namespace csf::foreground_ratio
