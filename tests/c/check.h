/* Shared by all C tests: checks that say what failed, and a valid problem that tests change one field at
 * a time. Include this file first: it asks for POSIX. */
#ifndef XENT_TESTS_CHECK_H
#define XENT_TESTS_CHECK_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* fork, alarm, mmap, setenv under -std=c11 */
#endif

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xent.h"

/* ---- the build ------------------------------------------------------------------------ */

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif
#if !defined(SANITIZED) && (defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__))
#define SANITIZED 1
#endif
/* A program may take the place of glibc's functions, which a sanitizer replaces itself. */
#if defined(__GLIBC__) && !defined(SANITIZED)
#define GLIBC_ALONE 1
#endif

/* ---- checks ------------------------------------------------------------------------- */

static atomic_int failures; /* counted from several threads */

/* Whether to run samples only: an emulator runs the tests, and long double is slow there. */
static inline int sampled(void) { return getenv("XENT_TEST_STRIDE") != NULL; }

static inline int report(void) { return failures == 0 ? 0 : 1; }

static inline void failed(const char *file, int line) {
    ++failures;
    fprintf(stderr, "%s:%d: ", file, line);
}

static inline void check_true(const char *file, int line, int ok, const char *what) {
    if (!ok) {
        failed(file, line);
        fprintf(stderr, "expected %s, got false\n", what);
    }
}

static inline void check_status(const char *file, int line, xent_status got, xent_status expected) {
    if (got != expected) {
        failed(file, line);
        fprintf(stderr, "expected %s, got %s (%s)\n", xent_status_name(expected), xent_status_name(got),
                xent_last_error());
    }
}

static inline void check_u64(const char *file, int line, uint64_t got, uint64_t expected) {
    if (got != expected) {
        failed(file, line);
        fprintf(stderr, "expected %" PRIu64 ", got %" PRIu64 "\n", expected, got);
    }
}

/* Equal, both NaN, or within the tolerance; a NaN on one side alone fails. */
static inline int near(double got, double expected, double tolerance) {
    if (isnan(expected)) return isnan(got);
    if (isinf(expected) || isinf(got)) return !(got < expected) && !(got > expected);
    return fabs(got - expected) <= tolerance;
}

static inline void check_near(const char *file, int line, double got, double expected, double tolerance) {
    if (!near(got, expected, tolerance)) {
        failed(file, line);
        fprintf(stderr, "expected %.17g within %.3g, got %.17g\n", expected, tolerance, got);
    }
}

static inline void check_bytes(const char *file, int line, const void *got, const void *expected,
                               size_t size, const char *what) {
    const unsigned char *g = got, *e = expected;
    for (size_t i = 0; i < size; i++)
        if (g[i] != e[i]) {
            failed(file, line);
            fprintf(stderr, "%s: byte %zu of %zu: expected 0x%02x, got 0x%02x\n", what, i, size, e[i], g[i]);
            return;
        }
}

static inline void check_text(const char *file, int line, const char *got, const char *expected) {
    if (strcmp(got, expected) != 0) {
        failed(file, line);
        fprintf(stderr, "expected \"%s\", got \"%s\"\n", expected, got);
    }
}

static inline void check_mentions(const char *file, int line, const char *text, const char *word) {
    if (!strstr(text, word)) {
        failed(file, line);
        fprintf(stderr, "expected \"%s\" somewhere in \"%s\"\n", word, text);
    }
}

#define CHECK(condition) check_true(__FILE__, __LINE__, (condition) ? 1 : 0, #condition)
#define CHECK_STATUS(got, expected) check_status(__FILE__, __LINE__, (got), (expected))
#define CHECK_OK(got) check_status(__FILE__, __LINE__, (got), XENT_OK)
#define CHECK_U64(got, expected) check_u64(__FILE__, __LINE__, (got), (expected))
#define CHECK_NEAR(got, expected, tolerance) check_near(__FILE__, __LINE__, (got), (expected), (tolerance))
#define CHECK_BYTES(got, expected, size) check_bytes(__FILE__, __LINE__, (got), (expected), (size), #got)
#define CHECK_TEXT(got, expected) check_text(__FILE__, __LINE__, (got), (expected))
#define CHECK_MENTIONS(text, word) check_mentions(__FILE__, __LINE__, (text), (word))

