// "Would the full model emit the same token?" from the residual alone: RMSNorm, a small MLP, a sigmoid; no vocabulary.
#include "router_score.h"

#include <vector>

#include "../common/tensor.h"

#define DYN_SIMD "../cpu/router_score.simd.h"
#include "../common/each_target.h"

namespace dyndepth {

template <class T>
float score_row(const Router& router, const T* residual, const T* previous, const float* extra, float* x) {
  return DYN_BEST(score_row, router, residual, previous, extra, x);
}

template float score_row(const Router&, const float*, const float*, const float*, float*);
template float score_row(const Router&, const BFloat16*, const BFloat16*, const float*, float*);
template float score_row(const Router&, const Half*, const Half*, const float*, float*);

template <class T>
void score_rows(const Router& router, const T* residual, const T* previous, const float* extra, int64_t rows,
                float* out) {
  const int64_t width = router.width, grain = 65536 / (width * router.hidden + 1) + 1;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> x(width);
    for (int64_t row = begin; row < end; ++row)
      out[row] = score_row(router, residual + row * width, previous ? previous + row * width : nullptr,
                           extra ? extra + row * router.extras : nullptr, x.data());
  });
}

template void score_rows(const Router&, const float*, const float*, const float*, int64_t, float*);
template void score_rows(const Router&, const BFloat16*, const BFloat16*, const float*, int64_t, float*);
template void score_rows(const Router&, const Half*, const Half*, const float*, int64_t, float*);

namespace {

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
    score_rows(router, hidden.const_data_ptr<T>(), data_or_null<T>(previous), features, rows, out);
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
