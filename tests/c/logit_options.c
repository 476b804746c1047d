/* Scale, cap, z-loss and entropy bonus: values, denominators, and errors. An option that is off changes no bit. */
#include "reference.h"

enum { rows = 11, classes = 37 };

struct data {
    float logits[rows * classes], row_weights[rows], class_weights[classes];
    double wide[rows * classes];
    uint16_t half[2][rows * classes];
    int64_t targets[rows];
    uint8_t mask[rows];
};

static xent_input logits_of(const struct data *d, xent_dtype dtype) {
    return dtype == XENT_F32   ? in(d->logits, XENT_F32)
           : dtype == XENT_F64 ? in(d->wide, XENT_F64)
                               : in(d->half[dtype == XENT_F16], dtype);
}

/* All combinations, in every dtype: each bit of `set` is one option. */
enum { Z_LOSS = 1, SCALE = 2, CAP = 4, SMOOTHING = 8, WEIGHTS = 16, MASK = 32, DENOMINATORS = 64, BONUS = 128, COMBINATIONS = 256 };

static void combinations(const struct data *d) {
    for (int k = 0; k < 4; k++)
        for (unsigned set = 0; set < COMBINATIONS; set++)
            for (xent_reduction reduction = XENT_MEAN; reduction <= XENT_NONE; reduction++) {
                if (sampled() && (set + (unsigned)reduction + (unsigned)k) % 7) continue;
                xent_problem p = packed(NULL, rows, classes, d->targets);
                p.logits = logits_of(d, every_float[k]);
                p.reduction = reduction;
                if (set & Z_LOSS) p.z_loss = 0.02;
                if (set & BONUS) p.entropy_bonus = set & SCALE ? -0.5 : 0.03;
                if (set & SCALE) p.logit_scale = 0.375;
                if (set & CAP) p.softcap = 5;
                if (set & SMOOTHING) p.label_smoothing = 0.2;
                if (set & WEIGHTS) {
                    p.row_weights = in(d->row_weights, XENT_F32);
                    p.class_weights = in(d->class_weights, XENT_F32);
                }
                if (set & MASK) p.row_mask = in(d->mask, XENT_U8);
                if (set & DENOMINATORS) p.normalizer = 2.5, p.z_normalizer = 1.5;
                int before = failures;
                CHECK_ALL(&p, NULL, -0.75);
                if (failures != before) {
                    fprintf(stderr, "... dtype %u, options 0x%x, reduction %u\n", every_float[k], set, reduction);
                    return;
                }
            }
}

/* Options that are off give the bits of the problem without them. */
static void neutral(const struct data *d) {
    for (int k = 0; k < 4; k++) {
        xent_dtype dtype = every_float[k];
        xent_problem p = packed(NULL, rows, classes, d->targets), q;
        p.logits = logits_of(d, dtype);
        p.label_smoothing = 0.1;
        q = p;
        q.z_loss = 0;
        q.entropy_bonus = 0;
        q.softcap = 0;
        q.logit_scale = 1;
        q.z_normalizer = 3; /* without z-loss and entropy bonus this denominator has no effect */
        double loss[2], z_loss = -7, bonus = -7, z_normalizer = -7;
        unsigned char grad[2][rows * classes * sizeof(double)];
        memset(grad, POISON, sizeof grad);
        for (int of = 0; of < 2; of++) {
            xent_results r = XENT_RESULTS_INIT;
            r.loss = &loss[of];
            if (of) r.z_loss = &z_loss, r.entropy_bonus = &bonus, r.z_normalizer = &z_normalizer;
            xent_output g = out(grad[of], dtype);
            CHECK_OK(xent_forward_backward(of ? &q : &p, NULL, 1, &r, &g));
        }
        CHECK_BYTES(&loss[1], &loss[0], sizeof loss[0]);
        CHECK_BYTES(grad[1], grad[0], sizeof grad[0]);
        CHECK_NEAR(z_loss, 0, 0);
        CHECK_NEAR(bonus, 0, 0);
        CHECK_NEAR(z_normalizer, 3, 0);
    }
}

