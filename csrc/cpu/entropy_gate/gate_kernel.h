// The entropy gate on a strip of locations, compiled once for every capability (see capability.h; included by
// entropy_gate.cpp). Tested by tests/test_entropy_gate.py, once for each capability.
//
// Channels first, a strip is read and written channel by channel, in runs as long as the strip; channels last, location
// by location. A location is computed by the same operations wherever its strip begins.

#include "cpu/entropy_gate/stored_kernel.h"

namespace CSF_CAPABILITY {

template <class Stored>
static inline Stored* element(const View& view, int64_t image, int64_t channel, int64_t location) {
  return reinterpret_cast<Stored*>(view.data) + image * view.image + channel * view.channel + location * view.location;
}

// The logits of up to as many locations as a vector has lanes, as numbers: [classes][lanes].
template <class S>
class LogitBlock {
 public:
  typedef Vector<S> V;
  static constexpr int64_t lanes = Simd<S>::lanes;

  LogitBlock(S* numbers, const Shape& shape)
      : numbers_(numbers),
        classes_(shape.classes),
        inverse_log_classes_(static_cast<S>(1 / std::log(static_cast<double>(shape.classes)))),
        type_(shape.logit_type) {}

  int64_t classes() const { return classes_; }
  S inverse_log_classes() const { return inverse_log_classes_; }

  void read(const View& view, int64_t image, int64_t location, int64_t count) {
    switch (type_) {
      case Type::float32: return read_as<float>(view, image, location, count);
      case Type::float64: return read_as<double>(view, image, location, count);
      case Type::bfloat16: return read_as<Bfloat16>(view, image, location, count);
      case Type::float16: return read_as<Float16>(view, image, location, count);
    }
  }

  void write(const View& view, int64_t image, int64_t location, int64_t count) const {
    switch (type_) {
      case Type::float32: return write_as<float>(view, image, location, count);
      case Type::float64: return write_as<double>(view, image, location, count);
      case Type::bfloat16: return write_as<Bfloat16>(view, image, location, count);
      case Type::float16: return write_as<Float16>(view, image, location, count);
    }
  }

  V operator()(int64_t m) const { return load_as<V>(numbers_ + m * lanes); }
  void set(int64_t m, V value) { store_as<V>(numbers_ + m * lanes, value); }

 private:
  template <class Stored>
  void read_as(const View& view, int64_t image, int64_t location, int64_t count) {
    if constexpr (std::is_same_v<Computed<Stored>, S>) {
      const bool whole = view.location == 1 && count == lanes;
      for (int64_t m = 0; m < classes_; ++m) {
        const Stored* source = element<Stored>(view, image, m, location);
        if (whole) {
          set(m, load_as<V>(source));
          continue;
        }
        // Lanes past the last location repeat it: they are computed and thrown away.
        for (int64_t lane = 0; lane < lanes; ++lane) {
          numbers_[m * lanes + lane] = load_as<S>(source + (lane < count ? lane : count - 1) * view.location);
        }
      }
    }
  }

  template <class Stored>
  void write_as(const View& view, int64_t image, int64_t location, int64_t count) const {
    if constexpr (std::is_same_v<Computed<Stored>, S>) {
      const bool whole = view.location == 1 && count == lanes;
      for (int64_t m = 0; m < classes_; ++m) {
        Stored* target = element<Stored>(view, image, m, location);
        if (whole) {
          store_as<V>(target, (*this)(m));
          continue;
        }
        for (int64_t lane = 0; lane < count; ++lane) {
          store_as<S>(target + lane * view.location, numbers_[m * lanes + lane]);
        }
      }
    }
  }

  S* numbers_;
  int64_t classes_;
  S inverse_log_classes_;
  Type type_;
};

// The strip's arrays in scratch memory. Each has kStrip elements, so that whole vectors fit behind the last location.
template <class S>
struct StripArrays {
  explicit StripArrays(void* scratch)
      : gates(static_cast<S*>(scratch)),
        sums(gates + kStrip),
        largest(sums + kStrip),
        inverse_sum(largest + kStrip),
        mean(inverse_sum + kStrip),
        logits(mean + kStrip) {}

