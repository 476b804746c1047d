/* A vocabulary in shards, as columns of one matrix: results and gradients of the whole for every cut, dtype
 * and option; the identity; what a call refuses, and that it then writes nothing. */
#include "reference.h"

static uint64_t state = 20;

/* Some columns of a packed operand [rows, classes, inner]. */
static xent_input columns(const xent_problem *p, xent_input whole, size_t first) {
    const char *data = whole.data;
    xent_input view = {data + first * p->inner * size_of(whole.dtype),
                       whole.dtype,
                       {(int64_t)(p->classes * p->inner), (int64_t)p->inner, 1}};
    return view;
}

static xent_problem shard_of(const xent_problem *p, size_t first, size_t end) {
    xent_problem shard = *p;
    shard.classes = end - first;
    shard.logits = columns(p, p->logits, first);
    if (!has_indices(p)) shard.targets = columns(p, p->targets, first);
    return shard;
}

/* All of a packed problem, cut at `cuts`, which begin with 0 and end with its classes. */
static void check_cut(const xent_problem *p, const size_t *cuts, int shards, const xent_input *grad_output) {
    static const xent_partial none = XENT_PARTIAL_INIT;
    size_t rows = p->rows * p->inner, count = rows * p->classes;
    xent_dtype dtype = p->logits.dtype == XENT_F64 ? XENT_F64 : XENT_F32;
    struct expected e = reference(p, grad_output, 0.5, NULL);
    xent_partial *merged = checked(malloc(rows * sizeof *merged)), *partials = poisoned(rows * sizeof *partials);
    for (size_t i = 0; i < rows; i++) merged[i] = none;
    for (int k = shards - 1; k >= 0; k--) { /* the last shard first */
        xent_problem shard = shard_of(p, cuts[k], cuts[k + 1]);
        CHECK_OK(xent_partial_forward(&shard, cuts[k], p->classes, partials));
        if (k % 2) {
            xent_partial_merge(merged, partials, rows);
        } else {
            xent_partial_merge(partials, merged, rows);
            memcpy(merged, partials, rows * sizeof *merged);
        }
    }

    double loss = 7, z_loss = 7, bonus = 7, normalizer = 7, z_normalizer = 7;
    uint64_t kept_rows = 7, correct = 7;
    double *row_losses = poisoned(rows * sizeof(double)), *lse = poisoned(rows * sizeof(double));
    double *entropy = poisoned(rows * sizeof(double));
    int64_t *argmax = poisoned(rows * sizeof(int64_t));
    xent_results r = XENT_RESULTS_INIT;
    if (p->reduction != XENT_NONE) r.loss = &loss, r.z_loss = &z_loss, r.entropy_bonus = &bonus;
    if (has_indices(p)) r.correct = &correct;
    r.row_losses = out(row_losses, XENT_F64);
    r.lse = lse;
    r.normalizer = &normalizer;
    r.z_normalizer = &z_normalizer;
    r.kept_rows = &kept_rows;
    r.argmax = argmax;
    r.entropy = out(entropy, XENT_F64);
    xent_problem last = shard_of(p, cuts[shards - 1], cuts[shards]);
    last.logits.data = NULL;
    CHECK_OK(xent_partial_finish(&last, p->classes, merged, &r));
    for (size_t i = 0; i < rows; i++) {
        CHECK_NEAR(lse[i], e.lse[i], e.lse_tolerances[i]);
        CHECK_NEAR(entropy[i], e.entropy[i], e.entropy_tolerances[i] + 1e-14);
        CHECK_NEAR(row_losses[i], e.row_losses[i], e.row_tolerances[i] + 1e-13);
        CHECK_U64((uint64_t)argmax[i], (uint64_t)e.argmax[i]);
    }
    if (r.loss) CHECK_NEAR(loss, e.loss, e.loss_tolerance + 1e-12);
    if (r.loss) CHECK_NEAR(z_loss, e.z_loss, e.z_tolerance + 1e-12);
    if (r.loss) CHECK_NEAR(bonus, e.entropy_bonus, e.bonus_tolerance + 1e-12);
    if (r.correct) CHECK_U64(correct, e.correct);
    CHECK_NEAR(normalizer, e.normalizer, 1e-12 * fabs(e.normalizer));
    CHECK_NEAR(z_normalizer, e.z_normalizer, 1e-12 * fabs(e.z_normalizer));
    CHECK_U64(kept_rows, e.kept_rows);

    void *grad = poisoned(count * size_of(dtype));
    for (int k = 0; k < shards; k++) {
        xent_problem shard = shard_of(p, cuts[k], cuts[k + 1]);
        xent_output g = {(char *)grad + cuts[k] * p->inner * size_of(dtype),
                         dtype,
                         {(int64_t)(p->classes * p->inner), (int64_t)p->inner, 1}};
        CHECK_OK(xent_partial_backward(&shard, cuts[k], p->classes, merged, grad_output, 0.5, &g));
    }
    check_values(__FILE__, __LINE__, "grad_logits", grad, dtype, e.grad, e.lse_terms, e.grad_tolerance, count);
    free(grad);
    free(row_losses);
    free(lse);
    free(entropy);
    free(argmax);
    free(merged);
    free(partials);
    expected_free(&e);
}

