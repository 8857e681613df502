// Checking labels, compiled once for every capability (see capability.h; included by labels_in_range.cpp). Tested by
// tests/test_foreground_ratio.py, once for each capability.

#include "cpu/foreground_ratio/label_vectors_kernel.h"

namespace CSF_CAPABILITY {

// Whether all labels are in [0, highest], and integers if `integral`; or are equal to ignore_index.
template <class T>
bool in_range(const T* labels, int64_t count, int64_t highest, bool integral, int64_t ignore_index) {
  Words wrong{};
  if constexpr (std::is_floating_point_v<T>) {
    const double top = highest, ignored = ignore_index;
    const double round = integral ? kRound : 0;
    for_each_label_vector<Doubles>(labels, count, [&](int64_t, Doubles label, Words lanes) {
      const auto right =
          ((label >= 0) & (label <= top) & ((label + round) - round == label)) | (label == ignored);
      wrong |= ~reinterpret_cast<Words>(right) & lanes;
    });
  } else {
    const uint64_t top = highest;
    for_each_label_vector<Integers>(labels, count, [&](int64_t, Integers label, Words lanes) {
      const auto right = (reinterpret_cast<Words>(label) <= top) | (label == ignore_index);
      wrong |= ~reinterpret_cast<Words>(right) & lanes;
    });
  }
  uint64_t any = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) any |= wrong[lane];
  return any == 0;
}

}  // namespace CSF_CAPABILITY
