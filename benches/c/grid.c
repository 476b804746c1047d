/* The loss and its gradient over a grid of shapes, beside plain C, in turns. Prints, for each shape, how
 * many times as long plain C takes (forward, gradient out of place, gradient in place), and the worst
 * ratios last. Each line of a record is
 *     <program>-<call>,<dtype>,<shape>,<classes>,<set>,<threads>,<plain ns>,<xent ns>,<ratio>
 * Usage: grid [threads [turns [part of a shape's name]]] */
#define _POSIX_C_SOURCE 200112L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xent.h>

#include "plain.h"

typedef struct {
  const char *name, *dtype;
  size_t rows, classes, inner;
} shape;

static const shape SHAPES[] = {
    {"1x10", "f32", 1, 10, 1},
    {"16x10", "f32", 16, 10, 1},
    {"1x100", "f32", 1, 100, 1},
    {"1x1000", "f32", 1, 1000, 1},
    {"1x32000", "f32", 1, 32000, 1},
    {"64x10", "f32", 64, 10, 1},
    {"8x1000", "f32", 8, 1000, 1},
    {"65536x2", "f32", 65536, 2, 1},
    {"65536x5", "f32", 65536, 5, 1},
    {"65536x10", "f32", 65536, 10, 1},
    {"32768x21", "f32", 32768, 21, 1},
    {"16384x50", "f32", 16384, 50, 1},
    {"8192x100", "f32", 8192, 100, 1},
    {"8192x150", "f32", 8192, 150, 1},
    {"4096x300", "f32", 4096, 300, 1},
    {"512x1000", "f32", 512, 1000, 1},
    {"8192x1000", "f32", 8192, 1000, 1},
    {"2048x4000", "f32", 2048, 4000, 1},
    {"512x32000", "f32", 512, 32000, 1},
    {"128x128256", "f32", 128, 128256, 1},
    {"8x21x262144", "f32", 8, 21, 262144},
    {"2x150x262144", "f32", 2, 150, 262144},
    {"16x10x16384", "f32", 16, 10, 16384},
    {"1x1000x4096", "f32", 1, 1000, 4096},
    {"1x10", "bf16", 1, 10, 1},
    {"16x10", "bf16", 16, 10, 1},
    {"65536x10", "bf16", 65536, 10, 1},
    {"8192x100", "bf16", 8192, 100, 1},
    {"8192x1000", "bf16", 8192, 1000, 1},
    {"512x32000", "bf16", 512, 32000, 1},
    {"8x21x262144", "bf16", 8, 21, 262144},
    {"1x10", "f64", 1, 10, 1},
    {"16x10", "f64", 16, 10, 1},
    {"65536x10", "f64", 65536, 10, 1},
    {"8192x100", "f64", 8192, 100, 1},
    {"8192x1000", "f64", 8192, 1000, 1},
    {"128x32000", "f64", 128, 32000, 1},
    {"2x21x262144", "f64", 2, 21, 262144},
    {"16x10x16384", "f64", 16, 10, 16384},
};
enum { COUNT = sizeof SHAPES / sizeof *SHAPES, CALLS = 3, WORST = 10, MOST = 201, ALONE = 1 << 16 };
static const char *const CALL_NAMES[CALLS] = {"forward", "gradient", "in-place"};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void *allocate(size_t size) {
  void *p;
  if (posix_memalign(&p, 64, size)) exit(1);
  memset(p, 0, size);
  return p;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *v, size_t n) {
  qsort(v, n, sizeof *v, by_value);
  return v[n / 2];
}

/* Bytes of a logit. */
static int bytes(const shape *of) { return !strcmp(of->dtype, "bf16") ? 2 : !strcmp(of->dtype, "f32") ? 4 : 8; }

static volatile double sink;

/* One call of either kind. In place, the logits change; both sides then work on what the other left, which
 * are numbers all the same. */
