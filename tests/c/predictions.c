/* argmax, correct and entropy, with targets and without, each alone, and the errors of their operands. */
#include "reference.h"

static uint64_t state = 17;

static void against_reference(void) {
    static const struct { size_t rows, classes, inner; } shapes[] = {
        {1, 1, 1},   {5, 2, 1},    {7, 10, 1},   {4, 63, 1},  {4, 64, 1},    {4, 65, 1},     {3, 1000, 1}, {2, 2049, 1},
        {300, 77, 1}, {1, 70001, 1}, {3, 600, 4}, {2, 21, 300}, {20000, 3, 1}, {1, 600001, 1},
    };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (int d = 0; d < 4; d++) {
            size_t rows = shapes[k].rows * shapes[k].inner, count = rows * shapes[k].classes;
            if (d > 1 && count > 100000) continue;
            if (sampled() && (size_t)d != k % 4) continue;
            xent_dtype dtype = every_float[d];
            void *logits = checked(malloc(count * size_of(dtype)));
            int64_t *targets = checked(malloc(rows * sizeof(int64_t)));
            /* coarse: the maximum is reached more than once */
            for (size_t i = 0; i < count; i++) set(logits, dtype, (int64_t)i, floor(40 * uniform(&state) - 20) / 4);
            for (size_t i = 0; i < rows; i++) targets[i] = (int64_t)(random_u64(&state) % shapes[k].classes);
            xent_problem p = packed(NULL, shapes[k].rows, shapes[k].classes, targets);
            p.inner = shapes[k].inner;
            p.logits = in(logits, dtype);
            CHECK_ALL(&p, NULL, 1);
            free(logits);
            free(targets);
        }
}

/* The lowest index of a NaN, else of the maximum; of the logits as stored. */
static void argmax_by_hand(void) {
    static const struct { float x[5]; int64_t best; } rows[] = {
        {{1, 5, 2, 5, 5}, 1},
        {{-3, -2, -2, -9, -2}, 1},
        {{0.0f, -0.0f, 0, -1, 0}, 0},
        {{-1, -0.0f, 0.0f, 0, -1}, 1},
        {{1, NAN, 9, NAN, INFINITY}, 1},
        {{INFINITY, 1, NAN, 2, 3}, 2},
        {{1, INFINITY, 2, INFINITY, 0}, 1},
        {{-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY}, 0},
        {{-INFINITY, -INFINITY, -3, -INFINITY, -3}, 2},
        {{-INFINITY, -6e4f, -INFINITY, 0, 0}, 3},
    };
    enum { n = sizeof rows / sizeof *rows, classes = 131 };
    for (int d = 0; d < 4; d++)
        for (int offset = 0; offset < 4; offset++) { /* among other classes, in other lanes */
            static const int starts[4] = {0, 13, 62, classes - 5};
            xent_dtype dtype = every_float[d];
            unsigned char logits[n * classes * sizeof(double)];
            int64_t argmax[n], targets[n];
            for (int i = 0; i < n; i++)
                for (int c = 0; c < classes; c++) {
                    int at = c - starts[offset];
                    double x = at >= 0 && at < 5 ? rows[i].x[at] : -INFINITY;
                    set(logits, dtype, i * classes + c, x);
                }
            for (int i = 0; i < n; i++) /* every second one right */
                targets[i] = (starts[offset] + rows[i].best + (i + 1) % 2) % classes;
            targets[3] = -100; /* it would have been right */
            uint64_t correct = 77;
            xent_problem p = packed(NULL, n, classes, targets);
            p.logits = in(logits, dtype);
            p.logit_scale = 1e-3; /* argmax is that of the logits as stored */
            p.softcap = 0.5;
            xent_results r = XENT_RESULTS_INIT;
            r.argmax = argmax;
            r.correct = &correct;
            CHECK_OK(xent_forward(&p, &r));
            for (int i = 0; i < n; i++) {
                int64_t expected = rows[i].best + starts[offset];
                if (i == 7) expected = 0; /* nothing but -inf */
                CHECK_U64((uint64_t)argmax[i], (uint64_t)expected);
            }
            CHECK_U64(correct, offset == 0 ? 4 : 3); /* rows 1, 5, 9, and 7 where its 0 is the target */
        }
}

/* Entropy: ln C if all logits are equal, 0 if one class has probability 1; f32 is f64 rounded once. */
static void entropy_by_hand(void) {
    enum { rows = 4, classes = 6 };
    float x[rows][classes] = {{7, 7, 7, 7, 7, 7}, {0, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY},
                              {1, 2, 3, 4, 5, 6}, {NAN, 0, 0, 0, 0, 0}};
    double wide[rows], sum = 0, expected = 0;
    float narrow[rows];
    xent_problem p = packed(x[0], rows, classes, NULL);
    xent_results r = XENT_RESULTS_INIT;
    r.entropy = out(wide, XENT_F64);
    CHECK_OK(xent_forward(&p, &r));
    r.entropy = out(narrow, XENT_F32);
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(wide[0], log(classes), 1e-6);
    CHECK_NEAR(wide[1], 0, 1e-6); /* 0 * inf is 0 */
    for (int c = 1; c <= classes; c++) sum += exp(c);
    for (int c = 1; c <= classes; c++) expected += exp(c) / sum * (log(sum) - c);
    CHECK_NEAR(wide[2], expected, 1e-6);
    CHECK_NEAR(wide[3], NAN, 0);
    for (int i = 0; i < rows; i++) CHECK_NEAR(narrow[i], (float)wide[i], 0);
}

