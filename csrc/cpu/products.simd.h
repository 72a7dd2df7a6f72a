// Products without matrix tiles, and the epilogues of all.

// Two cache lines of what will be wanted soon.
DYN_INLINE void fetch(Ahead& ahead) {
  if (ahead.at[0] >= ahead.end[0]) return;
  __builtin_prefetch(ahead.at[0], 0, 2);
  __builtin_prefetch(ahead.at[0] + 64, 0, 2);
  ahead.at[0] += 128;
}

// Fewer than 16 elements, zeros after them.
template <class T>
DYN_INLINE Lanes load_some(const T* from, int64_t count) {
  if (count == kLanes) return load(from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

// results[r * kPanel + o] = dot(x row r, weight row o) for kRows x kOutputs. Sixteen lanes run along the channels,
// zeros past the last.
template <int kRows, int kOutputs, class T>
DYN_INLINE void dots(const float* x, const T* weight, int64_t width, Ahead& ahead, float* results) {
  Lanes total[kRows][kOutputs] = {};
  int64_t i = 0;
  const auto step = [&](const auto& lanes_of) __attribute__((always_inline)) {
    Lanes row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = lanes_of(x + r * width + i);
    for (int o = 0; o < kOutputs; ++o) {
      const Lanes w = lanes_of(weight + o * width + i);
      for (int r = 0; r < kRows; ++r) total[r][o] += row[r] * w;
    }
  };
  for (; i + kLanes <= width; i += kLanes) {
    if constexpr (kRows > 1) fetch(ahead);  // alone, a row waits for its weights anyway
    step([](const auto* from) __attribute__((always_inline)) { return load(from); });
  }
  if (i < width) step([&](const auto* from) __attribute__((always_inline)) { return load_some(from, width - i); });
  float found[kRows * kOutputs];
  if constexpr (kRows * kOutputs == kLanes) {
    store(found, sums(reinterpret_cast<const Lanes(&)[kLanes]>(total)));
  } else {
    for (int at = 0; at < kRows * kOutputs; ++at) found[at] = sum(total[at / kOutputs][at % kOutputs]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOutputs; ++o) results[r * kPanel + o] = found[r * kOutputs + o];
}

template <int kRows, int kOutputs, class T>
DYN_INLINE void dots_of_rows(const float* x, int64_t rows, const T* weight, int64_t width, Ahead& ahead,
                             float* results) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    dots<kRows, kOutputs>(x + row * width, weight, width, ahead, results + row * kPanel);
  for (; row < rows; ++row) dots<1, kOutputs>(x + row * width, weight, width, ahead, results + row * kPanel);
}

template <int kRows, int kOutputs, class T>
DYN_INLINE void panel_of_dots(const float* x, int64_t rows, const T* weight, int64_t outputs, int64_t width,
                              Ahead& ahead, float* results) {
  // Rows in blocks that stay in the first-level cache while the panel's weights pass.
  constexpr int64_t kBlock = 16;
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t count = std::min(kBlock, rows - row);
    const float* from = x + row * width;
    float* to = results + row * kPanel;
    int64_t o = 0;
    for (; o + kOutputs <= outputs; o += kOutputs)
      dots_of_rows<kRows, kOutputs>(from, count, weight + o * width, width, ahead, to + o);
    for (; o < outputs; ++o) dots_of_rows<kRows, 1>(from, count, weight + o * width, width, ahead, to + o);
  }
}

// Sums of `outputs` <= 16 outputs. Those of a block fit the vector registers: 32 of 16 lanes with AVX-512, 16 of 8 with
// AVX2.
template <class T>
void vector_panel(const float* x, int64_t rows, const T* weight, int64_t outputs, int64_t width, Ahead& ahead,
                  float* results) {
  constexpr int kBlock = DYN_LEVEL == 4 ? 4 : 2;
  panel_of_dots<kBlock, kBlock>(x, rows, weight, outputs, width, ahead, results);
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

// The epilogue of outputs [first, first + count), count <= 16, of all rows of a product.
template <class T>
void finish_panel(const Product<T>& p, const float* sums, const float* sums2, int64_t first, int64_t count) {
  const Lanes bias = p.bias ? load_some(p.bias + first, count) : Lanes{};
  const Lanes bias2 = p.bias2 ? load_some(p.bias2 + first, count) : Lanes{};
  for (int64_t row = 0; row < p.rows; ++row) {
    Lanes y = rounded<T>(load(sums + row * kPanel) + bias);
    if (p.weight2 != nullptr)
      y = rounded<T>(rounded<T>(activated(y, p.activation)) * rounded<T>(load(sums2 + row * kPanel) + bias2));
    const int64_t at = row * p.outputs + first;
    if (p.residual != nullptr) y = load_some(p.residual + at, count) + y;
    if (p.wide != nullptr)
      store_some(p.wide + at, rounded<T>(y), count);
    else
      store_some(p.out + at, y, count);
  }
}

template <class T>
void widen_rows(const T* from, float* to, int64_t count) {
  to_floats(to, from, count);
}
