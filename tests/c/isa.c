/* XENT_ISA lowers the choice of kernels. A value that is not available is an error. A process makes the
 * choice once, so each case has a process of its own. */
#include "check.h"

#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

static xent_status first_call(double *loss) {
    static const float logits[4] = {0.1f, 0.2f, 0.3f, 0.4f};
    static const int64_t target = 0;
    xent_problem p = packed(logits, 1, 4, &target);
    xent_results r = XENT_RESULTS_INIT;
    r.loss = loss;
    return xent_forward(&p, &r);
}

static int known(const char *isa) {
    static const char *const names[] = {"avx512", "avx2", "neon", "portable"};
    for (int k = 0; k < 4; k++)
        if (strcmp(isa, names[k]) == 0) return 1;
    return 0;
}

static void automatic(void) {
    double loss = -7;
    CHECK_OK(first_call(&loss));
    CHECK_NEAR(loss, 1.5425, 5e-5);
    CHECK(known(xent_isa()));
    CHECK(xent_isa() == xent_isa() || strcmp(xent_isa(), xent_isa()) == 0);
}

/* The baseline set of this architecture. */
#if defined(__aarch64__)
static const char plainest[] = "neon";
#else
static const char plainest[] = "portable";
#endif

static void lowered(void) {
    double loss = -7;
    CHECK_OK(first_call(&loss));
    CHECK_NEAR(loss, 1.5425, 5e-5);
    CHECK_TEXT(xent_isa(), plainest);
}

static void unknown(void) {
    double loss = -7;
    CHECK(first_call(&loss) != XENT_OK);
    CHECK_NEAR(loss, -7, 0);
    CHECK_MENTIONS(xent_last_error(), "XENT_ISA");
    CHECK_MENTIONS(xent_last_error(), "vax");
    CHECK(xent_isa() != NULL);
}

/* Kernels of another architecture are not available. */
static void unavailable(void) {
    double loss = -7;
    CHECK(first_call(&loss) != XENT_OK);
    CHECK_NEAR(loss, -7, 0);
    CHECK_MENTIONS(xent_last_error(), "XENT_ISA");
}

static void in_a_process(const char *value, void (*test)(void)) {
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(20);
        if (value) setenv("XENT_ISA", value, 1);
        else unsetenv("XENT_ISA");
        test();
        _exit(report());
    }
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void) {
    in_a_process(NULL, automatic);
    in_a_process(plainest, lowered);
    in_a_process("vax", unknown);
#if defined(__aarch64__)
    in_a_process("avx2", unavailable);
#else
    in_a_process("neon", unavailable);
#endif
    return report();
}
