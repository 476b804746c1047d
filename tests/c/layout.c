/* Strides: gaps between rows, with canaries in them; strides of small operands; strides that are
 * ignored. */
#include "reference.h"

static void padded_rows(size_t rows, size_t classes, size_t logit_stride, size_t grad_stride, int accumulates) {
    uint64_t state = rows + classes;
    size_t logits_size = rows * logit_stride * sizeof(float), grad_size = rows * grad_stride * sizeof(float);
    float *logits = checked(malloc(logits_size)), *grad = checked(malloc(grad_size));
    int64_t *targets = checked(malloc(rows * sizeof(int64_t)));
    /* a NaN in the padding would spread if it were read as a logit */
    for (size_t i = 0; i < rows * logit_stride; i++) logits[i] = NAN;
    for (size_t i = 0; i < rows * grad_stride; i++) grad[i] = 7;
    double *prior = checked(malloc(rows * classes * sizeof(double)));
    for (size_t i = 0; i < rows; i++) {
        fill(logits + i * logit_stride, classes, -5, 5, &state);
        targets[i] = (int64_t)(random_u64(&state) % classes);
        for (size_t c = 0; c < classes; c++) prior[i * classes + c] = 7;
    }
    float *logits_before = copy_of(logits, logits_size), *grad_before = copy_of(grad, grad_size);
    xent_problem p = packed(logits, rows, classes, targets);
    p.logits = in_rows(logits, XENT_F32, (int64_t)logit_stride);
    p.flags = accumulates ? XENT_FLAG_ACCUMULATE : 0;
    p.label_smoothing = 0.1;
    struct expected e = reference(&p, NULL, 1, accumulates ? prior : NULL);
    double loss = 0, *lse = poisoned(rows * sizeof(double));
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    r.lse = lse;
    xent_output g = out_rows(grad, XENT_F32, (int64_t)grad_stride);
    for (int separate = 0; separate < 2; separate++) {
        memcpy(grad, grad_before, grad_size);
        if (separate) CHECK_OK(xent_backward(&p, lse, NULL, 1, &g));
        else CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        check_grad(__FILE__, __LINE__, grad, (int64_t)grad_stride, e.grad, separate ? e.lse_terms : e.grad_terms,
                   rows, classes);
        CHECK_BYTES(logits, logits_before, logits_size);
        for (size_t i = 0; i < rows; i++)
            CHECK_BYTES(grad + i * grad_stride + classes, grad_before + i * grad_stride + classes,
                        (grad_stride - classes) * sizeof(float));
    }
    CHECK_NEAR(loss, e.loss, 1e-6 * e.loss);

    /* in place, the padding stays too, and the bits are those of a packed call */
    if (!accumulates) {
        xent_output in_place = out_rows(logits, XENT_F32, (int64_t)logit_stride);
        CHECK_OK(xent_forward_backward(&p, NULL, 1, NULL, &in_place));
        float *dense = checked(malloc(rows * classes * sizeof(float)));
        for (size_t i = 0; i < rows; i++)
            memcpy(dense + i * classes, logits_before + i * logit_stride, classes * sizeof(float));
        p.logits = in(dense, XENT_F32);
        xent_output d = out(dense, XENT_F32);
        CHECK_OK(xent_forward_backward(&p, NULL, 1, NULL, &d));
        for (size_t i = 0; i < rows; i++) {
            CHECK_BYTES(logits + i * logit_stride, dense + i * classes, classes * sizeof(float));
            CHECK_BYTES(logits + i * logit_stride + classes, logits_before + i * logit_stride + classes,
                        (logit_stride - classes) * sizeof(float));
        }
        free(dense);
    }
    expected_free(&e);
    free(logits);
    free(logits_before);
    free(grad);
    free(grad_before);
    free(targets);
    free(prior);
    free(lse);
}

/* XENT_FLAG_ZERO_PADDING: 0 between the rows of the gradient, not a byte after the last row, and otherwise the bytes
 * of the call without it; out of place, accumulating, and in place. */
