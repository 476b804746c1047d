/* xent inside an OpenMP region: each thread computes its own rows on itself alone.
 *
 *   cc -std=c11 -fopenmp openmp.c -Iinclude libxent.a -lpthread -ldl -lm -o openmp
 *
 * threads = 1 keeps each call on its thread, so that the region's threads and xent's do not compete for
 * the cores. normalizer is the denominator of the whole batch: the losses of the parts add up to its mean,
 * and the gradients are those of one call over all rows, bit for bit.
 *
 * Outside of a region xent runs on threads of its own. After a region OpenMP's threads wait for the next
 * one, and by default they spin for a while on the cores that xent's threads need. OMP_WAIT_POLICY=passive
 * in the environment makes them sleep. A program that calls xent between regions should set it, or make
 * its calls with threads = 1 from within a region, as here.
 *
 * Exits with 1 if the two ways differ. */
#include <xent.h>

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 512, CLASSES = 1000, ROWS_EACH = 64 };

static float logits[ROWS][CLASSES], whole[ROWS][CLASSES], parts[ROWS][CLASSES];
static int32_t targets[ROWS];

/* The loss and the gradient of some rows. */
static xent_status compute(size_t first, size_t rows, uint32_t threads, double normalizer, double *loss,
                           float grad[][CLASSES]) {
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output grad_logits = {grad[first], XENT_F32, {0}};
  problem.rows = rows, problem.classes = CLASSES;
  problem.logits = (xent_input){logits[first], XENT_F32, {0}};
  problem.targets = (xent_input){targets + first, XENT_I32, {0}};
  problem.threads = threads;
  problem.normalizer = normalizer;
  results.loss = loss;
  return xent_forward_backward(&problem, NULL, 1.0, &results, &grad_logits);
}

int main(void) {
  size_t kept = 0;
  for (size_t i = 0; i < ROWS; i++) {
    targets[i] = i % 10 == 9 ? -100 : (int32_t)(i * 37 % CLASSES);
    kept += targets[i] != -100;
    for (size_t c = 0; c < CLASSES; c++)
      logits[i][c] = (float)((i * 131 + c * 17) % 1009) / 200;
  }

  double expected = 0, loss = 0;
  int failures = compute(0, ROWS, 0, 0, &expected, whole) != XENT_OK;

  double start = omp_get_wtime();
#pragma omp parallel for reduction(+ : loss, failures)
  for (size_t first = 0; first < ROWS; first += ROWS_EACH) {
    double part = 0;
    if (compute(first, ROWS_EACH, 1, (double)kept, &part, parts) != XENT_OK) {
      fprintf(stderr, "openmp: %s\n", xent_last_error()); /* the message is this thread's */
      failures++;
    }
    loss += part;
  }
  double seconds = omp_get_wtime() - start;

  failures += !(fabs(loss - expected) <= 1e-12 * expected);
  failures += memcmp(parts, whole, sizeof whole) != 0;
  printf("loss %.6f in %d parts on %d threads, %.2f ms; one call: %.6f\n", loss, ROWS / ROWS_EACH,
         omp_get_max_threads(), seconds * 1e3, expected);
  if (failures)
    fprintf(stderr, "openmp: the parts do not have the loss and the gradient of the whole\n");
  return failures != 0;
}
