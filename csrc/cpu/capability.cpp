// What the processor and the system can do. Tested by what the kernels of each capability compute.
#include "cpu/capability.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace csf {
namespace {

// Whether the processor multiplies bf16 tiles, and the system lets this process use the tile registers.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned tile = 1u << 24, bf16 = 1u << 22;         // leaf 7, EDX
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (edx & tile) && (edx & bf16) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

Capability supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return has_amx() ? Capability::amx : Capability::avx512;
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
  if (name == "avx512") return Capability::avx512;
  return Capability::amx;
}

}  // namespace

Capability capability() {
  static const Capability chosen = std::min(supported(), requested());
  return chosen;
}

}  // namespace csf
