/* XENT_FLAG_LOG_PROBS: log-probabilities come in, as for PyTorch's NLLLoss. */
#include "reference.h"

enum { rows = 10, classes = 23, inner = 3, count = rows * classes * inner };

static uint64_t state = 16;

enum { SOFT = 1, SMOOTHING = 2, CLASS_WEIGHTS = 4, ROW_WEIGHTS = 8, MASK = 16, ACCUMULATE = 32, INNER = 64,
       NORMALIZER = 128, COMBINATIONS = 256 };

static void combinations(void) {
    unsigned char log_probs[count * sizeof(double)];
    float probabilities[count], class_weights[classes], row_weights[rows * inner], grad_output[rows * inner];
    int64_t targets[rows * inner];
    uint8_t mask[rows * inner];
    fill(probabilities, count, 0, 0.2, &state);
    fill(class_weights, classes, 0.5, 2, &state);
    fill(row_weights, rows * inner, 0.5, 2, &state);
    fill(grad_output, rows * inner, -2, 2, &state);
    for (int i = 0; i < rows * inner; i++) {
        targets[i] = i % 6 == 4 ? -100 : (int64_t)(random_u64(&state) % classes);
        mask[i] = i % 5 != 2;
    }
    for (int k = 0; k < 4; k++) {
        xent_dtype dtype = every_float[k];
        for (int i = 0; i < count; i++) set(log_probs, dtype, i, -6 * uniform(&state));
        for (unsigned of = 0; of < COMBINATIONS; of++)
            for (xent_reduction reduction = XENT_MEAN; reduction <= XENT_NONE; reduction++) {
                if (sampled() && (of + (unsigned)reduction + (unsigned)k) % 7) continue;
                xent_problem p = packed(NULL, rows, classes, targets);
                p.flags = XENT_FLAG_LOG_PROBS | (of & ACCUMULATE ? XENT_FLAG_ACCUMULATE : 0);
                p.logits = in(log_probs, dtype);
                p.reduction = reduction;
                if (of & SOFT) p.targets = in(probabilities, XENT_F32);
                if (of & SMOOTHING) p.label_smoothing = 0.3;
                if (of & CLASS_WEIGHTS) p.class_weights = in(class_weights, XENT_F32);
                if (of & ROW_WEIGHTS) p.row_weights = in(row_weights, XENT_F32);
                if (of & MASK) p.row_mask = in(mask, XENT_U8);
                if (of & INNER) p.inner = inner;
                if (of & NORMALIZER) p.normalizer = 1.5;
                xent_input go = in(grad_output, XENT_F32);
                int before = failures;
                CHECK_ALL(&p, &go, 0.5);
                if (failures != before) {
                    fprintf(stderr, "... dtype %u, options 0x%x, reduction %u\n", dtype, of, reduction);
                    return;
                }
            }
    }
}

/* The inputs need not be normalised: the formula applies to any number. */
static void any_numbers(void) {
    const float x[2][3] = {{0.1f, 0.2f, 0.3f}, {5, -7, INFINITY}};
    const int64_t targets[2] = {2, 1};
    double row_losses[2];
    xent_problem p = packed(x[0], 2, 3, targets);
    p.flags = XENT_FLAG_LOG_PROBS;
    xent_results r = XENT_RESULTS_INIT;
    r.row_losses = out(row_losses, XENT_F64);
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(row_losses[0], -0.3f, 0);
    CHECK_NEAR(row_losses[1], 7, 0);
}

