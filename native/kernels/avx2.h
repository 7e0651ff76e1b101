/* avx2.h: include first in a file whose functions are compiled for AVX2, FMA and F16C, whatever the flags of the build.

   GCC takes the pragma for all that follows, clang the attribute; both end with the file. */
#ifndef XD_KERNELS_AVX2_H
#define XD_KERNELS_AVX2_H
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#endif
#define XD_SIMD_AVX2
#endif
