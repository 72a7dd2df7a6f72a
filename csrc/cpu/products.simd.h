// Products without matrix tiles, and the epilogues of all.

// Fewer than 16 elements, zeros after them.
template <class T>
DYN_INLINE Lanes load_some(const T* from, int64_t count) {
  if (count == kLanes) return load(from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

// What a step of dot products takes of a row or of a weight row: 16 channels as fp32, or 32 as the bf16 they are, where
// the processor multiplies and adds pairs of those.
template <class X>
constexpr int64_t kStep = DYN_LEVEL == 5 && std::is_same_v<X, BFloat16> ? 2 * kLanes : kLanes;

template <class T, int64_t kCount>
struct Channels {
  Lanes lanes;

  DYN_INLINE static Channels at(const T* from) { return {load(from)}; }
  DYN_INLINE static Channels some(const T* from, int64_t count) { return {load_some(from, count)}; }
};
template <class X, class T>
DYN_INLINE void add_products(Lanes& total, const Channels<X, kLanes>& x, const Channels<T, kLanes>& weight) {
  total += x.lanes * weight.lanes;
}

#if DYN_LEVEL == 5
template <>
struct Channels<BFloat16, 2 * kLanes> {
  __m512bh pairs;

  DYN_INLINE static Channels at(const BFloat16* from) {
    Channels channels;
    std::memcpy(&channels.pairs, from, sizeof channels.pairs);
    return channels;
  }
  DYN_INLINE static Channels some(const BFloat16* from, int64_t count) {
    BFloat16 padded[2 * kLanes] = {};
    std::memcpy(padded, from, count * sizeof(BFloat16));
    return at(padded);
  }
};
// A lane adds the odd channel's product, then the even one's; subnormals count as 0, as on matrix tiles.
DYN_INLINE void add_products(Lanes& total, const Channels<BFloat16, 2 * kLanes>& x,
                             const Channels<BFloat16, 2 * kLanes>& weight) {
  total = (Lanes)_mm512_dpbf16_ps((__m512)total, x.pairs, weight.pairs);
}
#endif

// results[r * kPanel + o] = dot(x row r, weight row o) for kRows x kOutputs. Sixteen lanes run along the channels,
// zeros past the last. kWhole: there is none past the last; what fills up vectors would keep sums out of registers.
template <bool kWhole, int kRows, int kOutputs, class X, class T>
DYN_INLINE void dots(const X* x, const T* weight, int64_t width, Ahead& ahead, float* results) {
  using Row = Channels<X, kStep<X>>;
  using Weight = Channels<T, kStep<X>>;
  Lanes total[kRows][kOutputs] = {};
  int64_t i = 0;
  const auto step = [&](const auto& row_at, const auto& weight_at) __attribute__((always_inline)) {
    Row row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = row_at(x + r * width + i);
    for (int o = 0; o < kOutputs; ++o) {
      const Weight w = weight_at(weight + o * width + i);
      for (int r = 0; r < kRows; ++r) add_products(total[r][o], row[r], w);
    }
  };
  Ahead::Lines soon = ahead.take(width / kStep<X>);
  const int64_t per_step = soon.count * kStep<X> / (width + 1) + 1;
  for (; i + kStep<X> <= width; i += kStep<X>) {
    if (soon.count > 0) {
      for (int64_t line = 0; line < per_step; ++line) __builtin_prefetch(soon.at + line * 64, 0, 2);
      soon.at += per_step * 64;
      soon.count -= per_step;
    }
    step(Row::at, Weight::at);
  }
  if (!kWhole && i < width)
    step([&](const X* from) __attribute__((always_inline)) { return Row::some(from, width - i); },
         [&](const T* from) __attribute__((always_inline)) { return Weight::some(from, width - i); });
  if constexpr (kRows * kOutputs == kLanes) {
    // Outputs of a row together: one by one, stores take as many cycles as a ninth of the products of 576 channels.
    const Lanes found = sums(reinterpret_cast<const Lanes(&)[kLanes]>(total));
    for (int r = 0; r < kRows; ++r)
      std::memcpy(results + r * kPanel, reinterpret_cast<const float*>(&found) + r * kOutputs,
                  kOutputs * sizeof(float));
  } else {
    for (int r = 0; r < kRows; ++r)
      for (int o = 0; o < kOutputs; ++o) results[r * kPanel + o] = sum(total[r][o]);
  }
}

template <bool kWhole, int kRows, int kOutputs, class X, class T>
DYN_INLINE void dots_of_rows(const X* x, int64_t rows, const T* weight, int64_t width, Ahead& ahead, float* results) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    dots<kWhole, kRows, kOutputs>(x + row * width, weight, width, ahead, results + row * kPanel);
  for (; row < rows; ++row) dots<kWhole, 1, kOutputs>(x + row * width, weight, width, ahead, results + row * kPanel);
}

template <bool kWhole, int kRows, int kOutputs, class X, class T>
DYN_INLINE void panel_of_dots(const X* x, int64_t rows, const T* weight, int64_t outputs, int64_t width, Ahead& ahead,
                              float* results) {
  // Rows in blocks that stay in the first-level cache while the panel's weights pass.
  const int64_t block = width * static_cast<int64_t>(sizeof(X)) > 2048 ? 8 : 16;
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t count = std::min(block, rows - row);
    const X* from = x + row * width;
    float* to = results + row * kPanel;
    int64_t o = 0;
    for (; o + kOutputs <= outputs; o += kOutputs)
      dots_of_rows<kWhole, kRows, kOutputs>(from, count, weight + o * width, width, ahead, to + o);
    for (; o < outputs; ++o) dots_of_rows<kWhole, kRows, 1>(from, count, weight + o * width, width, ahead, to + o);
  }
}

