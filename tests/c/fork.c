/* A forked child has no pool threads any more. A call there works or says at once that it cannot,
 * having written nothing; it never waits for a thread that does not exist. */
#include "check.h"

#include <pthread.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

enum { rows = 300, classes = 5000, SECONDS = 60 };

static float *logits, *grad, *poison;
static int64_t targets[rows];
static const size_t size = sizeof(float) * rows * classes;

static xent_status compute_to(float *to, uint32_t threads, const xent_pool *pool, size_t some_rows, double *loss) {
    xent_problem p = packed(logits, some_rows, classes, targets);
    p.threads = threads;
    p.pool = pool;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = loss;
    xent_output g = out(to, XENT_F32);
    memcpy(to, poison, size);
    return xent_forward_backward(&p, NULL, 1, &r, &g);
}

static xent_status compute(uint32_t threads, const xent_pool *pool, size_t some_rows, double *loss) {
    return compute_to(grad, threads, pool, some_rows, loss);
}

static void in_child(uint32_t threads, const xent_pool *pool, size_t some_rows, double expected) {
    double loss = -7;
    xent_status status = compute(threads, pool, some_rows, &loss);
    if (status == XENT_OK) {
        CHECK_BYTES(&loss, &expected, sizeof loss);
    } else {
        CHECK(threads != 1); /* the calling thread alone needs no pool */
        CHECK(xent_last_error()[0] != '\0');
        CHECK_NEAR(loss, -7, 0);
        CHECK_BYTES(grad, poison, size);
    }
}

static int child(xent_pool *pool, double whole, double one) {
    alarm(SECONDS); /* kills a child that hangs */
    in_child(1, NULL, rows, whole);
    in_child(1, NULL, 1, one);
    in_child(0, NULL, 1, one);
    in_child(0, NULL, rows, whole);
    in_child(2, NULL, rows, whole);
    in_child(0, pool, rows, whole);
    xent_pool *own = xent_pool_new(2); /* a pool made after the fork has its threads */
    if (own) in_child(0, own, rows, whole);
    xent_pool_free(own);
    xent_pool_free(pool); /* its threads are the parent's, and need not be waited for */
    return report();
}

static void wait_for(pid_t pid);

static void check_child(xent_pool *pool, double whole, double one) {
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) _exit(child(pool, whole, one));
    wait_for(pid);
}

static void wait_for(pid_t pid) {
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(!WIFSIGNALED(status)); /* SIGALRM: it hung */
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* A child that was forked before the first call is an ordinary process; its own child is not. */
static int first_to_call(void) {
    alarm(SECONDS);
    double whole = 0, one = 0, again = 0;
    CHECK_OK(compute(1, NULL, rows, &whole));
    CHECK_OK(compute(0, NULL, rows, &again));
    CHECK_BYTES(&again, &whole, sizeof whole);
    CHECK_OK(compute(0, NULL, 1, &one));
    check_child(NULL, whole, one); /* of a process that never made a pool */
    xent_pool *pool = xent_pool_new(2);
    CHECK_OK(compute(0, pool, rows, &again));
    CHECK_BYTES(&again, &whole, sizeof whole);
    check_child(pool, whole, one);
    xent_pool_free(pool);
    return report();
}

typedef xent_status softmax_call(const xent_shape *, const xent_input *, const xent_output *);

static xent_status soften(softmax_call *call, uint32_t threads, float *to) {
    xent_shape shape = XENT_SHAPE_INIT;
    shape.rows = rows, shape.classes = classes, shape.threads = threads;
    xent_input x = in(logits, XENT_F32);
    xent_output y = out(to, XENT_F32);
    return call(&shape, &x, &y);
}

/* Softmax and log-softmax have entry points of their own, which also work in a forked child. */
static int first_to_soften(void) {
    alarm(SECONDS);
    softmax_call *calls[] = {xent_softmax, xent_log_softmax};
    float *expected = checked(malloc(size));
    for (int k = 0; k < 2; k++) {
        CHECK_OK(soften(calls[k], 1, expected));
        CHECK_OK(soften(calls[k], 2, grad)); /* starts the threads */
        CHECK_BYTES(grad, expected, size);
        fflush(NULL);
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            alarm(SECONDS);
            memcpy(grad, poison, size);
            CHECK_OK(soften(calls[k], 2, grad));
            CHECK_BYTES(grad, expected, size);
            _exit(report());
        }
        wait_for(pid);
    }
    free(expected);
    return report();
}

static void in_child_of_its_own(int (*test)(void)) {
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) _exit(test());
    wait_for(pid);
}

/* Another thread in the middle of calls while this one forks. */
struct busy {
    const xent_pool *pool;
    double whole;
    atomic_int stop;
};

static void *call_until_told(void *argument) {
    struct busy *busy = argument;
    float *to = checked(malloc(size));
    while (!busy->stop) {
        double loss = 0;
        CHECK_OK(compute_to(to, 0, busy->pool, rows, &loss));
        CHECK_BYTES(&loss, &busy->whole, sizeof loss);
    }
    free(to);
    return NULL;
}

static void forks_during_calls(xent_pool *pool, double whole, double one) {
    struct busy busy[2] = {{pool, whole, 0}, {NULL, whole, 0}};
    pthread_t threads[2];
    for (int k = 0; k < 2; k++) CHECK(pthread_create(&threads[k], NULL, call_until_told, &busy[k]) == 0);
    for (int k = 0; k < 4; k++) check_child(pool, whole, one);
    for (int k = 0; k < 2; k++) busy[k].stop = 1;
    for (int k = 0; k < 2; k++) CHECK(pthread_join(threads[k], NULL) == 0);
}

int main(void) {
    uint64_t state = 9;
    logits = checked(malloc(size));
    grad = checked(malloc(size));
    poison = poisoned(size);
    fill(logits, (size_t)rows * classes, -4, 4, &state);
    for (int i = 0; i < rows; i++) targets[i] = i;
    in_child_of_its_own(first_to_call);
    in_child_of_its_own(first_to_soften);
    double whole = 0, one = 0, again = 0;
    xent_pool *pool = xent_pool_new(2);
    /* the library has its threads by now */
    CHECK_OK(compute(0, pool, rows, &whole));
    CHECK_OK(compute(0, NULL, rows, &whole));
    CHECK_OK(compute(0, NULL, 1, &one));
    check_child(pool, whole, one);
    /* the parent still works */
    CHECK_OK(compute(0, NULL, rows, &again));
    CHECK_BYTES(&again, &whole, sizeof whole);
    CHECK_OK(compute(0, pool, rows, &again));
    CHECK_BYTES(&again, &whole, sizeof whole);
    check_child(pool, whole, one);
    forks_during_calls(pool, whole, one);
    CHECK_OK(soften(xent_softmax, 0, grad));
    CHECK_OK(soften(xent_log_softmax, 0, grad));
    xent_pool_free(pool);
    free(logits);
    free(grad);
    free(poison);
    return report();
}
