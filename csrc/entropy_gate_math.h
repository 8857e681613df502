// The entropy gate at one location (Eqs. 8 to 10), for host and device: logits to uncertainty, and its derivative.
//
// A Value is what computes: float or double, or a GCC vector of them that holds as many locations; one formula serves
// all. Like a kernel header (cpu/capability.h) this one has no include guard and puts its code into
// `namespace CSF_CAPABILITY`, so that vectors get the instructions of the code around them. <cmath>, <cstdint> and
// <cstring> come before it.
//
// With t_m = z_m - max z, Z = sum_m exp(t_m) and a_m = exp(t_m) / Z:
//
//     u       = (log Z - sum_m a_m t_m) / log M
//     du/dz_m = a_m (sum_k a_k t_k - t_m) / log M
//
// All terms of u are positive, which keeps it accurate near 0 too. A logit of -inf, or one so far below the largest
// that its exp is no normal number, has probability 0 and derivative 0. NaN, +inf, or nothing but -inf give NaN, as
// in softmax.

#if defined(__CUDACC__)
#define CSF_HOST_DEVICE __host__ __device__ __forceinline__
#define CSF_UNROLL _Pragma("unroll")
#else
#define CSF_HOST_DEVICE inline __attribute__((always_inline))
#define CSF_UNROLL _Pragma("GCC unroll 16")
#endif

namespace CSF_CAPABILITY {

// The scalar that a Value holds, and unsigned integers of its size; specialised for vectors by who uses them.
template <class Value>
struct Number;

template <>
struct Number<float> {
  using Scalar = float;
  using Bits = uint32_t;
};

template <>
struct Number<double> {
  using Scalar = double;
  using Bits = uint64_t;
};

template <class Value>
using Scalar = typename Number<Value>::Scalar;

template <class Scalar>
struct Format;

template <>
struct Format<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr uint32_t one = 0x3f800000;
  static constexpr uint32_t sqrt_half = 0x3f3504f3;
  static constexpr float lowest_exponent = -87;   // exp of it is a normal number
  static constexpr float integer = 0x1p23f;       // integer + n has n in its low bits
  static constexpr uint32_t integer_bits = 0x4b000000;
  static constexpr float ln2_high = 0x1.62e3p-1f; // few bits: its product with an exponent is exact
  static constexpr float ln2_low = 0x1.2fefa2p-17f;
  static constexpr int exp_terms = 7;
  static constexpr int log_terms = 5;
};

template <>
struct Format<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr uint64_t one = 0x3ff0000000000000;
  static constexpr uint64_t sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double lowest_exponent = -708;
  static constexpr double integer = 0x1p52;
  static constexpr uint64_t integer_bits = 0x4330000000000000;
  static constexpr double ln2_high = 0x1.62e42feep-1;
  static constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int exp_terms = 13;
  static constexpr int log_terms = 10;
};

template <class To, class From>
CSF_HOST_DEVICE To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// exp(x) for lowest_exponent <= x <= 0: x = n ln 2 + r, and the Taylor series of exp(r), |r| <= ln 2 / 2.
template <class Value>
CSF_HOST_DEVICE Value exp_of_negative(Value x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  using S = Scalar<Value>;
  using Bits = typename Number<Value>::Bits;
  using F = Format<S>;
  const Value shifted = x * S(1.4426950408889634) + F::integer * S(1.5);
  const Value n = shifted - F::integer * S(1.5);
  const Value r = (x - n * F::ln2_high) - n * F::ln2_low;
  Value series = Value{} + S(1);
  CSF_UNROLL
  for (int k = F::exp_terms; k > 0; --k) series = series * (r * (S(1) / k)) + S(1);
  return series * same_bits<Value>((same_bits<Bits>(shifted) << F::mantissa_bits) + F::one);
#endif
}

