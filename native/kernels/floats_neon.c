/* floats_neon.c: floats.inc.h with NEON, which every arm64 has. */
#if defined(__aarch64__)
#include "floats.inc.h"

const xd_floats xd_floats_neon = XD_FLOATS;
#else
typedef int xd_nothing_here;
#endif
