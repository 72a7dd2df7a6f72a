// accept_drafts on a GPU: how much of each row's draft is kept, and the token that follows.
//
// A block per row. Greedy rows are a warp each: ballots find the first draft that the target would not have said.
// Sampled rows are kWarps warps: each finds that draft for itself (drafts are few, their probabilities cached, and so
// no warp waits for another), then all share the vocabulary: each sums the mass of one part, everybody scans the sums
// and goes on inside the part that holds the token, so V = 128 256 takes three rounds and three barriers, and memory is
// read once plus a thirtieth. Mass is counted in whole units (dyndepth/ops/accept_drafts.py), so any order of adding
// gives the same token. Nothing is read back by the host.
//
// Plain pointers, sizes, strides; no torch headers. Compiled through NVRTC at first use, by nvcc in a pinch, and by g++
// against tests/cuda_on_cpu/ for tests.

constexpr int kWarps = 32;  // of a sampled row; the scan over their sums is one warp wide
constexpr unsigned kEveryLane = 0xffffffffu;

using Mass = unsigned long long;  // in units of 2^-60

static __device__ Mass mass_units(float probability) {
  const float positive = probability > 0.f ? probability : 0.f;  // NaN has none
  return static_cast<Mass>((positive < 1.f ? positive : 1.f) * 0x1p60f);
}

// Called by whole warps: how many of the numbers below `length` come before the first that is refused.
template <class Keeps>
static __device__ long long leading(long long length, Keeps keeps) {
  const int lane = threadIdx.x % 32;
  for (long long first = 0; first < length; first += 32) {
    const unsigned refused = __ballot_sync(kEveryLane, first + lane < length && !keeps(first + lane));
    if (refused) return first + __ffs(refused) - 1;
  }
  return length;
}

static __device__ long long within(int length, long long most) {
  return length < 0 ? 0 : (length < most ? length : most);
}

// Distribution to draw from: p, or max(p - q, 0), or p without one token.
struct Residual {
  const float* p;
  const float* q;
  long long without;  // -1: none

  __device__ Mass mass(long long token) const {
    if (token == without) return 0;
    return mass_units(q == nullptr ? p[token] : p[token] - q[token]);
  }
};

// Sum over this lane and those below it.
static __device__ Mass running_sum(Mass own) {
  const int lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    const Mass other = __shfl_up_sync(kEveryLane, own, step);
    if (lane >= step) own += other;
  }
  return own;
}

// The part of a vocabulary that is still looked at, and the running mass to exceed inside it.
struct Search {
  long long first, count;
  Mass threshold;
};

// Tokens of one warp's part: whole warps wide, so that lanes read side by side.
static __device__ long long part_of(long long count) {
  const long long share = (count + kWarps - 1) / kWarps;
  return (share + 31) / 32 * 32;
}

// Called by the whole block: the mass of all parts up to this lane's. `sums` must not be those of the call before: a
// slow warp may still read them.
static __device__ Mass parts_up_to(const Residual& from, const Search& search, Mass* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long part = part_of(search.count);
  const long long begin = warp * part, end = begin + part < search.count ? begin + part : search.count;
  Mass own = 0;
  for (long long i = begin + lane; i < end; i += 32) own += from.mass(search.first + i);
  own = running_sum(own);
  if (lane == 31) sums[warp] = own;
  __syncthreads();
  return running_sum(sums[lane]);
}

// Called by whole warps: the first lane whose running mass exceeds the threshold. There is one, for the last lane has
// the whole mass; inside the part it stands for, that holds again (even if a sum has overflowed).
static __device__ int first_past(Mass threshold, Mass running) {
  return __ffs(__ballot_sync(kEveryLane, running > threshold)) - 1;
}

// Called by whole warps: goes into the part that holds the token.
static __device__ Search inside(const Search& search, Mass up_to) {
  const int chosen = first_past(search.threshold, up_to);
  const Mass skipped = __shfl_sync(kEveryLane, up_to, chosen > 0 ? chosen - 1 : 0);
  const long long part = part_of(search.count), first = chosen * part, rest = search.count - first;
  return {search.first + first, part < rest ? part : rest, search.threshold - (chosen > 0 ? skipped : 0)};
}

// Called by the whole block: the first token whose running mass exceeds uniform * total; -1 where there is no mass.
static __device__ long long draw(const Residual& from, long long vocabulary, float uniform, Mass (*sums)[kWarps]) {
  Search search = {0, vocabulary, 0};
  const Mass up_to = parts_up_to(from, search, sums[0]);
  const Mass total = __shfl_sync(kEveryLane, up_to, 31);
  if (total == 0) return -1;
  const double share = uniform > 0.f ? (uniform < 1.f ? uniform : 1.f) : 0.f;
  const Mass threshold = static_cast<Mass>(share * static_cast<double>(total));
  search.threshold = threshold < total ? threshold : total - 1;
  search = inside(search, up_to);
  for (int round = 1; search.count > 32; ++round) search = inside(search, parts_up_to(from, search, sums[round % 2]));
  const int lane = threadIdx.x % 32;
  const Mass running = running_sum(lane < search.count ? from.mass(search.first + lane) : 0);
  return search.first + first_past(search.threshold, running);
}

// A row per block of 32 threads. drafts [rows, most], choices [rows, most + 1].
extern "C" __global__ void __launch_bounds__(32)
    accept_drafts_greedy(const long long* drafts, const int* lengths, const long long* choices, long long most,
                         int* accepted, long long* token) {
  const long long row = blockIdx.x;
  drafts += row * most;
  choices += row * (most + 1);
  const long long kept = leading(within(lengths[row], most), [&](long long i) { return drafts[i] == choices[i]; });
  if (threadIdx.x == 0) {
    accepted[row] = static_cast<int>(kept);
    token[row] = choices[kept];
  }
}

// A row per block of 32 * kWarps threads. drafts [rows, most], uniforms [rows, most + 1]; p [rows, most + 1,
// vocabulary] and q [rows, most, vocabulary] (null: drafts are certain) are dense in their last axis.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    accept_drafts_sampled(const long long* drafts, const int* lengths, const float* p, long long p_row,
                          long long p_place, const float* q, long long q_row, long long q_place, const float* uniforms,
                          long long most, long long vocabulary, int* accepted, long long* token) {
  __shared__ Mass sums[4][kWarps];
  const long long row = blockIdx.x, length = within(lengths[row], most);
  drafts += row * most;
  uniforms += row * (most + 1);
  p += row * p_row;
  if (q != nullptr) q += row * q_row;
  const long long kept = leading(length, [&](long long i) {
    const long long draft = drafts[i];
    if (draft < 0 || draft >= vocabulary) return false;
    const double certain = q == nullptr ? 1.f : q[i * q_place + draft];
    return uniforms[i] * certain < static_cast<double>(p[i * p_place + draft]);
  });
  const Residual whole = {p + kept * p_place, nullptr, -1};
  long long drawn = -1;
  if (kept < length) {
    Residual refused = whole;
    if (q == nullptr) {
      refused.without = drafts[kept];
    } else {
      refused.q = q + kept * q_place;
    }
    drawn = draw(refused, vocabulary, uniforms[most], sums);
  }
  // Everything was kept, or rounding left nothing of the difference.
  if (drawn < 0) drawn = draw(whole, vocabulary, uniforms[most], sums + 2);
  if (threadIdx.x == 0) {
    accepted[row] = static_cast<int>(kept);
    token[row] = drawn;
  }
}
