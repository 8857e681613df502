// PDCR on the CPU: loss and gradient by symmetric tiles, in fp32 (fp64 for fp64), N x N never stored.
//
// The valid vectors of an image are sorted by ratio, scaled by powers of two and packed. A tile pair whose ratios are
// all equal has d = 0 and is skipped: it adds a count to Z and nothing to H. The remaining pairs of groups of blocks are
// ordered like a round-robin tournament, so that threads take them in order and seldom want the same block: a task waits
// until its groups have had all their earlier tasks. No copies, no atomic adds, equal bits for any number of threads.
#include "cpu/pdcr_plan.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <thread>
#include <tuple>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/capability.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define CSF_PDCR_AMX
#include <immintrin.h>
#endif

namespace csf::pdcr {
namespace {

#define CSF_KERNEL "cpu/pdcr_kernel.h"
#include "cpu/foreach_capability.h"
#if defined(CSF_PDCR_AMX)
#include "cpu/pdcr_amx.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Memory of the packed layouts: aligned for whole vectors, in huge pages where it is large and Linux offers them.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = round_up(std::max<int64_t>(size, 1) * sizeof(T), 64);
    const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(alignment, round_up(bytes, alignment))));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == kHugePage) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
  }
  Buffer(int64_t size, T value) : Buffer(size) { std::fill_n(data_.get(), size, value); }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }
  void release() { data_.reset(); }

 private:
  static constexpr size_t kHugePage = size_t(1) << 21;
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T[], Free> data_;
};

struct Options {
  double temperature, distance_scale;
  bool categorical;
  double num_bias, num_slope, den_bias, den_slope, shift;
};

// The valid vectors of every image, sorted by their ratios' bits so that equal ratios stand together.
std::vector<std::vector<int64_t>> sorted_rows(const Tensor& ratios, const std::optional<Tensor>& valid) {
  const int64_t batch = ratios.size(0), count = ratios.size(1), classes = ratios.size(2);
  const auto* ratio = static_cast<const char*>(ratios.const_data_ptr());
  const int64_t row_bytes = classes * (ratios.scalar_type() == ScalarType::Double ? sizeof(double) : sizeof(float));
  const bool* keep = valid.has_value() ? valid->const_data_ptr<bool>() : nullptr;
  std::vector<std::vector<int64_t>> rows(batch);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const char* base = ratio + image * count * row_bytes;
      for (int64_t i = 0; i < count; ++i) {
        if (keep == nullptr || keep[image * count + i]) rows[image].push_back(i);
      }
      std::sort(rows[image].begin(), rows[image].end(), [&](int64_t i, int64_t j) {
        const int order = std::memcmp(base + i * row_bytes, base + j * row_bytes, row_bytes);
        return order != 0 ? order < 0 : i < j;
      });
    }
  });
  return rows;
}

// bf16 terms that hold a value exactly, where AMX multiplies them; 0 where vectors multiply the values themselves.
int exact_terms(ScalarType dtype) {
#if defined(CSF_PDCR_AMX)
  if (capability() != Capability::amx) return 0;
  switch (dtype) {
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    case ScalarType::Float: return 3;
    default: return 0;
  }
#else
  return 0;
#endif
}

