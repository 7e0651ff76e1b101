#include "private.h"
const xd_isa *xd_isa_avx512(void) { return NULL; }
