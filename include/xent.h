/* xent: softmax cross-entropy for CPU trainers.
 *
 * Generated from src/ffi/ by cbindgen; do not edit.
 *
 *   // logits[rows][50304]: 50257 classes, and padding that is not read
 *   double loss;
 *   xent_problem problem = XENT_PROBLEM_INIT;
 *   xent_results results = XENT_RESULTS_INIT;
 *   xent_output grad = {logits, XENT_F32, {50304, 1}};    // in place; row stride, class stride
 *   problem.rows = rows; problem.classes = 50257;
 *   problem.logits = (xent_input){logits, XENT_F32, {50304, 1}};
 *   problem.targets = (xent_input){targets, XENT_I32, {0}};   // {0} = packed
 *   results.loss = &loss;
 *   if (xent_forward_backward(&problem, NULL, 1.0, &results, &grad) != XENT_OK)
 *     fprintf(stderr, "%s\n", xent_last_error());
 *
 * xent_forward and xent_backward compute loss and gradient separately, xent_backward_targets the
 * gradient with respect to probability targets. Softmax and log-softmax run over any axis of a
 * tensor:
 *
 *   xent_shape shape = XENT_SHAPE_INIT;
 *   xent_input x = {values, XENT_F32, {0}};
 *   xent_output y = {values, XENT_F32, {0}};      // in place
 *   shape.rows = rows; shape.classes = classes;
 *   xent_status status = xent_log_softmax(&shape, &x, &y);
 *
 * A vocabulary may lie in shards, with threads, processes or machines: xent_partial_forward over the
 * columns of each shard, xent_partial_merge of what these calls find out, in any order, and of that
 * xent_partial_finish makes the results, xent_partial_backward the gradient of each shard's columns.
 *
 * Memory is the caller's: xent reads and writes it during the call and keeps nothing. Any number
 * of threads may call any function at once. No call prints, exits or throws.
 *
 * A call takes at most xent_stack_bytes() of stack, 48 KiB. Where there is no memory to give other
 * threads work, the calling thread does it alone.
 *
 * Floating-point exceptions do not trap inside a call, whatever the program has enabled with
 * feenableexcept, and a call leaves the exception flags, the rounding mode and the flushing of
 * subnormals as it found them.
 */


#ifndef XENT_H
#define XENT_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define XENT_VERSION_MAJOR 0
#define XENT_VERSION_MINOR 1
#define XENT_VERSION_PATCH 0

/* Initialisers that carry the defaults, for C and C++: xent_problem problem = XENT_PROBLEM_INIT;
 * The library accepts a struct_size smaller than its own, down to that of the first release, and
 * takes the defaults for the missing members. It accepts a larger one if the unknown tail is zero. */
#define XENT_PROBLEM_INIT                                                                          \
  { sizeof(xent_problem), 0, 0, 0, 1,                                                              \
    {NULL, XENT_F32, {0, 0, 0}}, {NULL, XENT_F32, {0, 0, 0}}, {NULL, XENT_F32, {0, 0, 0}},         \
    {NULL, XENT_F32, {0, 0, 0}}, {NULL, XENT_F32, {0, 0, 0}},                                      \
    -100, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, XENT_MEAN, 0, NULL, {NULL, XENT_F32, {0, 0, 0}}, 0, 0.0,   \
    0.0 }
#define XENT_RESULTS_INIT                                                                          \
  { sizeof(xent_results), NULL, {NULL, XENT_F32, {0, 0, 0}}, NULL, NULL, NULL, NULL, NULL, NULL,   \
    NULL, {NULL, XENT_F32, {0, 0, 0}}, {NULL, XENT_F32, {0, 0, 0}}, NULL, NULL,                    \
    {NULL, XENT_F32, {0, 0, 0}}, 0, NULL }
#define XENT_SHAPE_INIT { sizeof(xent_shape), 0, 0, 0, 1, 0, NULL }
#define XENT_LINEAR_INIT                                                                           \
  { sizeof(xent_linear), 0, 0, {NULL, XENT_F32, {0, 0, 0}}, {NULL, XENT_F32, {0, 0, 0}},           \
    {NULL, XENT_F32, {0, 0, 0}}, 0 }
#define XENT_LINEAR_GRADS_INIT                                                                     \
  { sizeof(xent_linear_grads), {NULL, XENT_F32, {0, 0, 0}}, {NULL, XENT_F32, {0, 0, 0}},           \
    {NULL, XENT_F32, {0, 0, 0}} }
/* The state of no classes. */
#define XENT_PARTIAL_INIT { -HUGE_VAL, 0.0, 0.0, 0.0, -HUGE_VAL, -1 }

/**
 * The logits are log-probabilities, logp_c in the formulas (NLLLoss). xent takes no lse, and the
 * gradient is with respect to logp. xent reads only classes with a target mass, or all classes if
 * argmax is asked for. The options logit_scale, softcap, z_loss and entropy_bonus and the results lse,
 * entropy, z_loss and entropy_bonus are XENT_ERR_PARAM.
 */
