/* Probability targets, of every float type, and the gradient with respect to them. */
#include "reference.h"

enum { rows = 9, classes = 41, inner = 3 };

static uint64_t state = 15;

/* All combinations of options; logits and targets of all types. */
enum { SMOOTHING = 1, CLASS_WEIGHTS = 2, ROW_WEIGHTS = 4, MASK = 8, Z_LOSS = 16, CAP = 32, ACCUMULATE = 64, INNER = 128,
       COMBINATIONS = 256 };

static void combinations(void) {
    static unsigned char logits[rows * classes * inner * sizeof(double)], targets[sizeof logits];
    float class_weights[classes], row_weights[rows * inner], grad_output[rows * inner];
    uint8_t mask[rows * inner];
    fill(class_weights, classes, -0.5, 2, &state);
    fill(row_weights, rows * inner, 0.5, 2, &state);
    fill(grad_output, rows * inner, -2, 2, &state);
    for (int i = 0; i < rows * inner; i++) mask[i] = i % 5 != 2;
    for (int k = 0; k < 16; k++)
        for (unsigned of = 0; of < COMBINATIONS; of++)
            for (xent_reduction reduction = XENT_MEAN; reduction <= XENT_NONE; reduction++) {
                /* a sample of the rarer pairs; in an emulator of all, and a smaller one */
                unsigned one_in = sampled() ? 29 : k > 4 ? 7 : 1;
                if ((of + (unsigned)reduction + (unsigned)k) % one_in) continue;
                xent_dtype x = every_float[k % 4], t = every_float[(k / 4 + k) % 4];
                for (int i = 0; i < rows * classes * inner; i++) {
                    set(logits, x, i, 8 * uniform(&state) - 4);
                    set(targets, t, i, 1.25 * uniform(&state) - 0.25); /* some negative, none adding up to 1 */
                }
                xent_problem p = packed(NULL, rows, classes, NULL);
                p.logits = in(logits, x);
                p.targets = in(targets, t);
                p.reduction = reduction;
                if (of & SMOOTHING) p.label_smoothing = 0.2;
                if (of & CLASS_WEIGHTS) p.class_weights = in(class_weights, XENT_F32);
                if (of & ROW_WEIGHTS) p.row_weights = in(row_weights, XENT_F32);
                if (of & MASK) p.row_mask = in(mask, XENT_U8);
                if (of & Z_LOSS) p.z_loss = 0.05;
                if (of & CAP) p.softcap = 6, p.logit_scale = 1.25;
                if (of & ACCUMULATE) p.flags = XENT_FLAG_ACCUMULATE, p.normalizer = 3.5;
                if (of & INNER) p.inner = inner;
                xent_input go = in(grad_output, XENT_F32);
                int before = failures;
                CHECK_ALL(&p, &go, 0.5);
                if (failures != before) {
                    fprintf(stderr, "... logits %u, targets %u, options 0x%x, reduction %u\n", x, t, of, reduction);
                    return;
                }
            }
}

static void sizes(void) {
    static const struct { size_t rows, classes; } shapes[] = {
        {1, 1}, {3, 2}, {4, 16}, {4, 63}, {4, 64}, {4, 65}, {2, 1000}, {2, 2049}, {300, 700}, {2, 70001},
    };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        size_t n = shapes[k].rows, c = shapes[k].classes;
        if (sampled() && n * c > 100000) continue; /* parallel.c has rows for a team as well */
        float *logits = checked(malloc(n * c * sizeof(float))), *targets = checked(malloc(n * c * sizeof(float)));
        fill(logits, n * c, -8, 8, &state);
        fill(targets, n * c, 0, 2 / (double)c, &state);
        xent_problem p = packed(logits, n, c, NULL);
        p.targets = in(targets, XENT_F32);
        CHECK_ALL(&p, NULL, 1);
        p.label_smoothing = 0.1;
        CHECK_ALL(&p, NULL, 1);
        free(logits);
        free(targets);
    }
}

