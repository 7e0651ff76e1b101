/* target_end.h: ends what avx2.h, avx512.h or neon.h began. Clang refuses a file that leaves it open. */
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
