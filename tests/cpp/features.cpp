// Scale, cap, z-loss, log-probabilities, probability targets, inner positions, predictions, f64: in
// every form of the calls, against formulas written out here.
#include <array>
#include <vector>

#include "check.hpp"

namespace {

constexpr std::size_t rows = 4, classes = 5, count = rows * classes;
const std::vector<double> wide{0.5, -1, 2, 0, 1, 3, 3, -2, 1, 0, -1, 0.25, 0, 2, 1, 1, -3, 0.5, 0.5, 2};
const std::vector<float> logits(wide.begin(), wide.end());
const std::vector<std::int64_t> targets{2, 0, 1, -100};

// A row as the definition has it.
struct row {
    std::array<double, classes> x{}, p{};
    double lse = 0, entropy = 0;

    explicit row(std::size_t i, double scale = 1, double cap = 0) {
        double sum = 0;
        for (std::size_t c = 0; c < classes; ++c) {
            x[c] = scale * wide[i * classes + c];
            if (cap > 0) x[c] = cap * std::tanh(x[c] / cap);
            sum += std::exp(x[c]);
        }
        lse = std::log(sum);
        for (std::size_t c = 0; c < classes; ++c) {
            p[c] = std::exp(x[c] - lse);
            entropy += p[c] * (lse - x[c]);
        }
    }
    double loss(std::size_t i) const { return lse - x[static_cast<std::size_t>(targets[i])]; }
};

void options_of_logits() {
    xent::options o;
    o.logit_scale = 0.5;
    o.softcap = 1.5;
    o.z_loss = 0.25;
    double ce = 0, z = 0;
    std::vector<double> expected(count);
    for (std::size_t i = 0; i < 3; ++i) {
        row r(i, 0.5, 1.5);
        ce += r.loss(i) / 3;
        z += 0.25 * r.lse * r.lse / 3;
        for (std::size_t c = 0; c < classes; ++c) {
            double tanh = r.x[c] / 1.5, at_target = static_cast<std::int64_t>(c) == targets[i];
            expected[i * classes + c] =
                (r.p[c] - at_target + 2 * 0.25 * r.lse * r.p[c]) / 3 * 0.5 * (1 - tanh * tanh);
        }
    }
    CHECK_NEAR(xent::forward(logits, classes, targets, o), ce + z, 2e-6);
    CHECK_NEAR(xent::forward(wide.data(), rows, classes, targets.data(), o), ce + z, 1e-13);
    std::vector<float> grad(count);
    std::vector<double> wide_grad(count);
    double loss = 0, z_loss = 0, normalizer = 0, z_normalizer = 0;
    std::vector<double> lse(rows);
    xent::results out;
    out.loss = &loss;
    out.z_loss = &z_loss;
    out.normalizer = &normalizer;
    out.z_normalizer = &z_normalizer;
    out.lse = lse.data();
    xent::forward_backward(logits, classes, targets, out, grad, o);
    CHECK_NEAR(z_loss, z, 2e-6);
    CHECK_NEAR(loss - z_loss, ce, 2e-6);
    CHECK(normalizer == 3 && z_normalizer == 3);
    for (std::size_t i = 0; i < count; ++i) CHECK_NEAR(grad[i], expected[i], 4e-6);
    xent::backward(logits, classes, targets, lse, grad, o);
    for (std::size_t i = 0; i < count; ++i) CHECK_NEAR(grad[i], expected[i], 4e-6);
    xent::forward_backward(wide, classes, targets, wide_grad, o);
    for (std::size_t i = 0; i < count; ++i) CHECK_NEAR(wide_grad[i], expected[i], 1e-13);
    // the denominators, one by one
    o.normalizer = 6;
    xent::forward(logits, classes, targets, out, o);
    CHECK_NEAR(loss, ce / 2 + z, 2e-6);
    o.z_normalizer = 12;
    xent::forward(logits, classes, targets, out, o);
    CHECK_NEAR(loss, ce / 2 + z / 4, 2e-6);
    CHECK(normalizer == 6 && z_normalizer == 12);
}

void predictions() {
    double loss = 0;
    std::uint64_t correct = 77, kept_rows = 77;
    std::array<std::int64_t, rows> argmax{};
    std::vector<float> entropy(rows);
    std::vector<double> lse(rows);
    xent::results out;
    out.loss = &loss;
    out.argmax = argmax.data();
    out.correct = &correct;
    out.kept_rows = &kept_rows;
    out.entropy = entropy;
    out.lse = lse.data();
    xent::forward(logits, classes, targets, out);
    CHECK(argmax == (std::array<std::int64_t, rows>{2, 0, 3, 4})); // of equals the first
    CHECK(correct == 2 && kept_rows == 3);
    for (std::size_t i = 0; i < rows; ++i) CHECK_NEAR(entropy[i], row(i).entropy, 1e-6 * (1 + row(i).lse));

    // without targets, in each form
    auto again = [&](auto&& call) {
        argmax.fill(-7);
        entropy.assign(rows, 7);
        lse.assign(rows, 7);
        out = {};
        out.argmax = argmax.data();
        out.entropy = entropy;
        out.lse = lse.data();
        call();
        CHECK(argmax == (std::array<std::int64_t, rows>{2, 0, 3, 4}));
        for (std::size_t i = 0; i < rows; ++i) {
            CHECK_NEAR(entropy[i], row(i).entropy, 1e-6 * (1 + row(i).lse));
            CHECK_NEAR(lse[i], row(i).lse, 1e-6);
        }
    };
    again([&] { xent::evaluate(logits, classes, out); });
    again([&] { xent::evaluate(logits, classes, out, xent::options{}); });
    again([&] { xent::evaluate(logits.data(), rows, classes, out); });
    again([&] { xent::evaluate(xent::input(logits), rows, classes, out); });
    again([&] { xent::evaluate(wide, classes, out); });
    again([&] { xent::forward(logits, rows, classes, nullptr, out); });
    out.loss = &loss;
    CHECK_THROWS(XENT_ERR_NULL, "targets", xent::evaluate(logits, classes, out));
    out = {};
    out.entropy = entropy;
    CHECK_THROWS(XENT_ERR_SHAPE, "logits has 20 elements", xent::evaluate(logits, 3, out));
    entropy.resize(rows + 1);
    out.entropy = entropy;
    CHECK_THROWS(XENT_ERR_SHAPE, "entropy has 5", xent::evaluate(logits, classes, out));
}

template <class P>
void probabilities(double tolerance) {
    std::vector<P> soft(count);
    for (std::size_t i = 0; i < count; ++i) soft[i] = static_cast<P>(0.0625 * static_cast<double>((i * 7) % 5));
    double expected = 0;
    std::vector<double> grad_logits(count), grad_targets(count);
    for (std::size_t i = 0; i < rows; ++i) {
        row r(i);
        double total = 0;
        for (std::size_t c = 0; c < classes; ++c) {
            auto mass = 0.75 * static_cast<double>(soft[i * classes + c]) + 0.25 / classes;
            total += mass;
            expected += mass * (r.lse - r.x[c]) / rows;
        }
        for (std::size_t c = 0; c < classes; ++c) {
            auto mass = 0.75 * static_cast<double>(soft[i * classes + c]) + 0.25 / classes;
            grad_logits[i * classes + c] = (total * r.p[c] - mass) / rows;
            grad_targets[i * classes + c] = 0.75 * (r.lse - r.x[c]) / rows;
        }
    }
    xent::options o;
    o.label_smoothing = 0.25;
    o.ignore_index = 0; // says nothing about probabilities
    CHECK_NEAR(xent::forward(logits, classes, soft, o), expected, tolerance);
    CHECK_NEAR(xent::forward(logits.data(), rows, classes, soft.data(), o), expected, tolerance);
    CHECK_NEAR(xent::forward(xent::input(logits), rows, classes, soft, o), expected, tolerance);
    std::vector<float> grad(count);
    auto check = [&](const std::vector<double>& values) {
        for (std::size_t i = 0; i < count; ++i) CHECK_NEAR(grad[i], values[i], tolerance);
        grad.assign(count, 7);
    };
    std::vector<double> lse(rows);
    xent::results out;
    out.lse = lse.data();
    CHECK_NEAR(xent::forward_backward(logits, classes, soft, grad, o), expected, tolerance);
    check(grad_logits);
    xent::forward(logits, classes, soft, out, o);
    xent::backward(logits, classes, soft, lse, grad, o);
    check(grad_logits);
    xent::backward_targets(logits, classes, soft, lse, grad, o);
    check(grad_targets);
    xent::backward_targets(logits.data(), rows, classes, soft.data(), lse.data(), grad.data(), o);
    check(grad_targets);
    xent::backward_targets(xent::input(logits), rows, classes, soft, lse.data(), grad, o);
    check(grad_targets);
    std::vector<double> wide_grad(count); // any type
    xent::backward_targets(logits, classes, soft, lse, wide_grad, o);
    for (std::size_t i = 0; i < count; ++i) CHECK_NEAR(wide_grad[i], grad_targets[i], tolerance);
    o.grad_scale = 2;
    o.accumulate = true;
    xent::backward_targets(logits, classes, soft, lse, wide_grad, o);
    for (std::size_t i = 0; i < count; ++i) CHECK_NEAR(wide_grad[i], 3 * grad_targets[i], 3 * tolerance);

    const std::vector<P> short_soft(soft.begin(), soft.end() - 1);
    CHECK_THROWS(XENT_ERR_SHAPE, "targets has 19 elements, needs 20", xent::forward(logits, classes, short_soft, o));
    CHECK_THROWS(XENT_ERR_SHAPE, "targets has 19",
                 xent::forward(xent::input(logits), rows, classes, short_soft, o));
    grad.assign(count - 1, 7);
    CHECK_THROWS(XENT_ERR_SHAPE, "grad_targets has 19", xent::backward_targets(logits, classes, soft, lse, grad, o));
    grad.assign(count, 7);
    std::uint64_t correct = 77;
    out.correct = &correct;
    CHECK_THROWS(XENT_ERR_PARAM, "correct", xent::forward(logits, classes, soft, out, o));
    CHECK_THROWS(XENT_ERR_PARAM, "targets",
                 xent::backward_targets(xent::input(logits), rows, classes, targets, lse.data(), grad));
    CHECK(correct == 77 && grad == std::vector<float>(count, 7));
}

void log_probs() {
    std::vector<float> logp(count);
    xent::log_softmax(logits, classes, logp);
    xent::options o;
    o.log_probs = true;
    double loss = xent::forward(logits, classes, targets);
    CHECK_NEAR(xent::forward(logp, classes, targets, o), loss, 1e-6);
    std::vector<float> grad(count, 7);
    auto check = [&] {
        for (std::size_t i = 0; i < count; ++i) {
            bool at_target = static_cast<std::int64_t>(i % classes) == targets[i / classes];
            CHECK_NEAR(grad[i], at_target ? -1.0 / 3 : 0, 1e-7);
        }
        grad.assign(count, 7);
    };
    CHECK_NEAR(xent::forward_backward(logp, classes, targets, grad, o), loss, 1e-6);
    check();
    // there is no lse to pass
    xent::backward(logp, classes, targets, std::vector<double>{}, grad, o);
    check();
    xent::backward(logp.data(), rows, classes, targets.data(), nullptr, grad.data(), o);
    check();
    const std::vector<float> soft(count, 0.2f);
    xent::backward_targets(logp, classes, soft, std::vector<double>{}, grad, o);
    for (std::size_t i = 0; i < count; ++i) CHECK_NEAR(grad[i], -logp[i] / rows, 1e-6);
    const std::vector<float> grad_before = grad;
    std::vector<double> lse(rows, 7);
    xent::results out;
    out.lse = lse.data();
    CHECK_THROWS(XENT_ERR_PARAM, "lse", xent::forward(logp, classes, targets, out, o));
    for (double xent::options::*member : {&xent::options::z_loss, &xent::options::softcap, &xent::options::logit_scale,
                                           &xent::options::entropy_bonus}) {
        xent::options bad = o;
        bad.*member = 2;
        CHECK_THROWS(XENT_ERR_PARAM, "", xent::forward_backward(logp, classes, targets, grad, bad));
    }
    CHECK(same_bits(grad, grad_before) && lse == std::vector<double>(rows, 7));
    // PyTorch's example
    CHECK_NEAR(xent::forward(std::vector<float>{0.1f, 0.2f, 0.3f}, 3, std::vector<int>{2}, o), -0.3, 1e-7);
}

// [rows, classes] turned into images [1, classes, rows]: the same rows.
void inner_positions() {
    std::vector<float> image(count), grad(count), plain(count);
    for (std::size_t i = 0; i < rows; ++i)
        for (std::size_t c = 0; c < classes; ++c) image[c * rows + i] = logits[i * classes + c];
    double loss = xent::forward_backward(logits, classes, targets, plain);
    xent::options o;
    o.inner = rows;
    auto check = [&] {
        for (std::size_t i = 0; i < rows; ++i)
            for (std::size_t c = 0; c < classes; ++c) CHECK_NEAR(grad[c * rows + i], plain[i * classes + c], 1e-6);
        grad.assign(count, 7);
    };
    CHECK_NEAR(xent::forward(image, classes, targets, o), loss, 1e-6);
    CHECK_NEAR(xent::forward_backward(image, classes, targets, grad, o), loss, 1e-6);
    check();
    CHECK_NEAR(xent::forward_backward(image.data(), 1, classes, targets.data(), grad.data(), o), loss, 1e-6);
    check();
    std::array<double, rows> lse{};
    std::array<std::int64_t, rows> argmax{};
    std::vector<float> row_losses(rows);
    xent::results out;
    out.lse = lse.data();
    out.argmax = argmax.data();
    xent::evaluate(image, classes, out, o);
    CHECK(argmax == (std::array<std::int64_t, rows>{2, 0, 3, 4}));
    xent::backward(image, classes, targets, lse, grad, o);
    check();
    // as strides instead
    xent::strides by{1, static_cast<std::int64_t>(rows)};
    CHECK_NEAR(xent::forward_backward(xent::input(image, by), rows, classes, targets, xent::output(grad, by)), loss, 1e-6);
    check();
    // sizes are [rows, inner]
    const std::vector<float> weights{1, 2, 3, 4};
    o.row_weights = weights;
    out = {};
    out.row_losses = row_losses;
    xent::forward(image, classes, targets, out, o);
    for (std::size_t i = 0; i < 3; ++i) CHECK_NEAR(row_losses[i], weights[i] * row(i).loss(i), 5e-6);
    CHECK_NEAR(row_losses[3], 0, 0);
    row_losses.resize(3);
    out.row_losses = row_losses;
    CHECK_THROWS(XENT_ERR_SHAPE, "row_losses has 3", xent::forward(image, classes, targets, out, o));
    CHECK_THROWS(XENT_ERR_SHAPE, "logits has 20 elements, needs 40",
                 xent::forward(xent::input(image), 2, classes, targets, xent::results{}, o));
}

void doubles() {
    std::vector<double> grad(count), lse(rows), in_place = wide;
    double expected = (row(0).loss(0) + row(1).loss(1) + row(2).loss(2)) / 3;
    CHECK_NEAR(xent::forward(wide, classes, targets), expected, 1e-14);
    CHECK_NEAR(xent::forward_backward(wide, classes, targets, grad), expected, 1e-14);
    for (std::size_t i = 0; i < count; ++i) {
        row r(i / classes);
        double at_target = static_cast<std::int64_t>(i % classes) == targets[i / classes];
        CHECK_NEAR(grad[i], i / classes == 3 ? 0 : (r.p[i % classes] - at_target) / 3, 1e-14);
    }
    CHECK_NEAR(xent::forward_backward(in_place, classes, targets, in_place), expected, 1e-14);
    CHECK(same_bits(in_place, grad));
    xent::results out;
    out.lse = lse.data();
    xent::forward(wide.data(), rows, classes, targets.data(), out);
    for (std::size_t i = 0; i < rows; ++i) CHECK_NEAR(lse[i], row(i).lse, 1e-14);
    // the gradient of doubles is double
    std::vector<float> narrow(count, 7);
    CHECK_THROWS(XENT_ERR_DTYPE, "grad_logits", xent::forward_backward(xent::input(wide), rows, classes, targets, narrow));
    CHECK(narrow == std::vector<float>(count, 7));
}

} // namespace

int main() {
    options_of_logits();
    predictions();
    probabilities<float>(2e-6);
    probabilities<double>(2e-6);
    log_probs();
    inner_positions();
    doubles();
    return report();
}
