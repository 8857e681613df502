// How a pair of vectors is scored: the tuple of contrastseg_fast/affinity.py. Tested by tests/test_affinity.py, and
// by tests/test_pdcr.py through the operators that take it.
//
//     d_ij    = distance_scale * sum_m |phi_i^m - phi_j^m|, or 0 for equal and 1 for different categories
//     w_ij    = num_bias + num_slope * d_ij
//     wbar_ij = den_bias + den_slope * d_ij
//     s_ij    = cos(v_i, v_j) - shift
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <vector>

namespace csf {

template <class T>
struct Affinity {
  // In the order of Python's tuple.
  T temperature;
  T distance_scale;
  bool categorical;
  T num_bias, num_slope;
  T den_bias, den_slope;
  T shift;

  // Of the exponent s_ij wbar_ij / temperature = s_ij (exponent_bias + exponent_slope d_ij).
  T exponent_bias, exponent_slope;

  template <class U>
  explicit operator Affinity<U>() const {
    return {static_cast<U>(temperature),   static_cast<U>(distance_scale), categorical,
            static_cast<U>(num_bias),      static_cast<U>(num_slope),      static_cast<U>(den_bias),
            static_cast<U>(den_slope),     static_cast<U>(shift),          static_cast<U>(exponent_bias),
            static_cast<U>(exponent_slope)};
  }
};

// The affinity that an operator got as a list of numbers.
inline Affinity<double> make_affinity(const std::vector<double>& numbers) {
  constexpr size_t count = 8;
  STD_TORCH_CHECK(numbers.size() == count, "affinity: expected ", count, " numbers, got ", numbers.size());
  const double temperature = numbers[0], den_bias = numbers[5], den_slope = numbers[6];
  return {temperature, numbers[1], numbers[2] != 0,       numbers[3],             numbers[4],
          den_bias,    den_slope,  numbers[7], den_bias / temperature, den_slope / temperature};
}

}  // namespace csf
