// compact_rows on a GPU: stable three-way partition of rows (runners, leaving, away) and the move of every payload.
//
// Up to 1024 rows take one launch: every block partitions the whole state (1 KiB at most) and then moves its share of
// rows, which costs less than a second launch or a grid barrier. More rows take two launches, count and move. Nothing
// is read back by the host, so a pass that calls this can be captured in a CUDA graph.
//
// Plain pointers, sizes, strides; no torch headers. Compiled through NVRTC at first use, by nvcc in a pinch, and by g++
// against tests/cuda_on_cpu/ for tests.

constexpr int kBlockRows = 1024;  // rows that one block partitions: one per thread
constexpr int kWarps = kBlockRows / 32;
constexpr unsigned kEveryLane = 0xffffffffu;
constexpr int kMaxPayloads = 16;

// A tensor that moves with the rows. `unit` is the widest of 16, 4, 1 that divides both addresses, the stride and the
// row.
struct Payload {
  const char* from;
  char* to;
  long long from_stride;  // bytes between rows
  int row_bytes;
  int unit;
};
struct Payloads {
  Payload item[kMaxPayloads];
  int count;
};

struct Partition {
  int place;    // where this thread's row goes, relative to the first row of its class in this block
  int kind;     // 0 runs, 1 leaves, 2 is away, 3 there is no such row
  int size[2];  // runners and leavers among this block's rows
};

// Called by all kBlockRows threads. Ranks by ballot inside a warp, by a scan over the warps' counts across them.
static __device__ Partition partition(const signed char* state, int row, int rows) {
  __shared__ int before[3][kWarps];  // rows of a kind in earlier warps
  __shared__ int size[2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const signed char s = row < rows ? state[row] : 3;
  Partition p;
  p.kind = row >= rows ? 3 : (s == 0 ? 0 : (s == 1 ? 1 : 2));
  int rank = 0;
  for (int kind = 0; kind < 3; ++kind) {
    const unsigned same = __ballot_sync(kEveryLane, p.kind == kind);
    if (p.kind == kind) rank = __popc(same & ((1u << lane) - 1));
    if (lane == 0) before[kind][warp] = __popc(same);
  }
  __syncthreads();
  if (warp < 3) {  // warp k scans the counts of kind k; kWarps is 32
    const int own = before[warp][lane];
    int sum = own;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kEveryLane, sum, step);
      if (lane >= step) sum += other;
    }
    before[warp][lane] = sum - own;
    if (lane == 31 && warp < 2) size[warp] = sum;
  }
  __syncthreads();
  p.place = p.kind < 3 ? before[p.kind][warp] + rank : 0;
  p.size[0] = size[0];
  p.size[1] = size[1];
  return p;
}

// One of three by choice, not by address: what is addressed has to lie in memory.
static __device__ int among(int kind, int run, int leaving, int away) {
  return kind == 0 ? run : kind == 1 ? leaving : away;
}

// `width` threads, this one `thread`, copy a row of one payload.
template <class Word>
static __device__ void copy_words(const Payload& payload, long long old_row, long long new_row, int thread, int width) {
  const Word* from = reinterpret_cast<const Word*>(payload.from + old_row * payload.from_stride);
  Word* to = reinterpret_cast<Word*>(payload.to + new_row * payload.row_bytes);
  const int words = payload.row_bytes / static_cast<int>(sizeof(Word));
  for (int i = thread; i < words; i += width) to[i] = from[i];
}

static __device__ void copy_row(const Payloads& payloads, long long old_row, long long new_row, int thread, int width) {
  for (int i = 0; i < payloads.count; ++i) {
    const Payload& payload = payloads.item[i];
    if (payload.unit == 16) {
      copy_words<uint4>(payload, old_row, new_row, thread, width);
    } else if (payload.unit == 4) {
      copy_words<unsigned>(payload, old_row, new_row, thread, width);
    } else {
      copy_words<char>(payload, old_row, new_row, thread, width);
    }
  }
}

// At most kBlockRows rows; any number of blocks of kBlockRows threads. Block b moves new rows b, b + gridDim.x, ...
// (One block a processor will do: asked for no more, the compiler keeps in registers what it would spill for two.)
extern "C" __global__ void __launch_bounds__(kBlockRows, 1)
    compact_rows_once(const signed char* state, int rows, Payloads payloads, int* order, int* counts) {
  __shared__ short old_of[kBlockRows];
  const int row = threadIdx.x;
  const Partition p = partition(state, row, rows);
  const int first = among(p.kind, 0, p.size[0], p.size[0] + p.size[1]);
  if (p.kind < 3) old_of[first + p.place] = static_cast<short>(row);
  __syncthreads();
  if (blockIdx.x == 0) {
    if (row < rows) order[row] = old_of[row];
    if (row < 2) counts[row] = row == 0 ? p.size[0] : p.size[1];
  }
  for (int i = blockIdx.x; i < rows; i += gridDim.x) copy_row(payloads, old_of[i], i, threadIdx.x, kBlockRows);
}

// Many rows, first launch: block b counts the runners and leavers among its kBlockRows rows.
extern "C" __global__ void __launch_bounds__(kBlockRows)
    compact_rows_count(const signed char* state, int rows, int* block_counts) {
  const Partition p = partition(state, blockIdx.x * kBlockRows + threadIdx.x, rows);
  if (threadIdx.x < 2) block_counts[2 * blockIdx.x + threadIdx.x] = threadIdx.x == 0 ? p.size[0] : p.size[1];
}

// Many rows, second launch: block b finds where its rows go from all blocks' counts, and moves them, a warp per row.
extern "C" __global__ void __launch_bounds__(kBlockRows, 1)
    compact_rows_move(const signed char* state, int rows, const int* block_counts, Payloads payloads, int* order,
                      int* counts) {
  __shared__ int sums[4];  // runners, leavers in earlier blocks; in all blocks
  __shared__ int new_of[kBlockRows];
  const int block = blockIdx.x, blocks = gridDim.x;
  if (threadIdx.x < 4) sums[threadIdx.x] = 0;
  __syncthreads();
  int own[4] = {0, 0, 0, 0};
  for (int b = threadIdx.x; b < blocks; b += kBlockRows) {
    for (int kind = 0; kind < 2; ++kind) {
      const int count = block_counts[2 * b + kind];
      own[2 + kind] += count;
      if (b < block) own[kind] += count;
    }
  }
  for (int i = 0; i < 4; ++i)
    if (own[i]) atomicAdd(&sums[i], own[i]);
  // partition() has barriers between here and the first look at the sums.
  const int row = block * kBlockRows + threadIdx.x;
  const Partition p = partition(state, row, rows);
  const int earlier_away = block * kBlockRows - sums[0] - sums[1];
  const int first = among(p.kind, sums[0], sums[2] + sums[1], sums[2] + sums[3] + earlier_away);
  if (p.kind < 3) {
    const int target = first + p.place;
    new_of[threadIdx.x] = target;
    order[target] = row;
  }
  if (block == 0 && threadIdx.x < 2) counts[threadIdx.x] = sums[2 + threadIdx.x];
  __syncthreads();
  const int mine = min(kBlockRows, rows - block * kBlockRows);
  for (int i = threadIdx.x / 32; i < mine; i += kWarps)
    copy_row(payloads, block * kBlockRows + i, new_of[i], threadIdx.x % 32, 32);
}