/* One-hot rows are indices; smoothing is smoothing; a mean divides by rows, not by class weights. */
static void one_hot(void) {
    float logits[rows * classes], hot[rows * classes] = {0}, grad[2][rows * classes], class_weights[classes];
    int64_t targets[rows];
    fill(logits, rows * classes, -4, 4, &state);
    fill(class_weights, classes, 0.5, 2, &state);
    for (int i = 0; i < rows; i++) {
        targets[i] = (int64_t)(random_u64(&state) % classes);
        hot[i * classes + (int)targets[i]] = 1;
    }
    for (int weighted = 0; weighted < 2; weighted++)
        for (int smooth = 0; smooth < 2; smooth++) {
            xent_problem p = packed(logits, rows, classes, targets);
            p.label_smoothing = smooth * 0.1;
            p.z_loss = 0.1;
            if (weighted) p.class_weights = in(class_weights, XENT_F32);
            p.reduction = XENT_SUM;
            double loss[2] = {0}, normalizer[2] = {0};
            xent_results r = XENT_RESULTS_INIT;
            for (int k = 0; k < 2; k++) {
                xent_output g = out(grad[k], XENT_F32);
                if (k) p.targets = in(hot, XENT_F32);
                r.loss = &loss[k];
                r.normalizer = &normalizer[k];
                CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
            }
            CHECK_NEAR(loss[1], loss[0], 1e-6 * loss[0]);
            for (int i = 0; i < rows * classes; i++) CHECK_NEAR(grad[1][i], grad[0][i], 4e-6);
            CHECK_NEAR(normalizer[1], rows, 0);
        }
}

/* ignore_index is for indices; the mask is for both. */
static void what_is_ignored(void) {
    float logits[2 * 3] = {1, 2, 3, NAN, INFINITY, 0}, targets[2 * 3] = {0.25f, 0.25f, 0.5f, NAN, 1, 1}, grad[6];
    const uint8_t mask[2] = {1, 0};
    xent_problem p = packed(logits, 2, 3, NULL);
    p.targets = in(targets, XENT_F32);
    p.row_mask = in(mask, XENT_U8);
    double loss = 0, row_losses[2], lse[2];
    uint64_t kept_rows = 0;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    r.lse = lse;
    r.row_losses = out(row_losses, XENT_F64);
    r.kept_rows = &kept_rows;
    xent_output g = out(grad, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, 1.1576059645, 1e-6); /* 3.4076 - 2.25 */
    CHECK_U64(kept_rows, 1);
    CHECK_NEAR(row_losses[1], 0, 0);
    for (int c = 0; c < 3; c++) CHECK_NEAR(grad[3 + c], 0, 0);
    memset(grad, POISON, sizeof grad);
    CHECK_OK(xent_backward_targets(&p, lse, NULL, 1, &g));
    for (int c = 0; c < 3; c++) CHECK_NEAR(grad[c], 3.4076059645 - logits[c], 1e-6);
    for (int c = 0; c < 3; c++) CHECK_NEAR(grad[3 + c], 0, 0);
    /* whatever ignore_index is, also a value among the probabilities */
    p.ignore_index = 0;
    p.rows = 1;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_U64(kept_rows, 1);
    CHECK_NEAR(loss, 1.1576059645, 1e-6);
}

/* 0 * anything = 0: a class without mass adds no loss, and a factor of 0 makes a target's gradient 0. */
static void zero_factors(void) {
    float logits[4] = {1, -INFINITY, 2, 0}, targets[4] = {0.5f, 0, 0.5f, 0}, grad[4], class_weights[4] = {1, 0, 1, 1};
    xent_problem p = packed(logits, 1, 4, NULL);
    p.targets = in(targets, XENT_F32);
    double loss = 0, lse = 0;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    r.lse = &lse;
    xent_output g = out(grad, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK(isfinite(loss));
    CHECK_NEAR(grad[1], 0, 0);
    CHECK_OK(xent_backward_targets(&p, &lse, NULL, 1, &g));
    CHECK_NEAR(grad[1], INFINITY, 0); /* the slope of t * inf */
    p.class_weights = in(class_weights, XENT_F32);
    CHECK_OK(xent_backward_targets(&p, &lse, NULL, 1, &g));
    CHECK_NEAR(grad[1], 0, 0);
    CHECK_NEAR(grad[0], lse - 1, 1e-6);
    p.class_weights.data = NULL;
    p.label_smoothing = 1; /* the targets have a factor of 0 */
    CHECK_OK(xent_backward_targets(&p, &lse, NULL, 1, &g));
    for (int c = 0; c < 4; c++) CHECK_NEAR(grad[c], 0, 0);
    p.label_smoothing = 0;
    targets[1] = 0.25f; /* mass at a class of probability 0 */
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, INFINITY, 0);
    CHECK_NEAR(grad[1], -0.25, 0);
    /* a row of weight 0 may hold anything */
    const float no_weight = 0;
    p.row_weights = in(&no_weight, XENT_F32);
    p.reduction = XENT_SUM;
    logits[0] = NAN;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, 0, 0);
    for (int c = 0; c < 4; c++) CHECK_NEAR(grad[c], 0, 0);
    memset(grad, POISON, sizeof grad);
    CHECK_OK(xent_backward_targets(&p, &lse, NULL, 1, &g));
    for (int c = 0; c < 4; c++) CHECK_NEAR(grad[c], 0, 0);
}