#define XENT_FLAG_LOG_PROBS 1

/**
 * A mean over no kept rows is 0 instead of NaN.
 */
#define XENT_FLAG_EMPTY_IS_ZERO 2

/**
 * xent adds the gradient to grad_logits or grad_targets instead of overwriting it. Not in place.
 */
#define XENT_FLAG_ACCUMULATE 4

/**
 * For padded vocabularies: where the row stride of grad_logits exceeds classes, xent sets the elements
 * between the classes of a row and the next row to 0, those of ignored rows and with
 * XENT_FLAG_ACCUMULATE too. Memory after the last row's classes stays as it is: to clear the last row's
 * padding is the caller's part. The elements between count as written, so that no other operand may lie
 * there. It needs inner = 1 and a class stride of 1, else XENT_ERR_PARAM. Calls without grad_logits
 * ignore it.
 */
#define XENT_FLAG_ZERO_PADDING 8

/**
 * xent adds the gradient of the hidden states to what grads.hidden holds, instead of overwriting it.
 */
#define XENT_LINEAR_ACCUMULATE_HIDDEN 1

/**
 * The same of grads.weight.
 */
#define XENT_LINEAR_ACCUMULATE_WEIGHT 2

/**
 * The same of grads.bias.
 */
#define XENT_LINEAR_ACCUMULATE_BIAS 4

/**
 * A thread pool that the caller owns.
 */
typedef struct xent_pool xent_pool;

/**
 * 0 = ok. New versions add codes and remove none. If several apply to one call, it returns the
 * first in the order STRUCT, NULL, DTYPE, SHAPE, STRIDE, ALIGN, OVERLAP, PARAM, TARGET, MEMORY. A call
 * that returns anything but XENT_OK or XENT_ERR_PANIC has written nothing but this thread's
 * xent_last_error.
 */
typedef int32_t xent_status;

/**
 * The type of the elements of an operand.
 */
typedef uint32_t xent_dtype;

/**
 * A strided operand that xent reads during the call. The memory is the caller's.
 *
 * Strides count elements, in the order row, class, inner. All three zero = densely packed:
 * [rows, classes, inner] in C order, [rows, inner] for an operand without a class axis (indices,
 * row weights, row mask, row losses, entropy). xent ignores the stride of an axis of size 1, and
 * strides[1] of an operand without a class axis; neither counts for "all zero". Elements may repeat
 * (stride 0 on some axis), except that the class stride of logits is not 0 beside a row stride. data ==
 * NULL = absent; an operand without elements may have any data.
 *
 * Contiguous classes have a class stride of 1: rows of 50257 classes that are 50304 apart have the
 * strides {50304, 1, 0}.
 *
 * So any axis of a tensor can be the class axis. Classes first, as in a transposed matrix
 * [classes, rows]: strides {1, rows, 1}. Images [N, C, H, W]: inner = H*W, packed. The last axis
 * but one of [A, B, C, D]: rows = A*B, classes = C, inner = D, packed. The causal shift of a language
 * model, logits [B, T, V] and tokens [B, T], where position t predicts token t+1: rows = B,
 * classes = V, inner = T-1; logits and gradient have the strides {T*V, 1, V}, and the targets are
 * tokens + 1 with the strides {T, 0, 1}. The gradient of each last position stays as it is.
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
 * How the loss is formed from the row losses.
 */
typedef uint32_t xent_reduction;

