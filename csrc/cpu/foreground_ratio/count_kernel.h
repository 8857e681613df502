// Counting labels, compiled once for every capability (see capability.h; included by foreground_ratio.cpp). Tested by
// tests/test_foreground_ratio.py, once for each capability.
//
// `sweep` goes through the planes of a block once and adds every label to the counter of its row and column.
// Where patches begin or end it sums the counters over their rectangles: one by one, or by the counters'
// integral image where there are many. `count_patch` reads the labels of one patch, which is less work where
// patches are few or small.

#include "cpu/foreground_ratio/label_vectors_kernel.h"

namespace CSF_CAPABILITY {

typedef uint16_t FourHalves __attribute__((vector_size(8)));
typedef uint32_t FourCounts __attribute__((vector_size(16)));

static inline void add(uint64_t* counters, Words words) {
  words += load_as<Words>(counters);
  std::memcpy(counters, &words, sizeof(words));
}

template <bool IGNORED, class T>
static void count_classes(const ClassLayer<T>& layer, const T* labels, int64_t columns, uint64_t* counters) {
  const int64_t classes = layer.num_classes - layer.first_class, ignore_index = layer.ignore_index;
  const uint64_t first = layer.first_class;
  const uint64_t limit = classes < 0 ? 0 : classes < 4 ? classes : 4;
  const uint64_t ignored_word = 0 <= classes && classes < 4 ? uint64_t(1) << (16 * classes) : 0;
  for_each_label_vector<Integers>(labels, columns, [&](int64_t x, Integers label, Words lanes) {
    const Words slot = reinterpret_cast<Words>(label) - first;
    Words word = (slot < limit ? Words{} + 1 : Words{}) << (slot * 16 & 63);
    if (IGNORED) word = label == ignore_index ? Words{} + ignored_word : word;
    add(counters + x, word & lanes);
  });
}

template <bool IGNORED, class T>
static void add_channel(const T* labels, const uint8_t* ignored, double scale, int64_t columns,
                        uint64_t* counters) {
  const Words round_bits = reinterpret_cast<Words>(Doubles{} + kRound);
  for_each_label_vector<Doubles>(labels, columns, [&](int64_t x, Doubles label, Words lanes) {
    Words word = reinterpret_cast<Words>(label * scale + kRound) - round_bits;
    if (IGNORED) word = load_as<Words>(ignored + x) == 0 ? word : Words{};
    add(counters + x, word & lanes);
  });
}

// A row of labels without gaps: in place, or gathered into `buffer`.
template <class T>
static inline const T* load_row(const Labels<T>& labels, const Row& row, void* buffer) {
  const T* label = labels.at(row);
  if (labels.stride[2] == 1) return label;
  T* gathered = static_cast<T*>(buffer);
  for (int64_t i = 0; i < row.columns; ++i) gathered[i] = label[i * labels.stride[2]];
  return gathered;
}

// Labels of a floating dtype as integers: -1 where they are no class, num_classes where they are ignored.
template <class T>
static const int32_t* load_integers(const ClassLayer<T>& layer, const Row& row, void* buffer) {
  const T* labels = layer.labels.at(row);
  const int64_t stride = layer.labels.stride[2];
  const T num_classes = layer.num_classes, ignore_index = layer.ignore_index;
  const int32_t ignored = layer.num_classes;
  int32_t* integers = static_cast<int32_t*>(buffer);
  for (int64_t i = 0; i < row.columns; ++i) {
    const T label = labels[i * stride];
    const T in_range = label >= 0 && label < num_classes ? label : T(-1);
    const int32_t integer = static_cast<int32_t>(in_range);
    const int32_t index = static_cast<T>(integer) == label ? integer : -1;
    integers[i] = layer.separates_ignored && label == ignore_index ? ignored : index;
  }
  return integers;
}

template <class T>
static inline void add_row(const ClassLayer<T>& layer, const Row& row, void* buffer, uint64_t* counters) {
  if constexpr (std::is_floating_point_v<T>) {
    const int64_t classes = layer.num_classes;
    const Labels<int32_t> integers{load_integers(layer, row, buffer), {0, 0, 1}};
    const ClassLayer<int32_t> rounded{integers, layer.first_class, classes, layer.separates_ignored, classes};
    add_row(rounded, {0, 0, 0, row.columns}, nullptr, counters);
  } else {
    const auto count = layer.separates_ignored ? &count_classes<true, T> : &count_classes<false, T>;
    count(layer, load_row(layer.labels, row, buffer), row.columns, counters);
  }
}

template <class T>
static inline void add_row(const ChannelLayer<T>& layer, const Row& row, void* buffer, uint64_t* counters) {
  const T* labels = load_row(layer.labels, row, buffer);
  if (layer.ignored.data == nullptr) {
    add_channel<false>(labels, nullptr, layer.scale, row.columns, counters);
  } else {
    add_channel<true>(labels, layer.ignored.at(row), layer.scale, row.columns, counters);
  }
}

// Calls use(words) for all counters of a rectangle, a vector at a time.
template <class Use>
static inline void for_each_counter_vector(const uint64_t* counters, int64_t columns,
                                           const Rectangle& rectangle, Use&& use) {
  const int64_t whole = rectangle.columns / kLanes * kLanes;
  const Words rest = first_lanes(rectangle.columns - whole);
  for (int64_t y = rectangle.row; y < rectangle.row + rectangle.rows; ++y) {
    const uint64_t* row = counters + y * columns + rectangle.column;
    for (int64_t x = 0; x < whole; x += kLanes) use(load_as<Words>(row + x));
    if (whole < rectangle.columns) use(load_as<Words>(row + whole) & rest);
  }
}

// What counters hold: four counts of 16 bits (their sums: four of 32 bits), or one sum.
template <int64_t VALUES>
struct Counter;

template <>
struct Counter<4> {
  static constexpr int64_t values = 4;
  typedef FourCounts Sum;

