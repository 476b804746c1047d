/* A gradient that is one element short. */
#include <stdlib.h>
#include <xent.h>
int main(void) {
  float logits[70] = {0};
  int64_t target = 0;
  float *grad = malloc(69 * sizeof *grad);
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  xent_output out = {grad, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 70;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){&target, XENT_I64, {0}};
  return xent_forward_backward(&problem, NULL, 1, &results, &out) != XENT_OK;
}