/**
 * A cross-entropy problem. Start from XENT_PROBLEM_INIT, which carries the defaults; set rows,
 * classes, logits and targets, then any options. xent reads the struct and keeps nothing of it.
 *
 * N rows, C classes, K inner positions: N*K softmax distributions. Below, "row" means one of
 * them; an operand [rows, inner] has one element for each. z_c are the logits of a row as
 * stored, w_c the class weights, W their sum, r the row weight, e = label_smoothing:
 *
 *   x_c = logit_scale * z_c, then x_c = softcap * tanh(x_c / softcap) if softcap > 0
 *   lse = ln sum_c exp x_c      logp_c = x_c - lse      p_c = exp logp_c
 *
 * With a class index y for target:
 *
 *   row loss = r * ((1-e) * w_y * -logp_y  +  e/C * sum_c w_c * -logp_c  +  z_loss * lse^2)
 *   d/dx_c   = r * ((1-e) * w_y * (p_c - [c=y])  +  e/C * (W * p_c - w_c)  +  2 * z_loss * lse * p_c)
 *
 * With probabilities t_c for targets, t'_c = (1-e) * t_c + e/C and T = sum_c w_c * t'_c, which
 * need not be 1:
 *
 *   row loss = r * (sum_c w_c * t'_c * -logp_c  +  z_loss * lse^2)
 *   d/dx_c   = r * (T * p_c - w_c * t'_c  +  2 * z_loss * lse * p_c)
 *   d/dt_c   = r * (1-e) * w_c * -logp_c
 *
 * With either, entropy_bonus = b rewards the entropy H = -sum_c p_c * logp_c: the row loss has
 * -r * b * H more, and d/dx_c has r * b * p_c * (logp_c + H) more.
 *
 * The gradient with respect to z_c is d/dx_c times logit_scale, and times 1 - tanh^2 under a
 * softcap. With XENT_FLAG_LOG_PROBS, z_c = logp_c, and d/dlogp_c is minus the factor of -logp_c.
 *
 * A row is ignored if its target index is ignore_index or its mask byte is 0. An ignored row has a
 * loss of 0 and a gradient of exactly 0, and its logits affect no other row. A row that is not
 * ignored is kept. A term whose factor (w_c, t'_c, 1-e, r) is 0 is 0, whatever it multiplies. A
 * kept row in which some x_c is NaN or +inf, or every x_c is -inf, has a loss and gradient of NaN,
 * unless its weight r is 0.
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
   * K, the positions inside the class axis: d1*..*dk for logits [N, C, d1, .., dk]. Default 1.
   */
  size_t inner;
  /**
   * f32, f64, bf16 or f16, [rows, classes, inner]; any strides. xent widens halves to f32: their
   * loss is that of the widened logits, bit for bit.
   */
  struct xent_input logits;
  /**
   * i64, i32, u32, u16 or u8: class indices [rows, inner]. f32, f64, bf16 or f16: probabilities
   * [rows, classes, inner], whatever float type the logits have. xent does not check
   * probabilities; they need be neither normalised nor positive. Without targets a call can ask
   * for lse, argmax and entropy; any other result is XENT_ERR_NULL.
   */
  struct xent_input targets;
  /**
   * Optional, any float [classes]; negative and zero are legal.
   */
  struct xent_input class_weights;
  /**
   * Optional, any float [rows, inner].
   */
  struct xent_input row_weights;
  /**
   * Optional, u8 [rows, inner]; 0 = treated as ignored, whatever the target.
   */
  struct xent_input row_mask;
  /**
   * The target index of ignored rows; any value. It does not apply to probability targets.
   * Default -100.
   */
  int64_t ignore_index;
  /**
   * In [0, 1]; default 0.
   */
  double label_smoothing;
  /**
   * Weight of lse^2, finite and >= 0; default 0.
   */
  double z_loss;
  /**
   * If > 0, x -> softcap*tanh(x/softcap), after logit_scale; finite and >= 0. Default 0 = off.
   */
  double softcap;
  /**
   * x -> logit_scale*x (1/temperature); finite and > 0. Default 1.
   */
  double logit_scale;
  /**
   * If > 0, the denominator of a mean's cross-entropy part, instead of the sum of r*w_y (index
   * targets) or of r (probabilities) over kept rows: for gradient accumulation and data
   * parallelism. Default 0.
   */
  double normalizer;
  /**
   * If > 0, the denominator of a mean's z-loss part and entropy bonus, instead of the sum of r over
   * kept rows. Default 0.
   */
  double z_normalizer;
  /**
   * Default XENT_MEAN.
   */
  xent_reduction reduction;
  /**
   * 0 = the whole pool; 1 = the calling thread alone; n = at most n. The number changes no bit of
   * the result. Default 0.
   */
  uint32_t threads;
  /**
   * NULL, the default = rayon's global pool.
   */
  const struct xent_pool *pool;
  /**
   * Sparse targets: i64, i32, u32, u16 or u8, [rows, target_count, inner]; strides: row, place, inner. The
   * targets are then the probabilities of these classes, floats of the same shape. The probability of
   * a class that is not listed is 0; those of a class that is listed twice add up. A place that holds
   * ignore_index is unused; any other index outside [0, classes) is XENT_ERR_TARGET. Default absent.
   */
  struct xent_input target_classes;
  /**
   * Places in each row's list, at least 1 with target_classes and 0 without; default 0.
   */
  size_t target_count;
  /**
   * If > 0, the targets are a teacher's logits, and t = softmax(target_scale * targets), over all classes or
   * over those listed. xent forms t as it goes and keeps 16 bytes a row (XENT_ERR_MEMORY). A row of
   * the teacher with NaN or +inf, or of nothing but -inf, makes the loss and the gradient of its row
   * NaN. No gradient goes to the teacher. Finite and >= 0; default 0: the targets are probabilities.
   */
  double target_scale;
  /**
   * Weight b of the entropy H = -sum p_c * logp_c, which is subtracted: finite, of either sign.
   * Default 0 = off.
   */
  double entropy_bonus;
} xent_problem;

