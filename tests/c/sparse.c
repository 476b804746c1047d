/* Sparse targets and a teacher's logits, against the same probabilities of all classes; the divergence; errors. */
#include "check.h"

static uint64_t state = 21;

struct results {
    double loss, kl[600], row_losses[600];
};

static xent_results asked(struct results *to) {
    xent_results r = XENT_RESULTS_INIT;
    memset(to, POISON, sizeof *to);
    r.loss = &to->loss;
    r.kl = out(to->kl, XENT_F64);
    r.row_losses = out(to->row_losses, XENT_F64);
    return r;
}

/* The results and the gradient of p, whose targets are few, agree with those of the probabilities of all classes. */
static void agree(xent_problem p, const double *dense) {
    static struct results few, all;
    size_t rows = p.rows * p.inner, count = rows * p.classes;
    double *grads[2] = {poisoned(count * sizeof(double)), poisoned(count * sizeof(double))};
    xent_output grad = out(grads[0], XENT_F64), dense_grad = out(grads[1], XENT_F64);
    xent_results r = asked(&few), s = asked(&all);
    CHECK_OK(xent_forward_backward(&p, NULL, 0.5, &r, &grad));
    p.target_classes = in(NULL, XENT_I32);
    p.target_count = 0;
    p.target_scale = 0;
    p.targets = in(dense, XENT_F64);
    CHECK_OK(xent_forward_backward(&p, NULL, 0.5, &s, &dense_grad));
    CHECK_NEAR(few.loss, all.loss, 1e-12);
    for (size_t i = 0; i < rows; i++) {
        CHECK_NEAR(few.kl[i], all.kl[i], 1e-12);
        CHECK_NEAR(few.row_losses[i], all.row_losses[i], 1e-12);
    }
    for (size_t i = 0; i < count; i++) CHECK_NEAR(grads[0][i], grads[1][i], 1e-13);
    free(grads[0]);
    free(grads[1]);
}

static void against_dense(void) {
    static const struct { size_t rows, classes, inner; } shapes[] = {
        {1, 1, 1}, {5, 7, 1}, {40, 130, 1}, {3, 5000, 1}, {2, 21, 40}, {1, 300, 70}, {2, 66000, 1},
    };
    enum { places = 5 };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (int teacher = 0; teacher < 2; teacher++)
            for (int sparse = 0; sparse < 2; sparse++) {
                size_t n = shapes[k].rows, c = shapes[k].classes, inner = shapes[k].inner, rows = n * inner, count = rows * c;
                if (!teacher && !sparse) continue;
                size_t wide = sparse ? places : c;
                double *logits = checked(malloc(count * sizeof(double))), *dense = checked(calloc(count, sizeof(double)));
                double *values = checked(malloc(rows * wide * sizeof(double)));
                int32_t *classes = checked(malloc(rows * places * sizeof(int32_t)));
                for (size_t i = 0; i < count; i++) logits[i] = 8 * uniform(&state) - 4;
                for (size_t i = 0; i < rows * wide; i++) values[i] = teacher ? 6 * uniform(&state) : uniform(&state) / places;
                for (size_t i = 0; i < rows * places; i++)
                    classes[i] = i % 4 == 3 ? -7 : (int32_t)(random_u64(&state) % c); /* some twice */
                for (size_t row = 0; row < n; row++)
                    for (size_t q = 0; q < inner; q++) {
                        double total = 0;
                        for (int sum = teacher; sum >= 0; sum--)
                            for (size_t j = 0; j < wide; j++) {
                                size_t at = (row * wide + j) * inner + q;
                                int64_t class = sparse ? classes[at] : (int64_t)j;
                                double t = teacher ? exp(0.5 * values[at]) : values[at];
                                if (class == -7) continue;
                                if (sum) total += t;
                                else dense[(row * c + (size_t)class) * inner + q] += teacher ? t / total : t;
                            }
                    }
                xent_problem p = XENT_PROBLEM_INIT;
                p.rows = n, p.classes = c, p.inner = inner;
                p.logits = in(logits, XENT_F64);
                p.targets = in(values, XENT_F64);
                p.ignore_index = -7;
                if (sparse) p.target_classes = in(classes, XENT_I32), p.target_count = places;
                if (teacher) p.target_scale = 0.5;
                agree(p, dense);
                p.label_smoothing = 0.2;
                p.z_loss = 0.01;
                agree(p, dense);
                free(logits);
                free(dense);
                free(values);
                free(classes);
            }
}