static void cleared_padding(size_t rows, size_t classes, size_t stride) {
    uint64_t state = 7 * rows + classes;
    size_t size = (rows * stride + 16) * sizeof(float);
    float *logits = poisoned(size);
    int64_t *targets = checked(malloc(rows * sizeof(int64_t)));
    double *lse = poisoned(rows * sizeof(double));
    for (size_t i = 0; i < rows; i++) {
        fill(logits + i * stride, classes, -5, 5, &state);
        targets[i] = i % 4 == 2 ? -100 : (int64_t)(random_u64(&state) % classes);
    }
    xent_problem p = packed(logits, rows, classes, targets);
    p.logits = in_rows(logits, XENT_F32, (int64_t)stride);
    xent_results r = XENT_RESULTS_INIT;
    r.lse = lse;
    CHECK_OK(xent_forward(&p, &r));
    for (int way = 0; way < 5; way++) {
        float *expected = copy_of(logits, size), *grad = copy_of(logits, size);
        for (int clears = 0; clears < 2; clears++) {
            float *to = clears ? grad : expected;
            int in_place = way > 2;
            xent_output g = out_rows(to, XENT_F32, (int64_t)stride);
            p.flags = (way == 2 ? XENT_FLAG_ACCUMULATE : 0) | (clears ? XENT_FLAG_ZERO_PADDING : 0);
            p.logits = in_rows(in_place ? to : logits, XENT_F32, (int64_t)stride);
            if (way == 1 || way == 4) CHECK_OK(xent_backward(&p, lse, NULL, 1, &g));
            else CHECK_OK(xent_forward_backward(&p, NULL, 1, NULL, &g));
        }
        for (size_t i = 0; i + 1 < rows; i++)
            memset(expected + i * stride + classes, 0, (stride - classes) * sizeof(float));
        CHECK_BYTES(grad, expected, size);
        free(expected);
        free(grad);
    }
    free(logits);
    free(targets);
    free(lse);
}

static void padding_that_is_none(void) {
    struct fixture f;
    fixture_init(&f);
    f.problem.flags = XENT_FLAG_ZERO_PADDING;
    WORKS(&f, EVERY_ENTRY);
    /* classes first: between its rows are other rows */
    f.grad_logits = (xent_output){f.grad, XENT_F32, {1, ROWS, 0}};
    FAILS(&f, WITH_GRADIENT, XENT_ERR_PARAM, "ZERO_PADDING", "grad_logits.strides[1] = 6");
    WORKS(&f, FORWARD);
    /* a column beside the gradient's classes lies in its padding */
    static float wide[ROWS * (CLASSES + 3)];
    fixture_init(&f);
    f.grad_logits = (xent_output){wide, XENT_F32, {CLASSES + 3, 1, 0}};
    f.problem.row_weights = (xent_input){wide + CLASSES + 1, XENT_F32, {CLASSES + 3}};
    WORKS(&f, WITH_GRADIENT);
    f.problem.flags = XENT_FLAG_ZERO_PADDING;
    FAILS(&f, WITH_GRADIENT, XENT_ERR_OVERLAP, "grad_logits with its padding overlaps row_weights");
}

/* Targets, weights, mask, grad_output and row losses with gaps, each its own. */
static void strided_operands(void) {
    enum { rows = 9, classes = 11 };
    uint64_t state = 5;
    float logits[rows * classes], row_weights[rows], grad_output[rows];
    int64_t targets[rows];
    uint8_t mask[rows];
    fill(logits, rows * classes, -3, 3, &state);
    fill(row_weights, rows, 0.5, 2, &state);
    fill(grad_output, rows, -1, 1, &state);
    for (int i = 0; i < rows; i++) {
        targets[i] = (int64_t)(random_u64(&state) % classes);
        mask[i] = i != 4;
    }
    static int64_t wide_targets[2 * rows];
    static float wide_weights[3 * rows], wide_output[4 * rows];
    static uint8_t wide_mask[5 * rows];
    for (int i = 0; i < rows; i++) {
        wide_targets[2 * i] = targets[i];
        wide_targets[2 * i + 1] = 12345; /* an error if it is read */
        wide_weights[3 * i] = row_weights[i];
        wide_weights[3 * i + 1] = wide_weights[3 * i + 2] = NAN;
        wide_output[4 * i] = grad_output[i];
        wide_output[4 * i + 1] = wide_output[4 * i + 2] = wide_output[4 * i + 3] = NAN;
        wide_mask[5 * i] = mask[i];
        for (int k = 1; k < 5; k++) wide_mask[5 * i + k] = !mask[i];
    }
    float grad[2][rows * classes];
    double row_losses[rows], wide_losses[3 * rows];
    for (int i = 0; i < 3 * rows; i++) wide_losses[i] = 7;
    xent_problem p = packed(logits, rows, classes, targets);
    p.reduction = XENT_NONE;
    p.row_weights = in(row_weights, XENT_F32);
    p.row_mask = in(mask, XENT_U8);
    xent_input go = in(grad_output, XENT_F32);
    xent_results r = XENT_RESULTS_INIT;
    r.row_losses = out(row_losses, XENT_F64);
    xent_output g = out(grad[0], XENT_F32);
    CHECK_OK(xent_forward_backward(&p, &go, 1, &r, &g));

    /* strides[1] of an operand without classes, and the stride of an axis of size 1, are anything */
    p.targets = (xent_input){wide_targets, XENT_I64, {2, -77, INT64_MIN}};
    p.row_weights = (xent_input){wide_weights, XENT_F32, {3, INT64_MAX, -1}};
    p.row_mask = (xent_input){wide_mask, XENT_U8, {5, 0, 0}};
    go = (xent_input){wide_output, XENT_F32, {4, 1, 1}};
    r.row_losses = (xent_output){wide_losses, XENT_F64, {3, -1, INT64_MAX}};
    g.data = grad[1];
    CHECK_OK(xent_forward_backward(&p, &go, 1, &r, &g));
    CHECK_BYTES(grad[1], grad[0], sizeof grad[0]);
    for (int i = 0; i < rows; i++) {
        CHECK_BYTES(&wide_losses[3 * i], &row_losses[i], sizeof(double));
        CHECK_NEAR(wide_losses[3 * i + 1], 7, 0);
        CHECK_NEAR(wide_losses[3 * i + 2], 7, 0);
    }
}

