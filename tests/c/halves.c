/* bf16 and f16: losses have the bits of the widened logits, gradients are rounded once, and only some
 * types go together. */
#include "check.h"

enum { SAMPLES = 9 };

/* ---- the two types ------------------------------------------------------------------- */

struct half {
    xent_dtype dtype, other;
    int digits; /* of the significand */
    int top;    /* exponent field of values in [4, 8) */
};
static const struct half kinds[] = {{XENT_BF16, XENT_F16, 8, 129}, {XENT_F16, XENT_BF16, 11, 17}};
enum { KINDS = sizeof kinds / sizeof *kinds };

/* Of either sign, in [1/2, 8). */
static uint16_t random_half(const struct half *h, uint64_t *state) {
    int stored = h->digits - 1;
    uint64_t random = random_u64(state);
    unsigned exponent = (unsigned)h->top - (unsigned)(random >> 32 & 3);
    unsigned fraction = (unsigned)random & ((1u << stored) - 1);
    return (uint16_t)((random >> 63) << 15 | exponent << stored | fraction);
}

/* ---- numbers ------------------------------------------------------------------------ */

struct losses {
    double loss, row_losses[SAMPLES], lse[SAMPLES], normalizer;
    uint64_t kept_rows;
};

static xent_results results_in(struct losses *to) {
    xent_results r = XENT_RESULTS_INIT;
    memset(to, POISON, sizeof *to);
    r.loss = &to->loss;
    r.row_losses = out(to->row_losses, XENT_F64);
    r.lse = to->lse;
    r.normalizer = &to->normalizer;
    r.kept_rows = &to->kept_rows;
    return r;
}

static void check_rounded(const struct half *h, const uint16_t *got, const float *wide, size_t count) {
    int before = failures;
    for (size_t i = 0; i < count && failures == before; i++)
        CHECK_NEAR(widen(h->dtype, got[i]), rounded(h->dtype, wide[i]), 0);
}

/* A problem in halves against itself in f32, by every call. */
static void against_f32(const struct half *h, size_t classes, double smoothing, int weighted) {
    size_t count = SAMPLES * classes;
    uint64_t state = classes * 4 + h->dtype;
    uint16_t *logits = checked(malloc(count * sizeof *logits)), *kept = NULL;
    uint16_t *grad = poisoned(count * sizeof *grad), *old = checked(malloc(count * sizeof *old));
    uint16_t *weights = checked(malloc(classes * sizeof *weights));
    float *wide = checked(malloc(count * sizeof *wide)), *wide_grad = poisoned(count * sizeof *wide_grad);
    float *from_half = poisoned(count * sizeof *from_half), *wide_old = checked(malloc(count * sizeof *wide_old));
    float *wide_weights = checked(malloc(classes * sizeof *wide_weights));
    int64_t targets[SAMPLES];
    for (size_t i = 0; i < count; i++) {
        wide[i] = widen(h->dtype, logits[i] = random_half(h, &state));
        wide_old[i] = widen(h->dtype, old[i] = random_half(h, &state));
    }
    for (size_t c = 0; c < classes; c++) wide_weights[c] = widen(h->dtype, weights[c] = random_half(h, &state));
    for (size_t i = 0; i < SAMPLES; i++) targets[i] = (int64_t)(random_u64(&state) % classes);
    targets[4] = -100;
    kept = copy_of(logits, count * sizeof *logits);

    xent_problem p = packed(wide, SAMPLES, classes, targets);
    p.label_smoothing = smoothing;
    if (weighted) p.class_weights = in(wide_weights, XENT_F32);
    xent_problem q = p;
    q.logits = in(logits, h->dtype);
    if (weighted) q.class_weights = in(weights, h->dtype);

    struct losses expected, got;
    xent_results r = results_in(&expected);
    xent_output wide_out = out(wide_grad, XENT_F32), half_out = out(grad, h->dtype);
    xent_output f32_out = out(from_half, XENT_F32), in_place = out(logits, h->dtype);
    CHECK_OK(xent_forward_backward(&p, NULL, 0.75, &r, &wide_out));

    r = results_in(&got);
    CHECK_OK(xent_forward(&q, &r));
    CHECK_BYTES(&got, &expected, sizeof got);
    r = results_in(&got);
    CHECK_OK(xent_forward_backward(&q, NULL, 0.75, &r, &f32_out));
    CHECK_BYTES(&got, &expected, sizeof got);
    CHECK_BYTES(from_half, wide_grad, count * sizeof *from_half);
    r = results_in(&got);
    CHECK_OK(xent_forward_backward(&q, NULL, 0.75, &r, &half_out));
    CHECK_BYTES(&got, &expected, sizeof got);
    check_rounded(h, grad, wide_grad, count);
    CHECK_BYTES(logits, kept, count * sizeof *logits);
    CHECK_OK(xent_forward_backward(&q, NULL, 0.75, NULL, &in_place));
    CHECK_BYTES(logits, grad, count * sizeof *logits);
    memcpy(logits, kept, count * sizeof *logits);

    CHECK_OK(xent_backward(&p, expected.lse, NULL, 0.75, &wide_out));
    CHECK_OK(xent_backward(&q, expected.lse, NULL, 0.75, &f32_out));
    CHECK_BYTES(from_half, wide_grad, count * sizeof *from_half);
    CHECK_OK(xent_backward(&q, expected.lse, NULL, 0.75, &half_out));
    check_rounded(h, grad, wide_grad, count);
    CHECK_OK(xent_backward(&q, expected.lse, NULL, 0.75, &in_place));
    CHECK_BYTES(logits, grad, count * sizeof *logits);
    memcpy(logits, kept, count * sizeof *logits);

    /* an accumulated gradient is added in f32, then rounded */
    p.flags = q.flags = XENT_FLAG_ACCUMULATE;
    wide_out.data = wide_old;
    half_out.data = old;
    CHECK_OK(xent_forward_backward(&p, NULL, 0.75, NULL, &wide_out));
    CHECK_OK(xent_forward_backward(&q, NULL, 0.75, NULL, &half_out));
    check_rounded(h, old, wide_old, count);

    free(logits);
    free(kept);
    free(grad);
    free(old);
    free(weights);
    free(wide);
    free(wide_grad);
    free(from_half);
    free(wide_old);
    free(wide_weights);
}