/* A problem of two rows, four classes and two places. */
static const float some_logits[8] = {0.1f, 0.2f, 0.3f, 0.4f, 0.4f, 0.3f, 0.2f, 0.1f};
static const float some_values[8] = {0.75f, 0.25f, 1, 0, 0.5f, 0.25f, 0, 0.25f};
static int32_t some_classes[4] = {3, 0, 1, -100};

static xent_problem some_problem(void) {
    xent_problem p = XENT_PROBLEM_INIT;
    p.rows = 2, p.classes = 4;
    p.logits = in(some_logits, XENT_F32);
    p.targets = in(some_values, XENT_F32);
    p.target_classes = in(some_classes, XENT_I32);
    p.target_count = 2;
    return p;
}

static void by_hand(void) {
    struct results got;
    xent_results r = asked(&got);
    xent_problem p = some_problem();
    CHECK_OK(xent_forward(&p, &r));
    double lse = log(exp(0.1) + exp(0.2) + exp(0.3) + exp(0.4));
    double first = 0.75 * (lse - 0.4) + 0.25 * (lse - 0.1);
    CHECK_NEAR(got.row_losses[0], first, 1e-6);
    CHECK_NEAR(got.row_losses[1], lse - 0.3, 1e-6);
    CHECK_NEAR(got.kl[0], first + 0.75 * log(0.75) + 0.25 * log(0.25), 1e-6);
    CHECK_NEAR(got.kl[1], lse - 0.3, 1e-6);
}

/* The call is refused, names the fault, and writes nothing. */
static void refused(const xent_problem *p, xent_status status, const char *word) {
    static struct results got, before;
    static float grad[8], old[8];
    memset(grad, POISON, sizeof grad);
    memset(old, POISON, sizeof old);
    xent_results r = asked(&got);
    xent_output to = out(grad, XENT_F32);
    memcpy(&before, &got, sizeof got);
    CHECK_STATUS(xent_forward(p, &r), status);
    CHECK_MENTIONS(xent_last_error(), word);
    CHECK_STATUS(xent_forward_backward(p, NULL, 1, &r, &to), status);
    CHECK_MENTIONS(xent_last_error(), word);
    CHECK_BYTES(&got, &before, sizeof got);
    CHECK_BYTES(grad, old, sizeof grad);
}

