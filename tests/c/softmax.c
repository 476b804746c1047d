/* Softmax and log-softmax, and the gradients through them: every dtype, shape and layout against plain
 * loops; in place; edges; bits. */
#include "reference.h"

static uint64_t state = 19;

struct function {
    const char *name;
    int log_of;
    xent_status (*forward)(const xent_shape *, const xent_input *, const xent_output *);
    xent_status (*backward)(const xent_shape *, const xent_input *, const xent_input *, const xent_output *);
};
static const struct function functions[2] = {
    {"softmax", 0, xent_softmax, xent_softmax_backward},
    {"log_softmax", 1, xent_log_softmax, xent_log_softmax_backward},
};

static xent_shape shape_of(size_t rows, size_t classes, size_t inner) {
    xent_shape shape = XENT_SHAPE_INIT;
    shape.rows = rows;
    shape.classes = classes;
    shape.inner = inner;
    return shape;
}

/* ---- values --------------------------------------------------------------------------- */

/* All four functions on one shape, packed: with outputs of their own, then in place. */
static void against_reference(size_t rows, size_t classes, size_t inner, xent_dtype dtype) {
    size_t count = rows * classes * inner, size = count * size_of(dtype);
    void *x = checked(malloc(size)), *y = poisoned(size), *grad_y = checked(malloc(size)), *grad_x = poisoned(size);
    double *values = numbers(count), *expected = numbers(count), *terms = numbers(count), *from = numbers(count);
    double *grads = numbers(count);
    double unit = dtype == XENT_F64 ? F64_TOLERANCE : GRAD_TOLERANCE;
    for (size_t i = 0; i < count; i++) {
        values[i] = set(x, dtype, (int64_t)i, 8 * uniform(&state) - 4);
        grads[i] = set(grad_y, dtype, (int64_t)i, 2 * uniform(&state) - 1);
    }
    void *kept_x = copy_of(x, size), *kept_grad = copy_of(grad_y, size);
    xent_shape shape = shape_of(rows, classes, inner);
    for (int f = 0; f < 2; f++) {
        int log_of = functions[f].log_of, before = failures;
        xent_input from_x = in(x, dtype), from_y = in(y, dtype), from_grad = in(grad_y, dtype);
        xent_output to_y = out(y, dtype), to_x = out(x, dtype);
        xent_output to_grad = out(grad_x, dtype), over_grad = out(grad_y, dtype);
        CHECK_OK(functions[f].forward(&shape, &from_x, &to_y));
        for (size_t i = 0; i < rows; i++)
            for (size_t k = 0; k < inner; k++) {
                size_t at = i * classes * inner + k;
                softmax_reference(values + at, NULL, expected + at, classes, inner, log_of, 0);
            }
        /* log-softmax is a difference of numbers up to 4 + lse */
        for (size_t i = 0; i < count; i++) terms[i] = log_of ? 0.1 * (4 + fabs(expected[i])) : expected[i];
        check_values(__FILE__, __LINE__, functions[f].name, y, dtype, expected, terms, unit, count);
        CHECK_BYTES(x, kept_x, size);
        CHECK_OK(functions[f].forward(&shape, &from_x, &to_x));
        CHECK_BYTES(x, y, size);

        /* the gradient is that of the y which was stored */
        for (size_t i = 0; i < count; i++) from[i] = get(y, dtype, (int64_t)i);
        for (size_t i = 0; i < rows; i++)
            for (size_t k = 0; k < inner; k++) {
                size_t at = i * classes * inner + k;
                softmax_reference(from + at, grads + at, expected + at, classes, inner, log_of, 1);
                double sum = 0;
                for (size_t c = 0; c < classes; c++)
                    sum += fabs((log_of ? 1 : from[at + c * inner]) * grads[at + c * inner]);
                for (size_t c = 0; c < classes; c++) {
                    size_t e = at + c * inner;
                    double p = log_of ? exp(from[e]) : from[e];
                    terms[e] = (log_of ? fabs(grads[e]) : fabs(p * grads[e])) + p * sum;
                }
            }
        CHECK_OK(functions[f].backward(&shape, &from_y, &from_grad, &to_grad));
        check_values(__FILE__, __LINE__, "grad_x", grad_x, dtype, expected, terms, unit, count);
        CHECK_BYTES(grad_y, kept_grad, size);
        CHECK_OK(functions[f].backward(&shape, &from_y, &from_grad, &over_grad));
        CHECK_BYTES(grad_y, grad_x, size);
        memcpy(grad_y, kept_grad, size);
        CHECK_OK(functions[f].backward(&shape, &from_y, &from_grad, &to_y)); /* over y */
        CHECK_BYTES(y, grad_x, size);
        memcpy(x, kept_x, size);
        if (failures != before)
            fprintf(stderr, "... %s of [%zu, %zu, %zu], dtype %u\n", functions[f].name, rows, classes, inner, dtype);
    }
    free(x);
    free(y);
    free(grad_y);
    free(grad_x);
    free(values);
    free(expected);
    free(terms);
    free(from);
    free(grads);
    free(kept_x);
    free(kept_grad);
}

