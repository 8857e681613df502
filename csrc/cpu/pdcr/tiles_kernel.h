// The tiles of PDCR, compiled once for every capability (see capability.h; included by pdcr.cpp). Tested by
// tests/test_pdcr.py, once for each capability.
//
// A tile holds the pairs of two blocks. `forward_pair` adds their exponentials to Z of both blocks; `backward_pair`
// turns the tile into the pairs' weights H and adds H X_b to the gradient of block a, and H^T X_a to that of b.

namespace CSF_CAPABILITY {

constexpr int64_t kTileRows = CSF_VECTOR_BYTES == 64 ? 12 : 6;  // rows of a register tile, two vectors wide

template <class T>
static inline Vector<T> absolute(Vector<T> x) {
  return x < 0 ? -x : x;
}

static inline Vector<float> clamp(Vector<float> x) {
  x = x < -87.0f ? Vector<float>{} - 87.0f : x;
  return x > 88.0f ? Vector<float>{} + 88.0f : x;
}

static inline Vector<double> clamp(Vector<double> x) { return x; }

// exp to about 1 ulp: x = n ln 2 + r, and a polynomial for exp(r). In fp32, |x| <= 87, which `clamp` makes sure of.
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
  return reinterpret_cast<V>(reinterpret_cast<Vector<int32_t>>(p) + (reinterpret_cast<Vector<int32_t>>(shifted) << 23));
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
  for (int64_t k = 0; k < depth; ++k, a += A_COLUMN, b += kStripe) {
    const Vector<T> b_left = load(b), b_right = load(b + Simd<T>::lanes);
#pragma GCC unroll 12
    for (int64_t i = 0; i < kTileRows; ++i) {
      left[i] += a[i * A_ROW] * b_left;
      right[i] += a[i * A_ROW] * b_right;
    }
  }
}

