// The second unit of tests/cpp/units.cpp: xent.hpp and nothing else.
#include "xent.hpp"

double loss_from_the_other_unit(const xent::options& with);

double loss_from_the_other_unit(const xent::options& with) {
    const float logits[] = {0.1f, 0.2f, 0.3f, 0.4f};
    const std::uint8_t target = 0;
    return xent::forward(logits, 1, 4, &target, with);
}
