/* The header: complete on its own, includable twice and in two units, its initialisers usable at
 * file scope, its constants in the preprocessor. Linked with parts/header.c. */
#include "xent.h"
#include "xent.h"

#include "check.h"

static xent_problem at_file_scope = XENT_PROBLEM_INIT;
static const xent_results results_at_file_scope = XENT_RESULTS_INIT;
static xent_shape shape_at_file_scope = XENT_SHAPE_INIT;

#if XENT_OK != 0 || XENT_ERR_PANIC != 10 || XENT_ERR_MEMORY != 11 || XENT_F32 != 0 || XENT_U32 != 20 || \
    XENT_NONE != 2
#error "a constant has another value than the first release gave it"
#endif
#if XENT_FLAG_LOG_PROBS != 1 || XENT_FLAG_EMPTY_IS_ZERO != 2 || XENT_FLAG_ACCUMULATE != 4 || \
    XENT_FLAG_ZERO_PADDING != 8
#error "a flag has another value than the first release gave it"
#endif
_Static_assert(XENT_F64 == 1 && XENT_BF16 == 2 && XENT_F16 == 3 && XENT_I64 == 16 && XENT_I32 == 17 &&
                   XENT_U8 == 18 && XENT_U16 == 19 && XENT_MEAN == 0 && XENT_SUM == 1,
               "constants are ABI");
_Static_assert(sizeof(xent_status) == 4 && sizeof(xent_dtype) == 4 && sizeof(xent_reduction) == 4,
               "enumerations cross as 32-bit integers");
_Static_assert(sizeof(xent_input) == sizeof(xent_output), "one layout");
_Static_assert(sizeof(xent_problem) >= 304 && sizeof(xent_results) >= 152 && sizeof(xent_shape) >= 48,
               "structs only grow");

xent_problem problem_from_the_other_unit(void);
xent_status forward_from_the_other_unit(const xent_problem *problem, const xent_results *results);

static void defaults(const xent_problem *p) {
    CHECK_U64(p->struct_size, sizeof *p);
    CHECK_U64(p->flags, 0);
    CHECK_U64(p->rows, 0);
    CHECK_U64(p->classes, 0);
    CHECK_U64(p->inner, 1);
    CHECK(!p->logits.data && !p->targets.data && !p->class_weights.data && !p->row_weights.data && !p->row_mask.data);
    for (int axis = 0; axis < 3; axis++) {
        CHECK(p->logits.strides[axis] == 0 && p->targets.strides[axis] == 0 && p->class_weights.strides[axis] == 0);
        CHECK(p->row_weights.strides[axis] == 0 && p->row_mask.strides[axis] == 0);
    }
    CHECK(p->ignore_index == -100);
    CHECK_NEAR(p->label_smoothing, 0, 0);
    CHECK_NEAR(p->z_loss, 0, 0);
    CHECK_NEAR(p->softcap, 0, 0);
    CHECK_NEAR(p->logit_scale, 1, 0);
    CHECK_NEAR(p->normalizer, 0, 0);
    CHECK_NEAR(p->z_normalizer, 0, 0);
    CHECK_U64(p->reduction, XENT_MEAN);
    CHECK_U64(p->threads, 0);
    CHECK(p->pool == NULL);
    CHECK_NEAR(p->entropy_bonus, 0, 0);
}

int main(void) {
    xent_problem local = XENT_PROBLEM_INIT, other = problem_from_the_other_unit();
    defaults(&at_file_scope);
    defaults(&local);
    defaults(&other);
    const xent_results *r = &results_at_file_scope;
    CHECK_U64(r->struct_size, sizeof *r);
    CHECK(!r->loss && !r->row_losses.data && !r->lse && !r->z_loss && !r->normalizer && !r->z_normalizer);
    CHECK(!r->kept_rows && !r->argmax && !r->correct && !r->entropy.data && !r->entropy_bonus);
    CHECK(!r->kept_rows && !r->argmax && !r->correct && !r->entropy.data);
    CHECK(!r->top_classes && !r->top_log_probs.data && r->top_count == 0 && !r->target_ranks);

    const xent_shape shape = XENT_SHAPE_INIT, *shapes[2] = {&shape, &shape_at_file_scope};
    for (int k = 0; k < 2; k++) {
        CHECK_U64(shapes[k]->struct_size, sizeof(xent_shape));
        CHECK(shapes[k]->flags == 0 && shapes[k]->rows == 0 && shapes[k]->classes == 0 && shapes[k]->inner == 1);
        CHECK(shapes[k]->threads == 0 && shapes[k]->pool == NULL);
    }

    struct fixture f;
    fixture_init(&f);
    CHECK_OK(forward_from_the_other_unit(&f.problem, &f.results));

    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", (int)XENT_VERSION_MAJOR, (int)XENT_VERSION_MINOR,
             (int)XENT_VERSION_PATCH);
    CHECK_TEXT(xent_version(), version);
    return report();
}
