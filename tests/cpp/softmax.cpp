// softmax, log_softmax and the gradients through them: every form, every type, in place, sizes.
#include <array>
#include <vector>

#include "check.hpp"
#if defined(__cpp_lib_span)
#include <span>
#endif

namespace {

constexpr std::size_t rows = 3, classes = 5, count = rows * classes;

struct data {
    std::vector<double> x, g, soft, log, soft_grad, log_grad;

    data() : x(count), g(count), soft(count), log(count), soft_grad(count), log_grad(count) {
        for (std::size_t i = 0; i < count; ++i) {
            x[i] = 0.25 * static_cast<double>((i * 29) % 17) - 2;
            g[i] = 0.125 * static_cast<double>((i * 13) % 11) - 0.5;
        }
        for (std::size_t i = 0; i < rows; ++i) {
            double sum = 0, dot = 0, total = 0;
            for (std::size_t at = i * classes; at < (i + 1) * classes; ++at) sum += std::exp(x[at]);
            for (std::size_t at = i * classes; at < (i + 1) * classes; ++at) {
                soft[at] = std::exp(x[at]) / sum;
                log[at] = x[at] - std::log(sum);
                dot += soft[at] * g[at];
                total += g[at];
            }
            for (std::size_t at = i * classes; at < (i + 1) * classes; ++at) {
                soft_grad[at] = soft[at] * (g[at] - dot);
                log_grad[at] = g[at] - soft[at] * total;
            }
        }
    }
};

template <class T>
void check_all(std::vector<T>& got, const std::vector<double>& expected, double tolerance) {
    CHECK(got.size() == expected.size());
    for (std::size_t i = 0; i < got.size(); ++i) CHECK_NEAR(got[i], expected[i], tolerance);
    got.assign(got.size(), T(7));
}

template <class T>
void forms(double tolerance) {
    const data d;
    const std::vector<T> x(d.x.begin(), d.x.end()), g(d.g.begin(), d.g.end());
    const std::vector<T> soft(d.soft.begin(), d.soft.end()), log(d.log.begin(), d.log.end());
    std::vector<T> to(count, T(7));
    xent::softmax(x, classes, to);
    check_all(to, d.soft, tolerance);
    xent::softmax(x.data(), rows, classes, to.data());
    check_all(to, d.soft, tolerance);
    xent::softmax(xent::input(x), rows, classes, to);
    check_all(to, d.soft, tolerance);
    xent::log_softmax(x, classes, to);
    check_all(to, d.log, tolerance);
    xent::log_softmax(x.data(), rows, classes, to.data());
    check_all(to, d.log, tolerance);
    xent::log_softmax(xent::input(x), rows, classes, to);
    check_all(to, d.log, tolerance);
    xent::softmax_backward(soft, classes, g, to);
    check_all(to, d.soft_grad, tolerance);
    xent::softmax_backward(soft.data(), rows, classes, g.data(), to.data());
    check_all(to, d.soft_grad, tolerance);
    xent::softmax_backward(xent::input(soft), rows, classes, g, to);
    check_all(to, d.soft_grad, tolerance);
    xent::log_softmax_backward(log, classes, g, to);
    check_all(to, d.log_grad, tolerance);
    xent::log_softmax_backward(log.data(), rows, classes, g.data(), to.data());
    check_all(to, d.log_grad, tolerance);
    xent::log_softmax_backward(xent::input(log), rows, classes, g, to);
    check_all(to, d.log_grad, tolerance);

    // in place of x, of y, of the gradient
    std::vector<T> own = x;
    xent::softmax(own, classes, own);
    check_all(own, d.soft, tolerance);
    own = x;
    xent::log_softmax(own.data(), rows, classes, own.data());
    check_all(own, d.log, tolerance);
    own = soft;
    xent::softmax_backward(own, classes, g, own);
    check_all(own, d.soft_grad, tolerance);
    own = g;
    xent::log_softmax_backward(log, classes, own, own);
    check_all(own, d.log_grad, tolerance);

    // classes first: by strides, and as inner positions
    std::vector<T> turned(count);
    std::vector<double> expected(count);
    for (std::size_t i = 0; i < rows; ++i)
        for (std::size_t c = 0; c < classes; ++c) {
            turned[c * rows + i] = x[i * classes + c];
            expected[c * rows + i] = d.soft[i * classes + c];
        }
    xent::softmax_options o;
    o.inner = rows;
    o.threads = 1;
    to.assign(count, T(7));
    xent::softmax(turned, classes, to, o);
    check_all(to, expected, tolerance);
    xent::strides by{1, static_cast<std::int64_t>(rows)};
    xent::softmax(xent::input(turned, by), rows, classes, xent::output(to, by));
    check_all(to, expected, tolerance);
    xent::softmax(xent::input(turned, by), rows, classes, to); // packed out
    check_all(to, d.soft, tolerance);
    xent::pool pool(2);
    o = {};
    o.pool = &pool;
    xent::softmax(x, classes, to, o);
    check_all(to, d.soft, tolerance);
}

template <class H>
void halves() {
    const std::vector<H> x{H{0}, H{0}, H{0}, H{0}};
    std::vector<H> y(4, H{0x7fff});
    xent::softmax(x, 4, y);
    constexpr std::uint16_t quarter = std::is_same_v<H, xent::bf16> ? 0x3e80 : 0x3400;
    for (H half : y) CHECK(half.bits == quarter);
    constexpr std::uint16_t minus_log_4 = std::is_same_v<H, xent::bf16> ? 0xbfb1 : 0xbd8c;
    xent::log_softmax(x.data(), 1, 4, y.data());
    for (H half : y) CHECK(half.bits == minus_log_4);
}

void refusals() {
    const std::vector<float> x(count, 1);
    const std::vector<double> wide(count, 1);
    const std::vector<float> marks(count, 7);
    std::vector<float> y = marks, small(count - 1, 7);
    CHECK_THROWS(XENT_ERR_SHAPE, "x has 15 elements, needs 12", xent::softmax(x, 4, y));
    CHECK_THROWS(XENT_ERR_SHAPE, "y has 14 elements, needs 15", xent::softmax(x, classes, small));
    CHECK_THROWS(XENT_ERR_SHAPE, "x has 15", xent::log_softmax(x, 0, y));
    CHECK_THROWS(XENT_ERR_SHAPE, "grad_y has 14", xent::softmax_backward(x, classes, small, y));
    CHECK_THROWS(XENT_ERR_SHAPE, "grad_x has 14", xent::log_softmax_backward(x, classes, x, small));
    CHECK_THROWS(XENT_ERR_SHAPE, "y has 15", xent::log_softmax_backward(x, 4, x, y));
    CHECK_THROWS(XENT_ERR_DTYPE, "y", xent::softmax(xent::input(wide), rows, classes, y));
    CHECK_THROWS(XENT_ERR_DTYPE, "grad_y", xent::softmax_backward(xent::input(x), rows, classes, wide, y));
    CHECK_THROWS(XENT_ERR_NULL, "x", xent::softmax(static_cast<const float*>(nullptr), rows, classes, y.data()));
    CHECK_THROWS(XENT_ERR_NULL, "grad_y", xent::softmax_backward(xent::input(x), rows, classes, nullptr, y));
    CHECK_THROWS(XENT_ERR_STRIDE, "y", xent::softmax(xent::input(x), rows, classes, xent::output(y.data(), xent::strides{1})));
    CHECK_THROWS(XENT_ERR_OVERLAP, "y", xent::softmax(y.data(), 1, classes, y.data() + 1));
    CHECK(same_bits(y, marks));
    CHECK(small == std::vector<float>(count - 1, 7));
    // no rows
    xent::softmax(std::vector<float>{}, 3, small = {});
}

#if defined(__cpp_lib_span)
void spans() {
    const data d;
    std::vector<float> memory(d.x.begin(), d.x.end()), to(count, 7);
    xent::softmax(std::span<const float>(memory), classes, std::span(to));
    check_all(to, d.soft, 1e-6);
    xent::log_softmax(std::span(memory).first(classes), classes, std::span(to).last(classes), {.threads = 1});
    for (std::size_t c = 0; c < classes; ++c) CHECK_NEAR(to[count - classes + c], d.log[c], 1e-6);
    CHECK_NEAR(to[0], 7, 0);
}
#else
void spans() {}
#endif

} // namespace

int main() {
    forms<float>(2e-6);
    forms<double>(1e-14);
    halves<xent::bf16>();
    halves<xent::f16>();
    refusals();
    spans();
    return report();
}
