// arena.h: memory that stays where it is, for what is computed again and again (settled.cpp).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"

namespace xd {

namespace mx = mlx::core;

// Memory that is taken piece by piece and given back as a whole. Blocks stay, so what was taken once may be written again
// by whoever is next: all users' tasks run one after the other.
class Memory {
 public:
  // The block, and the byte from which on `bytes` of it may be used, at an address divisible by ALIGNMENT.
  std::pair<const mx::array&, size_t> take(size_t bytes) {
    for (; block_ < blocks_.size(); block_++, used_ = 0) {
      const size_t begin = aligned(used_);
      if (begin + bytes > blocks_[block_].nbytes()) continue;
      used_ = begin + bytes;
      return {blocks_[block_], begin};
    }
    const size_t size = std::max(bytes + ALIGNMENT, BLOCK_BYTES);
    mx::array& block = blocks_.emplace_back(mx::Shape{static_cast<int>(size)}, mx::uint8, nullptr, Inputs());
    block.set_data(mx::allocator::malloc(size));
    return take(bytes);
  }

  void rewind() {
    block_ = used_ = 0;
  }

  bool has(const mx::array& a) const {
    for (const mx::array& block : blocks_)
      if (block.data_shared_ptr() == a.data_shared_ptr()) return true;
    return false;
  }

 private:
  using Inputs = std::vector<mx::array>;
  static constexpr size_t ALIGNMENT = 64, BLOCK_BYTES = 1 << 18;

  size_t aligned(size_t at) const {
    const auto start = reinterpret_cast<uintptr_t>(blocks_[block_].data<char>());
    return (start + at + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT - start;
  }

  std::vector<mx::array> blocks_;
  size_t block_ = 0, used_ = 0;
};

// Of one stream.
struct Arena {
  Memory arrays;
  Memory scratch;  // each operation's own
};

}  // namespace xd
