/* Signals that arrive during calls, on whatever thread, with a handler that computes in floating
 * point: no bit differs, and no wait is given up. */
#include "check.h"

#include <signal.h>
#include <sys/time.h>
#include <time.h>

/* Written by whichever thread a signal comes to. */
static atomic_int arrived, left_behind;

/* Changes registers and flags of floating point; calls nothing. */
static void handler(int number) {
    double x = (double)number;
    volatile float lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = (float)i * 1.5f;
    for (int i = 0; i < 16; i++) x = x * 0.75 + (double)lanes[i] / 3.0;
    left_behind = (int)x;
    ++arrived;
}

static const struct { size_t rows, classes; } shapes[] = {{150, 2000}, {10000, 10}, {2, 100003}, {5, 20}};
enum { SHAPES = sizeof shapes / sizeof *shapes };

struct run {
    size_t rows, classes;
    float *logits, *grad;
    int64_t *targets;
    double loss, *lse;
};

static xent_status compute(struct run *run, uint32_t threads, const xent_pool *pool) {
    xent_problem p = packed(run->logits, run->rows, run->classes, run->targets);
    p.threads = threads;
    p.pool = pool;
    p.softcap = 30;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &run->loss;
    r.lse = run->lse;
    xent_output g = out(run->grad, XENT_F32);
    memset(run->grad, POISON, run->rows * run->classes * sizeof(float));
    return xent_forward_backward(&p, NULL, 1, &r, &g);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Makes calls until enough signals have arrived. */
static void under_fire(int timer, int number, struct run *runs, float *const *grads, const double *losses) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = 0; /* no SA_RESTART: system calls are interrupted */
    sigemptyset(&action.sa_mask);
    CHECK(sigaction(number, &action, NULL) == 0);
    struct itimerval each = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    arrived = 0;
    CHECK(setitimer(timer, &each, NULL) == 0);
    double start = seconds();
    int calls = 0;
    while (arrived < 60 && seconds() - start < 20) {
        xent_pool *pool = xent_pool_new(2); /* starting and ending threads is interrupted, too */
        CHECK(pool != NULL);
        for (int s = 0; s < SHAPES; s++)
            for (uint32_t threads = 0; threads < 3; threads++) {
                struct run *run = &runs[s];
                run->loss = -1;
                CHECK_OK(compute(run, threads, threads == 2 ? pool : NULL));
                CHECK_BYTES(&run->loss, &losses[s], sizeof run->loss);
                CHECK_BYTES(run->grad, grads[s], run->rows * run->classes * sizeof(float));
                calls++;
            }
        xent_pool_free(pool);
    }
    CHECK(setitimer(timer, &never, NULL) == 0);
    /* One signal may still be pending. */
    CHECK(signal(number, SIG_IGN) != SIG_ERR);
    CHECK(arrived >= 60);
    printf("%d signals in %d calls\n", arrived, calls);
}

int main(void) {
    struct run runs[SHAPES];
    float *grads[SHAPES];
    double losses[SHAPES];
    for (int s = 0; s < SHAPES; s++) {
        size_t rows = shapes[s].rows, classes = shapes[s].classes;
        uint64_t state = 12;
        runs[s] = (struct run){rows, classes, NULL, NULL, NULL, 0, NULL};
        runs[s].logits = checked(malloc(rows * classes * sizeof(float)));
        runs[s].grad = poisoned(rows * classes * sizeof(float));
        runs[s].targets = checked(malloc(rows * sizeof(int64_t)));
        runs[s].lse = poisoned(rows * sizeof(double));
        fill(runs[s].logits, rows * classes, -6, 6, &state);
        for (size_t i = 0; i < rows; i++) runs[s].targets[i] = (int64_t)(i % classes);
        CHECK_OK(compute(&runs[s], 1, NULL));
        losses[s] = runs[s].loss;
        grads[s] = copy_of(runs[s].grad, rows * classes * sizeof(float));
    }
    under_fire(ITIMER_REAL, SIGALRM, runs, grads, losses);
    under_fire(ITIMER_PROF, SIGPROF, runs, grads, losses);
    for (int s = 0; s < SHAPES; s++) {
        free(runs[s].logits);
        free(runs[s].grad);
        free(runs[s].targets);
        free(runs[s].lse);
        free(grads[s]);
    }
    return report();
}
