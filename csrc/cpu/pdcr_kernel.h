// The tiles of PDCR, compiled once for every capability (see capability.h; included by pdcr.cpp).
//
// A tile holds the pairs of two blocks. `forward_pair` adds their exponentials to Z of both blocks; `backward_pair`
// turns the tile into the pairs' weights H and adds H X_b to the gradient of block a, and H^T X_a to that of b.

namespace CSF_CAPABILITY {

using csf::pdcr::Image;
using csf::pdcr::kBlock;
using csf::pdcr::kPanel;
using csf::pdcr::Score;

template <class T, int BYTES = CSF_VECTOR_BYTES>
struct Simd {
  typedef T Vector __attribute__((vector_size(BYTES)));
  static constexpr int64_t lanes = BYTES / sizeof(T);
};
template <class T>
using Vector = typename Simd<T>::Vector;
typedef int32_t IntVector __attribute__((vector_size(CSF_VECTOR_BYTES)));

constexpr int64_t kTileRows = CSF_VECTOR_BYTES == 64 ? 12 : 6;  // rows of a register tile, two vectors wide

template <class T>
static inline Vector<T> load(const T* address) {
  return *reinterpret_cast<const Vector<T>*>(address);
}

template <class T>
static inline void store(T* address, Vector<T> value) {
  *reinterpret_cast<Vector<T>*>(address) = value;
}

template <class T>
static inline Vector<T> absolute(Vector<T> x) {
  return x < 0 ? -x : x;
}

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

static inline Vector<float> clamp(Vector<float> x) {
  x = x < -87.0f ? Vector<float>{} - 87.0f : x;
  return x > 88.0f ? Vector<float>{} + 88.0f : x;
}

static inline Vector<double> clamp(Vector<double> x) { return x; }

// exp to 1 ulp or so: x = n ln 2 + r, and a polynomial for exp(r). fp32 takes |x| <= 87; `clamp` sees to it.
static inline Vector<float> exponential(Vector<float> x) {
  typedef Vector<float> V;
  const V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer n stands in the low bits
  const V n = shifted - 12582912.0f;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return reinterpret_cast<V>(reinterpret_cast<IntVector>(p) + (reinterpret_cast<IntVector>(shifted) << 23));
}

static inline Vector<double> exponential(Vector<double> x) {
  for (int64_t lane = 0; lane < Simd<double>::lanes; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

// left, right += sum_k a[i * A_ROW + k * A_COLUMN] b[k][0:2 lanes], for the rows i of a register tile.
template <class T, int64_t A_ROW, int64_t A_COLUMN>
__attribute__((always_inline)) static inline void add_products(const T* a, const T* b, int64_t depth,
                                                               Vector<T> (&left)[kTileRows],
                                                               Vector<T> (&right)[kTileRows]) {
  for (int64_t k = 0; k < depth; ++k, a += A_COLUMN, b += kPanel) {
    const Vector<T> b_left = load(b), b_right = load(b + Simd<T>::lanes);
#pragma GCC unroll 12
    for (int64_t i = 0; i < kTileRows; ++i) {
      left[i] += a[i * A_ROW] * b_left;
      right[i] += a[i * A_ROW] * b_right;
    }
  }
}

// c[i][0:kPanel] (+)= sum_k a(i, k) b[k][0:kPanel] for i < rows (rounded up to whole register tiles), with
// a(i, k) = a[(k / kPanel) * a_chunk + i * A_ROW + (k % kPanel) * A_COLUMN].
template <class T, int64_t A_ROW, int64_t A_COLUMN, bool ACCUMULATE>
static inline void multiply_panel(const T* a, int64_t a_chunk, const T* b, int64_t depth, T* c, int64_t c_row, int64_t rows) {
  typedef Vector<T> V;
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t column = 0; column < kPanel; column += 2 * lanes) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      T* out = c + row * c_row + column;
      if constexpr (ACCUMULATE) {
        for (int64_t i = 0; i < kTileRows; ++i) __builtin_prefetch(out + i * c_row, 1);
        for (int64_t i = 0; i < kTileRows; ++i) __builtin_prefetch(out + i * c_row + lanes, 1);
      }
      V left[kTileRows] = {}, right[kTileRows] = {};
      const T* a_chunk_row = a + row * A_ROW;
      const T* b_row = b + column;
      int64_t left_over = depth;
      for (; left_over >= kPanel; left_over -= kPanel, a_chunk_row += a_chunk, b_row += kPanel * kPanel) {
        add_products<T, A_ROW, A_COLUMN>(a_chunk_row, b_row, kPanel, left, right);
      }
      if (left_over > 0) add_products<T, A_ROW, A_COLUMN>(a_chunk_row, b_row, left_over, left, right);
#pragma GCC unroll 12
      for (int64_t i = 0; i < kTileRows; ++i, out += c_row) {
        // Added only now: a running sum that starts from c would round at c's magnitude in every step.
        store(out, ACCUMULATE ? load(out) + left[i] : left[i]);
        store(out + lanes, ACCUMULATE ? load(out + lanes) + right[i] : right[i]);
      }
    }
  }
}

