/* A call over threads where the heap is exhausted: the calling thread does the work alone, with the same bits. So it
 * does wherever memory runs out on its way: each allocation of every kind of call fails once, with all that follow; and
 * where the system refuses threads. No call prints or ends the process, not even one that panics inside. */
#include "kinds.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
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

enum { ENDLESS = 1 << 30 };

/* Allocations that there is memory for. */
static atomic_int left = ENDLESS;

static int exhausted(void) {
    int now = left;
    while (now > 0 && now < ENDLESS && !atomic_compare_exchange_weak(&left, &now, now - 1)) {}
    return now == 0;
}

void *malloc(size_t size) { return exhausted() ? NULL : __libc_malloc(size); }
void *calloc(size_t count, size_t size) { return exhausted() ? NULL : __libc_calloc(count, size); }
void *realloc(void *old, size_t size) { return exhausted() ? NULL : __libc_realloc(old, size); }
void *aligned_alloc(size_t alignment, size_t size) { return exhausted() ? NULL : __libc_memalign(alignment, size); }
int posix_memalign(void **to, size_t alignment, size_t size) {
    *to = exhausted() ? NULL : __libc_memalign(alignment, size);
    return *to == NULL;
}

/* What a system at its limit of threads says. */
static int threads_refused, attributes_refused;

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *), void *argument) {
    static int (*original)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (threads_refused) return EAGAIN;
    if (!original) {
        void *symbol = dlsym(RTLD_NEXT, "pthread_create");
        memcpy(&original, &symbol, sizeof original);
    }
    return original(thread, attributes, routine, argument);
}

