/* The definition in plain loops over doubles, with which the tests compare the kernels. It reads the same
 * descriptors as the library, whatever their dtypes and strides. "Row" means one of rows*inner
 * distributions; arrays of results are packed. */
#ifndef XENT_TESTS_REFERENCE_H
#define XENT_TESTS_REFERENCE_H

#include "check.h"

#include <float.h>

struct expected {
    double loss, z_loss, entropy_bonus, normalizer, z_normalizer;
    uint64_t kept_rows, correct;
    int64_t *argmax;                                               /* [rows, inner] */
    double *row_losses, *lse, *entropy;                            /* ... */
    double *row_tolerances, *lse_tolerances, *entropy_tolerances;  /* ... */
    double loss_tolerance, z_tolerance, bonus_tolerance;
    double *grad, *grad_targets; /* [rows, classes, inner] */
    double *grad_terms;          /* the largest term of each entry: its errors are relative to that */
    double *lse_terms;           /* the same for a backward from lse, which cannot keep p - 1 small */
    double *target_tolerances;
    double grad_tolerance; /* relative to the terms */
};

/* ---- reading descriptors -------------------------------------------------------------- */

static inline int64_t place(const int64_t strides[3], const size_t sizes[3], size_t row, size_t class, size_t inner) {
    const size_t at[3] = {row, class, inner};
    const int64_t packed[3] = {(int64_t)(sizes[1] * sizes[2]), (int64_t)sizes[2], 1};
    int all_zero = 1;
    int64_t sum = 0;
    for (int axis = 0; axis < 3; axis++) all_zero &= sizes[axis] <= 1 || strides[axis] == 0;
    for (int axis = 0; axis < 3; axis++)
        if (sizes[axis] > 1) sum += (int64_t)at[axis] * (all_zero ? packed[axis] : strides[axis]);
    return sum;
}

static inline int64_t row_place(const xent_problem *p, const xent_input *view, size_t row) {
    const size_t sizes[3] = {p->rows, 1, p->inner};
    return place(view->strides, sizes, row / p->inner, 0, row % p->inner);
}

/* Of an operand that has classes. */
static inline double element(const xent_problem *p, const xent_input *view, size_t row, size_t class) {
    const size_t sizes[3] = {p->rows, p->classes, p->inner};
    return get(view->data, view->dtype, place(view->strides, sizes, row / p->inner, class, row % p->inner));
}

static inline double row_value(const xent_problem *p, const xent_input *view, size_t row, double absent) {
    return view->data ? get(view->data, view->dtype, row_place(p, view, row)) : absent;
}

static inline double class_weight(const xent_problem *p, size_t class) {
    const size_t sizes[3] = {1, p->classes, 1};
    const xent_input *w = &p->class_weights;
    return w->data ? get(w->data, w->dtype, place(w->strides, sizes, 0, class, 0)) : 1.0;
}

static inline int has_indices(const xent_problem *p) { return p->targets.dtype >= XENT_I64; }

static inline int64_t target_of(const xent_problem *p, size_t row) {
    int64_t at = row_place(p, &p->targets, row);
    switch (p->targets.dtype) {
    case XENT_I64: return ((const int64_t *)p->targets.data)[at];
    case XENT_I32: return ((const int32_t *)p->targets.data)[at];
    case XENT_U32: return ((const uint32_t *)p->targets.data)[at];
    case XENT_U16: return ((const uint16_t *)p->targets.data)[at];
    default: return ((const uint8_t *)p->targets.data)[at];
    }
}

static inline int is_kept(const xent_problem *p, size_t row) {
    const uint8_t *mask = p->row_mask.data;
    return (!mask || mask[row_place(p, &p->row_mask, row)] != 0) &&
           !(has_indices(p) && target_of(p, row) == p->ignore_index);
}

/* ---- the formulas --------------------------------------------------------------------- */

/* A term whose factor is 0 is 0, whatever it multiplies. */
static inline double times(double factor, double value) { return factor == 0 ? 0 : factor * value; }

static inline double larger(double a, double b) { return a > b ? a : b; }

/* The library promises 2e-7 of the largest term for losses and lse, 2^-22 (1 + |ln loss|) of a
 * small loss; and for a probability p in a gradient 2^-23 (1 + |ln p|), which is 4e-6 down to
 * p = 1e-14. With f64 logits it is 1e-14: sums are taken in long double, as sums of doubles would
 * not reach that themselves. */