// Rows and outputs that are summed together: their sums fit the vector registers, 32 of 16 lanes with AVX-512, 16 of 8
// with AVX2.
constexpr int kBlock = DYN_LEVEL >= 4 ? 4 : 2;
inline int64_t block_of_dots() { return kBlock; }

// Sums of `outputs` <= 16 outputs. x is fp32, or bf16 as it lies.
template <class X, class T>
void vector_panel(const X* x, int64_t rows, const T* weight, int64_t outputs, int64_t width, Ahead& ahead,
                  float* results) {
  if (width % kStep<X> == 0)
    panel_of_dots<true, kBlock, kBlock>(x, rows, weight, outputs, width, ahead, results);
  else
    panel_of_dots<false, kBlock, kBlock>(x, rows, weight, outputs, width, ahead, results);
}

DYN_INLINE Lanes magnitude(Lanes x) { return (Lanes)((UintLanes)x & 0x7fffffffu); }

// 1 / (1 + exp(-x)) without overflow: exp of minus the magnitude, and the other half by symmetry.
DYN_INLINE Lanes sigmoid(Lanes x) {
  const Lanes e = exp_nonpositive(-magnitude(x));
  return x >= 0.f ? 1.f / (1.f + e) : e / (1.f + e);
}

DYN_INLINE Lanes activated(Lanes x, Activation kind) {
  switch (kind) {
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::gelu_tanh:  // 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
      return x * sigmoid(2.f * 0.7978845608028654f * (x + 0.044715f * x * x * x));
    default: {
      Lanes y;
      for (int i = 0; i < kLanes; ++i) y[i] = 0.5f * x[i] * (1.f + std::erf(x[i] * 0.7071067811865476f));
      return y;
    }
  }
}

template <class T>
DYN_INLINE void store_some(T* to, Lanes lanes, int64_t count) {
  if (count == kLanes) return store(to, lanes);
  T padded[kLanes];
  store(padded, lanes);
  std::memcpy(to, padded, count * sizeof(T));
}

// Lanes that are rounded to T already.
template <class T>
DYN_INLINE void store_rounded(T* to, Lanes lanes) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const ShortLanes low = __builtin_convertvector((UintLanes)lanes >> 16, ShortLanes);
    std::memcpy(to, &low, sizeof low);
  } else {
    store(to, lanes);
  }
}

