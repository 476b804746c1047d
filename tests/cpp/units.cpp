// The header in two units of one program, and twice in this one. Linked with parts/units.cpp.
#include "xent.hpp"
#include "xent.hpp"

#include "check.hpp"

double loss_from_the_other_unit(const xent::options& with);

static const xent_problem at_file_scope = XENT_PROBLEM_INIT;
static const xent_results results_at_file_scope = XENT_RESULTS_INIT;

int main() {
    CHECK(at_file_scope.struct_size == sizeof(xent_problem) && results_at_file_scope.struct_size == sizeof(xent_results));
    CHECK_NEAR(loss_from_the_other_unit({}), 1.5425, 5e-5);
    xent::options o;
    o.label_smoothing = 2;
    CHECK_THROWS(XENT_ERR_PARAM, "label_smoothing", loss_from_the_other_unit(o)); // one exception type for both
    return report();
}
