/* affine_neon_i8mm.c: affine products with NEON's matrix product of int8: Apple M2, Neoverse V1 and N2, and later. */
#if defined(__aarch64__)

#define XD_I8MM
#include "affine_neon.inc.h"
#include "affine_formats.inc.h"
#include "target_end.h"
#include "floats.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
static int is_able(void) {
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, NULL, 0) == 0 && has;
}
#else
#include <sys/auxv.h>
static int is_able(void) {
  return (getauxval(AT_HWCAP) & 1ul << 20) != 0 && (getauxval(AT_HWCAP2) & 1ul << 13) != 0; /* ASIMDDP, I8MM */
}
#endif

const xd_isa *xd_isa_neon_i8mm(void) {
  static const xd_isa isa = {.name = "neon-i8mm", .parts = 1,
                             .floats = &xd_floats_neon,
                             .round_row = round_row,
                             .affine_rows = any_rows,
                             .affine_pack = pack,
                             .affine_tile = tile};
  return is_able() ? &isa : NULL;
}

#else
#include "private.h"
const xd_isa *xd_isa_neon_i8mm(void) {
  return NULL;
}
#endif
