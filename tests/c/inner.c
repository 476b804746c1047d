/* Inner positions and class strides: images and sequences of ranks 3, 4 and 5, transposed matrices,
 * any order of the axes; canaries between elements; bits that do not depend on the layout around a row. */
#include "reference.h"

static uint64_t state = 13;

/* All operands of a problem of any shape. */
struct operands {
    int64_t *targets;
    float *class_weights, *row_weights, *grad_output;
    uint8_t *mask;
};

static struct operands new_operands(size_t rows, size_t classes) {
    struct operands o;
    o.targets = checked(malloc(rows * sizeof(int64_t)));
    o.class_weights = checked(malloc(classes * sizeof(float)));
    o.row_weights = checked(malloc(rows * sizeof(float)));
    o.grad_output = checked(malloc(rows * sizeof(float)));
    o.mask = checked(malloc(rows));
    for (size_t i = 0; i < rows; i++) {
        o.targets[i] = i % 5 == 3 ? -100 : (int64_t)(random_u64(&state) % classes);
        o.mask[i] = i % 7 != 2;
    }
    fill(o.class_weights, classes, 0.5, 2, &state);
    fill(o.row_weights, rows, 0.5, 2, &state);
    fill(o.grad_output, rows, -2, 2, &state);
    return o;
}

static void free_operands(struct operands *o) {
    free(o->targets);
    free(o->class_weights);
    free(o->row_weights);
    free(o->grad_output);
    free(o->mask);
}

/* Logits [N, C, d1, ..]: packed, with options one after the other. */
static void packed_images(size_t rows, size_t classes, size_t inner, xent_dtype dtype) {
    size_t count = rows * classes * inner;
    void *logits = checked(malloc(count * size_of(dtype)));
    for (size_t i = 0; i < count; i++) set(logits, dtype, (int64_t)i, 12 * uniform(&state) - 6);
    struct operands o = new_operands(rows * inner, classes);
    for (unsigned set_of = 0; set_of < 8; set_of++)
        for (xent_reduction reduction = XENT_MEAN; reduction <= XENT_NONE; reduction++) {
            xent_problem p = packed(NULL, rows, classes, o.targets);
            p.logits = in(logits, dtype);
            p.inner = inner;
            p.reduction = reduction;
            if (set_of & 1) p.label_smoothing = 0.1, p.class_weights = in(o.class_weights, XENT_F32);
            if (set_of & 2) p.row_weights = in(o.row_weights, XENT_F32), p.row_mask = in(o.mask, XENT_U8);
            if (set_of & 4) p.z_loss = 0.01, p.flags = XENT_FLAG_ACCUMULATE;
            xent_input grad_output = in(o.grad_output, XENT_F32);
            CHECK_ALL(&p, reduction == XENT_NONE ? &grad_output : NULL, 0.5);
        }
    free(logits);
    free_operands(&o);
}

static void ranks(void) {
    static const struct { size_t rows, classes, inner; } shapes[] = {
        {3, 5, 2},                   /* [3, 5, 2] */
        {2, 3, 4 * 5},               /* [2, 3, 4, 5] */
        {2, 4, 2 * 3 * 7},           /* [2, 4, 2, 3, 7] */
        {1, 1, 9},   {1, 2, 1},      {4, 21, 63},  {4, 21, 64},  {4, 21, 65}, {1, 300, 17},
        {5, 2, 257}, {2, 1000, 3},   {1, 7, 4099}, {2, 2049, 33},
    };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (int d = 0; d < 4; d++) {
            if (d > 1 && shapes[k].classes > 500) continue;
            if (sampled() && (size_t)d != k % 4) continue;
            size_t inner = sampled() && shapes[k].classes > 2000 ? 3 : shapes[k].inner;
            packed_images(shapes[k].rows, shapes[k].classes, inner, every_float[d]);
        }
}