/**
 * A strided operand that xent writes. As xent_input, but no two elements may share an address.
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
 * The results of a forward. A member that is NULL or absent, the default, is not computed. One pass
 * over the logits computes all of them. The memory is the caller's. Without targets a call can ask
 * for lse, argmax, entropy, top_classes and top_log_probs.
 */
typedef struct xent_results {
  /**
   * Set by XENT_RESULTS_INIT; lets the struct grow.
   */
  uint32_t struct_size;
  /**
   * The reduced loss, z-loss and entropy bonus included; must be NULL with XENT_NONE.
   */
  double *loss;
  /**
   * f32 or f64 [rows, inner], z-loss and entropy bonus included; 0 where ignored. Never divided by
   * anything.
   */
  struct xent_output row_losses;
  /**
   * [rows, inner], packed: the log-sum-exp of the scaled and capped logits, of ignored rows
   * too. NULL with XENT_FLAG_LOG_PROBS.
   */
  double *lse;
  /**
   * The z-loss part of *loss, 0 if z-loss is off. NULL with XENT_NONE and XENT_FLAG_LOG_PROBS.
   */
  double *z_loss;
  /**
   * The denominator of XENT_MEAN's cross-entropy part, whatever the reduction.
   */
  double *normalizer;
  /**
   * The denominator of XENT_MEAN's z-loss part and entropy bonus, whatever the reduction, these on or
   * off.
   */
  double *z_normalizer;
  /**
   * The number of rows that are not ignored.
   */
  uint64_t *kept_rows;
  /**
   * [rows, inner], packed: the predicted class, of ignored rows too. It is the lowest index of a
   * NaN among the logits as stored, else of their maximum (0 if all are -inf).
   */
  int64_t *argmax;
  /**
   * The number of kept rows whose argmax is the target index. NULL with probability targets.
   */
  uint64_t *correct;
  /**
   * f32 or f64 [rows, inner]: -sum_c p_c * logp_c, of ignored rows too. Absent with
   * XENT_FLAG_LOG_PROBS.
   */
  struct xent_output entropy;
  /**
   * f32 or f64 [rows, inner]: the divergence sum_c t'_c * (ln t'_c - logp_c), without weights; 0 where
   * ignored, NaN where a t'_c is negative. Absent with class indices.
   */
  struct xent_output kl;
  /**
   * The part -entropy_bonus * H of *loss, 0 if there is none. NULL with XENT_NONE and
   * XENT_FLAG_LOG_PROBS.
   */
  double *entropy_bonus;
  /**
   * [rows, top_count, inner], packed: the classes of the largest logits as stored, the largest
   * first, of ignored rows too. Of equal logits the lower class comes first; a NaN comes before
   * every number. XENT_ERR_PARAM with top_count = 0.
   */
  int64_t *top_classes;
  /**
   * f32 or f64 [rows, top_count, inner]: logp_c of the same classes, x_c - lse of the scaled and
   * capped logits; with XENT_FLAG_LOG_PROBS the log-probabilities as they are stored.
   * XENT_ERR_PARAM with top_count = 0.
   */
  struct xent_output top_log_probs;
  /**
   * The number of classes listed for each row, at most 64 and at most classes. Default 0.
   */
  size_t top_count;
  /**
   * [rows, inner], packed: the place of the target among all logits as stored, in the order of
   * top_classes, from 0 on; -1 for ignored rows. XENT_ERR_PARAM with probability targets.
   */
  int64_t *target_ranks;
} xent_results;

/**
 * The shape of a call of softmax or log-softmax. Start from XENT_SHAPE_INIT; set rows and classes.
 *
 * Operands are [rows, classes, inner]. Softmax runs over the classes; with strides, any axis of any
 * tensor can be the class axis.
 */
typedef struct xent_shape {
  /**
   * Set by XENT_SHAPE_INIT; lets the struct grow.
   */
  uint32_t struct_size;
  /**
   * 0; any other value is XENT_ERR_STRUCT.
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
   * K; default 1.
   */
  size_t inner;
  /**
   * 0 = the whole pool; 1 = the calling thread alone; n = at most n. The number changes no bit of
   * the result. Default 0.
   */
  uint32_t threads;
  /**
   * NULL, the default = rayon's global pool.
   */
  const struct xent_pool *pool;
} xent_shape;

/**
 * A linear layer that makes the logits of a problem: logits = hidden * weight^T + bias. xent makes them block by
 * block and never stores them. Start from XENT_LINEAR_INIT; set features, hidden and weight.
 *
 * The problem beside it has no logits and an inner of 1 (else XENT_ERR_SHAPE). It may have every kind of targets,
 * or none for an evaluation, and every option; logit_scale and softcap apply to the product. Its flags LOG_PROBS,
 * ACCUMULATE and ZERO_PADDING are XENT_ERR_PARAM.
 *
 * An element of a product is a sum of chains of 256 fused multiply-adds in f32 (f64 for f64 operands), in the
 * order of the features, classes or rows. So its bits do not depend on threads, nor on whether the
 * processor has AVX2 or AVX-512.
 */
