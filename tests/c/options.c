/* Every option, alone and together with the others, against the plain loops. */
#include "reference.h"

enum { rows = 12, classes = 37 };

struct data {
    float logits[rows * classes];
    int64_t targets[rows];
    float class_weights[classes], row_weights[rows], grad_output[rows];
    uint8_t mask[rows];
};

/* All combinations: each bit of `set` is one option. */
enum { CLASS_WEIGHTS = 1, ROW_WEIGHTS = 2, MASK = 4, IGNORE_INSIDE = 8, IGNORE_OUTSIDE = 16, SMOOTHING = 32,
       NORMALIZER = 64, ACCUMULATE = 128, GRAD_OUTPUT = 256, COMBINATIONS = 512 };

static void combinations(struct data *d) {
    for (unsigned set = 0; set < COMBINATIONS; set++)
        for (xent_reduction reduction = XENT_MEAN; reduction <= XENT_NONE; reduction++) {
            if (sampled() && (set + (unsigned)reduction) % 7) continue;
            xent_problem p = packed(d->logits, rows, classes, d->targets);
            p.reduction = reduction;
            int64_t kept = d->targets[4];
            if (set & CLASS_WEIGHTS) p.class_weights = in(d->class_weights, XENT_F32);
            if (set & ROW_WEIGHTS) p.row_weights = in(d->row_weights, XENT_F32);
            if (set & MASK) p.row_mask = in(d->mask, XENT_U8);
            if (set & IGNORE_INSIDE) p.ignore_index = d->targets[7]; /* a class that is ignored as a target */
            if (set & IGNORE_OUTSIDE) d->targets[4] = p.ignore_index;
            if (set & SMOOTHING) p.label_smoothing = 0.2;
            if (set & NORMALIZER) p.normalizer = 2.5;
            if (set & ACCUMULATE) p.flags = XENT_FLAG_ACCUMULATE;
            xent_input grad_output = in(d->grad_output, XENT_F32);
            int before = failures;
            CHECK_PROBLEM(&p, set & GRAD_OUTPUT ? &grad_output : NULL, set & ACCUMULATE ? -0.75 : 1);
            if (failures != before) fprintf(stderr, "... with options 0x%x, reduction %u\n", set, reduction);
            d->targets[4] = kept;
        }
}

static void smoothing_limits(struct data *d) {
    static const double values[] = {0, 1e-9, 0.5, 1};
    for (int k = 0; k < 4; k++) {
        xent_problem p = packed(d->logits, rows, classes, d->targets);
        p.label_smoothing = values[k];
        CHECK_PROBLEM(&p, NULL, 1);
    }
}

/* Negative and zero weights are legal. */
static void odd_weights(struct data *d) {
    struct data own = *d;
    own.class_weights[own.targets[0]] = 0;
    own.class_weights[own.targets[1]] = -0.5f;
    own.row_weights[2] = 0;
    own.row_weights[3] = -1;
    for (int smooth = 0; smooth < 2; smooth++)
        for (xent_reduction reduction = XENT_MEAN; reduction <= XENT_NONE; reduction++) {
            xent_problem p = packed(own.logits, rows, classes, own.targets);
            p.class_weights = in(own.class_weights, XENT_F32);
            p.row_weights = in(own.row_weights, XENT_F32);
            p.label_smoothing = smooth * 0.1;
            p.reduction = reduction;
            CHECK_PROBLEM(&p, NULL, 1);
        }
}

/* ignore_index may be any integer, the one of an ignored row any target type can hold. */
static void ignore_any(struct data *d) {
    static const int64_t values[] = {-1, -100, 0, 5, classes - 1, classes, 255, 65535, INT32_MIN, UINT32_MAX,
                                     INT64_MIN, INT64_MAX};
    struct data own = *d;
    for (size_t k = 0; k < sizeof values / sizeof *values; k++) {
        own.targets[6] = values[k];
        xent_problem p = packed(own.logits, rows, classes, own.targets);
        p.ignore_index = values[k];
        p.label_smoothing = 0.1;
        CHECK_PROBLEM(&p, NULL, 1);
    }
}

/* The mean divides by sum r w_y; the number it reports is the number it uses. */
static void normalizer(struct data *d) {
    xent_problem p = packed(d->logits, rows, classes, d->targets);
    p.class_weights = in(d->class_weights, XENT_F32);
    p.row_weights = in(d->row_weights, XENT_F32);
    double loss[3] = {0}, denominator[3] = {0};
    xent_results r = XENT_RESULTS_INIT;
    for (xent_reduction reduction = XENT_MEAN; reduction <= XENT_NONE; reduction++) {
        p.reduction = reduction;
        r.loss = reduction == XENT_NONE ? NULL : &loss[reduction];
        r.normalizer = &denominator[reduction];
        CHECK_OK(xent_forward(&p, &r));
    }
    CHECK_NEAR(loss[XENT_MEAN] * denominator[XENT_MEAN], loss[XENT_SUM], 1e-12 * fabs(loss[XENT_SUM]));
    CHECK_NEAR(denominator[XENT_SUM], denominator[XENT_MEAN], 0);
    CHECK_NEAR(denominator[XENT_NONE], denominator[XENT_MEAN], 0);
    p.reduction = XENT_MEAN;
    p.normalizer = 7;
    r.loss = &loss[0];
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(loss[0], loss[XENT_SUM] / 7, 1e-12 * fabs(loss[0]));
    CHECK_NEAR(denominator[XENT_NONE], 7, 0);
}