  S* gates;
  S* sums;  // over the channels, of grad_gated * features
  S* largest;
  S* inverse_sum;
  S* mean;
  S* logits;
};

// Channels that are walked through side by side: their streams of memory run in parallel.
constexpr int kTogether = 8;

// Values of each channel between one turn and the next, a cache line of them: streamed lines have to be whole.
template <class Value, class Stored>
constexpr int kTurn = kLanes<Value> == 1 ? 1 : kAlignment / static_cast<int>(sizeof(Stored)) / kLanes<Value>;

template <class S>
static inline int64_t lanes_left(int64_t location, int64_t end) {
  return end - location < Simd<S>::lanes ? end - location : Simd<S>::lanes;
}

// The gates of a strip's locations, what their derivatives need, and the uncertainties if there is a place for them.
// Not inlined: forward and backward then agree in every bit.
template <class S>
__attribute__((noinline)) static void gate_strip(const View& view, Strip strip, LogitBlock<S>& logits,
                                                 const StripArrays<S>& arrays, S* uncertainties) {
  typedef Vector<S> V;
  for (int64_t location = strip.begin; location < strip.end; location += Simd<S>::lanes) {
    const int64_t l = location - strip.begin, count = lanes_left<S>(location, strip.end);
    logits.read(view, strip.image, location, count);
    Softmax<V> softmax;
    const V u = uncertainty<V>(logits, logits.classes(), logits.inverse_log_classes(), softmax);
    store_as<V>(arrays.gates + l, gate(u));
    store_as<V>(arrays.largest + l, softmax.largest);
    store_as<V>(arrays.inverse_sum + l, softmax.inverse_sum);
    store_as<V>(arrays.mean + l, softmax.mean);
    if (uncertainties != nullptr) memcpy(uncertainties + l, &u, count * sizeof(S));
  }
}

// gated[c][i] = features[c][i] * gates[i], for CHANNELS channels from the one that the pointers stand on.
template <class Value, int CHANNELS, bool STREAMED, class Stored>
static inline int64_t forward_run(const Stored* features, int64_t features_channel, Stored* gated,
                                  int64_t gated_channel, const Scalar<Value>* gates, int64_t i, int64_t n) {
  constexpr int turn = kTurn<Value, Stored>;
  for (; i + turn * kLanes<Value> <= n; i += turn * kLanes<Value>) {
#pragma GCC unroll 8
    for (int c = 0; c < CHANNELS; ++c) {
#pragma GCC unroll 8
      for (int t = 0; t < turn; ++t) {
        const int64_t at = i + t * kLanes<Value>;
        store_as<Value, STREAMED>(gated + c * gated_channel + at,
                               load_as<Value>(features + c * features_channel + at) * load_as<Value>(gates + at));
      }
    }
  }
  return i;
}

template <int CHANNELS, bool STREAMED, class Stored>
static inline void forward_channels(const Forward& work, Strip strip, int64_t c, const Computed<Stored>* gates) {
  using S = Computed<Stored>;
  const Stored* features = element<Stored>(work.features, strip.image, c, strip.begin);
  Stored* gated = element<Stored>(work.gated, strip.image, c, strip.begin);
  const int64_t length = strip.end - strip.begin;
  const int64_t i = forward_run<Vector<S>, CHANNELS, STREAMED>(features, work.features.channel, gated,
                                                               work.gated.channel, gates, 0, length);
  forward_run<S, CHANNELS, false>(features, work.features.channel, gated, work.gated.channel, gates, i, length);
}

// The same for one location with its channels side by side.
template <bool STREAMED, class Stored>
static inline void forward_location(const Stored* features, Stored* gated, int64_t channels, Computed<Stored> factor) {
  using S = Computed<Stored>;
  typedef Vector<S> V;
  int64_t c = 0;
  for (; c + Simd<S>::lanes <= channels; c += Simd<S>::lanes) {
    store_as<V, STREAMED>(gated + c, load_as<V>(features + c) * factor);
  }
  for (; c < channels; ++c) store_as<S>(gated + c, load_as<S>(features + c) * factor);
}

template <class Stored, bool STREAMED>
static void gate_features(const Forward& work, Strip strip, const Computed<Stored>* gates) {
  const int64_t channels = work.shape.channels;
  if (work.shape.channels_last) {
    for (int64_t location = strip.begin; location < strip.end; ++location) {
      forward_location<STREAMED>(element<const Stored>(work.features, strip.image, 0, location),
                                 element<Stored>(work.gated, strip.image, 0, location), channels,
                                 gates[location - strip.begin]);
    }
    return;
  }
  int64_t c = 0;
  for (; c + kTogether <= channels; c += kTogether) {
    forward_channels<kTogether, STREAMED, Stored>(work, strip, c, gates);
  }
  for (; c < channels; ++c) forward_channels<1, STREAMED, Stored>(work, strip, c, gates);
}

template <class Stored>
static void forward_as(const Forward& work, Strip strip, void* scratch) {
  using S = Computed<Stored>;
  const StripArrays<S> arrays(scratch);
  LogitBlock<S> logits(arrays.logits, work.shape);
  gate_strip(work.logits, strip, logits, arrays, element<S>(work.uncertainty, strip.image, 0, strip.begin));
  if (work.streamed) {
    gate_features<Stored, true>(work, strip, arrays.gates);
  } else {
    gate_features<Stored, false>(work, strip, arrays.gates);
  }
  finish_writes();
}

// grad_features[c][i] = grad_gated[c][i] * gates[i], and sums[i] += sum_c grad_gated[c][i] * features[c][i], for
// CHANNELS channels from the one that the pointers stand on.
template <class Value, int CHANNELS, bool STREAMED, class Stored>
static inline int64_t backward_run(const Stored* grad_gated, int64_t grad_gated_channel, const Stored* features,
                                   int64_t features_channel, Stored* grad_features, int64_t grad_features_channel,
                                   const Scalar<Value>* gates, Scalar<Value>* sums, int64_t i, int64_t n) {
  constexpr int turn = kTurn<Value, Stored>;
  for (; i + turn * kLanes<Value> <= n; i += turn * kLanes<Value>) {
    Value totals[turn] = {};
#pragma GCC unroll 8
    for (int c = 0; c < CHANNELS; ++c) {
#pragma GCC unroll 8
      for (int t = 0; t < turn; ++t) {
        const int64_t at = i + t * kLanes<Value>;
        const Value grad = load_as<Value>(grad_gated + c * grad_gated_channel + at);
        totals[t] += grad * load_as<Value>(features + c * features_channel + at);
        store_as<Value, STREAMED>(grad_features + c * grad_features_channel + at, grad * load_as<Value>(gates + at));
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < turn; ++t) {
      const int64_t at = i + t * kLanes<Value>;
      store_as<Value>(sums + at, load_as<Value>(sums + at) + totals[t]);
    }
  }
  return i;
}

template <int CHANNELS, bool STREAMED, class Stored>
static inline void backward_channels(const Backward& work, Strip strip, int64_t c,
                                     const StripArrays<Computed<Stored>>& arrays) {
  using S = Computed<Stored>;
  const Stored* grad_gated = element<Stored>(work.grad_gated, strip.image, c, strip.begin);
  const Stored* features = element<Stored>(work.features, strip.image, c, strip.begin);
  Stored* grad_features = element<Stored>(work.grad_features, strip.image, c, strip.begin);
  const int64_t length = strip.end - strip.begin;
  const int64_t i = backward_run<Vector<S>, CHANNELS, STREAMED>(
      grad_gated, work.grad_gated.channel, features, work.features.channel, grad_features,
      work.grad_features.channel, arrays.gates, arrays.sums, 0, length);
  backward_run<S, CHANNELS, false>(grad_gated, work.grad_gated.channel, features, work.features.channel, grad_features,
                            work.grad_features.channel, arrays.gates, arrays.sums, i, length);
}

// The same for one location with its channels side by side; returns the sum.
template <bool STREAMED, class Stored>
static inline Computed<Stored> backward_location(const Stored* grad_gated, const Stored* features,
                                                 Stored* grad_features, int64_t channels, Computed<Stored> factor) {
  using S = Computed<Stored>;
  typedef Vector<S> V;
  constexpr int64_t lanes = Simd<S>::lanes;
  constexpr int kSums = 4;
  V sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * lanes <= channels; c += kSums * lanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) {
      const V grad = load_as<V>(grad_gated + c + k * lanes);
      sums[k] += grad * load_as<V>(features + c + k * lanes);
      store_as<V, STREAMED>(grad_features + c + k * lanes, grad * factor);
    }
  }
  for (; c + lanes <= channels; c += lanes) {
    const V grad = load_as<V>(grad_gated + c);
    sums[0] += grad * load_as<V>(features + c);
    store_as<V, STREAMED>(grad_features + c, grad * factor);
  }
  const V vector_sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  S sum = 0;
  for (; c < channels; ++c) {
    const S grad = load_as<S>(grad_gated + c);
    sum += grad * load_as<S>(features + c);
    store_as<S>(grad_features + c, grad * factor);
  }
  for (int64_t lane = 0; lane < lanes; ++lane) sum += vector_sum[lane];
  return sum;
}

