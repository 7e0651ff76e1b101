// exchange.cpp: an exchange between ranks as an operation of the MLX graph.
//
// Theory of operation. A whole token stays one lazy graph, so the swap of rows inside a layer has to be a
// node of it. MLX runs the node on a CPU stream, as it does its own collectives, and puts the fences in
// where a GPU stream meets it. When the node is evaluated its task goes to the stream's thread, which calls
// a plain C function given as two integers: this module links to nothing of ours. The task cannot throw
// (that would end the process): a failed exchange leaves zeros, the transport remembers the reason, and the
// engine looks after evaluation.

#include <cstdint>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "graph.h"
#include "mlx/allocator.h"

namespace xd {

namespace {

using ExchangeFunction = int (*)(void*, uint32_t, uint64_t, const void*, const size_t*, void*);

// A 64-bit digest of what the router chose. Not cryptographic: peers are trusted, drift is what it finds.
uint64_t digest_of(const uint32_t* ids, size_t n) {
  uint64_t h = 0x9e3779b97f4a7c15ull + n;
  for (size_t i = 0; i < n; i++) {
    h = (h ^ ids[i]) * 0xff51afd7ed558ccdull;
    h ^= h >> 32;
  }
  return h;
}

class Exchange : public mx::Primitive {
 public:
  Exchange(mx::Stream stream, uintptr_t function, uintptr_t link, uint32_t tag, std::vector<size_t> sizes)
      : mx::Primitive(stream),
        function_(reinterpret_cast<ExchangeFunction>(function)),
        link_(reinterpret_cast<void*>(link)),
        tag_(tag),
        sizes_(std::move(sizes)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& all = outputs[0];
    all.set_data(mx::allocator::malloc(all.nbytes()));
    Tasks tasks(stream());
    const mx::array rows = dense(inputs[0], tasks);
    const uint32_t* ids = nullptr;
    size_t num_ids = 0;
    if (inputs.size() > 1) {
      const mx::array chosen = dense(inputs[1], tasks);
      ids = chosen.data<uint32_t>();
      num_ids = chosen.size();
    }
    tasks.add([function = function_, link = link_, tag = tag_, sizes = sizes_, ids, num_ids,
                      mine = rows.data<char>(), out = all.data<char>(), out_bytes = all.nbytes()]() {
      uint64_t digest = ids ? digest_of(ids, num_ids) : 0;
      if (function(link, tag, digest, mine, sizes.data(), out) != 0) std::memset(out, 0, out_bytes);
    });
    tasks.send();
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("exchange: runs on a CPU stream only");
  }

  const char* name() const override {
    return "Exchange";
  }

 private:
  ExchangeFunction function_;
  void* link_;
  uint32_t tag_;
  std::vector<size_t> sizes_;
};

mx::array exchange(const mx::array& rows, std::vector<int> num_rows, int rank, uintptr_t function, uintptr_t link,
                   uint32_t tag, std::optional<mx::array> ids) {
  if (rows.ndim() != 2 || rank < 0 || rank >= static_cast<int>(num_rows.size()) ||
      rows.shape(0) != num_rows[rank])
    throw std::invalid_argument("exchange: rows must be [num_rows[rank], width]");
  if (ids && (ids->dtype() != mx::uint32 || ids->ndim() != 1))
    throw std::invalid_argument("exchange: ids must be uint32 [num_ids]");
  const size_t row_bytes = rows.shape(1) * rows.itemsize();
  std::vector<size_t> sizes;
  for (int n : num_rows) sizes.push_back(n * row_bytes);
  auto stream = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs = {rows};
  if (ids) inputs.push_back(*ids);
  mx::Shape shape = {std::accumulate(num_rows.begin(), num_rows.end(), 0), rows.shape(1)};
  return mx::array(shape, rows.dtype(), std::make_shared<Exchange>(stream, function, link, tag, std::move(sizes)),
                   std::move(inputs));
}

}  // namespace

void bind_exchange(nb::module_& m) {
  m.def("exchange", &exchange, nb::arg("rows"), nb::arg("num_rows"), nb::arg("rank"), nb::arg("function"),
        nb::arg("link"), nb::arg("tag"), nb::arg("ids") = nb::none(),
        "Swap rows [num_rows[rank], width] with the other ranks; gives [sum(num_rows), width], in rank order.");
}

}  // namespace xd
