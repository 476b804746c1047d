/* Every kind of call: entries, dtypes, layouts, shapes, options, and values that are ordinary or far apart.
 * Tests of what holds for all of them go through the list, or through a sample of it. */
#ifndef XENT_TESTS_KINDS_H
#define XENT_TESTS_KINDS_H

#include "check.h"

enum kind_entry {
    KIND_FORWARD, KIND_BACKWARD, KIND_FUSED, KIND_IN_PLACE, KIND_BACKWARD_IN_PLACE, KIND_TARGETS,
    KIND_SOFTMAX, KIND_LOG_SOFTMAX, KIND_SOFTMAX_BACKWARD, KIND_LOG_SOFTMAX_BACKWARD,
    KIND_PARTIAL_FORWARD, KIND_PARTIAL_FINISH, KIND_PARTIAL_BACKWARD,
    KIND_LINEAR_FORWARD, KIND_LINEAR_BACKWARD, KIND_LINEAR_FUSED, KIND_LINEAR_PARTIAL_FORWARD,
    KIND_LINEAR_PARTIAL_BACKWARD, KIND_ENTRIES
};

/* A call, ready to be made by kind_call. */
struct kind {
    enum kind_entry entry;
    const char *layout, *option, *values;
    xent_problem problem;
    xent_results results;
    xent_output gradient;
    xent_input grad_output;
    double grad_scale;
    const double *lse;
    xent_shape shape;
    xent_linear linear;
    xent_linear_grads grads;
    int in_place; /* the call overwrites the logits */
};

enum { KIND_ROWS = 320, KIND_CLASSES = 70001, KIND_MOST = 320000, KIND_FEATURES = 4, KIND_PLACES = 3 };

static double kind_logits[KIND_MOST], kind_given[KIND_MOST], kind_soft[KIND_MOST], kind_out[KIND_MOST];
static double kind_weight_out[KIND_MOST], kind_bias_out[KIND_CLASSES];
static double kind_weights[KIND_CLASSES], kind_rows[3][KIND_ROWS], kind_scalars[4];
static int64_t kind_targets[KIND_ROWS], kind_argmax[KIND_ROWS];
static int32_t kind_classes[KIND_ROWS * KIND_PLACES];
static uint8_t kind_mask[KIND_ROWS];
static uint64_t kind_counts[2];
enum { KIND_TOP = 64 };
static int64_t kind_top[KIND_ROWS * KIND_TOP], kind_ranks[KIND_ROWS];
static double kind_top_log_probs[KIND_ROWS * KIND_TOP];
static xent_partial kind_partials[KIND_ROWS], kind_merged[KIND_ROWS];
/* A shard lies behind so many classes of its vocabulary, which has no others. */
enum { KIND_OFFSET = 1 };

static inline const char *kind_name(const struct kind *k) {
    static const char *const entries[KIND_ENTRIES] = {
        "forward", "backward", "forward_backward", "forward_backward in place", "backward in place", "backward_targets",
        "softmax", "log_softmax", "softmax_backward", "log_softmax_backward",
        "partial_forward", "partial_finish", "partial_backward", "linear_forward", "linear_backward",
        "linear_forward_backward", "linear_partial_forward", "linear_partial_backward"};
    static char text[256];
    snprintf(text, sizeof text, "%s: dtype %u to %u, %zu x %zu x %zu, %s, %s, %s", entries[k->entry],
             k->linear.hidden.dtype, k->gradient.dtype, k->problem.rows, k->problem.classes, k->problem.inner,
             k->layout, k->option, k->values);
    return text;
}

static inline int kind_is_linear(enum kind_entry entry) { return entry >= KIND_LINEAR_FORWARD; }

static inline int kind_is_shard(enum kind_entry entry) {
    return (entry >= KIND_PARTIAL_FORWARD && entry <= KIND_PARTIAL_BACKWARD) || entry >= KIND_LINEAR_PARTIAL_FORWARD;
}

