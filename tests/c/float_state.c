/* A program linked with -ffast-math runs with denormals flushed to zero, perhaps with another
 * rounding. Its settings are left as found, and move results by no more than the smallest normal. */
#include "check.h"

#include <float.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
enum { FLAGS = 0x3f, DAZ = 0x40, FTZ = 0x8000, ROUND_UP = 0x4000 };
#endif

int main(void) {
#if defined(__SSE2__)
    static const struct { size_t rows, classes; } shapes[] = {{3, 40}, {300, 5000}};
    static const unsigned settings[] = {0, FTZ, DAZ, FTZ | DAZ};
    unsigned as_started = _mm_getcsr();
    for (int s = 0; s < 2; s++) {
        size_t rows = shapes[s].rows, classes = shapes[s].classes, size = rows * classes * sizeof(float);
        uint64_t state = 10;
        float *logits = checked(malloc(size)), *grad = checked(malloc(size)), *first = NULL;
        int64_t *targets = checked(calloc(rows, sizeof(int64_t)));
        /* far enough apart for probabilities in the denormals of f32, and denormal logits */
        fill(logits, rows * classes, -100, 0, &state);
        for (size_t i = 0; i < rows; i++) logits[i * classes] = 1e-40f;
        double losses[4];
        for (int k = 0; k < 4; k++) {
            xent_problem p = packed(logits, rows, classes, targets);
            p.reduction = XENT_SUM;
            xent_results r = XENT_RESULTS_INIT;
            r.loss = &losses[k];
            xent_output g = out(grad, XENT_F32);
            unsigned set = (as_started & ~(unsigned)(FLAGS | FTZ | DAZ)) | settings[k];
            _mm_setcsr(set);
            xent_status status = xent_forward_backward(&p, NULL, 1, &r, &g);
            unsigned after = _mm_getcsr() & ~(unsigned)FLAGS;
            /* a call that fails leaves it as well */
            targets[1] = -5;
            xent_status failure = xent_forward_backward(&p, NULL, 1, &r, &g);
            unsigned after_failure = _mm_getcsr() & ~(unsigned)FLAGS;
            targets[1] = 0;
            _mm_setcsr(as_started);
            CHECK_OK(status);
            CHECK_STATUS(failure, XENT_ERR_TARGET);
            CHECK_U64(after, set);
            CHECK_U64(after_failure, set);
            if (!first) first = copy_of(grad, size);
            CHECK_NEAR(losses[k], losses[0], 1e-12 * losses[0]);
            for (size_t i = 0; i < rows * classes; i++)
                if (!near(grad[i], first[i], FLT_MIN)) {
                    CHECK_NEAR(grad[i], first[i], FLT_MIN);
                    break;
                }
        }
        free(logits);
        free(grad);
        free(first);
        free(targets);
    }
    /* another rounding mode is the caller's own doing, and stays */
    struct fixture f;
    fixture_init(&f);
    _mm_setcsr((as_started & ~(unsigned)FLAGS) | ROUND_UP);
    xent_status status = xent_forward_backward(f.problem_arg, NULL, 1, f.results_arg, f.grad_logits_arg);
    unsigned after = _mm_getcsr();
    _mm_setcsr(as_started);
    CHECK_OK(status);
    CHECK_U64(after & ~(unsigned)FLAGS, (as_started & ~(unsigned)FLAGS) | ROUND_UP);
#else
    printf("skipped: not an x86\n");
#endif
    return report();
}
