// graph.h: what the files of the MLX extension (_graph) share.
#pragma once

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>

#include "arena.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"

namespace xd {

namespace nb = nanobind;
namespace mx = mlx::core;

// What operations have to do on a stream's thread, in this order. They are sent to it together: each message costs a
// queue's lock, and often the thread's sleep.
class Tasks {
 public:
  using Task = std::function<void()>;

  explicit Tasks(const mx::Stream& stream) : encoder_(mx::cpu::get_command_encoder(stream)) {}

  // Tasks that will be done again and again, and are taken instead of sent: their memory is the arena's.
  Tasks(const mx::Stream& stream, Arena& arena) : encoder_(mx::cpu::get_command_encoder(stream)), arena_(&arena) {}

  template <typename Added>
  void add(Added task) {
    tasks_.emplace_back(std::move(task));
  }

  // Give `a` memory, in which its elements lie densely in order, or as it is said.
  void allocate(mx::array& a) const;
  void allocate(mx::array& a, size_t data_size, mx::Strides strides, mx::array::Flags flags) const;

  // Memory for the operation whose tasks are added next, aligned to 64 bytes; nullptr for 0 bytes.
  void* scratch(size_t bytes);

  // Keep `a` until all that was added has been done.
  void keep(mx::array a) {
    if (!arena_) encoder_.add_temporary(std::move(a));  // an arena's memory stays
  }

  void send() {
    if (tasks_.empty()) return;
    encoder_.dispatch([tasks = std::move(tasks_)]() {
      for (const auto& task : tasks) task();
    });
    tasks_.clear();
  }

  std::vector<Task> take() {
    return std::exchange(tasks_, {});
  }

 private:
  mx::cpu::CommandEncoder& encoder_;
  Arena* const arena_ = nullptr;
  std::vector<Task> tasks_;
};

// Give `a` itself when its elements lie densely in order, else a copy made on the stream, which outlives its users.
// Not mx::contiguous: that is one more node (1 us), and it copies every view of a much larger buffer.
mx::array dense(const mx::array& a, Tasks& tasks);

// The distance from row to row, whatever the axes of `a` but the last are; none if it is not the same everywhere, `alone` for one row.
std::optional<int64_t> row_stride(const mx::array& a, int64_t alone);

// Add what copies `a` to dense memory of its size.
void copy_densely(const mx::array& a, char* to, Tasks& tasks);

// What each file adds to the module.
void bind_caches(nb::module_& m);
void bind_exchange(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_replay(nb::module_& m);

}  // namespace xd
