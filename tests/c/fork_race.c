/* Children that are made while another thread makes the process's first calls, and children that
 * pthread_atfork does not see: they work at once, without threads and without waiting. */
#include "check.h"

#if defined(SANITIZED)

int main(void) {
    puts("skipped: a child that pthread_atfork does not see inherits a sanitizer's locks");
    return report();
}

#else

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

enum { rows = 130, classes = 2000, SECONDS = 30, RACES = 400 };

static float logits[rows * classes], grad[2][rows * classes];
static int64_t targets[rows];
static double expected;
static atomic_int ready;

static void compute(uint32_t threads, const xent_pool *pool, float *to, double *loss) {
    xent_problem p = packed(logits, rows, classes, targets);
    p.threads = threads;
    p.pool = pool;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = loss;
    xent_output g = out(to, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
}

static void works(const xent_pool *pool) {
    double loss = -1;
    alarm(SECONDS); /* kills a process that hangs */
    compute(0, pool, grad[0], &loss);
    if (expected != 0) CHECK_BYTES(&loss, &expected, sizeof loss);
}

/* A child of any kind: its calls, a pool of its own and its end. */
static int child(xent_pool *pool) {
    failures = 0; /* those of the parent are its own */
    works(NULL);
    if (pool) works(pool);
    xent_pool *own = xent_pool_new(2);
    if (own) works(own);
    xent_pool_free(own);
    xent_pool_free(pool);
    return report();
}

static int succeeded(pid_t pid) {
    int status = 0;
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void *first_call(void *unused) {
    double loss = 0;
    (void)unused;
    ready = 1;
    compute(0, NULL, grad[1], &loss);
    return NULL;
}

/* A process whose other thread makes its first call while this one forks, `delay` turns later. */
static int race(int delay) {
    pthread_t thread;
    alarm(SECONDS);
    CHECK(pthread_create(&thread, NULL, first_call, NULL) == 0);
    while (!ready) {}
    for (volatile int k = 0; k < delay; k++) {}
    pid_t pid = fork();
    if (pid == 0) {
        alarm(3);
        _exit(child(NULL));
    }
    int fine = succeeded(pid);
    CHECK(pthread_join(thread, NULL) == 0);
    return !fine;
}

static void races(void) {
    int hung = 0;
    for (int k = 0; k < (sampled() ? RACES / 8 : RACES); k++) {
        fflush(NULL);
        pid_t pid = fork(); /* of a process that has made no call */
        if (pid == 0) _exit(race(k * 40 % 20000));
        hung += !succeeded(pid);
    }
    printf("%d children failed\n", hung);
    CHECK(hung == 0);
}

static pid_t call_fork(void) { return fork(); }
#if defined(__linux__)
#if defined(__x86_64__) || defined(__aarch64__)
static pid_t call_clone(void) { return (pid_t)syscall(SYS_clone, 17 /* SIGCHLD */, 0, 0, 0, 0); }
#define HAS_CLONE 1
#endif
#if defined(__GLIBC__) && (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 34)
pid_t _Fork(void);
static pid_t call__Fork(void) { return _Fork(); }
#define HAS__FORK 1
#endif
#endif

static void unseen(const char *name, pid_t (*make)(void), xent_pool *pool) {
    fflush(NULL);
    pid_t pid = make();
    CHECK(pid >= 0);
    if (pid == 0) _exit(child(pool));
    int fine = succeeded(pid);
    if (!fine) printf("a child of %s failed\n", name);
    CHECK(fine);
}

int main(void) {
    uint64_t state = 31;
    fill(logits, (size_t)rows * classes, -4, 4, &state);
    for (int i = 0; i < rows; i++) targets[i] = i;
    races();
    compute(1, NULL, grad[0], &expected);
    xent_pool *pool = xent_pool_new(2);
    CHECK(pool != NULL);
    works(NULL); /* the process has its threads */
    works(pool);
    unseen("fork", call_fork, pool);
#if defined(HAS_CLONE)
    unseen("clone", call_clone, pool);
#endif
#if defined(HAS__FORK)
    unseen("_Fork", call__Fork, pool);
#endif
    works(NULL);
    works(pool);
    xent_pool_free(pool);
    return report();
}

#endif