/* lambda * lse^2 of one row, by hand; and the parts of the loss have their own denominators. */
static void z_loss_by_hand(void) {
    const float x[2][4] = {{0.1f, 0.2f, 0.3f, 0.4f}, {2, 0, 0, 0}};
    const int64_t targets[2] = {0, 0};
    const float class_weights[4] = {3, 1, 1, 1}, row_weights[2] = {1, 0.5f};
    double lse[2] = {1.64253554, 2.34075295}, ce[2] = {1.54253553, 0.34075295}, loss = 0, z_loss = 0, row_losses[2];
    double normalizer = 0, z_normalizer = 0;
    xent_problem p = packed(x[0], 2, 4, targets);
    p.z_loss = 0.25;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    r.z_loss = &z_loss;
    r.normalizer = &normalizer;
    r.z_normalizer = &z_normalizer;
    r.row_losses = out(row_losses, XENT_F64);
    CHECK_OK(xent_forward(&p, &r));
    double z[2] = {0.25 * lse[0] * lse[0], 0.25 * lse[1] * lse[1]};
    CHECK_NEAR(z_loss, (z[0] + z[1]) / 2, 1e-6);
    CHECK_NEAR(loss, (ce[0] + ce[1] + z[0] + z[1]) / 2, 1e-6);
    for (int i = 0; i < 2; i++) CHECK_NEAR(row_losses[i], ce[i] + z[i], 1e-6);
    /* class weights apply to the cross-entropy alone */
    p.class_weights = in(class_weights, XENT_F32);
    p.row_weights = in(row_weights, XENT_F32);
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(normalizer, 4.5, 1e-12);
    CHECK_NEAR(z_normalizer, 1.5, 1e-12);
    CHECK_NEAR(z_loss, (z[0] + 0.5 * z[1]) / 1.5, 1e-6);
    CHECK_NEAR(loss - z_loss, (3 * ce[0] + 1.5 * ce[1]) / 4.5, 1e-6);
    p.normalizer = 9;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(z_normalizer, 1.5, 1e-12);
    CHECK_NEAR(loss - z_loss, (3 * ce[0] + 1.5 * ce[1]) / 9, 1e-6);
    p.z_normalizer = 6;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(normalizer, 9, 0);
    CHECK_NEAR(z_normalizer, 6, 0);
    CHECK_NEAR(z_loss, (z[0] + 0.5 * z[1]) / 6, 1e-6);
    p.reduction = XENT_SUM;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(z_loss, z[0] + 0.5 * z[1], 1e-6);
}

