/* neon.h: include first where functions are compiled for NEON with dot product, whatever the flags of the build, and
   target_end.h after them; define XD_I8MM before it for matrix products of int8 as well. */
#ifndef XD_KERNELS_NEON_H
#define XD_KERNELS_NEON_H
#if defined(__clang__)
#include <arm_neon.h>
#if defined(XD_I8MM)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#endif
#else
#pragma GCC push_options
#if defined(XD_I8MM)
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>
#endif
#endif
