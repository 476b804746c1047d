// A shared object with hidden visibility that throws xent::error to its host, and catches the host's.
#include "thrower.hpp"

#include <xent.hpp>

void throws() {
    const float logits[] = {1, 2, 3, 4};
    const int target = 7;
    xent::forward(logits, 1, 4, &target);
}

int catches(void (*call)()) {
    try {
        call();
    } catch (const xent::error& error) {
        return error.status();
    } catch (...) {
        return -1;
    }
    return 0;
}
