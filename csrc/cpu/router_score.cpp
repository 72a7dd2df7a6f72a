// "Would the full model emit the same token?" from the residual alone: RMSNorm, a small MLP, a sigmoid; no vocabulary.
#include <algorithm>

#include "../common/tensor.h"

namespace dyndepth {

namespace {

struct Router {
  const float *weight1, *bias1, *weight2, *bias2;  // [hidden, width], [hidden], [hidden], [1]
  const float *cosine_weight, *extra_weight;       // [hidden], [hidden, extras]; null without that feature
  int64_t width, hidden, extras;
  float eps;
  bool silu;
};

DYN_INLINE float squash(float x) { return 1.f / (1.f + std::exp(-x)); }

template <class T>
DYN_INLINE float score_row(const Router& r, const T* residual, const T* previous, const float* extra, float* x) {
  to_floats(x, residual, r.width);
  const float square = dot(x, x, r.width);
  const float inverse = 1.f / std::sqrt(square / static_cast<float>(r.width) + r.eps);
  float cosine = 0;
  if (r.cosine_weight != nullptr) {
    float other = 0;
    for (int64_t i = 0; i < r.width; ++i) other += to_float(previous[i]) * to_float(previous[i]);
    cosine = dot(previous, x, r.width) / (std::max(std::sqrt(square), 1e-20f) * std::max(std::sqrt(other), 1e-20f));
  }
  float logit = *r.bias2;
  for (int64_t j = 0; j < r.hidden; ++j) {
    float z = dot(r.weight1 + j * r.width, x, r.width) * inverse + r.bias1[j];
    if (r.cosine_weight != nullptr) z += r.cosine_weight[j] * cosine;
    for (int64_t k = 0; k < r.extras; ++k) z += r.extra_weight[j * r.extras + k] * extra[k];
    logit += r.weight2[j] * (r.silu ? z * squash(z) : z);
  }
  return squash(logit);
}

DYN_MULTIVERSION float score(const Router& r, const float* residual, const float* previous, const float* extra,
                             float* x) {
  return score_row(r, residual, previous, extra, x);
}
DYN_MULTIVERSION float score(const Router& r, const BFloat16* residual, const BFloat16* previous, const float* extra,
                             float* x) {
  return score_row(r, residual, previous, extra, x);
}
DYN_MULTIVERSION float score(const Router& r, const Half* residual, const Half* previous, const float* extra,
                             float* x) {
  return score_row(r, residual, previous, extra, x);
}

Tensor router_score(const Tensor& hidden, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2, const std::optional<Tensor>& previous,
                    const std::optional<Tensor>& cosine_weight, const std::optional<Tensor>& extra,
                    const std::optional<Tensor>& extra_weight, double eps, bool silu,
                    const std::optional<Tensor>& live) {
  const int64_t rows = live_rows(live, hidden.size(0)), width = hidden.size(1);
  Tensor scores = torch::stable::new_empty(hidden, {hidden.size(0)}, ScalarType::Float);
  const Router router{weight1.const_data_ptr<float>(),
                      bias1.const_data_ptr<float>(),
                      weight2.const_data_ptr<float>(),
                      bias2.const_data_ptr<float>(),
                      data_or_null<float>(cosine_weight),
                      data_or_null<float>(extra_weight),
                      width,
                      weight1.size(0),
                      extra.has_value() ? extra->size(1) : 0,
                      static_cast<float>(eps),
                      silu};
  const float* features = data_or_null<float>(extra);
  float* out = scores.mutable_data_ptr<float>();
  dispatch_float(hidden.scalar_type(), "router_score", [&](auto element) {
    using T = decltype(element);
    const T* from = hidden.const_data_ptr<T>();
    const T* before = data_or_null<T>(previous);
    const int64_t grain = 65536 / (width * router.hidden + 1) + 1;
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> x(width);
      for (int64_t row = begin; row < end; ++row)
        out[row] = score(router, from + row * width, before ? before + row * width : nullptr,
                         features ? features + row * router.extras : nullptr, x.data());
    });
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "router_score(Tensor hidden, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? previous, "
      "Tensor? cosine_weight, Tensor? extra, Tensor? extra_weight, float eps, bool silu, Tensor? live) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("router_score", TORCH_BOX(&router_score)); }

}  // namespace dyndepth