static void check_cuts(const xent_problem *p, const xent_input *grad_output) {
    size_t n = p->classes;
    const size_t whole[] = {0, n}, ragged[] = {0, 1, 1, n / 3, n}, ends[] = {0, 0, n / 2, n - 1, n, n};
    check_cut(p, whole, 1, grad_output);
    check_cut(p, ragged, 4, grad_output);
    check_cut(p, ends, 5, grad_output);
}

static void every_option(size_t rows, size_t classes, size_t inner, xent_dtype dtype) {
    size_t all = rows * inner, count = all * classes;
    void *logits = checked(malloc(count * size_of(dtype)));
    for (size_t i = 0; i < count; i++) set(logits, dtype, (int64_t)i, 12 * uniform(&state) - 6);
    int64_t *targets = checked(malloc(all * sizeof *targets));
    float *probabilities = checked(malloc(count * sizeof(float)));
    float *weights = checked(malloc(classes * sizeof(float))), *by_row = checked(malloc(all * sizeof(float)));
    uint8_t *mask = checked(malloc(all));
    fill(probabilities, count, -0.2, 1, &state);
    fill(weights, classes, -0.5, 2, &state);
    fill(by_row, all, 0.5, 2, &state);
    for (size_t i = 0; i < all; i++) {
        targets[i] = i % 5 == 3 ? -100 : (int64_t)(random_u64(&state) % classes);
        mask[i] = i % 7 != 2;
    }
    for (unsigned chosen = 0; chosen < 64; chosen++) {
        xent_problem p = packed(NULL, rows, classes, targets);
        p.logits = in(logits, dtype);
        p.inner = inner;
        p.reduction = chosen % 3;
        if (chosen & 1) p.label_smoothing = 0.1;
        if (chosen & 2) p.class_weights = in(weights, XENT_F32);
        if (chosen & 4) p.row_weights = in(by_row, XENT_F32), p.row_mask = in(mask, XENT_U8);
        if (chosen & 8) p.z_loss = 0.01, p.softcap = 5, p.logit_scale = 0.75;
        if (chosen & 16) p.targets = in(probabilities, XENT_F32);
        if (chosen & 32) p.entropy_bonus = 0.3;
        xent_input grad_output = in(by_row, XENT_F32);
        check_cuts(&p, p.reduction == XENT_NONE ? &grad_output : NULL);
    }
    free(logits);
    free(targets);
    free(probabilities);
    free(weights);
    free(by_row);
    free(mask);
}

/* The identity, on either side, leaves every bit; so do no states at all. */
static void identity(void) {
    static const xent_partial none = XENT_PARTIAL_INIT;
    static const xent_partial some[] = {{1.5, -0.0, 1, 0.25, 3, 4}, {NAN, 2, 1, NAN, NAN, 7},
                                        {-INFINITY, 0, 0, 0, -INFINITY, 2}, {-0.0, 0, -0.0, -1, -0.0, 0}};
    enum { n = sizeof some / sizeof *some };
    CHECK(sizeof(xent_partial) == 48);
    CHECK(none.argmax == -1 && isinf(none.lse) && none.lse < 0 && isinf(none.max) && none.max < 0);
    xent_partial left[n], right[n], nothing[n];
    memcpy(left, some, sizeof some);
    for (int i = 0; i < n; i++) right[i] = nothing[i] = none;
    xent_partial_merge(left, nothing, n);
    xent_partial_merge(right, some, n);
    CHECK_BYTES(left, some, sizeof some);
    CHECK_BYTES(right, some, sizeof some);
    xent_partial_merge(left, right, 0);
    xent_partial_merge(NULL, NULL, 0);
    CHECK_BYTES(left, some, sizeof some);
    xent_partial_merge(left, left, n); /* twice the classes */
    CHECK_NEAR(left[0].lse, 1.5 + log(2), 1e-15);
}

