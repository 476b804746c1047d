// Linear layers: the forms of the calls, against the calls over stored logits; sizes and errors.
#include <array>
#include <vector>

#include "check.hpp"

namespace {

constexpr std::size_t rows = 5, classes = 9, features = 6;

struct data {
    std::vector<float> hidden = std::vector<float>(rows * features), weight = std::vector<float>(classes * features);
    std::vector<std::int64_t> targets{8, -100, 0, 3, 5};
    std::vector<double> bias = std::vector<double>(classes, 0.25);
    xent::linear layer;
    xent::options options;

    data() {
        for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] = 0.25f * static_cast<float>((i * 29) % 17) - 2;
        for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = 0.125f * static_cast<float>((i * 13) % 11) - 0.5f;
        bias[2] = -1;
        layer.features = features;
        layer.hidden = hidden;
        layer.weight = weight;
        layer.bias = bias;
        options.label_smoothing = 0.1;
        options.z_loss = 0.01;
    }

    std::vector<float> logits() const {
        std::vector<float> made;
        for (std::size_t row = 0; row < rows; ++row)
            for (std::size_t c = 0; c < classes; ++c) {
                double x = bias[c];
                for (std::size_t j = 0; j < features; ++j)
                    x += static_cast<double>(hidden[row * features + j]) * static_cast<double>(weight[c * features + j]);
                made.push_back(static_cast<float>(x));
            }
        return made;
    }
};

void losses() {
    const data d;
    const std::vector<float> logits = d.logits();
    std::vector<double> lse(rows), stored_lse(rows);
    std::vector<std::int64_t> argmax(rows), stored_argmax(rows);
    xent::results out, stored;
    out.lse = lse.data();
    out.argmax = argmax.data();
    stored.lse = stored_lse.data();
    stored.argmax = stored_argmax.data();
    CHECK_NEAR(xent::forward(d.layer, rows, classes, d.targets, d.options),
               xent::forward(logits, classes, d.targets, d.options), 1e-5);
    xent::evaluate(d.layer, rows, classes, out, d.options);
    xent::evaluate(logits, classes, stored, d.options);
    for (std::size_t i = 0; i < rows; ++i) {
        CHECK_NEAR(lse[i], stored_lse[i], 1e-5);
        CHECK(argmax[i] == stored_argmax[i]);
    }
}

void gradients() {
    const data d;
    std::vector<float> logits = d.logits();
    const double loss = xent::forward_backward(logits, classes, d.targets, logits, d.options);
    std::vector<float> hidden(rows * features), weight(classes * features), again(classes * features, 1.0f);
    std::vector<double> bias(classes), lse(rows);
    xent::linear_grads grads;
    grads.hidden = hidden;
    grads.weight = weight;
    grads.bias = bias;
    CHECK_NEAR(xent::forward_backward(d.layer, rows, classes, d.targets, grads, d.options), loss, 1e-5);
    for (std::size_t c = 0; c < classes; ++c) {
        double sum = 0;
        for (std::size_t row = 0; row < rows; ++row) sum += static_cast<double>(logits[row * classes + c]);
        CHECK_NEAR(bias[c], sum, 1e-5);
        for (std::size_t j = 0; j < features; ++j) {
            sum = 0;
            for (std::size_t row = 0; row < rows; ++row)
                sum += static_cast<double>(logits[row * classes + c]) * static_cast<double>(d.hidden[row * features + j]);
            CHECK_NEAR(weight[c * features + j], sum, 1e-5);
        }
    }
    xent::results out;
    out.lse = lse.data();
    xent::forward(d.layer, rows, classes, d.targets, out, d.options);
    xent::linear_grads adds;
    adds.weight = again;
    adds.accumulate_weight = true;
    xent::backward(d.layer, rows, classes, d.targets, lse.data(), adds, d.options);
    for (std::size_t i = 0; i < weight.size(); ++i) CHECK_NEAR(again[i], weight[i] + 1, 1e-5);
}

void shards() {
    const data d;
    std::vector<float> hidden(rows * features), part(rows * features);
    std::vector<double> sum(rows * features);
    std::vector<xent::partial> merged(rows, xent::empty_partial), partials(rows);
    xent::linear_grads grads;
    grads.hidden = hidden;
    const double loss = xent::forward_backward(d.layer, rows, classes, d.targets, grads, d.options);
    grads.hidden = part;
    for (int backward = 0; backward < 2; ++backward)
        for (std::size_t first = 0; first < classes; first += 4) {
            const std::size_t own = classes - first < 4 ? classes - first : 4;
            xent::linear shard = d.layer;
            shard.weight = d.weight.data() + first * features;
            shard.bias = d.bias.data() + first;
            if (backward == 0) {
                xent::partial_forward(shard, rows, own, d.targets, first, classes, partials.data(), d.options);
                xent::partial_merge(merged.data(), partials.data(), rows);
                continue;
            }
            xent::partial_backward(shard, rows, own, d.targets, first, classes, merged.data(), grads, d.options);
            for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += static_cast<double>(part[i]);
        }
    CHECK_NEAR(xent::partial_finish(rows, d.targets, classes, merged.data(), d.options), loss, 1e-6);
    for (std::size_t i = 0; i < sum.size(); ++i) CHECK_NEAR(sum[i], static_cast<double>(hidden[i]), 1e-6);
}

// Rows further apart than they are long.
void strides() {
    data d;
    std::vector<float> padded(rows * (features + 2), 99.0f);
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t j = 0; j < features; ++j) padded[row * (features + 2) + j] = d.hidden[row * features + j];
    const double loss = xent::forward(d.layer, rows, classes, d.targets, d.options);
    d.layer.hidden = xent::input(padded, xent::strides{features + 2});
    CHECK_NEAR(xent::forward(d.layer, rows, classes, d.targets, d.options), loss, 0);
}

void errors() {
    data d;
    d.layer.features = features + 1;
    CHECK_THROWS(XENT_ERR_SHAPE, "hidden has 30 elements", xent::forward(d.layer, rows, classes, d.targets));
    d.layer.features = 0;
    CHECK_THROWS(XENT_ERR_SHAPE, "linear.features is 0", xent::forward(d.layer, rows, classes, d.targets));
    d.layer.features = features;
    d.layer.workspace = 1;
    CHECK_THROWS(XENT_ERR_PARAM, "workspace = 1", xent::forward(d.layer, rows, classes, d.targets));
    d.layer.workspace = 0;
    std::vector<float> bias(3);
    d.layer.bias = bias;
    CHECK_THROWS(XENT_ERR_SHAPE, "bias has 3 elements", xent::forward(d.layer, rows, classes, d.targets));
}

} // namespace

int main() {
    losses();
    gradients();
    shards();
    strides();
    errors();
    return report();
}
