// Includes CSF_KERNEL with the instructions of avx512 and AMX, where the compiler knows them. Its code goes into
// `namespace amx`, and may use that of `namespace avx512`. The source file includes <immintrin.h> before.

#if defined(CSF_AMX)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16")
#endif
#include CSF_KERNEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
