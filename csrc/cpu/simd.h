// Vectors of CSF_VECTOR_BYTES bytes for the kernel headers: foreach_capability.h includes this before them, once for
// every capability. Tested through the kernels.

namespace CSF_CAPABILITY {

template <class T, int BYTES = CSF_VECTOR_BYTES>
struct Simd {
  typedef T Vector __attribute__((vector_size(BYTES)));
  static constexpr int64_t lanes = BYTES / sizeof(T);
};
template <class T>
using Vector = typename Simd<T>::Vector;

// A vector at an address that is a multiple of its size.
template <class T>
static inline Vector<T> load(const T* address) {
  return *reinterpret_cast<const Vector<T>*>(address);
}

template <class T>
static inline void store(T* address, Vector<T> value) {
  *reinterpret_cast<Vector<T>*>(address) = value;
}

// As many numbers as V holds, a vector or one number, at any address, converted to those of V.
template <class V, class T>
static inline V load_as(const T* address) {
  if constexpr (std::is_arithmetic_v<V>) {
    return static_cast<V>(*address);
  } else {
    constexpr int64_t bytes = sizeof(V) / sizeof(V{}[0]) * sizeof(T);
    typedef T Stored __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Stored*>(address), V);
  }
}

// All lanes' sum, by halves.
template <class T, int BYTES = CSF_VECTOR_BYTES>
static inline T sum_lanes(typename Simd<T, BYTES>::Vector x) {
  if constexpr (BYTES == 16) {
    T sum = x[0];
    for (int64_t lane = 1; lane < Simd<T, BYTES>::lanes; ++lane) sum += x[lane];
    return sum;
  } else {
    typename Simd<T, BYTES / 2>::Vector halves[2];
    std::memcpy(halves, &x, BYTES);
    return sum_lanes<T, BYTES / 2>(halves[0] + halves[1]);
  }
}

}  // namespace CSF_CAPABILITY
