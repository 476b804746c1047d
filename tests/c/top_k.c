/* top_classes, top_log_probs and target_ranks: against plain loops, by hand, each alone, and the errors of their
 * operands. */
#include "check.h"

static uint64_t state = 23;

/* An int64_t and a double for each element, and one more at both ends, which no call may write. */
struct listed {
    size_t rows, count, inner;
    int64_t *classes, *ranks;
    double *log_probs;
};

static struct listed listed(size_t rows, size_t count, size_t inner) {
    size_t all = rows * count * inner + 2;
    struct listed l = {rows, count, inner, poisoned(all * sizeof(int64_t)),
                       poisoned((rows * inner + 2) * sizeof(int64_t)), poisoned(all * sizeof(double))};
    return l;
}

static void ask(xent_results *r, const struct listed *l) {
    r->top_count = l->count;
    r->top_classes = l->classes + 1;
    r->top_log_probs = out(l->log_probs + 1, XENT_F64);
    r->target_ranks = l->ranks + 1;
}

static void untouched_ends(const struct listed *l) {
    size_t all = l->rows * l->count * l->inner, rows = l->rows * l->inner;
    int64_t poison;
    memset(&poison, POISON, sizeof poison);
    CHECK(l->classes[0] == poison && l->classes[all + 1] == poison);
    CHECK(l->ranks[0] == poison && l->ranks[rows + 1] == poison);
    CHECK(memcmp(&l->log_probs[0], &poison, sizeof poison) == 0);
    CHECK(memcmp(&l->log_probs[all + 1], &poison, sizeof poison) == 0);
}

static void listed_free(struct listed *l) {
    free(l->classes);
    free(l->ranks);
    free(l->log_probs);
}

/* Class a comes before class b of a row. */
static int precedes(const double *x, size_t a, size_t b) {
    if (isnan(x[a]) || isnan(x[b])) return isnan(x[a]) && (!isnan(x[b]) || a < b);
    return x[a] > x[b] || (!(x[a] < x[b]) && a < b);
}

/* The results of a call over [rows, classes, inner] in plain loops. Log-probabilities are those of logits times
 * `scale`, or the logits as they are with log_probs. */
static void check_listed(const xent_problem *p, const double *logits, const struct listed *l) {
    size_t rows = l->rows * l->inner, classes = p->classes;
    double *x = checked(malloc(classes * sizeof(double)));
    untouched_ends(l);
    for (size_t i = 0; i < rows; i++) {
        double max = -INFINITY, sum = 0, lse = 0;
        size_t last = classes;
        for (size_t c = 0; c < classes; c++) x[c] = logits[(i / p->inner * classes + c) * p->inner + i % p->inner];
        for (size_t c = 0; c < classes; c++) max = x[c] > max ? x[c] : max;
        for (size_t c = 0; c < classes; c++) sum += exp(p->logit_scale * (x[c] - max));
        if (!(p->flags & XENT_FLAG_LOG_PROBS)) lse = p->logit_scale * max + log(sum);
        for (size_t j = 0; j < l->count; j++) {
            size_t at = 1 + (i / p->inner * l->count + j) * p->inner + i % p->inner, next = classes;
            for (size_t c = 0; c < classes; c++)
                if ((last == classes || precedes(x, last, c)) && (next == classes || precedes(x, c, next))) next = c;
            CHECK_U64((uint64_t)l->classes[at], next);
            double tolerance = 1e-6 * (1 + fabs(lse) + fabs(x[next]));
            CHECK_NEAR(l->log_probs[at], p->logit_scale * x[next] - lse, tolerance);
            last = next;
        }
        if (p->targets.data) {
            int64_t y = ((const int64_t *)p->targets.data)[i], rank = y == p->ignore_index ? -1 : 0;
            for (size_t c = 0; c < classes && rank >= 0; c++) rank += precedes(x, c, (size_t)y);
            CHECK(l->ranks[1 + i] == rank);
        }
    }
    free(x);
}

/* Every dtype, few and many classes and positions, coarse logits with many ties; a forward, a fused call and one in
 * place, and without targets. */
