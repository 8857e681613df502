// csrc/entropy_gate_math.h for Python, on scalars and on vectors of every size.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define CSF_CAPABILITY tested
#include "entropy_gate_math.h"

namespace py = pybind11;

namespace tested {

template <class S, int LANES>
struct Simd {
  typedef S Vector __attribute__((vector_size(LANES * sizeof(S))));
  typedef typename Number<S>::Bits Bits __attribute__((vector_size(LANES * sizeof(S))));
};

#define SPECIALISE(S, LANES)                   \
  template <>                                  \
  struct Number<Simd<S, LANES>::Vector> {      \
    using Scalar = S;                          \
    using Bits = typename Simd<S, LANES>::Bits; \
  };
SPECIALISE(float, 4)
SPECIALISE(float, 8)
SPECIALISE(float, 16)
SPECIALISE(double, 2)
SPECIALISE(double, 4)
SPECIALISE(double, 8)

template <class Value>
struct Logits {
  const Scalar<Value>* first;
  int64_t locations;

  Value operator()(int64_t m) const {
    Value value;
    memcpy(&value, first + m * locations, sizeof(value));
    return value;
  }
};

template <class Value>
void store(Scalar<Value>* address, Value value) {
  memcpy(address, &value, sizeof(value));
}

template <class S>
using Array = py::array_t<S, py::array::c_style | py::array::forcecast>;

// logits [M][locations], locations a multiple of the lanes: gate and uncertainty [locations], derivative [M][locations].
template <class Value>
py::tuple location(Array<Scalar<Value>> logits) {
  using S = Scalar<Value>;
  const int64_t classes = logits.shape(0), locations = logits.shape(1);
  const S inverse_log_classes = static_cast<S>(1 / std::log(static_cast<double>(classes)));
  Array<S> gates(locations), u(locations), derivative({classes, locations});
  for (int64_t l = 0; l < locations; l += sizeof(Value) / sizeof(S)) {
    const Logits<Value> at{logits.data() + l, locations};
    Softmax<Value> softmax;
    const Value uncertain = uncertainty<Value>(at, classes, inverse_log_classes, softmax);
    store<Value>(u.mutable_data() + l, uncertain);
    store<Value>(gates.mutable_data() + l, gate<Value>(uncertain));
    for (int64_t m = 0; m < classes; ++m) {
      store<Value>(derivative.mutable_data() + m * locations + l,
                   uncertainty_derivative<Value>(softmax, at(m), inverse_log_classes));
    }
  }
  return py::make_tuple(gates, u, derivative);
}

template <class Value, Value (*FUNCTION)(Value)>
Array<Scalar<Value>> map(Array<Scalar<Value>> x) {
  Array<Scalar<Value>> y(x.size());
  for (int64_t i = 0; i < x.size(); i += sizeof(Value) / sizeof(Scalar<Value>)) {
    store<Value>(y.mutable_data() + i, FUNCTION(Logits<Value>{x.data() + i, 0}(0)));
  }
  return y;
}

template <class Value>
Value exp_of(Value x) {
  return exp_of_negative(x);
}

template <class Value>
Value log_of(Value x) {
  return log_of_at_least_one(x);
}

template <class Value>
void define(py::module_& m, const char* suffix) {
  const auto name = [&](const char* function) { return std::string(function) + "_" + suffix; };
  m.def(name("location").c_str(), &location<Value>);
  m.def(name("exp").c_str(), &map<Value, exp_of<Value>>);
  m.def(name("log").c_str(), &map<Value, log_of<Value>>);
}

}  // namespace tested

PYBIND11_MODULE(entropy_gate_math, m) {
  tested::define<float>(m, "float32_1");
  tested::define<tested::Simd<float, 4>::Vector>(m, "float32_4");
  tested::define<tested::Simd<float, 8>::Vector>(m, "float32_8");
  tested::define<tested::Simd<float, 16>::Vector>(m, "float32_16");
  tested::define<double>(m, "float64_1");
  tested::define<tested::Simd<double, 2>::Vector>(m, "float64_2");
  tested::define<tested::Simd<double, 4>::Vector>(m, "float64_4");
  tested::define<tested::Simd<double, 8>::Vector>(m, "float64_8");
}
