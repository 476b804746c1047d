/* Which operands may share memory: inputs with inputs; the gradient with the logits if it is
 * exactly in place; column blocks of one matrix. Nothing else. */
#include "reference.h"

static void apart(struct fixture *f) {
    /* adjacent, without a gap */
    fixture_init(f);
    float both[2 * ROWS * CLASSES];
    memcpy(both, f->logits, sizeof f->logits);
    f->problem.logits.data = both;
    f->grad_logits.data = both + ROWS * CLASSES;
    WORKS(f, EVERY_ENTRY);
    fixture_init(f);
    memcpy(both + ROWS * CLASSES, f->logits, sizeof f->logits);
    f->problem.logits.data = both + ROWS * CLASSES;
    f->grad_logits.data = both;
    WORKS(f, EVERY_ENTRY);
    /* inputs may share */
    fixture_init(f);
    f->problem.row_weights.data = f->logits;
    f->problem.class_weights.data = f->row_weights;
    f->grad_output.data = f->class_weights;
    WORKS(f, EVERY_ENTRY);
    /* no rows, no elements, no overlap */
    fixture_init(f);
    f->problem.rows = 0;
    f->grad_logits.data = f->logits + 1;
    f->results.row_losses.data = f->lse;
    WORKS(f, EVERY_ENTRY);
}

static void gradient(struct fixture *f) {
    fixture_init(f);
    f->grad_logits.data = f->logits; /* exactly in place */
    WORKS(f, BACKWARD);
    fixture_init(f);
    f->grad_logits = out_rows(f->logits, XENT_F32, CLASSES); /* the same strides, spelt out */
    WORKS(f, FUSED);

    fixture_init(f);
    f->grad_logits.data = f->logits;
    f->problem.flags = XENT_FLAG_ACCUMULATE;
    FAILS(f, WITH_GRADIENT, XENT_ERR_OVERLAP, "grad_logits", "logits");
    /* shifted by one element, by one row, either way */
    static const int shifts[] = {1, CLASSES, -1, -CLASSES, (ROWS - 1) * CLASSES + CLASSES - 1};
    for (size_t k = 0; k < sizeof shifts / sizeof *shifts; k++) {
        float area[3 * ROWS * CLASSES] = {0}, before[3 * ROWS * CLASSES] = {0};
        fixture_init(f);
        f->problem.logits.data = area + ROWS * CLASSES;
        f->grad_logits.data = area + ROWS * CLASSES + shifts[k];
        FAILS(f, WITH_GRADIENT, XENT_ERR_OVERLAP, "grad_logits", "logits");
        CHECK_BYTES(area, before, sizeof area);
    }
    /* the same data with other strides is not in place */
    fixture_init(f);
    f->problem.rows = ROWS / 2;
    f->grad_logits = out_rows(f->logits, XENT_F32, CLASSES + 1);
    FAILS(f, WITH_GRADIENT, XENT_ERR_OVERLAP, "grad_logits", "logits");

    /* over every other input */
    struct { const char *name; void *data; } inputs[] = {
        {"targets", f->targets},         {"class_weights", f->class_weights}, {"row_weights", f->row_weights},
        {"row_mask", NULL},              {"grad_output", f->grad_output_values},
    };
    for (size_t k = 0; k < sizeof inputs / sizeof *inputs; k++) {
        fixture_init(f);
        /* these inputs are smaller than a gradient: let it be one row */
        f->problem.rows = 1;
        f->grad_logits.data = inputs[k].data;
        if (!inputs[k].data) {
            f->grad_logits.data = f->grad;
            f->problem.row_mask.data = f->grad + 2;
        }
        FAILS(f, WITH_GRADIENT, XENT_ERR_OVERLAP, "grad_logits", inputs[k].name);
    }
    fixture_init(f);
    f->problem.rows = 1;
    f->grad_logits.data = f->lse_in;
    FAILS(f, BACKWARD, XENT_ERR_OVERLAP, "grad_logits", "lse");
    /* over a result */
    fixture_init(f);
    f->problem.rows = 1;
    f->grad_logits.data = f->row_losses;
    FAILS(f, FUSED, XENT_ERR_OVERLAP, "grad_logits", "row_losses");
    fixture_init(f);
    f->problem.rows = 1;
    f->grad_logits.data = f->lse;
    FAILS(f, FUSED, XENT_ERR_OVERLAP, "grad_logits", "lse");
}