// tile[i][j] = x_i . x_j for the vectors of blocks a and b.
template <class T>
static void inner_products(const Image<T>& image, int64_t a, int64_t b, T* tile) {
  constexpr int64_t chunk = 4 * kPanel;  // channels at a time: partial sums round less
  const int64_t panels = (image.block_rows(b) + kPanel - 1) / kPanel;
  for (int64_t c = 0; c < image.channels; c += chunk) {
    const int64_t depth = std::min(chunk, image.channels - c);
    const T* rows = image.rows + (c / kPanel * image.padded + a * kBlock) * kPanel;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const T* columns = image.columns + ((b * kBlock / kPanel + panel) * image.channels + c) * kPanel;
      const auto multiply = c == 0 ? multiply_panel<T, kPanel, 1, false> : multiply_panel<T, kPanel, 1, true>;
      multiply(rows, image.padded * kPanel, columns, depth, tile + panel * kPanel, kBlock, image.block_rows(a));
    }
  }
}

// grad_a += H X_b, with H = tile (TRANSPOSED: H = tile^T).
template <class T, bool TRANSPOSED>
static void add_gradient(const Image<T>& image, int64_t a, int64_t b, const T* tile) {
  constexpr int64_t row = TRANSPOSED ? 1 : kBlock;
  constexpr int64_t column = TRANSPOSED ? kBlock : 1;
  for (int64_t c = 0; c < image.channels; c += kPanel) {
    const int64_t panel = c / kPanel * image.padded * kPanel;
    multiply_panel<T, row, column, true>(tile, kPanel * column, image.rows + panel + b * kBlock * kPanel,
                                         image.block_rows(b), image.grad + panel + a * kBlock * kPanel, kPanel,
                                         image.block_rows(a));
  }
}

// The distances d between one vector of block a and the vectors of block b, a SIMD vector at a time.
template <class T>
struct Distances {
  const T* a;  // ratios of the one vector: a[m * kBlock]
  const T* b;
  const Score<T>& score;

  Vector<T> operator()(int64_t j) const {
    typedef Vector<T> V;
    if (score.categorical) return load(b + j) == V{} + a[0] ? V{} : V{} + 1;
    V d{};
    for (int64_t m = 0; m < score.num_classes; ++m) d += absolute<T>(load(b + m * kBlock + j) - a[m * kBlock]);
    return d * score.distance_scale;
  }
};

// d where it is one number for the whole tile.
template <class T>
struct UniformDistance {
  Vector<T> value;
  Vector<T> operator()(int64_t) const { return value; }
};

// Calls rows(i, distances) for every vector i of block a.
template <class T, class Rows>
static inline void for_each_row(const Image<T>& image, const Score<T>& score, int64_t a, int64_t b, const Rows& rows) {
  const T* ratios_a = image.ratios + a * score.num_classes * kBlock;
  const T* ratios_b = image.ratios + b * score.num_classes * kBlock;
  if (image.uniform[a] && image.uniform[b]) {
    const Vector<T> d = Vector<T>{} + Distances<T>{ratios_a, ratios_b, score}(0)[0];
    for (int64_t i = 0; i < image.block_rows(a); ++i) rows(i, UniformDistance<T>{d});
  } else {
    for (int64_t i = 0; i < image.block_rows(a); ++i) rows(i, Distances<T>{ratios_a + i, ratios_b, score});
  }
}

// s of vector i of block a with the vectors j... of block b.
template <class T>
static inline Vector<T> similarity(const Image<T>& image, const Score<T>& score, int64_t i, int64_t j, const T* tile_row) {
  return load(tile_row) * image.inverse[i] * load(image.inverse + j) - score.shift;
}

