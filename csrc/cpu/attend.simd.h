// The arithmetic of ragged_attention: online softmax (Milakov & Gimelshein 2018) strip by strip of keys.

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Scores of 16 keys: dot products with q, one per lane.
template <int kParts>
DYN_INLINE Lanes scores_of(const float* keys, const float* q, int64_t dim) {
  Lanes total[kLanes];
  if constexpr (kParts > 0) {
    Lanes query[kParts];
    for (int part = 0; part < kParts; ++part) query[part] = load(q + part * kLanes);
    for (int key = 0; key < kLanes; ++key) {
      total[key] = load(keys + key * dim) * query[0];
      for (int part = 1; part < kParts; ++part) total[key] += load(keys + key * dim + part * kLanes) * query[part];
    }
    return sums(total);
  } else {
    float found[kLanes];
    for (int key = 0; key < kLanes; ++key) found[key] = dot(keys + key * dim, q, dim);
    return load(found);
  }
}

// sum += weights of keys [begin, end) times their values. Even and odd keys add up apart: twice the independent chains.
template <int kParts>
DYN_INLINE void add_values(float* sum, const float* values, const float* weights, int64_t begin, int64_t end,
                           int64_t dim) {
  if constexpr (kParts > 0) {
    Lanes even[kParts], odd[kParts] = {};
    for (int part = 0; part < kParts; ++part) even[part] = load(sum + part * kLanes);
    int64_t key = begin;
    for (; key + 2 <= end; key += 2)
      for (int part = 0; part < kParts; ++part) {
        even[part] += load(values + key * dim + part * kLanes) * weights[key];
        odd[part] += load(values + (key + 1) * dim + part * kLanes) * weights[key + 1];
      }
    if (key < end)
      for (int part = 0; part < kParts; ++part) even[part] += load(values + key * dim + part * kLanes) * weights[key];
    for (int part = 0; part < kParts; ++part) store(sum + part * kLanes, even[part] + odd[part]);
  } else {
    add_weighted_rows(sum, values + begin * dim, weights + begin, end - begin, dim);
  }
}

// One query and keys [begin, end) of a strip. What a query computes depends on its own keys only, never on the tile it
// shares: batch invariance starts here.
template <int kParts>
DYN_INLINE void absorb_strip(const AttentionProblem& p, const float* q, const float* keys, const float* values,
                             int64_t begin, int64_t end, float* sum_of_values, float* peak, float* mass,
                             float* weights) {
  const int64_t dim = p.head_dim;
  const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t from = begin / kLanes * kLanes;
  Lanes highest = splat(kNothing);
  for (int64_t k = from; k < end; k += kLanes) {
    Lanes score = scores_of<kParts>(keys + k * dim, q, dim) * p.scale;
    if (p.softcap > 0.f)
      for (int i = 0; i < kLanes; ++i) score[i] = p.softcap * std::tanh(score[i] / p.softcap);
    const IntLanes key = lane + static_cast<int32_t>(k);
    const IntLanes seen = (key >= static_cast<int32_t>(begin)) & (key < static_cast<int32_t>(end));
    score = seen ? score : splat(kNothing);
    store(weights + k, score);
    highest = ((score > highest) | (score != score)) ? score : highest;  // a NaN stays
  }
  const float best = std::max(max(highest), *peak);  // this order keeps a NaN
  if (best == kNothing) return;                      // nothing but -inf so far: no weight, and no -inf - -inf
  if (best > *peak) {
    const float shrink = std::exp(*peak - best);
    for (int64_t i = 0; i < dim; ++i) sum_of_values[i] *= shrink;
    *mass *= shrink;
    *peak = best;
  }
  Lanes total = {};
  for (int64_t k = from; k < end; k += kLanes) {
    const Lanes weight = exp_nonpositive(load(weights + k) - *peak);
    store(weights + k, weight);
    total += weight;
  }
  *mass += sum(total);
  add_values<kParts>(sum_of_values, values, weights, begin, end, dim);
}