/* -beta * H and its gradient by hand. Class weights are no part of it, and a mean divides it as z-loss. */
static void bonus_by_hand(void) {
    const float x[2][4] = {{0.1f, 0.2f, 0.3f, 0.4f}, {2, 0, 0, 0}};
    const int64_t targets[2] = {0, 0}, ignored[2] = {-100, -100};
    const float class_weights[4] = {0, 0, 0, 0}, row_weights[2] = {1, 0.5f};
    const double entropy[2] = {1.38007081, 0.91828377};
    double loss = 0, bonus = 0, row_losses[2], lse[2];
    float grad[2][4], again[2][4];
    xent_problem p = packed(x[0], 2, 4, targets);
    p.entropy_bonus = 0.25;
    p.class_weights = in(class_weights, XENT_F32);
    p.row_weights = in(row_weights, XENT_F32);
    p.normalizer = 1;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    r.entropy_bonus = &bonus;
    r.row_losses = out(row_losses, XENT_F64);
    r.lse = lse;
    xent_output g = out(grad, XENT_F32), g_again = out(again, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(bonus, -0.25 * (entropy[0] + 0.5 * entropy[1]) / 1.5, 1e-6);
    CHECK_NEAR(loss, bonus, 0);
    CHECK_NEAR(row_losses[0], -0.25 * entropy[0], 1e-6);
    CHECK_NEAR(row_losses[1], -0.125 * entropy[1], 1e-6);
    CHECK_OK(xent_backward(&p, lse, NULL, 1, &g_again));
    for (int i = 0; i < 2; i++)
        for (int c = 0; c < 4; c++) {
            double log_p = x[i][c] - lse[i];
            double by_hand = 0.25 * row_weights[i] / 1.5 * exp(log_p) * (log_p + entropy[i]);
            CHECK_NEAR(grad[i][c], by_hand, 1e-7);
            CHECK_NEAR(again[i][c], by_hand, 1e-7);
        }
    p.z_normalizer = 6;
    p.entropy_bonus = -0.25;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(bonus, 0.25 * (entropy[0] + 0.5 * entropy[1]) / 6, 1e-6);
    /* nothing comes of ignored rows */
    p.targets = in(ignored, XENT_I64);
    p.z_normalizer = 0;
    p.flags = XENT_FLAG_EMPTY_IS_ZERO;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(bonus, 0, 0);
    for (int c = 0; c < 8; c++) CHECK_NEAR(grad[c / 4][c % 4], 0, 0);
}

/* Nothing to average: each part is NaN, 0 if asked for, 0 where a denominator was given; and z-loss
 * that is off takes no part. */
static void empty(void) {
    const float x[3] = {1, 2, 3};
    const int64_t ignored = -100;
    xent_problem p = packed(x, 1, 3, &ignored);
    double loss = -7, z_loss = -7;
    float grad[3];
    xent_results r = XENT_RESULTS_INIT;
    xent_output g = out(grad, XENT_F32);
    r.loss = &loss;
    r.z_loss = &z_loss;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(loss, NAN, 0);
    CHECK_NEAR(z_loss, 0, 0);
    p.normalizer = 2;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(loss, 0, 0);
    p.z_loss = 0.5; /* now there is 0/0 in it */
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(loss, NAN, 0);
    CHECK_NEAR(z_loss, NAN, 0);
    p.z_normalizer = 2;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(loss, 0, 0);
    CHECK_NEAR(z_loss, 0, 0);
    p.normalizer = 0;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(loss, NAN, 0);
    CHECK_NEAR(z_loss, 0, 0);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    for (int c = 0; c < 3; c++) CHECK_NEAR(grad[c], 0, 0);
    p.z_normalizer = 0;
    p.flags = XENT_FLAG_EMPTY_IS_ZERO;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, 0, 0);
    CHECK_NEAR(z_loss, 0, 0);
    for (int c = 0; c < 3; c++) CHECK_NEAR(grad[c], 0, 0);
}

/* The scale comes before the cap, and both before everything else but argmax. */
static void order(void) {
    for (int k = 0; k < 4; k++) {
        xent_dtype dtype = every_float[k];
        unsigned char x[3 * sizeof(double)];
        const double values[3] = {-4, 3, 8};
        const int64_t target = 1;
        for (int c = 0; c < 3; c++) set(x, dtype, c, values[c]);
        xent_problem p = packed(NULL, 1, 3, &target);
        p.logits = in(x, dtype);
        p.logit_scale = 2;
        p.softcap = 5;
        double lse = 0, sum = 0;
        xent_results r = XENT_RESULTS_INIT;
        r.lse = &lse;
        CHECK_OK(xent_forward(&p, &r));
        for (int c = 0; c < 3; c++) sum += exp(5 * tanh(2 * values[c] / 5));
        CHECK_NEAR(lse, log(sum), dtype == XENT_F64 ? 1e-13 : 2e-6);
    }
}

/* Capped logits stay below the cap, whatever they are; an infinity is one no more, a NaN still is; and
 * where tanh is flat the gradient is 0. One that overflows by its scale counts as infinite. */
