/* cpu.c: which instruction set runs here, and the pair of it and the threads that every call takes. */

#include <stdio.h>
#include <stdlib.h>

#include "private.h"

/* Best first. */
static const xd_isa *(*const ISAS[])(void) = {xd_isa_avx512, xd_isa_avx2, xd_isa_neon_i8mm, xd_isa_neon,
                                                xd_isa_portable};
enum { NUM_ISAS = sizeof ISAS / sizeof *ISAS };

static const xd_isa *find(const char *name) {
  for (int i = 0; i < NUM_ISAS; i++) {
    const xd_isa *isa = ISAS[i]();
    if (isa && (!*name || strcmp(isa->name, name) == 0)) return isa;
  }
  return NULL;
}

const char *xd_cpu_isas(void) {
  static char names[64]; /* written alike by every caller */
  char all[sizeof names] = "";
  for (int i = 0; i < NUM_ISAS; i++) {
    const xd_isa *isa = ISAS[i]();
    size_t used = strlen(all);
    if (isa) snprintf(all + used, sizeof all - used, "%s%s", used ? " " : "", isa->name);
  }
  memcpy(names, all, sizeof names);
  return names;
}

int xd_cpu_open(xd_cpu **cpu, const char *isa, int num_threads, char *err, size_t err_bytes) {
  *cpu = NULL;
  const xd_isa *found = find(isa);
  if (!found) {
    snprintf(err, err_bytes, "instruction set %s: this processor has %s", isa, xd_cpu_isas());
    return -1;
  }
  xd_pool *pool = xd_pool_open(num_threads, err, err_bytes);
  if (!pool) return -1;
  *cpu = malloc(sizeof **cpu);
  if (!*cpu) {
    snprintf(err, err_bytes, "no memory");
    xd_pool_close(pool);
    return -1;
  }
  **cpu = (xd_cpu){.isa = found, .pool = pool};
  return 0;
}

void xd_cpu_close(xd_cpu *cpu) {
  if (!cpu) return;
  xd_pool_close(cpu->pool);
  free(cpu);
}

const char *xd_cpu_isa(const xd_cpu *cpu) {
  return cpu->isa->name;
}

int xd_cpu_num_threads(const xd_cpu *cpu) {
  return xd_pool_num_threads(cpu->pool);
}
