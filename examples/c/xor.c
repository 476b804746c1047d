/* XOR, the smallest training loop there is: a 2-5-2 network, four rows, two classes.
 *
 *   cc -std=c11 xor.c -Iinclude libxent.a -lpthread -ldl -lm -o xor
 *
 * Exits with 0 once the loss is below 0.01, with 1 otherwise. */
#include <xent.h>

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 4, INPUTS = 2, HIDDEN = 5, CLASSES = 2, STEPS = 5000 };

static const float points[ROWS][INPUTS] = {{0, 0}, {0, 1}, {1, 0}, {1, 1}};
static const int32_t targets[ROWS] = {0, 1, 1, 0};

/* All weights in one block, so that one loop updates them. */
struct weights {
  float w1[INPUTS][HIDDEN], b1[HIDDEN];
  float w2[HIDDEN][CLASSES], b2[CLASSES];
};

static uint32_t random_state = 1;

/* A number in [-1, 1) from a 32-bit xorshift: the same on every machine. */
static float random_weight(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return (float)(random_state >> 8) * (2.0f / 16777216.0f) - 1.0f;
}

int main(void) {
  const size_t count = sizeof(struct weights) / sizeof(float);
  struct weights *net = calloc(1, sizeof *net);
  struct weights *gradient = calloc(1, sizeof *gradient);
  if (!net || !gradient) {
    fprintf(stderr, "xor: out of memory\n");
    free(net);
    free(gradient);
    return 1;
  }
  for (int j = 0; j < HIDDEN; j++) {
    for (int i = 0; i < INPUTS; i++)
      net->w1[i][j] = random_weight();
    for (int c = 0; c < CLASSES; c++)
      net->w2[j][c] = random_weight();
  }

  float hidden[ROWS][HIDDEN];
  float logits[ROWS][CLASSES];
  double loss = INFINITY;

  /* The descriptors point at the buffers: set up once, used in every step. */
  xent_problem problem = XENT_PROBLEM_INIT;
  problem.rows = ROWS;
  problem.classes = CLASSES;
  problem.logits.data = logits;
  problem.logits.dtype = XENT_F32;
  problem.targets.data = targets;
  problem.targets.dtype = XENT_I32;
  xent_results results = XENT_RESULTS_INIT;
  results.loss = &loss;
  const xent_output in_place = {logits, XENT_F32, {0, 0, 0}};

  int failed = 0;
  for (int step = 0; step < STEPS && loss >= 0.01; step++) {
    for (int r = 0; r < ROWS; r++) {
      for (int j = 0; j < HIDDEN; j++) {
        float sum = net->b1[j];
        for (int i = 0; i < INPUTS; i++)
          sum += points[r][i] * net->w1[i][j];
        hidden[r][j] = tanhf(sum);
      }
      for (int c = 0; c < CLASSES; c++) {
        float sum = net->b2[c];
        for (int j = 0; j < HIDDEN; j++)
          sum += hidden[r][j] * net->w2[j][c];
        logits[r][c] = sum;
      }
    }

    /* The loss, and its gradient in the place of the logits. */
    const xent_status status = xent_forward_backward(&problem, NULL, 1.0, &results, &in_place);
    if (status != XENT_OK) {
      fprintf(stderr, "xor: %s: %s\n", xent_status_name(status), xent_last_error());
      failed = 1;
      break;
    }
    if (step % 100 == 0)
      printf("step %4d   loss %.4f\n", step, loss);

    *gradient = (struct weights){0};
    for (int r = 0; r < ROWS; r++) {
      for (int j = 0; j < HIDDEN; j++) {
        float back = 0;
        for (int c = 0; c < CLASSES; c++) {
          gradient->w2[j][c] += hidden[r][j] * logits[r][c];
          back += net->w2[j][c] * logits[r][c];
        }
        back *= 1 - hidden[r][j] * hidden[r][j];
        for (int i = 0; i < INPUTS; i++)
          gradient->w1[i][j] += points[r][i] * back;
        gradient->b1[j] += back;
      }
      for (int c = 0; c < CLASSES; c++)
        gradient->b2[c] += logits[r][c];
    }
    float *w = (float *)net;
    const float *g = (const float *)gradient;
    for (size_t i = 0; i < count; i++)
      w[i] -= 0.5f * g[i];
  }

  free(gradient);
  free(net);
  if (failed)
    return 1;
  printf("final loss %.6f\n", loss);
  if (!(loss < 0.01)) {
    fprintf(stderr, "xor: the loss is not below 0.01\n");
    return 1;
  }
  return 0;
}
