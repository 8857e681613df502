// Vector code chosen at run time: one binary holds every kernel for each capability the compiler can target.
//
// A kernel header has no include guard and puts its code into `namespace CSF_CAPABILITY`, with vectors of
// CSF_VECTOR_BYTES bytes. The op's source file compiles it for every capability and picks one at run time:
//
//     #define CSF_KERNEL "cpu/my_kernel.h"
//     #include "cpu/foreach_capability.h"
//     CSF_DISPATCH(my_kernel)(arguments...);
//
// Standard headers must be included before, by the op's source file, so that they are compiled for the baseline.
#pragma once

namespace csf {

// `amx` stands for the kernels of avx512, and for AMX products where an op has them.
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