/* Every order of three axes, with gaps that are neither read nor written. */
static void permuted(size_t rows, size_t classes, size_t inner, xent_dtype dtype) {
    static const int orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    const size_t sizes[3] = {rows, classes, inner};
    size_t count = rows * classes * inner, unit = size_of(dtype);
    void *packed_logits = checked(malloc(count * unit)), *packed_grad = poisoned(count * unit);
    for (size_t i = 0; i < count; i++) set(packed_logits, dtype, (int64_t)i, 8 * uniform(&state) - 4);
    struct operands o = new_operands(rows * inner, classes);
    xent_problem p = packed(NULL, rows, classes, o.targets);
    p.logits = in(packed_logits, dtype);
    p.inner = inner;
    p.label_smoothing = 0.1;
    p.row_weights = in(o.row_weights, XENT_F32);
    double loss = 0, *lse = poisoned(rows * inner * sizeof(double));
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    r.lse = lse;
    struct expected e = reference(&p, NULL, 1, NULL);

    for (int k = 0; k < 6; k++)
        for (int gap = 0; gap < 2; gap++) {
            /* the last axis of the order is innermost; a gap after each run of an axis */
            int64_t strides[3], step = 1 + gap;
            for (int place_in = 2; place_in >= 0; place_in--) {
                strides[orders[k][place_in]] = step;
                step *= (int64_t)sizes[orders[k][place_in]] + gap;
            }
            size_t size = (size_t)step * unit;
            void *logits = checked(malloc(size)), *grad = poisoned(size), *in_place, *before = poisoned(size);
            for (int64_t i = 0; i < step; i++) set(logits, dtype, i, NAN);
            for (size_t row = 0; row < rows; row++)
                for (size_t c = 0; c < classes; c++)
                    for (size_t pos = 0; pos < inner; pos++)
                        set(logits, dtype, place(strides, sizes, row, c, pos),
                            get(packed_logits, dtype, (int64_t)((row * classes + c) * inner + pos)));
            in_place = copy_of(logits, size);
            xent_problem q = p;
            q.logits = (xent_input){logits, dtype, {strides[0], strides[1], strides[2]}};
            xent_output g = {grad, dtype, {strides[0], strides[1], strides[2]}}, over = g;
            over.data = in_place;
            CHECK_OK(xent_forward_backward(&q, NULL, 1, &r, &g));
            CHECK_NEAR(loss, e.loss, e.loss_tolerance);
            q.logits.data = in_place;
            double again = 0;
            r.loss = &again;
            CHECK_OK(xent_forward_backward(&q, NULL, 1, &r, &over));
            r.loss = &loss;
            CHECK_BYTES(&again, &loss, sizeof loss);
            /* into a packed gradient, from strided logits */
            q.logits.data = logits;
            g = out(packed_grad, dtype);
            CHECK_OK(xent_backward(&q, lse, NULL, 1, &g));
            check_values(__FILE__, __LINE__, "grad_logits", packed_grad, dtype, e.grad, e.lse_terms,
                         e.grad_tolerance, count);
            for (size_t row = 0; row < rows; row++)
                for (size_t c = 0; c < classes; c++)
                    for (size_t pos = 0; pos < inner; pos++) {
                        int64_t at = place(strides, sizes, row, c, pos);
                        int64_t packed_at = (int64_t)((row * classes + c) * inner + pos);
                        set(packed_grad, dtype, packed_at, get(grad, dtype, at));
                        memcpy((char *)grad + (size_t)at * unit, (char *)before + (size_t)at * unit, unit);
                        /* so that in_place differs where a gap was written, logits where an input was */
                        set(in_place, dtype, at, get(packed_logits, dtype, packed_at));
                    }
            check_values(__FILE__, __LINE__, "grad_logits", packed_grad, dtype, e.grad, e.grad_terms,
                         e.grad_tolerance, count);
            CHECK_BYTES(grad, before, size);
            CHECK_BYTES(in_place, logits, size);
            free(logits);
            free(grad);
            free(in_place);
            free(before);
        }
    expected_free(&e);
    free(packed_logits);
    free(packed_grad);
    free(lse);
    free_operands(&o);
}

/* A transposed matrix [classes, rows] has the numbers of the matrix, and either way the row's own. */
static void transposed(size_t rows, size_t classes) {
    float *matrix = checked(malloc(rows * classes * sizeof(float)));
    float *turned = checked(malloc(rows * classes * sizeof(float)));
    fill(matrix, rows * classes, -6, 6, &state);
    for (size_t i = 0; i < rows; i++)
        for (size_t c = 0; c < classes; c++) turned[c * rows + i] = matrix[i * classes + c];
    struct operands o = new_operands(rows, classes);
    xent_problem p = packed(matrix, rows, classes, o.targets), q = p;
    q.logits = (xent_input){turned, XENT_F32, {1, (int64_t)rows, 1}};
    CHECK_ALL(&q, NULL, 1);
    /* the same as one image of `rows` positions */
    xent_problem image = packed(turned, 1, classes, o.targets);
    image.inner = rows;
    float *grad = poisoned(rows * classes * sizeof(float)), *other = poisoned(rows * classes * sizeof(float));
    double loss = 0, image_loss = 0;
    xent_results r = XENT_RESULTS_INIT;
    xent_output g = {grad, XENT_F32, {1, (int64_t)rows, 1}}, packed_g = out(other, XENT_F32);
    r.loss = &loss;
    CHECK_OK(xent_forward_backward(&q, NULL, 1, &r, &g));
    r.loss = &image_loss;
    CHECK_OK(xent_forward_backward(&image, NULL, 1, &r, &packed_g));
    CHECK_NEAR(image_loss, loss, 1e-6 * (1 + fabs(loss)));
    for (size_t i = 0; i < rows * classes; i++) CHECK_NEAR(other[i], grad[i], 1e-6);
    free(matrix);
    free(turned);
    free(grad);
    free(other);
    free_operands(&o);
}

