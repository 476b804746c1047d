// Cross-entropy for LibTorch, computed by xent: xent_torch::cross_entropy takes the place of
// torch::nn::functional::cross_entropy.
#ifndef XENT_TORCH_HPP
#define XENT_TORCH_HPP

#include <torch/torch.h>
#include <xent.h>

#include <cstddef>
#include <cstdint>

namespace xent_torch {

inline xent_dtype dtype_of(const torch::Tensor &tensor) {
  switch (tensor.scalar_type()) {
  case torch::kFloat32: return XENT_F32;
  case torch::kFloat64: return XENT_F64;
  case torch::kBFloat16: return XENT_BF16;
  case torch::kFloat16: return XENT_F16;
  case torch::kInt64: return XENT_I64;
  case torch::kInt32: return XENT_I32;
  case torch::kUInt8: return XENT_U8;
  default: TORCH_CHECK(false, "xent takes no tensor of ", tensor.scalar_type());
  }
}

// The loss as a node of the graph. Its forward computes the gradient too: one call reads the logits once.
struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static torch::Tensor forward(torch::autograd::AutogradContext *ctx, const torch::Tensor &logits,
                               const torch::Tensor &targets, double label_smoothing, bool wants_gradient) {
    TORCH_CHECK(logits.dim() == 2 && logits.device().is_cpu(), "logits are [rows, classes] on the CPU");
    TORCH_CHECK(targets.dim() == 1 && targets.size(0) == logits.size(0) && targets.device().is_cpu(),
                "targets are [rows] on the CPU");
    double loss = 0;
    xent_problem problem = XENT_PROBLEM_INIT;
    xent_results results = XENT_RESULTS_INIT;
    problem.rows = static_cast<std::size_t>(logits.size(0));
    problem.classes = static_cast<std::size_t>(logits.size(1));
    problem.logits = {logits.const_data_ptr(), dtype_of(logits), {logits.stride(0), logits.stride(1), 1}};
    problem.targets = {targets.const_data_ptr(), dtype_of(targets), {targets.stride(0), 0, 1}};
    problem.ignore_index = -100; // as PyTorch's
    problem.label_smoothing = label_smoothing;
    results.loss = &loss;
    xent_status status;
    if (wants_gradient) {
      torch::Tensor gradient = torch::empty(logits.sizes(), logits.options());
      const xent_output output = {gradient.mutable_data_ptr(), dtype_of(gradient), {0, 0, 0}};
      status = xent_forward_backward(&problem, nullptr, 1.0, &results, &output);
      ctx->save_for_backward({gradient});
    } else {
      status = xent_forward(&problem, &results);
    }
    TORCH_CHECK(status == XENT_OK, xent_last_error());
    return torch::full({}, loss, logits.options());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx,
                                                 const torch::autograd::variable_list &grad_loss) {
    return {ctx->get_saved_variables()[0] * grad_loss[0], {}, {}, {}};
  }
};

// The mean over the rows whose target is not -100. Logits: [rows, classes] of f32, f64, bf16 or f16 with any
// strides; targets: [rows] of i64, i32 or u8.
inline torch::Tensor cross_entropy(const torch::Tensor &logits, const torch::Tensor &targets,
                                   double label_smoothing = 0) {
  const bool wants_gradient = logits.requires_grad() && torch::GradMode::is_enabled();
  return CrossEntropy::apply(logits, targets, label_smoothing, wants_gradient);
}

} // namespace xent_torch

#endif