/* All zero means packed; only axes of more than one element count. */
static void strides_not_looked_at(void) {
    struct fixture f, base;
    fixture_init(&base);
    WORKS(&base, FUSED);
#define LAYOUT(change)                                              \
    fixture_init(&f);                                               \
    change;                                                         \
    WORKS(&f, EVERY_ENTRY);                                         \
    CHECK_BYTES(f.loss, base.loss, sizeof f.loss);                  \
    CHECK_BYTES(f.row_losses, base.row_losses, sizeof f.row_losses); \
    CHECK_BYTES(f.lse, base.lse, sizeof f.lse)
    LAYOUT(f.problem.logits.strides[2] = -9);
    LAYOUT(f.problem.targets.strides[1] = -9);
    LAYOUT(f.problem.row_weights.strides[1] = 5);
    LAYOUT(f.problem.row_mask.strides[2] = 100);
    LAYOUT(f.problem.class_weights.strides[0] = 3; f.problem.class_weights.strides[2] = -3);
    LAYOUT(f.results.row_losses.strides[1] = -1);
    LAYOUT(f.grad_logits.strides[2] = INT64_MIN);
    LAYOUT(f.problem.logits = in_rows(f.logits, XENT_F32, CLASSES));
    LAYOUT(f.grad_output.strides[0] = -5); /* MEAN reads one element */
#undef LAYOUT
    /* the stride of a single row is ignored, also that of an output */
    struct fixture one;
    fixture_init(&one);
    one.problem.rows = 1;
    WORKS(&one, FUSED);
    static const int64_t any[] = {-5, 1, 0, INT64_MAX, INT64_MIN};
    for (int k = 0; k < 5; k++) {
        fixture_init(&f);
        f.problem.rows = 1;
        f.problem.logits = in_rows(f.logits, XENT_F32, any[k]);
        f.grad_logits = out_rows(f.grad, XENT_F32, any[k]);
        f.problem.targets.strides[0] = f.results.row_losses.strides[0] = any[k];
        WORKS(&f, FUSED);
        CHECK_BYTES(f.loss, one.loss, sizeof f.loss);
        CHECK_BYTES(f.grad, one.grad, sizeof f.grad);
    }
    /* so is the stride of a single class */
    fixture_init(&one);
    one.problem.classes = 1;
    memset(one.targets, 0, sizeof one.targets);
    WORKS(&one, FUSED);
    f = one;
    fixture_init(&f);
    memset(f.targets, 0, sizeof f.targets);
    f.problem.classes = 1;
    f.problem.logits.strides[1] = f.problem.class_weights.strides[1] = f.grad_logits.strides[1] = -44;
    WORKS(&f, FUSED);
    CHECK_BYTES(f.loss, one.loss, sizeof f.loss);
}

int main(void) {
    for (int accumulates = 0; accumulates < 2; accumulates++) {
        padded_rows(1, 1, 4, 3, accumulates);
        padded_rows(7, 3, 5, 4, accumulates);
        padded_rows(7, 10, 10, 13, accumulates);
        padded_rows(5, 16, 17, 16, accumulates);
        padded_rows(5, 37, 64, 41, accumulates);
        padded_rows(3, 1000, 1001, 1024, accumulates);
        if (!sampled() || accumulates) padded_rows(300, 5000, 5003, 5001, accumulates);
    }
    cleared_padding(1, 3, 5);
    cleared_padding(70, 3, 5);
    cleared_padding(7, 16, 16);
    cleared_padding(9, 37, 64);
    if (!sampled()) cleared_padding(300, 5000, 5003);
    padding_that_is_none();
    strided_operands();
    strides_not_looked_at();
    return report();
}
