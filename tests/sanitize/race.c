/* A call, and a thread that writes the call's gradient. The thread does nothing else: locks inside the library would
 * order two calls, and the sanitizer forgets accesses that are long past. */
#include <pthread.h>
#include <xent.h>
static float logits[4000], grad[4000];
static int64_t target;
static void *call(void *unused) {
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  xent_output out = {grad, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 4000;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){&target, XENT_I64, {0}};
  xent_forward_backward(&problem, NULL, 1, &results, &out);
  return unused;
}
int main(void) {
  pthread_t other;
  if (pthread_create(&other, NULL, call, NULL) != 0) return 2;
  grad[2000] = 1;
  return pthread_join(other, NULL);
}
