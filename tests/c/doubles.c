/* f64 logits: the accuracy of f64 where f32 would lose it, and the types that go together. */
#include "reference.h"

static uint64_t state = 18;

static void against_reference(void) {
    static const struct { size_t rows, classes, inner; } shapes[] = {
        {1, 1, 1},   {5, 2, 1},    {4, 31, 1},  {4, 32, 1},   {4, 33, 1},   {4, 65, 1},   {3, 257, 1},
        {3, 1000, 1}, {2, 2049, 1}, {2, 4097, 1}, {300, 700, 1}, {1, 70001, 1}, {3, 17, 40}, {20000, 5, 1},
    };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        size_t rows = shapes[k].rows * shapes[k].inner, classes = shapes[k].classes, count = rows * classes;
        double *logits = numbers(count), *class_weights = numbers(classes), *row_weights = numbers(rows);
        int64_t *targets = checked(malloc(rows * sizeof(int64_t)));
        for (size_t i = 0; i < count; i++) logits[i] = 16 * uniform(&state) - 8;
        for (size_t c = 0; c < classes; c++) class_weights[c] = 0.5 + uniform(&state);
        for (size_t i = 0; i < rows; i++) {
            row_weights[i] = 0.5 + uniform(&state);
            targets[i] = i % 6 == 5 ? -100 : (int64_t)(random_u64(&state) % classes);
        }
        for (int how = 0; how < 4; how++) {
            if (sampled() && (size_t)how != k % 4) continue;
            xent_problem p = packed(NULL, shapes[k].rows, classes, targets);
            p.inner = shapes[k].inner;
            p.logits = in(logits, XENT_F64);
            if (how & 1) p.label_smoothing = 0.1, p.class_weights = in(class_weights, XENT_F64);
            if (how & 2) p.row_weights = in(row_weights, XENT_F64), p.flags = XENT_FLAG_ACCUMULATE;
            CHECK_ALL(&p, NULL, 0.75);
        }
        free(logits);
        free(class_weights);
        free(row_weights);
        free(targets);
    }
}

static void known(void) {
    const double x[4] = {0.1, 0.2, 0.3, 0.4};
    const int64_t target = 0;
    double loss = 0, lse = 0, grad[4];
    xent_problem p = packed(NULL, 1, 4, &target);
    p.logits = in(x, XENT_F64);
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    r.lse = &lse;
    xent_output g = out(grad, XENT_F64);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    double sum = exp(0.1) + exp(0.2) + exp(0.3) + exp(0.4);
    CHECK_NEAR(loss, log(sum) - 0.1, 1e-14);
    CHECK_NEAR(lse, log(sum), 1e-14);
    for (int c = 0; c < 4; c++) CHECK_NEAR(grad[c], exp(x[c]) / sum - (c == 0), 1e-14);

    /* logits that are equal in f32 */
    const double close[2] = {1 + 1e-12, 1};
    p = packed(NULL, 1, 2, &target);
    p.logits = in(close, XENT_F64);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss - log(2), (close[1] - close[0]) / 2, 4e-16);
    /* confident: e^-600, far below the range of f32 */
    const double confident[2] = {600, 0};
    p.logits = in(confident, XENT_F64);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, exp(-600), 1e-12 * exp(-600));
    CHECK_NEAR(grad[0], -exp(-600), 1e-12 * exp(-600));
    CHECK_NEAR(grad[1], exp(-600), 1e-12 * exp(-600));
    /* logits out of the range of f32; the largest there are */
    const double far_off[2][2] = {{1e300, 1e300}, {1.7e308, -1.7e308}};
    for (int k = 0; k < 2; k++) {
        p.logits = in(far_off[k], XENT_F64);
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        CHECK_NEAR(loss, k ? 0 : log(2), 1e-14);
        CHECK_NEAR(lse, far_off[k][0], 0);
        CHECK_NEAR(grad[0], k ? 0 : -0.5, 1e-14);
        CHECK_NEAR(grad[1], k ? 0 : 0.5, 1e-14);
    }
    /* an offset that is exact does not change the result */
    double plain[5], moved[5], by[2];
    for (int c = 0; c < 5; c++) {
        plain[c] = c * 0.75 - 1;
        moved[c] = plain[c] + 0x1p40;
    }
    p = packed(NULL, 1, 5, &target);
    for (int k = 0; k < 2; k++) {
        p.logits = in(k ? moved : plain, XENT_F64);
        r.loss = &by[k];
        CHECK_OK(xent_forward(&p, &r));
    }
    CHECK_NEAR(by[1], by[0], 1e-14);
}

