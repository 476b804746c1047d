/* Every pointer of every entry, NULL. */
#include "check.h"

/* A required pointer: the call fails and names it. */
static void required(struct fixture *f) {
    fixture_init(f);
    f->problem_arg = NULL;
    FAILS(f, EVERY_ENTRY, XENT_ERR_NULL, "problem");
    fixture_init(f);
    f->results_arg = NULL;
    FAILS(f, FORWARD, XENT_ERR_NULL, "results");
    fixture_init(f);
    f->lse_arg = NULL;
    FAILS(f, BACKWARD, XENT_ERR_NULL, "lse");
    fixture_init(f);
    f->grad_logits_arg = NULL;
    FAILS(f, WITH_GRADIENT, XENT_ERR_NULL, "grad_logits");
    fixture_init(f);
    f->grad_logits.data = NULL;
    FAILS(f, WITH_GRADIENT, XENT_ERR_NULL, "grad_logits");
    fixture_init(f);
    f->problem.logits.data = NULL;
    FAILS(f, EVERY_ENTRY, XENT_ERR_NULL, "logits");
    fixture_init(f);
    f->problem.targets.data = NULL;
    FAILS(f, EVERY_ENTRY, XENT_ERR_NULL, "targets");
}

/* Without targets there is an lse; each result that needs them fails on its own. */
static void targets_absent(struct fixture *f) {
    for (int wanted = 0; wanted < 5; wanted++) {
        fixture_init(f);
        f->problem.targets.data = NULL;
        double *loss = f->results.loss, *normalizer = f->results.normalizer;
        uint64_t *kept_rows = f->results.kept_rows;
        xent_output row_losses = f->results.row_losses;
        f->results.loss = f->results.normalizer = NULL;
        f->results.kept_rows = NULL;
        f->results.row_losses.data = NULL;
        switch (wanted) {
        case 0: break;
        case 1: f->results.loss = loss; break;
        case 2: f->results.normalizer = normalizer; break;
        case 3: f->results.kept_rows = kept_rows; break;
        case 4: f->results.row_losses = row_losses; break;
        }
        if (wanted == 0) {
            WORKS(f, FORWARD);
            for (int i = 0; i < ROWS; i++) CHECK_NEAR(f->lse[i], f->lse_in[i], 1e-6);
            FAILS(f, WITH_GRADIENT, XENT_ERR_NULL, "targets");
        } else {
            FAILS(f, EVERY_ENTRY, XENT_ERR_NULL, "targets");
        }
    }
}

/* An optional pointer: the call works, and what it does write is what it wrote before. */
static void optional(struct fixture *f) {
    struct fixture whole;
    fixture_init(&whole);
    WORKS(&whole, FUSED);
    for (int absent = 0; absent < 7; absent++) {
        fixture_init(f);
        switch (absent) {
        case 0: f->results.loss = NULL; break;
        case 1: f->results.row_losses.data = NULL; break;
        case 2: f->results.lse = NULL; break;
        case 3: f->results.normalizer = NULL; break;
        case 4: f->results.kept_rows = NULL; break;
        case 5: f->results_arg = NULL; break;
        case 6: f->problem.pool = NULL; break;
        }
        WORKS(f, FUSED);
        unsigned char poison[sizeof f->row_losses];
        memset(poison, POISON, sizeof poison);
        int none = absent == 5;
#define SAME(member, without) \
    CHECK_BYTES(f->member, none || absent == without ? (const void *)poison : (const void *)whole.member, \
                sizeof f->member)
        SAME(loss, 0);
        SAME(row_losses, 1);
        SAME(lse, 2);
        SAME(normalizer, 3);
        SAME(kept_rows, 4);
#undef SAME
        CHECK_BYTES(f->grad, whole.grad, sizeof f->grad);
    }
    for (int absent = 0; absent < 3; absent++) {
        fixture_init(f);
        if (absent == 0) f->problem.class_weights.data = NULL;
        if (absent == 1) f->problem.row_weights.data = NULL;
        if (absent == 2) f->problem.row_mask.data = NULL;
        WORKS(f, EVERY_ENTRY);
        CHECK(f->loss[0] < whole.loss[0] || f->loss[0] > whole.loss[0]);
    }
    /* no grad_output, as a pointer or as an absent operand, is 1 */
    struct fixture one;
    fixture_init(&one);
    one.grad_output_values[0] = 1;
    fixture_init(f);
    f->grad_output_values[0] = 1;
    for (int absent = 0; absent < 2; absent++) {
        WORKS(&one, BACKWARD);
        if (absent) f->grad_output_arg = NULL;
        else f->grad_output.data = NULL;
        WORKS(f, BACKWARD);
        CHECK_BYTES(f->grad, one.grad, sizeof f->grad);
        WORKS(&one, FUSED);
        WORKS(f, FUSED);
        CHECK_BYTES(f->grad, one.grad, sizeof f->grad);
    }
}

/* An operand without elements may have any data. */
static void no_rows(struct fixture *f) {
    fixture_init(f);
    f->problem.rows = 0;
    f->problem.logits.data = f->problem.targets.data = NULL;
    f->problem.row_weights.data = f->problem.row_mask.data = NULL;
    f->results.row_losses.data = f->grad_logits.data = NULL;
    f->results.lse = NULL;
    f->lse_arg = NULL;
    WORKS(f, EVERY_ENTRY);
    CHECK_NEAR(f->loss[0], NAN, 0);
    CHECK_U64(f->kept_rows[0], 0);
}

int main(void) {
    struct fixture *f = checked(malloc(sizeof *f));
    required(f);
    targets_absent(f);
    optional(f);
    no_rows(f);
    xent_pool_free(NULL);
    free(f);
    return report();
}