typedef struct xent_linear {
  /**
   * Set by XENT_LINEAR_INIT; lets the struct grow.
   */
  uint32_t struct_size;
  /**
   * XENT_LINEAR_ACCUMULATE_* or'ed; default 0. Forward and gradients that are absent ignore them.
   */
  uint32_t flags;
  /**
   * D
   */
  size_t features;
  /**
   * f32, f64, bf16 or f16, [rows, features]; strides: row, feature. The feature stride must be 1
   * (XENT_ERR_STRIDE); all zero = packed. xent does not look at the third.
   */
  struct xent_input hidden;
  /**
   * [classes, features], of the dtype of hidden (else XENT_ERR_DTYPE); strides: class, feature, as for hidden.
   */
  struct xent_input weight;
  /**
   * Optional, any float [classes].
   */
  struct xent_input bias;
  /**
   * Bytes that the call may allocate. 0, the default: as few as run near full speed, for f32 at most 2 MiB a
   * thread, and features KiB a thread more where a gradient of 16 bits needs sums in f32, beside 150 bytes a row.
   * With less memory than all threads need, fewer work; less than one needs is XENT_ERR_PARAM, whose message
   * names the least. With enough beside that for the logits of 64 rows or more, up to 256 at a time, a call that
   * would make them again, for the gradient of the weight for example, keeps them: three matrix products in place
   * of four. Where grads.weight has 16 bits, it then needs 4 bytes for each of its elements too.
   */
  size_t workspace;
} xent_linear;

/**
 * Where the gradients of a linear layer go. Start from XENT_LINEAR_GRADS_INIT. One that is absent is not computed,
 * nor is its product. Gradients overlap no operand and no other gradient.
 */
typedef struct xent_linear_grads {
  /**
   * Set by XENT_LINEAR_GRADS_INIT; lets the struct grow.
   */
  uint32_t struct_size;
  /**
   * [rows, features]: the dtype of hidden, or f32, rounded once; strides: row, feature (1). Ignored rows get 0,
   * or stay as they are with XENT_LINEAR_ACCUMULATE_HIDDEN.
   */
  struct xent_output hidden;
  /**
   * [classes, features]: the dtype of weight, or f32; strides: class, feature (1).
   */
  struct xent_output weight;
  /**
   * [classes], any float.
   */
  struct xent_output bias;
} xent_linear_grads;

/**
 * What is known of a row after the classes of one shard of a vocabulary, or of several: plain data of
 * 48 bytes, without pointers, that processes and machines can exchange. Start from XENT_PARTIAL_INIT.
 *
 * x_c are the logits after scale and cap. m_c is the mass that the row's targets put on class c: w_c *
 * t'_c with probabilities, (1-e) * w_y * [c=y] + e/C * w_c with an index y, where C and w are those of the
 * whole vocabulary.
 */
typedef struct xent_partial {
  /**
   * ln sum_c exp x_c; -inf for no classes.
   */
  double lse;
  /**
   * sum_c m_c * x_c, without the terms whose mass is 0; 0 in ignored rows.
   */
  double target_dot;
  /**
   * sum_c m_c; 0 in ignored rows.
   */
  double target_mass;
  /**
   * sum_c p_c * x_c under the softmax over these classes; 0 if lse is -inf.
   */
  double logit_mean;
  /**
   * The largest logit as stored. NaN is larger than every number; -inf for no classes.
   */
  double max;
  /**
   * The class of max in the whole vocabulary, the lowest on ties; -1 for no classes.
   */
  int64_t argmax;
} xent_partial;

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
 * Each part of the loss divided by its denominator, a sum over kept rows: the cross-entropy part by
 * the sum of r*w_y (of r with probability targets), the z-loss part and the entropy bonus by the sum of r.
 */
#define XENT_MEAN 0

/**
 * The sum of the row losses.
 */
#define XENT_SUM 1

/**
 * No reduced loss. The gradient is that of each row's own loss.
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
 * struct_size unset, or unknown flag bits: not built from XENT_PROBLEM_INIT, XENT_RESULTS_INIT,
 * XENT_SHAPE_INIT.
 */
#define XENT_ERR_STRUCT 2

/**
 * rows*classes*inner overflows, or there are rows without classes.
 */
#define XENT_ERR_SHAPE 3

/**
 * A stride is negative, overflows, or makes elements of an output share an address: an axis of
 * an output must step over the whole span of the axes inside it. Or the class stride of the logits or
 * of an output is 0 beside a row stride that is not: {row, 0, 0} is what C makes of {row}.
 */
#define XENT_ERR_STRIDE 4

/**
 * A dtype is unknown, or not allowed for its operand or beside that of another.
 */
#define XENT_ERR_DTYPE 5

