// The exceptions of calls that fail; such a call writes nothing.
#include <type_traits>
#include <vector>

#include "check.hpp"

namespace {

constexpr std::size_t rows = 3, classes = 4;

struct data {
    std::vector<float> logits{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    std::vector<int> targets{0, 1, 2};
    std::vector<float> grad = std::vector<float>(rows * classes, 7.0f);
    std::vector<double> lse = std::vector<double>(rows, 7.0);

    void untouched() const {
        CHECK(same_bits(grad, std::vector<float>(rows * classes, 7.0f)));
        CHECK(same_bits(lse, std::vector<double>(rows, 7.0)));
        CHECK(same_bits(logits, data().logits));
    }
};

void from_the_library() {
    data d;
    d.targets[1] = 4;
    CHECK_THROWS(XENT_ERR_TARGET, "targets[1] = 4 is outside [0, 4)", xent::forward(d.logits, classes, d.targets));
    CHECK_THROWS(XENT_ERR_TARGET, "targets[1] = 4", xent::forward_backward(d.logits, classes, d.targets, d.grad));
    CHECK_THROWS(XENT_ERR_TARGET, "targets[1] = 4", xent::forward_backward(d.logits, classes, d.targets, d.logits));
    CHECK_THROWS(XENT_ERR_TARGET, "targets[1] = 4", xent::backward(d.logits, classes, d.targets, d.lse, d.grad));
    d.untouched();
    try {
        xent::forward(d.logits, classes, d.targets);
        CHECK_TEXT("no exception", "an exception");
    } catch (const std::runtime_error& e) { // for those who know nothing of xent
        CHECK_TEXT(e.what(), xent_last_error());
    }
    d.targets[1] = 1;

    xent::options o;
    o.label_smoothing = 1.5;
    CHECK_THROWS(XENT_ERR_PARAM, "label_smoothing", xent::forward(d.logits, classes, d.targets, o));
    o = {};
    o.grad_scale = NAN;
    CHECK_THROWS(XENT_ERR_PARAM, "grad_scale", xent::forward_backward(d.logits, classes, d.targets, d.grad, o));
    o = {};
    o.accumulate = true;
    CHECK_THROWS(XENT_ERR_OVERLAP, "grad_logits", xent::forward_backward(d.logits, classes, d.targets, d.logits, o));
    CHECK_THROWS(XENT_ERR_NULL, "logits",
                 xent::forward(static_cast<const float*>(nullptr), rows, classes, d.targets.data()));
    CHECK_THROWS(XENT_ERR_NULL, "lse",
                 xent::backward(d.logits.data(), rows, classes, d.targets.data(), nullptr, d.grad.data()));
    CHECK_THROWS(XENT_ERR_NULL, "targets", xent::forward(d.logits, rows, classes, nullptr));
    CHECK_THROWS(XENT_ERR_SHAPE, "classes", xent::forward(d.logits.data(), rows, 0, d.targets.data()));
    CHECK_THROWS(XENT_ERR_STRIDE, "logits",
                 xent::forward(xent::input(d.logits.data(), xent::strides{-4}), rows, classes, d.targets));
    CHECK_THROWS(XENT_ERR_DTYPE, "row_mask", {
        o = {};
        o.row_mask = d.targets;
        xent::forward(d.logits, classes, d.targets, o);
    });
    d.untouched();
}

void none_has_no_loss() {
    data d;
    xent::options o;
    o.reduction = xent::reduction::none;
    CHECK_THROWS(XENT_ERR_PARAM, "reduction", xent::forward(d.logits, classes, d.targets, o));
    CHECK_THROWS(XENT_ERR_PARAM, "reduction", xent::forward(d.logits.data(), rows, classes, d.targets.data(), o));
    CHECK_THROWS(XENT_ERR_PARAM, "reduction", xent::forward_backward(d.logits, classes, d.targets, d.grad, o));
    d.untouched();
    xent::results out;
    out.lse = d.lse.data();
    xent::forward(d.logits, classes, d.targets, out, o); // as a call that asks for what there is
    CHECK_NEAR(d.lse[0], 3.4401897, 1e-6);
}

void sizes() {
    data d;
    CHECK_THROWS(XENT_ERR_SHAPE, "logits has 12 elements, needs 15", xent::forward(d.logits, 5, d.targets));
    CHECK_THROWS(XENT_ERR_SHAPE, "logits has 12 elements, needs 9", xent::forward(d.logits, 3, d.targets));
    std::vector<float> small(rows * classes - 1, 7.0f), large(rows * classes + 1, 7.0f);
    CHECK_THROWS(XENT_ERR_SHAPE, "grad_logits has 11", xent::forward_backward(d.logits, classes, d.targets, small));
    CHECK_THROWS(XENT_ERR_SHAPE, "grad_logits has 13", xent::forward_backward(d.logits, classes, d.targets, large));
    CHECK_THROWS(XENT_ERR_SHAPE, "lse has 2",
                 xent::backward(d.logits, classes, d.targets, std::vector<double>(2), d.grad));
    CHECK_THROWS(XENT_ERR_SHAPE, "targets has 3", xent::forward(d.logits.data(), 2, classes, d.targets));
    const std::vector<float> two(2);
    xent::options o;
    o.class_weights = two;
    CHECK_THROWS(XENT_ERR_SHAPE, "class_weights has 2", xent::forward(d.logits, classes, d.targets, o));
    o = {};
    o.row_weights = two;
    CHECK_THROWS(XENT_ERR_SHAPE, "row_weights has 2", xent::forward(d.logits, classes, d.targets, o));
    o = {};
    o.grad_output = two;
    CHECK_THROWS(XENT_ERR_SHAPE, "grad_output has 2", xent::forward_backward(d.logits, classes, d.targets, d.grad, o));
    const std::vector<std::uint8_t> empty;
    o = {};
    o.row_mask = empty; // an empty container is a mistake, not an absent operand
    CHECK_THROWS(XENT_ERR_SHAPE, "row_mask has 0", xent::forward(d.logits, classes, d.targets, o));
    std::vector<float> row_losses(2);
    xent::results out;
    out.row_losses = row_losses;
    CHECK_THROWS(XENT_ERR_SHAPE, "row_losses has 2", xent::forward(d.logits, classes, d.targets, out));
    d.untouched();
    CHECK(same_bits(small, std::vector<float>(small.size(), 7.0f)));
    CHECK(same_bits(large, std::vector<float>(large.size(), 7.0f)));
    // sizes whose product overflows are the library's to report
    CHECK_THROWS(XENT_ERR_SHAPE, "rows", xent::forward(d.logits, SIZE_MAX / 2, classes, d.targets.data()));
}

void the_exception() {
    static_assert(std::is_base_of_v<std::runtime_error, xent::error>, "caught as what it is");
    static_assert(std::is_nothrow_copy_constructible_v<xent::error>, "an exception copies without throwing");
    xent::error e(XENT_ERR_SHAPE, "text");
    CHECK(e.status() == XENT_ERR_SHAPE);
    CHECK_TEXT(e.name(), "XENT_ERR_SHAPE");
    CHECK_TEXT(e.what(), "text");
}

} // namespace

int main() {
    from_the_library();
    none_has_no_loss();
    sizes();
    the_exception();
    return report();
}