// c[i][0:kStripe] (+)= sum_k a(i, k) b[k][0:kStripe] for i < rows (rounded up to whole register tiles), with
// a(i, k) = a[(k / kStripe) * a_chunk + i * A_ROW + (k % kStripe) * A_COLUMN].
template <class T, int64_t A_ROW, int64_t A_COLUMN, bool ACCUMULATE>
static inline void multiply_stripe(const T* a, int64_t a_chunk, const T* b, int64_t depth, T* c, int64_t c_row,
                                   int64_t rows) {
  typedef Vector<T> V;
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t column = 0; column < kStripe; column += 2 * lanes) {
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
      for (; left_over >= kStripe; left_over -= kStripe, a_chunk_row += a_chunk, b_row += kStripe * kStripe) {
        add_products<T, A_ROW, A_COLUMN>(a_chunk_row, b_row, kStripe, left, right);
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
  constexpr int64_t chunk = 4 * kStripe;  // channels at a time: partial sums round less
  const int64_t stripes = (image.block_rows(b) + kStripe - 1) / kStripe;
  for (int64_t c = 0; c < image.channels; c += chunk) {
    const int64_t depth = std::min(chunk, image.channels - c);
    const T* rows = image.rows + (c / kStripe * image.padded + a * kBlock) * kStripe;
    for (int64_t stripe = 0; stripe < stripes; ++stripe) {
      const T* columns = image.columns + ((b * kBlock / kStripe + stripe) * image.channels + c) * kStripe;
      const auto multiply = c == 0 ? multiply_stripe<T, kStripe, 1, false> : multiply_stripe<T, kStripe, 1, true>;
      multiply(rows, image.padded * kStripe, columns, depth, tile + stripe * kStripe, kBlock, image.block_rows(a));
    }
  }
}

// grad_a += H X_b, with H = tile (TRANSPOSED: H = tile^T).
template <class T, bool TRANSPOSED>
static void add_gradient(const Image<T>& image, int64_t a, int64_t b, const T* tile) {
  constexpr int64_t row = TRANSPOSED ? 1 : kBlock;
  constexpr int64_t column = TRANSPOSED ? kBlock : 1;
  for (int64_t c = 0; c < image.channels; c += kStripe) {
    const int64_t stripe = c / kStripe * image.padded * kStripe;
    multiply_stripe<T, row, column, true>(tile, kStripe * column, image.rows + stripe + b * kBlock * kStripe,
                                         image.block_rows(b), image.grad + stripe + a * kBlock * kStripe, kStripe,
                                         image.block_rows(a));
  }
}

// The distances d between one vector of block a and the vectors of block b, a SIMD vector at a time.
template <class T>
struct Distances {
  const T* a;  // ratios of the one vector: a[m * kBlock]
  const T* b;
  int64_t num_classes;
  const Affinity<T>& affinity;

  Vector<T> operator()(int64_t j) const {
    typedef Vector<T> V;
    if (affinity.categorical) return load(b + j) == V{} + a[0] ? V{} : V{} + 1;
    V d{};
    for (int64_t m = 0; m < num_classes; ++m) d += absolute<T>(load(b + m * kBlock + j) - a[m * kBlock]);
    return d * affinity.distance_scale;
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
static inline void for_each_row(const Image<T>& image, const Affinity<T>& affinity, int64_t a, int64_t b,
                                const Rows& rows) {
  const T* ratios_a = image.ratios + a * image.num_classes * kBlock;
  const T* ratios_b = image.ratios + b * image.num_classes * kBlock;
  if (image.uniform[a] && image.uniform[b]) {
    const Vector<T> d = Vector<T>{} + Distances<T>{ratios_a, ratios_b, image.num_classes, affinity}(0)[0];
    for (int64_t i = 0; i < image.block_rows(a); ++i) rows(i, UniformDistance<T>{d});
  } else {
    for (int64_t i = 0; i < image.block_rows(a); ++i) {
      rows(i, Distances<T>{ratios_a + i, ratios_b, image.num_classes, affinity});
    }
  }
}

// s of vector i of block a with the vectors j... of block b.
template <class T>
static inline Vector<T> similarity(const Image<T>& image, const Affinity<T>& affinity, int64_t i, int64_t j,
                                   const T* tile_row) {
  return load(tile_row) * image.scale[i] * load(image.scale + j) - affinity.shift;
}

// s wbar / tau, rounded alike in both directions: in their difference to log Z large exponents cancel.
template <class T>
static inline Vector<T> exponent(const Affinity<T>& affinity, Vector<T> s, Vector<T> d) {
  return s * (d * affinity.exponent_slope + affinity.exponent_bias);
}

// Z, where exp is bounded.
template <class T>
struct AddExponentials {
  const Image<T>& image;
  const Affinity<T>& affinity;
  int64_t a, b, columns;
  const T* tile;
  T* column_sums;  // [kBlock]

  template <class D>
  void operator()(int64_t i, const D& distances) const {
    typedef Vector<T> V;
    V row_sum{}, attraction{};
    for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
      const V s = similarity(image, affinity, a * kBlock + i, b * kBlock + j, tile + i * kBlock + j);
      const V d = distances(j);
      const V e = exponential(exponent(affinity, s, d));
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
  const Affinity<T>& affinity;
  int64_t a, b, columns;
  T* tile;

  template <class D>
  void operator()(int64_t i, const D& distances) const {
    typedef Vector<T> V;
    V attraction{};
    for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
      const V s = similarity(image, affinity, a * kBlock + i, b * kBlock + j, tile + i * kBlock + j);
      const V d = distances(j);
      attraction += s * d * load(image.present + b * kBlock + j);
      store(tile + i * kBlock + j, exponent(affinity, s, d));
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

// The pairs' weights H, times the scales of both vectors, written over the tile.
template <class T>
struct WriteWeights {
  const Image<T>& image;
  const Affinity<T>& affinity;
  int64_t a, b, columns;
  T* tile;
  bool bounded;  // no template parameter: where it is false, the compiler would fuse the product x into x - log Z

  template <class D>
  void operator()(int64_t i, const D& distances) const {
    typedef Vector<T> V;
    const T count = static_cast<T>(image.count);
    const T scale_i = image.scale[a * kBlock + i];
    const T z_term_i = image.z_term[a * kBlock + i];
    for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
      const V s = similarity(image, affinity, a * kBlock + i, b * kBlock + j, tile + i * kBlock + j);
      const V d = distances(j);
      const V weight = d * affinity.den_slope + affinity.den_bias;
      const V x = exponent(affinity, s, d);
      const V z_term_j = load(image.z_term + b * kBlock + j);
      const V share = bounded ? exponential(x) * (z_term_j + z_term_i)
                              : exponential(clamp(x - z_term_i)) + exponential(clamp(x - z_term_j));
      const V h = weight * share * count - d * (2 * affinity.num_slope);
      store(tile + i * kBlock + j, h * scale_i * load(image.scale + b * kBlock + j));
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
static void add_pairs(const Image<T>& image, const Affinity<T>& affinity, int64_t a, int64_t b, T* tile) {
  const int64_t columns = vector_columns(image, b);
  if (image.bounded) {
    alignas(64) T column_sums[kBlock] = {};
    for_each_row(image, affinity, a, b, AddExponentials<T>{image, affinity, a, b, columns, tile, column_sums});
    if (a == b) return;
    for (int64_t j = 0; j < image.block_rows(b); ++j) image.z[b * kBlock + j] += column_sums[j];
    return;
  }
  for_each_row(image, affinity, a, b, WriteExponents<T>{image, affinity, a, b, columns, tile});
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
static void weigh_pairs(const Image<T>& image, const Affinity<T>& affinity, int64_t a, int64_t b, T* tile) {
  const int64_t columns = vector_columns(image, b);
  for_each_row(image, affinity, a, b, WriteWeights<T>{image, affinity, a, b, columns, tile, image.bounded});
}

template <class T>
void forward_pair(const Image<T>& image, const Affinity<T>& affinity, int64_t a, int64_t b) {
  alignas(64) T tile[kBlock * kBlock];
  inner_products(image, a, b, tile);
  add_pairs(image, affinity, a, b, tile);
}

template <class T>
void backward_pair(const Image<T>& image, const Affinity<T>& affinity, int64_t a, int64_t b) {
  alignas(64) T tile[kBlock * kBlock];
  inner_products(image, a, b, tile);
  weigh_pairs(image, affinity, a, b, tile);
  add_gradient<T, false>(image, a, b, tile);
  if (a != b) add_gradient<T, true>(image, b, a, tile);
}

template void forward_pair<float>(const Image<float>&, const Affinity<float>&, int64_t, int64_t);
template void forward_pair<double>(const Image<double>&, const Affinity<double>&, int64_t, int64_t);
template void backward_pair<float>(const Image<float>&, const Affinity<float>&, int64_t, int64_t);
template void backward_pair<double>(const Image<double>&, const Affinity<double>&, int64_t, int64_t);

}  // namespace CSF_CAPABILITY