/**
 * Data is not aligned to its element size.
 */
#define XENT_ERR_ALIGN 6

/**
 * An output may overlap another operand, and is not exactly in place. xent compares byte spans,
 * but accepts column blocks of one matrix: equal row strides, disjoint within each row.
 */
#define XENT_ERR_OVERLAP 7

/**
 * A target index is neither ignore_index nor in [0, classes).
 */
#define XENT_ERR_TARGET 8

/**
 * label_smoothing outside [0, 1]; a negative or infinite normalizer, softcap or z_loss;
 * logit_scale not > 0; an infinite entropy_bonus; an option that is NaN; a result that this problem cannot have; a
 * flag that does not go with the layout of the gradient; an XENT_ISA that names no available instruction set.
 */
#define XENT_ERR_PARAM 9

/**
 * An internal bug, caught at the boundary; never expected. Outputs may be half-written.
 */
#define XENT_ERR_PANIC 10

/**
 * Working memory could not be had. A call whose threads alone need memory does the work on the
 * calling thread instead.
 */
#define XENT_ERR_MEMORY 11

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Computes the loss and the other results that `results` asks for. Reads the logits from memory
 * once.
 *
 * problem, results: not NULL. Without targets the call can compute lse, argmax, entropy,
 * top_classes and top_log_probs.
 * Thread-safe. A call that fails writes nothing.
 *
 * Every operand that is present covers the problem's shape. During the call no other thread writes
 * an input or touches an output.
 */
xent_status xent_forward(const struct xent_problem *problem, const struct xent_results *results);

/**
 * Computes the gradient of the loss with respect to the logits, from lse.
 *
 * problem, lse, grad_logits: not NULL. lse: double [rows, inner], packed, from a forward over the
 * same logits and options or from elsewhere; with XENT_FLAG_LOG_PROBS xent ignores it, and it may be
 * NULL.
 * grad_output: the gradient of what follows the loss, NULL = 1; any float, one element, or [rows,
 * inner] with XENT_NONE. grad_scale: a further factor, finite (loss scaling, 1/accumulation steps).
 * grad_logits: [rows, classes, inner], the dtype of the logits, or f32 for halves, rounded once,
 * to nearest even; any strides that keep its elements apart. It may be exactly the logits (same
 * data, dtype and strides), which the gradient then overwrites (with XENT_FLAG_ACCUMULATE that is
 * XENT_ERR_OVERLAP). Ignored rows get 0, or stay as they are with XENT_FLAG_ACCUMULATE. xent writes
 * between rows only with XENT_FLAG_ZERO_PADDING.
 * Thread-safe. A call that fails writes nothing.
 */
xent_status xent_backward(const struct xent_problem *problem,
                          const double *lse,
                          const struct xent_input *grad_output,
                          double grad_scale,
                          const struct xent_output *grad_logits);

/**
 * Computes the gradient of the loss with respect to probability targets, from lse: r * (1-e) * w_c *
 * (lse - x_c), times the factors of the reduction, grad_output and grad_scale. For distillation,
 * where a model computes the targets too. With XENT_FLAG_LOG_PROBS, -logp_c takes the place of
 * lse - x_c.
 *
 * As xent_backward, except for grad_targets: not NULL, [rows, classes, inner], any float dtype, any
 * strides that keep its elements apart; it overlaps no other operand. A factor of 0 (r, 1-e, w_c)
 * makes 0, whatever it multiplies. xent does not read the values of the targets. Class indices have
 * no gradient: XENT_ERR_PARAM. Thread-safe. A call that fails writes nothing.
 */
xent_status xent_backward_targets(const struct xent_problem *problem,
                                  const double *lse,
                                  const struct xent_input *grad_output,
                                  double grad_scale,
                                  const struct xent_output *grad_targets);

/**
 * Computes the loss, the other results and the gradient together. Reads the logits from memory once.
 *
 * problem, grad_logits: not NULL; results may be NULL. Otherwise as xent_forward and xent_backward.
 * Thread-safe. A call that fails writes nothing.
 */
xent_status xent_forward_backward(const struct xent_problem *problem,
                                  const struct xent_input *grad_output,
                                  double grad_scale,
                                  const struct xent_results *results,
                                  const struct xent_output *grad_logits);

/**
 * Log-softmax over the classes: y_c = x_c - ln sum_c exp x_c.
 *
 * shape, xs, ys: not NULL. xs is x, and ys is y: f32, f64, bf16 or f16, both of one dtype
 * (XENT_ERR_DTYPE), [rows, classes, inner], any strides. y may be exactly x (same data and strides),
 * and overlaps it in no other way. xent widens halves to f32 and rounds the result once. A row that
 * holds NaN or +inf, or nothing but -inf, becomes NaN; any other -inf stays -inf. Thread-safe. A call
 * that fails writes nothing.
 */
