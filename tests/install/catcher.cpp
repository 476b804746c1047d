// usage: catcher [SHARED OBJECT]
//
// xent::error crosses the boundary of a shared object both ways, and is caught as what it is. The object is linked, or
// else opened with RTLD_LOCAL, as plugins are.
#include "thrower.hpp"

#include <cstdio>
#include <dlfcn.h>
#include <xent.hpp>

namespace {

template <class Function>
Function* symbol(void* from, const char* name) {
    return reinterpret_cast<Function*>(dlsym(from, name));
}

void fails() {
    const double logits[] = {1, 2};
    const int target = 5;
    xent::forward(logits, 1, 2, &target);
}

int caught(void (*call)()) {
    try {
        call();
    } catch (const xent::error& error) {
        return error.status();
    } catch (...) {
        return -1;
    }
    return 0;
}

} // namespace

int main(int count, char** arguments) {
#if defined(LINKED)
    auto* const thrower = throws;
    auto* const catcher = catches;
    if (count > 1) return std::printf("%s is linked already\n", arguments[1]), 1;
#else
    void* const object = dlopen(count > 1 ? arguments[1] : "", RTLD_NOW | RTLD_LOCAL);
    if (!object) return std::puts(dlerror()), 1;
    auto* const thrower = symbol<decltype(throws)>(object, "throws");
    auto* const catcher = symbol<decltype(catches)>(object, "catches");
#endif
    const int here = caught(thrower), there = catcher(fails), inside = catcher(thrower);
    if (here == XENT_ERR_TARGET && there == XENT_ERR_TARGET && inside == XENT_ERR_TARGET) return 0;
    std::printf("the host caught %d, the object %d, and its own %d, for %d\n", here, there, inside, XENT_ERR_TARGET);
    return 1;
}