static void edges(void) {
    const int64_t targets[3] = {0, 1, 1};
    double x[3][3] = {{NAN, 1, 2}, {-INFINITY, 1, -INFINITY}, {1, -INFINITY, 0}}, grad[9], row_losses[3], lse[3];
    xent_problem p = packed(NULL, 3, 3, targets);
    p.logits = in(x, XENT_F64);
    p.reduction = XENT_SUM;
    xent_results r = XENT_RESULTS_INIT;
    r.row_losses = out(row_losses, XENT_F64);
    r.lse = lse;
    xent_output g = out(grad, XENT_F64);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    const double losses[3] = {NAN, 0, INFINITY};
    for (int i = 0; i < 3; i++) CHECK_NEAR(row_losses[i], losses[i], 0);
    for (int c = 0; c < 3; c++) CHECK_NEAR(grad[c], NAN, 0);
    for (int c = 0; c < 3; c++) CHECK_NEAR(grad[3 + c], 0, 0);
    CHECK_NEAR(grad[7], -1, 0);
    CHECK_NEAR(lse[1], 1, 1e-14);
    CHECK_NEAR(lse[2], log(exp(1) + 1), 1e-14);
    x[2][1] = INFINITY;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(lse[2], INFINITY, 0);
    for (int c = 0; c < 3; c++) CHECK_NEAR(grad[6 + c], NAN, 0);
}

/* In place, in a batch and alone, on any number of threads: the same bits. */
static void same_bits(void) {
    static const struct { size_t rows, classes; } shapes[] = {{5, 3}, {6, 100}, {3, 4099}, {300, 2000}, {2, 200003}};
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        size_t rows = shapes[k].rows, classes = shapes[k].classes, size = rows * classes * sizeof(double);
        if (sampled() && size > 4 << 20) continue; /* the last goes over threads as well */
        double *logits = checked(malloc(size)), *grad = poisoned(size), loss[2];
        int64_t *targets = checked(malloc(rows * sizeof(int64_t)));
        for (size_t i = 0; i < rows * classes; i++) logits[i] = 10 * uniform(&state) - 5;
        for (size_t i = 0; i < rows; i++) targets[i] = (int64_t)(random_u64(&state) % classes);
        xent_problem p = packed(NULL, rows, classes, targets);
        p.logits = in(logits, XENT_F64);
        p.threads = 1;
        xent_results r = XENT_RESULTS_INIT;
        r.loss = &loss[0];
        xent_output g = out(grad, XENT_F64);
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        xent_problem alone = p;
        alone.rows = 1;
        alone.normalizer = (double)rows;
        alone.logits.data = logits + classes;
        alone.targets.data = targets + 1;
        double *row = poisoned(classes * sizeof(double));
        g.data = row;
        CHECK_OK(xent_forward_backward(&alone, NULL, 1, NULL, &g));
        CHECK_BYTES(row, grad + classes, classes * sizeof(double));
        p.threads = 3;
        r.loss = &loss[1];
        g.data = logits;
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        CHECK_BYTES(logits, grad, size);
        CHECK_BYTES(&loss[1], &loss[0], sizeof loss[0]);
        free(logits);
        free(grad);
        free(targets);
        free(row);
    }
}

static void types(void) {
    struct fixture f;
    double logits[ROWS * CLASSES], grad[ROWS * CLASSES];
    for (int i = 0; i < ROWS * CLASSES; i++) logits[i] = uniform(&state);
    fixture_init(&f);
    f.problem.logits = in(logits, XENT_F64);
    f.grad_logits = out(grad, XENT_F64);
    WORKS(&f, EVERY_ENTRY);
    static const xent_dtype narrower[] = {XENT_F32, XENT_BF16, XENT_F16};
    for (int k = 0; k < 3; k++) {
        fixture_init(&f);
        f.problem.logits = in(logits, XENT_F64);
        f.grad_logits.dtype = narrower[k];
        FAILS(&f, WITH_GRADIENT, XENT_ERR_DTYPE, "grad_logits");
        fixture_init(&f);
        f.problem.logits.dtype = narrower[k];
        f.grad_logits = out(grad, XENT_F64);
        FAILS(&f, WITH_GRADIENT, XENT_ERR_DTYPE, "grad_logits", "F64");
    }
    fixture_init(&f);
    f.grad_logits = out(grad, XENT_F64);
    f.problem.logits = in((const char *)logits + 4, XENT_F64);
    FAILS(&f, EVERY_ENTRY, XENT_ERR_ALIGN, "logits");
}

int main(void) {
    against_reference();
    known();
    edges();
    same_bits();
    types();
    return report();
}
