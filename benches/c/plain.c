#include "plain.h"
#include <math.h>
#include <string.h>

/* Positions that the loops over an inner axis take together. */
enum { BLOCK = 1024 };

static inline float from_bf16(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

static inline uint16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float from_f32(float f) { return f; }
static inline float to_f32(float f) { return f; }
static inline double from_f64(double f) { return f; }
static inline double to_f64(double f) { return f; }

/* Logits of T, computed as R by functions with the ending F. */
#define PLAIN(NAME, T, R, F)                                                                                \
  static double NAME##_rows(const T *x, const int64_t *y, size_t rows, size_t classes, T *g, int threads) { \
    double total = 0;                                                                                       \
    _Pragma("omp parallel for reduction(+ : total) num_threads(threads) schedule(static)")                  \
    for (size_t n = 0; n < rows; n++) {                                                                     \
      const T *row = x + n * classes;                                                                       \
      R max = from_##NAME(row[0]), sum = 0, own = from_##NAME(row[y[n]]);                                   \
      for (size_t c = 0; c < classes; c++) max = from_##NAME(row[c]) > max ? from_##NAME(row[c]) : max;     \
      for (size_t c = 0; c < classes; c++) sum += exp##F(from_##NAME(row[c]) - max);                        \
      R lse = max + log##F(sum);                                                                            \
      total += lse - own;                                                                                   \
      if (g) {                                                                                              \
        T *to = g + n * classes;                                                                            \
        R scale = 1 / (R)rows;                                                                              \
        for (size_t c = 0; c < classes; c++) to[c] = to_##NAME(exp##F(from_##NAME(row[c]) - lse) * scale);  \
        to[y[n]] = to_##NAME((exp##F(own - lse) - 1) * scale);                                              \
      }                                                                                                     \
    }                                                                                                       \
    return total / (double)rows;                                                                            \
  }                                                                                                         \
  double plain_##NAME(const T *x, const int64_t *y, size_t rows, size_t classes, size_t inner, T *g,        \
                      int threads) {                                                                        \
    if (inner == 1) return NAME##_rows(x, y, rows, classes, g, threads);                                    \
    double total = 0;                                                                                       \
    _Pragma("omp parallel for collapse(2) reduction(+ : total) num_threads(threads) schedule(static)")      \
    for (size_t n = 0; n < rows; n++)                                                                       \
      for (size_t k = 0; k < inner; k += BLOCK) {                                                           \
        size_t len = inner - k < BLOCK ? inner - k : BLOCK;                                                 \
        const T *from = x + n * classes * inner + k;                                                        \
        const int64_t *target = y + n * inner + k;                                                          \
        R max[BLOCK], sum[BLOCK], own[BLOCK], loss = 0, scale = 1 / (R)(rows * inner);                      \
        for (size_t i = 0; i < len; i++) max[i] = from_##NAME(from[i]), sum[i] = 0;                         \
        for (size_t c = 1; c < classes; c++)                                                                \
          for (size_t i = 0; i < len; i++) {                                                                \
            R v = from_##NAME(from[c * inner + i]);                                                         \
            max[i] = v > max[i] ? v : max[i];                                                               \
          }                                                                                                 \
        for (size_t c = 0; c < classes; c++)                                                                \
          for (size_t i = 0; i < len; i++) sum[i] += exp##F(from_##NAME(from[c * inner + i]) - max[i]);     \
        for (size_t i = 0; i < len; i++) {                                                                  \
          sum[i] = max[i] + log##F(sum[i]);                                                                 \
          own[i] = from_##NAME(from[target[i] * inner + i]);                                                \
          loss += sum[i] - own[i];                                                                          \
        }                                                                                                   \
        total += loss;                                                                                      \
        if (!g) continue;                                                                                   \
        T *to = g + n * classes * inner + k;                                                                \
        for (size_t c = 0; c < classes; c++)                                                                \
          for (size_t i = 0; i < len; i++) {                                                                \
            R p = exp##F(from_##NAME(from[c * inner + i]) - sum[i]);                                        \
            to[c * inner + i] = to_##NAME((p - (target[i] == (int64_t)c)) * scale);                         \
          }                                                                                                 \
      }                                                                                                     \
    return total / (double)(rows * inner);                                                                  \
  }

PLAIN(f32, float, float, f)
PLAIN(bf16, uint16_t, float, f)
PLAIN(f64, double, double, )
