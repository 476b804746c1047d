/* A program with two Rust libraries in it, each of which catches a panic of its own. No argument makes xent panic.
 * It does where its standard library does: on a pthread_attr_init that fails, such as this program's. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <xent.h>

int other_catches(void);

int pthread_attr_init(pthread_attr_t *attributes) {
    (void)attributes;
    return ENOMEM;
}

int main(void) {
    if (!other_catches()) return puts("the other library did not catch its panic"), 1;
    if (xent_pool_new(2)) return puts("a pool without threads"), 1;
    if (!strstr(xent_last_error(), "internal error")) return puts(xent_last_error()), 1;
    return 0;
}
