// attention_ops.cpp: attention as an operation of the MLX graph, of one sequence or of several at once.

#include "kernel_ops.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace xd {

namespace {

// mx.fast.scaled_dot_product_attention. Inputs: q, k, v, mask if it is an array, sinks if any.
class Attention : public KernelOp {
 public:
  Attention(const Kernels& kernels, const xd_attention& attention, bool has_sinks)
      : KernelOp(kernels), attention_(attention), has_sinks_(has_sinks) {}

  const char* name() const override {
    return "Attention";
  }

 protected:
  // The result lies as [batch, queries, heads, value_dim], as the product that reads it wants it.
  void allocate(mx::array& out, const Tasks& tasks) override {
    const int64_t heads = out.shape(1), queries = out.shape(2), dim = out.shape(3);
    const mx::Strides strides = {heads * queries * dim, dim, heads * dim, 1};
    const auto [size, rows, columns] = mx::check_contiguity(out.shape(), strides);
    tasks.allocate(out, size, strides, {true, rows, columns});
  }

  void run(const std::vector<mx::array>& in, mx::array& out, Tasks& tasks) override {
    xd_attention a = attention_;
    a.q = view(in[0], a.q_batch_stride, a.q_head_stride, a.q_row_stride, tasks);
    a.k = view(in[1], a.k_batch_stride, a.k_head_stride, a.k_row_stride, tasks);
    a.v = view(in[2], a.v_batch_stride, a.v_head_stride, a.v_row_stride, tasks);
    a.y = view(out, a.y_batch_stride, a.y_head_stride, a.y_row_stride, tasks);
    if (a.mask_kind == XD_MASK_BOOL || a.mask_kind == XD_MASK_ADD) take_mask(in[3], a);
    if (has_sinks_) a.sinks = dense(in.back(), tasks).data<void>();
    a.scratch = tasks.scratch(kernels_.attention_scratch(kernels_.cpu, &a));
    dispatch(kernels_.attention_run, a, tasks);
  }

 private:
  static void* view(const mx::array& a, int64_t& batch, int64_t& head, int64_t& row,
                    Tasks& tasks) {
    mx::array rows = with_contiguous_rows(a, tasks);
    batch = rows.strides(0);
    head = rows.strides(1);
    row = rows.strides(2);
    return rows.data<void>();
  }

  static void take_mask(const mx::array& mask, xd_attention& a) {
    int64_t* const strides[] = {&a.mask_key_stride, &a.mask_row_stride, &a.mask_head_stride, &a.mask_batch_stride};
    for (int i = 0; i < static_cast<int>(mask.ndim()); i++)
      *strides[i] = mask.shape(-1 - i) == 1 ? 0 : mask.strides(-1 - i);
    a.mask = mask.data<void>();
  }

  const xd_attention attention_;
  const bool has_sinks_;
};

xd_attention attention_of(const mx::array& q, const mx::array& k, const mx::array& v, float scale) {
  if (q.ndim() != 4 || k.ndim() != 4 || v.ndim() != 4 || k.shape(0) != q.shape(0) || v.shape(0) != q.shape(0) ||
      k.shape(1) < 1 || q.shape(1) % k.shape(1) || v.shape(1) != k.shape(1) || v.shape(2) != k.shape(2) ||
      k.shape(3) != q.shape(3))
    refuse("attention: q is ", q.shape(), ", k ", k.shape(), " and v ", v.shape());
  xd_attention a{};
  a.batch = q.shape(0);
  a.heads = q.shape(1);
  a.kv_heads = k.shape(1);
  a.queries = q.shape(2);
  a.keys = k.shape(2);
  a.dim = q.shape(3);
  a.value_dim = v.shape(3);
  a.scale = scale;
  a.dtype = promote(format_of("attention: q", q), promote(format_of("attention: k", k), format_of("attention: v", v)));
  return a;
}

void check_mask(const mx::array& mask, xd_attention& a) {
  const mx::Shape full = {a.batch, a.heads, a.queries, a.keys};
  if (mask.ndim() > 4 || mx::broadcast_shapes(mask.shape(), full) != full)
    refuse("attention: mask is ", mask.shape(), " for scores ", full);
  a.mask_kind = mask.dtype() == mx::bool_ ? XD_MASK_BOOL : XD_MASK_ADD;
  if (a.mask_kind == XD_MASK_ADD) a.mask_dtype = format_of("attention: mask", mask);
}

// Inputs: q, k, v, each sequence's keys, each one's values, sinks if any. Outputs: y, keys, values.
//
// A decode step of 16 sequences had nine nodes for each of them and layer (slices, MLX's updates, attention), at 5 to
// 10 us each, more than the products took; this is one for all. As MLX's own update, it writes into memory that nobody
// else looks at, and else into a copy.
class AppendAttention : public mx::Primitive {
 public:
  AppendAttention(const Kernels& kernels, const xd_attention& attention, std::vector<int> lengths, bool has_sinks)
      : mx::Primitive(mx::default_stream(mx::Device::cpu)),
        kernels_(kernels),
        attention_(attention),
        lengths_(std::move(lengths)),
        has_sinks_(has_sinks) {}