/* Ignored rows have predictions too, and never count as correct. */
static void ignored_rows(void) {
    const float x[3 * 2] = {1, 0, 0, 1, 1, 0};
    const int64_t targets[3] = {0, 1, 0};
    const uint8_t mask[3] = {1, 1, 0};
    int64_t argmax[3];
    uint64_t correct = 7, kept_rows = 7;
    double entropy[3];
    xent_problem p = packed(x, 3, 2, targets);
    p.ignore_index = 1;
    p.row_mask = in(mask, XENT_U8);
    xent_results r = XENT_RESULTS_INIT;
    r.argmax = argmax;
    r.correct = &correct;
    r.kept_rows = &kept_rows;
    r.entropy = out(entropy, XENT_F64);
    CHECK_OK(xent_forward(&p, &r));
    for (int i = 0; i < 3; i++) {
        CHECK_U64((uint64_t)argmax[i], i == 1);
        CHECK_NEAR(entropy[i], 0.5822, 1e-4);
    }
    CHECK_U64(correct, 1);
    CHECK_U64(kept_rows, 1);
}

/* Each result has the same bits whichever others the call asks for. */
static void each_alone(void) {
    struct fixture whole, f;
    fixture_init(&whole);
    fixture_ask(&whole);
    WORKS(&whole, FUSED);
    enum { RESULTS = 10 };
    for (int only = 0; only < 2; only++)
        for (int which = 0; which < RESULTS; which++) {
            fixture_init(&f);
            fixture_ask(&f);
            xent_results all = f.results, none = XENT_RESULTS_INIT;
            if (only) f.results = none;
#define PICK(k, member, is)                    \
    if (which == (k)) {                        \
        if (only) f.results.member = all.member; \
        else f.results.is = none.is;           \
    }
            PICK(0, loss, loss)
            PICK(1, row_losses, row_losses)
            PICK(2, lse, lse)
            PICK(3, z_loss, z_loss)
            PICK(4, normalizer, normalizer)
            PICK(5, z_normalizer, z_normalizer)
            PICK(6, kept_rows, kept_rows)
            PICK(7, argmax, argmax)
            PICK(8, correct, correct)
            PICK(9, entropy, entropy)
#undef PICK
            WORKS(&f, FUSED);
            unsigned char poison[sizeof f.grad];
            memset(poison, POISON, sizeof poison);
#define SAME(k, member) \
    CHECK_BYTES(f.member, (which == (k)) == only ? (const void *)whole.member : (const void *)poison, sizeof f.member)
            SAME(0, loss);
            SAME(1, row_losses);
            SAME(2, lse);
            SAME(3, z_loss);
            SAME(4, normalizer);
            SAME(5, z_normalizer);
            SAME(6, kept_rows);
            SAME(7, argmax);
            SAME(8, correct);
            SAME(9, entropy);
#undef SAME
            CHECK_BYTES(f.grad, whole.grad, sizeof f.grad);
        }
}

/* Without targets a call can ask for lse, argmax and entropy; any other result is XENT_ERR_NULL. */
static void evaluation(void) {
    struct fixture f, whole;
    fixture_init(&whole);
    fixture_ask(&whole);
    WORKS(&whole, FORWARD);
    for (int wanted = 0; wanted < 8; wanted++) {
        fixture_init(&f);
        fixture_ask(&f);
        f.problem.targets.data = NULL;
        xent_results all = f.results, none = XENT_RESULTS_INIT;
        f.results = none;
        f.results.lse = all.lse;
        f.results.argmax = all.argmax;
        f.results.entropy = all.entropy;
        if (wanted == 1) f.results.loss = all.loss;
        if (wanted == 2) f.results.row_losses = all.row_losses;
        if (wanted == 3) f.results.z_loss = all.z_loss;
        if (wanted == 4) f.results.normalizer = all.normalizer;
        if (wanted == 5) f.results.z_normalizer = all.z_normalizer;
        if (wanted == 6) f.results.kept_rows = all.kept_rows;
        if (wanted == 7) f.results.correct = all.correct;
        if (wanted) {
            FAILS(&f, WITH_RESULTS, XENT_ERR_NULL, "targets");
            continue;
        }
        FAILS(&f, WITH_GRADIENT | TARGETS, XENT_ERR_NULL, "targets");
        WORKS(&f, FORWARD);
        CHECK_BYTES(f.argmax, whole.argmax, sizeof f.argmax);
        for (int i = 0; i < ROWS; i++) {
            CHECK_NEAR(f.lse[i], whole.lse[i], 1e-6);
            CHECK_NEAR(f.entropy[i], whole.entropy[i], 1e-6);
        }
        f.problem.reduction = XENT_NONE;
        WORKS(&f, FORWARD);
        f.results = none; /* a call that asks for nothing works */
        WORKS(&f, FORWARD);
    }
}