// Everything the tiles read, packed from the op's inputs.
template <class T>
class Problem {
 public:
  Problem(const Tensor& vectors, const Tensor& ratios, const std::optional<Tensor>& valid, const Options& options,
          bool backward)
      : options_(options), order_(sorted_rows(ratios, valid)) {
    batch_ = vectors.size(0);
    channels_ = vectors.size(2);
    first_block_.assign(batch_ + 1, 0);
    for (int64_t image = 0; image < batch_; ++image) {
      const int64_t count = order_[image].size();
      first_block_[image + 1] = first_block_[image] + round_up(count, kBlock) / kBlock;
    }
    classes_ = ratios.size(2);
    const int64_t padded = first_block_.back() * kBlock;
    num_terms_ = exact_terms(vectors.scalar_type());
    // With AMX only the gradient's last step reads the rows, and beside it there is room for the right form of bf16 alone.
    keeps_rows_ = num_terms_ == 0 || backward;
    keeps_right_ = num_terms_ > 0 && !(backward && num_terms_ > 1);
    rows_ = std::make_unique<Buffer<T>>(keeps_rows_ ? padded * panels() * kPanel : 0);
    terms_ = std::make_unique<Buffer<int32_t>>(padded * row_pairs());
    right_terms_ = std::make_unique<Buffer<int32_t>>(keeps_right_ ? padded * row_pairs() : 0);
    columns_ = std::make_unique<Buffer<T>>(num_terms_ == 0 ? padded * channels_ : 0);
    inverse_ = std::make_unique<Buffer<T>>(padded);
    exponent_ = std::make_unique<Buffer<int>>(padded);
    present_ = std::make_unique<Buffer<T>>(padded);
    ratios_ = std::make_unique<Buffer<T>>(padded * classes_);
    uniform_ = std::make_unique<Buffer<uint8_t>>(first_block_.back());
    block_sums_ = std::make_unique<Buffer<double>>(first_block_.back() * channels_);
    if (ratios.scalar_type() == ScalarType::Double) {
      pack_ratios<double>(ratios);
    } else {
      pack_ratios<float>(ratios);
    }
    switch (vectors.scalar_type()) {
      case ScalarType::Double: pack<double>(vectors); break;
      case ScalarType::Float: pack<float>(vectors); break;
      case ScalarType::Half: pack<torch::headeronly::Half>(vectors); break;
      default: pack<torch::headeronly::BFloat16>(vectors);
    }
    set_score();
  }

  int64_t batch() const { return batch_; }
  int64_t panels() const { return round_up(channels_, kPanel) / kPanel; }
  int64_t padded() const { return first_block_.back() * kBlock; }
  int64_t first_row(int64_t image) const { return first_block_[image] * kBlock; }
  const std::vector<int64_t>& order(int64_t image) const { return order_[image]; }
  const Options& options() const { return options_; }
  const Score<T>& score() const { return score_; }
  int num_terms() const { return num_terms_; }

  Image<T> image(int64_t index) const {
    const int64_t block = first_block_[index], row = block * kBlock;
    Image<T> image{};
    image.count = order_[index].size();
    image.padded = (first_block_[index + 1] - block) * kBlock;
    image.channels = channels_;
    image.rows = keeps_rows_ ? rows_->get() + row * panels() * kPanel : nullptr;
    image.columns = num_terms_ == 0 ? columns_->get() + row * channels_ : nullptr;
    image.terms = terms_->get() + row * row_pairs();
    image.right_terms = keeps_right_ ? right_terms_->get() + row * row_pairs() : nullptr;
    image.inverse = inverse_->get() + row;
    image.present = present_->get() + row;
    image.ratios = ratios_->get() + row * classes_;
    image.uniform = uniform_->get() + block;
    return image;
  }

  // sum_i u_i, by blocks in order: the rank-one part of the numerator.
  std::vector<double> unit_sum(int64_t index) const {
    std::vector<double> sum(channels_, 0.0);
    for (int64_t block = first_block_[index]; block < first_block_[index + 1]; ++block) {
      for (int64_t c = 0; c < channels_; ++c) sum[c] += (*block_sums_)[block * channels_ + c];
    }
    return sum;
  }

  // 2^-k of a packed row: the power of two it was multiplied by.
  double row_scale(int64_t row) const { return std::ldexp(1.0, -(*exponent_)[row]); }

  // Frees what only the tiles need.
  void release_columns() {
    columns_->release();
    terms_->release();
    right_terms_->release();
  }

  // Whether the pair is skipped: d = 0 throughout, and exp(0) = 1 whatever the vectors.
  bool skips(const Image<T>& image, int64_t a, int64_t b) const {
    if (options_.den_bias != 0 || !image.uniform[a] || !image.uniform[b]) return false;
    for (int64_t m = 0; m < classes_; ++m) {
      if (image.ratios[(a * classes_ + m) * kBlock] != image.ratios[(b * classes_ + m) * kBlock]) return false;
    }
    return true;
  }

