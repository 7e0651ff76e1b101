// graph.h: what the files of the MLX extension (_graph) share.
#pragma once

#include <nanobind/nanobind.h>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"

namespace xd {

namespace nb = nanobind;
namespace mx = mlx::core;

// Give `a` itself when its elements lie densely in order, else a copy made on the stream, which outlives its users.
// Not mx::contiguous: that is one more node (1 us), and it copies every view of a much larger buffer.
mx::array dense(const mx::array& a, mx::cpu::CommandEncoder& encoder);

// Memory for the tasks that are dispatched next, aligned to 64 bytes; nullptr for 0 bytes.
void* scratch(size_t bytes, mx::cpu::CommandEncoder& encoder);

// What each file adds to the module.
void bind_caches(nb::module_& m);
void bind_exchange(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_replay(nb::module_& m);

}  // namespace xd
