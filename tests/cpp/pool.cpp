// The pool: owned once, moved, and the same bits as without it.
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.hpp"

static_assert(!std::is_copy_constructible_v<xent::pool> && !std::is_copy_assignable_v<xent::pool>, "one owner");
static_assert(std::is_nothrow_move_constructible_v<xent::pool> && std::is_nothrow_move_assignable_v<xent::pool>,
              "a vector of them moves");

int main() {
    constexpr std::size_t rows = 100, classes = 5000;
    std::vector<float> logits(rows * classes), expected(rows * classes);
    std::vector<std::uint16_t> targets(rows);
    for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = 0.01f * static_cast<float>((i * 7919) % 1009);
    for (std::size_t i = 0; i < rows; ++i) targets[i] = static_cast<std::uint16_t>(i * 13);
    const double loss = xent::forward_backward(logits, classes, targets, expected);

    auto compute = [&](const xent::pool* pool) {
        std::vector<float> grad(rows * classes);
        xent::options o;
        o.pool = pool;
        bool same_loss = !(std::fabs(xent::forward_backward(logits, classes, targets, grad, o) - loss) > 0);
        return same_loss && same_bits(grad, expected);
    };
    {
        xent::pool a(2), b(1);
        CHECK(a.get() != nullptr && b.get() != nullptr && a.get() != b.get());
        CHECK(compute(&a));
        CHECK(compute(&b));
        const xent_pool* handle = a.get();
        xent::pool c(std::move(a));
        CHECK(c.get() == handle);
        CHECK(compute(&c));
        b = std::move(c);
        CHECK(b.get() == handle);
        CHECK(compute(&b));
        CHECK(compute(&a)); // moved from: the pool of the process
        std::vector<xent::pool> pools;
        for (std::uint32_t k = 0; k < 3; ++k) pools.emplace_back(k);
        for (const xent::pool& pool : pools) CHECK(compute(&pool));
    }
    xent::pool shared;
    bool same[3] = {false, false, false};
    std::thread callers[3];
    for (int k = 0; k < 3; ++k)
        callers[k] = std::thread([&, k] {
            same[k] = true;
            for (int n = 0; n < 4; ++n) same[k] = compute(k == 2 ? nullptr : &shared) && same[k];
        });
    for (std::thread& caller : callers) caller.join();
    CHECK(same[0] && same[1] && same[2]);
    return report();
}