  // Runs pair(image, a, b) for every pair of blocks that is not skipped; each thread's `pair` comes from make_pair().
  template <class MakePair>
  void for_each_pair(const std::vector<Image<T>>& images, const MakePair& make_pair) const {
    const std::vector<Task> tasks = schedule(images);
    std::vector<std::atomic<int32_t>> turns(first_block_.back());  // by the first block of a group
    std::atomic<int64_t> next{0};
    const auto wait = [&](int64_t group, int32_t turn) {
      for (int spins = 0; turns[group].load(std::memory_order_acquire) < turn; ++spins) {
        if (spins > 1024) std::this_thread::yield();
      }
    };
    const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks.size());
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      auto pair = make_pair();
      for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < int64_t(tasks.size());) {
        const Task& task = tasks[index];
        const Image<T>& image = images[task.image];
        const int64_t first = first_block_[task.image];
        wait(first + task.a, task.turn_a);
        wait(first + task.b, task.turn_b);
        for_each_block(image, task.a, task.b, [&](int64_t a, int64_t b) { pair(image, a, b); });
        turns[first + task.a].fetch_add(1, std::memory_order_release);
        if (task.a != task.b) turns[first + task.b].fetch_add(1, std::memory_order_release);
      }
    });
  }

 private:
  // Pairs of bf16 terms in a packed row.
  int64_t row_pairs() const { return panels() * kPanel / 2 * num_terms_; }

  // Blocks in a group: two where an image has enough of them, which halves what comes from beyond the L2 cache.
  static int64_t group_size(const Image<T>& image) { return image.blocks() >= 32 ? 2 : 1; }

  // The pairs of blocks of two groups (given by their first blocks) that are not skipped.
  template <class Pair>
  void for_each_block(const Image<T>& image, int64_t group_a, int64_t group_b, const Pair& pair) const {
    const int64_t size = group_size(image);
    for (int64_t a = group_a; a < std::min(group_a + size, image.blocks()); ++a) {
      for (int64_t b = std::max(a, group_b); b < std::min(group_b + size, image.blocks()); ++b) {
        if (!skips(image, a, b)) pair(a, b);
      }
    }
  }

  // The pairs of groups in tournament order (the circle method), all images round by round.
  std::vector<Task> schedule(const std::vector<Image<T>>& images) const {
    std::vector<Task> tasks;
    std::vector<int32_t> turns(first_block_.back(), 0);
    const auto players = [&](int64_t index) {
      return round_up((images[index].blocks() + group_size(images[index]) - 1) / group_size(images[index]), 2);
    };
    const auto add = [&](int64_t index, int64_t group_a, int64_t group_b) {
      const Image<T>& image = images[index];
      const int64_t a = std::min(group_a, group_b) * group_size(image);
      const int64_t b = std::max(group_a, group_b) * group_size(image);
      bool any = false;
      for_each_block(image, a, b, [&](int64_t, int64_t) { any = true; });
      if (!any) return;
      int32_t& turn_a = turns[first_block_[index] + a];
      int32_t& turn_b = turns[first_block_[index] + b];
      tasks.push_back({int32_t(index), int32_t(a), int32_t(b), turn_a, turn_b});
      ++turn_a;
      if (a != b) ++turn_b;
    };
    int64_t rounds = 0;
    for (int64_t index = 0; index < batch_; ++index) rounds = std::max(rounds, players(index));
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t index = 0; index < batch_; ++index) {
        const int64_t circle = players(index) - 1;
        // With an odd number of groups one has no partner in each round: its pairs within fill the gap.
        const bool odd = circle * group_size(images[index]) >= images[index].blocks();
        if (round > circle) continue;
        if (round == circle) {
          for (int64_t group = 0; group <= circle && !odd; ++group) add(index, group, group);
          continue;
        }
        add(index, round, odd ? round : circle);
        for (int64_t k = 1; k <= circle / 2; ++k) add(index, (round + k) % circle, (round + circle - k) % circle);
      }
    }
    return tasks;
  }

  template <class Ratio>
  void pack_ratios(const Tensor& ratios) {
    const int64_t count = ratios.size(1);
    const Ratio* source = ratios.const_data_ptr<Ratio>();
    for (int64_t image = 0; image < batch_; ++image) {
      for (int64_t block = first_block_[image]; block < first_block_[image + 1]; ++block) {
        T* target = ratios_->get() + block * kBlock * classes_;
        const int64_t begin = (block - first_block_[image]) * kBlock;
        const int64_t rows = std::min<int64_t>(kBlock, order_[image].size() - begin);
        bool uniform = true;
        for (int64_t m = 0; m < classes_; ++m) {
          for (int64_t i = 0; i < kBlock; ++i) {
            // Padding repeats the first row, so that it never makes a block look mixed.
            const int64_t row = order_[image][begin + (i < rows ? i : 0)];
            target[m * kBlock + i] = static_cast<T>(source[(image * count + row) * classes_ + m]);
            uniform = uniform && target[m * kBlock + i] == target[m * kBlock];
          }
        }
        (*uniform_)[block] = uniform;
      }
    }
  }

  template <class Input>
  void pack(const Tensor& vectors) {
    const Input* source = static_cast<const Input*>(vectors.const_data_ptr());
    const int64_t image_stride = vectors.stride(0), row_stride = vectors.stride(1), channel_stride = vectors.stride(2);
    const auto pack_vector = CSF_DISPATCH(pack_vector<Input, T>);
#if defined(CSF_PDCR_AMX)
    const auto split_vector = num_terms_ == 1   ? &amx::split_vector<1>
                              : num_terms_ == 2 ? &amx::split_vector<2>
                                                : &amx::split_vector<3>;
#endif
    for (int64_t image = 0; image < batch_; ++image) {
      const int64_t first = first_block_[image], padded = (first_block_[image + 1] - first) * kBlock;
      T* rows = rows_->get() + first * kBlock * panels() * kPanel;
      T* columns = columns_->get() + first * kBlock * channels_;
      torch::stable::parallel_for(first, first_block_[image + 1], 1, [&](int64_t begin, int64_t end) {
        std::vector<T> values(panels() * kPanel, T(0));
        std::fill(block_sums_->get() + begin * channels_, block_sums_->get() + end * channels_, 0.0);
        for (int64_t row = (begin - first) * kBlock; row < (end - first) * kBlock; ++row) {
          const int64_t packed = first * kBlock + row;
          const bool present = row < int64_t(order_[image].size());
          const Input* vector = present ? source + image * image_stride + order_[image][row] * row_stride : nullptr;
          (*exponent_)[packed] = pack_vector(vector, channel_stride, channels_, values.data(), (*inverse_)[packed],
                                             block_sums_->get() + packed / kBlock * channels_);
          (*present_)[packed] = present ? T(1) : T(0);
          for (int64_t panel = 0; keeps_rows_ && panel < panels(); ++panel) {
            std::copy_n(values.data() + panel * kPanel, kPanel, rows + (panel * padded + row) * kPanel);
          }
#if defined(CSF_PDCR_AMX)
          if constexpr (std::is_same_v<T, float>) {
            if (num_terms_ > 0) {
              int32_t* terms = terms_->get() + packed / kPanel * kPanel * row_pairs();
              split_vector(values.data(), panels(), terms + packed % kPanel * amx::kPairs);
              continue;
            }
          }
#endif
          T* column = columns + row / kPanel * channels_ * kPanel + row % kPanel;
          for (int64_t c = 0; c < channels_; ++c) column[c * kPanel] = values[c];
        }
#if defined(CSF_PDCR_AMX)
        if (keeps_right_) {
          const int64_t offset = begin * kBlock * row_pairs();
          amx::transpose_tiles(terms_->get() + offset, (end - begin) * kBlock * row_pairs(), right_terms_->get() + offset);
        }
#endif
      });
    }
  }

  // d_max from the spread of the ratios, and with it whether exp needs a running maximum.
  void set_score() {
    double spread = 0;
    int64_t longest = 1;
    for (int64_t index = 0; index < batch_; ++index) {
      const Image<T> view = image(index);
      longest = std::max(longest, view.count);
      double sum = 0;
      for (int64_t m = 0; m < classes_; ++m) {
        T low = std::numeric_limits<T>::infinity(), high = -low;
        for (int64_t i = 0; i < view.padded; ++i) {
          const T value = view.ratios[(i / kBlock * classes_ + m) * kBlock + i % kBlock];
          low = std::min(low, value);
          high = std::max(high, value);
        }
        if (view.count > 0) sum += high - low;
      }
      spread = std::max(spread, sum);
    }
    const double d_max = options_.categorical ? 1 : options_.distance_scale * spread;
    const double weight = std::max(std::abs(options_.den_bias), std::abs(options_.den_bias + options_.den_slope * d_max));
    const double exponent = (1 + std::abs(options_.shift)) * weight / options_.temperature;
    score_ = {static_cast<T>(options_.distance_scale),
              static_cast<T>(options_.num_slope),
              static_cast<T>(options_.den_bias),
              static_cast<T>(options_.den_slope),
              static_cast<T>(options_.den_bias / options_.temperature),
              static_cast<T>(options_.den_slope / options_.temperature),
              static_cast<T>(options_.shift),
              classes_,
              options_.categorical,
              exponent + std::log(static_cast<double>(longest)) <= 85};
  }

  Options options_;
  std::vector<std::vector<int64_t>> order_;
  int64_t batch_, channels_, classes_;
  int num_terms_;
  bool keeps_rows_, keeps_right_;
  std::vector<int64_t> first_block_;
  std::unique_ptr<Buffer<T>> rows_, columns_, inverse_, present_, ratios_;
  std::unique_ptr<Buffer<int32_t>> terms_, right_terms_;
  std::unique_ptr<Buffer<int>> exponent_;
  std::unique_ptr<Buffer<uint8_t>> uniform_;
  std::unique_ptr<Buffer<double>> block_sums_;
  Score<T> score_;
};

