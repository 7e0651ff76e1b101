// kernel_ops.cpp: the CPU kernels (kernels/kernels.h and ops.h) as operations of the MLX graph.
//
// Theory of operation. As with the exchange, functions come as integers and this module links to nothing of
// ours. Everything that can be wrong is refused where the graph is built; nothing fails when it is computed. A
// node's constants are a kernel's struct with its pointers still empty: evaluation makes the inputs as dense as the kernel
// needs them, takes memory for the result and for scratch, fills the pointers and strides in and sends the struct to the
// stream's thread. MLX keeps inputs, outputs and the encoder's temporaries until that has run.

#include <algorithm>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "kernel_ops.h"
#include "mlx/utils.h"

namespace xd {

namespace {

// y = x @ w.T, gathered over experts when there are ids. Inputs: x, weight, scales and biases if affine, ids if any.
class Product : public KernelOp {
 public:
  Product(const Kernels& kernels, const xd_product& product, bool gathers)
      : KernelOp(kernels), product_(product), gathers_(gathers) {}

  const char* name() const override {
    return "Product";
  }

 protected:
  void run(const std::vector<mx::array>& in, mx::array& out, Tasks& tasks) override {
    xd_product p = product_;
    const auto pointer = [&](size_t i) { return dense(in[i], tasks).data<void>(); };
    size_t i = 0;
    p.x = pointer(i++);
    p.weight.data = pointer(i++);
    if (p.weight.bits) {
      p.weight.scales = pointer(i++);
      p.weight.biases = pointer(i++);
    }
    if (gathers_) p.ids = static_cast<const uint32_t*>(pointer(i++));
    p.y = out.data<void>();
    p.scratch = tasks.scratch(kernels_.product_scratch(kernels_.cpu, &p));
    dispatch(kernels_.product_run, p, tasks);
  }

