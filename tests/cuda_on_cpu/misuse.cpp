// Kernels that are wrong on purpose: the header must say so. Usage: misuse NAME; prints the message, exit status 1.
#include <cstdio>

#include "cuda_on_cpu.h"

namespace {

constexpr unsigned kEveryLane = 0xffffffffu;

void right(int* out) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, __popc(__ballot_sync(kEveryLane, threadIdx.x % 2)));
  __syncthreads();
  out[threadIdx.x] = sum;
}

// Lanes' own squares from below and from lane 7 of the warp, wider than 32 bits; the first odd lane.
void right_collectives(int* out) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned long long square = (1ull << 40) + lane * lane;
  const unsigned long long below = __shfl_up_sync(kEveryLane, square, 3), seventh = __shfl_sync(kEveryLane, square, 7);
  const unsigned source = lane < 3 ? lane : lane - 3;
  const bool fine = below == (1ull << 40) + source * source && seventh == (1ull << 40) + 49;
  out[threadIdx.x] = fine ? __ffs(__ballot_sync(kEveryLane, lane % 2)) : -1;
}

void missing_barrier(int* out) {
  __shared__ int value[64];
  value[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = value[63 - threadIdx.x];
}

void divergent_barrier(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    out[threadIdx.x] = 1;
    __syncthreads();
  }
}

void waits_for_ever(int* out) {
  if (threadIdx.x == 40) {
    out[0] = static_cast<int>(__ballot_sync(kEveryLane, 1));
  } else {
    __syncthreads();
  }
}

void lane_not_in_its_mask(int* out) { out[threadIdx.x] = static_cast<int>(__ballot_sync(0x0000ffffu, 1)); }

void mask_names_an_exited_lane(int* out) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = static_cast<int>(__ballot_sync(kEveryLane, 1));
}

void different_collectives(int* out) {
  out[threadIdx.x] =
      threadIdx.x % 2 ? static_cast<int>(__ballot_sync(kEveryLane, 1)) : __shfl_up_sync(kEveryLane, 1, 1);
}

void shuffle_from_outside(int* out) {
  if (threadIdx.x % 32 >= 16) out[threadIdx.x] = __shfl_up_sync(0xffff0000u, 1, 8);
}

void broadcast_from_outside(int* out) {
  if (threadIdx.x % 32 >= 16) out[threadIdx.x] = __shfl_sync(0xffff0000u, 1, 3);
}

void unwritten_shared_memory(int* out) {
  __shared__ int value[64];
  if (blockIdx.x == 0) value[threadIdx.x] = 5;
  __syncthreads();
  out[threadIdx.x] = value[threadIdx.x];
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count == 2 ? arguments[1] : "";
  std::vector<int> out(64, -1);
  try {
    for (unsigned seed = 0; seed < 4; ++seed) {
      const auto run = [&](auto kernel, unsigned grid) { cuda_on_cpu::launch(kernel, grid, 64, seed, out.data()); };
      bool fine = true;
      if (name == "right") {
        run(right, 3);
        for (const int value : out) fine &= value == 32 * 32;
      } else if (name == "right_collectives") {
        run(right_collectives, 1);
        for (const int value : out) fine &= value == 2;
      } else if (name == "missing_barrier") {
        run(missing_barrier, 1);
        for (int i = 0; i < 64; ++i) fine &= out[i] == 63 - i;
      } else if (name == "unwritten_shared_memory") {
        run(unwritten_shared_memory, 2);
        for (const int value : out) fine &= value == 5;
      } else if (name == "divergent_barrier") {
        run(divergent_barrier, 1);
      } else if (name == "waits_for_ever") {
        run(waits_for_ever, 1);
      } else if (name == "lane_not_in_its_mask") {
        run(lane_not_in_its_mask, 1);
      } else if (name == "mask_names_an_exited_lane") {
        run(mask_names_an_exited_lane, 1);
      } else if (name == "different_collectives") {
        run(different_collectives, 1);
      } else if (name == "shuffle_from_outside") {
        run(shuffle_from_outside, 1);
      } else if (name == "broadcast_from_outside") {
        run(broadcast_from_outside, 1);
      } else {
        return 2;
      }
      if (!fine) {
        std::printf("wrong values\n");
        return 1;
      }
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 0;
}
