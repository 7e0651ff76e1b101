/* floats.inc.h: all that floats.h lists, compiled once per instruction set. Include after it is chosen (simd.h), then
   define the table with XD_FLOATS. */

#include <math.h>

#include "floats.h"
#include "simd.h"

/* A tile is compiled for each of its sizes and number formats. The slow twin is spared that: it would take a minute. */
#if defined(XD_SIMD_PORTABLE)
#define XD_TILE static
#else
#define XD_TILE XD_INLINE
#endif

#include "floats_rows.inc.h"

#include "floats_dot.inc.h"
#include "floats_rope.inc.h"
#include "floats_attention.inc.h"

#define XD_FLOATS                                                                                                 \
  {.dot = dot,                                                                                                    \
   .norm = norm,                                                                                                  \
   .glu = glu,                                                                                                    \
   .rope_frequencies = rope_frequencies,                                                                          \
   .rope_angles = rope_angles,                                                                                    \
   .rope_rotate = rope_rotate,                                                                                    \
   .attend_open = attend_open,                                                                                    \
   .attend_scores = attend_scores,                                                                                \
   .attend_softmax = attend_softmax,                                                                              \
   .attend_values = attend_values}