#define LOSS_TOLERANCE 2.5e-7
#define GRAD_TOLERANCE 4e-6
#define ENTROPY_TOLERANCE 1e-6
#define F64_TOLERANCE 1e-13
#define F64_GRAD_TOLERANCE 4e-13

/* Of an AArch64's long double, which is software's, to the accuracy of a double: a tenth of the tolerances
 * is room enough for that, and sums are exact all the same. */
static inline long double exponential(long double x) {
#if LDBL_MANT_DIG > 64
    return exp((double)x);
#else
    return expl(x);
#endif
}

/* A logit scaled and capped, and what a gradient is multiplied with for it. */
static inline double prepared(const xent_problem *p, double logit, double *slope) {
    double x = p->logit_scale * logit;
    *slope = p->logit_scale;
    if (p->softcap > 0) {
        double cosine = cosh(x / p->softcap);
        x = p->softcap * tanh(x / p->softcap);
        *slope /= cosine * cosine;
    }
    return x;
}

/* The error of x: scaled and capped logits are rounded to f32, except f64 logits. */
static inline double preparation_error(const xent_problem *p, double x) {
    if (!(p->softcap > 0) && near(p->logit_scale, 1, 0)) return 0;
    return fabs(x) * (p->logits.dtype == XENT_F64 ? 1e-15 : 0x1p-22);
}

/* The lowest index of a NaN, else of the maximum. */
static inline int64_t argmax_of(const double *z, size_t classes) {
    size_t best = 0;
    for (size_t c = 0; c < classes; c++) {
        if (isnan(z[c])) return (int64_t)c;
        if (z[c] > z[best]) best = c;
    }
    return (int64_t)best;
}

static inline double *numbers(size_t count) { return checked(calloc(count + 1, sizeof(double))); }

