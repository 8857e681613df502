// Labels as vectors of 64-bit numbers, compiled once for every capability (see capability.h; included by count_kernel.h
// and range_kernel.h).

namespace CSF_CAPABILITY {

typedef Vector<uint64_t> Words;
typedef Vector<int64_t> Integers;
typedef Vector<double> Doubles;

constexpr int64_t kLanes = Simd<uint64_t>::lanes;
constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: behind it, a double has no bits for a fraction

static inline Words first_lanes(int64_t count) {
  Words mask{};
  for (int64_t lane = 0; lane < kLanes; ++lane) mask[lane] = lane < count ? -1 : 0;
  return mask;
}

// Calls use(x, labels[x ...], lanes) for all labels, a vector at a time; `lanes` masks those that there are.
template <class V, class T, class Use>
static inline void for_each_label_vector(const T* labels, int64_t count, Use&& use) {
  int64_t x = 0;
  for (; x + kLanes <= count; x += kLanes) use(x, load_as<V>(labels + x), ~Words{});
  if (x == count) return;
  T rest[kLanes] = {};
  for (int64_t lane = 0; lane < count - x; ++lane) rest[lane] = labels[x + lane];
  use(x, load_as<V>(rest), first_lanes(count - x));
}

}  // namespace CSF_CAPABILITY
