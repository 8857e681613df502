// What the entropy gate's kernels work on: a strip of locations of one image, in either memory layout. Tested by
// tests/test_entropy_gate.py.
#pragma once

#include <cstdint>

namespace csf::entropy_gate {

enum class Type { float32, float64, bfloat16, float16 };

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Elements of one tensor; strides count elements. Of `channel` and `location` one is 1, save for logits.
struct View {
  char* data = nullptr;
  int64_t image = 0, channel = 0, location = 0;
};

struct Shape {
  Type feature_type, logit_type;  // float64 both or neither: it is what is computed in
  int64_t images, channels, classes, locations;
  bool channels_last;  // how features, their gradients and the gated features lie
};

struct Forward {
  Shape shape;
  View features, logits;
  View gated, uncertainty;
  bool streamed;  // gated is written past the caches; its runs begin at multiples of kAlignment bytes
};

// Without grad_gated (data is null) grad_features stays as it is.
struct Backward {
  Shape shape;
  View grad_gated, grad_uncertainty, features, logits;
  View grad_features, grad_logits;
  bool streamed;  // likewise grad_features
};

// Locations begin to end (at most kStrip) of an image.
struct Strip {
  int64_t image, begin, end;
};

constexpr int64_t kStrip = 32768;    // its gates and sums stay in the second-level cache
constexpr int64_t kMaxLanes = 16;
constexpr int64_t kAlignment = 64;

// Bytes that a kernel needs beside its arguments, a multiple of kAlignment.
inline int64_t scratch_bytes(const Shape& shape) {
  const int64_t size = shape.feature_type == Type::float64 ? 8 : 4;
  return (5 * kStrip + shape.classes * kMaxLanes) * size;
}

}  // namespace csf::entropy_gate
