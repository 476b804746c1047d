/* The causal shift of a language model without a copy: position t of a sequence predicts token t + 1. The rows are the
 * sequences, the inner positions all but the last of each, and the strides step over the last. */
#include "check.h"

static uint64_t state = 5;

static void shifted(size_t sequences, size_t length, size_t classes, size_t pitch, int in_place) {
    size_t positions = length - 1, count = sequences * length * pitch, size = count * sizeof(float);
    float *logits = poisoned(size), *grad = poisoned(size);
    int64_t *tokens = checked(malloc(sequences * length * sizeof *tokens));
    /* the copy: the logits of all positions but the last, row after row, and the token after each */
    float *dense = checked(malloc(sequences * positions * classes * sizeof(float)));
    float *dense_grad = checked(malloc(sequences * positions * classes * sizeof(float)));
    int64_t *next = checked(malloc(sequences * positions * sizeof *next));
    for (size_t i = 0; i < sequences * length; i++) {
        fill(logits + i * pitch, classes, -4, 4, &state);
        tokens[i] = i % 5 == 4 ? -100 : (int64_t)(random_u64(&state) % classes);
    }
    for (size_t b = 0; b < sequences; b++)
        for (size_t t = 0; t < positions; t++) {
            size_t row = b * positions + t;
            memcpy(dense + row * classes, logits + (b * length + t) * pitch, classes * sizeof(float));
            next[row] = tokens[b * length + t + 1];
        }
    if (in_place) memcpy(grad, logits, size);
    float *before = copy_of(grad, size);

    double loss = 0, expected = 0;
    double *lse = poisoned(sequences * positions * sizeof(double)), *dense_lse = poisoned(sequences * positions * sizeof(double));
    xent_problem p = XENT_PROBLEM_INIT, q = packed(dense, sequences * positions, classes, next);
    xent_results r = XENT_RESULTS_INIT, s = XENT_RESULTS_INIT;
    xent_output g = {grad, XENT_F32, {(int64_t)(length * pitch), 1, (int64_t)pitch}};
    p.rows = sequences, p.classes = classes, p.inner = positions;
    p.logits = (xent_input){in_place ? grad : logits, XENT_F32, {(int64_t)(length * pitch), 1, (int64_t)pitch}};
    p.targets = (xent_input){tokens + 1, XENT_I64, {(int64_t)length, 0, 1}};
    r.loss = &loss, r.lse = lse;
    CHECK_OK(xent_forward_backward(&p, NULL, 1.0, &r, &g));

    xent_output dense_out = out(dense_grad, XENT_F32);
    s.loss = &expected, s.lse = dense_lse;
    CHECK_OK(xent_forward_backward(&q, NULL, 1.0, &s, &dense_out));
    CHECK_NEAR(loss, expected, 1e-12 * (1 + fabs(expected)));
    CHECK_BYTES(lse, dense_lse, sequences * positions * sizeof(double));
    for (size_t b = 0; b < sequences; b++)
        for (size_t t = 0; t < length; t++) {
            size_t at = (b * length + t) * pitch;
            if (t < positions) CHECK_BYTES(grad + at, dense_grad + (b * positions + t) * classes, classes * sizeof(float));
            else CHECK_BYTES(grad + at, before + at, classes * sizeof(float)); /* the last position: not touched */
            CHECK_BYTES(grad + at + classes, before + at + classes, (pitch - classes) * sizeof(float));
        }
    free(logits), free(grad), free(tokens), free(dense), free(dense_grad), free(next), free(before), free(lse), free(dense_lse);
}

int main(void) {
    for (int in_place = 0; in_place < 2; in_place++) {
        shifted(3, 7, 1000, 1000, in_place);
        shifted(3, 7, 1000, 1003, in_place);
        shifted(2, 2, 300, 304, in_place); /* one position */
        shifted(1, 9, 300, 300, in_place); /* one sequence */
        shifted(4, 5, 3, 4, in_place);     /* few classes */
        if (!sampled()) shifted(2, 40, 50257, 50304, in_place);
    }
    return report();
}
