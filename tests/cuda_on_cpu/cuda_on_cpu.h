// Runs CUDA C++ kernels on the CPU, for tests: include this, then the .cu file, then call launch(kernel, grid, block,
// ...).
//
// A block's threads are fibers of one OS thread. A fiber runs until it waits for others, at a barrier or a warp
// collective; who runs next is shuffled by a seed, so a kernel that lacks a barrier meets an order in which it reads
// too early. In every other block some warps run as far ahead of others as barriers let them, so that one may write
// what another has still to read. Shared memory is poisoned before every block. Misuse throws, with what happened
// where:
//   - a barrier that some threads of the block reach at another place, or never reach while the others wait;
//   - a warp collective by a lane that its mask does not name, naming a lane that has exited, or met by another
//   collective.
// What it cannot show: data races inside a stretch without waiting (threads never interleave there), and anything of
// timing.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
// One section holds all shared variables, so that it can be poisoned without knowing them.
#define __shared__ __attribute__((section("cuda_shared"))) static

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern "C" char __start_cuda_shared[] __attribute__((weak));  // made by the linker
extern "C" char __stop_cuda_shared[] __attribute__((weak));

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32;
constexpr std::size_t kStackBytes = 128 << 10;

// Lanes of one warp that named the same mask and meet at one collective; then the next starts.
struct Meeting {
  const char* operation = nullptr;
  unsigned arrived = 0;
  unsigned long rounds = 0;  // how many collectives were completed
  std::uint64_t given[kWarpSize] = {};
  std::uint64_t taken[kWarpSize] = {};  // values of the last completed one
};

struct Thread {
  ucontext_t context;
  unsigned index = 0;
  bool finished = false;
  const char* waits_for = nullptr;         // null: can run
  const unsigned long* counter = nullptr;  // it can go on when *counter differs from `seen`
  unsigned long seen = 0;
};

struct Warp {
  unsigned alive = 0;
  std::vector<std::pair<unsigned, std::unique_ptr<Meeting>>> meetings;  // by mask

  Meeting& meeting(unsigned mask) {
    for (auto& [key, meeting] : meetings)
      if (key == mask) return *meeting;
    meetings.emplace_back(mask, std::make_unique<Meeting>());
    return *meetings.back().second;
  }
};

struct Block {
  uint3 index{}, size{}, grid{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned alive = 0, at_barrier = 0;
  int barrier_line = 0;
  unsigned long barriers = 0;  // how many were completed
  ucontext_t scheduler;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;
};

inline Block* block = nullptr;
inline Thread* thread = nullptr;

inline unsigned lane() { return thread->index % kWarpSize; }
inline Warp& warp() { return block->warps[thread->index / kWarpSize]; }

inline void wait_until_changed(const unsigned long& counter, unsigned long seen, const char* what) {
  thread->counter = &counter;
  thread->seen = seen;
  thread->waits_for = what;
  while (counter == seen) swapcontext(&thread->context, &block->scheduler);
  thread->waits_for = nullptr;
}

inline void release_barrier() {
  block->at_barrier = 0;
  ++block->barriers;
}

inline void barrier(int line) {
  if (block->at_barrier > 0 && block->barrier_line != line)
    throw std::runtime_error("divergent barrier: threads of one block wait at lines " +
                             std::to_string(block->barrier_line) + " and " + std::to_string(line));
  block->barrier_line = line;
  const unsigned long seen = block->barriers;
  if (++block->at_barrier == block->alive) {
    release_barrier();
  } else {
    wait_until_changed(block->barriers, seen, "__syncthreads");
  }
}

// All lanes of `mask` give a value and see everybody's; lane i's is result.taken[i].
inline const Meeting& meet(unsigned mask, std::uint64_t value, const char* operation) {
  const unsigned bit = 1u << lane();
  if (!(mask & bit)) throw std::runtime_error(std::string(operation) + ": the calling lane is not in its own mask");
  if (mask & ~warp().alive)
    throw std::runtime_error(std::string(operation) + ": the mask names a lane that has exited");
  Meeting& meeting = warp().meeting(mask);
  if (meeting.arrived && std::strcmp(meeting.operation, operation) != 0)
    throw std::runtime_error(std::string("lanes of one warp meet in different collectives: ") + meeting.operation +
                             " and " + operation);
  meeting.operation = operation;
  meeting.given[lane()] = value;
  meeting.arrived |= bit;
  const unsigned long seen = meeting.rounds;
  if (meeting.arrived == mask) {
    std::copy(std::begin(meeting.given), std::end(meeting.given), meeting.taken);
    meeting.arrived = 0;
    ++meeting.rounds;
  } else {
    wait_until_changed(meeting.rounds, seen, operation);
  }
  return meeting;
}

inline void run_thread() {
  try {
    (*block->kernel)();
  } catch (...) {
    if (!block->error) block->error = std::current_exception();
  }
  thread->finished = true;
  warp().alive &= ~(1u << lane());
  // Since Volta a barrier waits for the threads that have not exited.
  if (--block->alive > 0 && block->at_barrier == block->alive) release_barrier();
  swapcontext(&thread->context, &block->scheduler);
}

inline void run_block(Block& current, char* stacks, std::mt19937& random) {
  block = &current;
  const unsigned count = current.size.x * current.size.y * current.size.z;
  if (const auto shared = __stop_cuda_shared - __start_cuda_shared; shared > 0)  // a kernel may have none
    std::memset(__start_cuda_shared, 0xab, static_cast<std::size_t>(shared));
  current.threads = std::vector<Thread>(count);
  current.warps = std::vector<Warp>((count + kWarpSize - 1) / kWarpSize);
  current.alive = count;
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& one = current.threads[i];
    one.index = order[i] = i;
    current.warps[i / kWarpSize].alive |= 1u << i % kWarpSize;
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = stacks + i * kStackBytes;
    one.context.uc_stack.ss_size = kStackBytes;
    makecontext(&one.context, run_thread, 0);
  }
  std::vector<unsigned> rank(current.warps.size());  // of a warp: who is ahead
  for (unsigned i = 0; i < rank.size(); ++i) rank[i] = i;
  std::shuffle(rank.begin(), rank.end(), random);
  const bool some_run_ahead = random() % 2;
  while (current.alive > 0) {
    std::shuffle(order.begin(), order.end(), random);
    const auto is_ahead = [&](unsigned a, unsigned b) { return rank[a / kWarpSize] < rank[b / kWarpSize]; };
    if (some_run_ahead) std::stable_sort(order.begin(), order.end(), is_ahead);
    bool somebody_ran = false;
    unsigned last = order[0];
    for (const unsigned i : order) {
      if (some_run_ahead && somebody_ran && is_ahead(last, i)) break;
      last = i;
      Thread& next = current.threads[i];
      if (next.finished || (next.waits_for && *next.counter == next.seen)) continue;
      somebody_ran = true;
      thread = &next;
      swapcontext(&current.scheduler, &next.context);
      if (current.error) std::rethrow_exception(current.error);
    }
    if (somebody_ran) continue;
    std::string who;
    for (const Thread& one : current.threads)
      if (!one.finished && who.size() < 200) who += " " + std::to_string(one.index) + " at " + one.waits_for;
    throw std::runtime_error("deadlock: nobody can run, threads wait:" + who);
  }
}

