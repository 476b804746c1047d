/* One call of 1x10 from C: what a call costs beside its rows, next to two plain loops. Prints the
 * nanoseconds of a call and whether anything was allocated or a thread was started:
 *     <what> <nanoseconds>
 * Linked with -Wl,--wrap=malloc and so on, for the library's allocations to be counted. */
#define _POSIX_C_SOURCE 199309L
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xent.h>

enum { CLASSES = 10, CALLS = 20000, TURNS = 25 };

static long allocations;

void *__real_malloc(size_t);
void *__real_calloc(size_t, size_t);
void *__real_realloc(void *, size_t);
int __real_posix_memalign(void **, size_t, size_t);
void *__wrap_malloc(size_t n) { allocations++; return __real_malloc(n); }
void *__wrap_calloc(size_t n, size_t m) { allocations++; return __real_calloc(n, m); }
void *__wrap_realloc(void *p, size_t n) { allocations++; return __real_realloc(p, n); }
int __wrap_posix_memalign(void **p, size_t a, size_t n) {
  allocations++;
  return __real_posix_memalign(p, a, n);
}

static float logits[CLASSES], grad[CLASSES];
static int32_t target = 3;
static double loss;
static xent_problem problem = XENT_PROBLEM_INIT;
static xent_results results = XENT_RESULTS_INIT;
static xent_output output;

static void require(xent_status status) {
  if (status != XENT_OK) {
    fprintf(stderr, "%s\n", xent_last_error());
    exit(1);
  }
}

static void forward(void) { require(xent_forward(&problem, &results)); }

static void both(void) {
  require(xent_forward_backward(&problem, NULL, 1.0, &results, &output));
}

static void plain(void) {
  float max = logits[0], sum = 0;
  for (int c = 1; c < CLASSES; c++) max = logits[c] > max ? logits[c] : max;
  for (int c = 0; c < CLASSES; c++) sum += grad[c] = expf(logits[c] - max);
  loss = logf(sum) + max - logits[target];
  for (int c = 0; c < CLASSES; c++) grad[c] = grad[c] / sum - (c == target);
}

/* Nanoseconds of a call, of the fastest turn. */
static double nanoseconds(void (*call)(void)) {
  double best = 1e9;
  for (int turn = 0; turn < TURNS; turn++) {
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int i = 0; i < CALLS; i++) {
      logits[i % CLASSES] += 1e-4f; /* nothing to be hoisted */
      call();
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    double time = (end.tv_sec - start.tv_sec) * 1e9 + (end.tv_nsec - start.tv_nsec);
    if (time / CALLS < best) best = time / CALLS;
  }
  return best;
}

static int threads(void) {
  char line[256];
  int count = 0;
  FILE *status = fopen("/proc/self/status", "r");
  while (status && fgets(line, sizeof line, status))
    if (sscanf(line, "Threads: %d", &count) == 1) break;
  if (status) fclose(status);
  return count;
}

int main(void) {
  for (int c = 0; c < CLASSES; c++) logits[c] = 0.1f * (float)c;
  problem.rows = 1, problem.classes = CLASSES;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){&target, XENT_I32, {0}};
  results.loss = &loss;
  output = (xent_output){grad, XENT_F32, {0}};
  both();
  double ours = loss;
  plain();
  if (fabs(ours - loss) > 1e-5) return fprintf(stderr, "%g is not %g\n", ours, loss), 1;

  long before = allocations;
  printf("forward %.1f\n", nanoseconds(forward));
  printf("both %.1f\n", nanoseconds(both));
  long during = allocations - before;
  printf("plain-both %.1f\n", nanoseconds(plain));
  /* printf's buffer is malloc's, inside of the C library: not wrapped. */
  printf("allocations %ld\n", during);
  printf("threads %d\n", threads());
  return 0;
}
