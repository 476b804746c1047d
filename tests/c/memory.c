/* A small call allocates nothing, neither in xent nor in the system's libraries. The test counts every
 * allocation of the program from the second call on: the first call registers a handler for forks.
 * tests/memory.rs tests calls over threads. */
#include "check.h"

#if !defined(GLIBC_ALONE)

int main(void) {
    puts("skipped: counts what glibc's malloc is asked for, which a sanitizer replaces");
    return report();
}

#else

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *old, size_t size);
void *__libc_memalign(size_t alignment, size_t size);

static atomic_size_t allocations;

void *malloc(size_t size) {
    ++allocations;
    return __libc_malloc(size);
}
void *calloc(size_t count, size_t size) {
    ++allocations;
    return __libc_calloc(count, size);
}
void *realloc(void *old, size_t size) {
    ++allocations;
    return __libc_realloc(old, size);
}
void *aligned_alloc(size_t alignment, size_t size) {
    ++allocations;
    return __libc_memalign(alignment, size);
}
int posix_memalign(void **to, size_t alignment, size_t size) {
    ++allocations;
    *to = __libc_memalign(alignment, size);
    return *to == NULL;
}

enum { rows = 20, classes = 100 };

static float x[rows * classes], grad[rows * classes], soft[rows * classes], weights[classes];
static double lse[rows], loss, z_loss;
static int64_t targets[rows], argmax[rows];

static void every_call(xent_problem *p, int soft_targets) {
    xent_results r = XENT_RESULTS_INIT, only_lse = XENT_RESULTS_INIT;
    xent_output to = out(grad, XENT_F32);
    r.loss = &loss;
    r.z_loss = &z_loss;
    r.lse = lse;
    r.argmax = argmax;
    only_lse.lse = lse;
    CHECK_OK(xent_forward(p, &r));
    CHECK_OK(xent_forward(p, &only_lse));
    CHECK_OK(xent_forward_backward(p, NULL, 1, &r, &to));
    CHECK_OK(xent_backward(p, lse, NULL, 1, &to));
    if (soft_targets) CHECK_OK(xent_backward_targets(p, lse, NULL, 1, &to));
}

static void every_problem(void) {
    xent_problem p = packed(x, rows, classes, targets);
    every_call(&p, 0);
    p.label_smoothing = 0.1;
    p.z_loss = 1e-3;
    p.class_weights = in(weights, XENT_F32);
    every_call(&p, 0);
    p.softcap = 30;
    p.logit_scale = 0.5;
    every_call(&p, 0);
    p.targets = in(soft, XENT_F32);
    every_call(&p, 1);
    p = packed(x, 1, classes, targets);
    p.inner = rows;
    every_call(&p, 0);

    xent_shape shape = XENT_SHAPE_INIT;
    xent_input from = in(x, XENT_F32);
    xent_output to = out(grad, XENT_F32);
    shape.rows = rows;
    shape.classes = classes;
    CHECK_OK(xent_softmax(&shape, &from, &to));
    CHECK_OK(xent_log_softmax(&shape, &from, &to));
}

int main(void) {
    for (int i = 0; i < rows * classes; i++) x[i] = (float)(i * 37 % 64) / 16 - 2, soft[i] = 1.0f / classes;
    for (int i = 0; i < classes; i++) weights[i] = 1;
    for (int i = 0; i < rows; i++) targets[i] = i;
    every_problem();
    CHECK(lse[0] > 0 && loss > 0);
    allocations = 0;
    for (int i = 0; i < 10; i++) every_problem();
    size_t counted = allocations;
    CHECK(counted == 0);
    /* The counter works: a refused call allocates a message. */
    xent_problem p = packed(x, rows, classes, targets);
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    p.label_smoothing = 2;
    CHECK_STATUS(xent_forward(&p, &r), XENT_ERR_PARAM);
    CHECK(allocations > 0);
    return report();
}

#endif
