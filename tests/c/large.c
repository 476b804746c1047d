/* Operands that span more than 2^31 and 2^32 elements, by strides over a sparse mapping: a row * stride or
 * row * classes + target in 32 bits would lead to another element. */
#include "reference.h"

#include <sys/mman.h>

enum { rows = 4, classes = 1000 };

static void far_apart(int64_t stride) {
    size_t size = ((size_t)stride * (rows - 1) + classes) * sizeof(float);
    float *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) {
        printf("skipped: no %zu bytes of address space\n", size);
        return;
    }
    uint64_t state = 11;
    float near_by[rows * classes];
    int64_t targets[rows];
    fill(near_by, rows * classes, -4, 4, &state);
    for (int i = 0; i < rows; i++) {
        targets[i] = 997 - i;
        memcpy(map + i * stride, near_by + i * classes, classes * sizeof(float));
    }
    double loss = 0, expected = 0, lse[rows];
    float grad[rows * classes];
    xent_problem p = packed(near_by, rows, classes, targets);
    xent_results r = XENT_RESULTS_INIT;
    r.loss = &expected;
    xent_output g = out(grad, XENT_F32);
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &g));

    p.logits = in_rows(map, XENT_F32, stride);
    r.loss = &loss;
    r.lse = lse;
    CHECK_OK(xent_forward(&p, &r));
    CHECK_BYTES(&loss, &expected, sizeof loss);
    xent_output in_place = out_rows(map, XENT_F32, stride);
    loss = 0;
    CHECK_OK(xent_forward_backward(&p, NULL, 1, &r, &in_place));
    CHECK_BYTES(&loss, &expected, sizeof loss);
    for (int i = 0; i < rows; i++) CHECK_BYTES(map + i * stride, grad + i * classes, classes * sizeof(float));

    for (int i = 0; i < rows; i++) memcpy(map + i * stride, near_by + i * classes, classes * sizeof(float));
    CHECK_OK(xent_backward(&p, lse, NULL, 1, &in_place));
    p.logits = in(near_by, XENT_F32);
    CHECK_OK(xent_backward(&p, lse, NULL, 1, &g));
    for (int i = 0; i < rows; i++) CHECK_BYTES(map + i * stride, grad + i * classes, classes * sizeof(float));
    munmap(map, size);
}

int main(void) {
    far_apart(((int64_t)1 << 29) + 5);  /* past 2^31 bytes */
    far_apart(((int64_t)1 << 31) + 16); /* past 2^31 elements, wraps to 16 */
    far_apart(((int64_t)1 << 32) + 1);  /* past 2^32 elements, wraps to 1 */
    return report();
}
