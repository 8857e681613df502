// What the entropy gate's CUDA kernels work on, and how a launch is cut into blocks. Plain C++, for host and device.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

namespace csf::entropy_gate::cuda {

using torch::headeronly::ScalarType;

// Elements of a tensor (images, channels, locations); strides count elements, and are 0 along an axis of one.
struct View {
  char* data = nullptr;
  int64_t image = 0, channel = 0, location = 0;
};

// fp64 features have fp64 logits, and only they do. Features, their gradients and the gated features have adjoining
// channels (channels_last), or adjoining locations. The uncertainty and its gradient have adjoining locations.
struct Shape {
  ScalarType feature_type, logit_type;
  int64_t images, channels, classes, locations;
  double inverse_log_classes;
  bool channels_last;
};

struct Forward {
  Shape shape;
  View features, logits;
  View gated, uncertainty;
};

// Either incoming gradient may be absent (data is null); without grad_gated, grad_features stays as it is.
struct Backward {
  Shape shape;
  View grad_gated, grad_uncertainty, features, logits;
  View grad_features, grad_logits;
};

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;  // the widest load of a thread
constexpr int kSectorBytes = 32;  // what memory hands out at least
constexpr int kRowBytes = 512;    // a warp of vectors
constexpr int kHeldBytes = 8192;  // shared memory for logits
constexpr int kBlocksPerProcessor = 4;  // about what a processor holds at a time
constexpr int kLocationsPerBlock = 64;  // channels last, at least
constexpr int kWarp = 32;

// A block gates a tile of neighbouring locations of one image. Where locations adjoin, `lanes` threads stand side by
// side on the tile's locations, and such rows of threads share out the channels. Where channels adjoin, `lanes` threads
// (of one warp) stand side by side on the channels of a location, and such groups share out the locations.
struct Plan {
  int vector;   // elements that a thread loads at once
  int tile;     // locations of a block, at most kThreads
  int lanes;    // a power of two
  int held;     // classes whose logits wait in shared memory; the others are read again, from a cache
  int shared_bytes;
  int64_t tiles_per_image, blocks;
};

inline int element_size(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// Whether every vector of 16 bytes begins at a multiple of 16 bytes, and none is cut.
inline bool has_whole_vectors(const View& view, const Shape& shape) {
  const int vector = kVectorBytes / element_size(shape.feature_type);
  const int64_t between_runs = shape.channels_last ? view.location : view.channel;
  return reinterpret_cast<uintptr_t>(view.data) % kVectorBytes == 0 && view.image % vector == 0 &&
         between_runs % vector == 0 && (shape.channels_last ? shape.channels : shape.locations) % vector == 0;
}

inline Plan make_plan(const Shape& shape, bool whole_vectors, bool sums_channels, int processors) {
  const int size = element_size(shape.feature_type);
  const int computed_size = size == 8 ? 8 : 4;
  Plan plan{};
  plan.vector = whole_vectors ? kVectorBytes / size : 1;
  int least_tile = kSectorBytes / size;
  plan.tile = kRowBytes / size;
  if (shape.channels_last) {
    plan.lanes = 1;
    while (plan.lanes < kWarp && 2 * plan.lanes * plan.vector <= shape.channels) plan.lanes *= 2;
    least_tile = kThreads / plan.lanes;
    plan.tile = std::max(least_tile, kLocationsPerBlock);
  }
  const auto tiles_per_image = [&] { return (shape.locations + plan.tile - 1) / plan.tile; };
  while (plan.tile > least_tile && shape.images * tiles_per_image() < int64_t{kBlocksPerProcessor} * processors) {
    plan.tile /= 2;
  }
  if (!shape.channels_last) plan.lanes = plan.tile / plan.vector;
  plan.held = static_cast<int>(std::min<int64_t>(shape.classes, kHeldBytes / (plan.tile * computed_size)));
  const int sums = !sums_channels ? 0 : shape.channels_last ? plan.tile : kThreads * plan.vector;
  plan.shared_bytes = (plan.tile * (1 + plan.held) + sums) * computed_size;
  plan.tiles_per_image = tiles_per_image();
  plan.blocks = shape.images * plan.tiles_per_image;
  return plan;
}

inline Plan make_plan(const Forward& work, int processors) {
  const bool whole = has_whole_vectors(work.features, work.shape) && has_whole_vectors(work.gated, work.shape);
  return make_plan(work.shape, whole, false, processors);
}

inline Plan make_plan(const Backward& work, int processors) {
  const bool whole = has_whole_vectors(work.features, work.shape) && has_whole_vectors(work.grad_gated, work.shape) &&
                     has_whole_vectors(work.grad_features, work.shape);
  return make_plan(work.shape, whole, true, processors);
}

// Launch on the device's current stream; throw if that fails.
void launch(const Forward& work, int32_t device);
void launch(const Backward& work, int32_t device);

}  // namespace csf::entropy_gate::cuda