// s wbar / tau, rounded alike in both directions: in their difference to log Z large exponents cancel.
template <class T>
static inline Vector<T> exponent(const Score<T>& score, Vector<T> s, Vector<T> d) {
  return s * (d * score.exponent_slope + score.exponent_bias);
}

// Z, where exp is bounded.
template <class T>
struct AddExponentials {
  const Image<T>& image;
  const Score<T>& score;
  int64_t a, b, columns;
  const T* tile;
  T* column_sums;  // [kBlock]

  template <class D>
  void operator()(int64_t i, const D& distances) const {
    typedef Vector<T> V;
    V row_sum{}, attraction{};
    for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
      const V s = similarity(image, score, a * kBlock + i, b * kBlock + j, tile + i * kBlock + j);
      const V d = distances(j);
      const V e = exponential(exponent(score, s, d));
      const V present = load(image.present + b * kBlock + j);
      row_sum += e * present;
      store(column_sums + j, load(column_sums + j) + e * present);
      attraction += s * d * present;
    }
    image.z[a * kBlock + i] += sum_lanes<T>(row_sum);
    image.attraction[a] += (a == b ? 1 : 2) * static_cast<double>(sum_lanes<T>(attraction));
  }
};

// The exponents x themselves, written over the tile.
template <class T>
struct WriteExponents {
  const Image<T>& image;
  const Score<T>& score;
  int64_t a, b, columns;
  T* tile;

  template <class D>
  void operator()(int64_t i, const D& distances) const {
    typedef Vector<T> V;
    V attraction{};
    for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
      const V s = similarity(image, score, a * kBlock + i, b * kBlock + j, tile + i * kBlock + j);
      const V d = distances(j);
      attraction += s * d * load(image.present + b * kBlock + j);
      store(tile + i * kBlock + j, exponent(score, s, d));
    }
    image.attraction[a] += (a == b ? 1 : 2) * static_cast<double>(sum_lanes<T>(attraction));
  }
};

// Z of one vector with a running maximum: adds exp(x - maximum) for `count` exponents, `step` apart.
template <class T>
static void add_to_running_sum(const T* x, int64_t count, int64_t step, double& z, double& maximum) {
  double largest = maximum;
  for (int64_t k = 0; k < count; ++k) largest = std::max(largest, static_cast<double>(x[k * step]));
  z *= std::exp(maximum - largest);
  maximum = largest;
  for (int64_t k = 0; k < count; ++k) z += std::exp(static_cast<double>(x[k * step]) - largest);
}

// The pairs' weights H over the lengths of both vectors, written over the tile.
template <class T>
struct WriteWeights {
  const Image<T>& image;
  const Score<T>& score;
  int64_t a, b, columns;
  T* tile;

  template <class D>
  void operator()(int64_t i, const D& distances) const {
    typedef Vector<T> V;
    const T count = static_cast<T>(image.count);
    const T inverse_i = image.inverse[a * kBlock + i];
    const T partition_i = image.partition[a * kBlock + i];
    for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
      const V s = similarity(image, score, a * kBlock + i, b * kBlock + j, tile + i * kBlock + j);
      const V d = distances(j);
      const V weight = d * score.den_slope + score.den_bias;
      const V x = exponent(score, s, d);
      const V partition_j = load(image.partition + b * kBlock + j);
      const V share = score.bounded ? exponential(x) * (partition_j + partition_i)
                                    : exponential(clamp(x - partition_i)) + exponential(clamp(x - partition_j));
      const V h = weight * share * count - d * (2 * score.num_slope);
      store(tile + i * kBlock + j, h * inverse_i * load(image.inverse + b * kBlock + j));
    }
  }
};

template <class T>
static int64_t vector_columns(const Image<T>& image, int64_t b) {
  constexpr int64_t lanes = Simd<T>::lanes;
  return (image.block_rows(b) + lanes - 1) / lanes * lanes;
}

