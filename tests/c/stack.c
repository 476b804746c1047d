/* No call takes more stack than xent_stack_bytes() says: on the calling thread, which may be a coroutine or one of
 * musl's, and on the threads of a pool. The stacks are the program's own and painted, and what a call has written over
 * counts. A coroutine that has no more stack, with a page without access below it, makes the calls too. */
#include "kinds.h"

#if !defined(GLIBC_ALONE)

int main(void) {
    puts("skipped: takes the place of glibc's pthread_create, which a sanitizer replaces");
    return report();
}

#else

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

enum { SIZE = 512 * 1024, FRAME = 1024, THREADS = 5, PAINT = 0xd7 };
/* What the coroutine takes by itself: its own frame, that of kind_call, and the arguments that it pushes. */
enum { HARNESS = 256 };

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
    static int (*original)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (!original) { /* before the first call, whose stack this is not */
        void *symbol = dlsym(RTLD_NEXT, "pthread_create");
        memcpy(&original, &symbol, sizeof original);
    }
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

static xent_pool *pool;

static xent_status new_pool(const struct kind *unused) {
    (void)unused;
    pool = xent_pool_new(2);
    return pool ? XENT_OK : XENT_ERR_MEMORY;
}

static xent_status free_pool(const struct kind *unused) {
    (void)unused;
    xent_pool_free(pool);
    return XENT_OK;
}

/* Makes a call on the first stack. */
static void measure_call(xent_status (*call)(const struct kind *), const struct kind *k, const char *name) {
    unsigned char here = 0, *volatile top = &here; /* the compiler does not know that more lies below */
    struct stack *stack = &stacks[0];
    unsigned char *outside = stack->top;
    stack->top = top;
    memset(stack->top - FRAME - SIZE / 2, PAINT, SIZE / 2);
    xent_status status = call(k);
    size_t bytes = used(stack);
    stack->top = outside;
    if (refused) CHECK_STATUS(status, XENT_ERR_TARGET);
    else CHECK_OK(status);
    if (bytes > most) {
        most = bytes;
        snprintf(which, sizeof which, "%s", name ? name : kind_name(k));
    }
}

static void measure(const struct kind *k) { measure_call(kind_call, k, NULL); }

static ucontext_t caller, coroutine;
static unsigned char *coroutine_stack;
static const struct kind *asked;
static xent_status given;

static void on_coroutine(void) { given = kind_call(asked); }

static void overflowed(int number) {
    printf("more than %zu bytes: %s\n", xent_stack_bytes(), kind_name(asked));
    fflush(stdout);
    _exit(number);
}

static void fits(const struct kind *k) {
    CHECK(getcontext(&coroutine) == 0);
    coroutine.uc_stack.ss_sp = coroutine_stack;
    coroutine.uc_stack.ss_size = xent_stack_bytes() + HARNESS;
    coroutine.uc_link = &caller;
    makecontext(&coroutine, on_coroutine, 0);
    asked = k;
    CHECK(swapcontext(&caller, &coroutine) == 0);
    CHECK_OK(given);
}

/* Ends in `overflowed`, on a stack of its own, if a call takes more. */
static void on_coroutines(size_t step) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (xent_stack_bytes() + HARNESS + page - 1) / page * page;
    static char of_handler[64 * 1024];
    stack_t alternative = {.ss_sp = of_handler, .ss_size = sizeof of_handler};
    struct sigaction action = {.sa_handler = overflowed, .sa_flags = SA_ONSTACK};
    CHECK(sigaltstack(&alternative, NULL) == 0 && sigaction(SIGSEGV, &action, NULL) == 0);
    unsigned char *low = mmap(NULL, page + room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(low != MAP_FAILED && mprotect(low + page, room, PROT_READ | PROT_WRITE) == 0);
    coroutine_stack = low + page;
    CHECK(every_kind(step, KIND_VALUES, NULL, fits) > 500);
}

static int64_t none_of_them[KIND_ROWS];

static void refuse(const struct kind *k) {
    struct kind wrong = *k;
    int softmax = k->entry >= KIND_TARGETS && k->entry <= KIND_LOG_SOFTMAX_BACKWARD;
    if (softmax || k->problem.targets.data != kind_targets) return;
    wrong.problem.targets.data = none_of_them;
    measure(&wrong);
}

static void *calls(void *unused) {
    size_t step = sampled() ? 307 : 37;
    measure_call(new_pool, NULL, "pool_new");
    measure_call(free_pool, NULL, "pool_free");
    CHECK(every_kind(step, KIND_VALUES, NULL, measure) > 500);
    on_coroutines(step);
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
    CHECK_U64((uint64_t)threads, THREADS);
    printf("%zu of %zu bytes: %s\n", most, bound, which);
    CHECK(most <= bound);
    for (int i = 1; i < threads; i++) {
        printf("%zu of a worker's\n", used(&stacks[i]));
        CHECK(used(&stacks[i]) <= bound);
    }
    return report();
}

#endif
