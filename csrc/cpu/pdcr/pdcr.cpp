// PDCR on the CPU: loss and gradient by symmetric tiles, in fp32 (fp64 for fp64), N x N never stored. Losses are reduced
// over images in double. Tested by tests/test_pdcr.py.
//
// Vectors are packed (packed.h); then the tiles, each the pairs of two blocks of vectors, are computed in an order in
// which threads seldom wait for each other (schedule.h). A tile pair whose ratios are all equal has d = 0 and is skipped: it adds a
// count to Z and nothing to H.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "affinity.h"
#include "cpu/buffer.h"
#include "cpu/capability.h"
#include "cpu/pdcr/packed.h"
#include "cpu/pdcr/schedule.h"
#include "stable_string.h"

#if defined(CSF_AMX)
#include <immintrin.h>
#endif

namespace csf::pdcr {
namespace {

#define CSF_KERNEL "cpu/pdcr/tiles_kernel.h"
#include "cpu/foreach_capability.h"
#undef CSF_KERNEL
#define CSF_KERNEL "cpu/pdcr/amx_tiles.h"
#include "cpu/for_amx.h"

using torch::headeronly::ScalarType;

#if defined(CSF_AMX)
// The pair function of one thread: its tile registers and its scratch.
template <int TERMS, bool BACKWARD>
class AmxPair {
 public:
  AmxPair(const Affinity<float>& affinity, int64_t stripes)
      : affinity_(affinity), memory_(amx::scratch_size<TERMS>(stripes)), scratch_{memory_.get(), {}} {
    amx::configure();
  }
  AmxPair(const AmxPair&) = delete;
  ~AmxPair() { amx::release(); }

  void operator()(const Image<float>& image, int64_t a, int64_t b) {
    (BACKWARD ? amx::backward_pair<TERMS> : amx::forward_pair<TERMS>)(image, affinity_, a, b, scratch_);
  }