template <class Stored, bool STREAMED>
static void backpropagate_features(const Backward& work, Strip strip, const StripArrays<Computed<Stored>>& arrays) {
  const int64_t channels = work.shape.channels;
  if (work.shape.channels_last) {
    for (int64_t location = strip.begin; location < strip.end; ++location) {
      const int64_t l = location - strip.begin;
      arrays.sums[l] = backward_location<STREAMED>(element<const Stored>(work.grad_gated, strip.image, 0, location),
                                                   element<const Stored>(work.features, strip.image, 0, location),
                                                   element<Stored>(work.grad_features, strip.image, 0, location),
                                                   channels, arrays.gates[l]);
    }
    return;
  }
  int64_t c = 0;
  for (; c + kTogether <= channels; c += kTogether) {
    backward_channels<kTogether, STREAMED, Stored>(work, strip, c, arrays);
  }
  for (; c < channels; ++c) backward_channels<1, STREAMED, Stored>(work, strip, c, arrays);
}

template <class Stored>
static void backward_as(const Backward& work, Strip strip, void* scratch) {
  using S = Computed<Stored>;
  typedef Vector<S> V;
  constexpr int64_t lanes = Simd<S>::lanes;
  const StripArrays<S> arrays(scratch);
  LogitBlock<S> logits(arrays.logits, work.shape);
  gate_strip(work.logits, strip, logits, arrays, static_cast<S*>(nullptr));
  for (int64_t l = 0; l < strip.end - strip.begin; l += lanes) store_as<V>(arrays.sums + l, V{});
  if (work.grad_gated.data != nullptr) {
    if (work.streamed) {
      backpropagate_features<Stored, true>(work, strip, arrays);
    } else {
      backpropagate_features<Stored, false>(work, strip, arrays);
    }
  }
  for (int64_t location = strip.begin; location < strip.end; location += lanes) {
    const int64_t count = lanes_left<S>(location, strip.end);
    const int64_t l = location - strip.begin;
    V grad = -load_as<V>(arrays.sums + l);  // of u: the gate is 2 - u
    if (work.grad_uncertainty.data != nullptr) {
      V direct{};
      memcpy(&direct, element<S>(work.grad_uncertainty, strip.image, 0, location), count * sizeof(S));
      grad += direct;
    }
    const Softmax<V> softmax{load_as<V>(arrays.largest + l), load_as<V>(arrays.inverse_sum + l),
                             load_as<V>(arrays.mean + l)};
    logits.read(work.logits, strip.image, location, count);
    for (int64_t m = 0; m < work.shape.classes; ++m) {
      logits.set(m, grad * uncertainty_derivative<V>(softmax, logits(m), logits.inverse_log_classes()));
    }
    logits.write(work.grad_logits, strip.image, location, count);
  }
  finish_writes();
}

static void forward(const Forward& work, Strip strip, void* scratch) {
  switch (work.shape.feature_type) {
    case Type::float32: return forward_as<float>(work, strip, scratch);
    case Type::float64: return forward_as<double>(work, strip, scratch);
    case Type::bfloat16: return forward_as<Bfloat16>(work, strip, scratch);
    case Type::float16: return forward_as<Float16>(work, strip, scratch);
  }
}

static void backward(const Backward& work, Strip strip, void* scratch) {
  switch (work.shape.feature_type) {
    case Type::float32: return backward_as<float>(work, strip, scratch);
    case Type::float64: return backward_as<double>(work, strip, scratch);
    case Type::bfloat16: return backward_as<Bfloat16>(work, strip, scratch);
    case Type::float16: return backward_as<Float16>(work, strip, scratch);
  }
}

}  // namespace CSF_CAPABILITY
