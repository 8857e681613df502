// The dtypes that labels are read in. Tested by tests/test_foreground_ratio.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace csf::foreground_ratio {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
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
inline ScalarType readable(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16: return ScalarType::Float;
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64: return ScalarType::Long;
    default: return dtype;
  }
}

}  // namespace csf::foreground_ratio
