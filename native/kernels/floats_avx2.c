/* floats_avx2.c: floats.inc.h with AVX2; AVX-512 takes it as well, since all of its sums have eight lanes. */
#if defined(__x86_64__)
#include "avx2.h"

#include "floats.inc.h"

#include "target_end.h"

const xd_floats xd_floats_avx2 = XD_FLOATS;
#else
typedef int xd_nothing_here;
#endif
