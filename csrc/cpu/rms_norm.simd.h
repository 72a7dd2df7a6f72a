// RMSNorm of rows, sums in fp32.

template <class T>
void rms_norm(const T* from, T* to, int64_t rows, int64_t width, const T* gain, NormStyle style, float eps) {
  for (int64_t row = 0; row < rows; ++row, from += width, to += width) {
    Lanes squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes)
      for (int part = 0; part < 2; ++part) {
        const Lanes x = load(from + i + part * kLanes);
        squares[part] += x * x;
      }
    float square = sum(squares[0] + squares[1]);
    for (; i < width; ++i) square += to_float(from[i]) * to_float(from[i]);
    const float inverse = 1.f / std::sqrt(square / static_cast<float>(width) + eps);
    for (i = 0; i + kLanes <= width; i += kLanes) {
      const Lanes x = load(from + i) * inverse;
      if (gain == nullptr) {
        store(to + i, x);
        continue;
      }
      const Lanes g = load(gain + i);
      store(to + i, style == NormStyle::llama ? rounded<T>(x) * g : x * (1.f + g));
    }
    for (; i < width; ++i) {
      const float x = to_float(from[i]) * inverse, g = gain == nullptr ? 0.f : to_float(gain[i]);
      to[i] = static_cast<T>(gain == nullptr             ? x
                             : style == NormStyle::llama ? to_float(static_cast<T>(x)) * g
                                                         : x * (1.f + g));
    }
  }
}
