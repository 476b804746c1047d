/* Values: known results, comparison with the loops of reference.h, and bits that must agree. */
#include "reference.h"

static void known(void) {
    const float logits[4] = {0.1f, 0.2f, 0.3f, 0.4f};
    const int64_t target = 0;
    xent_problem p = packed(logits, 1, 4, &target);
    double loss = 0, lse = 0, normalizer = 0, row_loss = 0;
    uint64_t kept_rows = 0;
    float grad[4];
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    r.lse = &lse;
    r.normalizer = &normalizer;
    r.kept_rows = &kept_rows;
    r.row_losses = out(&row_loss, XENT_F64);
    xent_output g = out(grad, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, 1.5425, 5e-5);
    CHECK_NEAR(lse, 1.6425, 5e-5);
    CHECK_NEAR(row_loss, loss, 0);
    CHECK_NEAR(normalizer, 1, 0);
    CHECK_U64(kept_rows, 1);
    const double softmax[4] = {0.21383822, 0.23632778, 0.26118259, 0.28865141};
    for (int c = 0; c < 4; c++) CHECK_NEAR(grad[c], softmax[c] - (c == 0), 1e-7);

    /* equal logits: ln C, whatever the offset */
    static const float offsets[] = {0, 1e4f, -1e4f, 1e30f};
    for (int k = 0; k < 4; k++) {
        float even[1000];
        for (int c = 0; c < 1000; c++) even[c] = offsets[k];
        p = packed(even, 1, 1000, &target);
        CHECK_OK(xent_forward(&p, &r));
        if (k < 3) CHECK_NEAR(loss, log(1000), 1e-6);
        if (k < 3) CHECK_NEAR(lse, offsets[k] + log(1000), 1e-6);
        CHECK(isfinite(lse));
    }

    /* a confident prediction: e^-30, not 0; one class: exactly 0 */
    const float confident[2] = {30, 0};
    p = packed(confident, 1, 2, &target);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    CHECK_NEAR(loss, exp(-30), 1e-5 * exp(-30));
    CHECK_NEAR(grad[0], -exp(-30), 1e-5 * exp(-30));
    CHECK_NEAR(grad[1], exp(-30), 1e-5 * exp(-30));
    static const float single[] = {0, 3.5f, -1e4f, 1e4f};
    for (int k = 0; k < 4; k++) {
        p = packed(&single[k], 1, 1, &target);
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        CHECK_NEAR(loss, 0, 0);
        CHECK_NEAR(grad[0], 0, 0);
        CHECK_NEAR(lse, single[k], 0);
    }
}

/* Sizes around every width a kernel may have, and some large enough to be split over threads. */
static void against_reference(void) {
    static const struct { size_t rows, classes; } shapes[] = {
        {1, 1},  {3, 2},   {7, 3},   {5, 7},   {4, 8},    {9, 10},   {3, 15},   {3, 16},   {3, 17},   {2, 31},
        {2, 33}, {5, 63},  {5, 64},  {5, 65},  {2, 127},  {2, 129},  {3, 255},  {3, 257},  {2, 1000}, {3, 1023},
        {2, 1024}, {2, 1025}, {1, 4097}, {2, 32000}, {300, 5000}, {20000, 10}, {1, 600001},
    };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        size_t rows = shapes[k].rows, classes = shapes[k].classes;
        if (sampled() && rows * classes > 70000) continue; /* parallel.c tests threads */
        uint64_t state = 1000 + k;
        float *logits = checked(malloc(rows * classes * sizeof(float)));
        int64_t *targets = checked(malloc(rows * sizeof(int64_t)));
        fill(logits, rows * classes, -8, 8, &state);
        for (size_t i = 0; i < rows; i++) targets[i] = (int64_t)(random_u64(&state) % classes);
        xent_problem p = packed(logits, rows, classes, targets);
        CHECK_PROBLEM(&p, NULL, 1);
        if (k % 5 == 4) { /* a scale and an offset at which naive loops lose accuracy */
            for (size_t i = 0; i < rows * classes; i++) logits[i] = floorf(logits[i] * 4) * 0.25f + 1024;
            CHECK_PROBLEM(&p, NULL, 65536);
        }
        free(logits);
        free(targets);
    }
}

/* In place, out of place, alone and in a batch: the same bits. */
static void same_bits(void) {
    static const struct { size_t rows, classes; } shapes[] = {{1, 1}, {5, 3}, {6, 100}, {3, 4099}, {300, 5000}};
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        size_t rows = shapes[k].rows, classes = shapes[k].classes, size = rows * classes * sizeof(float);
        if (sampled() && rows > 50) continue;
        uint64_t state = k;
        float *logits = checked(malloc(size)), *grad = poisoned(size);
        int64_t *targets = checked(malloc(rows * sizeof(int64_t)));
        double *lse = poisoned(rows * sizeof(double));
        fill(logits, rows * classes, -5, 5, &state);
        for (size_t i = 0; i < rows; i++) targets[i] = (int64_t)(random_u64(&state) % classes);
        float *kept = copy_of(logits, size);
        xent_problem p = packed(logits, rows, classes, targets);
        p.label_smoothing = k % 2 ? 0.1 : 0;
        double loss = 0, again = 0;
        xent_results r = XENT_RESULTS_INIT;
        r.loss = &loss;
        r.lse = lse;
        xent_output g = out(grad, XENT_F32), in_place = out(logits, XENT_F32);

        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        CHECK_BYTES(logits, kept, size); /* out of place, no input byte changes */
        r.loss = &again;
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &in_place));
        CHECK_BYTES(logits, grad, size);
        CHECK_BYTES(&again, &loss, sizeof loss);

        memcpy(logits, kept, size);
        CHECK_OK(xent_backward(&p, lse, NULL, 1, &g));
        CHECK_BYTES(logits, kept, size);
        CHECK_OK(xent_backward(&p, lse, NULL, 1, &in_place));
        CHECK_BYTES(logits, grad, size);
        memcpy(logits, kept, size);

        /* each row alone */
        CHECK_OK(xent_forward_backward(&p, NULL, 1, NULL, &g));
        for (size_t i = 0; i < rows; i += rows > 50 ? 37 : 1) {
            xent_problem alone = packed(kept + i * classes, 1, classes, targets + i);
            alone.label_smoothing = p.label_smoothing;
            alone.normalizer = (double)rows;
            double row_lse = 0;
            xent_results row = XENT_RESULTS_INIT;
            row.lse = &row_lse;
            float *row_grad = poisoned(classes * sizeof(float));
            xent_output rg = out(row_grad, XENT_F32);
            CHECK_OK(xent_forward_backward(&alone, NULL, 1, &row, &rg));
            CHECK_BYTES(&row_lse, lse + i, sizeof row_lse);
            CHECK_BYTES(row_grad, grad + i * classes, classes * sizeof(float));
            free(row_grad);
        }
        free(logits);
        free(kept);
        free(grad);
        free(targets);
        free(lse);
    }
}

int main(void) {
    known();
    against_reference();
    same_bits();
    return report();
}
