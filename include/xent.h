/* xent: softmax cross-entropy for CPU trainers.
 *
 * Generated from src/ffi/mod.rs by cbindgen; do not edit.
 *
 *   double loss;
 *   xent_problem problem = XENT_PROBLEM_INIT;
 *   xent_results results = XENT_RESULTS_INIT;
 *   xent_output grad = {logits, XENT_F32, {0}};   // in place
 *   problem.rows = rows; problem.classes = classes;
 *   problem.logits = (xent_input){logits, XENT_F32, {0}};
 *   problem.targets = (xent_input){targets, XENT_I32, {0}};
 *   results.loss = &loss;
 *   if (xent_forward_backward(&problem, NULL, 1.0, &results, &grad) != XENT_OK)
 *     fprintf(stderr, "%s\n", xent_last_error());
 *
 * Memory is the caller's: xent reads and writes it during the call and keeps nothing. Every
 * function may be called from any number of threads at once. No call prints, exits or throws.
 */


#ifndef XENT_H
#define XENT_H

#include <stddef.h>
#include <stdint.h>

#define XENT_VERSION_MAJOR 0
#define XENT_VERSION_MINOR 1
#define XENT_VERSION_PATCH 0

/* Initialisers that carry the defaults, for C and C++: xent_problem problem = XENT_PROBLEM_INIT;
 * A struct_size smaller than the library's, down to the first release's, means that the later
 * members have their defaults; a larger one is accepted if the unknown tail is all zero. */
#define XENT_PROBLEM_INIT                                                                          \
  { sizeof(xent_problem), 0, 0, 0, 1,                                                              \
    {NULL, XENT_F32, {0, 0, 0}}, {NULL, XENT_F32, {0, 0, 0}}, {NULL, XENT_F32, {0, 0, 0}},         \
    {NULL, XENT_F32, {0, 0, 0}}, {NULL, XENT_F32, {0, 0, 0}},                                      \
    -100, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, XENT_MEAN, 0, NULL }
#define XENT_RESULTS_INIT                                                                          \
  { sizeof(xent_results), NULL, {NULL, XENT_F32, {0, 0, 0}}, NULL, NULL, NULL, NULL, NULL, NULL,   \
    NULL, {NULL, XENT_F32, {0, 0, 0}} }

/**
 * "logits" already are log-probabilities (NLLLoss). Not in this version: XENT_ERR_PARAM.
 */
#define XENT_FLAG_LOG_PROBS 1

/**
 * A mean over no kept rows is 0 instead of NaN.
 */
#define XENT_FLAG_EMPTY_IS_ZERO 2

/**
 * The gradient is added to grad_logits instead of overwriting it. Not in place.
 */
#define XENT_FLAG_ACCUMULATE 4

/**
 * A thread pool of the caller's own.
 */
typedef struct xent_pool xent_pool;

/**
 * 0 = ok. Codes are append-only; a retired one stays listed. Where several apply to one call,
 * the first in the order STRUCT, NULL, DTYPE, SHAPE, STRIDE, ALIGN, OVERLAP, PARAM, TARGET is
 * reported. A call that returns anything but XENT_OK or XENT_ERR_PANIC has written nothing but
 * this thread's xent_last_error.
 */
typedef int32_t xent_status;

/**
 * What the elements of an operand are.
 */
typedef uint32_t xent_dtype;

/**
 * A strided operand that is read; memory of the caller's, which xent never keeps.
 *
 * Strides count elements, in the order row, class, inner. All three zero = densely packed. The
 * stride of an axis of size 1, and strides[1] of an operand without a class axis (indices, row
 * weights, row mask, row losses), is not looked at, for "all zero" either. Elements may repeat
 * (stride 0 on some axis). data == NULL = absent; an operand without elements may have any data.
 */
typedef struct xent_input {
  /**
   * The first element, aligned to the element size.
   */
  const void *data;
  /**
   * XENT_F32 ...
   */
  xent_dtype dtype;
  /**
   * Row, class, inner; in elements.
   */
  int64_t strides[3];
} xent_input;

/**
 * How row losses become the loss.
 */
typedef uint32_t xent_reduction;

/**
 * A cross-entropy problem. Start from XENT_PROBLEM_INIT, which carries the defaults; set rows,
 * classes, logits and targets, and what else is wanted. xent reads it and keeps nothing of it.
 *
 * N rows, C classes, K inner positions (1 in this version). x_c are the logits of a row, y its
 * target, w_c the class weights, W their sum, r the row weight, e = label_smoothing:
 *
 *   lse = ln sum_c exp x_c      logp_c = x_c - lse      p_c = exp logp_c
 *   row loss = r * ((1-e) * w_y * -logp_y  +  e/C * sum_c w_c * -logp_c)
 *   gradient = r * ((1-e) * w_y * (p_c - [c=y])  +  e/C * (W * p_c - w_c))
 *
 * A row is ignored if its target is ignore_index or its mask byte is 0: its loss is 0, its
 * gradient exactly 0, and nothing that its logits hold reaches another row. A term whose
 * factor is 0 is 0, whatever it multiplies. A kept row that holds NaN or +inf, or nothing but
 * -inf, has NaN for loss and gradient, unless its weight r is 0.
 */
