#include "cpu/capability.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace csf {
namespace {

Capability supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Capability::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Capability::avx2;
  }
#endif
  return Capability::baseline;
}

Capability requested() {
  const char* value = std::getenv("CONTRASTSEG_FAST_CPU");
  const std::string_view name = value == nullptr ? "" : value;
  if (name == "baseline") return Capability::baseline;
  if (name == "avx2") return Capability::avx2;
  return Capability::avx512;
}

}  // namespace

Capability capability() {
  static const Capability chosen = std::min(supported(), requested());
  return chosen;
}

}  // namespace csf
