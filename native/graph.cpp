// graph.cpp: the MLX extension: the module itself, and memory for its operations.

#include "graph.h"

#include <algorithm>
#include <cstring>

#include "mlx/allocator.h"
#include "mlx/version.h"

namespace xd {

namespace {

// Where a row of `a`, all axes but the last, begins, counted in elements.
struct Rows {
  mx::Shape shape;
  mx::Strides strides;

  explicit Rows(const mx::array& a) : shape(a.shape()), strides(a.strides()) {
    shape.pop_back();
    strides.pop_back();
  }

  int64_t offset(int64_t row) const {
    int64_t sum = 0;
    for (size_t axis = shape.size(); axis-- > 0; row /= shape[axis]) sum += row % shape[axis] * strides[axis];
    return sum;
  }
};

void copy_row(const char* from, char* to, int64_t count, int64_t stride, int64_t size) {
  if (stride == 1)
    std::memcpy(to, from, count * size);
  else
    for (int64_t i = 0; i < count; i++) std::memcpy(to + i * size, from + i * stride * size, size);
}

// As MLX sets them.
mx::array::Flags flags_of_dense(const mx::array& a) {
  const auto longest = a.ndim() ? *std::max_element(a.shape().begin(), a.shape().end()) : 1;
  return {true, true, a.size() <= 1 || static_cast<int64_t>(a.size()) == longest};
}

}  // namespace

void Tasks::allocate(mx::array& a) const {
  allocate(a, a.size(), a.strides(), flags_of_dense(a));
}

void Tasks::allocate(mx::array& a, size_t data_size, mx::Strides strides, mx::array::Flags flags) const {
  if (!arena_) {
    a.set_data(mx::allocator::malloc(a.nbytes()), data_size, std::move(strides), flags);
    return;
  }
  const auto [block, at] = arena_->arrays.take(a.nbytes());
  a.copy_shared_buffer(block, strides, flags, data_size, static_cast<int64_t>(at / a.itemsize()));
}

void* Tasks::scratch(size_t bytes) {
  if (bytes == 0) return nullptr;
  if (arena_) {
    const auto [block, at] = arena_->scratch.take(bytes);
    return const_cast<char*>(block.data<char>()) + at;
  }
  const uintptr_t alignment = 64;
  mx::array memory({0}, mx::uint8, nullptr, {});
  memory.set_data(mx::allocator::malloc(bytes + alignment));
  keep(memory);
  const auto start = reinterpret_cast<uintptr_t>(memory.buffer().raw_ptr());
  return reinterpret_cast<void*>((start + alignment - 1) / alignment * alignment);
}

std::optional<int64_t> row_stride(const mx::array& a, int64_t alone) {
  std::optional<int64_t> stride;
  int64_t next = 0;
  for (int axis = static_cast<int>(a.ndim()) - 2; axis >= 0; axis--) {
    if (a.shape(axis) == 1) continue;
    if (stride && a.strides(axis) != next) return std::nullopt;
    if (!stride) stride = a.strides(axis);
    next = a.strides(axis) * a.shape(axis);
  }
  return stride.value_or(alone);
}

void copy_densely(const mx::array& a, char* to, Tasks& tasks) {
  if (a.size() == 0) return;
  if (a.flags().row_contiguous) {
    tasks.add([from = a.data<char>(), to, bytes = a.nbytes()]() { std::memcpy(to, from, bytes); });
    return;
  }
  const int64_t width = a.shape(-1), num_rows = a.size() / width;
  tasks.add([from = a.data<char>(), to, rows = Rows(a), num_rows, width, stride = a.strides(-1),
             size = static_cast<int64_t>(a.itemsize())]() {
    for (int64_t i = 0; i < num_rows; i++)
      copy_row(from + rows.offset(i) * size, to + i * width * size, width, stride, size);
  });
}

mx::array dense(const mx::array& a, Tasks& tasks) {
  if (a.flags().row_contiguous || a.size() == 0) return a;
  mx::array copy(a.shape(), a.dtype(), nullptr, {});
  tasks.allocate(copy);
  tasks.keep(copy);
  copy_densely(a, copy.data<char>(), tasks);
  return copy;
}

}  // namespace xd

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

NB_MODULE(_graph, m) {
  m.doc() = "Operations of the MLX graph: the exchange between ranks, the CPU kernels, and graphs that are built again.";
  m.attr("built_for_mlx") =
      TEXT(MLX_VERSION_MAJOR) "." TEXT(MLX_VERSION_MINOR) "." TEXT(MLX_VERSION_PATCH);
  xd::bind_caches(m);
  xd::bind_exchange(m);
  xd::bind_kernels(m);
  xd::bind_replay(m);
}