/* Only classes with a target mass are read: a NaN elsewhere changes neither loss nor gradient. */
static void what_is_read(void) {
    float x[4] = {NAN, -1.5f, INFINITY, -INFINITY}, grad[4], targets[4] = {0, 0.5f, 0, 0};
    const int64_t index = 1;
    double loss = 0;
    int64_t argmax = -7;
    for (int soft = 0; soft < 2; soft++) {
        xent_problem p = packed(x, 1, 4, &index);
        if (soft) p.targets = in(targets, XENT_F32);
        p.flags = XENT_FLAG_LOG_PROBS;
        double mass = soft ? 0.5 : 1;
        xent_results r = XENT_RESULTS_INIT;
        r.loss = &loss;
        xent_output g = out(grad, XENT_F32);
        memset(grad, POISON, sizeof grad);
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        CHECK_NEAR(loss, 1.5 * mass, 0);
        for (int c = 0; c < 4; c++) CHECK_NEAR(grad[c], c == 1 ? -mass : 0, 0);
        memset(grad, POISON, sizeof grad);
        CHECK_OK(xent_backward(&p, NULL, NULL, 2, &g));
        for (int c = 0; c < 4; c++) CHECK_NEAR(grad[c], c == 1 ? -2 * mass : 0, 0);
        r.argmax = &argmax; /* this reads them all */
        CHECK_OK(xent_forward(&p, &r));
        CHECK_U64((uint64_t)argmax, 0);
        CHECK_NEAR(loss, 1.5 * mass, 0);
        /* in place */
        float own[4];
        memcpy(own, x, sizeof own);
        p.logits.data = own;
        g.data = own;
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        for (int c = 0; c < 4; c++) CHECK_NEAR(own[c], c == 1 ? -mass : 0, 0);
        p.logits.data = x;
    }
    /* -inf where there is mass */
    const int64_t last = 3;
    xent_problem p = packed(x, 1, 4, &last);
    p.flags = XENT_FLAG_LOG_PROBS;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(loss, INFINITY, 0);
    /* 0/0 = NaN, at the target only */
    const float no_weights[4] = {0};
    p.class_weights = in(no_weights, XENT_F32);
    p.targets = in(&index, XENT_I64);
    xent_output g = out(grad, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, NAN, 0);
    for (int c = 0; c < 4; c++) CHECK_NEAR(grad[c], c == 1 ? NAN : 0, 0);
}

/* The gradient of probability targets is -logp itself. */
static void targets_gradient(void) {
    const float x[3] = {-1, -2, -4}, targets[3] = {0.5f, 0.25f, 0.25f};
    float grad[3];
    xent_problem p = packed(x, 1, 3, NULL);
    p.targets = in(targets, XENT_F32);
    p.flags = XENT_FLAG_LOG_PROBS;
    xent_output g = out(grad, XENT_F32);
    CHECK_OK(xent_backward_targets(&p, NULL, NULL, 0.5, &g));
    for (int c = 0; c < 3; c++) CHECK_NEAR(grad[c], -0.5 * x[c], 0);
}

static void refusals(void) {
    struct fixture f;
    /* lse is ignored: it may be absent, misaligned, or overlap the gradient */
    for (int how = 0; how < 3; how++) {
        fixture_init(&f);
        fixture_log_probs(&f);
        uintptr_t at = how == 0 ? 0 : how == 1 ? (uintptr_t)f.lse_in + 4 : (uintptr_t)f.grad;
        memcpy(&f.lse_arg, &at, sizeof at);
        WORKS(&f, BACKWARD);
        fixture_soften(&f);
        WORKS(&f, TARGETS);
    }
    fixture_init(&f);
    fixture_ask(&f);
    fixture_log_probs(&f);
    WORKS(&f, EVERY_ENTRY);
#define REFUSED(change, entries, word) \
    fixture_init(&f);                  \
    fixture_ask(&f);                   \
    fixture_log_probs(&f);             \
    change;                            \
    FAILS(&f, entries, XENT_ERR_PARAM, word)
    REFUSED(f.problem.z_loss = 0.5, EVERY_ENTRY, "z_loss");
    REFUSED(f.problem.entropy_bonus = -0.5, EVERY_ENTRY, "entropy_bonus");
    REFUSED(f.problem.softcap = 30, EVERY_ENTRY, "softcap");
    REFUSED(f.problem.logit_scale = 2, EVERY_ENTRY, "logit_scale");
    REFUSED(f.problem.logit_scale = 0.5, EVERY_ENTRY, "logit_scale");
    REFUSED(f.results.lse = f.lse, WITH_RESULTS, "lse");
    REFUSED(f.results.entropy = out(f.entropy, XENT_F64), WITH_RESULTS, "entropy");
    REFUSED(f.results.z_loss = f.z_loss, WITH_RESULTS, "z_loss");
    REFUSED(f.results.entropy_bonus = f.z_loss, WITH_RESULTS, "entropy_bonus");
#undef REFUSED
    fixture_init(&f);
    fixture_log_probs(&f);
    fixture_soften(&f);
    f.problem.softcap = 1;
    FAILS(&f, TARGETS, XENT_ERR_PARAM, "softcap");
    /* targets are still checked */
    fixture_init(&f);
    fixture_log_probs(&f);
    f.targets[3] = 5;
    FAILS(&f, EVERY_ENTRY, XENT_ERR_TARGET, "targets[3] = 5 is outside [0, 5)");
}

int main(void) {
    combinations();
    any_numbers();
    what_is_read();
    targets_gradient();
    refusals();
    return report();
}