static void against_loops(void) {
    static const struct { size_t rows, classes, inner, count; } shapes[] = {
        {1, 1, 1, 1},    {5, 2, 1, 2},      {7, 10, 1, 3},    {4, 63, 1, 63},  {4, 64, 1, 64},  {40, 100, 1, 64},
        {3, 300, 1, 5},  {9, 2049, 1, 64},  {20, 5000, 1, 7}, {1, 70001, 1, 9}, {3, 600, 4, 8}, {2, 21, 70, 21},
        {1, 1, 130, 1},  {2, 300, 19, 64},  {1, 600001, 1, 2}};
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (int d = 0; d < 4; d++)
            for (int log_probs = 0; log_probs < 2; log_probs++) {
                size_t rows = shapes[k].rows, classes = shapes[k].classes, inner = shapes[k].inner;
                size_t count = rows * classes * inner;
                if (sampled() && (size_t)(d + log_probs) % 4 != k % 4) continue;
                if (count > 100000 && (d > 1 || log_probs)) continue;
                xent_dtype dtype = every_float[d];
                void *logits = checked(malloc(count * size_of(dtype)));
                double *values = checked(malloc(count * sizeof(double)));
                int64_t *targets = checked(malloc(rows * inner * sizeof(int64_t)));
                for (size_t i = 0; i < count; i++)
                    values[i] = set(logits, dtype, (int64_t)i, floor(40 * uniform(&state) - 20) / 4);
                for (size_t i = 0; i < rows * inner; i++)
                    targets[i] = i % 5 == 3 ? -100 : (int64_t)(random_u64(&state) % classes);
                xent_problem p = packed(NULL, rows, classes, targets);
                p.inner = inner;
                p.logits = in(logits, dtype);
                if (log_probs) p.flags = XENT_FLAG_LOG_PROBS;
                else p.logit_scale = 0.5;
                for (int call = 0; call < 4; call++) {
                    struct listed l = listed(rows, shapes[k].count, inner);
                    xent_results r = XENT_RESULTS_INIT;
                    void *grad = copy_of(logits, count * size_of(dtype));
                    xent_output g = out(grad, dtype);
                    xent_problem q = p;
                    ask(&r, &l);
                    if (call == 0) CHECK_OK(xent_forward(&q, &r));
                    if (call == 1) CHECK_OK(xent_forward_backward(&q, NULL, 1, &r, &g));
                    if (call == 2) {
                        q.logits.data = grad;
                        CHECK_OK(xent_forward_backward(&q, NULL, 1, &r, &g));
                    }
                    if (call == 3) {
                        q.targets.data = NULL;
                        r.target_ranks = NULL;
                        CHECK_OK(xent_forward(&q, &r));
                    }
                    check_listed(&q, values, &l);
                    free(grad);
                    listed_free(&l);
                }
                free(logits);
                free(values);
                free(targets);
            }
}

/* NaN before infinity before numbers; zeros of either sign are equal; -inf comes last. */
static void by_hand(void) {
    enum { classes = 7 };
    const float x[2][classes] = {{1, NAN, -INFINITY, INFINITY, NAN, -0.0f, 0}, {2, -INFINITY, 3, 3, -INFINITY, 2, 3}};
    const int64_t expected[2][classes] = {{1, 4, 3, 0, 5, 6, 2}, {2, 3, 6, 0, 5, 1, 4}};
    for (int64_t y = 0; y < classes; y++) {
        const int64_t targets[2] = {y, y};
        int64_t top[2][classes], ranks[2];
        float log_probs[2][classes];
        xent_problem p = packed(x[0], 2, classes, targets);
        xent_results r = XENT_RESULTS_INIT;
        r.top_count = classes;
        r.top_classes = top[0];
        r.top_log_probs = out(log_probs, XENT_F32);
        r.target_ranks = ranks;
        CHECK_OK(xent_forward(&p, &r));
        CHECK_BYTES(top, expected, sizeof top);
        for (int i = 0; i < 2; i++) CHECK(expected[i][ranks[i]] == y);
        CHECK(isnan(log_probs[0][0]) && isnan(log_probs[0][6]));
        CHECK_NEAR(log_probs[1][0], -log(3 + 2 * exp(-1)), 1e-6);
        CHECK_NEAR(log_probs[1][6], -INFINITY, 0);
    }
}

