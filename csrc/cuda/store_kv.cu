// store_kv on a GPU: rotary embedding of q and k, then K and V of every row into its page slot.
//
// A block per row. Its threads share the row's pieces: of a rotated head, as many channels of the first half of the
// pairs as fit 16 bytes and those of the second half that belong to them; of what is only copied, 16 bytes. Where an
// address, a stride or a size does not allow that, pieces are single channels; rotating and copying decide apart, for a
// rotary width that is odd says nothing of V. Nothing is read back by the host.
//
// Plain pointers, sizes, strides; no torch headers, and none of CUDA's: an installed NVRTC has no folder of headers, so
// half precision is converted by its bits. Compiled through NVRTC at first use, by nvcc in a pinch, and by g++ against
// tests/cuda_on_cpu/ for tests.

constexpr int kPieceBytes = 16;

struct Float32 {
  using Stored = float;
  static __device__ float wide(Stored x) { return x; }
  static __device__ Stored narrow(float x) { return x; }
};

struct BFloat16 {
  using Stored = unsigned short;
  static __device__ float wide(Stored x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
  static __device__ Stored narrow(float x) {  // nearest even; a NaN stays one
    const unsigned bits = __float_as_uint(x);
    return static_cast<Stored>((x == x ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x400000u) >> 16);
  }
};

struct Float16 {
  using Stored = unsigned short;
  // The exponent is rebased by a multiplication, which makes subnormals right as well; infinities and NaNs keep all
  // bits of theirs.
  static __device__ float wide(Stored x) {
    const unsigned magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
    const unsigned special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
    return __uint_as_float(__float_as_uint(__uint_as_float(magnitude) * 0x1p112f) | special | sign);
  }
  // Nearest even. Subnormals are rounded by the addition of a float whose last place is theirs.
  static __device__ Stored narrow(float x) {
    const unsigned bits = __float_as_uint(x), size = bits & 0x7fffffffu;
    unsigned result;
    if (size >= (143u << 23)) {
      result = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (size < (113u << 23)) {
      result = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;
    } else {
      result = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
    }
    return static_cast<Stored>(result | (bits >> 16 & 0x8000u));
  }
};

// [rows, heads, head_dim] with any strides (in elements) between rows and between heads.
struct Heads {
  const void* data;
  long long row, head;
};

struct Arguments {
  Heads q, k, v;
  void* rotated;     // [q_rows, heads, head_dim]
  void* pages;       // keys, then values: [slots, kv_heads, head_dim] each
  const float* cos;  // [positions, rotary]
  const float* sin;
  const int* pos;
  const int* slots;
  const int* live;          // null: every row that has a query
  long long q_rows, plane;  // plane: elements between keys and values
  int heads, kv_heads, head_dim;
  int rotary;                // half the number of rotated channels; 0: none are
  int wide_turn, wide_copy;  // whether heads are rotated, and V copied, in pieces of kPieceBytes
};

template <class Item, int kItems>
struct alignas(sizeof(Item) * kItems < kPieceBytes ? sizeof(Item) * kItems : kPieceBytes) Piece {
  Item item[kItems];
};

template <class P, class Item>
static __device__ P load(const Item* from) {
  return *reinterpret_cast<const P*>(from);
}

template <class P, class Item>
static __device__ void store(Item* to, const P& piece) {
  *reinterpret_cast<P*>(to) = piece;
}

template <class Stored>
static __device__ const Stored* head_of(const Heads& heads, long long row, int head) {
  return static_cast<const Stored*>(heads.data) + row * heads.row + head * heads.head;
}

template <int kItems, class Stored>
static __device__ void copy(const Stored* from, Stored* to, int channel) {
  store(to + channel, load<Piece<Stored, kItems>>(from + channel));
}

// Piece `part` of a head: first those of the pairs (channels i and i + rotary), then those that pass through.
template <class Number, int kItems>
static __device__ void turn(const typename Number::Stored* from, typename Number::Stored* to, int part, int rotary,
                            const float* cos, const float* sin) {
  using Mine = Piece<typename Number::Stored, kItems>;
  const int channel = part * kItems;
  if (channel >= rotary) {
    copy<kItems>(from, to, rotary + channel);
    return;
  }
  Mine first = load<Mine>(from + channel), second = load<Mine>(from + rotary + channel);
  const auto c = load<Piece<float, kItems>>(cos + channel), s = load<Piece<float, kItems>>(sin + channel);
  for (int i = 0; i < kItems; ++i) {
    const float a = Number::wide(first.item[i]), b = Number::wide(second.item[i]);
    first.item[i] = Number::narrow(a * c.item[i] - b * s.item[i]);
    second.item[i] = Number::narrow(b * c.item[i] + a * s.item[i]);
  }
  store(to + channel, first);
  store(to + rotary + channel, second);
}

// One row by all threads of a block.
template <class Number>
static __device__ void store_row(const Arguments& a) {
  using Stored = typename Number::Stored;
  constexpr int kWide = kPieceBytes / sizeof(Stored);
  const long long row = blockIdx.x, slot = a.slots[row];
  const bool has_query = row < a.q_rows && (a.live == nullptr || row < *a.live);
  const long long angles = a.rotary > 0 ? static_cast<long long>(a.pos[row]) * a.rotary : 0;
  const int turn_pieces = (a.head_dim - a.rotary) / (a.wide_turn ? kWide : 1);
  const int copy_pieces = a.head_dim / (a.wide_copy ? kWide : 1);
  const int turned = (a.heads + a.kv_heads) * turn_pieces, pieces = turned + a.kv_heads * copy_pieces;
  const long long query = row * a.heads * a.head_dim, key = slot * a.kv_heads * a.head_dim;
  Stored *rotated = static_cast<Stored*>(a.rotated), *pages = static_cast<Stored*>(a.pages);
  for (int piece = threadIdx.x; piece < pieces; piece += blockDim.x) {
    if (piece < turned) {
      const int part = piece % turn_pieces, head = piece / turn_pieces, kv_head = head - a.heads;
      const bool is_query = kv_head < 0;
      if (is_query ? !has_query : slot < 0) continue;
      const Stored* from = is_query ? head_of<Stored>(a.q, row, head) : head_of<Stored>(a.k, row, kv_head);
      Stored* to = is_query ? rotated + query + head * a.head_dim : pages + key + kv_head * a.head_dim;
      if (a.wide_turn) {
        turn<Number, kWide>(from, to, part, a.rotary, a.cos + angles, a.sin + angles);
      } else {
        turn<Number, 1>(from, to, part, a.rotary, a.cos + angles, a.sin + angles);
      }
    } else if (slot >= 0) {
      const int part = (piece - turned) % copy_pieces, head = (piece - turned) / copy_pieces;
      const Stored* from = head_of<Stored>(a.v, row, head);
      Stored* to = pages + a.plane + key + head * a.head_dim;
      if (a.wide_copy) {
        copy<kWide>(from, to, part * kWide);
      } else {
        copy<1>(from, to, part);
      }
    }
  }
}

// A row of k and v per block, of any number of threads.
extern "C" __global__ void __launch_bounds__(512) store_kv_float32(Arguments a) { store_row<Float32>(a); }
extern "C" __global__ void __launch_bounds__(512) store_kv_bfloat16(Arguments a) { store_row<BFloat16>(a); }
extern "C" __global__ void __launch_bounds__(512) store_kv_float16(Arguments a) { store_row<Float16>(a); }