static void run(const shape *of, int call, int plain, void *x, const int64_t *y, void *g, int threads) {
  int size = bytes(of);
  void *to = call == 0 ? NULL : call == 1 ? g : x;
  if (plain) {
    /* As xent, a C programmer would wake no thread for so little. */
    if (of->rows * of->classes * of->inner < ALONE) threads = 1;
    sink = size == 2   ? plain_bf16(x, y, of->rows, of->classes, of->inner, to, threads)
           : size == 4 ? plain_f32(x, y, of->rows, of->classes, of->inner, to, threads)
                       : plain_f64(x, y, of->rows, of->classes, of->inner, to, threads);
    return;
  }
  int64_t inner = (int64_t)of->inner, classes = (int64_t)of->classes;
  xent_dtype dtype = size == 2 ? XENT_BF16 : size == 4 ? XENT_F32 : XENT_F64;
  double loss;
  xent_problem problem = XENT_PROBLEM_INIT;
  problem.rows = of->rows, problem.classes = of->classes, problem.inner = of->inner;
  problem.logits = (xent_input){x, dtype, {classes * inner, inner, 1}};
  problem.targets = (xent_input){y, XENT_I64, {inner, 0, 1}};
  problem.threads = (uint32_t)threads;
  xent_results results = XENT_RESULTS_INIT;
  results.loss = &loss;
  xent_output grad = {to, dtype, {classes * inner, inner, 1}};
  xent_status status = call == 0 ? xent_forward(&problem, &results)
                                 : xent_forward_backward(&problem, NULL, 1.0, &results, &grad);
  if (status != XENT_OK) {
    fprintf(stderr, "%s\n", xent_last_error());
    exit(1);
  }
  sink = loss;
}

typedef struct {
  double ratio;
  char what[80];
} figure;

static int by_ratio(const void *a, const void *b) {
  double x = ((const figure *)a)->ratio, y = ((const figure *)b)->ratio;
  return (x > y) - (x < y);
}

int main(int argc, char **argv) {
  int threads = argc > 1 ? atoi(argv[1]) : 1;
  size_t turns = argc > 2 ? (size_t)atoi(argv[2]) : 15;
  const char *only = argc > 3 ? argv[3] : "";
  if (turns > MOST) turns = MOST;
  const char *slash = strrchr(argv[0], '/'), *program = slash ? slash + 1 : argv[0];
  static figure figures[COUNT * CALLS];
  size_t found = 0;
  printf("%-14s %-5s %9s %9s %9s   times as long as xent (%s, %d thread%s)\n", "shape", "", CALL_NAMES[0],
         CALL_NAMES[1], CALL_NAMES[2], xent_isa(), threads, threads == 1 ? "" : "s");
  for (const shape *of = SHAPES; of < SHAPES + COUNT; of++) {
    if (!strstr(of->name, only)) continue;
    size_t n = of->rows * of->classes * of->inner, positions = of->rows * of->inner;
    size_t size = n * (size_t)bytes(of);
    void *start = allocate(size), *x = allocate(size), *g = allocate(size);
    int64_t *y = allocate(positions * sizeof *y);
    uint64_t state = 88172645463325252u;
    for (size_t i = 0; i < n; i++) {
      float sum = 0;
      for (int k = 0; k < 4; k++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        sum += (float)(state >> 40) / 8388608.0f - 1.0f;
      }
      float v = 2 * sum;
      if (bytes(of) == 8) {
        ((double *)start)[i] = v;
      } else if (bytes(of) == 4) {
        ((float *)start)[i] = v;
      } else {
        uint32_t bits;
        memcpy(&bits, &v, 4);
        ((uint16_t *)start)[i] = (uint16_t)(bits >> 16);
      }
    }
    for (size_t i = 0; i < positions; i++) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      y[i] = (int64_t)(state % of->classes);
    }
    memcpy(x, start, size);
    printf("%-14s %-5s", of->name, of->dtype);
    for (int call = 0; call < CALLS; call++) {
      static double times[2][MOST];
      /* Calls of a turn: near a millisecond together. */
      double each = (double)n * 0.5 + 200;
      size_t calls = each > 1e6 ? 1 : (size_t)(1e6 / each);
      for (size_t turn = 0; turn < turns; turn++)
        for (int plain = 0; plain < 2; plain++) {
          if (call == 2) memcpy(x, start, size);
          double begin = now();
          for (size_t i = 0; i < calls; i++) run(of, call, plain, x, y, g, threads);
          times[plain][turn] = (now() - begin) / (double)calls;
        }
      double ours = median(times[0], turns), plain = median(times[1], turns);
      figure *f = &figures[found++];
      f->ratio = plain / ours;
      snprintf(f->what, sizeof f->what, "%s %s %s", of->name, of->dtype, CALL_NAMES[call]);
      printf(" %9.2f", f->ratio);
      fflush(stdout);
      fprintf(stderr, "%s-%s,%s,%s,%zu,%s,%d,%.0f,%.0f,%.3f\n", program, CALL_NAMES[call], of->dtype, of->name,
              of->classes, xent_isa(), threads, plain, ours, f->ratio);
    }
    printf("\n");
    free(start), free(x), free(g), free(y);
  }
  qsort(figures, found, sizeof *figures, by_ratio);
  printf("the worst:\n");
  for (size_t i = 0; i < found && i < WORST; i++) printf("%9.2f  %s\n", figures[i].ratio, figures[i].what);
  return 0;
}
