// Vector code chosen at run time: one binary holds every kernel for each capability the compiler can target.
//
// A kernel header (*_kernel.h) has no include guard and puts its code into `namespace CSF_CAPABILITY`, where it finds
// simd.h, with vectors of CSF_VECTOR_BYTES bytes. A source file compiles it for every capability and picks one at run
// time:
//
//     #define CSF_KERNEL "cpu/my_kernel.h"
//     #include "cpu/foreach_capability.h"
//     CSF_DISPATCH(my_kernel)(arguments...);
//
// Standard headers must be included before, by the source file, so that they are compiled for the baseline. Tests lower
// the capability by CONTRASTSEG_FAST_CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Whether the compiler knows AMX.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define CSF_AMX
#endif

namespace csf {

// `amx` stands for the kernels of avx512, and for AMX products where an operator has them.
enum class Capability { baseline, avx2, avx512, amx };

// The best capability of this machine. CONTRASTSEG_FAST_CPU=baseline|avx2|avx512|amx lowers it, read once.
Capability capability();

template <class Function>
Function select(Function avx512, Function avx2, Function baseline) {
  switch (capability()) {
    case Capability::amx:
    case Capability::avx512: return avx512;
    case Capability::avx2: return avx2;
    default: return baseline;
  }
}

}  // namespace csf

#if defined(__x86_64__)
#define CSF_DISPATCH(...) csf::select(&avx512::__VA_ARGS__, &avx2::__VA_ARGS__, &baseline::__VA_ARGS__)
#else
#define CSF_DISPATCH(...) (&baseline::__VA_ARGS__)
#endif