static void shapes(void) {
    static const struct { size_t rows, classes, inner; } all[] = {
        {1, 1, 1},   {3, 2, 1},    {5, 7, 1},    {4, 16, 1},   {4, 31, 1},    {4, 63, 1},  {4, 64, 1},  {4, 65, 1},
        {3, 257, 1}, {2, 1000, 1}, {2, 2049, 1}, {2, 4097, 1}, {300, 700, 1}, {1, 70001, 1}, {20000, 5, 1},
        {3, 5, 2},   {2, 3, 20},   {2, 4, 42},   {4, 21, 63},  {4, 21, 65},   {2, 300, 17}, {2, 2049, 9}, {1, 600, 400},
    };
    for (size_t k = 0; k < sizeof all / sizeof *all; k++)
        for (int d = 0; d < 4; d++) {
            size_t rows = all[k].rows, classes = all[k].classes, inner = all[k].inner;
            if (sampled() && ((size_t)d != k % 4 || rows * classes * inner > 100000)) continue;
            against_reference(rows, classes, inner, every_float[d]);
        }
}

/* A row of the table in f64, by hand. */
static void known(void) {
    const double x[4] = {0.1, 0.2, 0.3, 0.4}, softmax[4] = {0.21383822, 0.23632778, 0.26118259, 0.28865141};
    const double grad_y[4] = {1, 0, 0, 0};
    double y[4], log_y[4], grad_x[4];
    xent_shape shape = shape_of(1, 4, 1);
    xent_input from = in(x, XENT_F64), from_y = in(y, XENT_F64), from_log = in(log_y, XENT_F64);
    xent_input g = in(grad_y, XENT_F64);
    xent_output to = out(y, XENT_F64), to_log = out(log_y, XENT_F64), to_x = out(grad_x, XENT_F64);
    CHECK_OK(xent_softmax(&shape, &from, &to));
    CHECK_OK(xent_log_softmax(&shape, &from, &to_log));
    double sum = 0;
    for (int c = 0; c < 4; c++) {
        CHECK_NEAR(y[c], softmax[c], 5e-9);
        CHECK_NEAR(log_y[c], log(y[c]), 1e-14);
        sum += y[c];
    }
    CHECK_NEAR(sum, 1, 1e-14);
    CHECK_NEAR(log_y[0], -1.5425, 5e-5);
    CHECK_OK(xent_softmax_backward(&shape, &from_y, &g, &to_x));
    for (int c = 0; c < 4; c++) CHECK_NEAR(grad_x[c], y[0] * ((c == 0) - y[c]), 1e-14);
    CHECK_OK(xent_log_softmax_backward(&shape, &from_log, &g, &to_x));
    for (int c = 0; c < 4; c++) CHECK_NEAR(grad_x[c], (c == 0) - y[c], 1e-14);
}

/* ---- layouts -------------------------------------------------------------------------- */