template <int kParts, class T>
DYN_INLINE void attend_keys(const AttentionProblem& p, const T* q, const T* keys, const T* values, int64_t first,
                            int64_t last, int64_t kv_head, int64_t segment, Partial to, float* scratch) {
  const int64_t dim = p.head_dim, group = p.group();
  float* query = scratch;
  float* strip_keys = query + p.queries() * dim;
  float* strip_values = strip_keys + kStrip * dim;
  float* weights = strip_values + kStrip * dim;

  int64_t oldest = std::numeric_limits<int64_t>::max(), newest = -1;
  for (int64_t row = first; row < last; ++row) {
    newest = std::max<int64_t>(newest, p.pos[row]);
    oldest = std::min(oldest, p.oldest_key(row));
    for (int64_t g = 0; g < group; ++g) {
      float* into = query + ((row - first) * group + g) * dim;
      to_paired_floats(into, q + (row * p.heads + kv_head * group + g) * dim, dim);
    }
  }
  const int64_t queries = (last - first) * group;
  std::fill(to.sum, to.sum + queries * dim, 0.f);
  std::fill(to.peak, to.peak + queries, kNothing);
  std::fill(to.mass, to.mass + queries, 0.f);

  const int32_t* table = p.block_table + p.seq[first] * p.max_pages;
  const int64_t segment_end = std::min((segment + 1) * kSegment, newest + 1);
  const int64_t key_stride = p.kv_heads * dim;
  for (int64_t base = segment * kSegment; base < segment_end; base += kStrip) {
    // Keys that some row sees, a bit per key. Between the windows of a tile's rows may lie keys that no row sees: their
    // table entries mean nothing, and they are not looked up.
    const int64_t strip_end = std::min(base + kStrip, segment_end);
    uint64_t seen = 0;
    for (int64_t row = first; row < last; ++row) {
      const int64_t begin = std::max(base, p.oldest_key(row)), end = std::min<int64_t>(strip_end, p.pos[row] + 1);
      if (begin < end) seen |= (~uint64_t{0} >> (kStrip - (end - begin))) << (begin - base);
    }
    for (int64_t key = base; seen != 0;) {
      const int64_t in_page = key % p.page_size, stop = std::min(key + p.page_size - in_page, strip_end);
      // An entry that nobody looks at may be anything; the offset is only a number until a key is seen.
      const int64_t page = static_cast<int64_t>(table[key / p.page_size]) * p.page_size + in_page;
      const T* key_at = keys + page * key_stride + kv_head * dim;
      const T* value_at = values + page * key_stride + kv_head * dim;
      for (; key < stop; ++key, seen >>= 1, key_at += key_stride, value_at += key_stride) {
        if (!(seen & 1)) continue;
        to_paired_floats(strip_keys + (key - base) * dim, key_at, dim);
        to_paired_floats(strip_values + (key - base) * dim, value_at, dim);
      }
    }
    for (int64_t row = first; row < last; ++row) {
      const int64_t begin = std::max(base, p.oldest_key(row)), end = std::min<int64_t>(strip_end, p.pos[row] + 1);
      if (begin >= end) continue;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t at = (row - first) * group + g;
        absorb_strip<kParts>(p, query + at * dim, strip_keys, strip_values, begin - base, end - base, to.sum + at * dim,
                             to.peak + at, to.mass + at, weights);
      }
    }
  }
}

// Head sizes of 64 and 128 channels stay in registers.
template <class T>
void attend_segment(const AttentionProblem& p, const T* q, const T* keys, const T* values, int64_t first, int64_t last,
                    int64_t kv_head, int64_t segment, Partial to, float* scratch) {
  if (p.head_dim == 64)
    attend_keys<4>(p, q, keys, values, first, last, kv_head, segment, to, scratch);
  else if (p.head_dim == 128)
    attend_keys<8>(p, q, keys, values, first, last, kv_head, segment, to, scratch);
  else
    attend_keys<0>(p, q, keys, values, first, last, kv_head, segment, to, scratch);
}

template <class T>
void write_attended(const AttentionProblem& p, Partial total, int64_t first, int64_t last, int64_t kv_head, T* out) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t g = 0; g < p.group(); ++g) {
      const int64_t at = (row - first) * p.group() + g;
      const float* from = total.sum + at * p.head_dim;
      T* to = out + (row * p.heads + kv_head * p.group() + g) * p.head_dim;
      const float mass = total.mass[at];
      int64_t i = 0;
      for (; i + 2 * kLanes <= p.head_dim; i += 2 * kLanes)
        store_paired(to + i, load(from + i) / mass, load(from + i + kLanes) / mass);
      for (; i < p.head_dim; ++i) to[i] = static_cast<T>(from[i] / mass);
    }
}

inline void merge_partials(const AttentionProblem& p, int64_t rows, Partial total, Partial part) {
  for (int64_t at = 0; at < rows * p.group(); ++at) {
    const float best = std::max(total.peak[at], part.peak[at]);
    if (part.peak[at] == kNothing && part.mass[at] == 0.f) continue;  // the segment showed this query nothing
    const float mine = total.mass[at] == 0.f ? 0.f : std::exp(total.peak[at] - best),
                its = std::exp(part.peak[at] - best);
    float* sum_of_values = total.sum + at * p.head_dim;
    const float* more = part.sum + at * p.head_dim;
    for (int64_t i = 0; i < p.head_dim; ++i) sum_of_values[i] = sum_of_values[i] * mine + more[i] * its;
    total.mass[at] = total.mass[at] * mine + part.mass[at] * its;
    total.peak[at] = best;
  }
}
