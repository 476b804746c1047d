/* The second unit of tests/c/header.c: xent.h and nothing else. */
#include "define_letters.h"
#include "xent.h"
#include "undefine_letters.h"

xent_problem problem_from_the_other_unit(void);
xent_status forward_from_the_other_unit(const xent_problem *problem, const xent_results *results);

xent_problem problem_from_the_other_unit(void) {
    static const xent_problem problem = XENT_PROBLEM_INIT;
    return problem;
}

xent_status forward_from_the_other_unit(const xent_problem *problem, const xent_results *results) {
    return xent_forward(problem, results);
}