 private:
  const xd_product product_;
  const bool gathers_;
};

struct Affine {
  mx::array scales, biases;
  int group_size, bits;
};

// Check a weight [num_out, packed width] or, when gathered over, [num_experts, num_out, packed width].
xd_weight weight_of(const mx::array& weight, const std::optional<Affine>& affine, bool gathers) {
  if (weight.ndim() != (gathers ? 3u : 2u))
    refuse("product: weight is ", weight.shape(), ", wanted ", gathers ? 3 : 2, " axes");
  xd_weight w{};
  w.num_experts = gathers ? weight.shape(0) : 1;
  w.num_out = weight.shape(-2);
  w.width = weight.shape(-1);
  if (!affine) {
    w.dtype = format_of("product: weight", weight);
  } else {
    w.bits = affine->bits;
    w.group_size = affine->group_size;
    if (w.bits != 2 && w.bits != 4 && w.bits != 8) refuse("product: ", w.bits, " bits, wanted 2, 4 or 8");
    if (w.group_size != 32 && w.group_size != 64 && w.group_size != 128)
      refuse("product: groups of ", w.group_size, ", wanted 32, 64 or 128");
    if (weight.dtype() != mx::uint32) refuse("product: packed weight is ", weight.dtype(), ", wanted uint32");
    w.width *= 32 / w.bits;
    w.dtype = format_of("product: scales", affine->scales);
    mx::Shape groups = weight.shape();
    groups.back() = w.width / w.group_size;
    if (w.width % w.group_size || affine->scales.shape() != groups || affine->biases.shape() != groups ||
        affine->biases.dtype() != affine->scales.dtype())
      refuse("product: weight ", weight.shape(), " of ", w.bits, " bits in groups of ", w.group_size, " with scales ",
             affine->scales.shape(), " ", affine->scales.dtype(), " and biases ", affine->biases.shape(), " ",
             affine->biases.dtype());
  }
  if (w.num_experts < 1 || w.num_out < 1 || w.width < 1) refuse("product: weight ", weight.shape(), " is empty");
  return w;
}

int64_t size_of(const mx::Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
}

// Bring x [..., m, width] and ids to rows and ids as xd_product has them, and give its ids_per_row; `shape` becomes that
// of the result but for its last axis. All other forms that mx::gather_mm takes are broadcast here.
int match_ids(mx::array& x, mx::array& ids, mx::Shape& shape) {
  if (ids.dtype() != mx::uint32 && ids.dtype() != mx::int32)
    refuse("product: ids are ", ids.dtype(), ", wanted uint32 or int32");
  if (x.ndim() < 2 || ids.ndim() < 1) refuse("product: x is ", x.shape(), " with ids ", ids.shape());
  const mx::Shape batch(x.shape().begin(), x.shape().end() - 2);
  const auto m = x.shape(-2), width = x.shape(-1);
  shape = mx::broadcast_shapes(batch, ids.shape());
  const int64_t num_ids = size_of(shape), num_rows = size_of(batch), k = shape.back();
  shape.insert(shape.end(), {m, width});
  const bool shared = num_rows < num_ids && (batch.empty() || batch.back() == 1) && num_rows * k == num_ids;
  if (m == 1 && (shared || num_rows == num_ids)) {
    if (static_cast<int64_t>(ids.size()) != num_ids)
      ids = mx::broadcast_to(ids, mx::Shape(shape.begin(), shape.end() - 2));
    return shared ? k : 1;
  }
  x = mx::broadcast_to(x, shape);
  ids = mx::broadcast_to(mx::expand_dims(ids, -1), mx::Shape(shape.begin(), shape.end() - 1));
  return 1;
}

mx::array product(const Kernels& kernels, mx::array x, const mx::array& weight,
                  const std::optional<Affine>& affine, std::optional<mx::array> ids, int activation_bits) {
  xd_product p{};
  p.weight = weight_of(weight, affine, ids.has_value());
  if (activation_bits != 8 && activation_bits != 16)
    refuse("product: activations of ", activation_bits, " bits, wanted 8 or 16");
  p.activation_bits = activation_bits;
  p.x_dtype = format_of("product: x", x);
  p.y_dtype = promote(p.x_dtype, p.weight.dtype);
  p.ids_per_row = 1;
  if (x.ndim() < 1 || x.shape(-1) != p.weight.width)
    refuse("product: x is ", x.shape(), ", wanted rows of ", p.weight.width);
  mx::Shape shape = x.shape();
  if (ids) p.ids_per_row = match_ids(x, *ids, shape);
  shape.back() = p.weight.num_out;
  p.num_rows = x.size() / p.weight.width;
  std::vector<mx::array> inputs = {std::move(x), weight};
  if (affine) inputs.insert(inputs.end(), {affine->scales, affine->biases});
  if (ids) inputs.push_back(std::move(*ids));
  return mx::array(shape, dtype_of(p.y_dtype), std::make_shared<Product>(kernels, p, ids.has_value()),
                   std::move(inputs));
}

mx::array affine_product(const Kernels& kernels, const mx::array& x, const mx::array& weight,
                         const mx::array& scales, const mx::array& biases, std::optional<mx::array> ids,
                         int group_size, int bits, int activation_bits) {
  return product(kernels, x, weight, Affine{scales, biases, group_size, bits}, std::move(ids), activation_bits);
}

mx::array plain_product(const Kernels& kernels, const mx::array& x, const mx::array& weight,
                        std::optional<mx::array> ids) {
  return product(kernels, x, weight, std::nullopt, std::move(ids), 16);
}

// Arrays whose last axis is contiguous, and those whose other axes are besides one sequence of rows.

// Give the rows' address and set the distance between them.
const void* rows_of(const mx::array& a, int64_t& stride, Tasks& tasks) {
  const bool is_contiguous = a.shape(-1) == 1 || a.strides(-1) == 1;
  const auto found = is_contiguous ? row_stride(a, a.shape(-1)) : std::nullopt;
  stride = found.value_or(a.shape(-1));
  return (found ? a : dense(a, tasks)).data<void>();
}

// mx.fast.rms_norm. Inputs: x, weight if any.
class Norm : public KernelOp {
 public:
  Norm(const Kernels& kernels, const xd_norm& norm) : KernelOp(kernels), norm_(norm) {}