  static Sum expand(uint64_t counter) {
    return __builtin_convertvector(reinterpret_cast<FourHalves>(counter), FourCounts);
  }

  static uint64_t value(Sum sum, int64_t index) { return sum[index]; }

  // The sum over a rectangle of counters that have counted `lines` labels.
  static Sum total(const uint64_t* counters, int64_t columns, const Rectangle& rectangle, int64_t lines) {
    constexpr uint64_t even_halves = 0x0000ffff0000ffff;
    const int64_t capacity = 65535 / (lines > 0 ? lines : 1);
    int64_t room = capacity;
    Words halves{}, even{}, odd{};
    for_each_counter_vector(counters, columns, rectangle, [&](Words words) {
      halves += words;
      if (--room > 0) return;
      even += halves & even_halves;
      odd += halves >> 16 & even_halves;
      halves = Words{};
      room = capacity;
    });
    const uint64_t even_sum = sum_lanes<uint64_t>(even + (halves & even_halves));
    const uint64_t odd_sum = sum_lanes<uint64_t>(odd + (halves >> 16 & even_halves));
    return Sum{static_cast<uint32_t>(even_sum), static_cast<uint32_t>(odd_sum),
               static_cast<uint32_t>(even_sum >> 32), static_cast<uint32_t>(odd_sum >> 32)};
  }
};

template <>
struct Counter<1> {
  static constexpr int64_t values = 1;
  typedef uint64_t Sum;

  static Sum expand(uint64_t counter) { return counter; }

  static uint64_t value(Sum sum, int64_t) { return sum; }

