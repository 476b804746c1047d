// app.c in C++. The program throws an exception of its own and catches one of xent's.
#include <cmath>
#include <cstdio>
#include <vector>
#include <xent.hpp>

int main() {
    std::vector<float> logits(600 * 1000);
    std::vector<int> targets(600);
    double loss = xent::forward_backward(logits, 1000, targets, logits);
    if (!(std::fabs(loss - std::log(1000.0)) < 1e-6)) return std::printf("loss %.17g\n", loss), 1;
    targets[7] = 1000;
    try {
        xent::forward_backward(logits, 1000, targets, logits);
        return std::puts("a target out of range was accepted"), 1;
    } catch (const xent::error &error) {
        return error.status() == XENT_ERR_TARGET ? 0 : 1;
    }
}