xent_status xent_log_softmax(const struct xent_shape *shape,
                             const struct xent_input *xs,
                             const struct xent_output *ys);

/**
 * The gradient through xent_log_softmax: grad_x_c = grad_y_c - exp(y_c) * sum_c grad_y_c.
 *
 * shape, ys, grad_y, grad_x: not NULL. ys is y, the output of xent_log_softmax; grad_y: the gradient
 * with respect to it. All three of one dtype, as in xent_log_softmax. grad_x may be exactly y or
 * exactly grad_y, and overlaps them in no other way. Thread-safe. A call that fails writes nothing.
 */
xent_status xent_log_softmax_backward(const struct xent_shape *shape,
                                      const struct xent_input *ys,
                                      const struct xent_input *grad_y,
                                      const struct xent_output *grad_x);

/**
 * Softmax over the classes: y_c = exp x_c / sum_c exp x_c.
 *
 * Otherwise as xent_log_softmax, except that -inf becomes 0.
 */
xent_status xent_softmax(const struct xent_shape *shape,
                         const struct xent_input *xs,
                         const struct xent_output *ys);

/**
 * The gradient through xent_softmax: grad_x_c = y_c * (grad_y_c - sum_c y_c * grad_y_c).
 *
 * Otherwise as xent_log_softmax_backward; ys is the output of xent_softmax.
 */
xent_status xent_softmax_backward(const struct xent_shape *shape,
                                  const struct xent_input *ys,
                                  const struct xent_input *grad_y,
                                  const struct xent_output *grad_x);

/**
 * The name of a status: "XENT_ERR_TARGET" for XENT_ERR_TARGET; "XENT_ERR_UNKNOWN" for a number that
 * is no status. Static; never NULL.
 */
const char *xent_status_name(xent_status status);

/**
 * The message of this thread's last failure, e.g. "targets[17] = 50257 is outside [0, 50257)"; ""
 * if there was none. As with errno, a success does not change it. Valid until this thread's next
 * failure; never NULL.
 */
const char *xent_last_error(void);

/**
 * Starts a pool of `threads` threads; 0 = one for each core. NULL on failure; see xent_last_error.
 * The caller owns the pool and ends it with xent_pool_free.
 *
 * The threads block signals, save those that an instruction raises on its own thread. In a call they
 * take over the calling thread's rounding mode and flushing of subnormals. A call that finds no
 * memory to give threads work does the work on the calling thread alone. So does every call in a
 * process that was forked off one that used threads; a pool that it makes has none.
 */
struct xent_pool *xent_pool_new(uint32_t threads);

/**
 * Ends a pool of xent_pool_new. Its threads have ended when the call returns, so that a plugin which
 * contains xent, and whose calls all named a pool or threads = 1, can be unloaded. No call may be
 * running on the pool, and no pool may be freed twice. NULL is a no-op.
 */
void xent_pool_free(struct xent_pool *pool);

/**
 * The most stack that a call takes, in bytes: on the calling thread, and on each thread of a pool. At most
 * 48 KiB, whatever the sizes, dtypes, strides and options are. For threads with little stack, as
 * coroutines and musl's threads are.
 */
size_t xent_stack_bytes(void);

/**
 * The instruction set in use: "avx512", "avx2", "neon" or "portable". A non-empty environment
 * variable XENT_ISA lowers the choice. If it names no set that this processor has, every call fails
 * with XENT_ERR_PARAM, and this function returns "none". Static; never NULL.
 */
const char *xent_isa(void);

/**
 * The version, "0.1.0". Static; never NULL.
 */
const char *xent_version(void);

/**
 * Computes the loss of a linear layer's logits, and the other results that `results` asks for.
 *
 * problem, linear, results: not NULL. Ignored rows cost no arithmetic, unless lse, argmax, entropy, top_classes or
 * top_log_probs are asked for, which are results of all rows. Thread-safe. A call that fails writes nothing;
 * XENT_ERR_MEMORY: the working memory could not be had.
 */
xent_status xent_linear_forward(const struct xent_problem *problem,
                                const struct xent_linear *linear,
                                const struct xent_results *results);

/**
 * Computes the gradients of a linear layer from the f64 lse of a forward: for losses whose factors depend on the
 * row losses, such as those of reinforcement learning.
 *
 * problem, linear, lse, grads: not NULL. lse: [rows], packed. grad_output, grad_scale: as in xent_backward.
 * Otherwise as xent_linear_forward_backward.
 */
xent_status xent_linear_backward(const struct xent_problem *problem,
                                 const struct xent_linear *linear,
                                 const double *lse,
                                 const struct xent_input *grad_output,
                                 double grad_scale,
                                 const struct xent_linear_grads *grads);