  const char* name() const override {
    return "Norm";
  }

 protected:
  void run(const std::vector<mx::array>& in, mx::array& out, Tasks& tasks) override {
    xd_norm n = norm_;
    n.x = rows_of(in[0], n.x_stride, tasks);
    if (in.size() > 1) n.weight = dense(in[1], tasks).data<void>();
    n.y = out.data<void>();
    n.y_stride = n.width;
    n.num_rows = out.size() / n.width;
    dispatch(kernels_.norm_run, n, tasks);
  }

 private:
  const xd_norm norm_;
};

mx::array rms_norm(const Kernels& kernels, const mx::array& x, const std::optional<mx::array>& weight, float eps) {
  if (x.ndim() < 1) refuse("rms_norm: x has no axis");
  if (weight && (weight->ndim() != 1 || weight->shape(0) != x.shape(-1)))
    refuse("rms_norm: x is ", x.shape(), " and weight ", weight->shape());
  xd_norm n{};
  n.eps = eps;
  n.width = x.shape(-1);
  n.x_dtype = format_of("rms_norm: x", x);
  n.weight_dtype = weight ? format_of("rms_norm: weight", *weight) : n.x_dtype;
  n.y_dtype = promote(n.x_dtype, n.weight_dtype);
  std::vector<mx::array> inputs = {x};
  if (weight) inputs.push_back(*weight);
  return mx::array(x.shape(), dtype_of(n.y_dtype), std::make_shared<Norm>(kernels, n), std::move(inputs));
}

// mx.fast.rope. Inputs: x, offsets if they are an array, freqs if any.
class Rope : public KernelOp {
 public:
  Rope(const Kernels& kernels, const xd_rope& rope, std::optional<int32_t> offset, bool has_freqs)
      : KernelOp(kernels), rope_(rope), offset_(offset), has_freqs_(has_freqs) {}

  const char* name() const override {
    return "Rope";
  }

 protected:
  void run(const std::vector<mx::array>& in, mx::array& out, Tasks& tasks) override {
    xd_rope r = rope_;
    r.y = out.data<void>();
    r.y_token_stride = r.width;
    r.y_head_stride = r.y_token_stride * r.tokens;
    r.y_batch_stride = r.y_head_stride * r.heads;
    const bool has_strides = in[0].ndim() <= 4;
    const mx::array x = has_strides ? with_contiguous_rows(in[0], tasks) : dense(in[0], tasks);
    r.x = x.data<void>();
    r.x_token_stride = x.strides(-2);
    r.x_head_stride = has_strides ? x.strides(1) : r.y_head_stride;
    r.x_batch_stride = x.strides(0);
    if (has_freqs_) r.freqs = dense(in.back(), tasks).data<float>();
    if (!offset_) r.offsets = dense(in[1], tasks).data<int32_t>();
    r.scratch = tasks.scratch(kernels_.rope_scratch(kernels_.cpu, &r));
    tasks.add([run = kernels_.rope_run, cpu = kernels_.cpu, r, offset = offset_]() mutable {
      if (offset) r.offsets = &*offset;
      run(cpu, &r);
    });
  }

