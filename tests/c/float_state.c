/* A program linked with -ffast-math flushes denormals to zero, and may set another rounding mode. A call
 * leaves these settings alone, and all of its threads compute under those of the caller. They move results by at most the smallest normal number. */
#include "check.h"

#include <float.h>

/* The control register, the bits that operations change, and the bits that the test sets. */
#if defined(__SSE2__)
#include <xmmintrin.h>
enum { FLAGS = 0x3f, DAZ = 0x40, FTZ = 0x8000, ROUND_UP = 0x4000 };
typedef unsigned control;
static control get_control(void) { return _mm_getcsr(); }
static void set_control(control value) { _mm_setcsr(value); }
#define HAS_CONTROL 1
#elif defined(__aarch64__)
enum { FLAGS = 0, DAZ = 1 << 24, FTZ = 1 << 24, ROUND_UP = 1 << 22 }; /* one bit for both */
typedef uint64_t control;
static control get_control(void) {
    control value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
}
static void set_control(control value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#define HAS_CONTROL 1
#endif

int main(void) {
#if defined(HAS_CONTROL)
    static const struct { size_t rows, classes; } shapes[] = {{3, 40}, {300, 5000}};
    static const control settings[] = {0, FTZ, DAZ, FTZ | DAZ};
    control as_started = get_control();
    xent_pool *pool = xent_pool_new(3);
    CHECK(pool != NULL);
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
            control set = (as_started & ~(control)(FLAGS | FTZ | DAZ)) | settings[k];
            set_control(set);
            xent_status status = xent_forward_backward(&p, NULL, 1, &r, &g);
            control after = get_control() & ~(control)FLAGS;
            /* so does a call that fails */
            targets[1] = -5;
            xent_status failure = xent_forward_backward(&p, NULL, 1, &r, &g);
            control after_failure = get_control() & ~(control)FLAGS;
            targets[1] = 0;
            /* other threads, started under other settings, take over those of the caller */
            double shared_loss[3];
            xent_status shared_status[3];
            int equal[3];
            float *shared = checked(malloc(size));
            for (int team = 0; team < 3; team++) {
                p.threads = team == 0 ? 1 : 0;
                p.pool = team == 2 ? pool : NULL;
                r.loss = &shared_loss[team];
                g = out(shared, XENT_F32);
                set_control(set);
                shared_status[team] = xent_forward_backward(&p, NULL, 1, &r, &g);
                set_control(as_started);
                equal[team] = memcmp(shared, grad, size) == 0;
            }
            set_control(as_started);
            free(shared);
            for (int team = 0; team < 3; team++) {
                CHECK_OK(shared_status[team]);
                CHECK_BYTES(&shared_loss[team], &losses[k], sizeof losses[k]);
                CHECK(equal[team]);
            }
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
    xent_pool_free(pool);
    /* a call also leaves the rounding mode alone */
    struct fixture f;
    fixture_init(&f);
    set_control((as_started & ~(control)FLAGS) | ROUND_UP);
    xent_status status = xent_forward_backward(f.problem_arg, NULL, 1, f.results_arg, f.grad_logits_arg);
    control after = get_control();
    set_control(as_started);
    CHECK_OK(status);
    CHECK_U64(after & ~(control)FLAGS, (as_started & ~(control)FLAGS) | ROUND_UP);
#else
    printf("skipped: neither an x86 nor an AArch64\n");
#endif
    return report();
}
