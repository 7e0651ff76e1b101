/* ops.h: what a layer computes besides its products: norm, rotation, activation, attention. Needs kernels.h.

   The three rules of kernels.h hold here as well: same bits, no failure, no errno. A NaN's sign and payload are not
   promised. All is computed in float32 and rounded once, to the result's dtype; MLX's CPU ops round to the inputs'
   dtype in between, so a bfloat16 result differs from theirs by about a unit in its last place.

   Strides count elements, not bytes. The last dimension of every array but a mask is contiguous. Any size may be zero.
   A result may lie where an input lies only if both have the same dtype and strides (norm, rope, glu; not attention). */

/* y[i, :] = x[i, :] * rsqrt(mean(x[i, :]^2) + eps) * weight. `weight` [width] NULL is all ones.
   The sum: lane l of 8 takes k = l, l + 8, ... by fma, ascending; lanes are added as everywhere (simd.h, vf_sum). */
typedef struct {
  const void *x;
  const void *weight;
  void *y;
  int64_t num_rows;
  int64_t x_stride; /* from row to row */
  int64_t y_stride;
  int32_t width;
  int32_t x_dtype;
  int32_t weight_dtype;
  int32_t y_dtype;
  float eps;
} xd_norm;

void xd_norm_run(xd_cpu *cpu, const xd_norm *norm);

/* mx.fast.rope. x and y [batch, heads, tokens, width]; the first `dims` (even) of the width are rotated, the rest is copied.
   The angle of pair i < dims / 2 at token t is (t + offset) * scale * f_i with f_i = base^(-2 i / dims), or 1 / freqs[i]
   if `freqs` is not NULL. Pair i is (i, i + dims / 2), or (2 i, 2 i + 1) if `traditional`.
   `offsets` holds one number per batch entry, offset_stride (0 or 1) apart. t + offset must fit an int32.
   Angles are float64, and sine and cosine right to half a unit of float32 and a bit, up to angles of 1e6 and beyond. */
typedef struct {
  const void *x;
  void *y;
  const float *freqs;
  const int32_t *offsets;
  void *scratch; /* xd_rope_scratch() bytes, aligned to 64 */
  int64_t x_batch_stride, x_head_stride, x_token_stride;
  int64_t y_batch_stride, y_head_stride, y_token_stride;
  int64_t offset_stride;
  int32_t batch, heads, tokens, width;
  int32_t dims;
  int32_t traditional;
  int32_t dtype; /* of x and y */
  float base;
  float scale;
} xd_rope;

size_t xd_rope_scratch(const xd_cpu *cpu, const xd_rope *rope);
void xd_rope_run(xd_cpu *cpu, const xd_rope *rope);

/* y = activation(gate) * up, for rows of `width` numbers; `up` NULL is all ones. */
enum {
  XD_SILU = 0,         /* g / (1 + exp(-g)); first g = min(g, limit), up = clip(up, -limit, limit) (DeepSeek-V4) */
  XD_SWIGLU_OAI = 1,   /* g / (1 + exp(-alpha g)) * (up + 1), clipped as above (gpt-oss: alpha 1.702, limit 7) */
  XD_CLIPPED_SILU = 2, /* min(silu(g), limit), up = clip(up, -limit, limit) (Step-3.5) */
  XD_GELU_TANH = 3,    /* nn.gelu_approx(g); no limit */
  XD_RELU2 = 4         /* max(g, 0)^2; no limit */
};
typedef struct {
  const void *gate;
  const void *up;
  void *y;
  int64_t num_rows;
  int64_t gate_stride, up_stride, y_stride; /* from row to row: halves of one fused product are fine */
  int32_t width;
  int32_t activation;
  int32_t dtype; /* of gate, up and y */
  float alpha;   /* of XD_SWIGLU_OAI alone */
  float limit;   /* INFINITY, or anything not above 0: none */
} xd_glu;

void xd_glu_run(xd_cpu *cpu, const xd_glu *glu);

/* y = softmax(scale * q k^T + mask) v. q [batch, heads, queries, dim], k [batch, kv_heads, keys, dim],
   v [batch, kv_heads, keys, value_dim], y [batch, heads, queries, value_dim]; heads a multiple of kv_heads.

   A key is hidden from a query if the mask says so: false in a boolean mask, or a number at or below the lowest finite one
   of the mask's dtype (so both -inf and finfo.min hide). A hidden key contributes nothing at all, even if its k and v
   are NaN; lanes are counted over visible keys. So a query's bits depend on its own numbers and on the sequence of keys
   it sees: one token at a time, any chunking of a prompt, and a batch with padding agree. A query that sees no key gets
   zeros (MLX: NaN, or the mean of all values if the mask is boolean).

   Orders: scores by 8 lanes over dim; exp(score - max) by 8 lanes over visible keys, then the sink's; the sum over v by
   visible key, ascending, then one division. */
enum {
  XD_MASK_NONE = 0,
  XD_MASK_CAUSAL = 1, /* query i sees keys 0 .. keys - queries + i */
  XD_MASK_BOOL = 2,   /* bytes: 0 hides */
  XD_MASK_ADD = 3     /* numbers of mask_dtype */
};
typedef struct {
  const void *q, *k, *v;
  void *y;
  const void *mask;  /* [batch, heads, queries, keys]; a stride of 0 repeats */
  const void *sinks; /* [heads], of sinks_dtype, or NULL: exp(sink - max) is added to the softmax's sum */
  void *scratch;     /* xd_attention_scratch() bytes, aligned to 64 */
  int64_t q_batch_stride, q_head_stride, q_row_stride;
  int64_t k_batch_stride, k_head_stride, k_row_stride;
  int64_t v_batch_stride, v_head_stride, v_row_stride;
  int64_t y_batch_stride, y_head_stride, y_row_stride;
  int64_t mask_batch_stride, mask_head_stride, mask_row_stride, mask_key_stride;
  int32_t batch, heads, kv_heads, queries, keys, dim, value_dim;
  int32_t dtype; /* of q, k, v and y */
  int32_t mask_kind;
  int32_t mask_dtype;
  int32_t sinks_dtype;
  float scale;
} xd_attention;

size_t xd_attention_scratch(const xd_cpu *cpu, const xd_attention *attention);
void xd_attention_run(xd_cpu *cpu, const xd_attention *attention);
