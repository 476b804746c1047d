/* The definition in plain loops and double: what the kernels are compared with. It reads the same
 * descriptors as the library: f32 logits and weights, index targets, classes side by side. */
#ifndef XENT_TESTS_REFERENCE_H
#define XENT_TESTS_REFERENCE_H

#include "check.h"

struct expected {
    double loss, normalizer;
    uint64_t kept_rows;
    double *row_losses, *lse; /* [rows] */
    double *row_tolerances;   /* [rows] */
    double *grad;             /* [rows, classes] */
    double *grad_terms;       /* the largest term of each entry: its errors are relative to that */
    double *lse_terms;        /* the same for a backward from lse, which cannot keep p - 1 small */
};

static inline int64_t row_stride(const int64_t strides[3], size_t classes) {
    int all_zero = strides[0] == 0 && (classes == 1 || strides[1] == 0);
    return all_zero ? (int64_t)classes : strides[0];
}

static inline int64_t target_of(const xent_problem *p, size_t row) {
    int64_t at = (int64_t)row * row_stride(p->targets.strides, 1);
    switch (p->targets.dtype) {
    case XENT_I64: return ((const int64_t *)p->targets.data)[at];
    case XENT_I32: return ((const int32_t *)p->targets.data)[at];
    case XENT_U32: return ((const uint32_t *)p->targets.data)[at];
    case XENT_U16: return ((const uint16_t *)p->targets.data)[at];
    default: return ((const uint8_t *)p->targets.data)[at];
    }
}

static inline double f32_of(const xent_input *view, size_t row, double absent) {
    return view->data ? (double)((const float *)view->data)[(int64_t)row * row_stride(view->strides, 1)] : absent;
}

static inline double class_weight(const xent_problem *p, size_t class) {
    return p->class_weights.data ? (double)((const float *)p->class_weights.data)[class] : 1.0;
}

static inline int is_kept(const xent_problem *p, size_t row) {
    const uint8_t *mask = p->row_mask.data;
    return (!mask || mask[(int64_t)row * row_stride(p->row_mask.strides, 1)] != 0) &&
           target_of(p, row) != p->ignore_index;
}

/* A term whose factor is 0 is 0, whatever it multiplies. */
static inline double times(double factor, double value) { return factor == 0 ? 0 : factor * value; }

static inline double larger(double a, double b) { return a > b ? a : b; }

/* The library promises 2e-7 of the largest term for losses and lse, 2^-22 (1 + |ln loss|) of a
 * small loss; and for a probability p in a gradient 2^-23 (1 + |ln p|), which is 4e-6 down to
 * p = 1e-14. */
#define LOSS_TOLERANCE 2.5e-7
#define GRAD_TOLERANCE 4e-6

/* `prior`, [rows, classes] or NULL: what grad_logits held, to be accumulated into. */
static inline struct expected reference(const xent_problem *p, const xent_input *grad_output, double grad_scale,
                                        const double *prior) {
    size_t rows = p->rows, classes = p->classes;
    struct expected e;
    memset(&e, 0, sizeof e);
    e.row_losses = checked(calloc(rows + 1, sizeof(double)));
    e.lse = checked(calloc(rows + 1, sizeof(double)));
    e.row_tolerances = checked(calloc(rows + 1, sizeof(double)));
    e.grad = checked(calloc(rows * classes + 1, sizeof(double)));
    e.grad_terms = checked(calloc(rows * classes + 1, sizeof(double)));
    e.lse_terms = checked(calloc(rows * classes + 1, sizeof(double)));
    double smoothing = p->label_smoothing, total_weight = 0, sum = 0;
    for (size_t c = 0; c < classes && rows; c++) total_weight += class_weight(p, c);
    for (size_t i = 0; i < rows; i++)
        if (is_kept(p, i)) {
            e.kept_rows++;
            e.normalizer += f32_of(&p->row_weights, i, 1) * class_weight(p, (size_t)target_of(p, i));
        }
    if (p->normalizer > 0) e.normalizer = p->normalizer;

    for (size_t i = 0; i < rows; i++) {
        const float *x = (const float *)p->logits.data + (int64_t)i * row_stride(p->logits.strides, classes);
        double max = -INFINITY, scaled = 0;
        for (size_t c = 0; c < classes; c++) max = larger(max, x[c]);
        for (size_t c = 0; c < classes; c++) scaled += exp(x[c] - max);
        double lse = max + log(scaled);
        e.lse[i] = lse;
        if (!is_kept(p, i)) {
            if (prior)
                for (size_t c = 0; c < classes; c++) e.grad[i * classes + c] = prior[i * classes + c];
            continue;
        }
        size_t y = (size_t)target_of(p, i);
        double weight = f32_of(&p->row_weights, i, 1), target = (1 - smoothing) * class_weight(p, y);
        double spread = 0, terms = fabs(times(target, lse - x[y]));
        for (size_t c = 0; c < classes && smoothing != 0; c++) {
            double term = times(class_weight(p, c) * smoothing / (double)classes, lse - x[c]);
            spread += term;
            terms += fabs(term);
        }
        e.row_losses[i] = times(weight, times(target, lse - x[y]) + spread);
        e.row_tolerances[i] = LOSS_TOLERANCE * fabs(weight) * terms * (1 + (terms > 0 ? fabs(log(terms)) : 0));
        sum += e.row_losses[i];

        double scale = grad_scale * weight;
        if (grad_output && grad_output->data) scale *= f32_of(grad_output, p->reduction == XENT_NONE ? i : 0, 1);
        if (p->reduction == XENT_MEAN) scale /= e.normalizer;
        for (size_t c = 0; c < classes; c++) {
            double probability = exp(x[c] - lse), even = smoothing / (double)classes;
            /* p - 1 at the target: as minus the others' share where that is the smaller number */
            double off = probability;
            if (c == y) {
                off = 0;
                for (size_t o = 0; o < classes; o++) off -= o == y ? 0 : exp(x[o] - lse);
            }
            double by_target = target * off, by_total = even * total_weight * probability,
                   by_class = even * class_weight(p, c);
            double before = prior ? prior[i * classes + c] : 0;
            e.grad[i * classes + c] = before + scale * (by_target + by_total - by_class);
            double terms_of_all = larger(fabs(before), fabs(scale) * larger(fabs(by_total), fabs(by_class)));
            e.grad_terms[i * classes + c] = larger(terms_of_all, fabs(scale * by_target));
            e.lse_terms[i * classes + c] = larger(terms_of_all, fabs(scale * target) * larger(probability, fabs(off)));
        }
    }
    e.loss = p->reduction == XENT_SUM ? sum : sum / e.normalizer;
    if (e.kept_rows == 0 && p->reduction == XENT_MEAN && p->normalizer > 0) e.loss = 0;
    if (e.kept_rows == 0 && p->reduction == XENT_MEAN && (p->flags & XENT_FLAG_EMPTY_IS_ZERO)) e.loss = 0;
    return e;
}

