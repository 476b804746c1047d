/* Calls from within an OpenMP region: each thread computes its own rows on the calling thread alone, or
 * uses the library's threads. Compiled with -fopenmp; if the compiler lacks it, the runner says so. */
#include "check.h"

#ifndef _OPENMP
#error "this test is compiled with -fopenmp"
#endif
#include <omp.h>

enum { ROWS_EACH = 20, PARTS = 12, ALL = ROWS_EACH * PARTS, CLASSES_EACH = 700, TEAM = 4 };

static float *logits, *expected, *grad;
static int64_t targets[ALL];
static double row_losses[ALL], lse[ALL], expected_losses[ALL], expected_lse[ALL];

/* The rows from `first` on, under the sum reduction: a mean would divide by the rows of the call. */
static xent_status compute(size_t first, size_t rows, uint32_t threads, float *to, double *losses, double *lses) {
    xent_problem p = packed(logits + first * CLASSES_EACH, rows, CLASSES_EACH, targets + first);
    p.threads = threads;
    p.reduction = XENT_SUM;
    p.label_smoothing = 0.1;
    xent_results r = XENT_RESULTS_INIT;
    r.row_losses = out(losses + first, XENT_F64);
    r.lse = lses + first;
    xent_output g = out(to + first * CLASSES_EACH, XENT_F32);
    return xent_forward_backward(&p, NULL, 1, &r, &g);
}

/* Each thread of the region computes one part; all bits are those of one call over all rows. */
static void parts(uint32_t threads) {
    size_t size = (size_t)ALL * CLASSES_EACH * sizeof(float);
    memset(grad, POISON, size);
    memset(row_losses, POISON, sizeof row_losses);
    memset(lse, POISON, sizeof lse);
    int members = 0;
#pragma omp parallel for num_threads(TEAM) schedule(dynamic)
    for (int part = 0; part < PARTS; part++) {
        CHECK_OK(compute((size_t)part * ROWS_EACH, ROWS_EACH, threads, grad, row_losses, lse));
#pragma omp atomic write
        members = omp_get_num_threads();
    }
    CHECK_U64((uint64_t)members, TEAM);
    CHECK_BYTES(grad, expected, size);
    CHECK_BYTES(row_losses, expected_losses, sizeof row_losses);
    CHECK_BYTES(lse, expected_lse, sizeof lse);
}

/* Every thread of the region makes the whole call, which is large enough for the library's threads. */
static void wholes(uint32_t threads) {
    size_t size = (size_t)ALL * CLASSES_EACH * sizeof(float);
#pragma omp parallel num_threads(TEAM)
    {
        float *to = poisoned(size);
        double *losses = poisoned(sizeof row_losses), *lses = poisoned(sizeof lse);
        CHECK_OK(compute(0, ALL, threads, to, losses, lses));
        CHECK_BYTES(to, expected, size);
        CHECK_BYTES(losses, expected_losses, sizeof row_losses);
        CHECK_BYTES(lses, expected_lse, sizeof lse);
        free(to);
        free(losses);
        free(lses);
    }
}

int main(void) {
    size_t count = (size_t)ALL * CLASSES_EACH;
    uint64_t state = 11;
    logits = checked(malloc(count * sizeof(float)));
    expected = poisoned(count * sizeof(float));
    grad = poisoned(count * sizeof(float));
    fill(logits, count, -6, 6, &state);
    for (int i = 0; i < ALL; i++) targets[i] = i % CLASSES_EACH;
    CHECK_OK(compute(0, ALL, 1, expected, expected_losses, expected_lse));
    for (int k = 0; k < 10; k++) {
        parts(1);
        parts(0);
        wholes(1);
        wholes(0);
        wholes(2);
    }
    free(logits);
    free(expected);
    free(grad);
    return report();
}
