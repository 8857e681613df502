// The entropy gate's CUDA kernels, as what one thread of a block does. A Block tells a thread where it is, and lets it
// wait for the others: CudaBlock on a card, a stand-in in the tests, which run these kernels without one.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/entropy_gate.h"

#define CSF_CAPABILITY csf::entropy_gate::cuda
#include "entropy_gate_math.h"

#if defined(__CUDACC__)
#define CSF_DEVICE __device__ __forceinline__
#else
#define CSF_DEVICE inline
#endif

namespace csf::entropy_gate::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The number type that features of a stored type are computed in.
template <class Stored>
using Computed = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

// Neighbouring elements, moved in one piece; as words, since a register holds one word or one 16-bit number.
template <class Stored, int VECTOR>
struct alignas(sizeof(Stored) * VECTOR) Pack {
  using Word = std::conditional_t<(sizeof(Stored) * VECTOR < 4), uint16_t, uint32_t>;
  Word words[sizeof(Stored) * VECTOR / sizeof(Word)];
};

template <class Stored, int VECTOR>
CSF_DEVICE void unpack(const Pack<Stored, VECTOR>& pack, Computed<Stored>* numbers) {
  Stored stored[VECTOR];
  memcpy(stored, pack.words, sizeof(stored));
  CSF_UNROLL
  for (int v = 0; v < VECTOR; ++v) numbers[v] = static_cast<Computed<Stored>>(stored[v]);
}

template <class Stored, int VECTOR>
CSF_DEVICE Pack<Stored, VECTOR> pack(const Computed<Stored>* numbers) {
  Stored stored[VECTOR];
  CSF_UNROLL
  for (int v = 0; v < VECTOR; ++v) stored[v] = static_cast<Stored>(numbers[v]);
  Pack<Stored, VECTOR> packed;
  memcpy(packed.words, stored, sizeof(stored));
  return packed;
}

// Vectors of each input that a thread asks for before it waits for the first.
template <int VECTOR, int INPUTS>
constexpr int kTogether = VECTOR == 1 ? 8 : VECTOR * INPUTS == 16 ? 2 : 4;

template <class Stored>
CSF_DEVICE Stored* element(const View& view, int64_t image, int64_t channel, int64_t location) {
  return reinterpret_cast<Stored*>(view.data) + image * view.image + channel * view.channel + location * view.location;
}

template <class S>
CSF_DEVICE S load_logit(const View& view, ScalarType type, int64_t image, int64_t m, int64_t location) {
  if constexpr (std::is_same_v<S, double>) {
    return *element<const double>(view, image, m, location);
  } else {
    switch (type) {
      case ScalarType::BFloat16: return *element<const BFloat16>(view, image, m, location);
      case ScalarType::Half: return *element<const Half>(view, image, m, location);
      default: return *element<const float>(view, image, m, location);
    }
  }
}

template <class S>
CSF_DEVICE void store_logit(const View& view, ScalarType type, int64_t image, int64_t m, int64_t location, S value) {
  if constexpr (std::is_same_v<S, double>) {
    *element<double>(view, image, m, location) = value;
  } else {
    switch (type) {
      case ScalarType::BFloat16: *element<BFloat16>(view, image, m, location) = value; return;
      case ScalarType::Half: *element<Half>(view, image, m, location) = value; return;
      default: *element<float>(view, image, m, location) = value;
    }
  }
}

// A block's locations, and its shared memory.
template <class S>
struct Tile {
  template <class Block>
  CSF_DEVICE Tile(const Shape& shape, const Plan& plan, const Block& block)
      : image(block.index() / plan.tiles_per_image),
        first(block.index() % plan.tiles_per_image * plan.tile),
        count(static_cast<int>(shape.locations - first < plan.tile ? shape.locations - first : plan.tile)),
        gates(static_cast<S*>(block.shared())),
        held(gates + plan.tile),
        sums(held + plan.tile * plan.held) {}

  int64_t image, first;
  int count;
  S* gates;
  S* held;  // logits [held classes][tile]
  S* sums;  // over the channels, of grad_gated * features
};

// The logits of one location, which its thread copies to shared memory as far as there is room.
template <class S>
class Logits {
 public:
  CSF_DEVICE Logits(const View& view, const Shape& shape, const Plan& plan, const Tile<S>& tile, int thread)
      : view_(view),
        type_(shape.logit_type),
        image_(tile.image),
        location_(tile.first + thread),
        held_(tile.held + thread),
        stride_(plan.tile),
        held_classes_(thread < tile.count ? plan.held : 0) {
    for (int m = 0; m < held_classes_; ++m) {
      held_[m * stride_] = load_logit<S>(view_, type_, image_, m, location_);
    }
  }

  CSF_DEVICE S operator()(int64_t m) const {
    return m < held_classes_ ? held_[m * stride_] : load_logit<S>(view_, type_, image_, m, location_);
  }

