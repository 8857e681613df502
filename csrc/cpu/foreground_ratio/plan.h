// What the kernels of the foreground ratios work on. Tested by tests/test_foreground_ratio.py.
//
// An image is seen as planes of rows of columns (z, y, x), its axes in the order of their strides, so that
// columns are the nearest in memory; a 2D image has planes of one row. A plane of 64-bit counters adds up the
// labels along z: each counter holds either the counts of four classes, 16 bits each (ClassLayer), or the sum
// of one channel of soft labels, in fixed point (ChannelLayer). All sums are of integers, so that their order
// does not matter.
#pragma once

#include <cstdint>

namespace csf::foreground_ratio {

constexpr int64_t kReach = 8;  // counters that may be read behind the last

// Labels that one counter may add up: 16 bits hold their counts, 32 bits those of a rectangle of `pixels`.
constexpr int64_t max_lines(int64_t pixels) {
  const int64_t lines = (int64_t(1) << 32) / pixels - 1;
  return lines < 1 ? 1 : lines < 32768 ? lines : 32768;
}

// `columns` pixels from (z, y, x) on.
struct Row {
  int64_t z, y, x;
  int64_t columns;
};

template <class T>
struct Labels {
  const T* data;
  int64_t stride[3];

  const T* at(const Row& row) const {
    return data + row.z * stride[0] + row.y * stride[1] + row.x * stride[2];
  }
};

// Counts the classes from first_class to first_class + 3 that are below num_classes.
template <class T>
struct ClassLayer {
  static constexpr int64_t values = 4;
  Labels<T> labels;
  int64_t first_class;
  int64_t num_classes;
  bool separates_ignored;  // ignore_index is no class: its pixels are counted as class num_classes
  int64_t ignore_index;
};

// Adds up the integers nearest to label * scale, a power of two.
template <class T>
struct ChannelLayer {
  static constexpr int64_t values = 1;
  Labels<T> labels;
  Labels<uint8_t> ignored;  // nonzero where a pixel does not count; without data if all do
  double scale;
};

// What one sweep reads: rows [y_begin, y_end), all columns, of planes [z_begin, z_end).
struct Block {
  int64_t z_begin, z_end;
  int64_t y_begin, y_end;
  int64_t columns;
};

struct Rectangle {
  int64_t row, rows;
  int64_t column, columns;
};

// A patch begins or ends before a plane: its rectangle's sum of counters leaves or enters the sums of the patch.
struct Face {
  int64_t patch;
  Rectangle rectangle;
  bool ends;
};

// The faces before plane z of a block are faces[first[z - z_begin]] to faces[first[z - z_begin + 1] - 1].
struct Faces {
  const Face* faces;
  const int64_t* first;
};

// The part of a patch that lies inside the image.
struct Patch {
  int64_t begin[3], end[3];

  int64_t pixels() const {
    int64_t product = 1;
    for (int i = 0; i < 3; ++i) product *= end[i] > begin[i] ? end[i] - begin[i] : 0;
    return product;
  }
};

// Memory of a thread, for a block of rows and columns (for a patch: of one row and one layer).
struct Workspace {
  uint64_t* counters;  // [layers][rows][columns], and kReach more
  void* integral;      // [rows + 1][columns + 1] entries of 16 bytes
  void* row;           // [columns] labels
};

// The sums of an image's patches, modulo 2^64; those of patch n begin at data[n * stride].
struct Sums {
  uint64_t* data;
  int64_t stride;
  bool shared;  // with other threads
};

}  // namespace csf::foreground_ratio
