/* Calls of softmax and log-softmax that are refused: the order of the checks, the names in the messages;
 * a refused call writes nothing. */
#include "check.h"

enum function { LOG_SOFTMAX = 1, SOFTMAX = 2, LOG_SOFTMAX_BACKWARD = 4, SOFTMAX_BACKWARD = 8, BACKWARDS = 12,
                EVERY_FUNCTION = 15 };

/* A call that works, and all the memory that it points to. `from` is x, or y of a backward. */
struct call {
    xent_shape shape;
    xent_input from, grad_y;
    xent_output to;
    const xent_shape *shape_arg;
    const xent_input *from_arg, *grad_y_arg;
    const xent_output *to_arg;
    float values[ROWS * CLASSES + 1], grad[ROWS * CLASSES + 1], result[ROWS * CLASSES + 1];
};

static void call_init(struct call *c) {
    static const xent_shape shape = XENT_SHAPE_INIT;
    uint64_t state = 1;
    memset(c, POISON, sizeof *c);
    c->shape = shape;
    c->shape.rows = ROWS;
    c->shape.classes = CLASSES;
    fill(c->values, ROWS * CLASSES + 1, 0, 0.5, &state);
    fill(c->grad, ROWS * CLASSES + 1, -1, 1, &state);
    c->from = in(c->values, XENT_F32);
    c->grad_y = in(c->grad, XENT_F32);
    c->to = out(c->result, XENT_F32);
    c->shape_arg = &c->shape;
    c->from_arg = &c->from;
    c->grad_y_arg = &c->grad_y;
    c->to_arg = &c->to;
}

static xent_status run(const struct call *c, enum function function) {
    switch (function) {
    case LOG_SOFTMAX: return xent_log_softmax(c->shape_arg, c->from_arg, c->to_arg);
    case SOFTMAX: return xent_softmax(c->shape_arg, c->from_arg, c->to_arg);
    case LOG_SOFTMAX_BACKWARD: return xent_log_softmax_backward(c->shape_arg, c->from_arg, c->grad_y_arg, c->to_arg);
    default: return xent_softmax_backward(c->shape_arg, c->from_arg, c->grad_y_arg, c->to_arg);
    }
}

static int is_in_a_name(char c) { return c == '_' || (c >= 'a' && c <= 'z'); }

/* Matches whole words: "y is NULL" does not name grad_y, and the reverse. */
static int names(const char *text, const char *name) {
    for (const char *at = text; (at = strstr(at, name)) != NULL; at++)
        if ((at == text || !is_in_a_name(at[-1])) && !is_in_a_name(at[strlen(name)])) return 1;
    return 0;
}

/* FROM and TO stand for what the operand is called: x and y of a forward, y and grad_x of a backward. */
#define FROM "<"
#define TO ">"

static void expect(int line, const struct call *c, unsigned chosen, xent_status expected, const char *word) {
    for (unsigned bit = LOG_SOFTMAX; bit <= SOFTMAX_BACKWARD; bit <<= 1) {
        if (!(chosen & bit)) continue;
        const char *name = word;
        if (strcmp(word, FROM) == 0) name = bit & BACKWARDS ? "y" : "x";
        if (strcmp(word, TO) == 0) name = bit & BACKWARDS ? "grad_x" : "y";
        struct call *before = copy_of(c, sizeof *c);
        check_status(__FILE__, line, run(c, (enum function)bit), expected);
        if (expected != XENT_OK) {
            if (!names(xent_last_error(), name)) check_text(__FILE__, line, xent_last_error(), name);
            check_bytes(__FILE__, line, c, before, sizeof *c, "a call that failed");
        }
        free(before);
    }
}

/* FAILURE(EVERY_FUNCTION, XENT_ERR_NULL, FROM, c.from_arg = NULL); */
#define FAILURE(chosen, status, word, ...) \
    call_init(&c);                         \
    __VA_ARGS__;                           \
    expect(__LINE__, &c, (chosen), (status), (word))
#define SUCCESS(chosen, ...) FAILURE(chosen, XENT_OK, "", __VA_ARGS__)

static struct call c;