 private:
  const View& view_;
  ScalarType type_;
  int64_t image_, location_;
  S* held_;
  int stride_, held_classes_;
};

// Vectors of one tensor that a thread visits, `step` elements apart.
template <class Stored>
struct Stream {
  Stored* next;
  int64_t step;

  template <class Vector>
  CSF_DEVICE auto& at(int k) const {
    using Moved = std::conditional_t<std::is_const_v<Stored>, const Vector, Vector>;
    return *reinterpret_cast<Moved*>(next + k * step);
  }
  CSF_DEVICE void advance(int count) { next += count * step; }
};

// gated = features * gates, for `count` vectors; gates has a factor for each element of a vector.
template <class Stored, int VECTOR>
CSF_DEVICE void gate_stream(int count, Stream<const Stored> features, Stream<Stored> gated,
                            const Computed<Stored>* gates) {
  using Vector = Pack<Stored, VECTOR>;
  constexpr int together = kTogether<VECTOR, 1>;
  for (; count > 0; count -= together) {
    Vector x[together];
    CSF_UNROLL
    for (int k = 0; k < together; ++k) {
      if (k < count) x[k] = features.template at<Vector>(k);
    }
    CSF_UNROLL
    for (int k = 0; k < together; ++k) {
      if (k >= count) break;
      Computed<Stored> numbers[VECTOR];
      unpack(x[k], numbers);
      CSF_UNROLL
      for (int v = 0; v < VECTOR; ++v) numbers[v] *= gates[v];
      gated.template at<Vector>(k) = pack<Stored, VECTOR>(numbers);
    }
    features.advance(together);
    gated.advance(together);
  }
}

// grad_features = grad_gated * gates, and sums += grad_gated * features, element of a vector by element.
template <class Stored, int VECTOR>
CSF_DEVICE void backpropagate_stream(int count, Stream<const Stored> grad_gated, Stream<const Stored> features,
                                     Stream<Stored> grad_features, const Computed<Stored>* gates,
                                     Computed<Stored>* sums) {
  using S = Computed<Stored>;
  using Vector = Pack<Stored, VECTOR>;
  constexpr int together = kTogether<VECTOR, 2>;
  for (; count > 0; count -= together) {
    Vector grad[together], x[together];
    CSF_UNROLL
    for (int k = 0; k < together; ++k) {
      if (k < count) {
        grad[k] = grad_gated.template at<Vector>(k);
        x[k] = features.template at<Vector>(k);
      }
    }
    CSF_UNROLL
    for (int k = 0; k < together; ++k) {
      if (k >= count) break;
      S grads[VECTOR], numbers[VECTOR];
      unpack(grad[k], grads);
      unpack(x[k], numbers);
      CSF_UNROLL
      for (int v = 0; v < VECTOR; ++v) {
        sums[v] += grads[v] * numbers[v];
        grads[v] *= gates[v];
      }
      grad_features.template at<Vector>(k) = pack<Stored, VECTOR>(grads);
    }
    grad_gated.advance(together);
    features.advance(together);
    grad_features.advance(together);
  }
}

// Where a thread of a block stands on its tile, and which vectors it visits from there.
template <bool CHANNELS_LAST, int VECTOR>
struct Stand {
  CSF_DEVICE Stand(const Shape& shape, const Plan& plan, int thread)
      : lane(thread % plan.lanes),
        row(thread / plan.lanes),
        rows(kThreads / plan.lanes),
        first(CHANNELS_LAST ? lane * VECTOR : row),
        step(CHANNELS_LAST ? plan.lanes * VECTOR : rows),
        count(first < shape.channels ? static_cast<int>((shape.channels - first + step - 1) / step) : 0) {}

  template <class Stored, class S>
  CSF_DEVICE Stream<Stored> stream(const View& view, const Tile<S>& tile, int location) const {
    const int64_t channel_stride = CHANNELS_LAST ? 1 : view.channel;
    return {element<Stored>(view, tile.image, 0, tile.first + location) + first * channel_stride,
            step * channel_stride};
  }

  int lane, row, rows;
  int first, step;  // channels
  int count;
};