 private:
  const xd_rope rope_;
  const std::optional<int32_t> offset_;
  const bool has_freqs_;
};

void check_rope(const mx::array& x, int dims, const std::optional<float>& base,
                const std::optional<mx::array>& freqs) {
  if (x.ndim() < 3) refuse("rope: x is ", x.shape(), ", wanted at least 3 axes");
  if (dims < 2 || dims % 2 || dims > x.shape(-1)) refuse("rope: ", dims, " dims of a width of ", x.shape(-1));
  if (base.has_value() == freqs.has_value()) refuse("rope: exactly one of base and freqs must be given");
  if (freqs && freqs->shape() != mx::Shape{dims / 2}) refuse("rope: freqs are ", freqs->shape(), " for ", dims, " dims");
}

mx::array rope(const Kernels& kernels, const mx::array& x, int dims, bool traditional, std::optional<float> base,
               float scale, const std::variant<mx::array, int>& offset, const std::optional<mx::array>& freqs) {
  check_rope(x, dims, base, freqs);
  xd_rope r{};
  r.batch = x.shape(0);
  r.heads = std::accumulate(x.shape().begin() + 1, x.shape().end() - 2, 1, std::multiplies<int>());
  r.tokens = x.shape(-2);
  r.width = x.shape(-1);
  r.dims = dims;
  r.traditional = traditional;
  r.dtype = format_of("rope: x", x);
  r.base = base.value_or(0);
  r.scale = scale;
  std::vector<mx::array> inputs = {x};
  std::optional<int32_t> number;
  if (const auto* offsets = std::get_if<mx::array>(&offset)) {
    if (offsets->size() != 1 && offsets->shape() != mx::Shape{r.batch})
      refuse("rope: offsets are ", offsets->shape(), " for a batch of ", r.batch);
    r.offset_stride = offsets->size() != 1;
    inputs.push_back(mx::astype(*offsets, mx::int32));
  } else {
    number = std::get<int>(offset);
  }
  if (freqs) inputs.push_back(mx::astype(*freqs, mx::float32));
  return mx::array(x.shape(), x.dtype(), std::make_shared<Rope>(kernels, r, number, freqs.has_value()),
                   std::move(inputs));
}

// An activation of a gate, times up. Inputs: gate, up if any.
class Glu : public KernelOp {
 public:
  Glu(const Kernels& kernels, const xd_glu& glu) : KernelOp(kernels), glu_(glu) {}

  const char* name() const override {
    return "Glu";
  }

 protected:
  void run(const std::vector<mx::array>& in, mx::array& out, Tasks& tasks) override {
    xd_glu g = glu_;
    g.gate = rows_of(in[0], g.gate_stride, tasks);
    if (in.size() > 1) g.up = rows_of(in[1], g.up_stride, tasks);
    g.y = out.data<void>();
    g.y_stride = g.width;
    g.num_rows = out.size() / g.width;
    dispatch(kernels_.glu_run, g, tasks);
  }

 private:
  const xd_glu glu_;
};

mx::array glu(const Kernels& kernels, mx::array gate, std::optional<mx::array> up, int activation, float alpha,
              float limit) {
  if (activation < XD_SILU || activation > XD_RELU2) refuse("glu: no activation has number ", activation);
  if (up) {
    const auto shape = mx::broadcast_shapes(gate.shape(), up->shape());
    const auto dtype = mx::result_type(gate, *up);
    gate = mx::broadcast_to(mx::astype(gate, dtype), shape);
    up = mx::broadcast_to(mx::astype(*up, dtype), shape);
  }
  if (gate.ndim() < 1) refuse("glu: gate has no axis");
  xd_glu g{};
  g.width = gate.shape(-1);
  g.activation = activation;
  g.dtype = format_of("glu: gate", gate);
  g.alpha = alpha;
  g.limit = limit;
  const auto shape = gate.shape();
  const auto dtype = gate.dtype();
  std::vector<mx::array> inputs = {std::move(gate)};
  if (up) inputs.push_back(std::move(*up));
  return mx::array(shape, dtype, std::make_shared<Glu>(kernels, g), std::move(inputs));
}

// The experts of a SwitchGLU: y = down(activation(gate(x)) * up(x)), all three gathered over the same ids. Inputs: x, ids, then
// weight, scales and biases of up, gate and down.
//
// Else they are four nodes, and three that change shapes between them; a node costs about 6 us (bench/LOG.md). It calls the same
// functions with the same arguments, so the bits stay.
class Experts : public KernelOp {
 public:
  struct Parts {
    xd_product up, gate;
    xd_glu glu;
    xd_product down;
  };