#if defined(CSF_PDCR_AMX)
// The pair function of one thread: its tile registers and its scratch.
template <int TERMS, bool BACKWARD>
class AmxPair {
 public:
  explicit AmxPair(const Problem<float>& problem)
      : score_(problem.score()), memory_(amx::scratch_size<TERMS>(problem.panels())), scratch_{memory_.get(), {}} {
    amx::configure();
  }
  AmxPair(const AmxPair&) = delete;
  ~AmxPair() { amx::release(); }

  void operator()(const Image<float>& image, int64_t a, int64_t b) {
    (BACKWARD ? amx::backward_pair<TERMS> : amx::forward_pair<TERMS>)(image, score_, a, b, scratch_);
  }

 private:
  const Score<float>& score_;
  Buffer<int32_t> memory_;
  amx::Scratch scratch_;
};
#endif

template <class T, bool BACKWARD>
void run_pairs(const Problem<T>& problem, const std::vector<Image<T>>& images) {
#if defined(CSF_PDCR_AMX)
  if constexpr (std::is_same_v<T, float>) {
    switch (problem.num_terms()) {
      case 1: return problem.for_each_pair(images, [&] { return AmxPair<1, BACKWARD>(problem); });
      case 2: return problem.for_each_pair(images, [&] { return AmxPair<2, BACKWARD>(problem); });
      case 3: return problem.for_each_pair(images, [&] { return AmxPair<3, BACKWARD>(problem); });
    }
  }
#endif
  const auto pair = BACKWARD ? CSF_DISPATCH(backward_pair<T>) : CSF_DISPATCH(forward_pair<T>);
  problem.for_each_pair(images, [&] {
    return [&](const Image<T>& image, int64_t a, int64_t b) { pair(image, problem.score(), a, b); };
  });
}