static inline int kind_has_gradient(enum kind_entry entry) {
    return entry != KIND_FORWARD && entry != KIND_PARTIAL_FORWARD && entry != KIND_PARTIAL_FINISH &&
           entry != KIND_LINEAR_FORWARD && entry != KIND_LINEAR_PARTIAL_FORWARD;
}

static inline xent_status kind_call(const struct kind *k) {
    const xent_input *x = &k->problem.logits, *grad_output = k->grad_output.data ? &k->grad_output : NULL;
    size_t total = k->problem.classes + KIND_OFFSET;
    switch (k->entry) {
    case KIND_FORWARD: return xent_forward(&k->problem, &k->results);
    case KIND_BACKWARD:
    case KIND_BACKWARD_IN_PLACE: return xent_backward(&k->problem, k->lse, grad_output, k->grad_scale, &k->gradient);
    case KIND_TARGETS: return xent_backward_targets(&k->problem, k->lse, grad_output, k->grad_scale, &k->gradient);
    case KIND_SOFTMAX: return xent_softmax(&k->shape, x, &k->gradient);
    case KIND_LOG_SOFTMAX: return xent_log_softmax(&k->shape, x, &k->gradient);
    case KIND_SOFTMAX_BACKWARD: return xent_softmax_backward(&k->shape, x, &k->problem.targets, &k->gradient);
    case KIND_LOG_SOFTMAX_BACKWARD: return xent_log_softmax_backward(&k->shape, x, &k->problem.targets, &k->gradient);
    case KIND_PARTIAL_FORWARD: return xent_partial_forward(&k->problem, KIND_OFFSET, total, kind_partials);
    case KIND_PARTIAL_FINISH: return xent_partial_finish(&k->problem, total, kind_merged, &k->results);
    case KIND_PARTIAL_BACKWARD:
        return xent_partial_backward(&k->problem, KIND_OFFSET, total, kind_merged, grad_output, k->grad_scale,
                                     &k->gradient);
    case KIND_LINEAR_PARTIAL_FORWARD:
        return xent_linear_partial_forward(&k->problem, &k->linear, KIND_OFFSET, total, kind_partials);
    case KIND_LINEAR_PARTIAL_BACKWARD:
        return xent_linear_partial_backward(&k->problem, &k->linear, KIND_OFFSET, total, kind_merged, grad_output,
                                            k->grad_scale, &k->grads);
    case KIND_LINEAR_FORWARD: return xent_linear_forward(&k->problem, &k->linear, &k->results);
    case KIND_LINEAR_BACKWARD:
        return xent_linear_backward(&k->problem, &k->linear, k->lse, grad_output, k->grad_scale, &k->grads);
    case KIND_LINEAR_FUSED:
        return xent_linear_forward_backward(&k->problem, &k->linear, grad_output, k->grad_scale, &k->results, &k->grads);
    default: return xent_forward_backward(&k->problem, grad_output, k->grad_scale, &k->results, &k->gradient);
    }
}

/* Values that repeat after 1021. */
static inline void kind_fill(void *to, xent_dtype dtype, int values) {
    static const double largest[4] = {3.2e38, 1.7e308, 3.2e38, 65000};
    uint64_t state = 7;
    size_t size = size_of(dtype), index = dtype == XENT_F64 ? 1 : dtype;
    for (int i = 0; i < 1021; i++) {
        double x = -4 + 8 * uniform(&state);
        if (values == 1) x *= i % 29 == 3 ? 12000 : 80;
        if (values == 2) x = 1.5;
        if (values == 3 && i % 17 == 3) x = i % 2 ? largest[index] : -largest[index];
        if (values == 4 && i % 13 == 3) x = i % 5 == 0 ? NAN : i % 5 == 1 ? INFINITY : -INFINITY;
        set(to, dtype, i, x);
    }
    for (size_t done = 1021 * size, all = KIND_MOST * size; done < all;) {
        size_t more = all - done < done ? all - done : done / (1021 * size) * 1021 * size;
        memcpy((char *)to + done, to, more);
        done += more;
    }
}