// Adds the exponentials of a tile of inner products to Z.
template <class T>
static void add_pairs(const Image<T>& image, const Score<T>& score, int64_t a, int64_t b, T* tile) {
  const int64_t columns = vector_columns(image, b);
  if (score.bounded) {
    alignas(64) T column_sums[kBlock] = {};
    for_each_row(image, score, a, b, AddExponentials<T>{image, score, a, b, columns, tile, column_sums});
    if (a == b) return;
    for (int64_t j = 0; j < image.block_rows(b); ++j) image.z[b * kBlock + j] += column_sums[j];
    return;
  }
  for_each_row(image, score, a, b, WriteExponents<T>{image, score, a, b, columns, tile});
  const int64_t rows_a = image.block_rows(a), rows_b = image.block_rows(b);
  for (int64_t i = 0; i < rows_a; ++i) {
    const int64_t row = a * kBlock + i;
    add_to_running_sum(tile + i * kBlock, rows_b, 1, image.z[row], image.maximum[row]);
  }
  if (a == b) return;
  for (int64_t j = 0; j < rows_b; ++j) {
    const int64_t row = b * kBlock + j;
    add_to_running_sum(tile + j, rows_a, kBlock, image.z[row], image.maximum[row]);
  }
}

// Turns a tile of inner products into H.
template <class T>
static void weigh_pairs(const Image<T>& image, const Score<T>& score, int64_t a, int64_t b, T* tile) {
  for_each_row(image, score, a, b, WriteWeights<T>{image, score, a, b, vector_columns(image, b), tile});
}

template <class T>
void forward_pair(const Image<T>& image, const Score<T>& score, int64_t a, int64_t b) {
  alignas(64) T tile[kBlock * kBlock];
  inner_products(image, a, b, tile);
  add_pairs(image, score, a, b, tile);
}

template <class T>
void backward_pair(const Image<T>& image, const Score<T>& score, int64_t a, int64_t b) {
  alignas(64) T tile[kBlock * kBlock];
  inner_products(image, a, b, tile);
  weigh_pairs(image, score, a, b, tile);
  add_gradient<T, false>(image, a, b, tile);
  if (a != b) add_gradient<T, true>(image, b, a, tile);
}

// Packs one vector (null: padding): values = vector 2^-k with k from its largest entry, so that the largest lies in
// [1/2, 1). Returns k, and 1 / length of `values` (0 for a zero vector), and adds the unit vector to unit_sum.
template <class Input, class T>
int pack_vector(const Input* vector, int64_t stride, int64_t channels, T* values, T& inverse, double* unit_sum) {
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
  int exponent = 0;
  if (std::isfinite(largest)) std::frexp(largest, &exponent);
  exponent = std::max(exponent, -1000);  // subnormal fp64 vectors
  const double scale = std::ldexp(1.0, -exponent);
  double squares[8] = {};
  for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(scale * values[c]);
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    for (int64_t k = 0; k < 8; ++k) squares[k] += static_cast<double>(values[c + k]) * values[c + k];
  }
  for (; c < channels; ++c) squares[0] += static_cast<double>(values[c]) * values[c];
  double sum = 0;
  for (const double square : squares) sum += square;
  const double reciprocal = sum > 0 ? 1 / std::sqrt(sum) : 0;
  inverse = static_cast<T>(reciprocal);
  for (int64_t i = 0; i < channels; ++i) unit_sum[i] += reciprocal * values[i];
  return exponent;
}

// One vector's gradient: scale (g - (g . u) u), from g over `inverse` (in panels, `panel` apart) plus the rank-one part
// of the numerator, bias * unit_sum.
template <class Output, class T>
void write_gradient_row(const T* grad, const T* vector, int64_t panel, int64_t channels, T inverse, T bias, double scale,
                        const T* unit_sum, T* scratch, Output* out) {
  double along[kPanel] = {};
  for (int64_t begin = 0; begin < channels; begin += kPanel, grad += panel, vector += panel) {
    const int64_t length = channels - begin < kPanel ? channels - begin : kPanel;
    T* g = scratch + begin;
    T* x = scratch + channels + begin;
    for (int64_t k = 0; k < length; ++k) {
      g[k] = grad[k] + bias * inverse * unit_sum[begin + k];
      x[k] = vector[k];
      along[k] += static_cast<double>(g[k]) * x[k];
    }
  }
  double sum = 0;
  for (const double part : along) sum += part;
  const T projection = static_cast<T>(sum * inverse * inverse);
  const T* x = scratch + channels;
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = static_cast<Output>(static_cast<T>(scale * (scratch[c] - projection * x[c])));
  }
}

template void forward_pair<float>(const Image<float>&, const Score<float>&, int64_t, int64_t);
template void forward_pair<double>(const Image<double>&, const Score<double>&, int64_t, int64_t);
template void backward_pair<float>(const Image<float>&, const Score<float>&, int64_t, int64_t);
template void backward_pair<double>(const Image<double>&, const Score<double>&, int64_t, int64_t);

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