// The compiler may not go on from an unrounded product: modules round it before they add.
DYN_INLINE void settle(Lanes& y) { asm("" : "+m"(y)); }

// What the sums of 16 outputs of a row become, rounded to T.
template <bool kGated, bool kResidual, class T>
DYN_INLINE Lanes finished(const Product<T>& p, Lanes y, Lanes gate, Lanes bias, Lanes bias2, Lanes residual) {
  y = rounded<T>(y + bias);
  if constexpr (kGated) y = rounded<T>(rounded<T>(activated(y, p.activation)) * rounded<T>(gate + bias2));
  if constexpr (kGated && std::is_same_v<T, float>) settle(y);
  if constexpr (kResidual) y = rounded<T>(residual + y);
  return y;
}

// Full panels, one or two beside each other (a gated product has one): both halves of a cache line are written
// together.
template <bool kGated, bool kResidual, int kPanels, class T>
DYN_INLINE void finish_full(const Product<T>& p, const float* sums, const float* sums2, int64_t begin, int64_t end,
                            int64_t first) {
  Lanes bias[kPanels], bias2{};
  for (int panel = 0; panel < kPanels; ++panel) bias[panel] = p.bias ? load(p.bias + first + panel * kPanel) : Lanes{};
  if (kGated && p.bias2) bias2 = load(p.bias2 + first);
  for (int64_t row = begin; row < end; ++row) {
    for (int panel = 0; panel < kPanels; ++panel) {
      const int64_t from = (row - begin) * kPanel, at = row * p.outputs + first + panel * kPanel;
      const Lanes gate = kGated ? load(sums2 + from) : Lanes{}, residual = kResidual ? load(p.residual + at) : Lanes{};
      const Lanes y =
          finished<kGated, kResidual>(p, load((panel ? sums2 : sums) + from), gate, bias[panel], bias2, residual);
      if (p.wide != nullptr)
        store(p.wide + at, y);
      else
        store_rounded(p.out + at, y);
    }
  }
}

// The epilogue of outputs [first, first + count) of rows [begin, end) of a product, whose sums start at row `begin`.
// `sums2` are those of weight2, or of outputs 16 to 31: count <= 16 where there is none of the latter, else 32.
template <class T>
void finish_panel(const Product<T>& p, const float* sums, const float* sums2, int64_t begin, int64_t end, int64_t first,
                  int64_t count) {
  const bool gated = p.weight2 != nullptr, residual = p.residual != nullptr;
  if (count == 2 * kPanel) {
    if (residual) return finish_full<false, true, 2>(p, sums, sums2, begin, end, first);
    return finish_full<false, false, 2>(p, sums, sums2, begin, end, first);
  }
  if (count == kPanel) {
    if (gated && residual) return finish_full<true, true, 1>(p, sums, sums2, begin, end, first);
    if (gated) return finish_full<true, false, 1>(p, sums, sums2, begin, end, first);
    if (residual) return finish_full<false, true, 1>(p, sums, sums2, begin, end, first);
    return finish_full<false, false, 1>(p, sums, sums2, begin, end, first);
  }
  const Lanes bias = p.bias ? load_some(p.bias + first, count) : Lanes{};
  const Lanes bias2 = p.bias2 ? load_some(p.bias2 + first, count) : Lanes{};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t from = (row - begin) * kPanel, at = row * p.outputs + first;
    const Lanes y = load(sums + from), gate = gated ? load(sums2 + from) : Lanes{};
    Lanes done = gated ? finished<true, false>(p, y, gate, bias, bias2, Lanes{})
                       : finished<false, false>(p, y, gate, bias, bias2, Lanes{});
    if (residual) done = load_some(p.residual + at, count) + done;
    if (p.wide != nullptr)
      store_some(p.wide + at, rounded<T>(done), count);
    else
      store_some(p.out + at, done, count);
  }
}

template <class T>
void widen_rows(const T* from, float* to, int64_t count) {
  to_floats(to, from, count);
}
