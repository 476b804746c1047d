/* Linear layers whose logits are never stored: losses, results and gradients of the stored form for every dtype,
 * target and option; what a call refuses, and that it then writes nothing. */
#include "check.h"

enum { N = 37, C = 301, D = 45, STEP = 48 };

static uint64_t state = 21;

struct layer {
    xent_problem problem;
    xent_linear linear;
    void *hidden, *weight;
    float *logits; /* the stored form, in f32 or f64 as the lanes are */
    int64_t targets[N];
    float probabilities[N * C], bias[C], class_weights[C], row_weights[N];
    uint8_t mask[N];
};

static xent_dtype lanes(xent_dtype dtype) { return dtype == XENT_F64 ? XENT_F64 : XENT_F32; }

/* The operands of a dtype, and the logits that they make. */
static void make(struct layer *l, xent_dtype dtype) {
    xent_problem problem = XENT_PROBLEM_INIT;
    xent_linear linear = XENT_LINEAR_INIT;
    l->hidden = checked(calloc(N * STEP, size_of(dtype)));
    l->weight = checked(calloc(C * D, size_of(dtype)));
    l->logits = checked(calloc(N * C, sizeof(double)));
    for (int i = 0; i < N * STEP; i++) set(l->hidden, dtype, i, 2 * uniform(&state) - 1);
    for (int i = 0; i < C * D; i++) set(l->weight, dtype, i, uniform(&state) - 0.5);
    fill(l->bias, C, -1, 1, &state);
    fill(l->probabilities, N * C, 0, 2.0 / C, &state);
    fill(l->class_weights, C, 0.5, 1.5, &state);
    fill(l->row_weights, N, 0.5, 1.5, &state);
    for (int i = 0; i < N; i++) {
        l->targets[i] = i % 5 == 4 ? -100 : (int64_t)(random_u64(&state) % C);
        l->mask[i] = i % 7 != 3;
    }
    problem.rows = N, problem.classes = C;
    problem.targets = (xent_input){l->targets, XENT_I64, {0}};
    linear.features = D;
    linear.hidden = (xent_input){l->hidden, dtype, {STEP, 1}};
    linear.weight = (xent_input){l->weight, dtype, {0}};
    l->problem = problem, l->linear = linear;
}

static void make_logits(struct layer *l) {
    xent_dtype dtype = l->linear.hidden.dtype;
    for (int i = 0; i < N; i++)
        for (int c = 0; c < C; c++) {
            double x = l->linear.bias.data ? (double)l->bias[c] : 0;
            for (int j = 0; j < D; j++)
                x += get(l->hidden, dtype, i * STEP + j) * get(l->weight, dtype, c * D + j);
            set(l->logits, lanes(dtype), i * C + c, x);
        }
}

static void discard(struct layer *l) { free(l->hidden), free(l->weight), free(l->logits); }

