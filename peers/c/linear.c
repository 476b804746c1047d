/* xent's linear layers, for peers/python/linear.py. Answers each line
 *
 *     ROWS FEATURES CLASSES f32|bf16 forward|hidden|both WORKSPACE SECONDS
 *
 * with the seconds of the fastest call, the loss, and the bytes by which calls raise the resident memory. */
#include "serve.h"
#include <malloc.h>
#include <xent.h>

/* Where the weight begins in the sequence. */
#define WEIGHT ((size_t)3 << 30)

typedef struct {
  size_t rows, features, classes, workspace;
  char dtype[16], kind[16];
} layer;

/* Numbers of the peers' sequence from `first` on, over `by`. */
static void *matrix(size_t first, size_t count, int bf16, float by) {
  void *data = buffer(count * (bf16 ? 2 : 4));
  size_t i;
  for (i = 0; i < count; i++) {
    float x = logit(first + i) / by;
    if (bf16)
      ((uint16_t *)data)[i] = bf16_of(x);
    else
      ((float *)data)[i] = x;
  }
  return data;
}

/* A line of /proc/self/status, in bytes; 0 where there is none. */
static size_t status(const char *name) {
  char line[256];
  size_t value = 0;
  FILE *file = fopen("/proc/self/status", "r");
  if (!file) return 0;
  while (fgets(line, sizeof line, file))
    if (!strncmp(line, name, strlen(name))) sscanf(line + strlen(name), ": %zu", &value);
  fclose(file);
  return value * 1024;
}

/* Sets the peak of resident memory to what is resident now. */
static void reset_peak(void) {
  FILE *file = fopen("/proc/self/clear_refs", "w");
  if (!file) return;
  fputs("5", file);
  fclose(file);
}

static void answer(const layer *now, double budget) {
  const int bf16 = !strcmp(now->dtype, "bf16"), forward = !strcmp(now->kind, "forward");
  const size_t of_hidden = now->rows * now->features, of_weight = now->classes * now->features;
  const xent_dtype dtype = bf16 ? XENT_BF16 : XENT_F32;
  void *hidden = matrix(0, of_hidden, bf16, 2), *weight = matrix(WEIGHT, of_weight, bf16, 60);
  void *grad_hidden = buffer(of_hidden * 4), *grad_weight = buffer(of_weight * 4);
  int64_t *targets = buffer(now->rows * sizeof *targets);
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_linear linear = XENT_LINEAR_INIT;
  xent_linear_grads grads = XENT_LINEAR_GRADS_INIT;
  xent_results results = XENT_RESULTS_INIT;
  double loss = 0, best = 1e9, begin = 0;
  size_t i, before, extra = 0;
  int calls;
  for (i = 0; i < now->rows; i++) targets[i] = (int64_t)(i * 7919 % now->classes);
  problem.rows = now->rows, problem.classes = now->classes;
  problem.targets = (xent_input){targets, XENT_I64, {0}};
  linear.features = now->features, linear.workspace = now->workspace;
  linear.hidden = (xent_input){hidden, dtype, {0}};
  linear.weight = (xent_input){weight, dtype, {0}};
  grads.hidden = (xent_output){grad_hidden, dtype, {0}};
  if (!strcmp(now->kind, "both")) grads.weight = (xent_output){grad_weight, dtype, {0}};
  results.loss = &loss;
  malloc_trim(0); /* what an earlier request has left */
  reset_peak();
  before = status("VmRSS");
  /* The first call starts threads and maps memory: it is not timed. */
  for (calls = 0; calls < 2 || seconds() - begin < budget; calls++) {
    double start = seconds();
    xent_status code = forward ? xent_linear_forward(&problem, &linear, &results)
                               : xent_linear_forward_backward(&problem, &linear, NULL, 1.0, &results, &grads);
    double taken = seconds() - start;
    if (code != XENT_OK) {
      printf("absent %s\n", xent_last_error());
      exit(1);
    }
    if (calls == 0)
      begin = seconds();
    else if (taken < best)
      best = taken;
  }
  if (status("VmHWM") > before) extra = status("VmHWM") - before;
  printf("%e %e %zu\n", best, loss, extra);
  free(hidden), free(weight), free(grad_hidden), free(grad_weight), free(targets);
}

int main(void) {
  char line[256];
  printf("ready %s %s\n", xent_version(), xent_isa());
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    layer now;
    double budget;
    if (sscanf(line, "%zu %zu %zu %15s %15s %zu %lf", &now.rows, &now.features, &now.classes, now.dtype, now.kind,
               &now.workspace, &budget) != 7) {
      printf("absent not understood\n");
      return 1;
    }
    answer(&now, budget);
    fflush(stdout);
  }
  return 0;
}