static void structs(void) {
    FAILURE(EVERY_FUNCTION, XENT_ERR_NULL, "shape", c.shape_arg = NULL);
    static const uint32_t first = (uint32_t)(offsetof(xent_shape, pool) + sizeof(void *));
    const uint32_t too_short[] = {0, 1, 4, first / 2, first - 1};
    for (int k = 0; k < 5; k++) {
        FAILURE(EVERY_FUNCTION, XENT_ERR_STRUCT, "struct_size", c.shape.struct_size = too_short[k]);
        CHECK_MENTIONS(xent_last_error(), "XENT_SHAPE_INIT");
    }
    SUCCESS(EVERY_FUNCTION, c.shape.struct_size = first);
    for (int bit = 0; bit < 32; bit++) {
        FAILURE(EVERY_FUNCTION, XENT_ERR_STRUCT, "flags", c.shape.flags = (uint32_t)1 << bit);
    }
    /* a program newer than the library */
    struct {
        xent_shape now;
        unsigned char tail[24];
    } later;
    memset(&later, 0, sizeof later);
    call_init(&c);
    later.now = c.shape;
    later.now.struct_size = (uint32_t)sizeof later;
    c.shape_arg = &later.now;
    expect(__LINE__, &c, EVERY_FUNCTION, XENT_OK, "");
    for (size_t at = 0; at < sizeof later.tail; at++) {
        later.tail[at] = 1;
        expect(__LINE__, &c, EVERY_FUNCTION, XENT_ERR_STRUCT, "shape");
        later.tail[at] = 0;
    }
}

static void null(void) {
    FAILURE(EVERY_FUNCTION, XENT_ERR_NULL, FROM, c.from_arg = NULL);
    FAILURE(EVERY_FUNCTION, XENT_ERR_NULL, FROM, c.from.data = NULL);
    FAILURE(EVERY_FUNCTION, XENT_ERR_NULL, TO, c.to_arg = NULL);
    FAILURE(EVERY_FUNCTION, XENT_ERR_NULL, TO, c.to.data = NULL);
    FAILURE(BACKWARDS, XENT_ERR_NULL, "grad_y", c.grad_y_arg = NULL);
    FAILURE(BACKWARDS, XENT_ERR_NULL, "grad_y", c.grad_y.data = NULL);
    /* no elements: no data */
    SUCCESS(EVERY_FUNCTION, c.shape.rows = 0; c.from.data = c.grad_y.data = NULL; c.to.data = NULL);
    SUCCESS(EVERY_FUNCTION, c.shape.inner = 0; c.from.data = c.grad_y.data = NULL; c.to.data = NULL);
    SUCCESS(EVERY_FUNCTION, c.shape.rows = c.shape.classes = 0);
}

static void dtypes(void) {
    static const xent_dtype not_float[] = {XENT_I64, XENT_I32, XENT_U8, XENT_U16, XENT_U32, 4, 15, 21, UINT32_MAX};
    for (size_t k = 0; k < sizeof not_float / sizeof *not_float; k++) {
        FAILURE(EVERY_FUNCTION, XENT_ERR_DTYPE, FROM, c.from.dtype = not_float[k]);
        FAILURE(EVERY_FUNCTION, XENT_ERR_DTYPE, TO, c.to.dtype = not_float[k]);
        FAILURE(BACKWARDS, XENT_ERR_DTYPE, "grad_y", c.grad_y.dtype = not_float[k]);
        FAILURE(EVERY_FUNCTION, XENT_ERR_DTYPE, FROM, c.from.dtype = c.grad_y.dtype = c.to.dtype = not_float[k]);
    }
    /* all of one type */
    for (int a = 0; a < 4; a++)
        for (int b = 0; b < 4; b++) {
            xent_dtype one = every_float[a], other = every_float[b];
            size_t rows = 2; /* the memory is enough for doubles then */
            if (a == b) {
                SUCCESS(EVERY_FUNCTION, c.shape.rows = rows; c.from.dtype = c.grad_y.dtype = c.to.dtype = one;
                        c.from.data = c.values; c.to.data = c.result; if (one == XENT_F64) c.shape.rows = 0);
                continue;
            }
            FAILURE(EVERY_FUNCTION, XENT_ERR_DTYPE, TO, c.shape.rows = rows; c.from.dtype = c.grad_y.dtype = one;
                    c.to.dtype = other);
            FAILURE(BACKWARDS, XENT_ERR_DTYPE, "grad_y", c.shape.rows = rows; c.from.dtype = c.to.dtype = one;
                    c.grad_y.dtype = other);
        }
}

static void sizes(void) {
    FAILURE(EVERY_FUNCTION, XENT_ERR_SHAPE, "classes", c.shape.classes = 0);
    FAILURE(EVERY_FUNCTION, XENT_ERR_SHAPE, "rows", c.shape.rows = SIZE_MAX / 2);
    FAILURE(EVERY_FUNCTION, XENT_ERR_SHAPE, "inner", c.shape.inner = SIZE_MAX / 2);
    FAILURE(EVERY_FUNCTION, XENT_ERR_SHAPE, "rows", c.shape.rows = ((size_t)1 << 31) + 1;
            c.shape.classes = (size_t)1 << 33);
}

