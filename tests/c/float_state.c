/* A program linked with -ffast-math flushes denormals to zero, and may set another rounding mode. A call
 * leaves these settings alone, and all of its threads compute under those of the caller. They move results by at
 * most the smallest normal number. A program that has floating-point exceptions trap, as with feenableexcept, gets no
 * signal from a call on finite numbers, and finds the exception flags as they were. */
#include "kinds.h"

#include <fenv.h>
#include <float.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <unistd.h>

/* The control register, the bits that operations change, and the bits that the test sets. */
#if defined(__SSE2__)
#include <xmmintrin.h>
enum { FLAGS = 0x3f, DAZ = 0x40, FTZ = 0x8000, ROUND_UP = 0x4000 };
#define MASKED_EXCEPTIONS 0x680 /* invalid, division by zero, overflow */
typedef unsigned control;
static control get_control(void) { return _mm_getcsr(); }
static void set_control(control value) { _mm_setcsr(value); }
#define HAS_CONTROL 1
#elif defined(__aarch64__)
enum { FLAGS = 0, DAZ = 1 << 24, FTZ = 1 << 24, ROUND_UP = 1 << 22 }; /* one bit for both; traps are optional */
typedef uint64_t control;
static control get_control(void) {
    control value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
}
static void set_control(control value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#define HAS_CONTROL 1
#endif

enum { FINITE = 4 };

static int moved;

/* Finds every flag as it was: none set, or all of them. */
static void keeps_flags(const struct kind *k) {
    for (int set = 0; set < 2; set++) {
        feclearexcept(FE_ALL_EXCEPT);
        if (set) feraiseexcept(FE_ALL_EXCEPT);
        int before = fetestexcept(FE_ALL_EXCEPT);
        xent_status status = kind_call(k);
        int after = fetestexcept(FE_ALL_EXCEPT);
        CHECK_OK(status);
        if (after != before && moved++ < 5) printf("flags %#x become %#x: %s\n", before, after, kind_name(k));
    }
}

#if defined(MASKED_EXCEPTIONS)
static int trapped;
static pthread_t caller;
static sigjmp_buf back;

static void trap(int number) {
    static const char text[] = "a signal on another thread\n";
    if (pthread_equal(pthread_self(), caller)) siglongjmp(back, number);
    if (write(2, text, sizeof text - 1)) _exit(1);
}

/* Whether the processor, or what stands for it, knows traps at all. */
static int has_traps(void) {
    volatile double zero = 0;
    if (sigsetjmp(back, 1)) return 1;
    zero = 1 / zero;
    return 0;
}

static void traps_nothing(const struct kind *k) {
    control set = get_control();
    if (sigsetjmp(back, 1)) {
        set_control(set);
        if (trapped++ < 5) printf("a signal: %s\n", kind_name(k));
        return;
    }
    xent_status status = kind_call(k);
    CHECK_U64(get_control(), set);
    CHECK_OK(status);
}

static void traps(size_t step) {
    CHECK(signal(SIGFPE, trap) != SIG_ERR);
    caller = pthread_self();
    feclearexcept(FE_ALL_EXCEPT);
    control set = get_control() & ~(control)MASKED_EXCEPTIONS;
    set_control(set);
    if (has_traps()) {
        set_control(set);
        xent_pool *pool = xent_pool_new(3); /* its threads begin with the traps of this one */
        CHECK(pool != NULL);
        CHECK(every_kind(step, FINITE, NULL, traps_nothing) > 300);
        CHECK(every_kind(step + 2, FINITE, pool, traps_nothing) > 300);
        xent_pool_free(pool);
        CHECK_U64((uint64_t)trapped, 0);
    } else {
        puts("skipped: floating-point exceptions do not trap here");
    }
    CHECK(signal(SIGFPE, SIG_DFL) != SIG_ERR);
}
#endif

static void exceptions(void) {
    size_t step = sampled() ? 499 : 61;
    fenv_t as_started;
    CHECK(fegetenv(&as_started) == 0);
    CHECK(every_kind(step, FINITE, NULL, keeps_flags) > 300);
    CHECK_U64((uint64_t)moved, 0);
#if defined(MASKED_EXCEPTIONS)
    traps(step);
#endif
    CHECK(fesetenv(&as_started) == 0);
}

int main(void) {
    exceptions();
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
