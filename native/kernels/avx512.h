/* avx512.h: include first where functions are compiled for AVX-512 (F, BW, DQ, VL, VNNI), whatever the flags of the build,
   and target_end.h after them. With XD_SIMDE the instructions are emulated: the tests run them where they do not exist. */
#ifndef XD_KERNELS_AVX512_H
#define XD_KERNELS_AVX512_H
#if defined(XD_SIMDE)
#include "avx2.h"
#include "avx512_emulated.h"
#elif defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include <immintrin.h>
#endif
#define XD_SIMD_AVX2
#endif