template <class T>
void forward(const Tensor& vectors, const Tensor& ratios, const std::optional<Tensor>& valid, const Options& options,
             Tensor& loss, Tensor& log_z) {
  const Problem<T> problem(vectors, ratios, valid, options, false);
  const Buffer<double> z(problem.padded(), 0.0);
  const Buffer<double> maximum(problem.padded(), problem.score().bounded ? 0.0 : -std::numeric_limits<double>::infinity());
  const Buffer<double> attraction(problem.padded() / kBlock, 0.0);
  std::vector<Image<T>> images;
  for (int64_t index = 0; index < problem.batch(); ++index) {
    Image<T> image = problem.image(index);
    image.z = z.get() + problem.first_row(index);
    image.maximum = maximum.get() + problem.first_row(index);
    image.attraction = attraction.get() + problem.first_row(index) / kBlock;
    // The pairs that are skipped: blocks of equal ratios stand in runs.
    for (int64_t begin = 0, end; begin < image.blocks(); begin = end) {
      int64_t rows = 0;
      for (end = begin; end < image.blocks() && (end == begin || problem.skips(image, begin, end)); ++end) {
        rows += image.block_rows(end);
      }
      if (!problem.skips(image, begin, begin)) continue;
      for (int64_t row = begin * kBlock; row < end * kBlock; ++row) {
        image.z[row] = static_cast<double>(rows);
        image.maximum[row] = 0;
      }
    }
    images.push_back(image);
  }
  run_pairs<T, false>(problem, images);

  T* loss_data = static_cast<T*>(loss.mutable_data_ptr());
  T* log_z_data = static_cast<T*>(log_z.mutable_data_ptr());
  std::fill_n(log_z_data, log_z.numel(), T(0));
  for (int64_t index = 0; index < problem.batch(); ++index) {
    const Image<T>& image = images[index];
    const double n = static_cast<double>(image.count);
    double sum = 0, attracted = 0;
    for (int64_t row = 0; row < image.count; ++row) {
      const double value = image.maximum[row] + std::log(image.z[row]);
      sum += value;
      log_z_data[index * log_z.size(1) + problem.order(index)[row]] = static_cast<T>(value);
    }
    for (int64_t block = 0; block < image.blocks(); ++block) attracted += image.attraction[block];
    double square = 0;
    for (const double value : problem.unit_sum(index)) square += value * value;
    const double numerator = options.num_bias * (square - options.shift * n * n) + options.num_slope * attracted;
    loss_data[index] = image.count == 0 ? T(0) : static_cast<T>((n * sum - numerator / options.temperature) / (n * n));
  }
}