static void numbers(void) {
    static const size_t classes[] = {1, 2, 10, 63, 64, 65, 257, 1000, 2049, 70001};
    for (int k = 0; k < KINDS; k++)
        for (size_t i = 0; i < sizeof classes / sizeof *classes; i++) {
            for (size_t how = 0; how < 3; how++)
                if (!sampled() || how == i % 3) against_f32(&kinds[k], classes[i], how > 0 ? 0.1 : 0, how > 1);
        }
}

/* 12 ahead of 0: p is 1 in either half, and p - 1 is not 0 (Liger#1329). */
static void confident(void) {
    static const uint16_t twelve[KINDS] = {0x4140, 0x4a00};
    for (int k = 0; k < KINDS; k++) {
        const struct half *h = &kinds[k];
        uint16_t logits[2] = {twelve[k], 0}, grad[2];
        const int64_t target = 0;
        CHECK_NEAR(widen(h->dtype, twelve[k]), 12, 0);
        double miss = 1 / (1 + exp(12)), loss = 0;
        CHECK_NEAR(rounded(h->dtype, 1 - miss), 1, 0);
        xent_problem p = packed(NULL, 1, 2, &target);
        p.logits = in(logits, h->dtype);
        xent_results r = XENT_RESULTS_INIT;
        r.loss = &loss;
        xent_output g = out(grad, h->dtype);
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        CHECK_NEAR(loss, log1p(exp(-12)), 1e-11);
        CHECK_NEAR(widen(h->dtype, grad[0]), rounded(h->dtype, -miss), 0);
        CHECK_NEAR(widen(h->dtype, grad[1]), rounded(h->dtype, miss), 0);
    }
}

/* ---- types -------------------------------------------------------------------------- */

static void types(void) {
    struct fixture f;
    for (int k = 0; k < KINDS; k++) {
        const struct half *h = &kinds[k];
        const char *name = h->dtype == XENT_BF16 ? "BF16" : "F16";
        const char *other = h->dtype == XENT_BF16 ? "F16" : "BF16";

        /* the fixture's operands are wide enough for their bytes to be read as halves */
        fixture_init(&f);
        f.problem.logits.dtype = f.grad_logits.dtype = h->dtype;
        f.problem.class_weights.dtype = f.problem.row_weights.dtype = f.grad_output.dtype = h->dtype;
        CHECK_OK(fixture_call(&f, FORWARD));
        CHECK_OK(fixture_call(&f, BACKWARD));
        CHECK_OK(fixture_call(&f, FUSED));

        fixture_init(&f);
        f.problem.logits.dtype = h->dtype;
        f.grad_logits.dtype = h->other;
        FAILS(&f, WITH_GRADIENT, XENT_ERR_DTYPE, "grad_logits", name, other);
        fixture_init(&f);
        f.grad_logits.dtype = h->dtype;
        FAILS(&f, WITH_GRADIENT, XENT_ERR_DTYPE, "grad_logits", name, "F32");
        fixture_init(&f);
        f.problem.logits.dtype = h->dtype;
        f.grad_logits.dtype = XENT_F64;
        FAILS(&f, WITH_GRADIENT, XENT_ERR_DTYPE, "grad_logits", "F64");
        /* losses have at least f32 */
        fixture_init(&f);
        f.results.row_losses.dtype = h->dtype;
        FAILS(&f, WITH_RESULTS, XENT_ERR_DTYPE, "row_losses", name);

        /* halves are aligned to 2 bytes, and to no more */
        fixture_init(&f);
        f.problem.logits = in((const char *)f.logits + 1, h->dtype);
        FAILS(&f, EVERY_ENTRY, XENT_ERR_ALIGN, "logits");
        fixture_init(&f);
        f.problem.logits = in((const char *)f.logits + 2, h->dtype);
        f.grad_logits = out((char *)f.grad + 2, h->dtype);
        CHECK_OK(fixture_call(&f, FORWARD));
        CHECK_OK(fixture_call(&f, FUSED));
        /* the same bytes in two types are an overlap, not in place */
        fixture_init(&f);
        f.problem.logits.dtype = h->dtype;
        f.grad_logits = out(f.logits, XENT_F32);
        FAILS(&f, WITH_GRADIENT, XENT_ERR_OVERLAP, "grad_logits");
    }
    fixture_init(&f);
    f.problem.logits.dtype = XENT_U16;
    FAILS(&f, EVERY_ENTRY, XENT_ERR_DTYPE, "logits", "U16");
}

int main(void) {
    numbers();
    confident();
    types();
    return report();
}
