/* floats_portable.c: floats.inc.h in plain C: the slow twin, for every processor and for the tests. */
#define XD_SIMD_PORTABLE
#include "floats.inc.h"

const xd_floats xd_floats_portable = XD_FLOATS;