template <class T, class Output>
void write_gradient(const Problem<T>& problem, const std::vector<Image<T>>& images, const T* grad, Tensor& out) {
  Output* target = static_cast<Output*>(out.mutable_data_ptr());
  const int64_t count = out.size(1), channels = out.size(2);
  const T bias = static_cast<T>(-2 * problem.options().num_bias);
  const auto write_row = CSF_DISPATCH(write_gradient_row<Output, T>);
  for (int64_t index = 0; index < problem.batch(); ++index) {
    if (images[index].count < count) std::fill_n(target + index * count * channels, count * channels, Output(0));
  }
  for (int64_t index = 0; index < problem.batch(); ++index) {
    const Image<T>& image = images[index];
    const double n = static_cast<double>(image.count);
    const double factor = image.count == 0 ? 0 : static_cast<double>(grad[index]) / (problem.options().temperature * n * n);
    const std::vector<double> sum = problem.unit_sum(index);
    const std::vector<T> unit_sum(sum.begin(), sum.end());
    torch::stable::parallel_for(0, image.count, 64, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(2 * channels);
      for (int64_t row = begin; row < end; ++row) {
        const T inverse = image.inverse[row];
        const double scale = inverse == 0 ? 0 : factor * problem.row_scale(problem.first_row(index) + row);
        write_row(image.grad + row * kPanel, image.rows + row * kPanel, image.padded * kPanel, channels, inverse, bias,
                  scale, unit_sum.data(), scratch.data(),
                  target + (index * count + problem.order(index)[row]) * channels);
      }
    });
  }
}