/* Strides of the log-probabilities: what lies between is not written. */
static void strides(void) {
    const float x[2][3] = {{1, 3, 2}, {6, 5, 4}};
    double to[17];
    int64_t top[4];
    memset(to, POISON, sizeof to);
    unsigned char poison[sizeof(double)];
    memset(poison, POISON, sizeof poison);
    xent_problem p = packed(x[0], 2, 3, NULL);
    p.flags = XENT_FLAG_LOG_PROBS;
    xent_results r = XENT_RESULTS_INIT;
    r.top_count = 2;
    r.top_classes = top;
    r.top_log_probs = (xent_output){to, XENT_F64, {10, 3, 0}};
    CHECK_OK(xent_forward(&p, &r));
    for (int i = 0; i < 17; i++) {
        double expected = i == 0 ? 3 : i == 3 ? 2 : i == 10 ? 6 : 5;
        if (i == 0 || i == 3 || i == 10 || i == 13) CHECK_NEAR(to[i], expected, 0);
        else CHECK_BYTES(&to[i], poison, sizeof(double));
    }
    const int64_t classes[4] = {1, 2, 0, 1};
    CHECK_BYTES(top, classes, sizeof top);
}

/* A linear layer makes the same logits as the loop, whole numbers, and ranks them as they are before the scale. */
static void linear(void) {
    enum { rows = 50, classes = 700, features = 3, count = 6 };
    float hidden[rows * features], *weight = checked(malloc(classes * features * sizeof(float)));
    float *grad = checked(malloc(classes * features * sizeof(float)));
    double *values = checked(malloc(rows * classes * sizeof(double)));
    int64_t targets[rows];
    for (size_t i = 0; i < rows * features; i++) hidden[i] = (float)floor(8 * uniform(&state) - 4);
    for (size_t i = 0; i < classes * features; i++) weight[i] = (float)floor(8 * uniform(&state) - 4);
    for (size_t i = 0; i < rows * classes; i++) {
        values[i] = 0;
        for (size_t d = 0; d < features; d++)
            values[i] += hidden[i / classes * features + d] * weight[i % classes * features + d];
    }
    for (size_t i = 0; i < rows; i++) targets[i] = i % 7 == 2 ? -100 : (int64_t)(random_u64(&state) % classes);
    static const size_t workspaces[2] = {0, 64u << 20};
    for (int w = 0; w < 2; w++)
        for (int fused = 0; fused < 2; fused++) {
            struct listed l = listed(rows, count, 1);
            xent_problem p = packed(NULL, rows, classes, targets);
            xent_linear layer = XENT_LINEAR_INIT;
            xent_linear_grads grads = XENT_LINEAR_GRADS_INIT;
            xent_results r = XENT_RESULTS_INIT;
            p.logit_scale = 0.5;
            layer.features = features;
            layer.hidden = in(hidden, XENT_F32);
            layer.weight = in(weight, XENT_F32);
            layer.workspace = workspaces[w];
            grads.weight = out(grad, XENT_F32);
            ask(&r, &l);
            if (fused) CHECK_OK(xent_linear_forward_backward(&p, &layer, NULL, 1, &r, &grads));
            else CHECK_OK(xent_linear_forward(&p, &layer, &r));
            check_listed(&p, values, &l);
            /* ranks alone: ignored rows are left out of the products, and get -1 all the same */
            r.top_classes = NULL;
            r.top_log_probs.data = NULL;
            memset(l.ranks + 1, 0, rows * sizeof(int64_t));
            CHECK_OK(xent_linear_forward(&p, &layer, &r));
            check_listed(&p, values, &l);
            listed_free(&l);
        }
    free(weight);
    free(grad);
    free(values);
}