 private:
  const Affinity<float>& affinity_;
  Buffer<int32_t> memory_;
  amx::Scratch scratch_;
};
#endif

// Computes the tiles of all images.
template <bool BACKWARD, class T>
void run_tiles(const Packed<T>& packed, const std::vector<Image<T>>& images, const Affinity<double>& exact_affinity) {
  const Affinity<T> affinity(exact_affinity);
#if defined(CSF_AMX)
  if constexpr (std::is_same_v<T, float>) {
    const int64_t stripes = packed.stripes();
    switch (packed.num_terms()) {
      case 1: return for_each_tile(images, [&] { return AmxPair<1, BACKWARD>(affinity, stripes); });
      case 2: return for_each_tile(images, [&] { return AmxPair<2, BACKWARD>(affinity, stripes); });
      case 3: return for_each_tile(images, [&] { return AmxPair<3, BACKWARD>(affinity, stripes); });
    }
  }
#endif
  const auto pair = BACKWARD ? CSF_DISPATCH(backward_pair<T>) : CSF_DISPATCH(forward_pair<T>);
  for_each_tile(images, [&] {
    return [&](const Image<T>& image, int64_t a, int64_t b) { pair(image, affinity, a, b); };
  });
}

// What the skipped tiles add to Z: blocks of equal ratios stand in runs.
template <class T>
void count_skipped(const Image<T>& image) {
  for (int64_t begin = 0, end; begin < image.blocks(); begin = end) {
    int64_t rows = 0;
    for (end = begin; end < image.blocks() && (end == begin || image.skips(begin, end)); ++end) {
      rows += image.block_rows(end);
    }
    if (!image.skips(begin, begin)) continue;
    for (int64_t row = begin * kBlock; row < end * kBlock; ++row) {
      image.z[row] = static_cast<double>(rows);
      image.maximum[row] = 0;
    }
  }
}

enum class Reduction { kNone, kMean, kSum };

// Takes the argument `reduction` of an operator. A check in Python comes before, but an exported program may skip it.
Reduction take_reduction(StringHandle handle) {
  const String word(handle);
  if (word.view() == "none") return Reduction::kNone;
  if (word.view() == "mean") return Reduction::kMean;
  STD_TORCH_CHECK(word.view() == "sum", "reduction: expected 'none', 'mean' or 'sum', got '", std::string(word.view()),
                  "'");
  return Reduction::kSum;
}

// What L / n^2 of every image is multiplied by before the sum over images.
template <class T>
std::vector<double> image_shares(const std::vector<Image<T>>& images, Reduction reduction) {
  std::vector<double> shares(images.size(), 1.0);
  if (reduction == Reduction::kMean) {
    const auto has_vectors = [](const Image<T>& image) { return image.count > 0; };
    const int64_t number = std::count_if(images.begin(), images.end(), has_vectors);
    std::fill(shares.begin(), shares.end(), 1.0 / static_cast<double>(std::max<int64_t>(1, number)));
  } else if (reduction == Reduction::kSum) {
    std::transform(images.begin(), images.end(), shares.begin(), [](const Image<T>& image) {
      return static_cast<double>(image.count) * static_cast<double>(image.count);
    });
  }
  return shares;
}

template <class T>
void forward(const Tensor& vectors, const Tensor& ratios, const std::optional<Tensor>& valid,
             const Affinity<double>& affinity, Reduction reduction, Tensor& loss, Tensor& log_z) {
  const Packed<T> packed(vectors, ratios, valid, affinity, false);
  const Buffer<double> z(packed.rows(), 0.0), maximum(packed.rows());
  const Buffer<double> attraction(packed.rows() / kBlock, 0.0);
  std::vector<Image<T>> images;
  for (int64_t index = 0; index < packed.batch(); ++index) {
    Image<T> image = packed.image(index);
    image.z = z.get() + packed.first_row(index);
    image.maximum = maximum.get() + packed.first_row(index);
    image.attraction = attraction.get() + image.first_block;
    std::fill_n(image.maximum, image.padded, image.bounded ? 0.0 : -std::numeric_limits<double>::infinity());
    count_skipped(image);
    images.push_back(image);
  }
  run_tiles<false>(packed, images, affinity);

  T* loss_data = static_cast<T*>(loss.mutable_data_ptr());
  T* log_z_data = static_cast<T*>(log_z.mutable_data_ptr());
  std::fill_n(log_z_data, log_z.numel(), T(0));
  const std::vector<double> shares = image_shares(images, reduction);
  double total = 0;
  for (int64_t index = 0; index < packed.batch(); ++index) {
    const Image<T>& image = images[index];
    const double n = static_cast<double>(image.count);
    double sum = 0, attracted = 0;
    for (int64_t row = 0; row < image.count; ++row) {
      const double value = image.maximum[row] + std::log(image.z[row]);
      sum += value;
      log_z_data[index * log_z.size(1) + packed.order(index)[row]] = static_cast<T>(value);
    }
    for (int64_t block = 0; block < image.blocks(); ++block) attracted += image.attraction[block];
    double square = 0;
    for (const double value : packed.unit_sum(index)) square += value * value;
    const double numerator = affinity.num_bias * (square - affinity.shift * n * n) + affinity.num_slope * attracted;
    const double image_loss = image.count == 0 ? 0 : (n * sum - numerator / affinity.temperature) / (n * n);
    if (reduction == Reduction::kNone) {
      loss_data[index] = static_cast<T>(image_loss);
    } else {
      total += image_loss * shares[index];
    }
  }
  if (reduction != Reduction::kNone) loss_data[0] = static_cast<T>(total);
}

template <class T>
Tensor backward(const Tensor& grad, const Tensor& log_z, const Tensor& vectors, const Tensor& ratios,
                const std::optional<Tensor>& valid, const Affinity<double>& affinity, Reduction reduction) {
  Packed<T> packed(vectors, ratios, valid, affinity, true);
  const int64_t row_size = packed.stripes() * kStripe;
  const Buffer<T> z_terms(packed.rows(), T(0));
  const Buffer<T> grad_rows(packed.rows() * row_size, T(0));
  const T* log_z_data = log_z.const_data_ptr<T>();
  std::vector<Image<T>> images;
  for (int64_t index = 0; index < packed.batch(); ++index) {
    Image<T> image = packed.image(index);
    T* z_term = z_terms.get() + packed.first_row(index);
    for (int64_t row = 0; row < image.count; ++row) {
      const T value = log_z_data[index * log_z.size(1) + packed.order(index)[row]];
      z_term[row] = image.bounded ? std::exp(-value) : value;
    }
    image.z_term = z_term;
    image.grad = grad_rows.get() + packed.first_row(index) * row_size;
    images.push_back(image);
  }
  run_tiles<true>(packed, images, affinity);
  packed.release_columns();

  std::vector<double> image_grads = image_shares(images, reduction);
  const T* grad_data = grad.const_data_ptr<T>();
  for (size_t index = 0; index < image_grads.size(); ++index) {
    image_grads[index] *= static_cast<double>(grad_data[reduction == Reduction::kNone ? index : 0]);
  }
  Tensor out = torch::stable::new_empty(vectors, vectors.sizes());
  write_gradient(packed, images, affinity, image_grads, out);
  return out;
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

// Of the results, `rows` and `floats` are for GPUs, and empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> pdcr_forward(Tensor vectors, Tensor ratios, std::optional<Tensor> valid,
                                                        std::vector<double> affinity, StringHandle reduction_word,
                                                        StringHandle backend) {
  const Reduction reduction = take_reduction(reduction_word);
  check_runs_on_cpu(backend);
  const bool is_double = vectors.scalar_type() == ScalarType::Double;
  const auto dtype = is_double ? ScalarType::Double : ScalarType::Float;
  std::vector<int64_t> loss_shape;
  if (reduction == Reduction::kNone) loss_shape.push_back(vectors.size(0));
  Tensor loss = torch::stable::new_empty(vectors, loss_shape, dtype);
  Tensor log_z = torch::stable::new_empty(vectors, {vectors.size(0), vectors.size(1)}, dtype);
  (is_double ? forward<double> : forward<float>)(vectors, torch::stable::contiguous(ratios), dense(valid),
                                                 make_affinity(affinity), reduction, loss, log_z);
  Tensor rows = torch::stable::new_empty(vectors, {0});
  Tensor floats = torch::stable::new_empty(vectors, {0}, ScalarType::Float);
  return {loss, log_z, rows, floats};
}

Tensor pdcr_backward(Tensor grad, Tensor log_z, Tensor vectors, Tensor ratios, std::optional<Tensor> valid,
                     Tensor /*rows*/, Tensor /*floats*/, std::vector<double> affinity, StringHandle reduction_word,
                     StringHandle backend) {
  const Reduction reduction = take_reduction(reduction_word);
  check_runs_on_cpu(backend);
  const bool is_double = vectors.scalar_type() == ScalarType::Double;
  return (is_double ? backward<double> : backward<float>)(
      torch::stable::contiguous(grad), torch::stable::contiguous(log_z), vectors, torch::stable::contiguous(ratios),
      dense(valid), make_affinity(affinity), reduction);
}

}  // namespace
}  // namespace csf::pdcr

STABLE_TORCH_LIBRARY_IMPL(contrastseg_fast, CPU, m) {
  m.impl("pdcr_forward", TORCH_BOX(&csf::pdcr::pdcr_forward));
  m.impl("pdcr_backward", TORCH_BOX(&csf::pdcr::pdcr_backward));
}
