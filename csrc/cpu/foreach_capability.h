// Includes CSF_KERNEL, and simd.h before it, once for every capability; see capability.h.

#if defined(__x86_64__)

#define CSF_CAPABILITY avx512
#define CSF_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include "cpu/simd.h"
#include CSF_KERNEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef CSF_VECTOR_BYTES
#undef CSF_CAPABILITY

#define CSF_CAPABILITY avx2
#define CSF_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "cpu/simd.h"
#include CSF_KERNEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef CSF_VECTOR_BYTES
#undef CSF_CAPABILITY

#endif

#define CSF_CAPABILITY baseline
#define CSF_VECTOR_BYTES 16
#include "cpu/simd.h"
#include CSF_KERNEL
#undef CSF_VECTOR_BYTES
#undef CSF_CAPABILITY
