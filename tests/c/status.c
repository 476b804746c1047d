/* Every status code: a call that returns it, its name, its message, and the lifetime of the message. */
#include "check.h"

#include <pthread.h>

static void names(void) {
#define NAME(code, number)                        \
    CHECK(code == number);                        \
    CHECK_TEXT(xent_status_name(code), #code)
    /* the numbers are ABI: append-only */
    NAME(XENT_OK, 0);
    NAME(XENT_ERR_NULL, 1);
    NAME(XENT_ERR_STRUCT, 2);
    NAME(XENT_ERR_SHAPE, 3);
    NAME(XENT_ERR_STRIDE, 4);
    NAME(XENT_ERR_DTYPE, 5);
    NAME(XENT_ERR_ALIGN, 6);
    NAME(XENT_ERR_OVERLAP, 7);
    NAME(XENT_ERR_TARGET, 8);
    NAME(XENT_ERR_PARAM, 9);
    NAME(XENT_ERR_PANIC, 10); /* no argument causes it; heap.c does */
    NAME(XENT_ERR_MEMORY, 11);
#undef NAME
    static const xent_status unknown[] = {-1, 12, 1000, INT32_MAX, INT32_MIN};
    for (size_t k = 0; k < sizeof unknown / sizeof *unknown; k++) {
        CHECK(xent_status_name(unknown[k]) != NULL);
        CHECK(xent_status_name(unknown[k])[0] != '\0');
    }
}

static void dtypes(struct fixture *f) {
    static const xent_dtype not_float[] = {XENT_I64, XENT_I32, XENT_U8, XENT_U16, XENT_U32, 4, 15, 21, UINT32_MAX};
    for (size_t k = 0; k < sizeof not_float / sizeof *not_float; k++) {
        fixture_init(f);
        f->problem.logits.dtype = not_float[k];
        FAILS(f, EVERY_ENTRY, XENT_ERR_DTYPE, "logits");
        fixture_init(f);
        f->problem.class_weights.dtype = not_float[k];
        FAILS(f, EVERY_ENTRY, XENT_ERR_DTYPE, "class_weights");
        fixture_init(f);
        f->problem.row_weights.dtype = not_float[k];
        FAILS(f, EVERY_ENTRY, XENT_ERR_DTYPE, "row_weights");
        fixture_init(f);
        f->results.row_losses.dtype = not_float[k];
        FAILS(f, WITH_RESULTS, XENT_ERR_DTYPE, "row_losses");
        fixture_init(f);
        f->grad_output.dtype = not_float[k];
        FAILS(f, WITH_GRADIENT, XENT_ERR_DTYPE, "grad_output");
        fixture_init(f);
        f->grad_logits.dtype = not_float[k];
        FAILS(f, WITH_GRADIENT, XENT_ERR_DTYPE, "grad_logits");
    }
    fixture_init(f);
    f->problem.targets.dtype = 99;
    FAILS(f, EVERY_ENTRY, XENT_ERR_DTYPE, "targets", "99");
    fixture_init(f);
    f->problem.row_mask.dtype = XENT_I32;
    FAILS(f, EVERY_ENTRY, XENT_ERR_DTYPE, "row_mask");
    fixture_init(f);
    f->problem.row_mask.dtype = XENT_F32;
    FAILS(f, EVERY_ENTRY, XENT_ERR_DTYPE, "row_mask");
    /* the gradient has the dtype of the logits, or f32 */
    static const xent_dtype narrower[] = {XENT_F64, XENT_BF16, XENT_F16};
    for (size_t k = 0; k < 3; k++) {
        fixture_init(f);
        f->grad_logits.dtype = narrower[k];
        FAILS(f, WITH_GRADIENT, XENT_ERR_DTYPE, "grad_logits");
    }
    static const xent_dtype halves[] = {XENT_BF16, XENT_F16};
    for (size_t k = 0; k < 2; k++) {
        fixture_init(f);
        f->results.row_losses.dtype = halves[k];
        FAILS(f, WITH_RESULTS, XENT_ERR_DTYPE, "row_losses");
    }
}

static void shapes(struct fixture *f) {
    fixture_init(f);
    f->problem.classes = 0;
    FAILS(f, EVERY_ENTRY, XENT_ERR_SHAPE, "classes");
    fixture_init(f);
    f->problem.rows = SIZE_MAX / 2;
    FAILS(f, EVERY_ENTRY, XENT_ERR_SHAPE, "rows", "classes");
    /* the product is 2^64 + 2^33: small when it wraps, which is the bug kept out */
    fixture_init(f);
    f->problem.rows = ((size_t)1 << 31) + 1;
    f->problem.classes = (size_t)1 << 33;
    FAILS(f, EVERY_ENTRY, XENT_ERR_SHAPE, "rows", "classes");
}

static void strides(struct fixture *f) {
    fixture_init(f);
    f->problem.logits = in_rows(f->logits, XENT_F32, -5);
    FAILS(f, EVERY_ENTRY, XENT_ERR_STRIDE, "logits", "-5");
    fixture_init(f);
    f->problem.logits = in_rows(f->logits, XENT_F32, INT64_MAX / 2);
    FAILS(f, EVERY_ENTRY, XENT_ERR_STRIDE, "logits");
    fixture_init(f);
    f->problem.logits = in_rows(f->logits, XENT_F32, INT64_MIN);
    FAILS(f, EVERY_ENTRY, XENT_ERR_STRIDE, "logits");
    fixture_init(f);
    f->problem.targets.strides[0] = -1;
    FAILS(f, EVERY_ENTRY, XENT_ERR_STRIDE, "targets", "-1");
    fixture_init(f);
    f->problem.row_weights.strides[0] = INT64_MAX;
    FAILS(f, EVERY_ENTRY, XENT_ERR_STRIDE, "row_weights");
    fixture_init(f);
    f->problem.row_mask.strides[0] = -3;
    FAILS(f, EVERY_ENTRY, XENT_ERR_STRIDE, "row_mask", "-3");
    fixture_init(f);
    f->problem.class_weights.strides[1] = -1;
    FAILS(f, EVERY_ENTRY, XENT_ERR_STRIDE, "class_weights", "-1");
    fixture_init(f);
    f->results.row_losses.strides[0] = -2;
    FAILS(f, WITH_RESULTS, XENT_ERR_STRIDE, "row_losses", "-2");
    fixture_init(f);
    f->problem.reduction = XENT_NONE;
    f->results.loss = NULL;
    f->grad_output.strides[0] = -4;
    FAILS(f, WITH_GRADIENT, XENT_ERR_STRIDE, "grad_output", "-4");
    /* rows of an output that share elements: too close, or at one address */
    static const int64_t shared[] = {CLASSES - 1, 1, 0};
    for (size_t k = 0; k < 3; k++) {
        fixture_init(f);
        f->grad_logits = out_rows(f->grad, XENT_F32, shared[k]);
        FAILS(f, WITH_GRADIENT, XENT_ERR_STRIDE, "grad_logits");
    }
    fixture_init(f);
    f->grad_logits = out_rows(f->grad, XENT_F32, INT64_MAX / 4);
    FAILS(f, WITH_GRADIENT, XENT_ERR_STRIDE, "grad_logits");
    /* {row, 0, 0}: what C makes of a class stride that is left out */
    fixture_init(f);
    f->problem.logits = (xent_input){f->logits, XENT_F32, {CLASSES + 2}};
    FAILS(f, EVERY_ENTRY, XENT_ERR_STRIDE, "logits.strides[1] = 0", "class stride", "{7, 1, 0}");
    fixture_init(f);
    f->grad_logits = (xent_output){f->grad, XENT_F32, {CLASSES}};
    FAILS(f, WITH_GRADIENT, XENT_ERR_STRIDE, "grad_logits.strides[1] = 0", "class stride", "{5, 1, 0}");
}

static void alignment(struct fixture *f) {
    fixture_init(f);
    f->problem.logits.data = (const char *)f->logits + 1;
    FAILS(f, EVERY_ENTRY, XENT_ERR_ALIGN, "logits");
    fixture_init(f);
    f->problem.targets.data = (const char *)f->targets + 4;
    FAILS(f, EVERY_ENTRY, XENT_ERR_ALIGN, "targets");
    fixture_init(f);
    f->problem.class_weights.data = (const char *)f->class_weights + 2;
    FAILS(f, EVERY_ENTRY, XENT_ERR_ALIGN, "class_weights");
    fixture_init(f);
    f->problem.row_weights.data = (const char *)f->row_weights + 3;
    FAILS(f, EVERY_ENTRY, XENT_ERR_ALIGN, "row_weights");
    fixture_init(f);
    f->results.row_losses.data = (char *)f->row_losses + 4;
    FAILS(f, WITH_RESULTS, XENT_ERR_ALIGN, "row_losses");
    fixture_init(f);
    f->grad_output.data = (const char *)f->grad_output_values + 1;
    FAILS(f, WITH_GRADIENT, XENT_ERR_ALIGN, "grad_output");
    fixture_init(f);
    f->grad_logits.data = (char *)f->grad + 2;
    FAILS(f, WITH_GRADIENT, XENT_ERR_ALIGN, "grad_logits");
    /* misaligned pointers: C forbids them, but a foreign-function interface can pass them */
    uintptr_t odd = (uintptr_t)f->lse + 4;
    fixture_init(f);
    memcpy(&f->results.lse, &odd, sizeof odd);
    FAILS(f, WITH_RESULTS, XENT_ERR_ALIGN, "lse");
    fixture_init(f);
    odd = (uintptr_t)f->loss + 4;
    memcpy(&f->results.loss, &odd, sizeof odd);
    FAILS(f, WITH_RESULTS, XENT_ERR_ALIGN, "loss");
    fixture_init(f);
    odd = (uintptr_t)f->kept_rows + 4;
    memcpy(&f->results.kept_rows, &odd, sizeof odd);
    FAILS(f, WITH_RESULTS, XENT_ERR_ALIGN, "kept_rows");
    fixture_init(f);
    odd = (uintptr_t)f->lse_in + 4;
    memcpy(&f->lse_arg, &odd, sizeof odd);
    FAILS(f, BACKWARD, XENT_ERR_ALIGN, "lse");
}

static void parameters(struct fixture *f) {
#define PARAMETER(field, value, ...)   \
    fixture_init(f);                   \
    f->problem.field = (value);        \
    FAILS(f, EVERY_ENTRY, XENT_ERR_PARAM, #field, __VA_ARGS__)
    PARAMETER(label_smoothing, -0.25, "-0.25");
    PARAMETER(label_smoothing, 1.5, "1.5");
    PARAMETER(label_smoothing, NAN, "");
    PARAMETER(normalizer, -2.5, "-2.5");
    PARAMETER(normalizer, INFINITY, "inf");
    PARAMETER(normalizer, NAN, "");
    PARAMETER(z_normalizer, -2.5, "-2.5");
    PARAMETER(z_normalizer, NAN, "");
    PARAMETER(z_loss, -0.5, "-0.5");
    PARAMETER(z_loss, INFINITY, "inf");
    PARAMETER(z_loss, NAN, "");
    PARAMETER(softcap, -30.5, "-30.5");
    PARAMETER(softcap, INFINITY, "inf");
    PARAMETER(softcap, NAN, "");
    PARAMETER(logit_scale, 0.0, "0");
    PARAMETER(logit_scale, -1.5, "-1.5");
    PARAMETER(logit_scale, INFINITY, "inf");
    PARAMETER(logit_scale, NAN, "");
    PARAMETER(reduction, 3, "3");
    PARAMETER(reduction, UINT32_MAX, "4294967295");
#undef PARAMETER
    fixture_init(f);
    f->grad_scale = NAN;
    FAILS(f, WITH_GRADIENT, XENT_ERR_PARAM, "grad_scale");
    fixture_init(f);
    f->grad_scale = -INFINITY;
    FAILS(f, WITH_GRADIENT, XENT_ERR_PARAM, "grad_scale", "-inf");
    /* reduction none has no reduced loss */
    fixture_init(f);
    f->problem.reduction = XENT_NONE;
    FAILS(f, WITH_RESULTS, XENT_ERR_PARAM, "loss");
}

static void targets(struct fixture *f) {
    fixture_init(f);
    f->targets[3] = CLASSES;
    FAILS(f, EVERY_ENTRY, XENT_ERR_TARGET, "targets[3] = 5 is outside [0, 5)");
    fixture_init(f);
    f->targets[5] = -1;
    FAILS(f, EVERY_ENTRY, XENT_ERR_TARGET, "targets[5] = -1 is outside [0, 5)");
    fixture_init(f);
    f->targets[0] = INT64_MIN;
    FAILS(f, EVERY_ENTRY, XENT_ERR_TARGET, "targets[0] = -9223372036854775808 is outside [0, 5)");
    fixture_init(f);
    f->targets[0] = INT64_MAX;
    FAILS(f, EVERY_ENTRY, XENT_ERR_TARGET, "targets[0] = 9223372036854775807 is outside [0, 5)");
    /* -100 is out of range if another index is ignored */
    fixture_init(f);
    f->problem.ignore_index = 7;
    FAILS(f, EVERY_ENTRY, XENT_ERR_TARGET, "targets[2] = -100 is outside [0, 5)");
    /* 2^32 + 1 is not class 1 */
    fixture_init(f);
    f->targets[4] = ((int64_t)1 << 32) + 1;
    FAILS(f, EVERY_ENTRY, XENT_ERR_TARGET, "targets[4] = 4294967297 is outside [0, 5)");
    /* of several, the first */
    fixture_init(f);
    f->targets[5] = 50;
    f->targets[3] = 30;
    FAILS(f, EVERY_ENTRY, XENT_ERR_TARGET, "targets[3] = 30 ");
    /* a row that is masked out is ignored whatever its target says */
    fixture_init(f);
    f->targets[1] = 12345;
    WORKS(f, EVERY_ENTRY);
}

/* The text of the contract, and a problem large enough for the parallel path: one bad target in
 * the last row but one, and not a byte written before it is found. */
static void target_in_a_large_problem(void) {
    enum { rows = 64, classes = 50257 };
    uint64_t state = 2;
    size_t size = sizeof(float) * rows * classes;
    float *logits = checked(malloc(size)), *grad = poisoned(size);
    void *logits_before, *grad_before = copy_of(grad, size);
    double *lse = poisoned(rows * sizeof(double)), *lse_in = checked(calloc(rows, sizeof(double)));
    void *lse_before = copy_of(lse, rows * sizeof(double));
    int64_t targets[rows] = {0};
    fill(logits, (size_t)rows * classes, -1, 1, &state);
    logits_before = copy_of(logits, size);
    xent_problem p = packed(logits, rows, classes, targets);
    xent_results r = XENT_RESULTS_INIT;
    r.lse = lse;
    xent_output g = out(grad, XENT_F32), in_place = out(logits, XENT_F32);
    for (int position = 0; position < 2; position++) {
        int row = position ? rows - 2 : 17;
        char expected[64];
        snprintf(expected, sizeof expected, "targets[%d] = 50257 is outside [0, 50257)", row);
        targets[row] = classes;
        CHECK_STATUS(xent_forward(&p, &r), XENT_ERR_TARGET);
        CHECK_TEXT(xent_last_error(), expected);
        CHECK_STATUS(xent_backward(&p, lse_in, NULL, 1, &g), XENT_ERR_TARGET);
        CHECK_TEXT(xent_last_error(), expected);
        CHECK_STATUS(xent_forward_backward(&p, NULL, 1, &r, &g), XENT_ERR_TARGET);
        CHECK_TEXT(xent_last_error(), expected);
        CHECK_STATUS(xent_forward_backward(&p, NULL, 1, &r, &in_place), XENT_ERR_TARGET);
        CHECK_TEXT(xent_last_error(), expected);
        targets[row] = 0;
    }
    CHECK_BYTES(logits, logits_before, size);
    CHECK_BYTES(grad, grad_before, size);
    CHECK_BYTES(lse, lse_before, rows * sizeof(double));
    free(logits);
    free(logits_before);
    free(grad);
    free(grad_before);
    free(lse);
    free(lse_before);
    free(lse_in);
}

/* ---- the message: per thread, and left alone by a success ------------------------------ */

static void *other_thread(void *argument) {
    (void)argument;
    struct fixture f;
    CHECK_TEXT(xent_last_error(), "");
    fixture_init(&f);
    WORKS(&f, EVERY_ENTRY);
    CHECK_TEXT(xent_last_error(), "");
    f.problem.logits.data = NULL;
    FAILS(&f, FORWARD, XENT_ERR_NULL, "logits");
    return NULL;
}

static void message_lifetime(struct fixture *f) {
    CHECK_TEXT(xent_last_error(), ""); /* nothing failed yet */
    fixture_init(f);
    WORKS(f, EVERY_ENTRY);
    CHECK_TEXT(xent_last_error(), "");
    f->targets[3] = 77;
    FAILS(f, EVERY_ENTRY, XENT_ERR_TARGET, "targets[3] = 77 is outside [0, 5)");
    f->targets[3] = 3;
    WORKS(f, EVERY_ENTRY);
    CHECK_TEXT(xent_last_error(), "targets[3] = 77 is outside [0, 5)");
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_TEXT(xent_last_error(), "targets[3] = 77 is outside [0, 5)");
}

int main(void) {
    struct fixture *f = checked(malloc(sizeof *f));
    message_lifetime(f);
    names();
    dtypes(f);
    shapes(f);
    strides(f);
    alignment(f);
    parameters(f);
    targets(f);
    target_in_a_large_problem();
    free(f);
    return report();
}