/* ---- memory and numbers ------------------------------------------------------------- */

static inline void *checked(void *p) {
    if (!p) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    return p;
}

enum { POISON = 0xa5 };

/* The contents of outputs before a call; a call that fails must leave them. */
static inline void *poisoned(size_t size) { return memset(checked(malloc(size + 1)), POISON, size); }

static inline void *copy_of(const void *from, size_t size) {
    return memcpy(checked(malloc(size + 1)), from, size);
}

/* SplitMix64: the same numbers on every machine. */
static inline uint64_t random_u64(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline double uniform(uint64_t *state) { return (double)(random_u64(state) >> 11) * 0x1p-53; }

static inline void fill(float *values, size_t count, double low, double high, uint64_t *state) {
    for (size_t i = 0; i < count; i++) values[i] = (float)(low + (high - low) * uniform(state));
}

/* ---- halves ------------------------------------------------------------------------- */

static inline float widen(xent_dtype dtype, uint16_t bits) {
    if (dtype == XENT_BF16) {
        uint32_t wide = (uint32_t)bits << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? NAN : bits >> 15 ? -INFINITY : INFINITY;
    double size = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
    return (float)(bits >> 15 ? -size : size);
}

/* The value of the half that is nearest to x, the even one of two; x is far from overflow. */
static inline double rounded(xent_dtype dtype, double x) {
    if (!(fabs(x) > 0) || isinf(x)) return x;
    int exponent, digits = dtype == XENT_BF16 ? 8 : 11, smallest = dtype == XENT_BF16 ? -133 : -24;
    frexp(x, &exponent);
    int ulp = exponent - digits < smallest ? smallest : exponent - digits;
    return ldexp(nearbyint(ldexp(x, -ulp)), ulp);
}

/* Its bits, of a NaN, an infinity, or a number that is far from overflow. */
static inline uint16_t half_bits(xent_dtype dtype, double x) {
    int exponent, digits = dtype == XENT_BF16 ? 8 : 11, bias = dtype == XENT_BF16 ? 126 : 14;
    unsigned sign = x < 0 ? 0x8000 : 0;
    if (isnan(x)) return 0x7fff;
    if (isinf(x)) return (uint16_t)(sign | (dtype == XENT_BF16 ? 0x7f80 : 0x7c00));
    double significand = frexp(rounded(dtype, fabs(x)), &exponent);
    if (!(significand > 0)) return 0;
    if (exponent + bias <= 0) /* subnormal */
        return (uint16_t)(sign | (unsigned)ldexp(significand, digits - 1 + exponent + bias));
    unsigned fraction = (unsigned)ldexp(significand, digits) - (1u << (digits - 1));
    return (uint16_t)(sign | (unsigned)(exponent + bias) << (digits - 1) | fraction);
}

/* ---- elements of any float type ------------------------------------------------------- */

static const xent_dtype every_float[4] = {XENT_F32, XENT_F64, XENT_BF16, XENT_F16};

static inline size_t size_of(xent_dtype dtype) { return dtype == XENT_F64 ? 8 : dtype == XENT_F32 ? 4 : 2; }

static inline double get(const void *data, xent_dtype dtype, int64_t at) {
    switch (dtype) {
    case XENT_F32: return ((const float *)data)[at];
    case XENT_F64: return ((const double *)data)[at];
    default: return widen(dtype, ((const uint16_t *)data)[at]);
    }
}

/* Rounded to the type; the value it then has. */
static inline double set(void *data, xent_dtype dtype, int64_t at, double value) {
    switch (dtype) {
    case XENT_F32: ((float *)data)[at] = (float)value; break;
    case XENT_F64: ((double *)data)[at] = value; break;
    default: ((uint16_t *)data)[at] = half_bits(dtype, value);
    }
    return get(data, dtype, at);
}

/* ---- operands ----------------------------------------------------------------------- */

static inline xent_input in(const void *data, xent_dtype dtype) {
    xent_input view = {data, dtype, {0, 0, 0}};
    return view;
}

static inline xent_output out(void *data, xent_dtype dtype) {
    xent_output view = {data, dtype, {0, 0, 0}};
    return view;
}

/* Rows `stride` elements apart, classes side by side. */
static inline xent_input in_rows(const void *data, xent_dtype dtype, int64_t stride) {
    xent_input view = {data, dtype, {stride, 1, 1}};
    return view;
}

static inline xent_output out_rows(void *data, xent_dtype dtype, int64_t stride) {
    xent_output view = {data, dtype, {stride, 1, 1}};
    return view;
}

static inline xent_problem packed(const float *logits, size_t rows, size_t classes, const int64_t *targets) {
    xent_problem problem = XENT_PROBLEM_INIT;
    problem.rows = rows;
    problem.classes = classes;
    problem.logits = in(logits, XENT_F32);
    problem.targets = in(targets, XENT_I64);
    return problem;
}

/* ---- a valid problem ---------------------------------------------------------------- */

enum { ROWS = 6, CLASSES = 5 };
/* TARGETS asks for probability targets (fixture_soften), EVERY_ENTRY takes either. */
enum entry { FORWARD = 1, BACKWARD = 2, FUSED = 4, TARGETS = 8, WITH_RESULTS = FORWARD | FUSED,
             WITH_GRADIENT = BACKWARD | FUSED, EVERY_ENTRY = FORWARD | BACKWARD | FUSED };

/* Every optional operand and every result in use, arguments included, and all the memory they
 * point to: "nothing was written" is one memcmp. */
struct fixture {
    xent_problem problem;
    xent_results results;
    xent_input grad_output;
    xent_output grad_logits, grad_targets;
    double grad_scale;
    /* what is passed on; point elsewhere or NULL to test it */
    const xent_problem *problem_arg;
    const xent_results *results_arg;
    const xent_input *grad_output_arg;
    const xent_output *grad_logits_arg, *grad_targets_arg;
    const double *lse_arg;
    /* inputs */
    float logits[ROWS * CLASSES];
    int64_t targets[ROWS];
    float probabilities[ROWS * CLASSES];
    float class_weights[CLASSES];
    float row_weights[ROWS];
    uint8_t row_mask[ROWS];
    float grad_output_values[ROWS];
    double lse_in[ROWS];
    /* outputs, poisoned; an element more than needed, so that a misaligned pointer stays inside */
    double loss[2];
    double row_losses[ROWS + 1];
    double lse[ROWS + 1];
    double normalizer[2];
    uint64_t kept_rows[2];
    double z_loss[2];
    double z_normalizer[2];
    int64_t argmax[ROWS + 1];
    uint64_t correct[2];
    double entropy[ROWS + 1];
    float grad[ROWS * CLASSES + 1];
};

static inline void fixture_init(struct fixture *f) {
    static const xent_problem problem = XENT_PROBLEM_INIT;
    static const xent_results results = XENT_RESULTS_INIT;
    memset(f, POISON, sizeof *f);
    f->problem = problem;
    f->results = results;
    uint64_t state = 1;
    fill(f->logits, ROWS * CLASSES, -3, 3, &state);
    fill(f->class_weights, CLASSES, 0.5, 2, &state);
    fill(f->row_weights, ROWS, 0.5, 2, &state);
    fill(f->grad_output_values, ROWS, 0.5, 2, &state);
    fill(f->probabilities, ROWS * CLASSES, 0, 0.5, &state);
    for (int i = 0; i < ROWS; i++) {
        double sum = 0;
        for (int c = 0; c < CLASSES; c++) sum += exp(f->logits[i * CLASSES + c]);
        f->lse_in[i] = log(sum);
        f->targets[i] = i % CLASSES;
        f->row_mask[i] = i != 1;
    }
    f->targets[2] = -100;
    f->problem.rows = ROWS;
    f->problem.classes = CLASSES;
    f->problem.logits = in(f->logits, XENT_F32);
    f->problem.targets = in(f->targets, XENT_I64);
    f->problem.class_weights = in(f->class_weights, XENT_F32);
    f->problem.row_weights = in(f->row_weights, XENT_F32);
    f->problem.row_mask = in(f->row_mask, XENT_U8);
    f->problem.label_smoothing = 0.1;
    f->results.loss = f->loss;
    f->results.row_losses = out(f->row_losses, XENT_F64);
    f->results.lse = f->lse;
    f->results.normalizer = f->normalizer;
    f->results.kept_rows = f->kept_rows;
    f->grad_output = in(f->grad_output_values, XENT_F32);
    f->grad_logits = f->grad_targets = out(f->grad, XENT_F32);
    f->grad_scale = 0.5;
    f->problem_arg = &f->problem;
    f->results_arg = &f->results;
    f->grad_output_arg = &f->grad_output;
    f->grad_logits_arg = &f->grad_logits;
    f->grad_targets_arg = &f->grad_targets;
    f->lse_arg = f->lse_in;
}

/* The other results too, and options for them to show. */
static inline void fixture_ask(struct fixture *f) {
    f->problem.z_loss = 0.125;
    f->results.z_loss = f->z_loss;
    f->results.z_normalizer = f->z_normalizer;
    f->results.argmax = f->argmax;
    f->results.correct = f->correct;
    f->results.entropy = out(f->entropy, XENT_F64);
}

/* Probabilities for targets. */
static inline void fixture_soften(struct fixture *f) { f->problem.targets = in(f->probabilities, XENT_F32); }

/* Log-probabilities for logits, and nothing asked for that they do not have. */
static inline void fixture_log_probs(struct fixture *f) {
    f->problem.flags = XENT_FLAG_LOG_PROBS;
    f->problem.z_loss = 0;
    f->results.lse = f->results.z_loss = NULL;
    f->results.entropy.data = NULL;
}

static inline xent_status fixture_call(const struct fixture *f, enum entry entry) {
    switch (entry) {
    case FORWARD: return xent_forward(f->problem_arg, f->results_arg);
    case BACKWARD:
        return xent_backward(f->problem_arg, f->lse_arg, f->grad_output_arg, f->grad_scale, f->grad_logits_arg);
    case TARGETS:
        return xent_backward_targets(f->problem_arg, f->lse_arg, f->grad_output_arg, f->grad_scale,
                                     f->grad_targets_arg);
    default:
        return xent_forward_backward(f->problem_arg, f->grad_output_arg, f->grad_scale, f->results_arg,
                                     f->grad_logits_arg);
    }
}

static inline const char *entry_name(enum entry entry) {
    return entry == FORWARD    ? "xent_forward"
           : entry == BACKWARD ? "xent_backward"
           : entry == TARGETS  ? "xent_backward_targets"
                               : "xent_forward_backward";
}

/* Calls the chosen entries; each has to return `expected`, name every word in its message and
 * leave every byte of the fixture as it was. */
static inline void check_fails(const char *file, int line, const struct fixture *f, unsigned entries,
                               xent_status expected, const char *const *words) {
    for (unsigned bit = FORWARD; bit <= TARGETS; bit <<= 1) {
        if (!(entries & bit)) continue;
        enum entry entry = (enum entry)bit;
        struct fixture *before = copy_of(f, sizeof *f);
        xent_status got = fixture_call(f, entry);
        if (got != expected) {
            failed(file, line);
            fprintf(stderr, "%s: expected %s, got %s (%s)\n", entry_name(entry), xent_status_name(expected),
                    xent_status_name(got), xent_last_error());
        } else {
            for (const char *const *word = words; *word; word++)
                if (!strstr(xent_last_error(), *word)) {
                    failed(file, line);
                    fprintf(stderr, "%s: expected \"%s\" somewhere in \"%s\"\n", entry_name(entry), *word,
                            xent_last_error());
                }
        }
        if (expected != XENT_OK) check_bytes(file, line, f, before, sizeof *f, entry_name(entry));
        free(before);
    }
}

static inline void check_works(const char *file, int line, const struct fixture *f, unsigned entries) {
    static const char *const none[] = {NULL};
    check_fails(file, line, f, entries, XENT_OK, none);
}

/* FAILS(&f, FORWARD | FUSED, XENT_ERR_NULL, "targets"); */
#define FAILS(f, entries, expected, ...) \
    check_fails(__FILE__, __LINE__, (f), (entries), (expected), (const char *const[]){__VA_ARGS__, NULL})
#define WORKS(f, entries) check_works(__FILE__, __LINE__, (f), (entries))

#endif
