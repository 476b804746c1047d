// Loss and gradient equal those of PyTorch's own cross-entropy. Exits with 1 if they do not.
#include "xent_torch.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace {

bool failed = false;

void expect(bool met, const std::string &what) {
  std::printf("%s  %s\n", met ? "ok" : "FAILED", what.c_str());
  failed = failed || !met;
}

void compare(std::int64_t rows, std::int64_t classes, torch::Dtype dtype, double tolerance, bool transposed,
             double smoothing) {
  const torch::Tensor values = torch::randn(transposed ? std::vector<std::int64_t>{classes, rows}
                                                       : std::vector<std::int64_t>{rows, classes},
                                            torch::kFloat64)
                                   .mul(3)
                                   .to(dtype);
  torch::Tensor targets = torch::randint(classes, {rows}, torch::kInt64);
  if (rows > 2)
    targets[1] = -100;
  const auto view = [&](const torch::Tensor &x) { return transposed ? x.t() : x; };

  const torch::Tensor x = values.clone().requires_grad_();
  const torch::Tensor loss = xent_torch::cross_entropy(view(x), targets, smoothing);
  (3 * loss).backward();
  // PyTorch would round each step of a loss of halves. xent computes in f32, and so does this.
  const torch::Tensor y = values.clone().requires_grad_();
  const torch::Tensor wide = dtype == torch::kBFloat16 ? view(y).to(torch::kFloat32) : view(y);
  namespace F = torch::nn::functional;
  const torch::Tensor want =
      F::cross_entropy(wide, targets, F::CrossEntropyFuncOptions().label_smoothing(smoothing));
  (3 * want).backward();

  const double off = (loss.to(torch::kFloat64) - want.to(torch::kFloat64)).abs().item<double>();
  const torch::Tensor grad = x.grad().to(torch::kFloat64), want_grad = y.grad().to(torch::kFloat64);
  const double grad_off = (grad - want_grad).abs().max().item<double>();
  expect(off <= tolerance * std::max(1.0, want.item<double>()) && grad_off <= 3 * tolerance / double(rows) &&
             want_grad.abs().max().item<double>() > 0,
         std::to_string(rows) + "x" + std::to_string(classes) + " " + torch::toString(dtype) +
             (transposed ? " transposed" : "") + (smoothing > 0 ? " smoothed" : "") + ": loss off by " +
             std::to_string(off) + ", gradient by " + std::to_string(grad_off));
}

} // namespace

int main() {
  torch::manual_seed(1);
  for (const auto &[rows, classes] : {std::pair<std::int64_t, std::int64_t>{1, 10}, {7, 10}, {33, 1000}, {3, 32000}}) {
    compare(rows, classes, torch::kFloat32, 3e-6, false, 0);
    compare(rows, classes, torch::kFloat32, 3e-6, true, 0.1);
    compare(rows, classes, torch::kFloat64, 1e-13, false, 0.1);
    compare(rows, classes, torch::kBFloat16, 8e-3, false, 0);
  }
  {
    const torch::NoGradGuard guard;
    const torch::Tensor x = torch::zeros({2, 4}).requires_grad_();
    const torch::Tensor loss = xent_torch::cross_entropy(x, torch::zeros({2}, torch::kInt32));
    expect(!loss.requires_grad() && std::abs(loss.item<double>() - std::log(4.0)) < 1e-6, "without a graph");
  }
  std::string message;
  try {
    xent_torch::cross_entropy(torch::zeros({2, 4}), torch::tensor({0, 4}, torch::kInt64));
  } catch (const c10::Error &error) {
    message = error.what_without_backtrace();
  }
  expect(message.find("targets[1] = 4") != std::string::npos, "a label out of range: " + message);
  return failed;
}
