/* The two loops that a C programmer writes: the loss of a row, and its gradient. Beside them the bench
 * shows what a library has to offer. Compiled apart, with -Ofast and a vector math library, so that these
 * options touch nothing else. */
#ifndef XENT_BENCH_PLAIN_H
#define XENT_BENCH_PLAIN_H
#include <stddef.h>
#include <stdint.h>

/* Logits [rows, classes], or [rows, classes, inner] with inner > 1; a mean. g may be NULL, or x. */
double plain_f32(const float *x, const int64_t *y, size_t rows, size_t classes, size_t inner, float *g,
                 int threads);
double plain_bf16(const uint16_t *x, const int64_t *y, size_t rows, size_t classes, size_t inner, uint16_t *g,
                  int threads);
double plain_f64(const double *x, const int64_t *y, size_t rows, size_t classes, size_t inner, double *g,
                 int threads);
#endif