/* Strides of the logits or, with `of_gradient`, of the gradient; false if the shape has no such layout. */
static inline int kind_strides(int layout, const xent_problem *p, int of_gradient, int64_t strides[3]) {
    int64_t rows = (int64_t)p->rows, classes = (int64_t)p->classes, inner = (int64_t)p->inner;
    int64_t packed[3] = {classes * inner, inner, 1}, apart[3] = {classes + 3, 1, 1}, first[3] = {1, rows, 1},
            gaps[3] = {2 * classes + 1, 2, 1}, last[3] = {1, rows * inner, rows};
    const int64_t *by_layout[6][2] = {{packed, packed}, {apart, apart}, {inner == 1 ? first : last, inner == 1 ? first : last},
                                      {gaps, gaps},     {packed, first}, {first, packed}};
    memcpy(strides, by_layout[layout][of_gradient], sizeof packed);
    return inner == 1 || layout == 0 || layout == 2;
}

enum { KIND_OPTIONS = 23, KIND_LAYOUTS = 6, KIND_VALUES = 5 };

/* Sets an option; false if the entry or the layout does not go with it. */
static inline int kind_option(struct kind *k, int option, int layout) {
    static const char *const names[KIND_OPTIONS] = {
        "plain", "label_smoothing", "class_weights", "row_weights and mask", "softcap", "logit_scale", "z_loss",
        "every option", "probabilities", "probabilities and every option", "log_probs", "log_probs of probabilities",
        "every result", "every result and option", "every result of probabilities", "accumulate",
        "row losses and grad_output", "no targets", "zero padding", "a large factor", "entropy_bonus",
        "sparse targets", "a teacher's logits"};
    xent_problem *p = &k->problem;
    xent_results *r = &k->results;
    int soft = option == 8 || option == 9 || option == 11 || option == 14 || option == 22, log_probs = option == 10 || option == 11;
    int gradient = kind_has_gradient(k->entry);
    k->option = names[option];
    r->loss = &kind_scalars[0];
    if (option == 1 || option == 7 || option == 9 || option == 13) p->label_smoothing = 0.1;
    if (option == 2 || option == 7 || option == 9 || option == 13) p->class_weights = in(kind_weights, XENT_F64);
    if (option == 3 || option == 7 || option == 9) {
        p->row_weights = in(kind_rows[0], XENT_F64);
        p->row_mask = in(kind_mask, XENT_U8);
    }
    if (option == 4 || option == 7 || option == 9 || option == 13) p->softcap = 5;
    if (option == 5 || option == 7 || option == 9) p->logit_scale = 0.5;
    if (option == 6 || option == 7 || option == 9) p->z_loss = 1e-3;
    if (option == 7 || option == 9 || option == 20) p->entropy_bonus = 0.01;
    if (soft) {
        p->targets = in(kind_soft, p->logits.dtype);
        memcpy(p->targets.strides, p->logits.strides, sizeof p->logits.strides);
    }
    if (log_probs) p->flags |= XENT_FLAG_LOG_PROBS;
    if (option == 12 || option == 13 || option == 14 || option == 17) {
        r->lse = kind_rows[1];
        r->argmax = kind_argmax;
        r->entropy = out(kind_rows[2], XENT_F64);
        r->top_count = p->classes < KIND_TOP ? p->classes : KIND_TOP;
        r->top_classes = kind_top;
        r->top_log_probs = out(kind_top_log_probs, XENT_F64);
        if (option != 17) r->normalizer = &kind_scalars[1], r->kept_rows = &kind_counts[0];
        if (option == 12 || option == 13) r->correct = &kind_counts[1], r->target_ranks = kind_ranks;
    }
    if (option == 15) p->flags |= XENT_FLAG_ACCUMULATE;
    if (option == 16) {
        p->reduction = XENT_NONE;
        r->loss = NULL;
        r->row_losses = out(kind_rows[1], XENT_F64);
        k->grad_output = in(kind_rows[0], XENT_F64);
    }
    if (option == 17) p->targets.data = NULL, r->loss = NULL;
    if (option == 18) p->flags |= XENT_FLAG_ZERO_PADDING;
    if (option == 19) k->grad_scale = 1e25;
    if (option == 21) {
        p->targets = in(kind_soft, p->logits.dtype);
        p->target_classes = in(kind_classes, XENT_I32);
        p->target_count = KIND_PLACES;
    }
    if (option == 22) p->target_scale = 0.5;
    if (option >= 21) r->kl = out(kind_rows[2], XENT_F64);
    if (kind_is_shard(k->entry)) { /* states do not know the order of the logits */
        if (log_probs || option == 22) return 0;
        r->top_count = 0, r->top_classes = NULL, r->target_ranks = NULL;
        r->top_log_probs.data = r->kl.data = NULL;
    }
    if (k->entry == KIND_TARGETS && (!soft || option == 22)) return 0;
    if (option == 15 && (k->entry == KIND_IN_PLACE || k->entry == KIND_BACKWARD_IN_PLACE)) return 0;
    if ((option == 15 || option == 18 || option == 19) && !gradient) return 0;
    if (option == 18 && (layout != 1 || k->entry == KIND_TARGETS)) return 0;
    if (option == 17 && gradient) return 0;
    return 1;
}

