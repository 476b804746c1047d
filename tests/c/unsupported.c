/* What the contract promises and this version cannot do yet: a plain error, never a wrong answer.
 * A case leaves this file when its feature arrives. */
#include "check.h"

int main(void) {
    struct fixture f;
#define NOT_YET(change, entries, status, word) \
    fixture_init(&f);                          \
    change;                                    \
    FAILS(&f, entries, status, word)
    /* logits of other types: aligned for f64, so that the dtype is all there is to say */
    NOT_YET(f.problem.logits = in(f.lse_in, XENT_F64); f.problem.rows = 1, FORWARD, XENT_ERR_DTYPE, "logits");
    NOT_YET(f.problem.targets = in(f.logits, XENT_F32), EVERY_ENTRY, XENT_ERR_DTYPE, "targets");

    NOT_YET(f.problem.inner = 2; f.problem.rows = 2, EVERY_ENTRY, XENT_ERR_SHAPE, "inner");
    NOT_YET(f.problem.rows = 1; f.problem.logits = ((xent_input){f.logits, XENT_F32, {10, 2, 1}}), EVERY_ENTRY,
            XENT_ERR_STRIDE, "logits");
    NOT_YET(f.problem.rows = 1; f.grad_logits = ((xent_output){f.grad, XENT_F32, {10, 2, 1}}), WITH_GRADIENT,
            XENT_ERR_STRIDE, "grad_logits");

    NOT_YET(f.problem.z_loss = 1e-4, EVERY_ENTRY, XENT_ERR_PARAM, "z_loss");
    NOT_YET(f.problem.softcap = 30, EVERY_ENTRY, XENT_ERR_PARAM, "softcap");
    NOT_YET(f.problem.logit_scale = 2, EVERY_ENTRY, XENT_ERR_PARAM, "logit_scale");
    NOT_YET(f.problem.flags = XENT_FLAG_LOG_PROBS; f.results.lse = NULL, EVERY_ENTRY, XENT_ERR_PARAM, "");

    int64_t argmax[ROWS];
    uint64_t correct;
    double z_loss, entropy[ROWS];
    NOT_YET(f.results.argmax = argmax, WITH_RESULTS, XENT_ERR_PARAM, "argmax");
    NOT_YET(f.results.correct = &correct, WITH_RESULTS, XENT_ERR_PARAM, "correct");
    NOT_YET(f.results.z_loss = &z_loss, WITH_RESULTS, XENT_ERR_PARAM, "z_loss");
    NOT_YET(f.results.entropy = out(entropy, XENT_F64), WITH_RESULTS, XENT_ERR_PARAM, "entropy");
    return report();
}
