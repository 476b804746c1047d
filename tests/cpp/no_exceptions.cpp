// Without exceptions a failing call prints its message and aborts. Compiled with -fno-exceptions, which the header notices.
#include "check.hpp"

#if !defined(XENT_NO_EXCEPTIONS)
#error "the header has not noticed -fno-exceptions"
#endif

#if defined(__unix__)
#include <csignal>
#include <sys/wait.h>
#include <unistd.h>

int main() {
    const float logits[] = {1, 2, 3, 4};
    const int target = 7;
    int ends[2];
    CHECK(pipe(ends) == 0);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        xent::options options;
        options.threads = 1;
        xent::forward(logits, 1, 4, &target, options);
        _exit(0);
    }
    close(ends[1]);
    char text[200] = "";
    CHECK(read(ends[0], text, sizeof text - 1) > 0);
    close(ends[0]);
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    // An emulator adds a line of its own about the signal.
    const std::string said(text);
    CHECK_TEXT(said.substr(0, said.find('\n')), "xent: XENT_ERR_TARGET: targets[0] = 7 is outside [0, 4)");
    return report();
}
#else
int main() {
    std::puts("skipped: no fork");
    return 0;
}
#endif