/* `prior`, [rows, classes, inner] or NULL: what a gradient held, to be accumulated into. */
static inline struct expected reference(const xent_problem *p, const xent_input *grad_output, double grad_scale,
                                        const double *prior) {
    size_t classes = p->classes, rows = p->rows * p->inner, count = rows * classes;
    int indices = has_indices(p), log_probs = (p->flags & XENT_FLAG_LOG_PROBS) != 0;
    int mean = p->reduction == XENT_MEAN, wide = p->logits.dtype == XENT_F64;
    double loss_unit = wide ? F64_TOLERANCE : LOSS_TOLERANCE, entropy_unit = wide ? F64_TOLERANCE : ENTROPY_TOLERANCE;
    struct expected e;
    memset(&e, 0, sizeof e);
    e.argmax = checked(calloc(rows + 1, sizeof(int64_t)));
    e.row_losses = numbers(rows);
    e.lse = numbers(rows);
    e.entropy = numbers(rows);
    e.row_tolerances = numbers(rows);
    e.lse_tolerances = numbers(rows);
    e.entropy_tolerances = numbers(rows);
    e.grad = numbers(count);
    e.grad_targets = numbers(count);
    e.grad_terms = numbers(count);
    e.lse_terms = numbers(count);
    e.target_tolerances = numbers(count);
    e.grad_tolerance = wide ? F64_GRAD_TOLERANCE : GRAD_TOLERANCE;
    long double weights = 0, row_weights = 0;
    for (size_t i = 0; i < rows; i++)
        if (is_kept(p, i)) {
            double weight = row_value(p, &p->row_weights, i, 1);
            e.kept_rows++;
            row_weights += weight;
            weights += indices ? weight * class_weight(p, (size_t)target_of(p, i)) : weight;
        }
    e.normalizer = (double)weights;
    e.z_normalizer = (double)row_weights;
    if (p->normalizer > 0) e.normalizer = p->normalizer;
    if (p->z_normalizer > 0) e.z_normalizer = p->z_normalizer;

    double *z = numbers(classes), *x = numbers(classes), *slope = numbers(classes);
    double *mass = numbers(classes), *even = numbers(classes); /* of the target; of smoothing in it */
    double smoothing = p->label_smoothing, ce_tolerance = 0;
    long double ce_sum = 0, z_sum = 0, bonus_sum = 0;
    for (size_t i = 0; i < rows; i++) {
        double max = -INFINITY, error = 0, steep = 0;
        long double scaled = 0, entropy = 0, lse = 0;
        for (size_t c = 0; c < classes; c++) {
            z[c] = element(p, &p->logits, i, c);
            x[c] = prepared(p, z[c], &slope[c]);
            error = larger(error, preparation_error(p, x[c]));
            if (p->softcap > 0) steep = larger(steep, fabs(p->logit_scale * z[c] / p->softcap));
            max = larger(max, x[c]);
        }
        e.argmax[i] = argmax_of(z, classes);
        double lse_tolerance = 0;
        if (!log_probs) {
            for (size_t c = 0; c < classes; c++) scaled += exponential((long double)x[c] - max);
            lse = max + logl(scaled);
            e.lse[i] = (double)lse;
            e.lse_tolerances[i] = lse_tolerance = loss_unit * (1 + fabs((double)lse)) + error;
            for (size_t c = 0; c < classes; c++) entropy += times((double)exponential(x[c] - lse), (double)(lse - x[c]));
            e.entropy[i] = (double)entropy;
            e.entropy_tolerances[i] = entropy_unit * (1 + fabs((double)lse)) + 2 * error * (1 + e.entropy[i]);
        }
        e.grad_tolerance = larger(e.grad_tolerance, (wide ? F64_GRAD_TOLERANCE : GRAD_TOLERANCE) + 4 * error +
                                                        steep * (wide ? 1e-14 : 0x1p-20));
        size_t y = indices && is_kept(p, i) ? (size_t)target_of(p, i) : classes;
        if (y == (size_t)e.argmax[i]) e.correct++;
        double weight = row_value(p, &p->row_weights, i, 1);
        if (!is_kept(p, i) || weight == 0) {
            for (size_t c = 0; c < classes; c++) {
                size_t at = (i / p->inner * classes + c) * p->inner + i % p->inner;
                if (prior) e.grad[at] = e.grad_targets[at] = prior[at];
            }
            continue;
        }

        double terms = 0, largest = 0;
        long double masses = 0, losses = 0;
        for (size_t c = 0; c < classes; c++) {
            double target = indices ? c == y : element(p, &p->targets, i, c);
            even[c] = times(class_weight(p, c), smoothing / (double)classes);
            mass[c] = times(class_weight(p, c) * (1 - smoothing), target) + even[c];
            double term = times(mass[c], (double)(lse - x[c]));
            losses += term;
            terms += fabs(term);
            masses += mass[c];
            largest = larger(largest, fabs(mass[c]));
        }
        double total = (double)masses, ce = (double)losses;
        largest = larger(largest, fabs(total));
        double z_part = times(weight * p->z_loss, (double)(lse * lse));
        double z_tolerance = fabs(weight) * p->z_loss * 2 * fabs((double)lse) * lse_tolerance;
        double tolerance = loss_unit * fabs(weight) * terms * (1 + (terms > 0 ? fabs(log(terms)) : 0));
        tolerance += fabs(weight) * 2 * error * largest * (double)classes;
        ce_tolerance += tolerance;
        e.z_tolerance += z_tolerance;
        double bonus = times(-weight * p->entropy_bonus, e.entropy[i]);
        double bonus_tolerance = fabs(weight * p->entropy_bonus) * e.entropy_tolerances[i];
        e.bonus_tolerance += bonus_tolerance;
        e.row_tolerances[i] = tolerance + z_tolerance + bonus_tolerance;
        e.row_losses[i] = times(weight, ce) + z_part + bonus;
        ce_sum += times(weight, ce);
        z_sum += z_part;
        bonus_sum += bonus;

        double scale = grad_scale * weight;
        if (grad_output && grad_output->data)
            scale *= p->reduction == XENT_NONE ? row_value(p, grad_output, i, 1)
                                               : get(grad_output->data, grad_output->dtype, 0);
        double ce_scale = mean ? scale / e.normalizer : scale;
        double z_scale = !(p->z_loss > 0) ? 0 : mean ? scale / e.z_normalizer : scale;
        double bonus_scale = p->entropy_bonus * (mean ? scale / e.z_normalizer : scale);
        for (size_t c = 0; c < classes; c++) {
            size_t at = (i / p->inner * classes + c) * p->inner + i % p->inner;
            double before = prior ? prior[at] : 0, factor = class_weight(p, c) * (1 - smoothing) * ce_scale;
            e.grad_targets[at] = before + times(factor, (double)(lse - x[c]));
            e.target_tolerances[at] = fabs(factor) * (lse_tolerance + error + loss_unit * (fabs((double)lse) + fabs(x[c]))) +
                                      loss_unit * fabs(before);
            if (log_probs) {
                e.grad[at] = before - (c == y || fabs(mass[c]) > 0 ? ce_scale * mass[c] : 0);
                e.grad_terms[at] = e.lse_terms[at] = larger(fabs(before), fabs(ce_scale * mass[c]));
                continue;
            }
            double probability = (double)exponential(x[c] - lse), by_target = 0, by_all = total * probability - mass[c], off = 0, shared;
            if (indices) { /* (1-e) w_y (p - [c=y]) apart from the rest */
                double target = (1 - smoothing) * class_weight(p, y);
                off = probability;
                /* p - 1 at the target: as minus the others' share where that is the smaller number */
                if (c == y) {
                    long double others = 0;
                    for (size_t o = 0; o < classes; o++) others += o == y ? 0 : exponential(x[o] - lse);
                    off = -(double)others;
                }
                by_target = target * off;
                by_all = (total - target) * probability - even[c];
                shared = larger(fabs(total - target) * probability, fabs(even[c]));
                e.lse_terms[at] = fabs(target) * larger(probability, fabs(off));
            } else {
                shared = larger(largest * probability, fabs(mass[c]));
            }
            double by_z = 2 * p->z_loss * (double)lse * probability;
            double by_bonus = bonus_scale * times(probability, (double)(x[c] - lse) + e.entropy[i]);
            double bonus_term = bonus_scale * times(probability, 1 + (double)(lse - x[c]) + e.entropy[i]);
            e.grad[at] = before + slope[c] * (ce_scale * (by_target + by_all) + z_scale * by_z + by_bonus);
            shared = larger(fabs(before), slope[c] * larger(fabs(z_scale * by_z), fabs(ce_scale) * shared));
            shared = larger(shared, slope[c] * fabs(bonus_term));
            e.grad_terms[at] = larger(shared, slope[c] * fabs(ce_scale * by_target));
            e.lse_terms[at] = larger(shared, slope[c] * fabs(ce_scale) * e.lse_terms[at]);
        }
    }
    e.z_loss = (double)(mean && p->z_loss > 0 ? z_sum / e.z_normalizer : z_sum);
    e.entropy_bonus = (double)(mean && fabs(p->entropy_bonus) > 0 ? bonus_sum / e.z_normalizer : bonus_sum);
    e.loss = (double)(mean ? ce_sum / e.normalizer : ce_sum);
    if (mean) ce_tolerance /= fabs(e.normalizer);
    if (mean && p->z_loss > 0) e.z_tolerance /= fabs(e.z_normalizer);
    if (mean && fabs(p->entropy_bonus) > 0) e.bonus_tolerance /= fabs(e.z_normalizer);
    e.loss_tolerance = ce_tolerance + e.z_tolerance + e.bonus_tolerance;
    if (e.kept_rows == 0 && mean && (p->flags & XENT_FLAG_EMPTY_IS_ZERO)) e.loss = e.z_loss = e.entropy_bonus = 0;
    e.loss += e.z_loss + e.entropy_bonus;
    free(z);
    free(x);
    free(slope);
    free(mass);
    free(even);
    return e;
}

