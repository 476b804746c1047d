/* xent_pool_free returns when the pool's threads have ended: a plugin that contains xent may be unloaded
 * then. The program starts xent's threads by a pthread_create of its own, which notes when they end. */
#include "check.h"

#if !defined(GLIBC_ALONE)

int main(void) {
    puts("skipped: takes the place of glibc's pthread_create, which a sanitizer replaces");
    return report();
}

#else

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

enum { rows = 130, classes = 2000, ROUNDS = 20, THREADS = 3 };

static float logits[rows * classes], grad[rows * classes];
static int64_t targets[rows];
static atomic_int started, ended;

struct start {
    void *(*routine)(void *);
    void *argument;
};

static void *run(void *from) {
    struct start start = *(struct start *)from;
    free(from);
    void *result = start.routine(start.argument);
    usleep(5000); /* code that an unloaded plugin would no longer have */
    ++ended;
    return result;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *), void *argument) {
    int (*original)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    void *symbol = dlsym(RTLD_NEXT, "pthread_create");
    struct start *start = checked(malloc(sizeof *start));
    memcpy(&original, &symbol, sizeof original);
    *start = (struct start){routine, argument};
    ++started;
    return original(thread, attributes, run, start);
}

int main(void) {
    uint64_t state = 32;
    fill(logits, (size_t)rows * classes, -4, 4, &state);
    for (int k = 0; k < ROUNDS; k++) {
        started = ended = 0;
        xent_pool *pool = xent_pool_new(THREADS);
        CHECK(pool != NULL);
        if (k % 2) {
            xent_problem p = packed(logits, rows, classes, targets);
            double loss = 0;
            p.pool = pool;
            xent_results r = XENT_RESULTS_INIT;
            r.loss = &loss;
            xent_output g = out(grad, XENT_F32);
            CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        }
        CHECK_U64((uint64_t)ended, 0);
        xent_pool_free(pool);
        CHECK_U64((uint64_t)ended, THREADS);
        CHECK_U64((uint64_t)started, THREADS);
    }
    return report();
}

#endif
