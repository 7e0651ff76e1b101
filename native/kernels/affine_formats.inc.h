/* affine_formats.inc.h: `rows` of the file that includes this, once for each format, so that all its loops have known
   lengths; any_rows chooses. 8-bit codes have one for both kinds of activations: their digits are 16 bits wide anyway. */

#define FORMAT(bits, group, digits)                                                                              \
  static void rows_##bits##_##group##_##digits(const xd_affine *a, const uint8_t *c, const void *s, const void *b, \
                                               int n, const xd_row *row, float *y) {                             \
    rows(a, bits, group, digits, c, s, b, n, row, y);                                                            \
  }
#define FORMATS(bits, digits) FORMAT(bits, 32, digits) FORMAT(bits, 64, digits) FORMAT(bits, 128, digits)
FORMATS(2, 0)
FORMATS(2, 1)
FORMATS(4, 0)
FORMATS(4, 1)
FORMATS(8, 0)

typedef void (*rows_function)(const xd_affine *, const uint8_t *, const void *, const void *, int, const xd_row *,
                              float *);
#define NAMES(bits, digits) \
  { rows_##bits##_32_##digits, rows_##bits##_64_##digits, rows_##bits##_128_##digits }

static void any_rows(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                     const xd_row *row, float *y) {
  static const rows_function functions[5][3] = {NAMES(2, 0), NAMES(2, 1), NAMES(4, 0), NAMES(4, 1), NAMES(8, 0)};
  const int format = a->bits == 8 ? 4 : (a->bits == 4 ? 2 : 0) + a->two_digits;
  functions[format][a->group_size == 32 ? 0 : a->group_size == 64 ? 1 : 2](a, codes, scales, biases, num_out, row, y);
}
