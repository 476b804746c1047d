// The options: the defaults of XENT_PROBLEM_INIT, and each of them on its way to the library.
#include <array>
#include <vector>

#include "check.hpp"

namespace {

constexpr std::size_t rows = 4, classes = 3;
const std::vector<float> logits{1, 2, 3, 0, 0, 1, -1, 2, 0, 3, 1, 1};
const std::vector<std::int64_t> targets{0, 1, 2, 0};

double row_loss(std::size_t i) {
    double sum = 0;
    for (std::size_t c = 0; c < classes; ++c) sum += std::exp(double(logits[i * classes + c]));
    return std::log(sum) - logits[i * classes + static_cast<std::size_t>(targets[i])];
}

void defaults() {
    const xent_problem p = XENT_PROBLEM_INIT;
    const xent::options o;
    CHECK(static_cast<xent_reduction>(o.reduction) == p.reduction);
    CHECK(o.ignore_index == p.ignore_index);
    CHECK_NEAR(o.label_smoothing, p.label_smoothing, 0);
    CHECK_NEAR(o.normalizer, p.normalizer, 0);
    CHECK_NEAR(o.z_normalizer, p.z_normalizer, 0);
    CHECK_NEAR(o.z_loss, p.z_loss, 0);
    CHECK_NEAR(o.entropy_bonus, p.entropy_bonus, 0);
    CHECK_NEAR(o.softcap, p.softcap, 0);
    CHECK_NEAR(o.logit_scale, p.logit_scale, 0);
    CHECK(!o.log_probs && !o.empty_is_zero && !o.accumulate && !o.zero_padding && p.flags == 0);
    CHECK(o.class_weights.absent() && o.row_weights.absent() && o.row_mask.absent() && o.grad_output.absent());
    CHECK_NEAR(o.grad_scale, 1, 0);
    CHECK(o.inner == p.inner && o.threads == p.threads && o.pool == nullptr && p.pool == nullptr);
    static_assert(std::is_aggregate_v<xent::options> && std::is_aggregate_v<xent::results>, "designated initialisers");
}

void each() {
    double all = row_loss(0) + row_loss(1) + row_loss(2) + row_loss(3);
    xent::options o;
    CHECK_NEAR(xent::forward(logits, classes, targets, o), all / 4, 1e-6);
    o.reduction = xent::reduction::sum;
    CHECK_NEAR(xent::forward(logits, classes, targets, o), all, 1e-6);
    o.ignore_index = 1;
    CHECK_NEAR(xent::forward(logits, classes, targets, o), all - row_loss(1), 1e-6);
    o = {};
    o.normalizer = 10;
    CHECK_NEAR(xent::forward(logits, classes, targets, o), all / 10, 1e-6);
    o = {};
    o.label_smoothing = 1;
    double even = 0;
    for (std::size_t i = 0; i < rows; ++i) {
        double lse = row_loss(i) + logits[i * classes + static_cast<std::size_t>(targets[i])];
        for (std::size_t c = 0; c < classes; ++c) even += (lse - logits[i * classes + c]) / classes;
    }
    CHECK_NEAR(xent::forward(logits, classes, targets, o), even / 4, 1e-6);
    o = {};
    const std::array<float, classes> class_weights{2, 1, 0.5f};
    o.class_weights = class_weights;
    double weighted = 2 * row_loss(0) + row_loss(1) + 0.5 * row_loss(2) + 2 * row_loss(3);
    CHECK_NEAR(xent::forward(logits, classes, targets, o), weighted / 5.5, 1e-6);
    o = {};
    const std::vector<float> row_weights{1, 0, 3, 0};
    o.row_weights = row_weights;
    CHECK_NEAR(xent::forward(logits, classes, targets, o), (row_loss(0) + 3 * row_loss(2)) / 4, 1e-6);
    o = {};
    const bool mask[rows] = {true, false, false, true};
    o.row_mask = mask;
    CHECK_NEAR(xent::forward(logits, classes, targets, o), (row_loss(0) + row_loss(3)) / 2, 1e-6);
    const std::vector<std::uint8_t> none(rows, 0);
    o.row_mask = none.data();
    CHECK_NEAR(xent::forward(logits, classes, targets, o), NAN, 0);
    o.empty_is_zero = true;
    CHECK_NEAR(xent::forward(logits, classes, targets, o), 0, 0);
    o = {};
    o.threads = 1;
    CHECK_NEAR(xent::forward(logits, classes, targets, o), all / 4, 1e-6);
}

void gradients() {
    std::vector<float> one(rows * classes), grad(rows * classes);
    xent::options o;
    o.reduction = xent::reduction::sum;
    xent::forward_backward(logits, classes, targets, one, o);
    o.grad_scale = -4;
    xent::forward_backward(logits, classes, targets, grad, o);
    for (std::size_t i = 0; i < grad.size(); ++i) CHECK_NEAR(grad[i], -4 * one[i], 0);
    const float two = 2;
    o.grad_output = &two;
    xent::forward_backward(logits, classes, targets, grad, o);
    for (std::size_t i = 0; i < grad.size(); ++i) CHECK_NEAR(grad[i], -8 * one[i], 0);
    o = {};
    o.reduction = xent::reduction::sum;
    grad.assign(grad.size(), 0);
    o.accumulate = true;
    xent::forward_backward(logits, classes, targets, grad, o);
    xent::forward_backward(logits, classes, targets, grad, o);
    for (std::size_t i = 0; i < grad.size(); ++i) CHECK_NEAR(grad[i], 2 * one[i], 1e-7);
    // per row
    o = {};
    o.reduction = xent::reduction::none;
    const std::vector<float> per_row{1, 0, -1, 0.5f};
    o.grad_output = per_row;
    std::vector<double> row_losses(rows), lse(rows);
    xent::results out;
    out.row_losses = row_losses;
    out.lse = lse.data();
    xent::forward_backward(logits, classes, targets, out, grad, o);
    for (std::size_t i = 0; i < grad.size(); ++i) CHECK_NEAR(grad[i], per_row[i / classes] * one[i], 0);
    for (std::size_t i = 0; i < rows; ++i) CHECK_NEAR(row_losses[i], row_loss(i), 1e-6);
    grad.assign(grad.size(), 7);
    xent::backward(logits, classes, targets, lse, grad, o);
    for (std::size_t i = 0; i < grad.size(); ++i) CHECK_NEAR(grad[i], per_row[i / classes] * one[i], 1e-6);
}

// Rows of three classes in memory for five: what lies between them becomes 0.
void padding() {
    std::vector<float> padded(rows * 5, 9);
    for (std::size_t i = 0; i < rows * classes; ++i) padded[i / classes * 5 + i % classes] = logits[i];
    std::vector<float> grad(rows * classes);
    xent::forward_backward(logits, classes, targets, grad);
    xent::options o;
    o.zero_padding = true;
    const xent::output in_place(padded.data(), xent::strides(5));
    xent::forward_backward(xent::input(padded.data(), xent::strides(5)), rows, classes, targets, in_place, o);
    for (std::size_t i = 0; i < padded.size(); ++i) {
        if (i % 5 < classes) CHECK_NEAR(padded[i], grad[i / 5 * classes + i % 5], 0);
        else CHECK_NEAR(padded[i], i < 5 * (rows - 1) ? 0 : 9, 0);
    }
}

#if __cplusplus >= 202002L
// C++20: options and results spelt at the call, without one form being taken for the other
void designated() {
    std::vector<float> grad(rows * classes);
    double loss = 0;
    double expected = xent::forward(logits, classes, targets, {.reduction = xent::reduction::sum});
    CHECK_NEAR(expected, 4 * xent::forward(logits, classes, targets), 1e-6);
    CHECK_NEAR(xent::forward(logits.data(), rows, classes, targets.data(), {.reduction = xent::reduction::sum}), expected, 0);
    CHECK_NEAR(xent::forward(xent::input(logits), rows, classes, targets, {.reduction = xent::reduction::sum}), expected, 0);
    xent::forward(logits, classes, targets, {.loss = &loss}, {.reduction = xent::reduction::sum});
    CHECK_NEAR(loss, expected, 0);
    CHECK_NEAR(xent::forward_backward(logits, classes, targets, grad, {.reduction = xent::reduction::sum}), expected, 0);
    loss = 0;
    xent::forward_backward(logits, classes, targets, {.loss = &loss}, grad, {.reduction = xent::reduction::sum});
    CHECK_NEAR(loss, expected, 0);
}
#else
void designated() {}
#endif

} // namespace

int main() {
    defaults();
    each();
    gradients();
    padding();
    designated();
    return report();
}
