// kernel_ops.h: what the operations that CPU kernels compute have in common (kernel_ops.cpp says how they work).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "graph.h"
#include "mlx/allocator.h"
#include "mlx/backend/common/utils.h"

extern "C" {
#include "kernels/kernels.h"
#include "kernels/ops.h"
}

namespace xd {

using Addresses = std::map<std::string, uintptr_t>;

// The functions of a xd_cpu; `cpu` must live until the last graph has run.
struct Kernels {
  xd_cpu* cpu;
  decltype(&xd_product_scratch) product_scratch;
  decltype(&xd_product_run) product_run;
  decltype(&xd_norm_run) norm_run;
  decltype(&xd_rope_scratch) rope_scratch;
  decltype(&xd_rope_run) rope_run;
  decltype(&xd_glu_run) glu_run;
  decltype(&xd_attention_scratch) attention_scratch;
  decltype(&xd_attention_run) attention_run;

  Kernels(uintptr_t address, const Addresses& functions) : cpu(reinterpret_cast<xd_cpu*>(address)) {
    take(product_scratch, functions, "xd_product_scratch");
    take(product_run, functions, "xd_product_run");
    take(norm_run, functions, "xd_norm_run");
    take(rope_scratch, functions, "xd_rope_scratch");
    take(rope_run, functions, "xd_rope_run");
    take(glu_run, functions, "xd_glu_run");
    take(attention_scratch, functions, "xd_attention_scratch");
    take(attention_run, functions, "xd_attention_run");
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

inline int format_of(const char* what, const mx::array& a) {
  if (a.dtype() == mx::float32) return XD_FLOAT32;
  if (a.dtype() == mx::float16) return XD_FLOAT16;
  if (a.dtype() == mx::bfloat16) return XD_BFLOAT16;
  refuse(what, " is ", a.dtype(), ", wanted float32, float16 or bfloat16");
}

inline mx::Dtype dtype_of(int format) {
  return format == XD_FLOAT32 ? mx::float32 : format == XD_FLOAT16 ? mx::float16 : mx::bfloat16;
}

inline int promote(int a, int b) {
  return a == b ? a : XD_FLOAT32;
}

// An operation that a kernel computes on the CPU; its result has its memory when `run` is called, and is not empty.
class KernelOp : public mx::Primitive {
 public:
  explicit KernelOp(const Kernels& kernels)
      : mx::Primitive(mx::default_stream(mx::Device::cpu)), kernels_(kernels) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    Tasks tasks(stream());
    add_to(tasks, inputs, outputs[0]);
    tasks.send();
  }

  // Give `out` its memory and add what computes it.
  void add_to(Tasks& tasks, const std::vector<mx::array>& inputs, mx::array& out) {
    allocate(out, tasks);
    if (out.size() != 0) run(inputs, out, tasks);
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string(name()) + ": runs on a CPU stream only");
  }

 protected:
  virtual void allocate(mx::array& out, const Tasks& tasks) {
    tasks.allocate(out);
  }
  virtual void run(const std::vector<mx::array>& in, mx::array& out, Tasks& tasks) = 0;

  template <typename Function, typename Arguments>
  void dispatch(Function run, const Arguments& arguments, Tasks& tasks) {
    tasks.add([run, cpu = kernels_.cpu, arguments]() { run(cpu, &arguments); });
  }

  const Kernels kernels_;
};

inline mx::array with_contiguous_rows(const mx::array& a, Tasks& tasks) {
  return a.shape(-1) == 1 || a.strides(-1) == 1 ? a : dense(a, tasks);
}

// attention_ops.cpp

// mx.fast.scaled_dot_product_attention.
mx::array attention(const Kernels& kernels, const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                    const std::variant<std::monostate, std::string, mx::array>& mask,
                    const std::optional<mx::array>& sinks);

// One token of each of several sequences. Its key and value, k[i] and v[i], become number lengths[i] of keys[i] and
// values[i], and q[i] attends to these and all before. Gives y [n, heads, 1, value_dim], then the keys, then the values.
std::vector<mx::array> append_attention(const Kernels& kernels, const mx::array& q, const mx::array& k,
                                        const mx::array& v, const std::vector<mx::array>& keys,
                                        const std::vector<mx::array>& values, const std::vector<int>& lengths,
                                        float scale, const std::optional<mx::array>& sinks);

// cache_ops.cpp

// The same to the caches themselves, all of the class `kind` (mlx-lm's KVCache) and with room: gives y. None, with
// nothing changed, if they are not, or if q is of another type than k and v.
std::optional<mx::array> append_attention_to(const Kernels& kernels, const nb::list& caches, nb::handle kind,
                                             const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                                             const std::optional<mx::array>& sinks);

}  // namespace xd
