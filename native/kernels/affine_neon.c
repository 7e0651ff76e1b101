/* affine_neon.c: affine products with NEON's dot product: arm64 from 2018 on, every Apple silicon. */
#if defined(__aarch64__)

#include "affine_neon.inc.h"
#include "affine_formats.inc.h"
#include "target_end.h"
#include "floats.h"

#if defined(__APPLE__)
static int is_able(void) {
  return 1;
}
#else
#include <sys/auxv.h>
static int is_able(void) {
  return (getauxval(AT_HWCAP) & 1ul << 20) != 0; /* HWCAP_ASIMDDP */
}
#endif

const xd_isa *xd_isa_neon(void) {
  static const xd_isa isa = {.name = "neon", .parts = 1,
                             .floats = &xd_floats_neon,
                             .round_row = round_row,
                             .affine_rows = any_rows,
                             .affine_pack = pack,
                             .affine_tile = tile};
  return is_able() ? &isa : NULL;
}

#else
#include "private.h"
const xd_isa *xd_isa_neon(void) {
  return NULL;
}
#endif
