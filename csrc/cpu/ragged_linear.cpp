// A linear layer over the live prefix of a row buffer, with the epilogues of a decoder layer.
#include "../common/tensor.h"
#include "products.h"

namespace dyndepth {

namespace {

Tensor ragged_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& gate_weight, const std::optional<Tensor>& gate_bias,
                     const std::optional<Tensor>& residual, int64_t activation, const std::optional<Tensor>& live) {
  const int64_t rows = live_rows(live, x.size(0));
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  dispatch_float(x.scalar_type(), "ragged_linear", [&](auto element) {
    using T = decltype(element);
    Operand<T> operand;
    operand.pack(x.const_data_ptr<T>(), rows, x.size(1));
    Product<T> product{.weight = weight.const_data_ptr<T>(), .outputs = weight.size(0), .rows = rows};
    product.bias = data_or_null<T>(bias);
    static constexpr T nothing{};  // weights of no channels have no address, but a second one is what says gated
    if (gate_weight.has_value()) {
      product.weight2 = product.weight == nullptr ? &nothing : product.weight;
      product.bias2 = product.bias;
      product.weight = gate_weight->const_data_ptr<T>();
      product.bias = data_or_null<T>(gate_bias);
      product.activation = static_cast<Activation>(activation);
    }
    product.residual = data_or_null<T>(residual);
    product.out = out.mutable_data_ptr<T>();
    multiply<T>(operand, {product});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "ragged_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? gate_weight, Tensor? gate_bias, Tensor? residual, "
      "int activation, Tensor? live) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("ragged_linear", TORCH_BOX(&ragged_linear)); }

}  // namespace dyndepth
