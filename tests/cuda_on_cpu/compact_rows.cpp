// csrc/cuda/compact_rows.cu on the CPU against a partition written down in ten lines. Usage:
//   compact_rows layout              sizes and offsets of the structures that Python fills
//   compact_rows ROWS PATTERN SEED   one case; PATTERN none|all|away|odd|random; exit status 1 and a message if wrong
// As a shared library it launches for tests/cuda_programs.py.
#include "cuda_on_cpu.h"
#ifndef SOURCE
#define SOURCE "../../csrc/cuda/compact_rows.cu"
#endif
#include SOURCE

#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr unsigned char kUntouched = 0xcd;
constexpr int kGuard = 64;  // bytes behind every output that must stay as they are

struct Tensor {
  std::vector<unsigned char> from, to;
  int row_bytes, stride, offset, unit;
};

// Rows of `row_bytes`, `stride` apart, the first one `offset` bytes into the allocation.
Tensor tensor(int rows, int row_bytes, int stride, int offset, std::mt19937& random) {
  Tensor t{{}, {}, row_bytes, stride, offset, 1};
  t.from.resize(offset + static_cast<std::size_t>(rows) * stride + 16);
  for (auto& byte : t.from) byte = static_cast<unsigned char>(random());
  t.to.assign(static_cast<std::size_t>(rows) * row_bytes + offset + kGuard, kUntouched);
  const auto together = reinterpret_cast<std::uintptr_t>(t.from.data() + offset) |
                        reinterpret_cast<std::uintptr_t>(t.to.data() + offset) |
                        static_cast<std::uintptr_t>(stride | row_bytes);
  t.unit = together % 16 == 0 ? 16 : together % 4 == 0 ? 4 : 1;
  return t;
}

int wrong(const char* what, int row) {
  std::printf("wrong %s at row %d\n", what, row);
  return 1;
}

std::vector<signed char> states(const std::string& pattern, int rows, std::mt19937& random) {
  std::vector<signed char> state(rows);
  for (int i = 0; i < rows; ++i)
    state[i] = pattern == "none"   ? 0
               : pattern == "all"  ? 1
               : pattern == "away" ? 2
               : pattern == "odd"  ? i % 2
                                   : static_cast<signed char>(random() % 3);
  return state;
}

int check(int rows, const std::string& pattern, unsigned seed) {
  std::mt19937 random(seed);
  const std::vector<signed char> state = states(pattern, rows, random);
  std::vector<int> expected;
  for (int kind = 0; kind < 3; ++kind)
    for (int i = 0; i < rows; ++i)
      if (state[i] == kind) expected.push_back(i);
  const int running = static_cast<int>(std::count(state.begin(), state.end(), 0));
  const int leaving = static_cast<int>(std::count(state.begin(), state.end(), 1));

  // Wide and aligned; a single int; a bool; strided; misaligned; an odd number of bytes.
  std::vector<Tensor> tensors;
  for (const auto& [bytes, stride, offset] :
       {std::array{96, 96, 0}, {4, 4, 0}, {1, 1, 0}, {32, 48, 0}, {16, 16, 4}, {7, 7, 1}})
    tensors.push_back(tensor(rows, bytes, stride, offset, random));
  Payloads payloads{};
  for (const Tensor& t : tensors)
    payloads.item[payloads.count++] = {reinterpret_cast<const char*>(t.from.data() + t.offset),
                                       reinterpret_cast<char*>(const_cast<unsigned char*>(t.to.data()) + t.offset),
                                       t.stride, t.row_bytes, t.unit};
  std::vector<int> order(rows + 1, -7), counts(3, -7);
  const int blocks = (rows + kBlockRows - 1) / kBlockRows;
  if (blocks <= 1) {
    cuda_on_cpu::launch(compact_rows_once, std::min(rows, 5), kBlockRows, seed, state.data(), rows, payloads,
                        order.data(), counts.data());
  } else {
    std::vector<int> block_counts(2 * blocks, -7);
    cuda_on_cpu::launch(compact_rows_count, blocks, kBlockRows, seed, state.data(), rows, block_counts.data());
    cuda_on_cpu::launch(compact_rows_move, blocks, kBlockRows, seed, state.data(), rows, block_counts.data(), payloads,
                        order.data(), counts.data());
  }
  if (counts[0] != running || counts[1] != leaving || counts[2] != -7) return wrong("counts", counts[0]);
  if (order[rows] != -7) return wrong("order past the end", rows);
  for (int i = 0; i < rows; ++i) {
    if (order[i] != expected[i]) return wrong("order", i);
    for (const Tensor& t : tensors)
      if (std::memcmp(t.to.data() + t.offset + static_cast<std::size_t>(i) * t.row_bytes,
                      t.from.data() + t.offset + static_cast<std::size_t>(expected[i]) * t.stride, t.row_bytes) != 0)
        return wrong("payload", i);
  }
  for (const Tensor& t : tensors) {
    for (int i = 0; i < t.offset; ++i)
      if (t.to[i] != kUntouched) return wrong("byte before a payload", i);
    for (std::size_t i = t.offset + static_cast<std::size_t>(rows) * t.row_bytes; i < t.to.size(); ++i)
      if (t.to[i] != kUntouched) return wrong("byte behind a payload", static_cast<int>(i));
  }
  return 0;
}

}  // namespace

CUDA_ON_CPU_LIBRARY(NamedKernel("compact_rows_once", compact_rows_once),
                    NamedKernel("compact_rows_count", compact_rows_count),
                    NamedKernel("compact_rows_move", compact_rows_move))

int main(int count, char** arguments) {
  if (count == 2 && std::string(arguments[1]) == "layout") {
    std::printf("%zu %zu %zu %zu %zu %zu %zu %zu\n", sizeof(Payload), offsetof(Payload, from), offsetof(Payload, to),
                offsetof(Payload, from_stride), offsetof(Payload, row_bytes), offsetof(Payload, unit), sizeof(Payloads),
                offsetof(Payloads, count));
    return 0;
  }
  if (count != 4) return 2;
  try {
    return check(std::atoi(arguments[1]), arguments[2], static_cast<unsigned>(std::atoi(arguments[3])));
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