  static Sum total(const uint64_t* counters, int64_t columns, const Rectangle& rectangle, int64_t) {
    Words sum{};
    for_each_counter_vector(counters, columns, rectangle, [&](Words words) { sum += words; });
    return sum_lanes<uint64_t>(sum);
  }
};

// integral[y][x] = the sum of counters[0:y][0:x].
template <class Counter>
static void integrate(const uint64_t* counters, int64_t rows, int64_t columns,
                      typename Counter::Sum* integral) {
  typedef typename Counter::Sum Sum;
  for (int64_t x = 0; x <= columns; ++x) integral[x] = Sum{};
  for (int64_t y = 0; y < rows; ++y) {
    const Sum* above = integral + y * (columns + 1);
    Sum* here = integral + (y + 1) * (columns + 1);
    Sum row{};
    here[0] = row;
    for (int64_t x = 0; x < columns; ++x) {
      row += Counter::expand(counters[y * columns + x]);
      here[x + 1] = above[x + 1] + row;
    }
  }
}

template <class Sum>
static inline Sum look_up(const Sum* integral, int64_t columns, const Rectangle& rectangle) {
  const Sum* first = integral + rectangle.row * (columns + 1) + rectangle.column;
  const Sum* last = first + rectangle.rows * (columns + 1);
  return last[rectangle.columns] - last[0] - first[rectangle.columns] + first[0];
}

// Adds or subtracts the values of one layer, from `first` on.
template <class Counter>
static inline void add_to_patch(const Sums& sums, int64_t patch, int64_t first, bool positive,
                                typename Counter::Sum sum) {
  uint64_t* target = sums.data + patch * sums.stride + first;
  for (int64_t i = 0; i < Counter::values; ++i) {
    const uint64_t value = positive ? Counter::value(sum, i) : -Counter::value(sum, i);
    if (sums.shared) {
      __atomic_fetch_add(target + i, value, __ATOMIC_RELAXED);
    } else {
      target[i] += value;
    }
  }
}

// Adds the labels of a block to the patches whose faces are given, for several layers at once.
template <class Layer>
void sweep(const Layer* layers, int64_t count, const Block& block, const Faces& faces,
           const Workspace& memory, const Sums& sums) {
  typedef Counter<Layer::values> Counter;
  typedef typename Counter::Sum Sum;
  const int64_t rows = block.y_end - block.y_begin, columns = block.columns, pixels = rows * columns;
  uint64_t* counters = memory.counters;
  Sum* integral = static_cast<Sum*>(memory.integral);
  const Face* last = faces.faces + faces.first[block.z_end - block.z_begin + 1];
  for (int64_t i = 0; i < count * pixels; ++i) counters[i] = 0;
  for (int64_t z = block.z_begin;; ++z) {
    const Face* begin = faces.faces + faces.first[z - block.z_begin];
    const Face* end = faces.faces + faces.first[z - block.z_begin + 1];
    int64_t vectors = 0;
    for (const Face* face = begin; face < end; ++face) {
      vectors += 8 + face->rectangle.rows * (face->rectangle.columns / kLanes + 1);
    }
    const bool integrated = vectors > 2 * pixels;
    for (int64_t i = 0; i < count; ++i) {
      if (integrated) integrate<Counter>(counters + i * pixels, rows, columns, integral);
      for (const Face* face = begin; face < end; ++face) {
        const Sum sum = integrated ? look_up(integral, columns, face->rectangle)
                                   : Counter::total(counters + i * pixels, columns, face->rectangle,
                                                    z - block.z_begin);
        add_to_patch<Counter>(sums, face->patch, i * Layer::values, face->ends, sum);
      }
    }
    if (end == last) return;
    for (int64_t y = block.y_begin; y < block.y_end; ++y) {
      for (int64_t i = 0; i < count; ++i) {
        uint64_t* row = counters + i * pixels + (y - block.y_begin) * columns;
        add_row(layers[i], {z, y, 0, columns}, memory.row, row);
      }
    }
  }
}

// Adds the labels of one patch to its sums.
template <class Layer>
void count_patch(const Layer& layer, const Patch& patch, int64_t index, const Workspace& memory, const Sums& sums) {
  typedef Counter<Layer::values> Counter;
  const int64_t columns = patch.end[2] - patch.begin[2];
  if (patch.pixels() == 0) return;
  const int64_t most_lines = max_lines(columns);
  uint64_t* counters = memory.counters;
  int64_t lines = 0;
  const auto flush = [&] {
    const auto total = Counter::total(counters, columns, {0, 1, 0, columns}, lines);
    if (lines > 0) add_to_patch<Counter>(sums, index, 0, true, total);
    for (int64_t x = 0; x < columns; ++x) counters[x] = 0;
    lines = 0;
  };
  flush();
  for (int64_t z = patch.begin[0]; z < patch.end[0]; ++z) {
    for (int64_t y = patch.begin[1]; y < patch.end[1]; ++y) {
      add_row(layer, {z, y, patch.begin[2], columns}, memory.row, counters);
      if (++lines == most_lines) flush();
    }
  }
  flush();
}

}  // namespace CSF_CAPABILITY