/* A position's bits do not depend on how many there are, nor where it is: not the loss of its row, its
 * lse or its gradient; and for any number of threads. */
static void same_bits(xent_dtype dtype) {
    enum { rows = 3, classes = 19, inner = 150, few = 37 };
    size_t unit = size_of(dtype), count = rows * classes * inner;
    void *logits = checked(malloc(count * unit)), *grad = poisoned(count * unit);
    void *part = poisoned(rows * classes * few * unit);
    for (size_t i = 0; i < count; i++) set(logits, dtype, (int64_t)i, 8 * uniform(&state) - 4);
    struct operands o = new_operands(rows * inner, classes);
    double row_losses[rows * inner], lse[rows * inner], some_losses[rows * few], some_lse[rows * few];
    xent_problem p = packed(NULL, rows, classes, o.targets);
    p.logits = in(logits, dtype);
    p.inner = inner;
    p.reduction = XENT_SUM;
    p.label_smoothing = 0.1;
    xent_results r = XENT_RESULTS_INIT;
    r.row_losses = out(row_losses, XENT_F64);
    r.lse = lse;
    xent_output g = out(grad, dtype);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));
    static const size_t starts[] = {0, 1, 63, 64, 113};
    for (int k = 0; k < 5; k++) {
        xent_problem q = p;
        q.inner = few;
        q.logits = (xent_input){(char *)logits + starts[k] * unit, dtype, {classes * inner, inner, 1}};
        q.targets = (xent_input){o.targets + starts[k], XENT_I64, {inner, 0, 1}};
        q.threads = (uint32_t)k % 3;
        r.row_losses = out(some_losses, XENT_F64);
        r.lse = some_lse;
        g = out(part, dtype);
        CHECK_OK(xent_forward_backward(&q, NULL, 1, &r, &g));
        for (size_t i = 0; i < rows; i++) {
            CHECK_BYTES(&some_lse[i * few], &lse[i * inner + starts[k]], few * sizeof(double));
            CHECK_BYTES(&some_losses[i * few], &row_losses[i * inner + starts[k]], few * sizeof(double));
            for (size_t c = 0; c < classes; c++)
                CHECK_BYTES((char *)part + (i * classes + c) * few * unit,
                            (char *)grad + ((i * classes + c) * inner + starts[k]) * unit, few * unit);
        }
    }
    free(logits);
    free(grad);
    free(part);
    free_operands(&o);
}

/* Operands [rows, inner] may have any strides. */
static void strided_row_operands(void) {
    enum { rows = 3, classes = 4, inner = 5, n = rows * inner };
    float logits[n * classes], grad[2][n * classes];
    struct operands o = new_operands(n, classes);
    fill(logits, n * classes, -3, 3, &state);
    /* [inner, rows], and every second element */
    static int64_t targets[2 * n];
    static float weights[2 * n], grad_output[2 * n];
    static uint8_t mask[2 * n];
    static double losses[2 * n], packed_losses[n];
    static float entropy[2 * n];
    static double packed_entropy[n];
    for (int i = 0; i < 2 * n; i++) {
        targets[i] = 99;
        weights[i] = grad_output[i] = NAN;
        mask[i] = 1;
        losses[i] = entropy[i] = 7;
    }
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < inner; k++) {
            int to = 2 * (k * rows + i), from = i * inner + k;
            targets[to] = o.targets[from];
            weights[to] = o.row_weights[from];
            grad_output[to] = o.grad_output[from];
            mask[to] = o.mask[from];
        }
    xent_problem p = packed(logits, rows, classes, o.targets), q;
    p.inner = inner;
    p.reduction = XENT_NONE;
    p.row_weights = in(o.row_weights, XENT_F32);
    p.row_mask = in(o.mask, XENT_U8);
    xent_input go = in(o.grad_output, XENT_F32);
    xent_results r = XENT_RESULTS_INIT;
    r.row_losses = out(packed_losses, XENT_F64);
    r.entropy = out(packed_entropy, XENT_F64);
    xent_output g = out(grad[0], XENT_F32);
    CHECK_ALL(&p, &go, 1);
    CHECK_OK(xent_forward_backward(&p, &go, 1, &r, &g));
    q = p;
    q.targets = (xent_input){targets, XENT_I64, {2, -1, 2 * rows}};
    q.row_weights = (xent_input){weights, XENT_F32, {2, INT64_MAX, 2 * rows}};
    q.row_mask = (xent_input){mask, XENT_U8, {2, 0, 2 * rows}};
    go = (xent_input){grad_output, XENT_F32, {2, 5, 2 * rows}};
    r.row_losses = (xent_output){losses, XENT_F64, {2, 0, 2 * rows}};
    r.entropy = (xent_output){entropy, XENT_F32, {2, 1, 2 * rows}};
    g.data = grad[1];
    CHECK_OK(xent_forward_backward(&q, &go, 1, &r, &g));
    CHECK_BYTES(grad[1], grad[0], sizeof grad[0]);
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < inner; k++) {
            int to = 2 * (k * rows + i), from = i * inner + k;
            CHECK_BYTES(&losses[to], &packed_losses[from], sizeof(double));
            CHECK_NEAR(entropy[to], (float)packed_entropy[from], 0);
            CHECK_NEAR(losses[to + 1], 7, 0);
            CHECK_NEAR(entropy[to + 1], 7, 0);
        }
    /* a target out of range is named by its place among the rows */
    char text[80];
    o.targets[8] = classes;
    snprintf(text, sizeof text, "targets[8] = %d is outside [0, %d)", classes, classes);
    CHECK_STATUS(xent_forward(&p, &r), XENT_ERR_TARGET);
    CHECK_TEXT(xent_last_error(), text);
    free_operands(&o);
}

