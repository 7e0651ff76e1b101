// kernel_ops.cpp: the CPU kernels (kernels/kernels.h) as operations of the MLX graph.
//
// Theory of operation. As with the exchange, functions come as integers and this module links to nothing of
// ours. Everything that can be wrong is refused where the graph is built; nothing fails when it is computed. A
// node's constants are a kernel's struct with its pointers still empty: evaluation makes the inputs dense, takes memory
// for the result and for scratch, fills the pointers in and sends the struct to the stream's thread. MLX keeps
// inputs, outputs and the encoder's temporaries until that has run.

#include <cstdint>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "graph.h"
#include "mlx/allocator.h"
#include "mlx/utils.h"

extern "C" {
#include "kernels/kernels.h"
}

namespace xd {

namespace {

using Addresses = std::map<std::string, uintptr_t>;

// The functions of a xd_cpu; `cpu` must live until the last graph has run.
struct Kernels {
  xd_cpu* cpu;
  decltype(&xd_product_scratch) product_scratch;
  decltype(&xd_product_run) product_run;

  Kernels(uintptr_t address, const Addresses& functions)
      : cpu(reinterpret_cast<xd_cpu*>(address)) {
    take(product_scratch, functions, "xd_product_scratch");
    take(product_run, functions, "xd_product_run");
  }

 private:
  template <typename F>
  static void take(F& function, const Addresses& functions, const char* name) {
    function = reinterpret_cast<F>(functions.at(name));
  }
};

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

int format_of(const char* what, const mx::array& a) {
  if (a.dtype() == mx::float32) return XD_FLOAT32;
  if (a.dtype() == mx::float16) return XD_FLOAT16;
  if (a.dtype() == mx::bfloat16) return XD_BFLOAT16;
  refuse(what, " is ", a.dtype(), ", wanted float32, float16 or bfloat16");
}

mx::Dtype dtype_of(int format) {
  return format == XD_FLOAT32 ? mx::float32 : format == XD_FLOAT16 ? mx::float16 : mx::bfloat16;
}

int promote(int a, int b) {
  return a == b ? a : XD_FLOAT32;
}

mx::Stream cpu_stream() {
  return mx::default_stream(mx::Device::cpu);
}

// An operation that a kernel computes on the CPU; its inputs come dense, its outputs have their memory.
class KernelOp : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    for (auto& out : outputs) out.set_data(mx::allocator::malloc(out.nbytes()));
    if (outputs[0].size() == 0) return;
    auto& encoder = mx::cpu::get_command_encoder(stream());
    run(inputs, outputs, encoder);
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string(name()) + ": runs on a CPU stream only");
  }

 protected:
  virtual void run(const std::vector<mx::array>& in, std::vector<mx::array>& out,
                   mx::cpu::CommandEncoder& encoder) = 0;
};

// y = x @ w.T, gathered over experts when there are ids. Inputs: x, weight, scales and biases if affine, ids if any.
class Product : public KernelOp {
 public:
  Product(const Kernels& kernels, const xd_product& product, bool gathers)
      : KernelOp(cpu_stream()), kernels_(kernels), product_(product), gathers_(gathers) {}

  const char* name() const override {
    return "Product";
  }

 protected:
  void run(const std::vector<mx::array>& in, std::vector<mx::array>& out,
           mx::cpu::CommandEncoder& encoder) override {
    xd_product p = product_;
    const auto pointer = [&](size_t i) { return dense(in[i], encoder).data<void>(); };
    size_t i = 0;
    p.x = pointer(i++);
    p.weight.data = pointer(i++);
    if (p.weight.bits) {
      p.weight.scales = pointer(i++);
      p.weight.biases = pointer(i++);
    }
    if (gathers_) p.ids = static_cast<const uint32_t*>(pointer(i++));
    p.y = out[0].data<void>();
    p.scratch = scratch(kernels_.product_scratch(kernels_.cpu, &p), encoder);
    encoder.dispatch([run = kernels_.product_run, cpu = kernels_.cpu, p]() { run(cpu, &p); });
  }

 private:
  Kernels kernels_;
  xd_product product_;
  bool gathers_;
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
  if (m == 1 && static_cast<int64_t>(ids.size()) == num_ids) {
    if (num_rows == num_ids) return 1;
    if ((batch.empty() || batch.back() == 1) && num_rows * k == num_ids) return k;
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

}  // namespace

void bind_kernels(nb::module_& m) {
  nb::class_<Kernels>(m, "Kernels", "The CPU kernels of an open xd_cpu (native/kernels/kernels.h).")
      .def(nb::init<uintptr_t, const Addresses&>(), nb::arg("cpu"), nb::arg("functions"))
      .def("affine_product", &affine_product, nb::arg("x"), nb::arg("weight"), nb::arg("scales"),
           nb::arg("biases"), nb::arg("ids").none(), nb::arg("group_size"), nb::arg("bits"), nb::arg("activation_bits"),
           "x [..., width] times a packed weight [num_out, width]: [..., num_out]; with ids as mx.gather_qmm.")
      .def("plain_product", &plain_product, nb::arg("x"), nb::arg("weight"), nb::arg("ids").none(),
           "x [..., width] times a weight [num_out, width]: [..., num_out]; with ids as mx.gather_mm.");
}

}  // namespace xd
