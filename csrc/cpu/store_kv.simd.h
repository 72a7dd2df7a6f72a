// Rotation of one head.

template <class T>
void rotate_head(const T* from, T* to, int64_t head_dim, const Rotary& table, int64_t pos) {
  const float* cos = table.cos + pos * table.rotary;
  const float* sin = table.sin + pos * table.rotary;
  const int64_t half = table.rotary;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Lanes a = load(from + i), b = load(from + half + i), c = load(cos + i), s = load(sin + i);
    store(to + i, a * c - b * s);
    store(to + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = to_float(from[i]), b = to_float(from[i + half]);
    to[i] = static_cast<T>(a * cos[i] - b * sin[i]);
    to[i + half] = static_cast<T>(b * cos[i] + a * sin[i]);
  }
  for (i = 2 * half; i < head_dim; ++i) to[i] = from[i];
}