/* Errors: outputs whose elements overlap, sizes that overflow, invalid strides. */
static void refusals(void) {
    struct fixture f;
    fixture_init(&f);
    f.problem.rows = ROWS / 2;
    f.problem.inner = 2;
    WORKS(&f, EVERY_ENTRY);
    f.grad_logits.strides[2] = 1; /* rows and classes at 0 */
    FAILS(&f, WITH_GRADIENT, XENT_ERR_STRIDE, "grad_logits");
    f.grad_logits = (xent_output){f.grad, XENT_F32, {2 * CLASSES, 2, 1}};
    WORKS(&f, EVERY_ENTRY);
    f.grad_logits = (xent_output){f.grad, XENT_F32, {1, 3, 15}}; /* another order, still apart */
    WORKS(&f, EVERY_ENTRY);
    f.grad_logits = (xent_output){f.grad, XENT_F32, {2 * CLASSES - 1, 2, 1}};
    FAILS(&f, WITH_GRADIENT, XENT_ERR_STRIDE, "grad_logits");
    fixture_init(&f);
    f.problem.rows = ROWS / 2;
    f.problem.inner = 2;
    f.problem.logits = (xent_input){f.logits, XENT_F32, {2 * CLASSES, 2, -1}};
    FAILS(&f, EVERY_ENTRY, XENT_ERR_STRIDE, "logits", "-1");
    f.problem.logits = (xent_input){f.logits, XENT_F32, {2 * CLASSES, INT64_MAX / 3, 1}};
    FAILS(&f, EVERY_ENTRY, XENT_ERR_STRIDE, "logits");
    f.problem.logits = (xent_input){f.logits, XENT_F32, {0, 0, 1}}; /* an input may repeat */
    WORKS(&f, EVERY_ENTRY);
    f.results.row_losses.strides[2] = 1; /* the rows' stride is 0 */
    FAILS(&f, WITH_RESULTS, XENT_ERR_STRIDE, "row_losses");
    fixture_init(&f);
    f.problem.inner = SIZE_MAX / 2;
    FAILS(&f, EVERY_ENTRY, XENT_ERR_SHAPE, "inner");
    fixture_init(&f);
    f.problem.rows = f.problem.inner = (size_t)1 << 32; /* 2^64 */
    FAILS(&f, EVERY_ENTRY, XENT_ERR_SHAPE, "inner");
    /* no positions, no rows */
    fixture_init(&f);
    f.problem.inner = 0;
    f.problem.logits.data = f.problem.targets.data = NULL;
    f.results.lse = NULL;
    f.lse_arg = NULL;
    WORKS(&f, EVERY_ENTRY);
    CHECK_NEAR(f.loss[0], NAN, 0);
    CHECK_U64(f.kept_rows[0], 0);
    fixture_init(&f);
    f.problem.inner = f.problem.classes = 0;
    WORKS(&f, EVERY_ENTRY);
}

int main(void) {
    ranks();
    for (int d = 0; d < 4; d++) {
        permuted(3, 4, 5, every_float[d]);
        permuted(2, 67, 3, every_float[d]);
        permuted(2, 3, 70, every_float[d]);
        same_bits(every_float[d]);
    }
    transposed(1, 1);
    transposed(7, 3);
    transposed(65, 40);
    transposed(300, 70);
    transposed(3, 5000);
    strided_row_operands();
    refusals();
    return report();
}
