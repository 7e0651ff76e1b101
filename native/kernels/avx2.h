/* avx2.h: include first where functions are compiled for AVX2, FMA and F16C, whatever the flags of the build, and
   target_end.h after them. */
#ifndef XD_KERNELS_AVX2_H
#define XD_KERNELS_AVX2_H
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#endif
#define XD_SIMD_AVX2
#endif
