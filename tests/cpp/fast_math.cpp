// A trainer linked with -ffast-math, whose start-up code flushes subnormals to zero and takes them
// for zero, on every thread that is started afterwards: the results keep to their bounds, and the
// setting is left as it was found.
#include <cfloat>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "check.hpp"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

// The control bits of the processor's floating point, without its sticky flags.
static std::uint64_t control() {
#if defined(__SSE2__)
    return _mm_getcsr() & ~0x3fu;
#elif defined(__aarch64__)
    std::uint64_t fpcr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
    return fpcr;
#else
    return 0;
#endif
}

// A subnormal that no compiler sees coming.
static volatile float smallest = FLT_MIN;

template <class T>
struct bounds;
template <>
struct bounds<float> {
    static constexpr double sum = 2e-7, power = 1.2e-7, half_ulp = 6e-8;
};
template <>
struct bounds<double> {
    static constexpr double sum = 1e-13, power = 1e-13, half_ulp = 1.2e-16;
};

template <class T>
static void check(std::size_t rows, std::size_t classes, std::uint32_t threads, const xent::pool* pool) {
    std::vector<T> logits(rows * classes), grad(rows * classes), in_place;
    std::vector<std::int64_t> targets(rows);
    std::vector<double> losses(rows), lse(rows);
    std::uint32_t state = 5;
    for (T& x : logits) {
        state = state * 1664525u + 1013904223u;
        // From 0 down to where an exponential is subnormal, or less.
        x = static_cast<T>(-100.0 * (state >> 8) / 16777216.0);
    }
    for (std::size_t i = 0; i < rows; ++i) {
        targets[i] = static_cast<std::int64_t>(i * 7 % classes);
        logits[i * classes + classes / 2] = static_cast<T>(smallest) / 1024; // a subnormal of float
    }
    in_place = logits;
    xent::options o;
    o.reduction = xent::reduction::sum;
    o.threads = threads;
    o.pool = pool;
    xent::results r;
    double loss = 0;
    r.loss = &loss;
    r.row_losses = losses.data();
    r.lse = lse.data();
    const std::uint64_t before = control();
    xent::forward_backward(logits, classes, targets, r, grad, o);
    CHECK(control() == before);
    const double again = xent::forward_backward(in_place, classes, targets, in_place, o);
    CHECK(control() == before);
    targets[0] = -5;
    CHECK_THROWS(XENT_ERR_TARGET, "targets[0] = -5", xent::forward_backward(logits, classes, targets, grad, o));
    CHECK(control() == before);
    targets[0] = 0;

    double total = 0;
    for (std::size_t i = 0; i < rows; ++i) {
        const T* x = &logits[i * classes];
        double top = x[0], sum = 0;
        for (std::size_t c = 0; c < classes; ++c) top = x[c] > top ? x[c] : top;
        for (std::size_t c = 0; c < classes; ++c) sum += std::exp(double(x[c]) - top);
        const double expected = top + std::log(sum), y = double(x[targets[i]]);
        const double size = std::fabs(top) + std::log(sum) + std::fabs(y);
        CHECK_NEAR(lse[i], expected, bounds<T>::sum * size + bounds<T>::power);
        CHECK_NEAR(losses[i], expected - y, bounds<T>::sum * size + bounds<T>::power);
        total += expected - y;
        for (std::size_t c = 0; c < classes; ++c) {
            const double log_p = double(x[c]) - expected, p = std::exp(log_p);
            const bool hit = static_cast<std::int64_t>(c) == targets[i];
            const double exact = p - (hit ? 1 : 0);
            const double bound = bounds<T>::power * p * (1 + std::fabs(log_p)) +
                                 bounds<T>::half_ulp * std::fabs(exact) + (hit ? bounds<T>::power : 0) + FLT_MIN;
            for (const T* to : {&grad[0], &in_place[0]})
                if (std::fabs(double(to[i * classes + c]) - exact) > bound) {
                    CHECK_NEAR(double(to[i * classes + c]), exact, bound);
                    return;
                }
        }
    }
    CHECK_NEAR(loss, total, bounds<T>::sum * 100 * double(rows));
    CHECK_NEAR(again, total, bounds<T>::sum * 100 * double(rows));
}

int main() {
#if defined(__SSE2__)
    // FTZ and DAZ: this is what the test is about.
    CHECK((control() & 0x8040) == 0x8040);
#endif
    const std::uint64_t started = control();
    xent::pool pool(2);
    for (std::uint32_t threads : {1u, 0u}) {
        check<float>(5, 10, threads, nullptr);
        check<float>(3, 100, threads, nullptr);
        check<float>(300, 1000, threads, nullptr);
        check<float>(300, 1000, threads, &pool);
        check<float>(2, 140000, threads, nullptr);
        check<double>(5, 10, threads, nullptr);
        check<double>(200, 1000, threads, nullptr);
    }
    CHECK(control() == started);
    return report();
}