/* A shard without classes: its operands may be absent, its states are the identity. */
static void no_classes(void) {
    static const xent_partial none = XENT_PARTIAL_INIT;
    int64_t targets[3] = {0, 4, 2};
    xent_problem p = packed(NULL, 3, 0, targets);
    xent_partial states[3];
    memset(states, POISON, sizeof states);
    CHECK_OK(xent_partial_forward(&p, 2, 5, states));
    for (int i = 0; i < 3; i++) CHECK_BYTES(&states[i], &none, sizeof none);
    xent_output absent = out(NULL, XENT_F32);
    CHECK_OK(xent_partial_backward(&p, 5, 5, states, NULL, 1, &absent));
    p.targets = in(NULL, XENT_F32); /* probabilities of no classes */
    CHECK_OK(xent_partial_forward(&p, 0, 5, states));
    CHECK_OK(xent_partial_backward(&p, 0, 5, states, NULL, 1, &absent));
    p.targets = in(targets, XENT_I64);
    targets[1] = 5; /* an index of the whole vocabulary is checked all the same */
    CHECK_STATUS(xent_partial_forward(&p, 2, 5, states), XENT_ERR_TARGET);
    CHECK_MENTIONS(xent_last_error(), "targets[1] = 5 is outside [0, 5)");
}

/* ---- what is refused ------------------------------------------------------------------ */

enum { TOTAL = 9, FIRST = 3 };

struct calls {
    struct fixture f;
    xent_partial partials[ROWS + 1], merged[ROWS + 1];
    float weights[TOTAL];
    size_t offset, total;
    xent_partial *partials_arg;
    const xent_partial *merged_arg;
};

static void calls_init(struct calls *c) {
    memset(c, POISON, sizeof *c);
    fixture_init(&c->f);
    fill(c->weights, TOTAL, 0.5, 2, &state);
    c->f.problem.class_weights = in(c->weights, XENT_F32);
    c->f.problem.reduction = XENT_SUM;
    c->f.grad_output_arg = NULL;
    c->offset = FIRST;
    c->total = TOTAL;
    for (int i = 0; i < ROWS; i++) c->merged[i] = (xent_partial){1, 0.5, 1, 0.25, 2, 4};
    c->partials_arg = c->partials;
    c->merged_arg = c->merged;
}

static xent_status call(struct calls *c, enum entry entry) {
    const struct fixture *f = &c->f;
    switch (entry) {
    case FORWARD: return xent_partial_forward(f->problem_arg, c->offset, c->total, c->partials_arg);
    case BACKWARD:
        return xent_partial_backward(f->problem_arg, c->offset, c->total, c->merged_arg, f->grad_output_arg,
                                     f->grad_scale, f->grad_logits_arg);
    default: return xent_partial_finish(f->problem_arg, c->total, c->merged_arg, f->results_arg);
    }
}

/* FUSED stands for finish. */
static void refused(int line, struct calls *c, unsigned entries, xent_status expected, const char *word) {
    for (unsigned bit = FORWARD; bit <= FUSED; bit <<= 1) {
        if (!(entries & bit)) continue;
        struct calls *before = copy_of(c, sizeof *c);
        check_status(__FILE__, line, call(c, (enum entry)bit), expected);
        if (expected != XENT_OK) {
            check_mentions(__FILE__, line, xent_last_error(), word);
            check_bytes(__FILE__, line, c, before, sizeof *c, "a failing call");
        }
        free(before);
    }
}

#define REFUSED(entries, status, word, ...) \
    do {                                    \
        struct calls c;                     \
        calls_init(&c);                     \
        __VA_ARGS__;                        \
        refused(__LINE__, &c, (entries), (status), (word)); \
    } while (0)

