#include "../common/rms_norm.h"

#include "../common/tensor.h"

#define DYN_SIMD "../cpu/rms_norm.simd.h"
#include "../common/each_target.h"

namespace dyndepth {

template <class T>
void rms_norm(const T* from, T* to, int64_t rows, int64_t width, const T* gain, NormStyle style, float eps) {
  // Rows per thread that pay for waking it: a few microseconds of work.
  torch::stable::parallel_for(0, rows, 16384 / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * width;
    DYN_BEST(rms_norm, from + at, to + at, end - begin, width, gain, style, eps);
  });
}

template void rms_norm(const float*, float*, int64_t, int64_t, const float*, NormStyle, float);
template void rms_norm(const BFloat16*, BFloat16*, int64_t, int64_t, const BFloat16*, NormStyle, float);
template void rms_norm(const Half*, Half*, int64_t, int64_t, const Half*, NormStyle, float);

namespace {

// For the runtime's own norms (dyndepth/runtime/norms.py, exits/products.py); x and gain, if there is one, are
// contiguous and of one dtype.
Tensor rms_norm_op(const Tensor& x, const std::optional<Tensor>& gain, int64_t style, double eps) {
  Tensor y = torch::stable::new_empty(x, x.sizes());
  dispatch_float(x.scalar_type(), "rms_norm", [&](auto element) {
    using T = decltype(element);
    rms_norm(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), x.size(0), x.size(1), data_or_null<T>(gain),
             static_cast<NormStyle>(style), static_cast<float>(eps));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def("rms_norm(Tensor x, Tensor? gain, int style, float eps) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("rms_norm", TORCH_BOX(&rms_norm_op)); }

}  // namespace dyndepth