// log(x) for 1 <= x < inf: x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and the series of
// log(1 + f) = 2 artanh(s), s = f / (2 + f).
template <class Value>
CSF_HOST_DEVICE Value log_of_at_least_one(Value x) {
#if defined(__CUDA_ARCH__)
  return log(x);
#else
  using S = Scalar<Value>;
  using Bits = typename Number<Value>::Bits;
  using F = Format<S>;
  const Bits bits = same_bits<Bits>(x) + (F::one - F::sqrt_half);
  const Bits k_plus_bias = bits >> F::mantissa_bits;
  const Bits mantissa = bits - (k_plus_bias << F::mantissa_bits);
  const Value f = same_bits<Value>(Bits(mantissa + F::sqrt_half)) - S(1);
  const Value k = same_bits<Value>(Bits(k_plus_bias | F::integer_bits)) -
                  (F::integer + S(F::one >> F::mantissa_bits));
  const Value s = f / (f + S(2));
  const Value s2 = s * s;
  Value series = Value{} + S(1) / (2 * F::log_terms + 1);
  CSF_UNROLL
  for (int j = F::log_terms - 1; j > 0; --j) series = series * s2 + S(1) / (2 * j + 1);
  return k * F::ln2_high + (S(2) * s + (S(2) * s * s2 * series + k * F::ln2_low));
#endif
}

// t = z - max z, kept where exp(t) is a normal number.
template <class Value>
CSF_HOST_DEVICE Value below_largest(Value logit, Value largest) {
  const Value lowest = Value{} + Format<Scalar<Value>>::lowest_exponent;
  const Value t = logit - largest;
  return t < lowest ? lowest : t;
}

// exp(t), and 0 at the lowest t.
template <class Value>
CSF_HOST_DEVICE Value weight(Value t) {
  return t <= Format<Scalar<Value>>::lowest_exponent ? Value{} : exp_of_negative(t);
}

// What the derivative needs to know of a location, beside its logits.
template <class Value>
struct Softmax {
  Value largest;
  Value inverse_sum;  // 1 / Z
  Value mean;         // sum_m a_m t_m
};

// The uncertainty u in [0, 1] of a location, from logit(0) to logit(classes - 1).
template <class Value, class Logit>
CSF_HOST_DEVICE Value uncertainty(const Logit& logit, int64_t classes, Scalar<Value> inverse_log_classes,
                                  Softmax<Value>& softmax) {
  using S = Scalar<Value>;
  Value largest = logit(0);
  for (int64_t m = 1; m < classes; ++m) {
    const Value z = logit(m);
    largest = z > largest ? z : largest;
  }
  // Z = ones + rest, where the largest logits add 1 each: rest keeps what rounding Z would lose.
  Value ones{}, rest{}, weighted{};
  for (int64_t m = 0; m < classes; ++m) {
    const Value t = below_largest(logit(m), largest);
    const Value e = weight(t);
    ones += t == S(0) ? e : Value{};
    rest += t == S(0) ? Value{} : e;
    weighted += e * t;
  }
  const Value sum = ones + rest;
  softmax.largest = largest;
  softmax.inverse_sum = S(1) / sum;
  softmax.mean = weighted * softmax.inverse_sum;
  const Value log_sum = log_of_at_least_one(sum) + (rest - (sum - ones)) * softmax.inverse_sum;
  const Value u = (log_sum - softmax.mean) * inverse_log_classes;
  return u > S(1) ? Value{} + S(1) : u;
}

// What the features of a location are multiplied by.
template <class Value>
CSF_HOST_DEVICE Value gate(Value uncertainty) {
  return Scalar<Value>(2) - uncertainty;
}

// du/dz_m.
template <class Value>
CSF_HOST_DEVICE Value uncertainty_derivative(const Softmax<Value>& softmax, Value logit,
                                             Scalar<Value> inverse_log_classes) {
  const Value t = below_largest(logit, softmax.largest);
  return weight(t) * softmax.inverse_sum * (softmax.mean - t) * inverse_log_classes;
}

}  // namespace CSF_CAPABILITY