/* Each result has the same bits whichever others the call asks for, and changes none of these. */
static void each_alone(void) {
    struct fixture whole, bare;
    int64_t top[ROWS * 2], alone[ROWS * 2], ranks[ROWS], ranks_alone[ROWS];
    float log_probs[ROWS * 2], log_probs_alone[ROWS * 2];
    fixture_init(&bare);
    WORKS(&bare, FUSED);
    fixture_init(&whole);
    whole.results.top_count = 2;
    whole.results.top_classes = top;
    whole.results.top_log_probs = out(log_probs, XENT_F32);
    whole.results.target_ranks = ranks;
    WORKS(&whole, FUSED);
    CHECK_BYTES(whole.loss, bare.loss, sizeof bare.loss);
    CHECK_BYTES(whole.row_losses, bare.row_losses, sizeof bare.row_losses);
    CHECK_BYTES(whole.lse, bare.lse, sizeof bare.lse);
    CHECK_BYTES(whole.grad, bare.grad, sizeof bare.grad);
    for (int which = 0; which < 3; which++) {
        struct fixture f;
        fixture_init(&f);
        const xent_results none = XENT_RESULTS_INIT;
        f.results = none;
        f.results.top_count = 2; /* which alone asks for nothing */
        if (which == 0) f.results.top_classes = alone;
        if (which == 1) f.results.top_log_probs = out(log_probs_alone, XENT_F32);
        if (which == 2) f.results.target_ranks = ranks_alone;
        WORKS(&f, FUSED);
    }
    CHECK_BYTES(alone, top, sizeof top);
    CHECK_BYTES(log_probs_alone, log_probs, sizeof log_probs);
    CHECK_BYTES(ranks_alone, ranks, sizeof ranks);
    CHECK(ranks[1] == -1 && ranks[2] == -1 && ranks[0] >= 0); /* by the mask, by ignore_index */
    fixture_init(&bare);
    bare.results.top_count = 65; /* no list is asked for */
    WORKS(&bare, WITH_RESULTS);
}

