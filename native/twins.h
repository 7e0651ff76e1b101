// twins.h: what MLX computes for small nodes, as tasks of ours (twins.cpp).
#pragma once

#include <string>

#include "segment.h"

namespace xd {

enum class Twin { NONE, ADD, MULTIPLY, DIVIDE, SUM, GATHER_AXIS };

// Which twin a primitive has.
Twin twin_of(const mx::Primitive& primitive);

// Give `out` its memory and add what computes it, to the same bits as the primitive. False, with nothing done, where the
// arrays lie in a way that only MLX knows.
bool add_twin(Twin twin, const mx::Primitive& primitive, const Arrays& in, mx::array& out, Tasks& tasks);

}  // namespace xd