/* A linear call against the same call over stored logits. */
static void check_layer(struct layer *l, double grad_scale) {
    xent_dtype dtype = l->linear.hidden.dtype, wide = lanes(dtype);
    const double near_enough = dtype == XENT_F64 ? 1e-12 : 2e-5;
    /* Products of bf16 round the gradient of the logits to bf16: by half an ulp of each term. */
    const double rounded = dtype == XENT_BF16 ? 1.01 / 256 : 0;
    make_logits(l);
    xent_problem stored = l->problem;
    stored.logits = (xent_input){l->logits, wide, {0}};
    static double logit_grad[N * C], lse[2][N], row_losses[2][N], entropy[2][N];
    double loss[2] = {0, 0}, normalizer[2];
    uint64_t kept[2];
    static float grad_hidden[2][N * D], grad_weight[2][C * D], grad_bias[2][C];
    xent_results r[2] = {XENT_RESULTS_INIT, XENT_RESULTS_INIT};
    for (int k = 0; k < 2; k++) {
        if (l->problem.reduction != XENT_NONE) r[k].loss = &loss[k];
        r[k].lse = lse[k], r[k].normalizer = &normalizer[k], r[k].kept_rows = &kept[k];
        r[k].row_losses = (xent_output){row_losses[k], XENT_F64, {0}};
        r[k].entropy = (xent_output){entropy[k], XENT_F64, {0}};
    }
    xent_output g = {logit_grad, wide, {0}};
    CHECK_OK(xent_forward_backward(&stored, NULL, grad_scale, &r[0], &g));

    xent_linear_grads grads = XENT_LINEAR_GRADS_INIT;
    const xent_dtype to = XENT_F32;
    for (int backward = 0; backward < 2; backward++) {
        grads.hidden = (xent_output){grad_hidden[backward], to, {0}};
        grads.weight = (xent_output){grad_weight[backward], to, {0}};
        grads.bias = (xent_output){grad_bias[backward], XENT_F32, {0}};
        memset(grad_hidden[backward], POISON, sizeof grad_hidden[backward]);
        memset(grad_weight[backward], POISON, sizeof grad_weight[backward]);
        if (!backward) {
            CHECK_OK(xent_linear_forward_backward(&l->problem, &l->linear, NULL, grad_scale, &r[1], &grads));
        } else {
            double before = loss[1];
            CHECK_OK(xent_linear_forward(&l->problem, &l->linear, &r[1]));
            CHECK_NEAR(loss[1], before, 0);
            CHECK_OK(xent_linear_backward(&l->problem, &l->linear, lse[1], NULL, grad_scale, &grads));
        }
        CHECK_NEAR(loss[1], loss[0], near_enough);
        CHECK_NEAR(normalizer[1], normalizer[0], 0);
        CHECK_U64(kept[1], kept[0]);
        for (int i = 0; i < N; i++) {
            CHECK_NEAR(lse[1][i], lse[0][i], near_enough);
            CHECK_NEAR(row_losses[1][i], row_losses[0][i], 2 * near_enough);
            CHECK_NEAR(entropy[1][i], entropy[0][i], 2 * near_enough);
            for (int j = 0; j < D; j++) {
                double sum = 0, size = 0;
                for (int c = 0; c < C; c++) {
                    double term = get(logit_grad, wide, i * C + c) * get(l->weight, dtype, c * D + j);
                    sum += term, size += fabs(term);
                }
                CHECK_NEAR(grad_hidden[backward][i * D + j], sum, 2e-5 + rounded * size);
            }
        }
        for (int c = 0; c < C; c++) {
            double sum = 0;
            for (int i = 0; i < N; i++) sum += get(logit_grad, wide, i * C + c);
            CHECK_NEAR(grad_bias[backward][c], sum, 2e-5);
            for (int j = 0; j < D; j++) {
                double size = sum = 0;
                for (int i = 0; i < N; i++) {
                    double term = get(logit_grad, wide, i * C + c) * get(l->hidden, dtype, i * STEP + j);
                    sum += term, size += fabs(term);
                }
                CHECK_NEAR(grad_weight[backward][c * D + j], sum, 2e-5 + rounded * size);
            }
        }
    }
}

static void options(void) {
    for (int d = 0; d < 4; d++) {
        static struct layer l;
        make(&l, every_float[d]);
        check_layer(&l, 1);
        l.linear.bias = (xent_input){l.bias, XENT_F32, {0}};
        l.problem.class_weights = (xent_input){l.class_weights, XENT_F32, {0}};
        l.problem.row_weights = (xent_input){l.row_weights, XENT_F32, {0}};
        l.problem.row_mask = (xent_input){l.mask, XENT_U8, {0}};
        check_layer(&l, 3);
        l.problem.label_smoothing = 0.1, l.problem.z_loss = 0.01;
        l.problem.softcap = 2, l.problem.logit_scale = 1.5;
        l.problem.reduction = XENT_SUM;
        check_layer(&l, 0.1);
        l.problem.targets = (xent_input){l.probabilities, XENT_F32, {0}};
        l.problem.reduction = XENT_MEAN;
        check_layer(&l, 1);
        l.problem.label_smoothing = l.problem.softcap = 0;
        check_layer(&l, 1);
        discard(&l);
    }
}

/* A gradient that is added to itself doubles. */
static void accumulates(void) {
    static struct layer l;
    make(&l, XENT_F32);
    static float once[C * D], twice[C * D];
    xent_linear_grads grads = XENT_LINEAR_GRADS_INIT;
    grads.weight = (xent_output){once, XENT_F32, {0}};
    CHECK_OK(xent_linear_forward_backward(&l.problem, &l.linear, NULL, 1.0, NULL, &grads));
    memcpy(twice, once, sizeof once);
    l.linear.flags = XENT_LINEAR_ACCUMULATE_WEIGHT;
    grads.weight.data = twice;
    CHECK_OK(xent_linear_forward_backward(&l.problem, &l.linear, NULL, 1.0, NULL, &grads));
    for (int i = 0; i < C * D; i++) CHECK_NEAR(twice[i], 2 * once[i], 1e-6);
    discard(&l);
}