static void refusals(void) {
    struct {
        struct fixture f;
        int64_t top[ROWS * CLASSES + 1], ranks[ROWS + 1];
        double log_probs[ROWS * CLASSES + 1];
    } all, before;
#define REFUSED(entries, change, status, ...)                 \
    memset(&all, POISON, sizeof all);                         \
    fixture_init(&all.f);                                     \
    all.f.results.top_count = 3;                              \
    all.f.results.top_classes = all.top;                      \
    all.f.results.top_log_probs = out(all.log_probs, XENT_F64); \
    all.f.results.target_ranks = all.ranks;                   \
    change;                                                   \
    memcpy(&before, &all, sizeof all);                        \
    FAILS(&all.f, entries, status, __VA_ARGS__);              \
    CHECK_BYTES(all.top, before.top, sizeof all.top);         \
    CHECK_BYTES(all.ranks, before.ranks, sizeof all.ranks);   \
    CHECK_BYTES(all.log_probs, before.log_probs, sizeof all.log_probs)
    xent_results *r = &all.f.results;
    REFUSED(WITH_RESULTS, r->top_count = 0, XENT_ERR_PARAM, "top_classes is given, but top_count = 0");
    REFUSED(WITH_RESULTS, (r->top_count = 0, r->top_classes = NULL), XENT_ERR_PARAM, "top_log_probs", "top_count = 0");
    REFUSED(WITH_RESULTS, r->top_count = CLASSES + 1, XENT_ERR_PARAM, "top_count = 6 exceeds classes = 5");
    REFUSED(WITH_RESULTS, r->top_count = 65, XENT_ERR_PARAM, "top_count = 65 exceeds 64");
    REFUSED(WITH_RESULTS, r->top_count = SIZE_MAX, XENT_ERR_PARAM, "top_count");
    REFUSED(WITH_RESULTS, fixture_soften(&all.f), XENT_ERR_PARAM, "target_ranks needs targets that are class indices");
    REFUSED(WITH_RESULTS, all.f.problem.targets.data = NULL, XENT_ERR_NULL, "targets");
    REFUSED(WITH_RESULTS, r->top_log_probs.dtype = XENT_BF16, XENT_ERR_DTYPE, "top_log_probs", "BF16");
    REFUSED(WITH_RESULTS, r->top_log_probs.dtype = XENT_I64, XENT_ERR_DTYPE, "top_log_probs");
    REFUSED(WITH_RESULTS, r->top_log_probs.strides[0] = -2, XENT_ERR_STRIDE, "top_log_probs", "-2");
    REFUSED(WITH_RESULTS, (r->top_log_probs.strides[0] = 2, r->top_log_probs.strides[1] = 1), XENT_ERR_STRIDE,
            "top_log_probs");
    REFUSED(WITH_RESULTS, r->top_log_probs.data = (char *)all.log_probs + 4, XENT_ERR_ALIGN, "top_log_probs");
    REFUSED(WITH_RESULTS, r->top_log_probs.data = all.f.lse, XENT_ERR_OVERLAP, "top_log_probs", "lse");
    REFUSED(WITH_RESULTS, r->top_classes = all.f.targets, XENT_ERR_OVERLAP, "top_classes", "targets");
    REFUSED(WITH_RESULTS, r->target_ranks = all.top + 2, XENT_ERR_OVERLAP, "target_ranks", "top_classes");
    REFUSED(WITH_RESULTS, all.f.targets[5] = CLASSES, XENT_ERR_TARGET, "targets[5] = 5 is outside [0, 5)");
    uintptr_t odd;
#define MISALIGNED(member, of)      \
    odd = (uintptr_t)all.of + 4;    \
    REFUSED(WITH_RESULTS, memcpy(&r->member, &odd, sizeof odd), XENT_ERR_ALIGN, #member)
    MISALIGNED(top_classes, top);
    MISALIGNED(target_ranks, ranks);
#undef MISALIGNED
#undef REFUSED
}

/* Merged states do not know the order of the logits. */
static void no_merged_states(void) {
    const int64_t targets[2] = {0, 1};
    int64_t top[2] = {7, 7}, ranks[2] = {7, 7};
    double log_probs[2] = {7, 7};
    xent_partial merged[2] = {XENT_PARTIAL_INIT, XENT_PARTIAL_INIT};
    xent_problem p = packed(NULL, 2, 3, targets);
    for (int which = 0; which < 3; which++) {
        static const char *const names[3] = {"top_classes", "top_log_probs", "target_ranks"};
        xent_results r = XENT_RESULTS_INIT;
        if (which < 2) r.top_count = 1;
        if (which == 0) r.top_classes = top;
        if (which == 1) r.top_log_probs = out(log_probs, XENT_F64);
        if (which == 2) r.target_ranks = ranks;
        CHECK_STATUS(xent_partial_finish(&p, 3, merged, &r), XENT_ERR_PARAM);
        CHECK_MENTIONS(xent_last_error(), names[which]);
    }
    CHECK(top[0] == 7 && ranks[0] == 7 && log_probs[0] == 7);
}

/* The same bits for any number of threads, also when threads share a row. */
static void threads(void) {
    static const struct { size_t rows, classes; } shapes[] = {{300, 5000}, {20000, 10}, {1, 1000001}};
    for (int k = 0; k < 3; k++) {
        size_t rows = shapes[k].rows, classes = shapes[k].classes;
        if (sampled() && k == 0) continue;
        float *logits = checked(malloc(rows * classes * sizeof(float)));
        int64_t *targets = checked(malloc(rows * sizeof(int64_t)));
        struct listed l[2] = {listed(rows, 9, 1), listed(rows, 9, 1)};
        for (size_t i = 0; i < rows * classes; i++) logits[i] = floorf((float)(200 * uniform(&state))) / 16;
        for (size_t i = 0; i < rows; i++) targets[i] = (int64_t)(random_u64(&state) % classes);
        for (uint32_t many = 0; many < 2; many++) {
            xent_problem p = packed(logits, rows, classes, targets);
            p.threads = many ? 3 : 1;
            xent_results r = XENT_RESULTS_INIT;
            ask(&r, &l[many]);
            CHECK_OK(xent_forward(&p, &r));
            untouched_ends(&l[many]);
        }
        CHECK_BYTES(l[1].classes, l[0].classes, (rows * 9 + 2) * sizeof(int64_t));
        CHECK_BYTES(l[1].log_probs, l[0].log_probs, (rows * 9 + 2) * sizeof(double));
        CHECK_BYTES(l[1].ranks, l[0].ranks, (rows + 2) * sizeof(int64_t));
        for (int many = 0; many < 2; many++) listed_free(&l[many]);
        free(logits);
        free(targets);
    }
}

int main(void) {
    against_loops();
    by_hand();
    strides();
    linear();
    each_alone();
    refusals();
    no_merged_states();
    threads();
    return report();
}