  Experts(const Kernels& kernels, const Parts& parts) : KernelOp(kernels), parts_(parts) {}

  const char* name() const override {
    return "Experts";
  }

 protected:
  void run(const std::vector<mx::array>& in, mx::array& out, Tasks& tasks) override {
    Parts p = parts_;
    const auto pointer = [&](size_t i) { return dense(in[i], tasks).data<void>(); };
    const void* x = pointer(0);
    const auto* ids = static_cast<const uint32_t*>(pointer(1));
    size_t i = 2, bytes = 0;
    for (xd_product* product : {&p.up, &p.gate, &p.down}) {
      product->weight.data = pointer(i++);
      product->weight.scales = pointer(i++);
      product->weight.biases = pointer(i++);
      product->x = x;
      product->ids = ids;
      bytes = std::max(bytes, kernels_.product_scratch(kernels_.cpu, product));
    }
    const size_t inner_bytes = p.glu.num_rows * p.glu.width * mx::size_of(dtype_of(p.glu.dtype));
    p.up.y = tasks.scratch(inner_bytes);
    p.gate.y = tasks.scratch(inner_bytes);
    p.glu.up = p.up.y, p.glu.gate = p.glu.y = p.gate.y;
    p.down.x = p.glu.y, p.down.y = out.data<void>();
    p.up.scratch = p.gate.scratch = p.down.scratch = tasks.scratch(bytes);  // of one after the other
    tasks.add([product = kernels_.product_run, glu = kernels_.glu_run, cpu = kernels_.cpu, p]() {
      product(cpu, &p.up);
      product(cpu, &p.gate);
      glu(cpu, &p.glu);
      product(cpu, &p.down);
    });
  }

