// twins.cpp: sums, products and quotients of arrays, as MLX's CPU backend computes them.
//
// Theory of operation. Between two of our kernels MLX adds a residual, weighs experts, divides by a sum, each in a message of
// its own to the stream's thread. A twin computes the same as one of several tasks of one message, which is done again at
// each step (settled.cpp); bound anew each time it gains nothing (bench/LOG.md). It uses MLX's number types and the order of
// MLX's loops, so that the bits are the same: a step that Python builds, of MLX's nodes, agrees with one that is built
// again. tests/model/test_tape.py compares them.

#include "twins.h"

#include <algorithm>
#include <optional>
#include <unordered_map>

namespace xd {

namespace {

// An array as rows, whatever its axes but the last are: elements from row to row, and from one to the next.
struct Rows {
  int64_t row, next;
};

std::optional<Rows> rows_of(const mx::array& a) {
  if (a.ndim() == 0) return std::nullopt;
  const auto row = row_stride(a, 0);
  if (!row) return std::nullopt;
  return Rows{*row, a.shape(-1) == 1 ? 0 : a.strides(-1)};
}

template <typename T>
T* allocated(mx::array& out, const Tasks& tasks) {
  tasks.allocate(out);
  return out.data<T>();
}

struct Add {
  template <typename T>
  static T of(T a, T b) {
    return a + b;
  }
};
struct Multiply {
  template <typename T>
  static T of(T a, T b) {
    return a * b;
  }
};
struct Divide {
  template <typename T>
  static T of(T a, T b) {
    return a / b;
  }
};

// Steps are constants for the compiler, which then takes several elements at once.
template <typename Op, typename T, int64_t A, int64_t B>
void combine_row(const T* a, const T* b, T* y, int64_t width) {
  for (int64_t i = 0; i < width; i++) y[i] = Op::template of<T>(a[i * A], b[i * B]);
}

template <typename Op, typename T>
auto loop_for(Rows a, Rows b) -> decltype(&combine_row<Op, T, 1, 1>) {
  if (a.next == 1) return b.next == 1 ? combine_row<Op, T, 1, 1> : b.next == 0 ? combine_row<Op, T, 1, 0> : nullptr;
  if (a.next == 0) return b.next == 1 ? combine_row<Op, T, 0, 1> : b.next == 0 ? combine_row<Op, T, 0, 0> : nullptr;
  return nullptr;
}

template <typename Op, typename T>
bool add_combination(const Arrays& in, mx::array& out, Tasks& tasks) {
  const auto a = rows_of(in[0]), b = rows_of(in[1]);
  const auto loop = a && b ? loop_for<Op, T>(*a, *b) : nullptr;
  if (!loop) return false;
  T* const y = allocated<T>(out, tasks);
  const int64_t width = out.shape(-1), num_rows = out.size() / width;
  tasks.add([loop, num_rows, width, from_a = in[0].data<T>(), from_b = in[1].data<T>(), a = a->row, b = b->row, y]() {
    for (int64_t r = 0; r < num_rows; r++) loop(from_a + r * a, from_b + r * b, y + r * width, width);
  });
  return true;
}

// y[outer, inner] = sum of x[outer, :, inner] in ascending order, from 0 on and in float32: MLX rounds once.
template <typename T>
void sum(const T* x, T* y, int64_t outer, int64_t num, int64_t inner) {
  constexpr int64_t AT_ONCE = 256;
  float sums[AT_ONCE];
  for (int64_t o = 0; o < outer; o++, x += num * inner, y += inner)
    for (int64_t first = 0; first < inner; first += AT_ONCE) {
      const int64_t count = std::min(AT_ONCE, inner - first);
      std::fill_n(sums, count, 0.0f);
      for (int64_t k = 0; k < num; k++)
        for (int64_t i = 0; i < count; i++) sums[i] += static_cast<float>(x[k * inner + first + i]);
      for (int64_t i = 0; i < count; i++) y[first + i] = static_cast<T>(sums[i]);
    }
}

template <typename T>
bool add_sum(const mx::Primitive& primitive, const mx::array& x, mx::array& out, Tasks& tasks) {
  const auto axes = static_cast<const mx::Reduce&>(primitive).state().second;
  if (axes.size() != 1 || !x.flags().row_contiguous) return false;
  int64_t outer = 1, inner = 1;
  for (int axis = 0; axis < axes[0]; axis++) outer *= x.shape(axis);
  for (int axis = axes[0] + 1; axis < static_cast<int>(x.ndim()); axis++) inner *= x.shape(axis);
#ifdef __APPLE__
  if (inner == 1) return false;  // by vectors there, in their order
#endif
  T* const y = allocated<T>(out, tasks);
  tasks.add([from = x.data<T>(), y, outer, num = x.shape(axes[0]), inner]() { sum(from, y, outer, num, inner); });
  return true;
}

template <typename T>
bool add_gather(const mx::Primitive& primitive, const Arrays& in, mx::array& out, Tasks& tasks) {
  const auto from = rows_of(in[0]), ids = rows_of(in[1]);
  if (!from || !ids || in[1].dtype() != mx::uint32 || in[0].ndim() != in[1].ndim() ||
      static_cast<const mx::GatherAxis&>(primitive).state() != static_cast<int>(out.ndim()) - 1 ||
      !std::equal(in[0].shape().begin(), in[0].shape().end() - 1, in[1].shape().begin()))
    return false;
  T* const y = allocated<T>(out, tasks);
  const int64_t width = out.shape(-1), num_rows = out.size() / width;
  tasks.add([x = in[0].data<T>(), which = in[1].data<uint32_t>(), from = *from, ids = *ids, y, width, num_rows]() {
    for (int64_t r = 0; r < num_rows; r++)
      for (int64_t i = 0; i < width; i++)
        y[r * width + i] = x[r * from.row + which[r * ids.row + i * ids.next] * from.next];
  });
  return true;
}

template <typename T>
bool add_of(Twin twin, const mx::Primitive& primitive, const Arrays& in, mx::array& out, Tasks& tasks) {
  switch (twin) {
    case Twin::ADD:
      return add_combination<Add, T>(in, out, tasks);
    case Twin::MULTIPLY:
      return add_combination<Multiply, T>(in, out, tasks);
    case Twin::DIVIDE:
      return add_combination<Divide, T>(in, out, tasks);
    case Twin::SUM:
      return add_sum<T>(primitive, in[0], out, tasks);
    case Twin::GATHER_AXIS:
      return add_gather<T>(primitive, in, out, tasks);
    case Twin::NONE:
      break;
  }
  return false;
}

}  // namespace

Twin twin_of(const mx::Primitive& primitive) {
  static const std::unordered_map<std::string, Twin> twins = {{"Add", Twin::ADD},
                                                              {"Multiply", Twin::MULTIPLY},
                                                              {"Divide", Twin::DIVIDE},
                                                              {"Sum", Twin::SUM},
                                                              {"GatherAxis", Twin::GATHER_AXIS}};
  const auto found = twins.find(primitive.name());
  return found == twins.end() ? Twin::NONE : found->second;
}

bool add_twin(Twin twin, const mx::Primitive& primitive, const Arrays& in, mx::array& out, Tasks& tasks) {
  if (twin == Twin::NONE || out.size() == 0 || out.dtype() != in[0].dtype()) return false;
  if (out.dtype() == mx::float32) return add_of<float>(twin, primitive, in, out, tasks);
  if (out.dtype() == mx::bfloat16) return add_of<mx::bfloat16_t>(twin, primitive, in, out, tasks);
  if (out.dtype() == mx::float16) return add_of<mx::float16_t>(twin, primitive, in, out, tasks);
  return false;
}

}  // namespace xd
