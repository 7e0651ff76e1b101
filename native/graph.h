// graph.h: what the files of the MLX extension (_graph) share.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>

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
  explicit Tasks(const mx::Stream& stream) : encoder_(mx::cpu::get_command_encoder(stream)) {}

  template <typename Task>
  void add(Task task) {
    tasks_.emplace_back(std::move(task));
  }

  // Keep `a` until all that was added has been done.
  void keep(mx::array a) {
    encoder_.add_temporary(std::move(a));
  }

  void send() {
    if (tasks_.empty()) return;
    encoder_.dispatch([tasks = std::move(tasks_)]() {
      for (const auto& task : tasks) task();
    });
    tasks_.clear();
  }

 private:
  mx::cpu::CommandEncoder& encoder_;
  std::vector<std::function<void()>> tasks_;
};

// Give `a` itself when its elements lie densely in order, else a copy made on the stream, which outlives its users.
// Not mx::contiguous: that is one more node (1 us), and it copies every view of a much larger buffer.
mx::array dense(const mx::array& a, Tasks& tasks);

// Memory for the tasks that are added next, aligned to 64 bytes; nullptr for 0 bytes.
void* scratch(size_t bytes, Tasks& tasks);

// What each file adds to the module.
void bind_caches(nb::module_& m);
void bind_exchange(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_replay(nb::module_& m);

}  // namespace xd