 private:
  const Parts parts_;
};

// weight, scales, biases, group_size, bits
using Projection = std::tuple<mx::array, mx::array, mx::array, int, int>;

xd_product gathered(const Projection& projection, int x_format, int64_t num_rows, int64_t ids_per_row,
                    int activation_bits) {
  const auto& [weight, scales, biases, group_size, bits] = projection;
  xd_product p{};
  p.weight = weight_of(weight, Affine{scales, biases, group_size, bits}, true);
  p.x_dtype = x_format;
  p.y_dtype = promote(x_format, p.weight.dtype);
  p.num_rows = num_rows;
  p.ids_per_row = static_cast<int32_t>(ids_per_row);
  p.activation_bits = activation_bits;
  return p;
}

// x [..., width] and ids, of which each row of x has as many as the others: ids' shape, and `down`'s outputs.
mx::array experts(const Kernels& kernels, const mx::array& x, mx::array ids, const Projection& up,
                  const Projection& gate, const Projection& down, int activation, int activation_bits) {
  if (ids.dtype() != mx::uint32 && ids.dtype() != mx::int32)
    refuse("experts: ids are ", ids.dtype(), ", wanted uint32 or int32");
  if (activation_bits != 8 && activation_bits != 16)
    refuse("experts: activations of ", activation_bits, " bits, wanted 8 or 16");
  if (activation < XD_SILU || activation > XD_RELU2) refuse("experts: no activation has number ", activation);
  const int64_t num_ids = ids.size(), num_rows = x.ndim() ? x.size() / std::max(x.shape(-1), 1) : 0;
  const int64_t ids_per_row = num_rows ? num_ids / num_rows : 0;
  if (ids_per_row * num_rows != num_ids) refuse("experts: x is ", x.shape(), " with ids ", ids.shape());
  Experts::Parts p{};
  const int x_format = format_of("experts: x", x);
  p.up = gathered(up, x_format, num_rows, ids_per_row, activation_bits);
  p.gate = gathered(gate, x_format, num_rows, ids_per_row, activation_bits);
  p.down = gathered(down, p.up.y_dtype, num_ids, 1, activation_bits);
  const xd_weight &u = p.up.weight, &g = p.gate.weight, &d = p.down.weight;
  if (x.shape(-1) != u.width || u.width != g.width || u.num_out != g.num_out || u.num_out != d.width ||
      u.num_experts != g.num_experts || u.num_experts != d.num_experts || p.up.y_dtype != p.gate.y_dtype)
    refuse("experts: x is ", x.shape(), " ", x.dtype(), ", up ", std::get<1>(up).shape(), ", gate ",
           std::get<1>(gate).shape(), " and down ", std::get<1>(down).shape());
  p.glu.num_rows = num_ids;
  p.glu.width = u.num_out;
  p.glu.gate_stride = p.glu.up_stride = p.glu.y_stride = p.glu.width;
  p.glu.activation = activation;
  p.glu.dtype = p.up.y_dtype;
  mx::Shape shape = ids.shape();
  shape.push_back(d.num_out);
  std::vector<mx::array> inputs = {x, std::move(ids)};
  for (const Projection* each : {&up, &gate, &down})
    inputs.insert(inputs.end(), {std::get<0>(*each), std::get<1>(*each), std::get<2>(*each)});
  return mx::array(shape, dtype_of(p.down.y_dtype), std::make_shared<Experts>(kernels, p), std::move(inputs));
}

}  // namespace

void bind_kernels(nb::module_& m) {
  nb::class_<Kernels>(m, "Kernels", "The CPU kernels of an open xd_cpu (native/kernels/kernels.h).")
      .def(nb::init<uintptr_t, const Addresses&>(), nb::arg("cpu"), nb::arg("functions"))
      .def("affine_product", &affine_product, nb::arg("x"), nb::arg("weight"), nb::arg("scales"),
           nb::arg("biases"), nb::arg("ids").none(), nb::arg("group_size"), nb::arg("bits"), nb::arg("activation_bits"),
           "x [..., width] times a packed weight [num_out, width]: [..., num_out]; with ids as mx.gather_qmm.")
      .def("plain_product", &plain_product, nb::arg("x"), nb::arg("weight"), nb::arg("ids").none(),
           "x [..., width] times a weight [num_out, width]: [..., num_out]; with ids as mx.gather_mm.")
      .def("experts", &experts, nb::arg("x"), nb::arg("ids"), nb::arg("up"), nb::arg("gate"), nb::arg("down"),
           nb::arg("activation"), nb::arg("activation_bits"),
           "down(activation(gate(x)) * up(x)) over experts; each of the three is weight, scales, biases, group_size, bits.")
      .def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight").none(), nb::arg("eps"),
           "As mx.fast.rms_norm.")
      .def("rope", &rope, nb::arg("x"), nb::arg("dims"), nb::arg("traditional"), nb::arg("base").none(),
           nb::arg("scale"), nb::arg("offset"), nb::arg("freqs") = nb::none(), "As mx.fast.rope.")
      .def("glu", &glu, nb::arg("gate"), nb::arg("up").none(), nb::arg("activation"),
           nb::arg("alpha") = 0.0f, nb::arg("limit") = 0.0f,
           "activation(gate) * up; activations are numbered in native/kernels/ops.h.")
      .def("attention", &attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("scale"),
           nb::arg("mask") = nb::none(), nb::arg("sinks") = nb::none(), "As mx.fast.scaled_dot_product_attention.")
      .def("append_attention", &append_attention_to, nb::arg("caches"), nb::arg("kind"), nb::arg("q"), nb::arg("k"),
           nb::arg("v"), nb::arg("scale"), nb::arg("sinks") = nb::none(),
           "Append a token to each cache, all of class `kind` and with room, and attend to all; else None.");
}

}  // namespace xd
