/* Targets of every integer type: the same indices give the same bits, and the extremes of each type are
 * read correctly. */
#include "reference.h"

enum { rows = 40, classes = 300 };

static uint64_t state = 4;
static float logits[rows * classes];

static void same_bits(void) {
    static int64_t i64[rows];
    static int32_t i32[rows];
    static uint32_t u32[rows];
    static uint16_t u16[rows];
    static uint8_t u8[rows];
    for (int i = 0; i < rows; i++) {
        i64[i] = (int64_t)(random_u64(&state) % 256);
        if (i % 9 == 4) i64[i] = 200; /* ignored, in every type */
        i32[i] = (int32_t)i64[i];
        u32[i] = (uint32_t)i64[i];
        u16[i] = (uint16_t)i64[i];
        u8[i] = (uint8_t)i64[i];
    }
    static float grad[5][rows * classes];
    double loss[5];
    const xent_input targets[5] = {in(i64, XENT_I64), in(i32, XENT_I32), in(u32, XENT_U32), in(u16, XENT_U16),
                                   in(u8, XENT_U8)};
    for (int k = 0; k < 5; k++) {
        xent_problem p = packed(logits, rows, classes, NULL);
        p.targets = targets[k];
        p.ignore_index = 200;
        p.label_smoothing = 0.1;
        CHECK_PROBLEM(&p, NULL, 1);
        xent_results r = XENT_RESULTS_INIT;
        r.loss = &loss[k];
        xent_output g = out(grad[k], XENT_F32);
        CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
        CHECK_BYTES(&loss[k], &loss[0], sizeof loss[0]);
        CHECK_BYTES(grad[k], grad[0], sizeof grad[0]);
    }
}

/* One row whose target is the type's extreme: named in full, and ignored when asked to be. */
static void extreme(xent_dtype dtype, const void *value, int64_t number) {
    xent_problem p = packed(logits, 1, 7, NULL);
    p.targets = in(value, dtype);
    double loss = -7;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    char text[80];
    snprintf(text, sizeof text, "targets[0] = %" PRId64 " is outside [0, 7)", number);
    CHECK_STATUS(xent_forward(&p, &r), XENT_ERR_TARGET);
    CHECK_TEXT(xent_last_error(), text);
    CHECK_NEAR(loss, -7, 0);
    p.ignore_index = number;
    p.flags = XENT_FLAG_EMPTY_IS_ZERO;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_NEAR(loss, 0, 0);
    /* an unsigned maximum is not -1, nor a wide index its low bits */
    loss = -7;
    p.ignore_index = number == -1 ? UINT32_MAX : number == INT64_MIN ? 0 : number < 0 ? -number : -1;
    CHECK_STATUS(xent_forward(&p, &r), XENT_ERR_TARGET);
    CHECK_NEAR(loss, -7, 0);
}

static void extremes(void) {
    static const int64_t i64[] = {INT64_MIN, INT64_MAX, -1, ((int64_t)1 << 32) + 2, (int64_t)1 << 40};
    for (int k = 0; k < 5; k++) extreme(XENT_I64, &i64[k], i64[k]);
    static const int32_t i32[] = {INT32_MIN, INT32_MAX, -1, 65536 + 2, 7};
    for (int k = 0; k < 5; k++) extreme(XENT_I32, &i32[k], i32[k]);
    static const uint32_t u32[] = {UINT32_MAX, (uint32_t)1 << 31, 65536 + 2, 7};
    for (int k = 0; k < 4; k++) extreme(XENT_U32, &u32[k], u32[k]);
    static const uint16_t u16[] = {UINT16_MAX, 256 + 2, 7};
    for (int k = 0; k < 3; k++) extreme(XENT_U16, &u16[k], u16[k]);
    static const uint8_t u8[] = {UINT8_MAX, 128, 7};
    for (int k = 0; k < 3; k++) extreme(XENT_U8, &u8[k], u8[k]);
}

/* Class ids past 2^16 keep all their bits. */
static void wide_ids(void) {
    enum { many = 70000 };
    float *wide = checked(malloc(2 * many * sizeof(float)));
    fill(wide, 2 * many, -1, 1, &state);
    int32_t i32[2] = {65536 + 1, many - 1};
    uint32_t u32[2] = {65536 + 1, many - 1};
    xent_problem p = packed(wide, 2, many, NULL);
    p.targets = in(i32, XENT_I32);
    CHECK_PROBLEM(&p, NULL, 1);
    p.targets = in(u32, XENT_U32);
    CHECK_PROBLEM(&p, NULL, 1);
    free(wide);
}

int main(void) {
    fill(logits, rows * classes, -6, 6, &state);
    same_bits();
    extremes();
    wide_ids();
    return report();
}