  const char* name() const override {
    return "AppendAttention";
  }

  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    let_go(in, out);
    Tasks tasks(stream());
    const size_t n = lengths_.size();
    const mx::array q = dense(in[0], tasks), k = dense(in[1], tasks), v = dense(in[2], tasks);
    out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
    std::vector<xd_attention> each(n, attention_);
    std::vector<Row> rows;
    size_t scratch_bytes = 0;
    for (size_t i = 0; i < n; i++) {
      xd_attention& a = each[i];
      a.keys = lengths_[i] + 1;
      a.k = append(k, i, in[3 + i], out[1 + i], a.k_batch_stride, a.k_head_stride, a.k_row_stride, rows, tasks);
      a.v = append(v, i, in[3 + n + i], out[1 + n + i], a.v_batch_stride, a.v_head_stride, a.v_row_stride, rows,
                   tasks);
      a.q = q.data<char>() + i * q.strides(0) * q.itemsize();
      a.y = out[0].data<char>() + i * out[0].strides(0) * out[0].itemsize();
      a.q_batch_stride = q.strides(0), a.q_head_stride = q.strides(1), a.q_row_stride = q.strides(2);
      a.y_batch_stride = out[0].strides(0), a.y_head_stride = out[0].strides(1), a.y_row_stride = out[0].strides(2);
      if (has_sinks_) a.sinks = dense(in.back(), tasks).data<void>();
      scratch_bytes = std::max(scratch_bytes, kernels_.attention_scratch(kernels_.cpu, &a));
    }
    void* memory = tasks.scratch(scratch_bytes);  // of one after the other
    for (xd_attention& a : each) a.scratch = memory;
    tasks.add([run = kernels_.attention_run, cpu = kernels_.cpu, each = std::move(each), rows = std::move(rows)]() {
      for (const Row& row : rows) row.write();
      for (const xd_attention& a : each) run(cpu, &a);
    });
    tasks.send();
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("AppendAttention: runs on a CPU stream only");
  }

 private:
  // Each output holds the inputs. Take them from all but the one that is evaluated, as MLX does right after the
  // evaluation: nothing could be donated that others hold.
  static void let_go(const std::vector<mx::array>& in, std::vector<mx::array>& out) {
    for (mx::array& each : out)
      if (&each.inputs() != &in && !each.is_tracer()) each.inputs().clear();
  }

  // A token's key, or value: one row of `bytes` for each head.
  struct Row {
    const char* from;
    char* to;
    int heads;
    int64_t bytes, to_stride;

    void write() const {
      for (int head = 0; head < heads; head++) std::memcpy(to + head * to_stride, from + head * bytes, bytes);
    }
  };

  // Make `out` of `old` [1, heads, room, dim], with row `i` of `added` at its place; gives its data.
  void* append(const mx::array& added, size_t i, const mx::array& old, mx::array& out, int64_t& batch_stride,
               int64_t& head_stride, int64_t& row_stride, std::vector<Row>& rows, Tasks& tasks) const {
    if (old.flags().row_contiguous && old.is_donatable()) {
      out.copy_shared_buffer(old);
    } else {
      const mx::array from = dense(old, tasks);
      out.set_data(mx::allocator::malloc(out.nbytes()));
      tasks.add([from = from.data<char>(), to = out.data<char>(), bytes = out.nbytes()]() {
        std::memcpy(to, from, bytes);
      });
    }
    const int64_t room = out.shape(2), dim = out.shape(3), bytes = dim * out.itemsize();
    const int heads = out.shape(1);
    batch_stride = heads * room * dim, head_stride = room * dim, row_stride = dim;
    rows.push_back({added.data<char>() + i * heads * bytes, out.data<char>() + lengths_[i] * bytes, heads, bytes,
                    room * bytes});
    return out.data<void>();
  }