/* Every order of the axes, with gaps that are neither read nor written; each operand its own. */
static void layouts(xent_dtype dtype) {
    enum { rows = 3, classes = 37, inner = 5, count = rows * classes * inner, room = 2 * 6 * 40 * 8 };
    static const int orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    const size_t sizes[3] = {rows, classes, inner};
    size_t unit = size_of(dtype);
    xent_shape shape = shape_of(rows, classes, inner);
    double packed_x[count], packed_grad[count], expected[count], terms[count];
    for (int i = 0; i < count; i++) {
        double number = 8 * uniform(&state) - 4, grad = 2 * uniform(&state) - 1;
        unsigned char cell[sizeof(double)];
        packed_x[i] = set(cell, dtype, 0, number);
        packed_grad[i] = set(cell, dtype, 0, grad);
    }
    for (int k = 0; k < 6; k++)
        for (int f = 0; f < 2; f++) {
            int64_t strides[3][3]; /* of x, grad_y, output */
            for (int operand = 0; operand < 3; operand++) {
                int64_t step = 1 + operand % 2;
                for (int at = 2; at >= 0; at--) {
                    int axis = orders[(k + operand) % 6][at];
                    strides[operand][axis] = step;
                    step *= (int64_t)sizes[axis] + 1;
                }
                CHECK(step <= room);
            }
            void *x = poisoned(room * unit), *grad = poisoned(room * unit), *to = poisoned(room * unit);
            double *y = numbers(count);
            for (size_t i = 0; i < rows; i++)
                for (size_t p = 0; p < inner; p++) {
                    size_t at = i * classes * inner + p;
                    softmax_reference(packed_x + at, NULL, y + at, classes, inner, functions[f].log_of, 0);
                }
            for (size_t i = 0; i < rows; i++)
                for (size_t c = 0; c < classes; c++)
                    for (size_t p = 0; p < inner; p++) {
                        size_t at = (i * classes + c) * inner + p;
                        set(x, dtype, place(strides[0], sizes, i, c, p), packed_x[at]);
                        set(grad, dtype, place(strides[1], sizes, i, c, p), packed_grad[at]);
                    }
            xent_input from = {x, dtype, {strides[0][0], strides[0][1], strides[0][2]}};
            xent_input from_grad = {grad, dtype, {strides[1][0], strides[1][1], strides[1][2]}};
            xent_output result = {to, dtype, {strides[2][0], strides[2][1], strides[2][2]}};
            for (int backward = 0; backward < 2; backward++) {
                if (backward) { /* x becomes the y of the forward, as stored */
                    for (size_t i = 0; i < rows; i++)
                        for (size_t c = 0; c < classes; c++)
                            for (size_t p = 0; p < inner; p++) {
                                size_t at = (i * classes + c) * inner + p;
                                y[at] = set(x, dtype, place(strides[0], sizes, i, c, p), y[at]);
                            }
                    for (size_t i = 0; i < rows; i++)
                        for (size_t p = 0; p < inner; p++) {
                            size_t at = i * classes * inner + p;
                            softmax_reference(y + at, packed_grad + at, expected + at, classes, inner,
                                              functions[f].log_of, 1);
                        }
                    CHECK_OK(functions[f].backward(&shape, &from, &from_grad, &result));
                } else {
                    memcpy(expected, y, sizeof expected);
                    CHECK_OK(functions[f].forward(&shape, &from, &result));
                }
                void *poison = poisoned(room * unit), *values = checked(malloc(count * unit));
                for (int i = 0; i < count; i++) terms[i] = 1 + fabs(expected[i]);
                for (size_t i = 0; i < rows; i++)
                    for (size_t c = 0; c < classes; c++)
                        for (size_t p = 0; p < inner; p++) {
                            int64_t at = place(strides[2], sizes, i, c, p);
                            set(values, dtype, (int64_t)((i * classes + c) * inner + p), get(to, dtype, at));
                            memcpy((char *)to + (size_t)at * unit, (char *)poison + (size_t)at * unit, unit);
                        }
                check_values(__FILE__, __LINE__, functions[f].name, values, dtype, expected, terms,
                             dtype == XENT_F64 ? F64_TOLERANCE : 1e-6, count);
                CHECK_BYTES(to, poison, room * unit);
                free(poison);
                free(values);
            }
            free(x);
            free(grad);
            free(to);
            free(y);
        }
}

