// The quick start of xent.hpp, and the same in one statement.
#include <vector>

#include "check.hpp"

static std::vector<float> model(int) { return {0.1f, 0.2f, 0.3f, 0.4f, 2, 0, 0, 0}; }
static std::vector<std::int64_t> labels(int) { return {0, -100}; }

int main() {
    const int batch = 0;
    const std::size_t classes = 4;

    std::vector<float> logits = model(batch);
    std::vector<std::int64_t> targets = labels(batch);
    std::vector<float> grad(logits.size());

    xent::options options;
    options.label_smoothing = 0.1;
    double loss = xent::forward_backward(logits, classes, targets, grad, options);

    // (1 - eps) * 1.5425 + eps / 4 * (1.5425 + 1.4425 + 1.3425 + 1.2425)
    CHECK_NEAR(loss, 1.52754, 1e-4);
    double sum = 0;
    for (float g : grad) sum += g;
    CHECK_NEAR(sum, 0, 1e-7);
    CHECK(grad[0] < 0 && grad[1] > 0);
    for (std::size_t c = 4; c < 8; ++c) CHECK_NEAR(grad[c], 0, 0); // the ignored row

    CHECK_NEAR(xent::forward_backward(logits, classes, targets, logits), 1.5425, 5e-5); // in place
    CHECK_NEAR(logits[0], 0.21383822 - 1, 1e-6);
    return report();
}