template <class T>
Tensor backward(const Tensor& grad, const Tensor& log_z, const Tensor& vectors, const Tensor& ratios,
                const std::optional<Tensor>& valid, const Options& options) {
  Problem<T> problem(vectors, ratios, valid, options, true);
  const Buffer<T> partition(problem.padded(), T(0));
  const Buffer<T> grad_rows(problem.padded() * problem.panels() * kPanel, T(0));
  const T* log_z_data = log_z.const_data_ptr<T>();
  std::vector<Image<T>> images;
  for (int64_t index = 0; index < problem.batch(); ++index) {
    Image<T> image = problem.image(index);
    T* values = partition.get() + problem.first_row(index);
    for (int64_t row = 0; row < image.count; ++row) {
      const T value = log_z_data[index * log_z.size(1) + problem.order(index)[row]];
      values[row] = problem.score().bounded ? std::exp(-value) : value;
    }
    image.partition = values;
    image.grad = grad_rows.get() + problem.first_row(index) * problem.panels() * kPanel;
    images.push_back(image);
  }
  run_pairs<T, true>(problem, images);
  problem.release_columns();

  Tensor out = torch::stable::new_empty(vectors, vectors.sizes());
  const T* grad_data = grad.const_data_ptr<T>();
  switch (vectors.scalar_type()) {
    case ScalarType::Double: write_gradient<T, double>(problem, images, grad_data, out); break;
    case ScalarType::Float: write_gradient<T, float>(problem, images, grad_data, out); break;
    case ScalarType::Half: write_gradient<T, torch::headeronly::Half>(problem, images, grad_data, out); break;
    default: write_gradient<T, torch::headeronly::BFloat16>(problem, images, grad_data, out);
  }
  return out;
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

std::tuple<Tensor, Tensor> pdcr_forward(Tensor vectors, Tensor ratios, std::optional<Tensor> valid, double temperature,
                                        double distance_scale, bool categorical, double num_bias, double num_slope,
                                        double den_bias, double den_slope, double shift) {
  const Options options{temperature, distance_scale, categorical, num_bias, num_slope, den_bias, den_slope, shift};
  const bool is_double = vectors.scalar_type() == ScalarType::Double;
  const auto dtype = is_double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_empty(vectors, {vectors.size(0)}, dtype);
  Tensor log_z = torch::stable::new_empty(vectors, {vectors.size(0), vectors.size(1)}, dtype);
  const Tensor packed = torch::stable::contiguous(ratios);
  (is_double ? forward<double> : forward<float>)(vectors, packed, dense(valid), options, loss, log_z);
  return {loss, log_z};
}

Tensor pdcr_backward(Tensor grad, Tensor log_z, Tensor vectors, Tensor ratios, std::optional<Tensor> valid,
                     double temperature, double distance_scale, bool categorical, double num_bias, double num_slope,
                     double den_bias, double den_slope, double shift) {
  const Options options{temperature, distance_scale, categorical, num_bias, num_slope, den_bias, den_slope, shift};
  const bool is_double = vectors.scalar_type() == ScalarType::Double;
  return (is_double ? backward<double> : backward<float>)(torch::stable::contiguous(grad),
                                                          torch::stable::contiguous(log_z), vectors,
                                                          torch::stable::contiguous(ratios), dense(valid), options);
}

}  // namespace
}  // namespace csf::pdcr

STABLE_TORCH_LIBRARY_IMPL(contrastseg_fast, CPU, m) {
  m.impl("pdcr_forward", TORCH_BOX(&csf::pdcr::pdcr_forward));
  m.impl("pdcr_backward", TORCH_BOX(&csf::pdcr::pdcr_backward));
}