/* The gradient of targets in any float type and layout, whatever type the targets have. */
static void types_of_the_gradient(void) {
    float logits[rows * classes * inner], targets[rows * classes * inner];
    enum { count = rows * classes * inner };
    double lse[rows * inner];
    fill(logits, count, -4, 4, &state);
    fill(targets, count, 0, 0.5, &state);
    xent_problem p = packed(logits, rows, classes, NULL);
    p.inner = inner;
    p.targets = in(targets, XENT_F32);
    xent_results r = XENT_RESULTS_INIT;
    r.lse = lse;
    CHECK_OK(xent_forward(&p, &r));
    struct expected e = reference(&p, NULL, 2, NULL);
    for (int k = 0; k < 4; k++) {
        xent_dtype dtype = every_float[k];
        unsigned char turned[2 * count * sizeof(double)], packed_grad[count * sizeof(double)];
        memset(turned, POISON, sizeof turned);
        xent_output g = out(packed_grad, dtype);
        CHECK_OK(xent_backward_targets(&p, lse, NULL, 2, &g));
        check_values(__FILE__, __LINE__, "grad_targets", packed_grad, dtype, e.grad_targets, e.target_tolerances, 1,
                     count);
        /* [classes, inner, rows], every second element */
        const int64_t strides[3] = {2, 2 * rows * inner, 2 * rows};
        const size_t shape[3] = {rows, classes, inner};
        g = (xent_output){turned, dtype, {strides[0], strides[1], strides[2]}};
        CHECK_OK(xent_backward_targets(&p, lse, NULL, 2, &g));
        for (size_t i = 0; i < rows; i++)
            for (size_t c = 0; c < classes; c++)
                for (size_t at = 0; at < inner; at++) {
                    int64_t to = place(strides, shape, i, c, at);
                    set(packed_grad, dtype, (int64_t)((i * classes + c) * inner + at), get(turned, dtype, to));
                    unsigned char poison[sizeof(double)];
                    memset(poison, POISON, sizeof poison);
                    CHECK_BYTES(turned + (size_t)(to + 1) * size_of(dtype), poison, size_of(dtype));
                }
        check_values(__FILE__, __LINE__, "grad_targets", packed_grad, dtype, e.grad_targets, e.target_tolerances, 1,
                     count);
    }
    expected_free(&e);
}