/* The classes in three shards give the loss and the gradients of the whole. */
static void shards(void) {
    static const size_t cuts[4] = {0, 100, 101, C};
    static const xent_partial none = XENT_PARTIAL_INIT;
    static struct layer l;
    static float whole[N * D], part[N * D], weight[2][C * D];
    static double sum[N * D];
    xent_partial merged[N], partials[N];
    double loss[2] = {0, 0};
    xent_results results = XENT_RESULTS_INIT;
    xent_linear_grads grads = XENT_LINEAR_GRADS_INIT;
    make(&l, XENT_F32);
    l.problem.label_smoothing = 0.1;
    results.loss = &loss[0];
    grads.hidden = (xent_output){whole, XENT_F32, {0}};
    grads.weight = (xent_output){weight[0], XENT_F32, {0}};
    CHECK_OK(xent_linear_forward_backward(&l.problem, &l.linear, NULL, 1.0, &results, &grads));
    for (int i = 0; i < N; i++) merged[i] = none;
    for (int i = 0; i < N * D; i++) sum[i] = 0;
    for (int backward = 0; backward < 2; backward++)
        for (int k = 0; k < 3; k++) {
            xent_problem problem = l.problem;
            xent_linear linear = l.linear;
            problem.classes = cuts[k + 1] - cuts[k];
            linear.weight.data = (const float *)l.weight + cuts[k] * D;
            if (!backward) {
                CHECK_OK(xent_linear_partial_forward(&problem, &linear, cuts[k], C, partials));
                xent_partial_merge(merged, partials, N);
                continue;
            }
            grads.hidden.data = part;
            grads.weight.data = weight[1] + cuts[k] * D;
            CHECK_OK(xent_linear_partial_backward(&problem, &linear, cuts[k], C, merged, NULL, 1.0, &grads));
            for (int i = 0; i < N * D; i++) sum[i] += (double)part[i];
        }
    results.loss = &loss[1];
    CHECK_OK(xent_partial_finish(&l.problem, C, merged, &results));
    CHECK_NEAR(loss[1], loss[0], 1e-6);
    for (int i = 0; i < N * D; i++) CHECK_NEAR(sum[i], (double)whole[i], 1e-6);
    for (int i = 0; i < C * D; i++) CHECK_NEAR((double)weight[1][i], (double)weight[0][i], 1e-6);
    xent_problem beyond = l.problem;
    CHECK_STATUS(xent_linear_partial_forward(&beyond, &l.linear, 1, C, partials), XENT_ERR_SHAPE);
    CHECK_MENTIONS(xent_last_error(), "exceeds total_classes");
    CHECK_STATUS(xent_linear_partial_forward(&beyond, &l.linear, 0, C, NULL), XENT_ERR_NULL);
    beyond.classes = 0;
    CHECK_OK(xent_linear_partial_forward(&beyond, &l.linear, 5, C, partials));
    CHECK_BYTES(&partials[N - 1], &none, sizeof none);
    discard(&l);
}

