/* A call with several faults reports the first in a fixed order. The test starts with all faults and
 * removes them one by one, in that order. */
#include "check.h"

int main(void) {
    for (unsigned bit = FORWARD; bit <= FUSED; bit <<= 1) {
        enum entry entry = (enum entry)bit;
        struct fixture f, good;
        fixture_init(&f);
        fixture_init(&good);
        f.problem.flags = 0x80000000u;
        f.problem.logits.data = NULL;
        f.results_arg = NULL; /* required by forward alone */
        f.grad_logits_arg = NULL;
        f.problem.row_weights.dtype = XENT_I32;
        f.problem.classes = 0;
        f.problem.targets.strides[0] = -1;
        f.problem.class_weights.data = (const char *)f.class_weights + 1;
        f.results.normalizer = f.loss;
        f.grad_logits.data = f.logits + 1;
        f.problem.label_smoothing = 2;
        f.targets[3] = 99;

        FAILS(&f, entry, XENT_ERR_STRUCT, "flags");
        f.problem.flags = 0;
        f.problem.struct_size = 0;
        FAILS(&f, entry, XENT_ERR_STRUCT, "struct_size");
        f.problem.struct_size = good.problem.struct_size;
        if (entry != BACKWARD) {
            f.results_arg = &f.results;
            f.results.struct_size = 1;
            FAILS(&f, entry, XENT_ERR_STRUCT, "struct_size");
            f.results.struct_size = good.results.struct_size;
        }

        if (entry == FORWARD) {
            f.results_arg = NULL;
            FAILS(&f, entry, XENT_ERR_NULL, "");
            f.results_arg = &f.results;
        } else {
            FAILS(&f, entry, XENT_ERR_NULL, "");
            f.grad_logits_arg = &f.grad_logits;
        }
        FAILS(&f, entry, XENT_ERR_NULL, "logits");
        f.problem.logits.data = f.logits;

        FAILS(&f, entry, XENT_ERR_DTYPE, "row_weights");
        f.problem.row_weights.dtype = XENT_F32;

        FAILS(&f, entry, XENT_ERR_SHAPE, "classes");
        f.problem.classes = CLASSES;

        FAILS(&f, entry, XENT_ERR_STRIDE, "targets");
        f.problem.targets.strides[0] = 0;

        FAILS(&f, entry, XENT_ERR_ALIGN, "class_weights");
        f.problem.class_weights.data = f.class_weights;

        FAILS(&f, entry, XENT_ERR_OVERLAP, "overlap");
        f.results.normalizer = f.normalizer;
        f.grad_logits.data = f.grad;

        FAILS(&f, entry, XENT_ERR_PARAM, "label_smoothing");
        f.problem.label_smoothing = 0.1;

        FAILS(&f, entry, XENT_ERR_TARGET, "targets[3] = 99");
        f.targets[3] = 3;

        WORKS(&f, entry);
    }
    return report();
}
