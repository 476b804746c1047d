// std::span, where the standard has it.
#include <cstdio>
#include <vector>

#include "check.hpp"

#if defined(__cpp_lib_span)
#include <span>

int main() {
    constexpr std::size_t rows = 3, classes = 4;
    std::vector<float> memory{0.1f, 0.2f, 0.3f, 0.4f, 1, 0, 0, 0, 0, 2, 0, 0, 99, 99};
    std::vector<std::int64_t> all_targets{0, 0, 1, 77};
    std::vector<float> gradient(rows * classes), expected(rows * classes);
    std::vector<double> lse(rows);
    std::span<const float> logits = std::span(memory).first(rows * classes);
    std::span<const std::int64_t> targets = std::span(all_targets).first(rows);
    std::span<float> grad(gradient);
    const double loss = xent::forward_backward(memory.data(), rows, classes, all_targets.data(), expected.data());

    CHECK_NEAR(xent::forward(logits, classes, targets), loss, 0);
    CHECK_NEAR(xent::forward_backward(logits, classes, targets, grad), loss, 0);
    CHECK(same_bits(gradient, expected));
    // of fixed extent, temporaries, mixed with vectors
    CHECK_NEAR(xent::forward(std::span<float, 12>(memory.data(), 12), classes, std::span(all_targets).first(3)), loss, 0);
    CHECK_NEAR(xent::forward_backward(logits, classes, targets, std::span(gradient)), loss, 0);
    xent::results out;
    out.lse = lse.data();
    std::vector<double> row_losses(rows + 1);
    out.row_losses = std::span(row_losses).subspan(1);
    xent::forward(logits, classes, targets, out);
    CHECK_NEAR((row_losses[1] + row_losses[2] + row_losses[3]) / 3, loss, 1e-15);
    xent::backward(logits, classes, targets, std::span<const double>(lse), grad);
    for (std::size_t i = 0; i < gradient.size(); ++i) CHECK_NEAR(gradient[i], expected[i], 1e-6);
    // an option holds on to what the span points to, not to the span
    const std::vector<float> weights{9, 1, 2, 3};
    xent::options o;
    o.row_weights = std::span(weights).subspan(1);
    o.class_weights = std::span<const float>(weights);
    CHECK(xent::forward(logits, classes, targets, o) > 0);
    // in place
    std::span<float> own = std::span(memory).first(rows * classes);
    CHECK_NEAR(xent::forward_backward(own, classes, targets, own), loss, 0);
    CHECK(same_bits(own, expected));
    CHECK_NEAR(memory[12], 99, 0);

    CHECK_THROWS(XENT_ERR_SHAPE, "logits has 14 elements, needs 12", xent::forward(std::span(memory), classes, targets));
    CHECK_THROWS(XENT_ERR_SHAPE, "grad_logits", xent::forward_backward(logits, classes, targets, grad.first(11)));
    o.row_weights = std::span(weights);
    CHECK_THROWS(XENT_ERR_SHAPE, "row_weights has 4 elements, needs 3", xent::forward(logits, classes, targets, o));
    // a temporary that owns its memory would dangle in an options object
    static_assert(!std::is_constructible_v<xent::input, std::vector<float>>);
    static_assert(std::is_constructible_v<xent::input, std::span<float>>);
    static_assert(std::is_constructible_v<xent::output, std::span<float>>);
    static_assert(!std::is_constructible_v<xent::output, std::span<const float>>);
    return report();
}
#else
int main() {
    std::puts("skipped: no std::span in this standard");
    return 0;
}
#endif
