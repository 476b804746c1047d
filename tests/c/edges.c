/* Edge cases: a mean over no rows, infinities, NaN, and the rows that they must not reach. */
#include "reference.h"

#include <float.h>

enum { rows = 4, classes = 70 };

static float logits[rows * classes], grad[rows * classes];
static int64_t targets[rows];
static double loss, row_losses[rows], lse[rows], normalizer;
static uint64_t kept_rows;

static void reset(xent_problem *p, xent_results *r, xent_output *g) {
    static const xent_results none = XENT_RESULTS_INIT;
    uint64_t state = 6;
    fill(logits, rows * classes, -3, 3, &state);
    for (int i = 0; i < rows; i++) targets[i] = 11 * i;
    *p = packed(logits, rows, classes, targets);
    *r = none;
    r->loss = &loss;
    r->row_losses = out(row_losses, XENT_F64);
    r->lse = lse;
    r->normalizer = &normalizer;
    r->kept_rows = &kept_rows;
    *g = out(grad, XENT_F32);
    memset(grad, POISON, sizeof grad);
}

static void all_zero(int row) {
    for (int c = 0; c < classes; c++)
        if (!near(grad[row * classes + c], 0, 0)) {
            CHECK_NEAR(grad[row * classes + c], 0, 0);
            return;
        }
}

static void all_nan(int row) {
    for (int c = 0; c < classes; c++)
        if (!isnan(grad[row * classes + c])) {
            CHECK_NEAR(grad[row * classes + c], NAN, 0);
            return;
        }
}

/* No kept row: NaN, or 0 if asked for; gradients 0 either way. */
static void empty(void) {
    xent_problem p;
    xent_results r;
    xent_output g;
    for (int how = 0; how < 3; how++) { /* ignored by target, ignored by mask, no rows */
        static const uint8_t mask[rows] = {0};
        reset(&p, &r, &g);
        if (how == 0)
            for (int i = 0; i < rows; i++) targets[i] = -100;
        if (how == 1) p.row_mask = in(mask, XENT_U8);
        if (how == 2) p.rows = 0;
        p.label_smoothing = 0.1;
        CHECK_OK(xent_forward(&p, &r));
        CHECK_NEAR(loss, NAN, 0);
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        CHECK_NEAR(loss, NAN, 0);
        CHECK_NEAR(normalizer, 0, 0);
        CHECK_U64(kept_rows, 0);
        for (int i = 0; i < (int)p.rows; i++) {
            all_zero(i);
            CHECK_NEAR(row_losses[i], 0, 0);
            CHECK(isfinite(lse[i])); /* still reported */
        }
        memset(grad, POISON, sizeof grad);
        CHECK_OK(xent_backward(&p, lse, NULL, 1, &g));
        for (int i = 0; i < (int)p.rows; i++) all_zero(i);

        p.flags = XENT_FLAG_EMPTY_IS_ZERO;
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        CHECK_NEAR(loss, 0, 0);
        for (int i = 0; i < (int)p.rows; i++) all_zero(i);
        p.flags = 0;
        p.normalizer = 3; /* a denominator was given: 0 / 3 */
        CHECK_OK(xent_forward(&p, &r));
        CHECK_NEAR(loss, 0, 0);
        p.normalizer = 0;
        p.reduction = XENT_SUM;
        CHECK_OK(xent_forward(&p, &r));
        CHECK_NEAR(loss, 0, 0);
        p.reduction = XENT_NONE;
        r.loss = NULL;
        CHECK_OK(xent_forward(&p, &r));
        for (int i = 0; i < (int)p.rows; i++) CHECK_NEAR(row_losses[i], 0, 0);
    }
    /* no rows and no classes either */
    reset(&p, &r, &g);
    p.rows = p.classes = 0;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, NAN, 0);
    /* rows that are kept with weight 0 are not "no rows": 0/0 */
    reset(&p, &r, &g);
    static const float zeros[classes] = {0};
    p.class_weights = in(zeros, XENT_F32);
    p.flags = XENT_FLAG_EMPTY_IS_ZERO;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(loss, NAN, 0);
    CHECK_U64(kept_rows, rows);
}

/* The values of an ignored row reach no other row. */
static void ignored_rows_leak_nothing(void) {
    static const float poison[] = {NAN, INFINITY, -INFINITY};
    for (int k = 0; k < 3; k++)
        for (int by_mask = 0; by_mask < 2; by_mask++) {
            static const uint8_t mask[rows] = {1, 0, 1, 1};
            static const float weights[rows] = {1, NAN, 2, 3}; /* the weight of an ignored row is not read */
            xent_problem p;
            xent_results r;
            xent_output g;
            reset(&p, &r, &g);
            if (by_mask) p.row_mask = in(mask, XENT_U8);
            else targets[1] = -100;
            p.row_weights = in(weights, XENT_F32);
            p.label_smoothing = 0.1;
            CHECK_OK(xent_forward(&p, &r));
            double clean = loss;
            for (int c = 0; c < classes; c++) logits[classes + c] = poison[k];
            CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
            CHECK_BYTES(&loss, &clean, sizeof loss);
            CHECK_NEAR(row_losses[1], 0, 0);
            all_zero(1);
            memset(grad, POISON, sizeof grad);
            CHECK_OK(xent_backward(&p, lse, NULL, 1, &g));
            all_zero(1);
            for (int c = 0; c < classes; c++) CHECK(isfinite(grad[c]));
        }
}