template <class Stored, int VECTOR, bool CHANNELS_LAST, class Block>
CSF_DEVICE void forward_thread(const Forward& work, const Plan& plan, const Block& block) {
  using S = Computed<Stored>;
  const int thread = block.thread();
  const Tile<S> tile(work.shape, plan, block);
  if (thread < tile.count) {
    const Logits<S> logits(work.logits, work.shape, plan, tile, thread);
    Softmax<S> softmax;
    const S u = uncertainty<S>(logits, work.shape.classes, S(work.shape.inverse_log_classes), softmax);
    tile.gates[thread] = gate(u);
    *element<S>(work.uncertainty, tile.image, 0, tile.first + thread) = u;
  }
  block.wait();

  const Stand<CHANNELS_LAST, VECTOR> stand(work.shape, plan, thread);
  S gates[VECTOR];
  if constexpr (CHANNELS_LAST) {
    for (int location = stand.row; location < tile.count; location += stand.rows) {
      for (int v = 0; v < VECTOR; ++v) gates[v] = tile.gates[location];
      gate_stream<Stored, VECTOR>(stand.count, stand.template stream<const Stored>(work.features, tile, location),
                               stand.template stream<Stored>(work.gated, tile, location), gates);
    }
  } else if (const int location = stand.lane * VECTOR; location < tile.count) {
    for (int v = 0; v < VECTOR; ++v) gates[v] = tile.gates[location + v];
    gate_stream<Stored, VECTOR>(stand.count, stand.template stream<const Stored>(work.features, tile, location),
                             stand.template stream<Stored>(work.gated, tile, location), gates);
  }
}

// Writes the gradients of the features of a tile's locations, and returns the sum over the channels of
// grad_gated * features at the thread's own location.
template <class Stored, int VECTOR, bool CHANNELS_LAST, class Block>
CSF_DEVICE Computed<Stored> backpropagate_features(const Backward& work, const Plan& plan,
                                                   const Tile<Computed<Stored>>& tile, const Block& block) {
  using S = Computed<Stored>;
  const int thread = block.thread();
  const Stand<CHANNELS_LAST, VECTOR> stand(work.shape, plan, thread);
  S gates[VECTOR], sums[VECTOR];
  const auto backpropagate = [&](int location) {
    for (int v = 0; v < VECTOR; ++v) sums[v] = 0;
    if (location >= tile.count) return;
    for (int v = 0; v < VECTOR; ++v) gates[v] = tile.gates[CHANNELS_LAST ? location : location + v];
    backpropagate_stream<Stored, VECTOR>(stand.count, stand.template stream<const Stored>(work.grad_gated, tile, location),
                                      stand.template stream<const Stored>(work.features, tile, location),
                                      stand.template stream<Stored>(work.grad_features, tile, location), gates, sums);
  };
  if constexpr (CHANNELS_LAST) {
    for (int first = 0; first < plan.tile; first += stand.rows) {
      const int location = first + stand.row;
      backpropagate(location);
      S sum = 0;
      for (int v = 0; v < VECTOR; ++v) sum += sums[v];
      for (int distance = plan.lanes / 2; distance > 0; distance /= 2) sum += block.from_lane(sum, distance);
      if (stand.lane == 0) tile.sums[location] = sum;
    }
    block.wait();
    return tile.sums[thread < plan.tile ? thread : 0];
  } else {
    backpropagate(stand.lane * VECTOR);
    S* own = tile.sums + thread;
    for (int v = 0; v < VECTOR; ++v) own[v * kThreads] = sums[v];
    for (int rows = stand.rows / 2; rows > 0; rows /= 2) {
      block.wait();
      if (stand.row < rows) {
        for (int v = 0; v < VECTOR; ++v) own[v * kThreads] += own[v * kThreads + rows * plan.lanes];
      }
    }
    block.wait();
    return thread < plan.tile ? tile.sums[thread % VECTOR * kThreads + thread / VECTOR] : S(0);
  }
}

template <class Stored, int VECTOR, bool CHANNELS_LAST, class Block>
CSF_DEVICE void backward_thread(const Backward& work, const Plan& plan, const Block& block) {
  using S = Computed<Stored>;
  const int thread = block.thread();
  const Tile<S> tile(work.shape, plan, block);
  const bool owns_location = thread < tile.count;
  const S inverse_log_classes = S(work.shape.inverse_log_classes);
  const Logits<S> logits(work.logits, work.shape, plan, tile, thread);
  Softmax<S> softmax{};
  if (owns_location) {
    tile.gates[thread] = gate(uncertainty<S>(logits, work.shape.classes, inverse_log_classes, softmax));
  }
  block.wait();

  S grad = 0;  // of u: the gate is 2 - u
  if (work.grad_gated.data != nullptr) {
    grad = -backpropagate_features<Stored, VECTOR, CHANNELS_LAST>(work, plan, tile, block);
  }
  if (!owns_location) return;
  if (work.grad_uncertainty.data != nullptr) {
    grad += *element<const S>(work.grad_uncertainty, tile.image, 0, tile.first + thread);
  }
  for (int64_t m = 0; m < work.shape.classes; ++m) {
    store_logit<S>(work.grad_logits, work.shape.logit_type, tile.image, m, tile.first + thread,
                   grad * uncertainty_derivative<S>(softmax, logits(m), inverse_log_classes));
  }
}

}  // namespace csf::entropy_gate::cuda