static inline void expected_free(struct expected *e) {
    free(e->argmax);
    free(e->row_losses);
    free(e->lse);
    free(e->entropy);
    free(e->row_tolerances);
    free(e->lse_tolerances);
    free(e->entropy_tolerances);
    free(e->grad);
    free(e->grad_targets);
    free(e->grad_terms);
    free(e->lse_terms);
    free(e->target_tolerances);
}

/* y, or with `backward` the gradient from y and grad_y: over `classes` values `step` apart. */
static inline void softmax_reference(const double *y, const double *grad_y, double *to, size_t classes, size_t step,
                                     int log_of, int backward) {
    double max = -INFINITY, sum = 0;
    for (size_t c = 0; c < classes; c++) {
        if (backward) sum += log_of ? grad_y[c * step] : y[c * step] * grad_y[c * step];
        else max = larger(max, y[c * step]);
    }
    for (size_t c = 0; c < classes && !backward; c++) sum += exp(y[c * step] - max);
    for (size_t c = 0; c < classes; c++) {
        double value = y[c * step];
        if (backward)
            to[c * step] = log_of ? grad_y[c * step] - exp(value) * sum : value * (grad_y[c * step] - sum);
        else
            to[c * step] = log_of ? value - max - log(sum) : exp(value - max) / sum;
    }
}

