// One row through a router.

inline float squash(float x) { return 1.f / (1.f + std::exp(-x)); }

template <class T>
float score_row(const Router& r, const T* residual, const T* previous, const float* extra, float* x) {
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