/* A logit of -inf excludes its class. */
static void minus_infinity(void) {
    xent_problem p;
    xent_results r;
    xent_output g;
    /* -inf everywhere but at the target: the loss is exactly 0, also behind a long run of -inf */
    reset(&p, &r, &g);
    targets[0] = classes - 1;
    for (int c = 0; c < classes - 1; c++) logits[c] = -INFINITY;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(row_losses[0], 0, 0);
    CHECK_NEAR(lse[0], logits[classes - 1], 1e-6);
    all_zero(0);
    /* at some other classes: probability and gradient 0 */
    reset(&p, &r, &g);
    logits[5] = logits[60] = -INFINITY;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK(isfinite(loss));
    CHECK_NEAR(grad[5], 0, 0);
    CHECK_NEAR(grad[60], 0, 0);
    /* at the target: loss +inf, gradient -1 there */
    reset(&p, &r, &g);
    p.reduction = XENT_SUM;
    logits[targets[0]] = -INFINITY;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, INFINITY, 0);
    CHECK_NEAR(row_losses[0], INFINITY, 0);
    CHECK_NEAR(grad[targets[0]], -1, 0);
    CHECK(isfinite(row_losses[1]));
    /* under smoothing every class has target mass: loss +inf, gradient -eps/C there */
    reset(&p, &r, &g);
    p.reduction = XENT_SUM;
    p.label_smoothing = 0.25;
    logits[5] = -INFINITY;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, INFINITY, 0);
    CHECK_NEAR(grad[5], -0.25 / classes, 1e-9);
    /* ... unless its weight is 0: 0 * inf = 0 */
    static float weights[classes];
    for (int c = 0; c < classes; c++) weights[c] = c == 5 ? 0 : 1;
    p.class_weights = in(weights, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK(isfinite(loss));
    CHECK_NEAR(grad[5], 0, 0);
    /* a whole row of -inf: NaN in that row alone */
    reset(&p, &r, &g);
    for (int c = 0; c < classes; c++) logits[classes + c] = -INFINITY;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(row_losses[1], NAN, 0);
    all_nan(1);
    CHECK(isfinite(row_losses[0]) && isfinite(row_losses[2]) && isfinite(grad[0]) && isfinite(grad[2 * classes]));
}

/* A NaN or +inf in any lane makes its row NaN, and no other. */
static void not_a_number(void) {
    for (int what = 0; what < 2; what++)
        for (int at = 0; at < classes; at++) {
            xent_problem p;
            xent_results r;
            xent_output g;
            reset(&p, &r, &g);
            logits[2 * classes + at] = what ? INFINITY : NAN;
            CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
            CHECK_NEAR(loss, NAN, 0);
            CHECK_NEAR(row_losses[2], NAN, 0);
            CHECK_NEAR(lse[2], what ? INFINITY : NAN, 0);
            all_nan(2);
            CHECK(isfinite(row_losses[1]) && isfinite(row_losses[3]) && isfinite(grad[classes]) &&
                  isfinite(grad[3 * classes]));
            memset(grad, POISON, sizeof grad);
            CHECK_OK(xent_backward(&p, lse, NULL, 1, &g));
            all_nan(2);
            CHECK(isfinite(grad[classes]) && isfinite(grad[3 * classes]));
        }
}

/* Logits the range of f32 apart, and far from 0. */
static void wide_range(void) {
    xent_problem p;
    xent_results r;
    xent_output g;
    /* the lowest finite f32, the usual stand-in for -inf in masks */
    reset(&p, &r, &g);
    for (int c = 0; c < classes; c++)
        if (c % 3) logits[c] = -FLT_MAX;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    double loss_masked = loss;
    CHECK(isfinite(loss));
    CHECK_NEAR(grad[1], 0, 0);
    for (int c = 0; c < classes; c++)
        if (c % 3) logits[c] = -INFINITY;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, loss_masked, 1e-12);
    /* logits from one end of the range to the other */
    reset(&p, &r, &g);
    for (int c = 0; c < classes; c++) logits[c] = -3e38f;
    logits[33] = 3e38f; /* the target, 0, is 6e38 below */
    targets[1] = 33;
    for (int c = 0; c < classes; c++) logits[classes + c] = logits[c];
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(row_losses[0], 3e38f + (double)3e38f, 1e32);
    CHECK_NEAR(row_losses[1], 0, 0);
    CHECK_NEAR(grad[0], -0.25, 1e-7);
    CHECK_NEAR(grad[33], 0.25, 1e-7);
    all_zero(1);
    /* an offset does not change the result: the logits are multiples of 2^-4, so both inputs are exact */
    reset(&p, &r, &g);
    for (int i = 0; i < rows * classes; i++) logits[i] = floorf(logits[i] * 16) / 16;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    double before = loss;
    static float plain[rows * classes];
    memcpy(plain, grad, sizeof plain);
    for (int sign = -1; sign <= 1; sign += 2) {
        for (int i = 0; i < rows * classes; i++) logits[i] += (float)sign * 1e4f;
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        CHECK_NEAR(loss, before, 1e-6);
        for (int i = 0; i < rows * classes; i++) CHECK_NEAR(grad[i], plain[i], 4e-6 * fabs(plain[i]));
        for (int i = 0; i < rows * classes; i++) logits[i] -= (float)sign * 1e4f;
    }
}

int main(void) {
    empty();
    ignored_rows_leak_nothing();
    minus_infinity();
    not_a_number();
    wide_range();
    return report();
}