static void refusals(void) {
    enum { FINISH = FUSED, SHARD = FORWARD | BACKWARD, ALL = SHARD | FINISH };
    REFUSED(ALL, XENT_OK, "", c.f.grad_scale = 1);
    REFUSED(ALL, XENT_ERR_NULL, "problem", c.f.problem_arg = NULL);
    REFUSED(FORWARD, XENT_ERR_NULL, "partials is NULL", c.partials_arg = NULL);
    REFUSED(BACKWARD | FINISH, XENT_ERR_NULL, "merged is NULL", c.merged_arg = NULL);
    REFUSED(FINISH, XENT_ERR_NULL, "results is NULL", c.f.results_arg = NULL);
    REFUSED(BACKWARD, XENT_ERR_NULL, "grad_logits is NULL", c.f.grad_logits_arg = NULL);
    REFUSED(BACKWARD, XENT_ERR_NULL, "grad_logits is NULL", c.f.grad_logits.data = NULL);
    REFUSED(SHARD, XENT_ERR_NULL, "logits is NULL", c.f.problem.logits.data = NULL);
    REFUSED(FINISH, XENT_OK, "", c.f.problem.logits.data = NULL);
    REFUSED(BACKWARD | FINISH, XENT_ERR_NULL, "targets is NULL", c.f.problem.targets.data = NULL);
    REFUSED(BACKWARD | FINISH, XENT_ERR_NULL, "targets is NULL", c.f.problem.targets = in(NULL, XENT_F32));
    REFUSED(ALL, XENT_ERR_STRUCT, "struct_size", c.f.problem.struct_size = 4);
    REFUSED(ALL, XENT_ERR_STRUCT, "flags", c.f.problem.flags = 1u << 31);
    REFUSED(FINISH, XENT_ERR_STRUCT, "struct_size", c.f.results.struct_size = 4);
    REFUSED(ALL, XENT_ERR_DTYPE, "targets.dtype", c.f.problem.targets.dtype = 77);
    REFUSED(SHARD, XENT_ERR_DTYPE, "logits.dtype", c.f.problem.logits.dtype = XENT_I32);
    REFUSED(BACKWARD, XENT_ERR_DTYPE, "grad_logits.dtype", c.f.grad_logits.dtype = XENT_F64);
    REFUSED(SHARD, XENT_ERR_SHAPE, "class_offset + classes = 5 + 5 exceeds total_classes = 9", c.offset = 5);
    REFUSED(SHARD, XENT_ERR_SHAPE, "exceeds total_classes = 9", c.offset = SIZE_MAX);
    REFUSED(SHARD, XENT_ERR_SHAPE, "exceeds total_classes = 4", c.total = 4; c.offset = 0);
    REFUSED(ALL, XENT_ERR_SHAPE, "total_classes", c.total = 0; c.offset = 0);
    REFUSED(ALL, XENT_ERR_SHAPE, "overflows", c.total = SIZE_MAX);
    REFUSED(ALL, XENT_ERR_SHAPE, "overflows", c.f.problem.rows = SIZE_MAX / 64);
    REFUSED(ALL, XENT_ERR_SHAPE, "2^53", c.total = (size_t)1 << 54; c.f.problem.class_weights.data = NULL);
    REFUSED(ALL, XENT_ERR_STRIDE, "class_weights", c.f.problem.class_weights.strides[1] = -1);
    REFUSED(ALL, XENT_ERR_ALIGN, "class_weights",
            c.f.problem.class_weights.data = (char *)c.weights + 1; c.total = TOTAL - 1);
    REFUSED(FORWARD, XENT_ERR_ALIGN, "partials", c.partials_arg = (xent_partial *)(void *)((char *)c.partials + 4));
    REFUSED(BACKWARD | FINISH, XENT_ERR_ALIGN, "merged",
            c.merged_arg = (const xent_partial *)(const void *)((const char *)c.merged + 4));
    REFUSED(FORWARD, XENT_ERR_OVERLAP, "partials overlaps class_weights",
            c.f.problem.class_weights = in(c.partials, XENT_F32));
    REFUSED(BACKWARD, XENT_ERR_OVERLAP, "grad_logits overlaps merged", c.f.grad_logits.data = c.merged);
    REFUSED(FINISH, XENT_ERR_OVERLAP, "lse overlaps merged",
            c.merged_arg = (const xent_partial *)(const void *)c.f.lse; c.f.problem.rows = 1);
    REFUSED(ALL, XENT_ERR_PARAM, "label_smoothing", c.f.problem.label_smoothing = 1.5);
    REFUSED(ALL, XENT_ERR_PARAM, "LOG_PROBS", c.f.problem.flags = XENT_FLAG_LOG_PROBS; c.f.results.lse = NULL);
    REFUSED(BACKWARD, XENT_ERR_PARAM, "grad_scale", c.f.grad_scale = NAN);
    REFUSED(FINISH, XENT_ERR_PARAM, "correct", fixture_soften(&c.f); c.f.results.correct = c.f.correct);
    REFUSED(FINISH, XENT_ERR_PARAM, "reduction none", c.f.problem.reduction = XENT_NONE);
    REFUSED(ALL, XENT_ERR_TARGET, "targets[4] = 9 is outside [0, 9)", c.f.targets[4] = 9);
    REFUSED(ALL, XENT_ERR_TARGET, "targets[4] = -1 is outside [0, 9)", c.f.targets[4] = -1);
    REFUSED(ALL, XENT_OK, "", c.f.targets[4] = 8);
}

int main(void) {
    every_option(9, 7, 1, XENT_F32);
    every_option(9, 300, 1, XENT_F32);
    every_option(2, 40, 5, XENT_BF16);
    if (!sampled()) {
        every_option(3, 4500, 1, XENT_F16);
        every_option(5, 130, 1, XENT_F64);
        every_option(2, 30, 3, XENT_F64);
    }
    identity();
    no_classes();
    refusals();
    return report();
}