static void refused(void) {
    static struct layer l;
    make(&l, XENT_F32);
    static float hidden[N * D], weight[C * D];
    memset(hidden, POISON, sizeof hidden), memset(weight, POISON, sizeof weight);
    double loss = -7;
    float *before = copy_of(hidden, sizeof hidden);
    xent_results results = XENT_RESULTS_INIT;
    xent_linear_grads grads = XENT_LINEAR_GRADS_INIT;
    results.loss = &loss;
    grads.hidden = (xent_output){hidden, XENT_F32, {0}};
    grads.weight = (xent_output){weight, XENT_F32, {0}};
#define REFUSED(status, word, change)                                                                       \
    do {                                                                                                    \
        xent_problem problem = l.problem;                                                                   \
        xent_linear linear = l.linear;                                                                      \
        xent_linear_grads to = grads;                                                                       \
        change;                                                                                             \
        CHECK_STATUS(xent_linear_forward_backward(&problem, &linear, NULL, 1.0, &results, &to), status);    \
        CHECK_MENTIONS(xent_last_error(), word);                                                            \
        CHECK_BYTES(hidden, before, sizeof hidden);                                                         \
        CHECK_NEAR(loss, -7, 0);                                                                            \
        (void)problem, (void)linear, (void)to;                                                              \
    } while (0)
    REFUSED(XENT_ERR_STRUCT, "linear.struct_size", linear.struct_size = 4);
    REFUSED(XENT_ERR_STRUCT, "linear_grads.struct_size", to.struct_size = 0);
    REFUSED(XENT_ERR_STRUCT, "linear.flags", linear.flags = 8);
    REFUSED(XENT_ERR_NULL, "hidden is NULL", linear.hidden.data = NULL);
    REFUSED(XENT_ERR_NULL, "weight is NULL", linear.weight.data = NULL);
    REFUSED(XENT_ERR_NULL, "targets is NULL", problem.targets.data = NULL);
    REFUSED(XENT_ERR_SHAPE, "logits is given", problem.logits = linear.hidden);
    REFUSED(XENT_ERR_SHAPE, "inner = 2", problem.inner = 2; problem.rows = N / 2);
    REFUSED(XENT_ERR_SHAPE, "overflows", linear.features = SIZE_MAX / 64);
    REFUSED(XENT_ERR_STRIDE, "hidden.strides[1] = 2", linear.hidden.strides[1] = 2);
    REFUSED(XENT_ERR_STRIDE, "weight.strides[0] = -1", linear.weight.strides[0] = -1; linear.weight.strides[1] = 1);
    REFUSED(XENT_ERR_STRIDE, "makes elements of an output share an address", to.hidden.strides[0] = 1; to.hidden.strides[1] = 1);
    REFUSED(XENT_ERR_DTYPE, "weight.dtype", linear.weight.dtype = XENT_BF16);
    REFUSED(XENT_ERR_DTYPE, "grads.weight.dtype", to.weight.dtype = XENT_F64);
    REFUSED(XENT_ERR_DTYPE, "hidden.dtype", linear.hidden.dtype = XENT_I32);
    REFUSED(XENT_ERR_ALIGN, "weight.data", linear.weight.data = (const char *)l.weight + 1);
    REFUSED(XENT_ERR_OVERLAP, "grads.hidden overlaps grads.weight", to.weight.data = hidden);
    REFUSED(XENT_ERR_OVERLAP, "grads.hidden overlaps hidden", linear.hidden.data = hidden; linear.hidden.strides[0] = 0);
    REFUSED(XENT_ERR_PARAM, "LOG_PROBS", problem.flags = XENT_FLAG_LOG_PROBS);
    REFUSED(XENT_ERR_PARAM, "ACCUMULATE", problem.flags = XENT_FLAG_ACCUMULATE);
    REFUSED(XENT_ERR_PARAM, "ZERO_PADDING", problem.flags = XENT_FLAG_ZERO_PADDING);
    REFUSED(XENT_ERR_PARAM, "workspace = 1", linear.workspace = 1);
    REFUSED(XENT_ERR_TARGET, "targets[0] = -7", l.targets[0] = -7);
    l.targets[0] = 0;
    CHECK_STATUS(xent_linear_forward(NULL, &l.linear, &results), XENT_ERR_NULL);
    CHECK_STATUS(xent_linear_forward(&l.problem, NULL, &results), XENT_ERR_NULL);
    CHECK_STATUS(xent_linear_forward(&l.problem, &l.linear, NULL), XENT_ERR_NULL);
    CHECK_STATUS(xent_linear_backward(&l.problem, &l.linear, NULL, NULL, 1.0, &grads), XENT_ERR_NULL);
    CHECK_STATUS(xent_linear_forward_backward(&l.problem, &l.linear, NULL, 1.0, &results, NULL), XENT_ERR_NULL);
    /* A faulty struct comes before a NULL pointer. */
    xent_linear_grads faulty = grads;
    faulty.struct_size = 0;
    CHECK_STATUS(xent_linear_forward_backward(&l.problem, NULL, NULL, 1.0, &results, &faulty), XENT_ERR_STRUCT);
    CHECK_BYTES(hidden, before, sizeof hidden);
    /* Without gradients there is a loss all the same. */
    xent_linear_grads none = XENT_LINEAR_GRADS_INIT;
    CHECK_OK(xent_linear_forward_backward(&l.problem, &l.linear, NULL, 1.0, &results, &none));
    CHECK(loss > 0);
    free(before);
    discard(&l);
}

int main(void) {
    options();
    accumulates();
    shards();
    refused();
    return report();
}
