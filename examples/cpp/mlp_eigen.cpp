// A multilayer perceptron over Eigen matrices, in both storage orders.
//
//   c++ -std=c++17 -O2 -isystem /usr/include/eigen3 mlp_eigen.cpp -Iinclude libxent.a -lpthread -ldl -lm -o mlp_eigen
//
// Three arms of a spiral, one a class; two inputs, 64 hidden units, gradient descent on the whole set.
// xent takes matrices as they are: a column-major matrix of [rows, classes] has a class stride of its
// column length, and its gradient replaces it in place. Exits with 1 if the net does not learn the
// spiral, or if the two orders do not learn alike.
#include <xent.hpp>

#include <Eigen/Core>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <vector>

namespace {

constexpr int points = 100, arms = 3, hidden = 64, steps = 800;

template <int Order>
using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Order>;

struct outcome {
  double first, last;
  std::uint64_t correct;
};

// Trains the net; both orders start from the same numbers.
template <int Order>
outcome train() {
  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  matrix<Order> x(points * arms, 2), w1(2, hidden), w2(hidden, arms);
  std::vector<std::uint8_t> targets(points * arms);
  for (int i = 0; i < points * arms; ++i) {
    const int arm = i % arms;
    const float radius = static_cast<float>(i / arms + 1) / points;
    const float angle = 4 * radius + 2.0944f * static_cast<float>(arm) + 0.1f * normal(engine);
    x(i, 0) = radius * std::cos(angle);
    x(i, 1) = radius * std::sin(angle);
    targets[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(arm);
  }
  for (int i = 0; i < 2 * hidden; ++i) w1(i / hidden, i % hidden) = normal(engine);
  for (int i = 0; i < hidden * arms; ++i) w2(i / arms, i % arms) = 0.1f * normal(engine);
  Eigen::RowVectorXf b1 = Eigen::RowVectorXf::Zero(hidden), b2 = Eigen::RowVectorXf::Zero(arms);

  outcome got{};
  matrix<Order> h, logits, grad_h;
  for (int step = 0; step < steps; ++step) {
    h = ((x * w1).rowwise() + b1).array().tanh();
    logits = (h * w2).rowwise() + b2;
    got.correct = 0;
    double loss = 0;
    xent::results results;
    results.loss = &loss;
    results.correct = &got.correct;
    xent::forward_backward(logits, arms, targets, results, logits); // in place: logits now hold the gradient
    const matrix<Order>& grad = logits;
    grad_h = (grad * w2.transpose()).array() * (1 - h.array().square());
    const float rate = 1;
    w2 -= rate * (h.transpose() * grad);
    b2 -= rate * grad.colwise().sum();
    w1 -= rate * (x.transpose() * grad_h);
    b1 -= rate * grad_h.colwise().sum();
    if (step == 0) got.first = loss;
    got.last = loss;
  }
  std::printf("%-12s loss %.4f -> %.4f, %d of %d right\n", Order == Eigen::RowMajor ? "row-major" : "column-major",
              got.first, got.last, static_cast<int>(got.correct), points * arms);
  return got;
}

} // namespace

int main() {
  try {
    const outcome rows = train<Eigen::RowMajor>(), columns = train<Eigen::ColMajor>();
    bool learned = true;
    for (const outcome& got : {rows, columns})
      learned = learned && std::abs(got.first - std::log(3.0)) < 0.3 && got.last < 0.2 && got.correct > 285;
    // The products of the two orders round differently, which training amplifies.
    const bool alike = std::abs(rows.first - columns.first) < 1e-4 && std::abs(rows.last - columns.last) < 0.05;
    if (!learned) std::fprintf(stderr, "mlp_eigen: the net did not learn\n");
    if (!alike) std::fprintf(stderr, "mlp_eigen: the storage orders do not agree\n");
    return learned && alike ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "mlp_eigen: %s\n", error.what());
    return 1;
  }
}
