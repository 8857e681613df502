// The number types that the entropy gate's tensors are stored in, compiled once for every capability (see capability.h;
// included by gate_kernel.h). Tested by tests/test_entropy_gate.py, once for each capability.
//
// A Value is one number or a vector of them, as in entropy_gate_math.h. `load_as<Value>` (simd.h, and here for 16-bit
// types) reads as many numbers as it holds, and `store_as` writes them.

#include "entropy_gate_math.h"

namespace CSF_CAPABILITY {

template <>
struct Number<Vector<float>> {
  using Scalar = float;
  using Bits = Vector<uint32_t>;
};

template <>
struct Number<Vector<double>> {
  using Scalar = double;
  using Bits = Vector<uint64_t>;
};

template <class Value>
constexpr int64_t kLanes = sizeof(Value) / sizeof(Scalar<Value>);

// The number type that features of a stored type are computed in.
template <class Stored>
using Computed = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

// The low 16 bits of every lane.
template <class Value>
static inline auto narrowed(typename Number<Value>::Bits bits) {
  if constexpr (kLanes<Value> == 1) {
    return static_cast<uint16_t>(bits);
  } else {
    return __builtin_convertvector(bits, typename Simd<uint16_t, CSF_VECTOR_BYTES / 2>::Vector);
  }
}

// Writes a value past the caches where STREAMED, which needs an address that is a multiple of the value's size.
template <bool STREAMED, class Bytes>
static inline void write(void* address, const Bytes& bytes) {
#if defined(__x86_64__)
  if constexpr (STREAMED && sizeof(Bytes) == 8) {
    return _mm_stream_si64(static_cast<long long*>(address), same_bits<long long>(bytes));
  } else if constexpr (STREAMED && sizeof(Bytes) == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(address), same_bits<__m128i>(bytes));
  }
#endif
#if CSF_VECTOR_BYTES >= 32
  if constexpr (STREAMED && sizeof(Bytes) == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(address), same_bits<__m256i>(bytes));
  }
#endif
#if CSF_VECTOR_BYTES == 64
  if constexpr (STREAMED && sizeof(Bytes) == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(address), same_bits<__m512i>(bytes));
  }
#endif
  memcpy(address, &bytes, sizeof(bytes));
}

// Makes streamed values visible to other threads.
static inline void finish_writes() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class Value, bool STREAMED = false>
static inline void store_as(Scalar<Value>* address, Value value) {
  write<STREAMED>(address, value);
}

template <class Value>
static inline Value load_as(const Bfloat16* address) {
  using Bits = typename Number<Value>::Bits;
  return same_bits<Value>(Bits(load_as<Bits>(&address->bits) << 16));
}

template <class Value, bool STREAMED = false>
static inline void store_as(Bfloat16* address, Value value) {
  using Bits = typename Number<Value>::Bits;
  const Bits bits = same_bits<Bits>(value);
  const Bits rounded = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;  // to nearest, ties to even
  const Bits nan = Bits{} + 0x7fc0;
  write<STREAMED>(address, narrowed<Value>(value == value ? rounded : nan));
}

template <class Value>
static inline Value load_as(const Float16* address) {
  using Bits = typename Number<Value>::Bits;
  const Bits bits = load_as<Bits>(&address->bits);
  const Bits magnitude = (bits & 0x7fff) << 13;
  const Bits finite = same_bits<Bits>(Value(same_bits<Value>(magnitude) * 0x1p112f));  // exponent bias 15 to 127
  const Bits infinite_or_nan = magnitude | 0x7f800000;
  const Bits wide = magnitude >= 0x0f800000u ? infinite_or_nan : finite;
  return same_bits<Value>(Bits(wide | ((bits & 0x8000) << 16)));
}

template <class Value, bool STREAMED = false>
static inline void store_as(Float16* address, Value value) {
  using Bits = typename Number<Value>::Bits;
  const Bits bits = same_bits<Bits>(value);
  const Bits magnitude = bits & 0x7fffffff;
  const Bits infinity = Bits{} + 0x7c00, nan = Bits{} + 0x7e00;
  // Normal numbers: move the exponent's bias from 127 to 15, round to nearest, ties to even; a carry may give infinity.
  const Bits normal = (magnitude - 0x38000000 + (((magnitude >> 13) & 1) + 0xfff)) >> 13;
  // Below 2^-14: adding 1/2 rounds to multiples of 2^-24.
  const Bits subnormal = same_bits<Bits>(Value(same_bits<Value>(magnitude) + 0.5f)) - 0x3f000000;
  Bits narrow = magnitude < 0x38800000u ? subnormal : normal;
  narrow = magnitude >= 0x47800000u ? infinity : narrow;
  narrow = magnitude > 0x7f800000u ? nan : narrow;
  write<STREAMED>(address, narrowed<Value>(narrow | ((bits >> 16) & 0x8000)));
}

}  // namespace CSF_CAPABILITY
