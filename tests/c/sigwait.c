/* A program that blocks a signal on its own threads and awaits it with sigwait receives it: no thread of a
 * pool takes it. */
#include "check.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { rows = 130, classes = 2000, SECONDS = 30 };

static float logits[rows * classes], grad[rows * classes];
static int64_t targets[rows];

static void compute(const xent_pool *pool) {
    xent_problem p = packed(logits, rows, classes, targets);
    double loss = 0;
    p.pool = pool;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    xent_output g = out(grad, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
}

/* The threads start while the signal is open, as a constructor or an earlier call may start them. */
static int await(int own) {
    static const int numbers[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGCHLD};
    enum { NUMBERS = sizeof numbers / sizeof *numbers };
    xent_pool *pool = own ? xent_pool_new(2) : NULL;
    compute(pool);
    sigset_t set, after;
    sigemptyset(&set);
    for (int k = 0; k < NUMBERS; k++) sigaddset(&set, numbers[k]);
    /* starting threads left this thread's mask alone */
    CHECK(sigprocmask(SIG_BLOCK, &set, &after) == 0);
    for (int number = 1; number < 32; number++) CHECK(!sigismember(&after, number));
    alarm(SECONDS);
    for (int k = 0; k < NUMBERS; k++) {
        int received = 0;
        CHECK(kill(getpid(), numbers[k]) == 0);
        CHECK(sigwait(&set, &received) == 0);
        CHECK(received == numbers[k]);
    }
    compute(pool);
    xent_pool_free(pool);
    return report();
}

int main(void) {
    for (int own = 0; own < 2; own++) {
        fflush(NULL);
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) _exit(await(own));
        int status = 0;
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    return report();
}
