// Memory for packed layouts. Tested by tests/test_pdcr.py, through PDCR.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace csf {

constexpr int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

constexpr int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

// Elements that begin where a vector may begin, in huge pages where there are many and Linux offers such pages.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) {
    const size_t bytes = round_up(std::max<int64_t>(size, 1) * sizeof(T), kAlignment);
    const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
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
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kHugePage = size_t(1) << 21;
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T[], Free> data_;
};

}  // namespace csf
