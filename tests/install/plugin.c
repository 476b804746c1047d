/* A shared object with xent inside. It exports one function. */
#include <xent.h>

#define EXPORTED __attribute__((visibility("default")))

EXPORTED double plugin_loss(void);

EXPORTED double plugin_loss(void) {
    float logits[4] = {0, 0, 0, 0};
    int32_t target = 3;
    double loss = -1;
    xent_problem problem = XENT_PROBLEM_INIT;
    xent_results results = XENT_RESULTS_INIT;
    problem.rows = 1;
    problem.classes = 4;
    problem.logits.data = logits;
    problem.logits.dtype = XENT_F32;
    problem.targets.data = &target;
    problem.targets.dtype = XENT_I32;
    results.loss = &loss;
    return xent_forward(&problem, &results) == XENT_OK ? loss : -1;
}
