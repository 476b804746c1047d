/* xent itself, through its C interface. */
#include "serve.h"
#include <xent.h>

static double run(const task *t) {
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  xent_dtype dtype = t->bf16 ? XENT_BF16 : XENT_F32;
  xent_output grad = {t->kind == IN_PLACE ? t->logits : t->grad, dtype, {0}};
  xent_status status;
  double loss = 0;
  problem.rows = t->rows, problem.classes = t->classes;
  problem.logits = (xent_input){t->logits, dtype, {0}};
  problem.targets = (xent_input){t->targets, XENT_I32, {0}};
  results.loss = &loss;
  status = t->kind == FORWARD ? xent_forward(&problem, &results)
                              : xent_forward_backward(&problem, NULL, 1.0, &results, &grad);
  if (status != XENT_OK) {
    printf("absent %s\n", xent_last_error());
    exit(1);
  }
  return loss;
}

int main(void) {
  char version[64];
  snprintf(version, sizeof version, "%s %s", xent_version(), xent_isa());
  return serve(version, NULL, run);
}