/* An input may repeat elements; in place with strides, the gaps stay as they are. */
static void strides(void) {
    enum { rows = 4, classes = 6, wide = 9 };
    float row[classes], y[rows * classes], padded[rows * wide], before[rows * wide];
    fill(row, classes, -2, 2, &state);
    xent_shape shape = shape_of(rows, classes, 1);
    xent_input from = {row, XENT_F32, {0, 1, 0}};
    xent_output to = out(y, XENT_F32);
    CHECK_OK(xent_softmax(&shape, &from, &to));
    for (int i = 1; i < rows; i++) CHECK_BYTES(y + i * classes, y, classes * sizeof(float));

    for (int i = 0; i < rows * wide; i++) padded[i] = i % wide < classes ? row[i % wide] : NAN;
    memcpy(before, padded, sizeof before);
    from = in_rows(padded, XENT_F32, wide);
    to = out_rows(padded, XENT_F32, wide);
    CHECK_OK(xent_softmax(&shape, &from, &to));
    for (int i = 0; i < rows; i++) {
        CHECK_BYTES(padded + i * wide, y, classes * sizeof(float));
        CHECK_BYTES(padded + i * wide + classes, before + i * wide + classes, (wide - classes) * sizeof(float));
    }
    /* the stride of an axis of size 1 is ignored */
    shape.rows = 1;
    from = (xent_input){row, XENT_F32, {-5, 1, INT64_MIN}};
    to = (xent_output){padded, XENT_F32, {INT64_MAX, 1, -1}};
    CHECK_OK(xent_softmax(&shape, &from, &to));
    CHECK_BYTES(padded, y, classes * sizeof(float));
    /* column blocks of one matrix */
    float matrix[rows * 2 * classes];
    for (int i = 0; i < rows; i++) memcpy(matrix + i * 2 * classes, row, sizeof row);
    shape.rows = rows;
    from = in_rows(matrix, XENT_F32, 2 * classes);
    to = out_rows(matrix + classes, XENT_F32, 2 * classes);
    CHECK_OK(xent_softmax(&shape, &from, &to));
    for (int i = 0; i < rows; i++) {
        CHECK_BYTES(matrix + i * 2 * classes, row, sizeof row);
        CHECK_BYTES(matrix + i * 2 * classes + classes, y, sizeof row);
    }
}

/* ---- edges ---------------------------------------------------------------------------- */

static void edges(void) {
    enum { rows = 6, classes = 70 };
    for (int d = 0; d < 4; d++) {
        xent_dtype dtype = every_float[d];
        unsigned char x[rows * classes * sizeof(double)], y[sizeof x];
        const double special[3] = {NAN, INFINITY, -INFINITY};
        for (int f = 0; f < 2; f++) {
            for (int i = 0; i < rows; i++)
                for (int c = 0; c < classes; c++) {
                    int at = i * classes + c;
                    /* 0: a NaN; 1: +inf; 2: all -inf; 3: a few -inf; 4: all but one; 5: plain */
                    int none = i == 2 || (i == 3 && c % 9 == 0) || (i == 4 && c != 68);
                    int what = i == 0 && c == 33 ? 0 : i == 1 && c == 2 ? 1 : none ? 2 : 3;
                    set(x, dtype, at, what == 3 ? c % 5 : special[what]);
                }
            xent_shape shape = shape_of(rows, classes, 1);
            xent_input from = in(x, dtype);
            xent_output to = out(y, dtype);
            CHECK_OK(functions[f].forward(&shape, &from, &to));
            for (int i = 0; i < rows; i++)
                for (int c = 0; c < classes; c++) {
                    double value = get(y, dtype, i * classes + c), none = f ? -INFINITY : 0, all = f ? 0 : 1;
                    if (i < 3) CHECK_NEAR(value, NAN, 0);
                    else if (i == 3 && c % 9 == 0) CHECK_NEAR(value, none, 0);
                    else if (i == 4) CHECK_NEAR(value, c == 68 ? all : none, c == 68 ? 1e-7 : 0);
                    else CHECK(isfinite(value));
                }
        }
    }
    /* logits far from 0, and a row of equal logits, keep their accuracy */
    float even[1000], y[1000];
    for (int k = 0; k < 3; k++) {
        static const float offsets[3] = {0, 1e4f, -1e30f};
        for (int c = 0; c < 1000; c++) even[c] = offsets[k];
        xent_shape shape = shape_of(1, 1000, 1);
        xent_input from = in(even, XENT_F32);
        xent_output to = out(y, XENT_F32);
        CHECK_OK(xent_softmax(&shape, &from, &to));
        for (int c = 0; c < 1000; c++) CHECK_NEAR(y[c], 1e-3, 1e-9);
        CHECK_OK(xent_log_softmax(&shape, &from, &to));
        for (int c = 0; c < 1000; c++) CHECK_NEAR(y[c], -log(1000), 2e-6);
    }
    /* one class: 1, and ln 1 = 0 */
    const float one[3] = {-7, 0, 1e30f};
    xent_shape shape = shape_of(3, 1, 1);
    xent_input from = in(one, XENT_F32);
    xent_output to = out(y, XENT_F32);
    CHECK_OK(xent_softmax(&shape, &from, &to));
    for (int i = 0; i < 3; i++) CHECK_NEAR(y[i], 1, 1e-7);
    CHECK_OK(xent_log_softmax(&shape, &from, &to));
    for (int i = 0; i < 3; i++) CHECK_NEAR(y[i], 0, 1e-7);
    /* a NaN in one row's gradient stays in that row */
    const float p[4] = {0.5f, 0.5f, 0.5f, 0.5f}, grad_y[4] = {NAN, 1, 1, 0};
    float grad_x[4];
    shape = shape_of(2, 2, 1);
    xent_input from_y = in(p, XENT_F32), from_grad = in(grad_y, XENT_F32);
    to = out(grad_x, XENT_F32);
    CHECK_OK(xent_softmax_backward(&shape, &from_y, &from_grad, &to));
    CHECK_NEAR(grad_x[0], NAN, 0);
    CHECK_NEAR(grad_x[1], NAN, 0);
    CHECK_NEAR(grad_x[2], 0.25, 1e-7);
    CHECK_NEAR(grad_x[3], -0.25, 1e-7);
}