static void strides(void) {
    FAILURE(EVERY_FUNCTION, XENT_ERR_STRIDE, FROM, c.from.strides[0] = -5);
    FAILURE(EVERY_FUNCTION, XENT_ERR_STRIDE, FROM, c.from.strides[1] = INT64_MAX / 2);
    FAILURE(EVERY_FUNCTION, XENT_ERR_STRIDE, TO, c.to.strides[1] = -1);
    FAILURE(BACKWARDS, XENT_ERR_STRIDE, "grad_y", c.grad_y.strides[0] = INT64_MIN);
    FAILURE(EVERY_FUNCTION, XENT_ERR_STRIDE, TO, c.to = out_rows(c.result, XENT_F32, CLASSES - 1));
    FAILURE(EVERY_FUNCTION, XENT_ERR_STRIDE, TO, c.to = out_rows(c.result, XENT_F32, 0));
    SUCCESS(EVERY_FUNCTION, c.from = in_rows(c.values, XENT_F32, 0); c.grad_y = in_rows(c.grad, XENT_F32, 1));
}

static void alignment(void) {
    FAILURE(EVERY_FUNCTION, XENT_ERR_ALIGN, FROM, c.from.data = (const char *)c.values + 1);
    FAILURE(EVERY_FUNCTION, XENT_ERR_ALIGN, TO, c.to.data = (char *)c.result + 2);
    FAILURE(BACKWARDS, XENT_ERR_ALIGN, "grad_y", c.grad_y.data = (const char *)c.grad + 3);
}

static void overlap(void) {
    /* exactly in place, and inputs with each other */
    SUCCESS(EVERY_FUNCTION, c.to.data = c.values);
    SUCCESS(EVERY_FUNCTION, c.to = out_rows(c.values, XENT_F32, CLASSES));
    SUCCESS(BACKWARDS, c.to.data = c.grad);
    SUCCESS(BACKWARDS, c.grad_y.data = c.values);
    SUCCESS(BACKWARDS, c.grad_y.data = c.values; c.to.data = c.values);
    /* shifted, or with other strides */
    FAILURE(EVERY_FUNCTION, XENT_ERR_OVERLAP, FROM, c.to.data = c.values + 1);
    FAILURE(EVERY_FUNCTION, XENT_ERR_OVERLAP, TO, c.from.data = c.result + 1);
    FAILURE(EVERY_FUNCTION, XENT_ERR_OVERLAP, FROM, c.shape.rows = 2; c.to.data = c.values + CLASSES);
    FAILURE(EVERY_FUNCTION, XENT_ERR_OVERLAP, FROM, c.shape.rows = 3; c.to = out_rows(c.values, XENT_F32, CLASSES + 1));
    FAILURE(BACKWARDS, XENT_ERR_OVERLAP, "grad_y", c.to.data = c.grad + 1);
    /* exactly in place of one input, but overlapping the other */
    FAILURE(BACKWARDS, XENT_ERR_OVERLAP, "grad_y", c.shape.rows = 3; c.to.data = c.values;
            c.grad_y.data = c.values + 1);
    FAILURE(BACKWARDS, XENT_ERR_OVERLAP, FROM, c.shape.rows = 3; c.to.data = c.grad; c.from.data = c.grad + 1);
}

/* All faults at once, mended one after another. */
static void order(void) {
    for (unsigned bit = LOG_SOFTMAX; bit <= SOFTMAX_BACKWARD; bit <<= 1) {
        call_init(&c);
        c.shape.struct_size = 0;
        c.shape.flags = 1;
        c.from_arg = NULL;
        c.to.data = NULL;
        c.to.dtype = XENT_I32;
        c.shape.classes = 0;
        c.from.strides[0] = -1;
        expect(__LINE__, &c, bit, XENT_ERR_STRUCT, "struct_size");
        c.shape.struct_size = (uint32_t)sizeof c.shape;
        expect(__LINE__, &c, bit, XENT_ERR_STRUCT, "flags");
        c.shape.flags = 0;
        expect(__LINE__, &c, bit, XENT_ERR_NULL, FROM);
        c.from_arg = &c.from;
        expect(__LINE__, &c, bit, XENT_ERR_NULL, TO);
        c.to.data = (char *)c.values + 2; /* misaligned, and over the input */
        expect(__LINE__, &c, bit, XENT_ERR_DTYPE, TO);
        c.to.dtype = XENT_F64;
        expect(__LINE__, &c, bit, XENT_ERR_DTYPE, TO);
        c.to.dtype = XENT_F32;
        expect(__LINE__, &c, bit, XENT_ERR_SHAPE, "classes");
        c.shape.classes = CLASSES;
        expect(__LINE__, &c, bit, XENT_ERR_STRIDE, FROM);
        c.from.strides[0] = 0;
        expect(__LINE__, &c, bit, XENT_ERR_ALIGN, TO);
        c.to.data = c.values + 1;
        expect(__LINE__, &c, bit, XENT_ERR_OVERLAP, TO);
        c.to.data = c.result;
        expect(__LINE__, &c, bit, XENT_OK, "");
    }
}

int main(void) {
    structs();
    null();
    dtypes();
    sizes();
    strides();
    alignment();
    overlap();
    order();
    return report();
}