static void refusals(void) {
    struct fixture f;
    enum { ALL = EVERY_ENTRY | TARGETS };
    fixture_init(&f);
    fixture_ask(&f);
    fixture_soften(&f);
    FAILS(&f, WITH_RESULTS, XENT_ERR_PARAM, "correct"); /* no target index */
    f.results.correct = NULL;
    WORKS(&f, ALL);
    fixture_soften(&f);
    f.problem.targets.dtype = 99;
    FAILS(&f, ALL, XENT_ERR_DTYPE, "targets", "99");
    /* no gradient of an index */
    fixture_init(&f);
    FAILS(&f, TARGETS, XENT_ERR_PARAM, "targets");
    f.targets[3] = 99; /* nor is it read */
    FAILS(&f, TARGETS, XENT_ERR_PARAM, "targets");

    /* every pointer */
#define REFUSED(change, entries, status, ...) \
    fixture_init(&f);                         \
    fixture_soften(&f);                       \
    change;                                   \
    FAILS(&f, entries, status, __VA_ARGS__)
    REFUSED(f.problem_arg = NULL, ALL, XENT_ERR_NULL, "problem");
    REFUSED(f.lse_arg = NULL, BACKWARD | TARGETS, XENT_ERR_NULL, "lse");
    REFUSED(f.grad_targets_arg = NULL, TARGETS, XENT_ERR_NULL, "grad_targets");
    REFUSED(f.grad_targets.data = NULL, TARGETS, XENT_ERR_NULL, "grad_targets");
    REFUSED(f.problem.logits.data = NULL, ALL, XENT_ERR_NULL, "logits");
    REFUSED(f.problem.targets.data = NULL, ALL, XENT_ERR_NULL, "targets");
    /* faults of the descriptors */
    REFUSED(f.problem.flags = 0x100, ALL, XENT_ERR_STRUCT, "flags");
    REFUSED(f.problem.struct_size = 0, ALL, XENT_ERR_STRUCT, "struct_size");
    REFUSED(f.grad_targets.dtype = XENT_I32, TARGETS, XENT_ERR_DTYPE, "grad_targets");
    REFUSED(f.grad_targets.dtype = 7, TARGETS, XENT_ERR_DTYPE, "grad_targets");
    REFUSED(f.grad_output.dtype = XENT_U8, ALL & ~FORWARD, XENT_ERR_DTYPE, "grad_output");
    REFUSED(f.problem.classes = 0, ALL, XENT_ERR_SHAPE, "classes");
    REFUSED(f.problem.targets.strides[1] = -1, ALL, XENT_ERR_STRIDE, "targets", "-1");
    REFUSED(f.problem.targets.strides[0] = INT64_MAX / 2, ALL, XENT_ERR_STRIDE, "targets");
    REFUSED(f.grad_targets = out_rows(f.grad, XENT_F32, CLASSES - 1), TARGETS, XENT_ERR_STRIDE, "grad_targets");
    REFUSED(f.grad_targets.strides[1] = -3, TARGETS, XENT_ERR_STRIDE, "grad_targets", "-3");
    REFUSED(f.problem.targets.data = (const char *)f.probabilities + 2, ALL, XENT_ERR_ALIGN, "targets");
    REFUSED(f.grad_targets.data = (char *)f.grad + 1, TARGETS, XENT_ERR_ALIGN, "grad_targets");
    /* nothing shares memory with the gradient, not even exactly */
    REFUSED(f.grad_targets.data = f.probabilities, TARGETS, XENT_ERR_OVERLAP, "grad_targets", "targets");
    REFUSED(f.grad_targets.data = f.logits, TARGETS, XENT_ERR_OVERLAP, "grad_targets", "logits");
    REFUSED(f.grad_targets.data = f.lse_in; f.problem.rows = 1, TARGETS, XENT_ERR_OVERLAP, "grad_targets", "lse");
    REFUSED(f.grad_targets.data = f.row_weights; f.problem.rows = 1, TARGETS, XENT_ERR_OVERLAP, "grad_targets",
            "row_weights");
    REFUSED(f.grad_logits.data = f.probabilities, WITH_GRADIENT, XENT_ERR_OVERLAP, "grad_logits", "targets");
    REFUSED(f.problem.label_smoothing = 1.5, ALL, XENT_ERR_PARAM, "label_smoothing", "1.5");
    REFUSED(f.grad_scale = NAN, ALL & ~FORWARD, XENT_ERR_PARAM, "grad_scale");
#undef REFUSED
    /* no rows: no data */
    fixture_init(&f);
    fixture_soften(&f);
    f.problem.rows = 0;
    f.problem.logits.data = f.problem.targets.data = NULL;
    f.grad_targets.data = NULL;
    f.lse_arg = NULL;
    WORKS(&f, TARGETS);
}

/* A call with several faults reports the first in the order of the codes. */
static void order_of_errors(void) {
    struct fixture f;
    fixture_init(&f);
    f.problem.flags = 0x80000000u;
    f.grad_targets_arg = NULL;
    f.problem.row_weights.dtype = XENT_I32;
    f.problem.classes = 0;
    f.problem.targets.strides[0] = -1;
    f.problem.class_weights.data = (const char *)f.class_weights + 1;
    f.grad_targets.data = f.logits;
    FAILS(&f, TARGETS, XENT_ERR_STRUCT, "flags");
    f.problem.flags = 0;
    FAILS(&f, TARGETS, XENT_ERR_NULL, "grad_targets");
    f.grad_targets_arg = &f.grad_targets;
    FAILS(&f, TARGETS, XENT_ERR_DTYPE, "row_weights");
    f.problem.row_weights.dtype = XENT_F32;
    FAILS(&f, TARGETS, XENT_ERR_SHAPE, "classes");
    f.problem.classes = CLASSES;
    FAILS(&f, TARGETS, XENT_ERR_STRIDE, "targets");
    f.problem.targets.strides[0] = 0;
    FAILS(&f, TARGETS, XENT_ERR_ALIGN, "class_weights");
    f.problem.class_weights.data = f.class_weights;
    FAILS(&f, TARGETS, XENT_ERR_OVERLAP, "grad_targets", "logits");
    f.grad_targets.data = f.grad;
    FAILS(&f, TARGETS, XENT_ERR_PARAM, "targets"); /* class indices */
    fixture_soften(&f);
    WORKS(&f, TARGETS);
}

int main(void) {
    combinations();
    sizes();
    one_hot();
    what_is_ignored();
    zero_factors();
    types_of_the_gradient();
    refusals();
    order_of_errors();
    return report();
}