/* ---- comparing ------------------------------------------------------------------------ */

/* A gradient in f32 whose rows are `stride` apart, of a problem without inner positions. */
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

/* A packed array of any float type. Halves are rounded once more. */
static inline void check_values(const char *file, int line, const char *name, const void *got, xent_dtype dtype,
                                const double *expected, const double *terms, double unit, size_t count) {
    double rounding = dtype == XENT_BF16 ? 0x1p-8 : dtype == XENT_F16 ? 0x1p-11 : dtype == XENT_F32 ? 0x1p-24 : 0;
    double smallest = dtype == XENT_F64 ? 1e-300 : dtype == XENT_F16 ? 0x1p-25 : 1e-37;
    for (size_t i = 0; i < count; i++) {
        double tolerance = unit * terms[i] + rounding * fabs(expected[i]) + smallest;
        double value = get(got, dtype, (int64_t)i);
        if (!near(value, expected[i], tolerance)) {
            failed(file, line);
            fprintf(stderr, "%s[%zu]: expected %.17g within %.2g, got %.17g\n", name, i, expected[i], tolerance,
                    value);
            return; /* one line says enough */
        }
    }
}

/* Runs forward, backward from its lse, and the fused call on a problem with poisoned outputs,
 * and compares every result with the reference; with `all` also those that a plain loss does
 * without: z-loss, predictions, entropy, the gradient of probability targets, an evaluation.
 * Gradients are packed, of the dtype of the logits, or f32 for halves. */
