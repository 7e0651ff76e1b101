#include "private.h"
const xd_isa *xd_isa_neon(void) { return NULL; }