static void refusals(void) {
    struct fixture f;
#define REFUSED(change, status, ...) \
    fixture_init(&f);                \
    fixture_ask(&f);                 \
    change;                          \
    FAILS(&f, WITH_RESULTS, status, __VA_ARGS__)
    REFUSED(f.results.entropy.dtype = XENT_BF16, XENT_ERR_DTYPE, "entropy", "BF16");
    REFUSED(f.results.entropy.dtype = XENT_F16, XENT_ERR_DTYPE, "entropy", "F16");
    REFUSED(f.results.entropy.dtype = XENT_I64, XENT_ERR_DTYPE, "entropy");
    REFUSED(f.results.entropy.strides[0] = -2, XENT_ERR_STRIDE, "entropy", "-2");
    REFUSED(f.results.entropy.data = (char *)f.entropy + 4, XENT_ERR_ALIGN, "entropy");
    REFUSED(f.results.entropy.data = f.row_losses, XENT_ERR_OVERLAP, "entropy", "row_losses");
    REFUSED(f.results.entropy.data = f.lse, XENT_ERR_OVERLAP, "entropy", "lse");
    REFUSED(f.results.argmax = f.targets, XENT_ERR_OVERLAP, "argmax", "targets");
    REFUSED(f.results.argmax = (int64_t *)(void *)f.lse, XENT_ERR_OVERLAP, "argmax", "lse");
    REFUSED(f.results.correct = f.kept_rows, XENT_ERR_OVERLAP, "correct", "kept_rows");
    REFUSED(f.results.z_loss = f.loss, XENT_ERR_OVERLAP, "z_loss", "loss");
    REFUSED(f.results.z_normalizer = f.normalizer, XENT_ERR_OVERLAP, "z_normalizer", "normalizer");
    uintptr_t odd;
#define MISALIGNED(member)           \
    odd = (uintptr_t)f.member + 4;   \
    REFUSED(memcpy(&f.results.member, &odd, sizeof odd), XENT_ERR_ALIGN, #member)
    MISALIGNED(argmax);
    MISALIGNED(correct);
    MISALIGNED(z_loss);
    MISALIGNED(z_normalizer);
#undef MISALIGNED
#undef REFUSED
    /* a target out of range: nothing is written of these either */
    fixture_init(&f);
    fixture_ask(&f);
    f.targets[5] = CLASSES;
    FAILS(&f, WITH_RESULTS, XENT_ERR_TARGET, "targets[5] = 5 is outside [0, 5)");
}

/* The same bits for any number of threads, also when threads share a row. */
static void threads(void) {
    static const struct { size_t rows, classes; } shapes[] = {{300, 5000}, {20000, 10}, {1, 1000001}};
    for (int k = 0; k < 3; k++) {
        size_t rows = shapes[k].rows, classes = shapes[k].classes;
        if (sampled() && k == 0) continue;
        float *logits = checked(malloc(rows * classes * sizeof(float)));
        int64_t *argmax[2], *targets = checked(malloc(rows * sizeof(int64_t)));
        double *entropy[2];
        uint64_t correct[2] = {7, 8};
        for (size_t i = 0; i < rows * classes; i++) logits[i] = floorf((float)(200 * uniform(&state))) / 16;
        for (size_t i = 0; i < rows; i++) targets[i] = (int64_t)(random_u64(&state) % classes);
        for (uint32_t many = 0; many < 2; many++) {
            argmax[many] = poisoned(rows * sizeof(int64_t));
            entropy[many] = poisoned(rows * sizeof(double));
            xent_problem p = packed(logits, rows, classes, targets);
            p.threads = many ? 3 : 1;
            xent_results r = XENT_RESULTS_INIT;
            r.argmax = argmax[many];
            r.correct = &correct[many];
            r.entropy = out(entropy[many], XENT_F64);
            CHECK_OK(xent_forward(&p, &r));
        }
        CHECK_BYTES(argmax[1], argmax[0], rows * sizeof(int64_t));
        CHECK_BYTES(entropy[1], entropy[0], rows * sizeof(double));
        CHECK_U64(correct[1], correct[0]);
        for (int many = 0; many < 2; many++) free(argmax[many]), free(entropy[many]);
        free(logits);
        free(targets);
    }
}

int main(void) {
    against_reference();
    argmax_by_hand();
    entropy_by_hand();
    ignored_rows();
    each_alone();
    evaluation();
    refusals();
    threads();
    return report();
}