static inline void expected_free(struct expected *e) {
    free(e->row_losses);
    free(e->lse);
    free(e->row_tolerances);
    free(e->grad);
    free(e->grad_terms);
    free(e->lse_terms);
}

static inline void check_grad(const char *file, int line, const float *grad, int64_t stride,
                              const double *expected, const double *terms, size_t rows, size_t classes) {
    for (size_t i = 0; i < rows; i++)
        for (size_t c = 0; c < classes; c++) {
            double got = grad[(int64_t)i * stride + (int64_t)c], want = expected[i * classes + c];
            double tolerance = GRAD_TOLERANCE * terms[i * classes + c] + 1e-37;
            if (!near(got, want, tolerance)) {
                failed(file, line);
                fprintf(stderr, "grad_logits[%zu, %zu]: expected %.9g within %.2g, got %.9g\n", i, c, want,
                        tolerance, got);
                return; /* one line says enough */
            }
        }
}

/* Runs forward, backward from its lse, and the fused call on a problem with poisoned outputs,
 * and compares every result with the reference. */
static inline void check_problem(const char *file, int line, const xent_problem *problem,
                                 const xent_input *grad_output, double grad_scale) {
    xent_problem p = *problem;
    size_t rows = p.rows, classes = p.classes, count = rows * classes;
    int accumulates = (p.flags & XENT_FLAG_ACCUMULATE) != 0;
    double *prior = accumulates ? checked(malloc(count * sizeof(double) + 1)) : NULL;
    float *start = poisoned(count * sizeof(float));
    if (accumulates) {
        uint64_t state = 99;
        fill(start, count, -1, 1, &state);
        for (size_t k = 0; k < count; k++) prior[k] = start[k];
    }
    struct expected e = reference(&p, grad_output, grad_scale, prior);

    double *row_losses[2], *lse[2], loss[2], normalizer[2];
    uint64_t kept_rows[2];
    float *grad[2];
    for (int fused = 0; fused < 2; fused++) {
        row_losses[fused] = poisoned(rows * sizeof(double));
        lse[fused] = poisoned(rows * sizeof(double));
        grad[fused] = copy_of(start, count * sizeof(float));
        xent_results r = XENT_RESULTS_INIT;
        r.loss = p.reduction == XENT_NONE ? NULL : &loss[fused];
        r.row_losses = out(row_losses[fused], XENT_F64);
        r.lse = lse[fused];
        r.normalizer = &normalizer[fused];
        r.kept_rows = &kept_rows[fused];
        xent_output g = out(grad[fused], XENT_F32);
        if (fused) {
            check_status(file, line, xent_forward_backward(&p, grad_output, grad_scale, &r, &g), XENT_OK);
        } else {
            check_status(file, line, xent_forward(&p, &r), XENT_OK);
            check_status(file, line, xent_backward(&p, lse[0], grad_output, grad_scale, &g), XENT_OK);
        }
        double tolerance = 0;
        for (size_t i = 0; i < rows; i++) {
            double lse_tolerance = LOSS_TOLERANCE * (1 + fabs(e.lse[i]));
            check_near(file, line, lse[fused][i], e.lse[i], lse_tolerance);
            check_near(file, line, row_losses[fused][i], e.row_losses[i], e.row_tolerances[i]);
            tolerance += e.row_tolerances[i];
        }
        if (p.reduction == XENT_MEAN) tolerance /= fabs(e.normalizer);
        if (r.loss) check_near(file, line, loss[fused], e.loss, tolerance);
        check_near(file, line, normalizer[fused], e.normalizer, 1e-12 * fabs(e.normalizer));
        check_u64(file, line, kept_rows[fused], e.kept_rows);
        check_grad(file, line, grad[fused], (int64_t)classes, e.grad, fused ? e.grad_terms : e.lse_terms, rows,
                   classes);
    }
    /* forward and the fused call promise the same bits */
    if (p.reduction != XENT_NONE) check_bytes(file, line, &loss[1], &loss[0], sizeof(double), "fused loss");
    check_bytes(file, line, row_losses[1], row_losses[0], rows * sizeof(double), "fused row_losses");
    check_bytes(file, line, lse[1], lse[0], rows * sizeof(double), "fused lse");
    for (int k = 0; k < 2; k++) {
        free(row_losses[k]);
        free(lse[k]);
        free(grad[k]);
    }
    free(start);
    free(prior);
    expected_free(&e);
}

#define CHECK_PROBLEM(problem, grad_output, grad_scale) \
    check_problem(__FILE__, __LINE__, (problem), (grad_output), (grad_scale))

#endif
