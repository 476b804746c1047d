/* A call over threads where the heap is exhausted: the calling thread does the work alone, with the same
 * bits. No call prints or ends the process. */
#include "check.h"

#include <sys/wait.h>
#include <unistd.h>

#if !defined(GLIBC_ALONE)

int main(void) {
    puts("skipped: takes the place of glibc's malloc, which a sanitizer replaces");
    return report();
}

#else

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *old, size_t size);
void *__libc_memalign(size_t alignment, size_t size);

static atomic_int exhausted;

void *malloc(size_t size) { return exhausted ? NULL : __libc_malloc(size); }
void *calloc(size_t count, size_t size) { return exhausted ? NULL : __libc_calloc(count, size); }
void *realloc(void *old, size_t size) { return exhausted ? NULL : __libc_realloc(old, size); }
void *aligned_alloc(size_t alignment, size_t size) { return exhausted ? NULL : __libc_memalign(alignment, size); }
int posix_memalign(void **to, size_t alignment, size_t size) {
    *to = exhausted ? NULL : __libc_memalign(alignment, size);
    return *to == NULL;
}

enum { rows = 130, classes = 2000, long_classes = 130 * 2000 };

static float logits[rows * classes], grad[rows * classes], first[rows * classes];
static int64_t targets[rows];

static xent_status compute(uint32_t threads, const xent_pool *pool, int one_row, double *loss) {
    xent_problem p = packed(logits, one_row ? 1 : rows, one_row ? long_classes : classes, targets);
    p.threads = threads;
    p.pool = pool;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = loss;
    xent_output g = out(grad, XENT_F32);
    memset(grad, POISON, sizeof grad);
    return xent_forward_backward(&p, NULL, 1, &r, &g);
}

/* Started or not by earlier calls. */
static int without_memory(int started) {
    double expected[2] = {0, 0}, loss[2][2] = {{0, 0}, {0, 0}};
    xent_pool *pool = started ? xent_pool_new(2) : NULL, *none = NULL;
    CHECK_OK(compute(1, NULL, 0, &expected[0]));
    CHECK_OK(compute(1, NULL, 1, &expected[1]));
    memcpy(first, grad, sizeof grad);
    if (started) {
        CHECK_OK(compute(0, NULL, 0, &loss[0][0]));
        CHECK_OK(compute(0, pool, 0, &loss[0][0]));
        usleep(100000); /* the threads have begun to wait for work */
    }
    xent_status status[2][2];
    exhausted = 1;
    for (int k = 0; k < 2; k++)
        for (int one_row = 0; one_row < 2; one_row++)
            status[k][one_row] = compute(0, k ? pool : NULL, one_row, &loss[k][one_row]);
    if (!started) none = xent_pool_new(2);
    exhausted = 0;
    for (int k = 0; k < 2; k++)
        for (int one_row = 0; one_row < 2; one_row++) {
            CHECK_OK(status[k][one_row]);
            CHECK_BYTES(&loss[k][one_row], &expected[one_row], sizeof expected[0]);
        }
    CHECK_BYTES(grad, first, sizeof grad);
    CHECK(none == NULL);
    if (!started) CHECK_MENTIONS(xent_last_error(), "out of memory");
    /* Memory has come back. */
    double again = 0;
    CHECK_OK(compute(0, pool, 0, &again));
    CHECK_BYTES(&again, &expected[0], sizeof again);
    xent_pool_free(pool);
    return report();
}

int main(void) {
    uint64_t state = 33;
    fill(logits, (size_t)rows * classes, -4, 4, &state);
    for (int i = 0; i < rows; i++) targets[i] = i;
    for (int started = 0; started < 2; started++) {
        fflush(NULL);
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) _exit(without_memory(started));
        int status = 0;
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    return report();
}

#endif
