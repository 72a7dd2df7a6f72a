// A decoder layer of the Llama kind over the rows of a pass: the same kernels as the single ops, with epilogues (bias,
// SwiGLU, residual) taken while sums are in registers.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "../common/normalise.h"
#include "../common/rms_norm.h"
#include "products.h"
#include "ragged_attention.h"
#include "store_kv.h"

namespace dyndepth {

// Parts of a layer, in the order that dyndepth/runtime/stack.py lists them. `present` has a bit per part; a layer's
// tensors come densely in this order.
enum DecoderPart {
  kQuery,
  kKey,
  kValue,
  kOut,
  kGate,
  kUp,
  kDown,
  kBeforeAttention,
  kAfterAttention,
  kBeforeMlp,
  kAfterMlp,
  kQueryBias,
  kKeyBias,
  kValueBias,
  kOutBias,
  kGateBias,
  kUpBias,
  kDownBias,
  kQueryGain,
  kKeyGain,
  kParts
};

template <class T>
struct LayerWeights {
  std::array<const T*, kParts> part{};
  const float* query_gain = nullptr;  // fp32, one entry per channel of a head
  const float* key_gain = nullptr;

  // Takes this layer's tensors off the list.
  void read(const std::vector<Tensor>& weights, size_t& at, int64_t present) {
    for (int64_t i = 0; i < kParts; ++i) {
      if (!(present >> i & 1)) continue;
      const Tensor& tensor = weights[at++];
      if (i == kQueryGain)
        query_gain = tensor.const_data_ptr<float>();
      else if (i == kKeyGain)
        key_gain = tensor.const_data_ptr<float>();
      else
        part[i] = tensor.const_data_ptr<T>();
    }
  }
};

struct DecoderShape {
  int64_t width, heads, kv_heads, head_dim, inner;
  Activation activation;
  NormStyle norm;
  float eps, head_eps;
};

// The rows of a pass: K,V are stored for all, the rest is computed for the first `live`.
struct PassRows {
  int64_t live, all;
  const int32_t *seq, *pos, *slots;
};

template <class T>
class Decoder {
 public:
  Decoder(const DecoderShape& shape, const PassRows& rows, T* hidden)
      : shape_(shape),
        rows_(rows),
        hidden_(hidden),
        normed_(rows.all * shape.width),
        q_(rows.live * shape.heads * shape.head_dim),
        k_(rows.all * shape.kv_heads * shape.head_dim),
        v_(rows.all * shape.kv_heads * shape.head_dim),
        attended_(rows.live * shape.heads * shape.head_dim),
        inner_(rows.live * shape.inner) {}

  // Rows have moved; never more than there were at first.
  void set_rows(const PassRows& rows) { rows_ = rows; }

  // `upcoming` are the weights that are read after this layer.
  void run(const LayerWeights<T>& w, const Upcoming& upcoming, AttentionProblem attention, const Rotary& rotary,
           T* keys, T* values) {
    const int64_t live = rows_.live, all = rows_.all, kv = shape_.kv_heads * shape_.head_dim;
    const T* x = normed(hidden_, all, w.part[kBeforeAttention]);
    operand_.pack(x, all, shape_.width);
    Product<T> q{.weight = w.part[kQuery],
                 .outputs = shape_.heads * shape_.head_dim,
                 .bias = w.part[kQueryBias],
                 .rows = live,
                 .out = q_.data()};
    Product<T> k{.weight = w.part[kKey], .outputs = kv, .bias = w.part[kKeyBias], .rows = all, .out = k_.data()};
    Product<T> v{.weight = w.part[kValue], .outputs = kv, .bias = w.part[kValueBias], .rows = all, .out = v_.data()};
    const int64_t attended = shape_.heads * shape_.head_dim;
    multiply<T>(operand_, {q, k, v}, Upcoming::of<T>(w.part[kOut], nullptr, shape_.width, attended));
    normalise_heads(q_.data(), live * shape_.heads, w.query_gain);
    normalise_heads(k_.data(), all * shape_.kv_heads, w.key_gain);
    rotate_and_store(view(q_.data(), shape_.heads), live, q_.data(), view(k_.data(), shape_.kv_heads),
                     view(v_.data(), shape_.kv_heads), all, rotary, rows_.pos, rows_.slots, keys, values);
    if (live == 0) return;

    attention.seq = rows_.seq;
    attention.pos = rows_.pos;
    attention.rows = live;
    attend_all<T>(attention, q_.data(), keys, values, attended_.data());
    add(attended_.data(), attended, w.part[kOut], w.part[kOutBias], w.part[kAfterAttention],
        Upcoming::of(w.part[kGate], w.part[kUp], shape_.inner, shape_.width));

    operand_.pack(normed(hidden_, live, w.part[kBeforeMlp]), live, shape_.width);
    Product<T> gated{.weight = w.part[kGate],
                     .outputs = shape_.inner,
                     .bias = w.part[kGateBias],
                     .weight2 = w.part[kUp],
                     .bias2 = w.part[kUpBias],
                     .activation = shape_.activation,
                     .rows = live,
                     .out = inner_.data()};
    multiply<T>(operand_, {gated}, Upcoming::of<T>(w.part[kDown], nullptr, shape_.width, shape_.inner));
    add(inner_.data(), shape_.inner, w.part[kDown], w.part[kDownBias], w.part[kAfterMlp], upcoming);
  }

  // What a layer reads first.
  Upcoming first(const LayerWeights<T>& w) const {
    return Upcoming::of<T>(w.part[kQuery], nullptr, shape_.heads * shape_.head_dim, shape_.width);
  }

 private:
  HeadsView<T> view(const T* data, int64_t heads) const {
    return {data, heads * shape_.head_dim, shape_.head_dim, heads, shape_.head_dim};
  }

  // The normed rows, or the rows themselves where the model has no norm.
  const T* normed(const T* from, int64_t rows, const T* gain) {
    if (gain == nullptr) return from;
    norm_rows(from, normed_.data(), rows, gain);
    return normed_.data();
  }

  void norm_rows(const T* from, T* to, int64_t rows, const T* gain) {
    rms_norm(from, to, rows, shape_.width, gain, shape_.norm, shape_.eps);
  }

  void normalise_heads(T* data, int64_t heads, const float* gain) const {
    if (gain != nullptr) normalise_rows(data, data, heads, shape_.head_dim, Norm::rms, shape_.head_eps, gain);
  }

  // hidden += linear(x), with a norm in between where the model has one (Gemma).
  void add(const T* x, int64_t width, const T* weight, const T* bias, const T* after, const Upcoming& upcoming) {
    const int64_t live = rows_.live;
    operand_.pack(x, live, width);
    Product<T> product{.weight = weight, .outputs = shape_.width, .bias = bias, .rows = live};
    product.residual = after == nullptr ? hidden_ : nullptr;
    product.out = after == nullptr ? hidden_ : normed_.data();
    multiply<T>(operand_, {product}, upcoming);
    if (after == nullptr) return;
    norm_rows(normed_.data(), normed_.data(), live, after);
    for (int64_t i = 0; i < live * shape_.width; ++i)
      hidden_[i] = static_cast<T>(to_float(hidden_[i]) + to_float(normed_[i]));
  }

  const DecoderShape shape_;
  PassRows rows_;
  T* hidden_;
  Operand<T> operand_;
  std::vector<T> normed_, q_, k_, v_, attended_, inner_;
};

}  // namespace dyndepth