typedef struct xent_problem {
  /**
   * Set by XENT_PROBLEM_INIT; lets the struct grow.
   */
  uint32_t struct_size;
  /**
   * XENT_FLAG_* or'ed; default 0.
   */
  uint32_t flags;
  /**
   * N
   */
  size_t rows;
  /**
   * C
   */
  size_t classes;
  /**
   * K; default 1, and 1 is all that this version takes (XENT_ERR_SHAPE).
   */
  size_t inner;
  /**
   * f32, bf16 or f16, [rows, classes], classes contiguous, any row stride. f64 and other class
   * strides are not in this version (XENT_ERR_DTYPE, XENT_ERR_STRIDE). Halves are computed with
   * in f32: their loss is that of the widened logits, bit for bit.
   */
  struct xent_input logits;
  /**
   * i64, i32, u32, u16 or u8 class indices [rows]. Absent: only lse can be asked for,
   * anything else is XENT_ERR_NULL.
   */
  struct xent_input targets;
  /**
   * Optional, any float [classes]; negative and zero are legal.
   */
  struct xent_input class_weights;
  /**
   * Optional, any float [rows].
   */
  struct xent_input row_weights;
  /**
   * Optional, u8 [rows]; 0 = treated as ignored, whatever the target.
   */
  struct xent_input row_mask;
  /**
   * The target of rows that do not count; any value. Default -100.
   */
  int64_t ignore_index;
  /**
   * In [0, 1]; default 0.
   */
  double label_smoothing;
  /**
   * Weight of lse^2. Not in this version: 0, the default.
   */
  double z_loss;
  /**
   * x -> cap*tanh(x/cap). Not in this version: 0, the default.
   */
  double softcap;
  /**
   * x -> scale*x. Not in this version: 1, the default.
   */
  double logit_scale;
  /**
   * If > 0, what a mean divides by instead of the sum of r*w_y. Default 0.
   */
  double normalizer;
  /**
   * As normalizer, for z_loss. Not in this version: 0, the default.
   */
  double z_normalizer;
  /**
   * Default XENT_MEAN.
   */
  xent_reduction reduction;
  /**
   * 0 = the whole pool; 1 = the calling thread alone; n = at most n. The result has the same
   * bits whatever it is. Default 0.
   */
  uint32_t threads;
  /**
   * NULL, the default = rayon's global pool.
   */
  const struct xent_pool *pool;
} xent_problem;

/**
 * A strided operand that is written. As xent_input, but no two elements may share an address.
 */
typedef struct xent_output {
  /**
   * The first element, aligned to the element size.
   */
  void *data;
  /**
   * XENT_F32 ...
   */
  xent_dtype dtype;
  /**
   * Row, class, inner; in elements.
   */
  int64_t strides[3];
} xent_output;

/**
 * Everything that a forward can hand back; NULL or absent, the default, for what is not wanted.
 * One pass over the logits produces all of it. The memory is the caller's.
 */
typedef struct xent_results {
  /**
   * Set by XENT_RESULTS_INIT; lets the struct grow.
   */
  uint32_t struct_size;
  /**
   * The reduced loss; must be NULL with XENT_NONE.
   */
  double *loss;
  /**
   * f32 or f64 [rows]; 0 where ignored. Never divided by anything.
   */
  struct xent_output row_losses;
  /**
   * [rows], packed: the log-sum-exp of the logits, of ignored rows too.
   */
  double *lse;
  /**
   * Not in this version: NULL, as for all members marked so.
   */
  double *z_loss;
  /**
   * What XENT_MEAN divides by, whatever the reduction.
   */
  double *normalizer;
  /**
   * Not in this version.
   */
  double *z_normalizer;
  /**
   * Rows that count.
   */
  uint64_t *kept_rows;
  /**
   * Not in this version.
   */
  int64_t *argmax;
  /**
   * Not in this version.
   */
  uint64_t *correct;
  /**
   * Not in this version.
   */
  struct xent_output entropy;
} xent_results;

/**
 * float
 */
#define XENT_F32 0

/**
 * double
 */
#define XENT_F64 1

/**
 * bfloat16
 */
#define XENT_BF16 2

/**
 * IEEE half
 */
#define XENT_F16 3

/**
 * int64_t
 */
#define XENT_I64 16

/**
 * int32_t
 */
#define XENT_I32 17

/**
 * uint8_t
 */
#define XENT_U8 18

/**
 * uint16_t
 */
#define XENT_U16 19

/**
 * uint32_t
 */
#define XENT_U32 20

/**
 * The sum of the row losses over the sum of r*w_y, both over kept rows.
 */
#define XENT_MEAN 0

