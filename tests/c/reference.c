/* The reference itself: its gradients are the slopes of its loss, and its numbers those that PyTorch
 * prints. The library is not called. */
#include "reference.h"

enum { rows = 2, classes = 4, inner = 2, positions = rows * inner, count = positions * classes };

static double logits[count], probabilities[count], class_weights[classes], row_weights[positions];
static int64_t indices[positions];
static uint8_t mask[positions] = {1, 1, 0, 1};

/* One problem for each combination of these. */
enum { SOFT = 1, SMOOTH = 2, WEIGHTS = 4, MASK = 8, Z_LOSS = 16, SCALE = 32, CAP = 64, LOG_PROBS = 128, BONUS = 256, ALL = 512 };

static double loss_of(const xent_problem *p) {
    struct expected e = reference(p, NULL, 1, NULL);
    double loss = e.loss;
    expected_free(&e);
    return loss;
}

static void slopes(const xent_problem *p, double *values, const double *gradient) {
    const double step = 1e-5;
    for (size_t at = 0; at < count; at++) {
        double kept = values[at];
        values[at] = kept + step;
        double above = loss_of(p);
        values[at] = kept - step;
        double below = loss_of(p);
        values[at] = kept;
        CHECK_NEAR(gradient[at], (above - below) / (2 * step), 1e-8 * (1 + fabs(above)));
    }
}

static void gradients(void) {
    for (unsigned set = 0; set < ALL; set++)
        for (xent_reduction reduction = XENT_MEAN; reduction < XENT_NONE; reduction++) {
            if ((set & LOG_PROBS) && (set & (Z_LOSS | SCALE | CAP | BONUS))) continue;
            xent_problem p = XENT_PROBLEM_INIT;
            p.rows = rows;
            p.classes = classes;
            p.inner = inner;
            p.reduction = reduction;
            p.logits = in(logits, XENT_F64);
            p.targets = set & SOFT ? in(probabilities, XENT_F64) : in(indices, XENT_I64);
            if (set & SMOOTH) p.label_smoothing = 0.2;
            if (set & WEIGHTS) p.class_weights = in(class_weights, XENT_F64), p.row_weights = in(row_weights, XENT_F64);
            if (set & MASK) p.row_mask = in(mask, XENT_U8), p.normalizer = 2.5;
            if (set & Z_LOSS) p.z_loss = 0.3, p.z_normalizer = set & MASK ? 1.5 : 0;
            if (set & BONUS) p.entropy_bonus = -0.4;
            if (set & SCALE) p.logit_scale = 0.7;
            if (set & CAP) p.softcap = 2;
            if (set & LOG_PROBS) p.flags = XENT_FLAG_LOG_PROBS;
            int before = failures;
            struct expected e = reference(&p, NULL, 1, NULL);
            slopes(&p, logits, e.grad);
            if (set & SOFT) slopes(&p, probabilities, e.grad_targets);
            double sum = 0;
            for (size_t i = 0; i < positions; i++) sum += e.row_losses[i];
            if (reduction == XENT_SUM) CHECK_NEAR(e.loss, sum, 1e-12);
            expected_free(&e);
            if (failures != before) {
                fprintf(stderr, "... with options 0x%x, reduction %u\n", set, reduction);
                return;
            }
        }
}

static void softmax_family(void) {
    for (int log_of = 0; log_of < 2; log_of++) {
        double y[classes], grad_x[classes], above[classes], below[classes];
        const double step = 1e-5, *grad_y = row_weights;
        softmax_reference(logits, NULL, y, classes, 1, log_of, 0);
        softmax_reference(y, grad_y, grad_x, classes, 1, log_of, 1);
        for (int c = 0; c < classes; c++) {
            double kept = logits[c], slope = 0;
            logits[c] = kept + step;
            softmax_reference(logits, NULL, above, classes, 1, log_of, 0);
            logits[c] = kept - step;
            softmax_reference(logits, NULL, below, classes, 1, log_of, 0);
            logits[c] = kept;
            for (int o = 0; o < classes; o++) slope += grad_y[o] * (above[o] - below[o]) / (2 * step);
            CHECK_NEAR(grad_x[c], slope, 1e-9);
        }
    }
}

static void printed_by_pytorch(void) {
    const double x[4] = {0.1, 0.2, 0.3, 0.4};
    xent_problem p = XENT_PROBLEM_INIT;
    const int64_t zero = 0;
    p.rows = 1;
    p.classes = 4;
    p.logits = in(x, XENT_F64);
    p.targets = in(&zero, XENT_I64);
    CHECK_NEAR(loss_of(&p), 1.5425, 5e-5);
}

int main(void) {
    uint64_t state = 12;
    for (int i = 0; i < count; i++) {
        logits[i] = 6 * uniform(&state) - 3;
        probabilities[i] = uniform(&state) - 0.2;
    }
    for (int i = 0; i < positions; i++) {
        indices[i] = (int64_t)(random_u64(&state) % classes);
        row_weights[i] = 0.5 + uniform(&state);
    }
    for (int c = 0; c < classes; c++) class_weights[c] = 0.5 + uniform(&state);
    gradients();
    softmax_family();
    printed_by_pytorch();
    return report();
}
