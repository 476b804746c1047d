/* Threads: the same bits for every number of them, pools of the caller's own, and callers that
 * have threads of their own. */
#include "check.h"

#include <pthread.h>

struct run {
    size_t rows, classes;
    float *logits, *grad;
    int64_t *targets;
    double loss, *lse;
};

static struct run new_run(size_t rows, size_t classes, uint64_t seed) {
    struct run run = {rows, classes, NULL, NULL, NULL, 0, NULL};
    run.logits = checked(malloc(rows * classes * sizeof(float)));
    run.grad = poisoned(rows * classes * sizeof(float));
    run.targets = checked(malloc(rows * sizeof(int64_t)));
    run.lse = poisoned(rows * sizeof(double));
    fill(run.logits, rows * classes, -6, 6, &seed);
    for (size_t i = 0; i < rows; i++) run.targets[i] = (int64_t)(random_u64(&seed) % classes);
    return run;
}

static void free_run(struct run *run) {
    free(run->logits);
    free(run->grad);
    free(run->targets);
    free(run->lse);
}

/* Forward, backward and the fused call; their gradients one after the other in `grad`s. */
static xent_status compute(struct run *run, uint32_t threads, const xent_pool *pool, int fused) {
    xent_problem p = packed(run->logits, run->rows, run->classes, run->targets);
    p.threads = threads;
    p.pool = pool;
    p.label_smoothing = 0.1;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &run->loss;
    r.lse = run->lse;
    xent_output g = out(run->grad, XENT_F32);
    if (fused) return xent_forward_backward(&p, NULL, 1, &r, &g);
    xent_status status = xent_forward(&p, &r);
    return status == XENT_OK ? xent_backward(&p, run->lse, NULL, 1, &g) : status;
}

static const struct { size_t rows, classes; } shapes[] = {
    {1, 10}, {7, 100}, {20000, 10}, {3, 200003}, {300, 5000}, {1, 1000001},
};
/* The last two are long, and meet nothing that those before them do not. */
enum { SHAPES = sizeof shapes / sizeof *shapes, SAMPLED_SHAPES = SHAPES - 2 };

static void thread_counts(void) {
    static const uint32_t counts[] = {1, 2, 3, 8, 0, 1000};
    xent_pool *pools[3] = {xent_pool_new(1), xent_pool_new(3), xent_pool_new(0)};
    for (int k = 0; k < 3; k++) CHECK(pools[k] != NULL);
    for (size_t s = 0; s < (sampled() ? SAMPLED_SHAPES : SHAPES); s++) {
        struct run run = new_run(shapes[s].rows, shapes[s].classes, s);
        size_t size = run.rows * run.classes * sizeof(float);
        for (int fused = 0; fused < 2; fused++) {
            float *grad = NULL;
            double loss = 0, *lse = NULL;
            for (int k = 0; k < 6 + 3; k++) {
                memset(run.grad, POISON, size);
                memset(run.lse, POISON, run.rows * sizeof(double));
                CHECK_OK(compute(&run, k < 6 ? counts[k] : 0, k < 6 ? NULL : pools[k - 6], fused));
                if (k == 0) {
                    grad = copy_of(run.grad, size);
                    lse = copy_of(run.lse, run.rows * sizeof(double));
                    loss = run.loss;
                }
                CHECK_BYTES(run.grad, grad, size);
                CHECK_BYTES(run.lse, lse, run.rows * sizeof(double));
                CHECK_BYTES(&run.loss, &loss, sizeof loss);
            }
            free(grad);
            free(lse);
        }
        free_run(&run);
    }
    for (int k = 0; k < 3; k++) xent_pool_free(pools[k]);
    xent_pool_free(NULL);
}

/* A pool that was used can be freed, over and over. */
static void pool_lifetimes(void) {
    struct run run = new_run(100, 5000, 8);
    CHECK_OK(compute(&run, 0, NULL, 1));
    double loss = run.loss;
    for (int k = 0; k < (sampled() ? 3 : 8); k++) {
        xent_pool *pool = xent_pool_new(2);
        CHECK(pool != NULL);
        CHECK_OK(compute(&run, 0, pool, 1));
        CHECK_BYTES(&run.loss, &loss, sizeof loss);
        xent_pool_free(pool);
    }
    free_run(&run);
}

/* ---- callers on threads of their own --------------------------------------------------- */

enum { CALLERS = 4, CALLS = 12 };
struct caller {
    struct run run;
    const float *grad;
    double loss;
    const xent_pool *pool;
    pthread_t thread;
};

static void *call_again_and_again(void *argument) {
    struct caller *c = argument;
    size_t size = c->run.rows * c->run.classes * sizeof(float);
    for (int k = 0; k < (sampled() ? CALLS / 3 : CALLS); k++) {
        memset(c->run.grad, POISON, size);
        CHECK_OK(compute(&c->run, (uint32_t)(k % 3), c->pool, k % 2));
        CHECK_BYTES(&c->run.loss, &c->loss, sizeof c->loss);
        if (k % 2) CHECK_BYTES(c->run.grad, c->grad, size);
        /* failures in between, each with its own message */
        int64_t kept = c->run.targets[0];
        char expected[64];
        c->run.targets[0] = (int64_t)c->run.classes + k;
        snprintf(expected, sizeof expected, "targets[0] = %" PRId64 " is", c->run.targets[0]);
        CHECK_STATUS(compute(&c->run, 0, c->pool, 1), XENT_ERR_TARGET);
        CHECK_MENTIONS(xent_last_error(), expected);
        c->run.targets[0] = kept;
    }
    return NULL;
}

static void concurrent_callers(const xent_pool *pool) {
    static const struct { size_t rows, classes; } sizes[CALLERS] = {{100, 5000}, {5, 20}, {2, 150000}, {4000, 10}};
    struct caller callers[CALLERS];
    for (int k = 0; k < CALLERS; k++) {
        callers[k].run = new_run(sizes[k].rows, sizes[k].classes, 20 + (uint64_t)k);
        callers[k].pool = pool;
        CHECK_OK(compute(&callers[k].run, 1, NULL, 1));
        callers[k].loss = callers[k].run.loss;
        callers[k].grad = copy_of(callers[k].run.grad, sizes[k].rows * sizes[k].classes * sizeof(float));
    }
    for (int k = 0; k < CALLERS; k++)
        CHECK(pthread_create(&callers[k].thread, NULL, call_again_and_again, &callers[k]) == 0);
    for (int k = 0; k < CALLERS; k++) {
        CHECK(pthread_join(callers[k].thread, NULL) == 0);
        free((void *)(uintptr_t)callers[k].grad);
        free_run(&callers[k].run);
    }
}

int main(void) {
    thread_counts();
    pool_lifetimes();
    concurrent_callers(NULL);
    xent_pool *pool = xent_pool_new(2);
    concurrent_callers(pool);
    xent_pool_free(pool);
    return report();
}