static void errors(void) {
    xent_problem p = some_problem();
    some_classes[2] = 4;
    refused(&p, XENT_ERR_TARGET, "target_classes[1, 0] = 4 is outside [0, 4)");
    some_classes[2] = -1;
    refused(&p, XENT_ERR_TARGET, "target_classes[1, 0] = -1");
    uint8_t mask[2] = {1, 0}; /* of a row that is ignored nothing is looked at */
    p.row_mask = in(mask, XENT_U8);
    struct results got;
    xent_results r = asked(&got);
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(got.kl[1], 0, 0);
    some_classes[2] = 1;
    p = some_problem();
    p.target_count = 0;
    refused(&p, XENT_ERR_PARAM, "target_count = 0");
    p = some_problem();
    p.target_classes.data = NULL;
    refused(&p, XENT_ERR_PARAM, "target_count = 2");
    p = some_problem();
    p.target_classes.dtype = XENT_F32;
    refused(&p, XENT_ERR_DTYPE, "target_classes");
    p = some_problem();
    p.targets.dtype = XENT_I32;
    refused(&p, XENT_ERR_DTYPE, "targets.dtype");
    p = some_problem();
    p.targets.data = NULL;
    refused(&p, XENT_ERR_NULL, "targets");
    p = some_problem();
    p.target_classes.data = (const char *)some_classes + 1;
    refused(&p, XENT_ERR_ALIGN, "target_classes");
    p = some_problem();
    p.target_classes.strides[0] = -2;
    refused(&p, XENT_ERR_STRIDE, "target_classes");
    p = some_problem();
    p.target_count = SIZE_MAX / 8;
    refused(&p, XENT_ERR_SHAPE, "target_count");
    static const double scales[] = {-1, INFINITY, NAN};
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++) {
        p = some_problem();
        p.target_scale = scales[i];
        refused(&p, XENT_ERR_PARAM, "target_scale");
    }
    int64_t indices[2] = {0, 1};
    p = packed(some_logits, 2, 4, indices);
    refused(&p, XENT_ERR_PARAM, "kl");
    p.target_scale = 1;
    refused(&p, XENT_ERR_PARAM, "target_scale");
    float grad[8];
    xent_output to = out(grad, XENT_F32);
    double lse[2] = {1, 1};
    p = some_problem();
    CHECK_STATUS(xent_backward_targets(&p, lse, NULL, 1, &to), XENT_ERR_PARAM);
    p = some_problem();
    p.target_classes.data = NULL;
    p.target_count = 0;
    p.target_scale = 1;
    CHECK_STATUS(xent_backward_targets(&p, lse, NULL, 1, &to), XENT_ERR_PARAM);
    xent_partial partials[2];
    CHECK_STATUS(xent_partial_forward(&p, 0, 4, partials), XENT_ERR_PARAM);
    CHECK_MENTIONS(xent_last_error(), "target_scale");
}

/* Rows of a teacher without a softmax are NaN, and reach no other row. */
static void no_softmax(void) {
    static const float odd[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        float teacher[8] = {1, 2, 3, 4, odd[i], 2, 0, 0}, grad[8];
        if (i == 2)
            for (int c = 4; c < 8; c++) teacher[c] = odd[i];
        xent_problem p = packed(some_logits, 2, 4, NULL);
        p.targets = in(teacher, XENT_F32);
        p.target_scale = 1;
        struct results got;
        xent_results r = asked(&got);
        xent_output to = out(grad, XENT_F32);
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &to));
        CHECK(isnan(got.row_losses[1]) && isnan(got.kl[1]) && isfinite(got.row_losses[0]) && isfinite(got.kl[0]));
        for (int c = 0; c < 8; c++) CHECK(c < 4 ? isfinite(grad[c]) : isnan(grad[c]));
    }
}

/* Without rows no operand is needed, and the mean over no rows is NaN. */
static void no_rows(void) {
    for (int scaled = 0; scaled < 2; scaled++)
        for (int listed = 0; listed < 2; listed++) {
            xent_problem p = packed(NULL, 0, 4, NULL);
            p.targets = in(NULL, XENT_F32);
            p.target_classes = in(listed ? some_classes : NULL, XENT_I32);
            p.target_count = 3;
            p.target_scale = scaled ? 0.5 : 0;
            struct results got;
            xent_results r = asked(&got);
            xent_output none = out(NULL, XENT_F32);
            r.kl = r.row_losses = none;
            CHECK_OK(xent_forward(&p, &r));
            CHECK(isnan(got.loss));
            CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &none));
            CHECK_OK(xent_backward(&p, NULL, NULL, 1, &none));
            p.target_count = 0;
            CHECK_STATUS(xent_forward(&p, &r), listed ? XENT_ERR_PARAM : XENT_OK);
        }
}

int main(void) {
    against_dense();
    by_hand();
    errors();
    no_softmax();
    no_rows();
    return report();
}