  const Kernels kernels_;
  const xd_attention attention_;
  const std::vector<int> lengths_;
  const bool has_sinks_;
};

void check_room(const char* what, const mx::array& added, const mx::array& old, int length) {
  if (old.ndim() != 4 || old.shape(0) != 1 || old.shape(1) != added.shape(1) || old.shape(3) != added.shape(3) ||
      old.dtype() != added.dtype() || length < 0 || length >= old.shape(2))
    refuse("append_attention: ", what, " are ", old.shape(), " ", old.dtype(), " with ", length, " tokens, for ",
           added.shape(), " ", added.dtype());
}

}  // namespace

mx::array attention(const Kernels& kernels, const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                    const std::variant<std::monostate, std::string, mx::array>& mask,
                    const std::optional<mx::array>& sinks) {
  xd_attention a = attention_of(q, k, v, scale);
  const auto dtype = dtype_of(a.dtype);
  std::vector<mx::array> inputs = {mx::astype(q, dtype), mx::astype(k, dtype), mx::astype(v, dtype)};
  if (const auto* array = std::get_if<mx::array>(&mask)) {
    check_mask(*array, a);
    inputs.push_back(*array);
  } else if (const auto* kind = std::get_if<std::string>(&mask)) {
    if (*kind != "causal") refuse("attention: mask is \"", *kind, "\", wanted \"causal\" or an array");
    a.mask_kind = XD_MASK_CAUSAL;
  }
  if (sinks) {
    if (sinks->shape() != mx::Shape{a.heads}) refuse("attention: sinks are ", sinks->shape(), " for ", a.heads, " heads");
    a.sinks_dtype = format_of("attention: sinks", *sinks);
    inputs.push_back(*sinks);
  }
  return mx::array({a.batch, a.heads, a.queries, a.value_dim}, dtype,
                   std::make_shared<Attention>(kernels, a, sinks.has_value()), std::move(inputs));
}

std::vector<mx::array> append_attention(const Kernels& kernels, const mx::array& q, const mx::array& k,
                                        const mx::array& v, const std::vector<mx::array>& keys,
                                        const std::vector<mx::array>& values, const std::vector<int>& lengths,
                                        float scale, const std::optional<mx::array>& sinks) {
  xd_attention a = attention_of(q, k, v, scale);
  const size_t n = lengths.size();
  if (static_cast<size_t>(a.batch) != n || keys.size() != n || values.size() != n || n == 0 || a.queries != 1 ||
      a.keys != 1 || k.dtype() != q.dtype() || v.dtype() != q.dtype())
    refuse("append_attention: q is ", q.shape(), " ", q.dtype(), ", k ", k.shape(), " ", k.dtype(), " and v ", v.shape(),
           " ", v.dtype(), " for ", keys.size(), " sequences");
  a.batch = 1;
  std::vector<mx::array> inputs = {q, k, v};
  std::vector<mx::Shape> shapes = {{q.shape(0), a.heads, 1, a.value_dim}};
  for (size_t i = 0; i < n; i++) check_room("keys", k, keys[i], lengths[i]);
  for (size_t i = 0; i < n; i++) check_room("values", v, values[i], lengths[i]);
  for (const auto* arrays : {&keys, &values})
    for (const mx::array& array : *arrays) {
      inputs.push_back(array);
      shapes.push_back(array.shape());
    }
  if (sinks) {
    if (sinks->shape() != mx::Shape{a.heads}) refuse("attention: sinks are ", sinks->shape(), " for ", a.heads, " heads");
    a.sinks_dtype = format_of("attention: sinks", *sinks);
    inputs.push_back(*sinks);
  }
  return mx::array::make_arrays(std::move(shapes), std::vector<mx::Dtype>(1 + 2 * n, q.dtype()),
                                std::make_shared<AppendAttention>(kernels, a, lengths, sinks.has_value()),
                                std::move(inputs));
}

}  // namespace xd