/**
 * The sum of the row losses.
 */
#define XENT_SUM 1

/**
 * Row losses alone; the gradient is that of each row's own loss.
 */
#define XENT_NONE 2

/**
 * Done.
 */
#define XENT_OK 0

/**
 * A required pointer is NULL.
 */
#define XENT_ERR_NULL 1

/**
 * struct_size unset, or unknown flag bits: not built from XENT_PROBLEM_INIT, XENT_RESULTS_INIT.
 */
#define XENT_ERR_STRUCT 2

/**
 * A size is out of range, or rows*classes*inner overflows.
 */
#define XENT_ERR_SHAPE 3

/**
 * A stride is negative, overflows, or makes elements of an output share an address: an axis of
 * an output must step over the whole span of the axes inside it.
 */
#define XENT_ERR_STRIDE 4

/**
 * A dtype is unknown or not allowed for its operand.
 */
#define XENT_ERR_DTYPE 5

/**
 * Data is not aligned to its element size.
 */
#define XENT_ERR_ALIGN 6

/**
 * An output may overlap another operand other than as exactly in place. Judged by byte span,
 * except that column blocks of one matrix (equal row strides, disjoint within a row) are seen
 * to be apart.
 */
#define XENT_ERR_OVERLAP 7

/**
 * A target index is neither ignore_index nor in [0, classes).
 */
#define XENT_ERR_TARGET 8

/**
 * label_smoothing outside [0, 1]; a negative or infinite normalizer, softcap or z_loss;
 * logit_scale not > 0; a NaN; a result that this problem cannot have; an XENT_ISA that does not
 * name an available instruction set.
 */
#define XENT_ERR_PARAM 9

/**
 * An internal bug, caught at the boundary; never expected. Outputs may be half-written.
 */
#define XENT_ERR_PANIC 10

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The loss and what else `results` asks for. Reads the logits from memory once.
 *
 * problem, results: not NULL. Thread-safe. On failure nothing is written.
 *
 * Every operand that is present covers the problem's shape; no other thread writes the inputs
 * or touches the outputs during the call.
 */
xent_status xent_forward(const struct xent_problem *problem, const struct xent_results *results);

/**
 * The gradient of the loss with respect to the logits, recomputed from lse.
 *
 * problem, lse, grad_logits: not NULL. lse: double [rows], packed, of a forward over the same logits or of the caller's own making.
 * grad_output: the gradient of what follows, NULL = 1; any float, one element, or [rows] with
 * XENT_NONE. grad_scale: finite, multiplies on top (loss scaling, 1/accumulation steps).
 * grad_logits: [rows, classes], the dtype of the logits, or f32 for halves, rounded once, to
 * nearest even; it may be exactly the logits (same data, dtype and
 * strides), which are then overwritten (not with XENT_FLAG_ACCUMULATE: XENT_ERR_OVERLAP).
 * Ignored rows get 0, or stay as they are with XENT_FLAG_ACCUMULATE. Thread-safe. On failure
 * nothing is written.
 */
xent_status xent_backward(const struct xent_problem *problem,
                          const double *lse,
                          const struct xent_input *grad_output,
                          double grad_scale,
                          const struct xent_output *grad_logits);

/**
 * Both in one go, reading the logits from memory once.
 *
 * problem, grad_logits: not NULL; results may be. The rest as in xent_forward and xent_backward. On failure nothing is
 * written.
 */
xent_status xent_forward_backward(const struct xent_problem *problem,
                                  const struct xent_input *grad_output,
                                  double grad_scale,
                                  const struct xent_results *results,
                                  const struct xent_output *grad_logits);

/**
 * "XENT_ERR_TARGET" for XENT_ERR_TARGET, and so on; "XENT_ERR_UNKNOWN" for a code of no
 * meaning. Static; never NULL.
 */
const char *xent_status_name(xent_status status);

/**
 * This thread's last failure in words, e.g. "targets[17] = 50257 is outside [0, 50257)"; "" if
 * there was none. Like errno: a success leaves it as it was. Valid until this thread's next
 * failure; never NULL.
 */
const char *xent_last_error(void);

/**
 * Starts a pool of that many threads; 0 = one for each core. NULL on failure; see
 * xent_last_error. The caller owns it and gives it to xent_pool_free.
 */
struct xent_pool *xent_pool_new(uint32_t threads);

/**
 * Ends a pool that xent_pool_new made, once; its threads end soon after. No call may be running
 * on it. NULL is a no-op.
 */
void xent_pool_free(struct xent_pool *pool);

/**
 * The kernels in use: "avx512", "avx2", "neon" or "portable". The environment variable XENT_ISA
 * (if not empty) lowers the choice; if it names none that this processor has, every call fails with
 * XENT_ERR_PARAM, and this is "none". Static; never NULL.
 */
const char *xent_isa(void);

/**
 * The version, "0.1.0". Static; never NULL.
 */
const char *xent_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* XENT_H */