/* A mean over micro-batches is one mean when they share the denominator: not a mean of means. */
static void gradient_accumulation(struct data *d) {
    enum { part = 5 };
    float whole[rows * classes], parts[rows * classes];
    d->targets[1] = -100;
    xent_problem p = packed(d->logits, rows, classes, d->targets);
    double loss = 0, first = 0, second = 0, denominator = 0;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    r.normalizer = &denominator;
    xent_output g = out(whole, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(denominator, rows - 1, 0);
    r.normalizer = NULL;
    p.normalizer = denominator;
    p.rows = part;
    r.loss = &first;
    g.data = parts;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    p = packed(d->logits + part * classes, rows - part, classes, d->targets + part);
    p.normalizer = denominator;
    r.loss = &second;
    g.data = parts + part * classes;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(first + second, loss, 1e-14 * rows);
    CHECK_BYTES(parts, whole, sizeof whole);
    d->targets[1] = 3;
}

/* Accumulating twice doubles the gradient; ignored rows keep every bit. */
static void accumulate(struct data *d) {
    struct data own = *d;
    own.targets[3] = -100;
    float once[rows * classes], twice[rows * classes], before[rows * classes];
    for (int i = 0; i < rows * classes; i++) twice[i] = i / classes == 3 ? -1.25f : 0;
    memcpy(before, twice, sizeof before);
    xent_problem p = packed(own.logits, rows, classes, own.targets);
    p.reduction = XENT_SUM;
    xent_output o = out(once, XENT_F32), t = out(twice, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, NULL, &o));
    p.flags = XENT_FLAG_ACCUMULATE;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, NULL, &t));
    CHECK_OK(xent_forward_backward(&p, NULL, 1, NULL, &t));
    for (int i = 0; i < rows * classes; i++)
        if (i / classes != 3) CHECK_NEAR(twice[i], 2 * (double)once[i], 2e-7 * fabs(once[i]));
    CHECK_BYTES(twice + 3 * classes, before + 3 * classes, classes * sizeof(float));
}

/* Row losses as f32 are the f64 ones, rounded once. */
static void row_losses_f32(struct data *d) {
    double wide[rows];
    float narrow[rows];
    xent_problem p = packed(d->logits, rows, classes, d->targets);
    p.reduction = XENT_NONE;
    xent_results r = XENT_RESULTS_INIT;
    r.row_losses = out(wide, XENT_F64);
    CHECK_OK(xent_forward(&p, &r));
    r.row_losses = out(narrow, XENT_F32);
    CHECK_OK(xent_forward(&p, &r));
    for (int i = 0; i < rows; i++) CHECK_NEAR(narrow[i], (float)wide[i], 0);
}

/* The scale of a gradient is exact where it is a power of two. */
static void scales(struct data *d) {
    static const double values[] = {1, 2, 0.125, -4, 65536};
    float base[rows * classes], scaled[rows * classes];
    xent_problem p = packed(d->logits, rows, classes, d->targets);
    xent_output b = out(base, XENT_F32), s = out(scaled, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, NULL, &b));
    for (int k = 0; k < 5; k++) {
        float value = (float)values[k];
        xent_input grad_output = in(&value, XENT_F32);
        CHECK_OK(xent_forward_backward(&p, NULL, values[k], NULL, &s));
        for (int i = 0; i < rows * classes; i++) CHECK_NEAR(scaled[i], values[k] * base[i], 0);
        CHECK_OK(xent_forward_backward(&p, &grad_output, 1, NULL, &s));
        for (int i = 0; i < rows * classes; i++) CHECK_NEAR(scaled[i], values[k] * base[i], 0);
    }
    CHECK_OK(xent_forward_backward(&p, NULL, 0, NULL, &s));
    for (int i = 0; i < rows * classes; i++) CHECK_NEAR(scaled[i], 0, 0);
}

int main(void) {
    struct data d;
    uint64_t state = 3;
    fill(d.logits, rows * classes, -4, 4, &state);
    fill(d.class_weights, classes, 0.25, 3, &state);
    fill(d.row_weights, rows, 0.25, 3, &state);
    fill(d.grad_output, rows, -2, 2, &state);
    for (int i = 0; i < rows; i++) {
        d.targets[i] = (int64_t)(random_u64(&state) % classes);
        d.mask[i] = (uint8_t)(i % 5 == 2 ? 0 : i + 1); /* any byte but 0 keeps a row */
    }
    combinations(&d);
    smoothing_limits(&d);
    odd_weights(&d);
    ignore_any(&d);
    normalizer(&d);
    gradient_accumulation(&d);
    accumulate(&d);
    row_losses_f32(&d);
    scales(&d);
    return report();
}