/* Rust's standard library panics if this fails. */
int pthread_attr_init(pthread_attr_t *attributes) {
    static int (*original)(pthread_attr_t *);
    if (attributes_refused) return ENOMEM;
    if (!original) {
        void *symbol = dlsym(RTLD_NEXT, "pthread_attr_init");
        memcpy(&original, &symbol, sizeof original);
    }
    return original(attributes);
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
    left = 0;
    for (int k = 0; k < 2; k++)
        for (int one_row = 0; one_row < 2; one_row++)
            status[k][one_row] = compute(0, k ? pool : NULL, one_row, &loss[k][one_row]);
    if (!started) none = xent_pool_new(2);
    left = ENDLESS;
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

/* No thread can be started: neither those of a pool nor those of the process. */
static int without_threads(int panics) {
    double expected[2], loss[2];
    for (int one_row = 0; one_row < 2; one_row++) CHECK_OK(compute(1, NULL, one_row, &expected[one_row]));
    memcpy(first, grad, sizeof grad);
    if (panics) attributes_refused = 1;
    else threads_refused = 1;
    CHECK(xent_pool_new(2) == NULL);
    CHECK_MENTIONS(xent_last_error(), panics ? "internal error" : "cannot start the threads");
    for (int again = 0; again < 2 && !panics; again++) {
        for (int one_row = 0; one_row < 2; one_row++) {
            CHECK_OK(compute(0, NULL, one_row, &loss[one_row]));
            CHECK_BYTES(&loss[one_row], &expected[one_row], sizeof loss[0]);
        }
        CHECK_BYTES(grad, first, sizeof grad);
    }
    threads_refused = attributes_refused = 0;
    xent_pool *pool = xent_pool_new(2);
    CHECK(pool != NULL);
    CHECK_OK(compute(0, pool, 0, &loss[0]));
    CHECK_BYTES(&loss[0], &expected[0], sizeof loss[0]);
    xent_pool_free(pool);
    return report();
}

static size_t failed_once, without_room;

/* What a call has written: the loss, the gradient, and the states of a shard. */
static uint64_t written(const struct kind *k) {
    uint64_t hash = 0;
    size_t elements = k->problem.rows * k->problem.inner * (2 * k->problem.classes + 3);
    const unsigned char *bytes = k->gradient.data;
    for (size_t i = 0; i < elements * size_of(k->gradient.dtype); i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    for (size_t i = 0; i < sizeof kind_partials; i++)
        hash = (hash ^ ((unsigned char *)kind_partials)[i]) * 0x100000001b3u;
    for (size_t i = 0; i < sizeof kind_scalars; i++) hash = (hash ^ ((unsigned char *)kind_scalars)[i]) * 0x100000001b3u;
    return hash;
}

static xent_status afresh(const struct kind *k, int allocations) {
    if (k->in_place) memcpy(kind_logits, kind_given, sizeof kind_logits);
    else memset(kind_out, 0, sizeof kind_out);
    memset(kind_scalars, 0, sizeof kind_scalars);
    memset(kind_partials, 0, sizeof kind_partials);
    left = allocations;
    xent_status status = kind_call(k);
    allocations = left;
    left = ENDLESS;
    failed_once += allocations == 0;
    return status;
}

/* A linear layer needs memory: without it, nothing is written. */
static void each_allocation(const struct kind *k) {
    int linear = kind_is_linear(k->entry);
    memset(kind_out, 0, sizeof kind_out);
    memset(kind_scalars, 0, sizeof kind_scalars);
    memset(kind_partials, 0, sizeof kind_partials);
    uint64_t nothing = written(k);
    CHECK_OK(afresh(k, ENDLESS));
    uint64_t expected = written(k);
    for (int n = 0, more = 1; more; n++) {
        size_t before = failed_once;
        xent_status status = afresh(k, n);
        if (linear && status == XENT_ERR_MEMORY) {
            CHECK_MENTIONS(xent_last_error(), "out of memory");
            CHECK_U64(written(k), nothing);
            without_room++;
        } else {
            CHECK_OK(status);
            CHECK_U64(written(k), expected);
        }
        more = failed_once > before;
    }
}

static void each_message(const struct kind *k) {
    struct kind wrong = *k;
    wrong.problem.classes = SIZE_MAX / 2;
    wrong.shape.classes = SIZE_MAX / 2;
    for (int n = 0; n < 3; n++) {
        left = n;
        xent_status status = kind_call(&wrong);
        left = ENDLESS;
        CHECK_STATUS(status, XENT_ERR_SHAPE);
        CHECK_MENTIONS(xent_last_error(), "overflow");
    }
}

static int on_the_way(int unused) {
    (void)unused;
    xent_pool *pool = xent_pool_new(2);
    size_t step = sampled() ? 1999 : 397;
    double loss = 0;
    CHECK_OK(compute(0, pool, 0, &loss));
    usleep(100000); /* the threads have begun to wait for work */
    CHECK(every_kind(step, KIND_VALUES, pool, each_allocation) > 50);
    CHECK(every_kind(step * 5, KIND_VALUES, pool, each_message) > 20);
    CHECK(failed_once > 20);
    CHECK(without_room > 20);
    printf("%zu allocations failed, %zu calls had no memory\n", failed_once, without_room);
    xent_pool_free(pool);
    return report();
}

/* Runs a part of the test in a process of its own, which prints nothing to stderr but what fails. */
static void apart(int (*part)(int), int argument) {
    fflush(NULL);
    FILE *printed = tmpfile();
    CHECK(printed != NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        CHECK(dup2(fileno(printed), STDERR_FILENO) == STDERR_FILENO);
        int failed_part = part(argument);
        fflush(NULL);
        _exit(failed_part);
    }
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(fseek(printed, 0, SEEK_END) == 0);
    CHECK_U64((uint64_t)ftell(printed), 0);
    rewind(printed);
    for (int c; (c = fgetc(printed)) != EOF;) fputc(c, stderr);
    fclose(printed);
}

int main(void) {
    uint64_t state = 33;
    fill(logits, (size_t)rows * classes, -4, 4, &state);
    for (int i = 0; i < rows; i++) targets[i] = i;
    for (int started = 0; started < 2; started++) apart(without_memory, started);
    for (int panics = 0; panics < 2; panics++) apart(without_threads, panics);
    apart(on_the_way, 0);
    return report();
}

#endif
