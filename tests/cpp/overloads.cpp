// Every form of every call gives what xent.h gives.
#include <array>
#include <vector>

#include "check.hpp"

namespace {

constexpr std::size_t rows = 5, classes = 7;

struct data {
    std::vector<float> logits = std::vector<float>(rows * classes);
    std::vector<std::int32_t> targets{3, 0, -100, 6, 1};
    std::vector<float> grad = std::vector<float>(rows * classes, 7.0f);
    std::vector<double> lse = std::vector<double>(rows);
    std::vector<float> expected = std::vector<float>(rows * classes);
    double loss = 0;

    data() {
        for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = 0.25f * static_cast<float>((i * 29) % 17) - 2;
        xent_problem p = XENT_PROBLEM_INIT;
        p.rows = rows;
        p.classes = classes;
        p.logits = {logits.data(), XENT_F32, {0, 0, 0}};
        p.targets = {targets.data(), XENT_I32, {0, 0, 0}};
        xent_results r = XENT_RESULTS_INIT;
        r.loss = &loss;
        r.lse = lse.data();
        xent_output g = {expected.data(), XENT_F32, {0, 0, 0}};
        CHECK(xent_forward_backward(&p, nullptr, 1, &r, &g) == XENT_OK);
    }

    // the gradient is the expected one; poison it for the next
    void check_grad(double tolerance = 0) {
        for (std::size_t i = 0; i < grad.size(); ++i) {
            CHECK_NEAR(grad[i], expected[i], tolerance);
            grad[i] = 7;
        }
    }
};

void pointers() {
    data d;
    CHECK_NEAR(xent::forward(d.logits.data(), rows, classes, d.targets.data()), d.loss, 0);
    CHECK_NEAR(xent::forward_backward(d.logits.data(), rows, classes, d.targets.data(), d.grad.data()), d.loss, 0);
    d.check_grad();
    xent::backward(d.logits.data(), rows, classes, d.targets.data(), d.lse.data(), d.grad.data());
    d.check_grad(1e-6);
    // const or not is all the same
    const float* logits = d.logits.data();
    const std::int32_t* targets = d.targets.data();
    CHECK_NEAR(xent::forward(logits, rows, classes, targets, xent::options{}), d.loss, 0);
    // with results
    double loss = 0, normalizer = 0;
    std::uint64_t kept_rows = 0;
    std::vector<double> lse(rows), row_losses(rows);
    xent::results out;
    out.loss = &loss;
    out.lse = lse.data();
    out.row_losses = row_losses.data();
    out.normalizer = &normalizer;
    out.kept_rows = &kept_rows;
    xent::forward(logits, rows, classes, targets, out);
    CHECK_NEAR(loss, d.loss, 0);
    CHECK(kept_rows == 4);
    CHECK_NEAR(normalizer, 4, 0);
    CHECK(same_bits(lse, d.lse));
    loss = 0;
    std::vector<float> narrow(rows);
    out.row_losses = narrow.data();
    xent::forward_backward(logits, rows, classes, targets, out, d.grad.data());
    d.check_grad();
    CHECK_NEAR(loss, d.loss, 0);
    double sum = 0;
    for (std::size_t i = 0; i < rows; ++i) {
        CHECK_NEAR(narrow[i], static_cast<float>(row_losses[i]), 0);
        sum += row_losses[i];
    }
    CHECK_NEAR(sum / 4, d.loss, 1e-15);
    // no targets: lse alone
    lse.assign(rows, 0);
    xent::results only_lse;
    only_lse.lse = lse.data();
    xent::forward(logits, rows, classes, nullptr, only_lse);
    for (std::size_t i = 0; i < rows; ++i) CHECK_NEAR(lse[i], d.lse[i], 1e-6); // summed without a target set apart
}

void containers() {
    data d;
    CHECK_NEAR(xent::forward(d.logits, classes, d.targets), d.loss, 0);
    CHECK_NEAR(xent::forward_backward(d.logits, classes, d.targets, d.grad), d.loss, 0);
    d.check_grad();
    xent::backward(d.logits, classes, d.targets, d.lse, d.grad);
    d.check_grad(1e-6);
    double loss = 0;
    std::array<double, rows> lse{}, row_losses{};
    xent::results out;
    out.loss = &loss;
    out.lse = lse.data();
    out.row_losses = row_losses;
    xent::forward(d.logits, classes, d.targets, out);
    CHECK_NEAR(loss, d.loss, 0);
    CHECK(same_bits(lse, d.lse));
    xent::forward_backward(d.logits, classes, d.targets, out, d.grad);
    d.check_grad();
    xent::backward(d.logits, classes, d.targets, lse, d.grad);
    d.check_grad(1e-6);
    // arrays of either kind, and a temporary where nothing outlives the call
    const float logits[2][2] = {{1, 2}, {3, 5}};
    const std::array<std::uint8_t, 2> targets{1, 1};
    double expected = (std::log1p(std::exp(-1)) + std::log1p(std::exp(-2))) / 2;
    CHECK_NEAR(xent::forward(std::vector<float>{1, 2, 3, 5}, 2, targets), expected, 1e-6);
    CHECK_NEAR(xent::forward(&logits[0][0], 2, 2, targets.data()), expected, 1e-6);
    const float flat[] = {1, 2, 3, 5};
    const std::uint16_t flat_targets[] = {1, 1};
    CHECK_NEAR(xent::forward(flat, 2, flat_targets), expected, 1e-6);
    // no rows
    CHECK_NEAR(xent::forward(std::vector<float>{}, 3, std::vector<int>{}), NAN, 0);
}

void views() {
    data d;
    // logits and gradient as blocks of one wide matrix
    constexpr std::size_t width = 2 * classes + 3;
    std::vector<float> matrix(rows * width, 7.0f);
    for (std::size_t i = 0; i < rows; ++i)
        for (std::size_t c = 0; c < classes; ++c) matrix[i * width + c] = d.logits[i * classes + c];
    xent::strides by{static_cast<std::int64_t>(width)};
    xent::input logits(matrix.data(), by);
    xent::output grad(matrix.data() + classes, by);
    CHECK_NEAR(xent::forward(logits, rows, classes, d.targets), d.loss, 0);
    CHECK_NEAR(xent::forward_backward(logits, rows, classes, d.targets, grad), d.loss, 0);
    for (std::size_t i = 0; i < rows; ++i)
        for (std::size_t c = 0; c < width; ++c) {
            float expected = c < classes       ? d.logits[i * classes + c]
                             : c < 2 * classes ? d.expected[i * classes + c - classes]
                                               : 7.0f;
            CHECK_NEAR(matrix[i * width + c], expected, 0);
        }
    xent::backward(logits, rows, classes, d.targets.data(), d.lse.data(), grad);
    for (std::size_t i = 0; i < rows; ++i)
        for (std::size_t c = 0; c < classes; ++c)
            CHECK_NEAR(matrix[i * width + classes + c], d.expected[i * classes + c], 1e-6);
    // a whole container with strides is checked for its extent
    CHECK_NEAR(xent::forward(xent::input(matrix, by), rows, classes, d.targets), d.loss, 0);
    CHECK_THROWS(XENT_ERR_SHAPE, "logits", xent::forward(xent::input(matrix, by), rows + 1, classes, nullptr, xent::results{}));
    // every second target, of a container and of a pointer
    std::vector<std::int64_t> wide(2 * rows, 99);
    for (std::size_t i = 0; i < rows; ++i) wide[2 * i] = d.targets[i];
    CHECK_NEAR(xent::forward(d.logits, rows, classes, xent::input(wide, xent::strides{2})), d.loss, 0);
    CHECK_NEAR(xent::forward(d.logits.data(), rows, classes, xent::input(wide.data(), xent::strides{2})), d.loss, 0);
    // in place, with everything asked for
    double loss = 0;
    xent::results out;
    out.loss = &loss;
    xent::forward_backward(logits, rows, classes, d.targets, out, xent::output(matrix.data(), by));
    CHECK_NEAR(loss, d.loss, 0);
    for (std::size_t i = 0; i < rows; ++i)
        for (std::size_t c = 0; c < classes; ++c) CHECK_NEAR(matrix[i * width + c], d.expected[i * classes + c], 0);
}

} // namespace

int main() {
    pointers();
    containers();
    views();
    return report();
}