static void extremes(void) {
    const int64_t target = 0;
    float x[4] = {1, INFINITY, -INFINITY, 2}, grad[4];
    double lse = 0, row_loss = 0;
    xent_problem p = packed(x, 1, 4, &target);
    p.softcap = 30;
    xent_results r = XENT_RESULTS_INIT;
    r.lse = &lse;
    r.row_losses = out(&row_loss, XENT_F64);
    xent_output g = out(grad, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(lse, 30, 1e-5);
    CHECK_NEAR(row_loss, 30 - 30 * tanh(1.0 / 30), 1e-5);
    CHECK_NEAR(grad[1], 0, 0);
    CHECK_NEAR(grad[2], 0, 0);
    double cosine = cosh(1.0 / 30);
    CHECK_NEAR(grad[0], -1 / (cosine * cosine), 1e-6);
    x[1] = NAN;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(lse, NAN, 0);
    CHECK_NEAR(row_loss, NAN, 0);
    for (int c = 0; c < 4; c++) CHECK_NEAR(grad[c], NAN, 0);
    x[1] = 3e38f;
    x[2] = 0;
    p.softcap = 0;
    p.logit_scale = 8;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(lse, INFINITY, 0);
    CHECK_NEAR(row_loss, NAN, 0);
    for (int c = 0; c < 4; c++) CHECK_NEAR(grad[c], NAN, 0);
}

static void refusals(void) {
    struct fixture f;
#define REFUSED(field, value, ...)                                 \
    fixture_init(&f);                                              \
    fixture_ask(&f);                                               \
    f.problem.field = (value);                                     \
    FAILS(&f, EVERY_ENTRY, XENT_ERR_PARAM, #field, __VA_ARGS__);   \
    fixture_soften(&f);                                            \
    f.results.correct = NULL;                                      \
    FAILS(&f, EVERY_ENTRY | TARGETS, XENT_ERR_PARAM, #field, __VA_ARGS__)
    REFUSED(z_loss, -0.5, "-0.5");
    REFUSED(z_loss, INFINITY, "inf");
    REFUSED(z_loss, NAN, "NaN");
    REFUSED(entropy_bonus, INFINITY, "inf");
    REFUSED(entropy_bonus, -INFINITY, "-inf");
    REFUSED(entropy_bonus, NAN, "NaN");
    REFUSED(softcap, -30.5, "-30.5");
    REFUSED(softcap, INFINITY, "inf");
    REFUSED(softcap, NAN, "NaN");
    REFUSED(logit_scale, 0.0, "0");
    REFUSED(logit_scale, -1.5, "-1.5");
    REFUSED(logit_scale, INFINITY, "inf");
    REFUSED(logit_scale, NAN, "NaN");
    REFUSED(z_normalizer, -2.5, "-2.5");
    REFUSED(z_normalizer, INFINITY, "inf");
    REFUSED(z_normalizer, NAN, "NaN");
#undef REFUSED
    /* without a reduced loss there is no z-loss part */
    fixture_init(&f);
    fixture_ask(&f);
    f.problem.reduction = XENT_NONE;
    f.results.loss = NULL;
    FAILS(&f, WITH_RESULTS, XENT_ERR_PARAM, "loss");
    f.results.z_loss = NULL;
    WORKS(&f, EVERY_ENTRY);
}

int main(void) {
    static struct data d;
    uint64_t state = 14;
    fill(d.logits, rows * classes, -6, 6, &state);
    fill(d.row_weights, rows, 0.5, 2, &state);
    fill(d.class_weights, classes, 0.5, 2, &state);
    for (int i = 0; i < rows * classes; i++) {
        d.wide[i] = 12 * uniform(&state) - 6;
        set(d.half[0], XENT_BF16, i, d.logits[i]);
        set(d.half[1], XENT_F16, i, d.logits[i]);
    }
    for (int i = 0; i < rows; i++) {
        d.targets[i] = i == 4 ? -100 : (int64_t)(random_u64(&state) % classes);
        d.mask[i] = i % 5 != 2;
    }
    combinations(&d);
    neutral(&d);
    z_loss_by_hand();
    bonus_by_hand();
    empty();
    order();
    extremes();
    refusals();
    return report();
}
