/* No call takes more stack than xent_stack_bytes() says: on the calling thread, which may be a coroutine or one of
 * musl's, and on the threads of a pool. The stacks are the program's own and painted, and what a call has written over
 * counts. */
#include "kinds.h"

#if !defined(GLIBC_ALONE)

int main(void) {
    puts("skipped: takes the place of glibc's pthread_create, which a sanitizer replaces");
    return report();
}

#else

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

enum { SIZE = 512 * 1024, FRAME = 1024, THREADS = 4, PAINT = 0xd7 };

struct stack {
    unsigned char *low, *top;
    void *(*routine)(void *);
    void *argument;
};

static struct stack stacks[THREADS];
static int threads;

static size_t used(const struct stack *stack) {
    const unsigned char *at = stack->low;
    uint64_t painted, word;
    memset(&painted, PAINT, sizeof painted);
    for (; at < stack->top; at += sizeof word) {
        memcpy(&word, at, sizeof word);
        if (word != painted) break;
    }
    return (size_t)(stack->top - at);
}

static void *start(void *from) {
    struct stack *stack = from;
    unsigned char here = 0;
    stack->top = &here;
    return stack->routine(stack->argument);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *unused, void *(*routine)(void *), void *argument) {
    int (*original)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    void *symbol = dlsym(RTLD_NEXT, "pthread_create");
    memcpy(&original, &symbol, sizeof original);
    (void)unused;
    CHECK(threads < THREADS);
    void *low = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(low != MAP_FAILED);
    memset(low, PAINT, SIZE);
    struct stack *stack = &stacks[threads++];
    *stack = (struct stack){low, low, routine, argument};
    pthread_attr_t attributes;
    CHECK(pthread_attr_init(&attributes) == 0);
    CHECK(pthread_attr_setstack(&attributes, low, SIZE) == 0);
    int status = original(thread, &attributes, start, stack);
    CHECK(pthread_attr_destroy(&attributes) == 0);
    return status;
}

static size_t most;
static char which[256];
static int refused;

/* Makes a call on the first stack. */
static void measure(const struct kind *k) {
    unsigned char here = 0, *volatile top = &here; /* the compiler does not know that more lies below */
    struct stack *stack = &stacks[0];
    unsigned char *outside = stack->top;
    stack->top = top;
    memset(stack->top - FRAME - SIZE / 2, PAINT, SIZE / 2);
    xent_status status = kind_call(k);
    size_t bytes = used(stack);
    stack->top = outside;
    if (refused) CHECK_STATUS(status, XENT_ERR_TARGET);
    else CHECK_OK(status);
    if (bytes > most) {
        most = bytes;
        snprintf(which, sizeof which, "%s", kind_name(k));
    }
}

static int64_t none_of_them[KIND_ROWS];

static void refuse(const struct kind *k) {
    struct kind wrong = *k;
    if (k->entry >= KIND_TARGETS || k->problem.targets.data != kind_targets) return;
    wrong.problem.targets.data = none_of_them;
    measure(&wrong);
}

static void *calls(void *unused) {
    size_t step = sampled() ? 307 : 37;
    CHECK(every_kind(step, KIND_VALUES, NULL, measure) > 500);
    refused = 1;
    for (int i = 0; i < KIND_ROWS; i++) none_of_them[i] = KIND_CLASSES;
    CHECK(every_kind(step * 7, KIND_VALUES, NULL, refuse) > 50);
    return unused;
}

int main(void) {
    size_t bound = xent_stack_bytes();
    pthread_t thread;
    CHECK(bound <= 48 * 1024);
    CHECK(setenv("RAYON_NUM_THREADS", "2", 1) == 0);
    CHECK(pthread_create(&thread, NULL, calls, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_U64((uint64_t)threads, 3);
    printf("%zu of %zu bytes: %s\n", most, bound, which);
    CHECK(most <= bound);
    for (int i = 1; i < threads; i++) {
        printf("%zu of a worker's\n", used(&stacks[i]));
        CHECK(used(&stacks[i]) <= bound);
    }
    return report();
}

#endif
