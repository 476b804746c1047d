/* What one writes by hand: two loops a row (the largest logit; then exponentials and their sum), a
 * third for the gradient, rows over threads by OpenMP, compiled with -Ofast -march=native for the
 * compiler to vectorise, exponentials included. */
#include "serve.h"
#include <math.h>

static double rows_f32(const task *t) {
  const float *logits = (const float *)t->logits;
  float *grads = (float *)(t->kind == IN_PLACE ? t->logits : t->grad);
  const int backward = t->kind != FORWARD;
  const size_t n = t->classes;
  const float scale = 1.0f / (float)t->rows;
  double total = 0;
#pragma omp parallel for reduction(+ : total) schedule(static)
  for (size_t row = 0; row < t->rows; row++) {
    const float *x = logits + row * n;
    float *g = grads + row * n;
    const int32_t y = t->targets[row];
    float max = x[0], sum = 0;
    for (size_t c = 1; c < n; c++) max = x[c] > max ? x[c] : max;
    const float target = x[y];
    if (backward) {
      for (size_t c = 0; c < n; c++) sum += g[c] = expf(x[c] - max);
      const float factor = scale / sum;
      for (size_t c = 0; c < n; c++) g[c] *= factor;
      g[y] -= scale;
    } else {
      for (size_t c = 0; c < n; c++) sum += expf(x[c] - max);
    }
    total += logf(sum) + max - target;
  }
  return total / (double)t->rows;
}

static double rows_bf16(const task *t) {
  const uint16_t *logits = (const uint16_t *)t->logits;
  uint16_t *grads = (uint16_t *)(t->kind == IN_PLACE ? t->logits : t->grad);
  const int backward = t->kind != FORWARD;
  const size_t n = t->classes;
  const float scale = 1.0f / (float)t->rows;
  double total = 0;
#pragma omp parallel for reduction(+ : total) schedule(static)
  for (size_t row = 0; row < t->rows; row++) {
    const uint16_t *x = logits + row * n;
    uint16_t *g = grads + row * n;
    const int32_t y = t->targets[row];
    float max = bf16_to(x[0]), sum = 0;
    for (size_t c = 1; c < n; c++) max = bf16_to(x[c]) > max ? bf16_to(x[c]) : max;
    for (size_t c = 0; c < n; c++) sum += expf(bf16_to(x[c]) - max);
    const float target = bf16_to(x[y]);
    if (backward) {
      const float factor = scale / sum;
      for (size_t c = 0; c < n; c++) g[c] = bf16_of(expf(bf16_to(x[c]) - max) * factor);
      g[y] = bf16_of(expf(target - max) * factor - scale);
    }
    total += logf(sum) + max - target;
  }
  return total / (double)t->rows;
}

static double run(const task *t) { return t->bf16 ? rows_bf16(t) : rows_f32(t); }

int main(void) { return serve("gcc " __VERSION__, NULL, run); }
