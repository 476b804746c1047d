// xent::bf16 and xent::f16: the numbers of the widened logits, a gradient of either type, and halves
// that are held as plain words or as the standard's own types.
#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <vector>

#include "check.hpp"

namespace {

constexpr std::size_t rows = 7, classes = 300;

float widen(xent::bf16 half) {
    std::uint32_t wide = std::uint32_t{half.bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

float widen(xent::f16 half) { // finite
    int exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
    double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return static_cast<float>(half.bits >> 15 ? -size : size);
}

// The value of the half that is nearest to x, the even one of two; x is far from overflow.
template <class H>
double rounded(double x) {
    constexpr bool is_bf16 = std::is_same_v<H, xent::bf16>;
    if (!(std::fabs(x) > 0)) return x;
    int exponent;
    std::frexp(x, &exponent);
    int ulp = std::max(exponent - (is_bf16 ? 8 : 11), is_bf16 ? -133 : -24);
    return std::ldexp(std::nearbyint(std::ldexp(x, -ulp)), ulp);
}

// Of either sign, in [1/2, 8).
template <class H>
std::vector<H> random_halves(std::size_t count, unsigned seed) {
    constexpr bool is_bf16 = std::is_same_v<H, xent::bf16>;
    std::mt19937 random(seed);
    std::vector<H> all(count);
    for (H& half : all) {
        auto bits = static_cast<std::uint32_t>(random());
        std::uint32_t low = is_bf16 ? (126u + (bits >> 16 & 3)) << 7 | (bits & 127)
                                    : (14u + (bits >> 16 & 3)) << 10 | (bits & 1023);
        half.bits = static_cast<std::uint16_t>((bits >> 31) << 15 | low);
    }
    return all;
}

template <class H>
std::vector<float> widen(const std::vector<H>& halves) {
    std::vector<float> wide;
    for (H half : halves) wide.push_back(widen(half));
    return wide;
}

template <class H>
void check_rounded(const std::vector<H>& got, const std::vector<float>& wide) {
    CHECK(got.size() == wide.size());
    for (std::size_t i = 0; i < wide.size(); ++i) CHECK_NEAR(widen(got[i]), rounded<H>(wide[i]), 0);
}

template <class H>
void against_float() {
    const std::vector<H> logits = random_halves<H>(rows * classes, 1);
    const std::vector<float> wide = widen(logits);
    const std::vector<std::int32_t> targets{0, 299, -100, 64, 1, 255, 7};
    std::vector<H> grad(logits.size(), H{0x7fff});
    std::vector<float> wide_grad(logits.size()), from_half(logits.size());
    const std::vector<H> weights = random_halves<H>(classes, 2), factor = random_halves<H>(1, 3);
    const std::vector<float> wide_weights = widen(weights), wide_factor = widen(factor);

    xent::options options, wide_options;
    for (double smoothing : {0.0, 0.1}) {
        options.label_smoothing = wide_options.label_smoothing = smoothing;
        if (smoothing > 0) {
            options.class_weights = weights;
            options.grad_output = factor;
            wide_options.class_weights = wide_weights;
            wide_options.grad_output = wide_factor;
        }
        // containers
        double loss = xent::forward_backward(wide, classes, targets, wide_grad, wide_options);
        CHECK_NEAR(xent::forward(logits, classes, targets, options), loss, 0);
        CHECK_NEAR(xent::forward_backward(logits, classes, targets, grad, options), loss, 0);
        check_rounded(grad, wide_grad);
        CHECK_NEAR(xent::forward_backward(logits, classes, targets, from_half, options), loss, 0);
        CHECK(same_bits(from_half, wide_grad));

        // pointers, in place
        std::vector<H> in_place = logits;
        H* data = in_place.data();
        CHECK_NEAR(xent::forward_backward(data, rows, classes, targets.data(), data, options), loss, 0);
        CHECK(same_bits(in_place, grad));

        // words of 16 bits
        std::vector<std::uint16_t> words(logits.size()), word_grad(logits.size());
        std::memcpy(words.data(), logits.data(), words.size() * sizeof words[0]);
        if constexpr (std::is_same_v<H, xent::bf16>)
            loss -= xent::forward_backward(xent::as_bf16(words.data()), rows, classes, targets.data(),
                                           xent::as_bf16(word_grad.data()), options);
        else
            loss -= xent::forward_backward(xent::as_f16(words.data()), rows, classes, targets.data(),
                                           xent::as_f16(word_grad.data()), options);
        CHECK_NEAR(loss, 0, 0);
        CHECK(std::memcmp(word_grad.data(), grad.data(), grad.size() * sizeof grad[0]) == 0);

        // backward, from the lse of the float logits
        std::array<double, rows> lse{}, half_lse{};
        xent::results out;
        out.lse = lse.data();
        xent::forward(wide, classes, targets, out, wide_options);
        out.lse = half_lse.data();
        xent::forward(logits, classes, targets, out, options);
        CHECK(same_bits(lse, half_lse));
        xent::backward(wide, classes, targets, lse, wide_grad, wide_options);
        xent::backward(logits, classes, targets, lse, grad, options);
        check_rounded(grad, wide_grad);
        xent::backward(logits, classes, targets, lse, from_half, options);
        CHECK(same_bits(from_half, wide_grad));
    }
}

// Rows of a wider matrix, a column block of which is the gradient.
template <class H>
void views() {
    const std::vector<H> logits = random_halves<H>(rows * classes, 4);
    const std::vector<std::uint16_t> targets{5, 299, 0, 64, 1, 255, 7};
    std::vector<H> packed(logits.size()), matrix(rows * (2 * classes + 1), H{0x7fff});
    double loss = xent::forward_backward(logits, classes, targets, packed);
    constexpr std::size_t width = 2 * classes + 1;
    for (std::size_t i = 0; i < rows; ++i)
        std::memcpy(&matrix[i * width], &logits[i * classes], classes * sizeof(H));
    xent::strides by{static_cast<std::int64_t>(width)};
    xent::output grad(matrix.data() + classes, by);
    CHECK_NEAR(xent::forward_backward(xent::input(matrix.data(), by), rows, classes, targets, grad), loss, 0);
    for (std::size_t i = 0; i < rows; ++i) {
        CHECK(std::memcmp(&matrix[i * width], &logits[i * classes], classes * sizeof(H)) == 0);
        CHECK(std::memcmp(&matrix[i * width + classes], &packed[i * classes], classes * sizeof(H)) == 0);
        CHECK(matrix[i * width + 2 * classes].bits == 0x7fff);
    }
}

// The compiler refuses what the types alone can tell; views are refused by the call.
void refusals() {
    const std::vector<xent::bf16> logits(6);
    const std::vector<xent::f16> halves(6);
    const std::vector<float> floats(6);
    const std::vector<double> doubles(6);
    const std::vector<int> targets{0, 2};
    const std::vector<xent::bf16> bf16_marks(6, xent::bf16{0x1234});
    const std::vector<xent::f16> f16_marks(6, xent::f16{0x1234});
    std::vector<xent::bf16> bf16_grad = bf16_marks;
    std::vector<xent::f16> f16_grad = f16_marks;
    std::vector<double> f64_grad(6, 7.0);
    auto call = [&](xent::input x, xent::output g) { xent::forward_backward(x, 2, 3, targets, g); };
    CHECK_THROWS(XENT_ERR_DTYPE, "grad_logits", call(logits, f16_grad));
    CHECK_THROWS(XENT_ERR_DTYPE, "grad_logits", call(halves, bf16_grad));
    CHECK_THROWS(XENT_ERR_DTYPE, "grad_logits", call(floats, bf16_grad));
    CHECK_THROWS(XENT_ERR_DTYPE, "grad_logits", call(floats, f16_grad));
    CHECK_THROWS(XENT_ERR_DTYPE, "grad_logits", call(logits, f64_grad));
    CHECK_THROWS(XENT_ERR_DTYPE, "grad_logits", call(doubles, bf16_grad)); // f64 logits, a half's gradient
    CHECK_THROWS(XENT_ERR_SHAPE, "logits", xent::forward(logits, 4, targets));
    CHECK(same_bits(bf16_grad, bf16_marks) && same_bits(f16_grad, f16_marks));
    CHECK(f64_grad == std::vector<double>(6, 7.0));
}

#if defined(__STDCPP_BFLOAT16_T__) && defined(__STDCPP_FLOAT16_T__)
// The standard's own halves, where the compiler has them.
template <class H>
void standard() {
    const std::vector<H> logits{H(0.5f), H(-1.25f), H(3.0f), H(12.0f), H(0.0f), H(1.0f)};
    const std::vector<float> wide(logits.begin(), logits.end());
    const std::vector<int> targets{1, 0};
    std::vector<H> grad(6);
    std::vector<float> wide_grad(6);
    double loss = xent::forward_backward(wide, 3, targets, wide_grad);
    CHECK_NEAR(xent::forward_backward(logits, 3, targets, grad), loss, 0);
    for (std::size_t i = 0; i < 6; ++i) CHECK(grad[i] == H(wide_grad[i]));
}
#endif

} // namespace

int main() {
    against_float<xent::bf16>();
    against_float<xent::f16>();
    views<xent::bf16>();
    views<xent::f16>();
    refusals();
#if defined(__STDCPP_BFLOAT16_T__) && defined(__STDCPP_FLOAT16_T__)
    standard<std::bfloat16_t>();
    standard<std::float16_t>();
#endif
    return report();
}
