// The snippets of docs/recipes.md in C++.
//
//   c++ -std=c++17 recipes.cpp -Iinclude libxent.a -lpthread -ldl -lm -o recipes
//
// Exits with 1 if a gradient is not that of its loss. A test compares the document with this file.
#include <xent.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <numeric>
#include <vector>

namespace {

// A loss over the row losses: `of` gets them and writes its derivative with respect to each.
template <class Of>
double through_row_losses(const std::vector<float>& logits, std::size_t classes, const std::vector<int>& targets,
                          std::vector<float>& grad, Of of) {
  std::vector<double> losses(targets.size()), lse(targets.size()), slopes(targets.size());
  xent::options options;
  options.reduction = xent::reduction::none;
  xent::results results;
  results.row_losses = losses;
  results.lse = lse.data();
  xent::forward(logits, classes, targets, results, options);
  const double loss = of(losses, slopes);
  options.grad_output = slopes;
  xent::backward(logits, classes, targets, lse, grad, options);
  return loss;
}

// Focal loss, the mean of (1 - p)^gamma * l.
auto focal(double gamma) {
  return [gamma](const std::vector<double>& losses, std::vector<double>& slopes) {
    double loss = 0;
    const double rows = static_cast<double>(losses.size());
    for (std::size_t i = 0; i < losses.size(); ++i) {
      const double l = losses[i], p = std::exp(-l), q = -std::expm1(-l); // q = 1 - p
      loss += std::pow(q, gamma) * l / rows;
      slopes[i] = (std::pow(q, gamma) + gamma * std::pow(q, gamma - 1) * p * l) / rows;
    }
    return loss;
  };
}

// CLIP: `scores` are [n, n], images by texts. The mean of the loss over rows and that over columns.
double clip(const std::vector<float>& scores, std::size_t n, std::vector<float>& grad) {
  std::vector<std::uint32_t> targets(n);
  std::iota(targets.begin(), targets.end(), 0u);
  xent::options half;
  half.grad_scale = 0.5;
  const double images = xent::forward_backward(scores, n, targets, grad, half);
  const xent::strides columns(1, n);
  half.accumulate = true;
  const double texts = xent::forward_backward(xent::input(scores.data(), columns), n, n, targets,
                                              xent::output(grad.data(), columns), half);
  return (images + texts) / 2;
}

// Rows of `classes` logits, `pitch` apart: the gradient replaces them, and 0 the padding.
double padded(std::vector<float>& logits, const std::vector<int>& targets, std::size_t classes, std::size_t pitch) {
  const std::size_t rows = targets.size();
  const auto last = logits.begin() + static_cast<std::ptrdiff_t>((rows - 1) * pitch + classes);
  std::fill(last, logits.end(), 0.0f); // after the last row
  xent::options options;
  options.zero_padding = true;
  return xent::forward_backward(xent::input(logits.data(), xent::strides(pitch)), rows, classes, targets,
                                xent::output(logits.data(), xent::strides(pitch)), options);
}

// Position t of a sequence predicts token t + 1: logits are [b, t, v], tokens [b, t].
double causal(const float* logits, const int* tokens, std::size_t b, std::size_t t, std::size_t v, float* grad) {
  xent::options options;
  options.inner = t - 1;
  const xent::strides strides(t * v, 1, v);
  for (std::size_t i = 1; i <= b; ++i) // the last position predicts nothing
    std::fill(grad + (i * t - 1) * v, grad + i * t * v, 0.0f);
  return xent::forward_backward(xent::input(logits, strides), b, v, xent::input(tokens + 1, xent::strides(t, 0, 1)),
                                xent::output(grad, strides), options);
}

// One part of a batch that is split: `kept` rows of the whole batch have a target. The losses of all
// parts add up to the loss of the batch, their gradients to its gradient.
double part(const float* logits, std::size_t rows, std::size_t classes, const int* targets, std::size_t kept,
            float* grad) {
  xent::options options;
  options.normalizer = static_cast<double>(kept);
  return xent::forward_backward(logits, rows, classes, targets, grad, options);
}

bool failed = false;

void expect(const char* what, double got, double expected, double bound) {
  if (std::abs(got - expected) <= bound) return;
  std::fprintf(stderr, "recipes: %s: expected %.9g, got %.9g\n", what, expected, got);
  failed = true;
}

// A gradient is that of a loss, by differences.
template <class Loss>
void check(const char* what, const std::vector<float>& logits, const std::vector<float>& grad, Loss loss) {
  for (std::size_t i = 0; i < logits.size(); ++i) {
    std::vector<float> above = logits, below = logits;
    above[i] += 1.0f / 256;
    below[i] -= 1.0f / 256;
    expect(what, grad[i], (loss(above) - loss(below)) * 128, 1e-4);
  }
}

void run() {
  std::vector<float> logits(20), grad(20), unused(20);
  for (std::size_t i = 0; i < 20; ++i) logits[i] = static_cast<float>(i * 7 % 11) / 4 - 1;
  std::vector<int> targets = {3, 0, 4, 1};

  through_row_losses(logits, 5, targets, grad, focal(2));
  check("focal", logits, grad, [&](const auto& x) { return through_row_losses(x, 5, targets, unused, focal(2)); });

  const std::vector<float> scores(logits.begin(), logits.begin() + 16);
  std::vector<float> square(16), other(16);
  clip(scores, 4, square);
  check("clip", scores, square, [&](const auto& x) { return clip(x, 4, other); });

  std::vector<float> wide = logits;
  const std::vector<int> few = {2, 0, 1, -100}; // rows of 3 classes in rows of 5
  padded(wide, few, 3, 5);
  for (std::size_t i = 0; i < 20; ++i)
    if (i % 5 >= 3) expect("padding", wide[i], 0, 0);
  check("padded", logits, wide, [&](auto x) { return padded(x, few, 3, 5); });

  causal(logits.data(), targets.data(), 2, 2, 5, grad.data()); // two sequences of two tokens
  check("causal", logits, grad, [&](const auto& x) { return causal(x.data(), targets.data(), 2, 2, 5, unused.data()); });

  targets[2] = -100; // the batch, then two parts of it
  const double whole = xent::forward_backward(logits, 5, targets, grad);
  const double sum = part(logits.data(), 2, 5, targets.data(), 3, unused.data()) +
                     part(logits.data() + 10, 2, 5, targets.data() + 2, 3, unused.data() + 10);
  expect("loss of the parts", sum, whole, 1e-12);
  for (std::size_t i = 0; i < 20; ++i) expect("gradient of the parts", unused[i], grad[i], 0);
}

} // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "recipes: %s\n", error.what());
    return 1;
  }
  if (!failed) std::printf("all gradients are those of their losses\n");
  return failed;
}