/* Makes a call of a linear layer of the call over logits; false if that has options that no layer has. */
static inline int kind_linear(struct kind *k, int layout, const xent_problem *p) {
    int accumulates = p->flags & XENT_FLAG_ACCUMULATE ? 7 : 0;
    if (layout != 0 || p->inner != 1 || p->flags & (XENT_FLAG_LOG_PROBS | XENT_FLAG_ZERO_PADDING)) return 0;
    if (p->classes * KIND_FEATURES > KIND_MOST) return 0;
    k->linear.flags = (uint32_t)accumulates;
    k->linear.features = KIND_FEATURES;
    k->linear.hidden = in(kind_logits, p->logits.dtype);
    k->linear.weight = in(kind_soft, p->logits.dtype);
    k->linear.bias = in(kind_weights, XENT_F64);
    k->grads.hidden = out(kind_out, k->gradient.dtype);
    k->grads.weight = out(kind_weight_out, k->gradient.dtype);
    k->grads.bias = out(kind_bias_out, XENT_F64);
    k->problem.logits.data = NULL;
    k->problem.flags &= ~(uint32_t)XENT_FLAG_ACCUMULATE;
    return 1;
}

/* Makes every `step`-th of the calls. Values of kind 4 are not finite. */
static inline size_t every_kind(size_t step, int values, const xent_pool *pool, void (*each)(const struct kind *)) {
    static const size_t shapes[][3] = {
        {2, 4, 1},     {1, 10, 1},   {5, 10, 1},   {20, 100, 1}, {70, 30, 1},  {300, 10, 1},   {70, 200, 1},   {70, 450, 1},
        {9, 1500, 1},  {9, 2100, 1}, {3, 5000, 1}, {4, 9000, 1}, {2, 70000, 1}, {140, 1100, 1}, {2, 4, 3},     {2, 21, 70},
        {1, 100, 260}, {3, 300, 70}, {1, 2000, 70}};
    static const xent_dtype dtypes[6][2] = {{XENT_F32, XENT_F32},   {XENT_F64, XENT_F64},   {XENT_BF16, XENT_BF16},
                                            {XENT_F16, XENT_F16},   {XENT_BF16, XENT_F32}, {XENT_F16, XENT_F32}};
    static const char *const layouts[KIND_LAYOUTS] = {"packed",    "rows apart",          "classes first",
                                                      "gaps",      "gradient transposed", "logits transposed"};
    static const char *const names[KIND_VALUES] = {"ordinary", "far apart", "equal", "huge", "not finite"};
    static const xent_problem no_problem = XENT_PROBLEM_INIT;
    static const xent_results no_results = XENT_RESULTS_INIT;
    static const xent_shape no_shape = XENT_SHAPE_INIT;
    static const xent_linear no_linear = XENT_LINEAR_INIT;
    static const xent_linear_grads no_grads = XENT_LINEAR_GRADS_INIT;
    size_t number = 0, made = 0;
    for (int i = 0; i < KIND_ROWS; i++) {
        kind_targets[i] = i % 7 == 5 ? -100 : i % 4;
        kind_mask[i] = i % 5 != 1;
        kind_rows[0][i] = 0.5 + i % 3;
    }
    for (int i = 0; i < KIND_ROWS * KIND_PLACES; i++) kind_classes[i] = i % 5 == 4 ? -100 : i % 4;
    for (int i = 0; i < KIND_ROWS; i++) {
        xent_partial row = {3 + i % 4, 0.5 + i % 3, 0.75, 1, 1.5 + i % 4, i % 4};
        kind_merged[i] = row;
    }
    for (int i = 0; i < KIND_CLASSES; i++) kind_weights[i] = i % 6 == 4 ? 0 : 0.25 * (1 + i % 5);
    for (int d = 0; d < 6; d++) {
        xent_dtype dtype = dtypes[d][0];
        kind_fill(kind_soft, dtype, 0);
        for (int v = 0; v < values; v++) {
            kind_fill(kind_given, dtype, v);
            memcpy(kind_logits, kind_given, sizeof kind_logits);
            for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
                for (int layout = 0; layout < KIND_LAYOUTS; layout++)
                    for (int entry = 0; entry < KIND_ENTRIES; entry++)
                        for (int option = 0; option < KIND_OPTIONS; option++) {
                            struct kind k = {(enum kind_entry)entry, layouts[layout], "", names[v], no_problem,
                                             no_results, out(kind_out, dtypes[d][1]), in(NULL, 0), 0.5, kind_rows[0],
                                             no_shape, no_linear, no_grads, 0};
                            int softmax = entry >= KIND_SOFTMAX && entry <= KIND_LOG_SOFTMAX_BACKWARD;
                            k.problem.rows = k.shape.rows = shapes[s][0];
                            k.problem.classes = k.shape.classes = shapes[s][1];
                            k.problem.inner = k.shape.inner = shapes[s][2];
                            k.problem.pool = k.shape.pool = pool;
                            k.problem.logits = k.linear.hidden = in(kind_logits, dtype);
                            k.problem.targets = in(kind_targets, XENT_I64);
                            k.in_place = entry == KIND_IN_PLACE || entry == KIND_BACKWARD_IN_PLACE ||
                                         (softmax && option == 1);
                            if (!kind_strides(layout, &k.problem, 0, k.problem.logits.strides)) continue;
                            kind_strides(layout, &k.problem, 1, k.gradient.strides);
                            if (k.in_place && (layout > 3 || dtypes[d][0] != dtypes[d][1])) continue;
                            if (k.in_place) k.gradient.data = kind_logits;
                            if (softmax) {
                                if (option > 1 || dtypes[d][0] != dtypes[d][1]) continue;
                                k.problem.targets = in(kind_soft, dtype);
                                memcpy(k.problem.targets.strides, k.problem.logits.strides,
                                       sizeof k.problem.logits.strides);
                                k.option = option ? "in place" : "apart";
                            } else if (!kind_option(&k, option, layout)) {
                                continue;
                            } else if (kind_is_linear(k.entry) && !kind_linear(&k, layout, &k.problem)) {
                                continue;
                            }
                            if (number++ % step != 0) continue;
                            if ((k.problem.flags & XENT_FLAG_ACCUMULATE) | k.linear.flags)
                                kind_fill(kind_out, k.gradient.dtype, 0);
                            each(&k);
                            made++;
                            if (k.in_place) memcpy(kind_logits, kind_given, sizeof kind_logits);
                        }
        }
    }
    return made;
}

#endif