/* ---- bits ----------------------------------------------------------------------------- */

/* The bits of a row depend on the row alone, not on other rows, threads or the pool. */
static void same_bits(xent_dtype dtype) {
    static const struct { size_t rows, classes, inner; } all[] = {
        {7, 10, 1}, {300, 5000, 1}, {20000, 10, 1}, {3, 200003, 1}, {8, 21, 4000},
    };
    xent_pool *pool = xent_pool_new(3);
    CHECK(pool != NULL);
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) {
        size_t rows = all[k].rows, classes = all[k].classes, inner = all[k].inner, count = rows * classes * inner;
        size_t size = count * size_of(dtype), stride = classes * inner * size_of(dtype);
        char *x = checked(malloc(size)), *grad = checked(malloc(size)), *first = NULL, *first_grad = NULL;
        for (size_t i = 0; i < count; i++) {
            set(x, dtype, (int64_t)i, 8 * uniform(&state) - 4);
            set(grad, dtype, (int64_t)i, 2 * uniform(&state) - 1);
        }
        for (int f = 0; f < 2; f++) {
            for (int how = 0; how < 5; how++) {
                if (sampled() && (k == 1 || how % 4)) continue;
                static const uint32_t counts[5] = {1, 2, 3, 0, 0};
                xent_shape shape = shape_of(rows, classes, inner);
                shape.threads = counts[how];
                shape.pool = how == 4 ? pool : NULL;
                char *y = poisoned(size), *grad_x = poisoned(size);
                xent_input from = in(x, dtype), from_y = in(y, dtype), from_grad = in(grad, dtype);
                xent_output to = out(y, dtype), to_x = out(grad_x, dtype);
                CHECK_OK(functions[f].forward(&shape, &from, &to));
                CHECK_OK(functions[f].backward(&shape, &from_y, &from_grad, &to_x));
                if (how == 0) {
                    first = copy_of(y, size);
                    first_grad = copy_of(grad_x, size);
                    /* the second row alone */
                    shape.rows = 1;
                    from.data = x + stride;
                    from_y.data = first + stride;
                    from_grad.data = grad + stride;
                    CHECK_OK(functions[f].forward(&shape, &from, &to));
                    CHECK_BYTES(y, first + stride, stride);
                    CHECK_OK(functions[f].backward(&shape, &from_y, &from_grad, &to_x));
                    CHECK_BYTES(grad_x, first_grad + stride, stride);
                } else {
                    CHECK_BYTES(y, first, size);
                    CHECK_BYTES(grad_x, first_grad, size);
                }
                free(y);
                free(grad_x);
            }
            free(first);
            free(first_grad);
        }
        free(x);
        free(grad);
    }
    xent_pool_free(pool);
}

int main(void) {
    known();
    shapes();
    for (int d = 0; d < 4; d++) layouts(every_float[d]);
    strides();
    edges();
    same_bits(XENT_BF16);
    if (!sampled()) {
        same_bits(XENT_F32);
        same_bits(XENT_F64);
    }
    return report();
}
