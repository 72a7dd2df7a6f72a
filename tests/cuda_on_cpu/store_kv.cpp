// csrc/cuda/store_kv.cu on the CPU against rotation and rounding written down with ldexp and nearbyint. Usage:
//   store_kv layout           sizes and offsets of the structures that Python fills
//   store_kv every TYPE       every bit pattern of a type, turned by an angle of zero, comes back
//   store_kv TYPE ROWS QUERIES HEADS KV_HEADS HEAD_DIM ROTARY SHIFT SEED
// TYPE is float32, bfloat16 or float16; SHIFT elements lie before every first row and between heads. Exit status 1 and
// a message if wrong. As a shared library it launches for tests/cuda_programs.py.
#include "cuda_on_cpu.h"
#ifndef SOURCE
#define SOURCE "../../csrc/cuda/store_kv.cu"
#endif
#include SOURCE

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace {

int wrong(const char* what, long long at) {
  std::printf("wrong %s at %lld\n", what, at);
  return 1;
}

// A binary format: bits of the fraction and of the exponent.
struct Format {
  int fraction, exponent;

  int bias() const { return (1 << (exponent - 1)) - 1; }

  double value(unsigned bits) const {
    const int e = static_cast<int>(bits >> fraction) & ((1 << exponent) - 1);
    const double f = bits & ((1u << fraction) - 1), sign = bits >> (fraction + exponent) & 1 ? -1 : 1;
    if (e == (1 << exponent) - 1) return f != 0 ? std::nan("") : sign * HUGE_VAL;
    return sign * (e == 0 ? std::ldexp(f, 1 - bias() - fraction)
                          : std::ldexp(f + std::ldexp(1, fraction), e - bias() - fraction));
  }

  // The nearest number of this format, the even one of two.
  double nearest(double x) const {
    if (!std::isfinite(x) || x == 0) return x;
    int e = 0;
    std::frexp(x, &e);
    const int place = std::max(e - 1, 1 - bias()) - fraction;
    const double y = std::ldexp(std::nearbyint(std::ldexp(x, -place)), place);
    return std::abs(y) >= std::ldexp(1, bias() + 1) ? std::copysign(HUGE_VAL, x) : y;
  }
};

template <class Number>
constexpr Format kFormat = {23, 8};
template <>
constexpr Format kFormat<BFloat16> = {7, 8};
template <>
constexpr Format kFormat<Float16> = {10, 5};

unsigned bits_of(float x) { return std::bit_cast<unsigned>(x); }
unsigned bits_of(unsigned short x) { return x; }

template <class Number>
double value_of(typename Number::Stored x) {
  return kFormat<Number>.value(bits_of(x));
}

template <class Number>
bool is(typename Number::Stored found, double wanted) {
  const double x = value_of<Number>(found);
  return std::isnan(wanted) ? std::isnan(x) : x == wanted && std::signbit(x) == std::signbit(wanted);
}

// [rows, heads, dim] with `shift` elements before the first row and behind every head, any bits at all in between.
template <class Stored>
struct Tensor {
  std::vector<Stored> memory;
  long long row, head, shift;

  Tensor(long long rows, int heads, int dim, int shift, std::mt19937& random)
      : row((dim + shift) * heads + shift), head(dim + shift), shift(shift) {
    memory.resize(shift + rows * row);
    for (Stored& x : memory) {
      const unsigned bits = static_cast<unsigned>(random());
      std::memcpy(&x, &bits, sizeof x);
    }
  }
  Stored* at(long long r, int h) { return memory.data() + shift + r * row + h * head; }
  Heads heads() { return {at(0, 0), row, head}; }
  bool wide(int dim) {
    return ((reinterpret_cast<std::uintptr_t>(at(0, 0)) | (sizeof(Stored) * row) | (sizeof(Stored) * head) |
             (sizeof(Stored) * dim)) %
            16) == 0;
  }
};

template <class Number>
void launch(const Arguments& arguments, long long rows, unsigned threads, unsigned seed) {
  auto kernel = store_kv_float32;
  if (std::is_same_v<Number, BFloat16>) kernel = store_kv_bfloat16;
  if (std::is_same_v<Number, Float16>) kernel = store_kv_float16;
  cuda_on_cpu::launch(kernel, static_cast<unsigned>(rows), threads, seed, arguments);
}

// What turning a head gives; products and sums are rounded to float, the result to the format.
template <class Number>
int check_head(const typename Number::Stored* from, const typename Number::Stored* to, int dim, int rotary,
               const float* cos, const float* sin) {
  for (int i = 0; i < rotary; ++i) {
    const float a = static_cast<float>(value_of<Number>(from[i])),
                b = static_cast<float>(value_of<Number>(from[rotary + i]));
    const float first = a * cos[i] - b * sin[i], second = b * cos[i] + a * sin[i];
    if (!is<Number>(to[i], kFormat<Number>.nearest(first))) return wrong("first of a pair, channel", i);
    if (!is<Number>(to[rotary + i], kFormat<Number>.nearest(second))) return wrong("second of a pair, channel", i);
  }
  if (std::memcmp(from + 2 * rotary, to + 2 * rotary, (dim - 2 * rotary) * sizeof *from) != 0)
    return wrong("channel that passes through, of", dim);
  return 0;
}

template <class Number>
int check(int rows, int queries, int heads, int kv_heads, int dim, int rotary, int shift, unsigned seed) {
  using Stored = typename Number::Stored;
  constexpr int kPositions = 5;
  std::mt19937 random(seed);
  Tensor<Stored> q(queries, heads, dim, shift, random), k(rows, kv_heads, dim, shift, random),
      v(rows, kv_heads, dim, shift, random), rotated(rows, heads, dim, 0, random),
      pages(2 * (rows + 3) + 1, kv_heads, dim, 0, random);
  // Tables of any floats, for results of every size; of unaligned address where the tensors are.
  std::vector<float> cos(kPositions * rotary + shift), sin(cos.size());
  for (auto* table : {&cos, &sin})
    for (float& x : *table)
      x = std::ldexp(static_cast<float>(random() % 4097) / 2048 - 1, static_cast<int>(random() % 30) - 15);
  std::vector<int> pos(rows), slots(rows);
  for (int i = 0; i < rows; ++i) pos[i] = static_cast<int>(random() % kPositions), slots[i] = i + 2;
  std::shuffle(slots.begin(), slots.end(), random);
  for (int i = 0; i < rows; i += 3) slots[i] = -1;
  // What a GPU's own NaN looks like: all bits set, which rounding must not carry into the sign.
  if (rotary > 2) cos[shift + 2] = std::bit_cast<float>(0x7fffffffu);
  const bool counted = seed % 2 == 0;
  const int live = counted ? queries / 2 : queries;
  const float *cosines = rotary ? cos.data() + shift : nullptr, *sines = rotary ? sin.data() + shift : nullptr;
  const bool tables_wide =
      (reinterpret_cast<std::uintptr_t>(cosines) | reinterpret_cast<std::uintptr_t>(sines)) % 16 == 0;
  const bool pages_wide = reinterpret_cast<std::uintptr_t>(pages.at(1, 0)) % 16 == 0;
  Arguments a{};
  a.q = q.heads(), a.k = k.heads(), a.v = v.heads();
  a.rotated = rotated.memory.data(), a.pages = pages.at(1, 0);  // what lies before is slot -1, so to speak
  a.cos = cosines, a.sin = sines, a.pos = pos.data(), a.slots = slots.data(), a.live = counted ? &live : nullptr;
  a.q_rows = queries, a.plane = static_cast<long long>(rows + 3) * kv_heads * dim;
  a.heads = heads, a.kv_heads = kv_heads, a.head_dim = dim, a.rotary = rotary;
  a.wide_turn = q.wide(dim) && k.wide(dim) && pages_wide && rotary * sizeof(Stored) % 16 == 0 && tables_wide;
  a.wide_copy = v.wide(dim) && pages_wide;
  const Tensor<Stored> rotated_before = rotated;
  Tensor<Stored> pages_after = pages;  // what must be there, but for the keys, which are judged one by one
  launch<Number>(a, rows, 32 * (1 + seed % 5), seed);

  for (int row = 0; row < rows; ++row) {
    const float *c = cosines + (rotary ? pos[row] * rotary : 0), *s = sines + (rotary ? pos[row] * rotary : 0);
    for (int head = 0; row < live && head < heads; ++head)
      if (check_head<Number>(q.at(row, head), rotated.at(row, head), dim, rotary, c, s))
        return wrong("query of row", row);
    for (int head = 0; slots[row] >= 0 && head < kv_heads; ++head) {
      const Stored* key = pages.at(1 + slots[row], head);
      if (check_head<Number>(k.at(row, head), key, dim, rotary, c, s)) return wrong("key of row", row);
      std::memcpy(pages_after.at(1 + slots[row], head), key, dim * sizeof(Stored));
      std::memcpy(pages_after.at(1 + rows + 3 + slots[row], head), v.at(row, head), dim * sizeof(Stored));
    }
  }
  if (std::memcmp(pages_after.memory.data(), pages.memory.data(), pages.memory.size() * sizeof(Stored)) != 0)
    return wrong("value or untouched slot, of", rows);
  const std::size_t done = static_cast<std::size_t>(live) * heads * dim;
  if (std::memcmp(rotated.memory.data() + done, rotated_before.memory.data() + done,
                  (rotated.memory.size() - done) * sizeof(Stored)) != 0)
    return wrong("query past live", live);
  return 0;
}

// Conversions there and back are exact, whatever the bits: 8 channels a row, beside zeros, turned by nothing.
template <class Number>
int check_every() {
  using Stored = typename Number::Stored;
  constexpr int kRows = (1 << 16) / 8, kDim = 16, kRotary = 8;
  std::vector<Stored> q(kRows * kDim), rotated(kRows * kDim);
  for (unsigned bits = 0; bits < 1u << 16; ++bits) {
    const unsigned pattern = sizeof(Stored) == 2 ? bits : bits << 16 | (bits * 40503u & 0xffffu);
    std::memcpy(&q[bits / 8 * kDim + bits % 8], &pattern, sizeof(Stored));
  }
  const std::vector<float> cos(kRotary, 1.f), sin(kRotary, 0.f);
  const std::vector<int> pos(kRows, 0), slots(kRows, -1);
  Arguments a{};
  a.q = {q.data(), kDim, kDim}, a.rotated = rotated.data(), a.q_rows = kRows;
  a.cos = cos.data(), a.sin = sin.data(), a.pos = pos.data(), a.slots = slots.data();
  a.heads = 1, a.kv_heads = 0, a.head_dim = kDim, a.rotary = kRotary, a.wide_turn = 1;
  launch<Number>(a, kRows, 32, 1);
  for (int i = 0; i < kRows * kDim; ++i) {
    const double wanted = value_of<Number>(q[i]);
    if (i % kDim < kRotary && !is<Number>(rotated[i], wanted)) return wrong("bits, as they came, at", i);
  }
  return 0;
}

template <class Number>
int run(int count, char** arguments) {
  const auto number = [&](int at) { return std::atoi(arguments[at]); };
  if (count == 3) return check_every<Number>();
  return check<Number>(number(2), number(3), number(4), number(5), number(6), number(7), number(8), number(9));
}

}  // namespace

CUDA_ON_CPU_LIBRARY(NamedKernel("store_kv_float32", store_kv_float32),
                    NamedKernel("store_kv_bfloat16", store_kv_bfloat16),
                    NamedKernel("store_kv_float16", store_kv_float16))

int main(int count, char** arguments) {
  if (count == 2 && std::string(arguments[1]) == "layout") {
#define OFFSET(field) offsetof(Arguments, field)
    for (const std::size_t number :
         {sizeof(Heads), sizeof(Arguments), OFFSET(rotated), OFFSET(pages), OFFSET(cos), OFFSET(sin), OFFSET(pos),
          OFFSET(slots), OFFSET(live), OFFSET(q_rows), OFFSET(plane), OFFSET(heads), OFFSET(kv_heads), OFFSET(head_dim),
          OFFSET(rotary), OFFSET(wide_turn), OFFSET(wide_copy)})
      std::printf("%zu ", number);
    return 0;
  }
  if (count != 3 && count != 10) return 2;
  const std::string type = count == 3 ? arguments[2] : arguments[1];
  try {
    if (type == "float32") return run<Float32>(count, arguments);
    if (type == "bfloat16") return run<BFloat16>(count, arguments);
    if (type == "float16") return run<Float16>(count, arguments);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 2;
}