/**
 * Computes the loss, the other results and the gradients of a linear layer together.
 *
 * problem, linear, grads: not NULL; results may be NULL. grad_output: the gradient of what follows the loss, NULL =
 * 1; any float, one element, or [rows] with XENT_NONE. grad_scale: a further factor, finite. Ignored rows cost no
 * arithmetic, as in xent_linear_forward, and what their hidden states hold affects no gradient. Thread-safe. A
 * call that fails writes nothing; XENT_ERR_MEMORY: the working memory could not be had.
 */
xent_status xent_linear_forward_backward(const struct xent_problem *problem,
                                         const struct xent_linear *linear,
                                         const struct xent_input *grad_output,
                                         double grad_scale,
                                         const struct xent_results *results,
                                         const struct xent_linear_grads *grads);

/**
 * Computes the state of each row over one shard of a vocabulary, as xent_partial_forward does, where a linear layer
 * makes the logits: weight and bias are those of the shard's classes.
 *
 * problem, linear, partials: not NULL. Otherwise as xent_partial_forward and xent_linear_forward. States are results of
 * all rows. Thread-safe. A call that fails writes nothing.
 */
xent_status xent_linear_partial_forward(const struct xent_problem *problem,
                                        const struct xent_linear *linear,
                                        size_t class_offset,
                                        size_t total_classes,
                                        struct xent_partial *partials);

/**
 * Computes what one shard contributes to the gradients of a linear layer, from the merged states of all shards. The
 * gradients of weight and bias are those of the shard's classes. That of the hidden states is a part: the sum of all
 * shards' parts is the gradient.
 *
 * problem, linear, class_offset and total_classes are those of xent_linear_partial_forward, with targets; merged and
 * grads are not NULL. Otherwise as xent_partial_backward and xent_linear_backward. Thread-safe. A call that fails writes
 * nothing.
 */
xent_status xent_linear_partial_backward(const struct xent_problem *problem,
                                         const struct xent_linear *linear,
                                         size_t class_offset,
                                         size_t total_classes,
                                         const struct xent_partial *merged,
                                         const struct xent_input *grad_output,
                                         double grad_scale,
                                         const struct xent_linear_grads *grads);

/**
 * Computes the state of each row over one shard of a vocabulary: over the classes class_offset ..
 * class_offset + problem.classes of total_classes. Reads the logits from memory once.
 *
 * problem describes the shard: logits, and probability targets, are its columns, [rows, classes, inner].
 * classes may be 0; logits and such targets may then be NULL, and the states are XENT_PARTIAL_INIT. Index
 * targets and class_weights are those of the whole vocabulary, and so is the C of label smoothing's e/C.
 * Without targets the states have what lse, argmax and entropy need.
 * partials: not NULL, [rows, inner], packed; it overlaps no operand.
 * A shard that exceeds total_classes is XENT_ERR_SHAPE, XENT_FLAG_LOG_PROBS is XENT_ERR_PARAM.
 * Thread-safe. A call that fails writes nothing.
 */
xent_status xent_partial_forward(const struct xent_problem *problem,
                                 size_t class_offset,
                                 size_t total_classes,
                                 struct xent_partial *partials);

/**
 * Merges `count` states of some shards into as many states of other shards, each into the one at its
 * place.
 *
 * Commutative to the bit, and associative up to rounding; max and argmax are associative exactly.
 * XENT_PARTIAL_INIT, on either side, changes no bit. So any order and any tree of merges serves, such as that
 * of an MPI_Op. The arrays are the same or do not overlap. The call cannot fail.
 */
void xent_partial_merge(struct xent_partial *into,
                        const struct xent_partial *from,
                        size_t count);

/**
 * Computes the results that `results` asks for from the merged states of all shards.
 *
 * Of problem it reads rows, inner, the options, and index targets, class_weights and row operands as the
 * other calls do. It looks at neither logits nor the values of probability targets, whose part the states
 * have: the problem of any shard serves.
 * problem, merged, results: not NULL. merged: [rows, inner], packed. The states do not know the order of the
 * logits: top_classes, top_log_probs and target_ranks are XENT_ERR_PARAM. Thread-safe. A call that fails
 * writes nothing.
 */
xent_status xent_partial_finish(const struct xent_problem *problem,
                                size_t total_classes,
                                const struct xent_partial *merged,
                                const struct xent_results *results);

/**
 * Computes the gradient of the loss with respect to the logits of one shard, from the merged states of all
 * shards.
 *
 * problem, class_offset and total_classes are those of xent_partial_forward, with targets; merged is not
 * NULL, [rows, inner], packed. grad_output, grad_scale and grad_logits are those of xent_backward; without
 * classes grad_logits may have data == NULL. Thread-safe. A call that fails writes nothing.
 */
xent_status xent_partial_backward(const struct xent_problem *problem,
                                  size_t class_offset,
                                  size_t total_classes,
                                  const struct xent_partial *merged,
                                  const struct xent_input *grad_output,
                                  double grad_scale,
                                  const struct xent_output *grad_logits);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* XENT_H */