static inline void check_problem(const char *file, int line, const xent_problem *problem,
                                 const xent_input *grad_output, double grad_scale, int all) {
    xent_problem p = *problem;
    size_t rows = p.rows * p.inner, count = rows * p.classes;
    xent_dtype dtype = p.logits.dtype == XENT_F64 ? XENT_F64 : XENT_F32;
    int log_probs = (p.flags & XENT_FLAG_LOG_PROBS) != 0;
    size_t size = count * size_of(dtype);
    double *prior = NULL;
    void *start = poisoned(size);
    if (p.flags & XENT_FLAG_ACCUMULATE) {
        uint64_t state = 99;
        prior = numbers(count);
        for (size_t k = 0; k < count; k++) prior[k] = set(start, dtype, (int64_t)k, 2 * uniform(&state) - 1);
    }
    struct expected e = reference(&p, grad_output, grad_scale, prior);

    double *row_losses[2], *lse[2], *entropy[2];
    double loss[2] = {0}, z_loss[2] = {0}, bonus[2] = {0}, normalizer[2] = {0}, z_normalizer[2] = {0};
    int64_t *argmax[2];
    uint64_t kept_rows[2] = {0}, correct[2] = {0};
    void *grad[2];
    for (int fused = 0; fused < 2; fused++) {
        row_losses[fused] = poisoned(rows * sizeof(double));
        lse[fused] = poisoned(rows * sizeof(double));
        entropy[fused] = poisoned(rows * sizeof(double));
        argmax[fused] = poisoned(rows * sizeof(int64_t));
        grad[fused] = copy_of(start, size);
        xent_results r = XENT_RESULTS_INIT;
        if (p.reduction != XENT_NONE) r.loss = &loss[fused];
        r.row_losses = out(row_losses[fused], XENT_F64);
        if (!log_probs) r.lse = lse[fused];
        r.normalizer = &normalizer[fused];
        r.kept_rows = &kept_rows[fused];
        if (all) {
            if (p.reduction != XENT_NONE && !log_probs) r.z_loss = &z_loss[fused], r.entropy_bonus = &bonus[fused];
            if (!log_probs) r.entropy = out(entropy[fused], XENT_F64);
            if (has_indices(&p)) r.correct = &correct[fused];
            r.z_normalizer = &z_normalizer[fused];
            r.argmax = argmax[fused];
        }
        xent_output g = out(grad[fused], dtype);
        if (fused) {
            check_status(file, line, xent_forward_backward(&p, grad_output, grad_scale, &r, &g), XENT_OK);
        } else {
            check_status(file, line, xent_forward(&p, &r), XENT_OK);
            check_status(file, line, xent_backward(&p, r.lse, grad_output, grad_scale, &g), XENT_OK);
        }
        for (size_t i = 0; i < rows; i++) {
            if (r.lse) check_near(file, line, lse[fused][i], e.lse[i], e.lse_tolerances[i]);
            if (r.entropy.data) check_near(file, line, entropy[fused][i], e.entropy[i], e.entropy_tolerances[i]);
            if (r.argmax) check_u64(file, line, (uint64_t)argmax[fused][i], (uint64_t)e.argmax[i]);
            check_near(file, line, row_losses[fused][i], e.row_losses[i], e.row_tolerances[i]);
        }
        if (r.loss) check_near(file, line, loss[fused], e.loss, e.loss_tolerance);
        if (r.z_loss) check_near(file, line, z_loss[fused], e.z_loss, e.z_tolerance);
        if (r.entropy_bonus) check_near(file, line, bonus[fused], e.entropy_bonus, e.bonus_tolerance);
        if (r.correct) check_u64(file, line, correct[fused], e.correct);
        if (r.z_normalizer) check_near(file, line, z_normalizer[fused], e.z_normalizer, 1e-12 * fabs(e.z_normalizer));
        check_near(file, line, normalizer[fused], e.normalizer, 1e-12 * fabs(e.normalizer));
        check_u64(file, line, kept_rows[fused], e.kept_rows);
        check_values(file, line, "grad_logits", grad[fused], dtype, e.grad, fused ? e.grad_terms : e.lse_terms,
                     e.grad_tolerance, count);
    }
    /* forward and the fused call promise the same bits */
    if (p.reduction != XENT_NONE) check_bytes(file, line, &loss[1], &loss[0], sizeof(double), "fused loss");
    check_bytes(file, line, row_losses[1], row_losses[0], rows * sizeof(double), "fused row_losses");
    check_bytes(file, line, lse[1], lse[0], rows * sizeof(double), "fused lse");

    if (all && !has_indices(&p)) {
        xent_output g = out(grad[0], dtype);
        memcpy(grad[0], start, size);
        const double *from = log_probs ? NULL : lse[0];
        check_status(file, line, xent_backward_targets(&p, from, grad_output, grad_scale, &g), XENT_OK);
        check_values(file, line, "grad_targets", grad[0], dtype, e.grad_targets, e.target_tolerances, 1, count);
    }
    if (all) { /* without targets */
        static const xent_input absent = {NULL, XENT_F32, {0, 0, 0}};
        xent_problem bare = p;
        bare.targets = absent;
        xent_results r = XENT_RESULTS_INIT;
        r.argmax = argmax[0];
        memset(argmax[0], POISON, rows * sizeof(int64_t));
        if (!log_probs) r.lse = lse[0];
        if (!log_probs) r.entropy = out(entropy[0], XENT_F64);
        check_status(file, line, xent_forward(&bare, &r), XENT_OK);
        for (size_t i = 0; i < rows; i++) {
            if (r.lse) check_near(file, line, lse[0][i], e.lse[i], e.lse_tolerances[i]);
            if (r.lse) check_near(file, line, entropy[0][i], e.entropy[i], e.entropy_tolerances[i]);
        }
        check_bytes(file, line, argmax[0], e.argmax, rows * sizeof(int64_t), "argmax without targets");
    }
    for (int k = 0; k < 2; k++) {
        free(row_losses[k]);
        free(lse[k]);
        free(entropy[k]);
        free(argmax[k]);
        free(grad[k]);
    }
    free(start);
    free(prior);
    expected_free(&e);
}

#define CHECK_PROBLEM(problem, grad_output, grad_scale) \
    check_problem(__FILE__, __LINE__, (problem), (grad_output), (grad_scale), 0)
#define CHECK_ALL(problem, grad_output, grad_scale) \
    check_problem(__FILE__, __LINE__, (problem), (grad_output), (grad_scale), 1)

#endif
