// segment.h: nodes of a recorded graph, and several of them as one (segment.cpp).
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "graph.h"

namespace xd {

using Arrays = std::vector<mx::array>;

// An array of a recorded graph is known by a number: those of a step by the order in which they were recorded, from 0 on,
// constants (which are there before) from CONSTANT on.
constexpr uint32_t CONSTANT = 1u << 31;

struct Node {
  std::shared_ptr<mx::Primitive> primitive;
  std::vector<uint32_t> inputs, outputs;
  std::vector<mx::Shape> shapes;  // the outputs'
  std::vector<mx::Dtype> dtypes;
};

// How often an array is an input of a node, or wanted of a stage, in the whole graph.
using Uses = std::unordered_map<uint32_t, size_t>;

// The same nodes, of which those that follow each other on one CPU stream are one.
std::vector<Node> merged(const std::vector<Node>& nodes, const Uses& uses, const Arrays& constants);

}  // namespace xd