static void results(struct fixture *f) {
    fixture_init(f);
    f->results.row_losses.data = f->lse;
    FAILS(f, WITH_RESULTS, XENT_ERR_OVERLAP, "lse overlaps row_losses");
    fixture_init(f);
    f->results.loss = &f->lse[2];
    FAILS(f, WITH_RESULTS, XENT_ERR_OVERLAP, "loss", "lse");
    fixture_init(f);
    f->results.loss = f->normalizer;
    FAILS(f, WITH_RESULTS, XENT_ERR_OVERLAP, "loss", "normalizer");
    fixture_init(f);
    f->results.z_loss = &f->lse[2];
    FAILS(f, WITH_RESULTS, XENT_ERR_OVERLAP, "z_loss", "lse");
    fixture_init(f);
    f->results.z_normalizer = &f->lse[2];
    FAILS(f, WITH_RESULTS, XENT_ERR_OVERLAP, "z_normalizer", "lse");
    fixture_init(f);
    f->results.correct = (uint64_t *)(void *)&f->lse[2];
    FAILS(f, WITH_RESULTS, XENT_ERR_OVERLAP, "correct", "lse");
    fixture_init(f);
    f->results.kept_rows = (uint64_t *)(void *)f->loss;
    FAILS(f, WITH_RESULTS, XENT_ERR_OVERLAP, "kept_rows", "loss");
    /* over an input */
    fixture_init(f);
    f->results.row_losses = out(f->logits, XENT_F32);
    FAILS(f, WITH_RESULTS, XENT_ERR_OVERLAP, "row_losses", "logits");
    fixture_init(f);
    f->results.row_losses = out(f->row_weights, XENT_F32); /* the same elements, but different operands */
    FAILS(f, WITH_RESULTS, XENT_ERR_OVERLAP, "row_losses", "row_weights");
    fixture_init(f);
    f->results.lse = (double *)(void *)f->targets;
    FAILS(f, WITH_RESULTS, XENT_ERR_OVERLAP, "lse", "targets");
    fixture_init(f);
    f->grad_output.data = f->normalizer;
    FAILS(f, FUSED, XENT_ERR_OVERLAP, "normalizer", "grad_output");
}

/* logits and gradient as two blocks of columns of one matrix, `width` wide */
static void column_blocks(struct fixture *f) {
    enum { width = 2 * CLASSES + 2, size = (ROWS + 2) * width };
    static const struct { int logits, grad, apart; } blocks[] = {
        {0, CLASSES, 1},           /* adjacent columns */
        {0, CLASSES + 2, 1},       /* ... at the far end */
        {CLASSES, 0, 1},           /* in the other order */
        {0, width + CLASSES, 1},   /* ... and a row below */
        {0, CLASSES - 1, 0},       /* one column in common */
        {CLASSES - 1, 0, 0},
        {0, CLASSES + 3, 0},       /* one column over the edge, into the next row's logits */
        {0, width, 0},             /* a row below */
    };
    enum { cases = sizeof blocks / sizeof *blocks };
    /* in matrices at any address: only the distance counts */
    for (size_t turn = 0; turn < (size_t)width * cases; turn++) {
        size_t k = turn % cases;
        float area[size + width], before[size], *matrix = area + turn / cases;
        for (int i = 0; i < size; i++) matrix[i] = 0.25f * (float)(i % 7);
        memcpy(before, matrix, sizeof before);
        fixture_init(f);
        f->problem.logits = in_rows(matrix + blocks[k].logits, XENT_F32, width);
        f->grad_logits = out_rows(matrix + blocks[k].grad, XENT_F32, width);
        if (!blocks[k].apart) {
            FAILS(f, WITH_GRADIENT, XENT_ERR_OVERLAP, "grad_logits", "logits");
            CHECK_BYTES(matrix, before, sizeof before);
            continue;
        }
        WORKS(f, FUSED);
        xent_problem p = f->problem;
        p.logits = in_rows(before + blocks[k].logits, XENT_F32, width);
        struct expected e = reference(&p, &f->grad_output, f->grad_scale, NULL);
        check_grad(__FILE__, __LINE__, matrix + blocks[k].grad, width, e.grad, e.grad_terms, ROWS, CLASSES);
        /* every other element is as it was */
        for (int i = 0; i < ROWS; i++)
            memcpy(matrix + blocks[k].grad + i * width, before + blocks[k].grad + i * width,
                   CLASSES * sizeof(float));
        CHECK_BYTES(matrix, before, sizeof before);
        expected_free(&e);
    }
    /* two rows suffice */
    float matrix[size] = {0}, before[size] = {0};
    fixture_init(f);
    f->problem.rows = 2;
    f->problem.logits = in_rows(matrix, XENT_F32, width);
    f->grad_logits = out_rows(matrix + CLASSES, XENT_F32, width);
    WORKS(f, FUSED);
    memset(matrix, 0, sizeof matrix);
    /* halves and an f32 gradient, half of a row apart: blocks of two widths */
    fixture_init(f);
    f->problem.logits = in_rows(matrix, XENT_BF16, 4 * CLASSES);
    f->grad_logits = out_rows(matrix + (CLASSES + 1) / 2, XENT_F32, 2 * CLASSES);
    WORKS(f, FUSED);
    memset(matrix, 0, sizeof matrix);
    /* unequal row strides: only the spans count */
    fixture_init(f);
    f->problem.rows = 3;
    f->problem.logits = in_rows(matrix, XENT_F32, width);
    f->grad_logits = out_rows(matrix + CLASSES, XENT_F32, 2 * width);
    FAILS(f, WITH_GRADIENT, XENT_ERR_OVERLAP, "grad_logits", "logits");
    CHECK_BYTES(matrix, before, sizeof matrix);
}

int main(void) {
    struct fixture *f = checked(malloc(sizeof *f));
    apart(f);
    gradient(f);
    results(f);
    column_blocks(f);
    free(f);
    return report();
}
