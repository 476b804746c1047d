/* A shared object with xent inside, which ends its threads before it returns. It exports one function. */
#include <xent.h>

#define EXPORTED __attribute__((visibility("default")))

enum { rows = 260, classes = 1000 };

static float logits[rows * classes];
static int32_t targets[rows];

EXPORTED double plugin_loss(void);

EXPORTED double plugin_loss(void) {
    double loss = -1;
    xent_problem problem = XENT_PROBLEM_INIT;
    xent_results results = XENT_RESULTS_INIT;
    xent_pool *pool = xent_pool_new(3);
    problem.rows = rows;
    problem.classes = classes;
    problem.logits.data = logits;
    problem.logits.dtype = XENT_F32;
    problem.targets.data = targets;
    problem.targets.dtype = XENT_I32;
    problem.pool = pool;
    results.loss = &loss;
    if (!pool || xent_forward(&problem, &results) != XENT_OK) loss = -1;
    xent_pool_free(pool);
    return loss;
}
