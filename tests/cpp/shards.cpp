// A vocabulary in shards: the forms of the calls, against the calls over the whole; sizes.
#include <array>
#include <vector>

#include "check.hpp"

namespace {

constexpr std::size_t rows = 4, classes = 7;
constexpr std::array<std::size_t, 5> cuts{0, 3, 3, 4, classes};

struct data {
    std::vector<float> logits = std::vector<float>(rows * classes);
    std::vector<std::int64_t> targets{6, -100, 0, 3};
    std::vector<double> weights{1, 0.5, 2, 1, 0, 1.5, 1};
    xent::options options;

    data() {
        for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = 0.25f * static_cast<float>((i * 29) % 17) - 2;
        options.label_smoothing = 0.1;
        options.class_weights = weights;
        options.z_loss = 0.01;
    }

    // The columns of a shard as a matrix of their own.
    std::vector<float> columns(std::size_t first, std::size_t end) const {
        std::vector<float> own;
        for (std::size_t row = 0; row < rows; ++row)
            for (std::size_t c = first; c < end; ++c) own.push_back(logits[row * classes + c]);
        return own;
    }
};

static_assert(sizeof(xent::partial) == 48);
static_assert(xent::empty_partial.argmax == -1);

template <class Grad>
void check_grad(const Grad& got, const Grad& expected) {
    CHECK(got.size() == expected.size());
    for (std::size_t i = 0; i < got.size(); ++i) CHECK_NEAR(got[i], expected[i], 1e-6);
}

void containers() {
    const data d;
    std::vector<xent::partial> merged(rows, xent::empty_partial);
    for (std::size_t k = 0; k + 1 < cuts.size(); ++k) {
        std::array<xent::partial, rows> partials{};
        const std::vector<float> own = d.columns(cuts[k], cuts[k + 1]);
        xent::partial_forward(own, cuts[k + 1] - cuts[k], d.targets, cuts[k], classes, partials, d.options);
        xent::partial_merge(merged, partials);
    }
    std::vector<float> whole(rows * classes);
    std::vector<double> lse(rows), entropy(rows), merged_lse(rows), merged_entropy(rows);
    xent::results all, results;
    all.lse = lse.data();
    all.entropy = entropy;
    xent::forward(d.logits, classes, d.targets, all, d.options);
    const double loss = xent::forward_backward(d.logits, classes, d.targets, whole, d.options);
    CHECK_NEAR(xent::partial_finish(d.targets, classes, merged, d.options), loss, 1e-6);
    results.lse = merged_lse.data();
    results.entropy = merged_entropy;
    xent::partial_finish(d.targets, classes, merged, results, d.options);
    for (std::size_t i = 0; i < rows; ++i) {
        CHECK_NEAR(merged_lse[i], lse[i], 1e-6);
        CHECK_NEAR(merged_entropy[i], entropy[i], 1e-5);
    }
    std::vector<float> grad(rows * classes);
    for (std::size_t k = 0; k + 1 < cuts.size(); ++k) {
        const std::size_t count = cuts[k + 1] - cuts[k];
        std::vector<float> own = d.columns(cuts[k], cuts[k + 1]); // in place
        xent::partial_backward(own, count, d.targets, cuts[k], classes, merged, own, d.options);
        for (std::size_t i = 0; i < own.size(); ++i) grad[i / count * classes + cuts[k] + i % count] = own[i];
    }
    check_grad(grad, whole);
}

// Columns of one matrix, by strides; probabilities.
void views() {
    const data d;
    std::vector<double> probabilities(rows * classes);
    for (std::size_t i = 0; i < probabilities.size(); ++i) probabilities[i] = 0.01 * static_cast<double>(i % 13);
    std::vector<xent::partial> merged(rows, xent::empty_partial), partials(rows);
    const xent::strides by{classes, 1};
    for (std::size_t k = 0; k + 1 < cuts.size(); ++k) {
        xent::partial_forward({d.logits.data() + cuts[k], by}, rows, cuts[k + 1] - cuts[k],
                              {probabilities.data() + cuts[k], by}, cuts[k], classes, partials.data(), d.options);
        xent::partial_merge(merged.data(), partials.data(), rows);
    }
    std::vector<float> whole(rows * classes), grad(rows * classes);
    const double loss = xent::forward_backward(d.logits, classes, probabilities, whole, d.options);
    CHECK_NEAR(xent::partial_finish(rows, xent::input(probabilities), classes, merged.data(), d.options), loss, 1e-6);
    CHECK_NEAR(xent::partial_finish(probabilities, classes, merged, d.options), loss, 1e-6);
    CHECK_NEAR(xent::partial_finish(std::vector<float>(), classes, merged, d.options), loss, 1e-6);
    for (std::size_t k = 0; k + 1 < cuts.size(); ++k)
        xent::partial_backward({d.logits.data() + cuts[k], by}, rows, cuts[k + 1] - cuts[k],
                               {probabilities.data() + cuts[k], by}, cuts[k], classes, merged.data(),
                               {grad.data() + cuts[k], by}, d.options);
    check_grad(grad, whole);
}

void refusals() {
    const data d;
    std::vector<xent::partial> states(rows), few(rows - 1), merged(rows, xent::empty_partial);
    const std::vector<float> own = d.columns(0, 3);
    std::vector<float> grad(own.size());
    CHECK_THROWS(XENT_ERR_SHAPE, "logits has 12 elements, needs 9",
                 xent::partial_forward(own, 3, d.targets, 0, classes, few, d.options));
    CHECK_THROWS(XENT_ERR_SHAPE, "into has 3 elements, needs 4", xent::partial_merge(few, states));
    CHECK_THROWS(XENT_ERR_SHAPE, "class_offset + classes = 5 + 3 exceeds total_classes = 7",
                 xent::partial_forward(own, 3, d.targets, 5, classes, states, d.options));
    CHECK_THROWS(XENT_ERR_SHAPE, "class_weights has 7 elements, needs 8",
                 xent::partial_forward(own, 3, d.targets, 0, 8, states, d.options));
    CHECK_THROWS(XENT_ERR_TARGET, "targets[0] = 6 is outside [0, 6)",
                 xent::partial_backward(own, 3, d.targets, 0, 6, merged, grad));
    CHECK_THROWS(XENT_ERR_NULL, "targets", xent::partial_finish(rows, nullptr, classes, merged.data()));
    xent::options none = d.options, inner = d.options;
    none.reduction = xent::reduction::none;
    CHECK_THROWS(XENT_ERR_PARAM, "reduction::none", xent::partial_finish(d.targets, classes, merged, none));
    inner.inner = 3;
    CHECK_THROWS(XENT_ERR_SHAPE, "merged has 4 elements, needs 3",
                 xent::partial_finish(d.targets, classes, merged, inner));
}

} // namespace

int main() {
    containers();
    views();
    refusals();
    return report();
}
