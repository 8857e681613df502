// Vectors to packed rows, and rows' gradients back to vectors, compiled once for every capability (see capability.h;
// included by packed.cpp). Tested by tests/test_pdcr.py, once for each capability.

namespace CSF_CAPABILITY {

// Packs one vector (null: padding): values = vector 2^-power, with the power that puts its largest entry into [1/2, 1).
// Returns the power, and as `scale` 1 / length of `values` (0 for a zero vector); adds the unit vector to unit_sum.
template <class Input, class T>
int pack_vector(const Input* vector, int64_t stride, int64_t channels, T* values, T& scale, double* unit_sum) {
  if (vector == nullptr) {
    std::fill_n(values, channels, T(0));
  } else if (stride == 1) {
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(vector[c]);
  } else {
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(vector[c * stride]);
  }
  // The bits of magnitudes are ordered as the magnitudes are, and an integer maximum vectorises.
  typedef std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> Bits;
  Bits largest_bits = 0;
  for (int64_t c = 0; c < channels; ++c) {
    Bits bits;
    std::memcpy(&bits, values + c, sizeof(T));
    largest_bits = std::max<Bits>(largest_bits, bits & (~Bits(0) >> 1));
  }
  T largest;
  std::memcpy(&largest, &largest_bits, sizeof(T));
  int power = 0;
  if (std::isfinite(largest)) std::frexp(largest, &power);
  power = std::max(power, -1000);  // subnormal fp64 vectors
  const double factor = std::ldexp(1.0, -power);
  double squares[8] = {};
  for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(factor * values[c]);
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    for (int64_t k = 0; k < 8; ++k) squares[k] += static_cast<double>(values[c + k]) * values[c + k];
  }
  for (; c < channels; ++c) squares[0] += static_cast<double>(values[c]) * values[c];
  double sum = 0;
  for (const double square : squares) sum += square;
  const double exact_scale = sum > 0 ? 1 / std::sqrt(sum) : 0;
  scale = static_cast<T>(exact_scale);
  for (int64_t i = 0; i < channels; ++i) unit_sum[i] += exact_scale * values[i];
  return power;
}

// One vector's gradient: factor (g - (g . u) u) for the unit vector u. `grad` holds g times `scale`, without the
// rank-one part of the numerator, bias * unit_sum. `grad` and `row` lie in stripes, `stripe` elements apart.
template <class Output, class T>
void write_gradient_row(const T* grad, const T* row, int64_t stripe, int64_t channels, T scale, T bias, double factor,
                        const T* unit_sum, T* scratch, Output* out) {
  double along[kStripe] = {};
  for (int64_t begin = 0; begin < channels; begin += kStripe, grad += stripe, row += stripe) {
    const int64_t length = channels - begin < kStripe ? channels - begin : kStripe;
    T* g = scratch + begin;
    T* x = scratch + channels + begin;
    for (int64_t k = 0; k < length; ++k) {
      g[k] = grad[k] + bias * scale * unit_sum[begin + k];
      x[k] = row[k];
      along[k] += static_cast<double>(g[k]) * x[k];
    }
  }
  double sum = 0;
  for (const double part : along) sum += part;
  const T projection = static_cast<T>(sum * scale * scale);
  const T* x = scratch + channels;
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = static_cast<Output>(static_cast<T>(factor * (scratch[c] - projection * x[c])));
  }
}

#define CSF_INSTANTIATE(STORED, COMPUTED)                                                                         \
  template int pack_vector<STORED, COMPUTED>(const STORED*, int64_t, int64_t, COMPUTED*, COMPUTED&, double*);     \
  template void write_gradient_row<STORED, COMPUTED>(const COMPUTED*, const COMPUTED*, int64_t, int64_t, COMPUTED, \
                                                     COMPUTED, double, const COMPUTED*, COMPUTED*, STORED*);
CSF_INSTANTIATE(double, double)
CSF_INSTANTIATE(float, float)
CSF_INSTANTIATE(torch::headeronly::Half, float)
CSF_INSTANTIATE(torch::headeronly::BFloat16, float)
#undef CSF_INSTANTIATE

}  // namespace CSF_CAPABILITY