// Runs every block of a grid, in an order shuffled by the seed.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned grid, unsigned threads, unsigned seed, Arguments... arguments) {
  const auto stacks = std::make_unique_for_overwrite<char[]>(threads * kStackBytes);  // few pages are ever touched
  const std::function<void()> body = [&] { kernel(arguments...); };
  std::mt19937 random(seed);
  std::vector<unsigned> order(grid);
  for (unsigned i = 0; i < grid; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned i : order) {
    Block current;
    current.index = {i, 0, 0};
    current.size = {threads, 1, 1};
    current.grid = {grid, 1, 1};
    current.kernel = &body;
    run_block(current, stacks.get(), random);
  }
  block = nullptr;
  thread = nullptr;
}

// The same from the addresses of the arguments, which is how CUDA's driver takes them: for callers that do not know
// their types.
template <class... Arguments>
void launch_at(void (*kernel)(Arguments...), unsigned grid, unsigned threads, unsigned seed, void** addresses) {
  [&]<std::size_t... number>(std::index_sequence<number...>) {
    launch(kernel, grid, threads, seed, *static_cast<Arguments*>(addresses[number])...);
  }(std::index_sequence_for<Arguments...>{});
}

}  // namespace cuda_on_cpu

#define threadIdx (uint3{cuda_on_cpu::thread->index, 0, 0})
#define blockIdx (cuda_on_cpu::block->index)
#define blockDim (cuda_on_cpu::block->size)
#define gridDim (cuda_on_cpu::block->grid)
#define __syncthreads() cuda_on_cpu::barrier(__LINE__)

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto& found = cuda_on_cpu::meet(mask, predicate != 0, "__ballot_sync");
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1 && found.taken[i]) result |= 1u << i;
  return result;
}

// What a lane gets from lane `source` of those that meet; reading one outside the mask is undefined.
template <class Value>
Value shuffled(unsigned mask, Value value, unsigned source, const char* operation) {
  static_assert(sizeof(Value) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const auto& found = cuda_on_cpu::meet(mask, bits, operation);
  if (!(mask >> source & 1)) throw std::runtime_error(std::string(operation) + ": reads a lane outside its mask");
  std::memcpy(&value, &found.taken[source], sizeof value);
  return value;
}

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source) {
  return shuffled(mask, value, static_cast<unsigned>(source) % 32, "__shfl_sync");
}

// A lane reads the lane `distance` below it, or itself where there is none.
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned distance) {
  const unsigned self = cuda_on_cpu::lane();
  return shuffled(mask, value, self < distance ? self : self - distance, "__shfl_up_sync");
}

inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::meet(mask, 0, "__syncwarp"); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
// Fibers never interleave between two waits, so plain memory is atomic here.
inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address += value;
  return old;
}

// A program that is also a shared library: launch_by_name finds kernels by their names and takes the addresses of their
// arguments. It returns what went wrong, or null.
struct NamedKernel {
  template <class... Arguments>
  NamedKernel(const char* name, void (*kernel)(Arguments...))
      : name(name), launch([kernel](unsigned grid, unsigned threads, unsigned seed, void** addresses) {
          cuda_on_cpu::launch_at(kernel, grid, threads, seed, addresses);
        }) {}
  std::string name;
  std::function<void(unsigned, unsigned, unsigned, void**)> launch;
};
#define CUDA_ON_CPU_LIBRARY(...)                                                                          \
  extern "C" const char* launch_by_name(const char* name, unsigned grid, unsigned threads, unsigned seed, \
                                        void** addresses) {                                               \
    static std::string message;                                                                           \
    try {                                                                                                 \
      for (const NamedKernel& kernel : {__VA_ARGS__})                                                     \
        if (kernel.name == name) return kernel.launch(grid, threads, seed, addresses), nullptr;           \
      message = std::string("no kernel ") + name;                                                         \
    } catch (const std::exception& error) {                                                               \
      message = error.what();                                                                             \
    }                                                                                                     \
    return message.c_str();                                                                               \
  }
