/* The examples of PyTorch's introductions, with the figures they print. */
#include "check.h"

static const float logits[4] = {0.1f, 0.2f, 0.3f, 0.4f};

static double loss_of(const xent_problem *p) {
    double loss = -7;
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &loss;
    CHECK_OK(xent_forward(p, &r));
    return loss;
}

static void cross_entropy(void) {
    const int64_t target = 0;
    xent_problem p = packed(logits, 1, 4, &target);
    CHECK_NEAR(loss_of(&p), 1.5425, 5e-5);
    p.reduction = XENT_SUM;
    CHECK_NEAR(loss_of(&p), 1.5425, 5e-5);
    p.ignore_index = 0;
    CHECK_NEAR(loss_of(&p), 0, 0);
    p.reduction = XENT_MEAN;
    CHECK_NEAR(loss_of(&p), NAN, 0);
}

static void nll(void) {
    const float log_probs[3] = {0.1f, 0.2f, 0.3f};
    const int64_t target = 2;
    xent_problem p = packed(log_probs, 1, 3, &target);
    p.flags = XENT_FLAG_LOG_PROBS;
    CHECK_NEAR(loss_of(&p), -0.3, 1e-7);
}

/* CrossEntropyLoss = LogSoftmax + NLLLoss = log of Softmax + NLLLoss = -sum one-hot * log-softmax / N,
 * and so are their gradients. */
static void one_loss_in_four_ways(void) {
    enum { rows = 3, classes = 5, count = rows * classes };
    float x[count], log_softmax[count], log_of_softmax[count], one_hot[count] = {0};
    const int64_t targets[rows] = {1, 0, 4};
    uint64_t state = 30;
    fill(x, count, -2, 2, &state);
    for (int i = 0; i < rows; i++) one_hot[i * classes + (int)targets[i]] = 1;

    xent_problem p = packed(x, rows, classes, targets);
    double loss = loss_of(&p);

    xent_shape shape = XENT_SHAPE_INIT;
    shape.rows = rows;
    shape.classes = classes;
    xent_input from = in(x, XENT_F32);
    xent_output to = out(log_softmax, XENT_F32);
    CHECK_OK(xent_log_softmax(&shape, &from, &to));
    to.data = log_of_softmax;
    CHECK_OK(xent_softmax(&shape, &from, &to));
    for (int i = 0; i < count; i++) {
        log_of_softmax[i] = logf(log_of_softmax[i]);
        CHECK_NEAR(log_of_softmax[i], log_softmax[i], 1e-6);
    }

    xent_problem nll = packed(log_softmax, rows, classes, targets);
    nll.flags = XENT_FLAG_LOG_PROBS;
    CHECK_NEAR(loss_of(&nll), loss, 1e-6);
    nll.logits.data = log_of_softmax;
    CHECK_NEAR(loss_of(&nll), loss, 1e-6);

    double by_hand = 0;
    for (int i = 0; i < count; i++) by_hand -= (double)one_hot[i] * (double)log_softmax[i] / rows;
    CHECK_NEAR(by_hand, loss, 1e-6);

    xent_problem soft = p;
    soft.targets = in(one_hot, XENT_F32);
    CHECK_NEAR(loss_of(&soft), loss, 1e-6);
    nll.logits.data = log_softmax;
    nll.targets = in(one_hot, XENT_F32);
    CHECK_NEAR(loss_of(&nll), loss, 1e-6);

    /* backwards, through both layers and at once */
    float at_once[count], at_log_probs[count], through[count];
    xent_output g = out(at_once, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, NULL, &g));
    nll.targets = in(targets, XENT_I64);
    g.data = at_log_probs;
    CHECK_OK(xent_backward(&nll, NULL, NULL, 1, &g));
    xent_input y = in(log_softmax, XENT_F32), grad_y = in(at_log_probs, XENT_F32);
    xent_output grad_x = out(through, XENT_F32);
    CHECK_OK(xent_log_softmax_backward(&shape, &y, &grad_y, &grad_x));
    for (int i = 0; i < count; i++) {
        CHECK_NEAR(at_log_probs[i], one_hot[i] > 0 ? -1.0 / rows : 0, 1e-8);
        CHECK_NEAR(through[i], at_once[i], 1e-7);
    }
    float *in_place = log_of_softmax; /* its softmax once more: d/dx of ln softmax */
    to.data = in_place;
    CHECK_OK(xent_softmax(&shape, &from, &to));
    y.data = in_place;
    for (int i = 0; i < count; i++) at_log_probs[i] /= in_place[i];
    CHECK_OK(xent_softmax_backward(&shape, &y, &grad_y, &grad_x));
    for (int i = 0; i < count; i++) CHECK_NEAR(through[i], at_once[i], 1e-6);
}

int main(void) {
    cross_entropy();
    nll();
    one_loss_in_four_ways();
    return report();
}
