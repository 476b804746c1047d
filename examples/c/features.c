/* One function for each feature, to copy from. The README lists them.
 *
 *   cc -std=c11 features.c -Iinclude libxent.a -lpthread -ldl -lm -o features
 *
 * Prints each figure, and exits with 1 if a figure is not as expected. */
#include <xent.h>

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static int failures;

static void expect(const char *what, double got, double expected) {
  const int met = fabs(got - expected) <= 1e-6 * (1 + fabs(expected));
  printf("%-44s %10.6f\n", what, got);
  if (!met)
    fprintf(stderr, "features: %s: expected %.6f, got %.9g\n", what, expected, got);
  failures += !met;
}

static void ok(xent_status status) {
  if (status == XENT_OK)
    return;
  fprintf(stderr, "features: %s: %s\n", xent_status_name(status), xent_last_error());
  exit(1);
}

/* Double precision: these logits are one and the same float. */
static void f64_logits(void) {
  const double logits[4] = {1e6 + 0.001, 1e6 + 0.002, 1e6 + 0.003, 1e6 + 0.004};
  const int64_t target = 0;
  double grad[4], loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output grad_logits = {grad, XENT_F64, {0}};
  problem.rows = 1, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F64, {0}};
  problem.targets = (xent_input){&target, XENT_I64, {0}};
  results.loss = &loss;
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &grad_logits));
  expect("f64: loss", loss, 1.387795);
  expect("f64: gradient at the target", grad[0], -0.750375);
}

/* Logits of bfloat16 or half, as mixed precision has them, and a gradient of float. */
static void half_logits(void) {
  const uint16_t bf16[4] = {0x3f80, 0x4000, 0x3f00, 0}, f16[4] = {0x3c00, 0x4000, 0x3800, 0};
  const uint16_t target = 1; /* both rows are 1, 2, 0.5, 0 */
  float grad[4];
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output grad_logits = {grad, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 4;
  problem.targets = (xent_input){&target, XENT_U16, {0}};
  results.loss = &loss;
  problem.logits = (xent_input){bf16, XENT_BF16, {0}};
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &grad_logits));
  expect("bf16: loss", loss, 0.546006);
  problem.logits = (xent_input){f16, XENT_F16, {0}};
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &grad_logits));
  expect("f16: gradient at the target, in f32", grad[1], -0.420741);
}

/* Segmentation: logits [N, C, H, W] and targets [N, H, W] as they are, without a permute. */
static void images(void) {
  enum { N = 1, C = 3, H = 2, W = 2 };
  float pixels[N][C][H][W] = {{{{2, 0}, {0, 1}}, {{0, 1}, {0, 0}}, {{0, 0}, {3, 0}}}};
  const uint8_t labels[N][H][W] = {{{0, 1}, {2, 0}}};
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output in_place = {pixels, XENT_F32, {0}};
  problem.rows = N, problem.classes = C, problem.inner = (size_t)H * W;
  problem.logits = (xent_input){pixels, XENT_F32, {0}};
  problem.targets = (xent_input){labels, XENT_U8, {0}};
  results.loss = &loss;
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &in_place));
  expect("images: loss", loss, 0.359339);
  expect("images: gradient of the first pixel", pixels[0][0][0][0], -0.053253);
}

/* A matrix that has its classes first, [classes, rows]; the gradient in its place. */
static void transposed(void) {
  enum { CLASSES = 4, ROWS = 2 };
  float columns[CLASSES][ROWS] = {{0.1f, 0}, {0.2f, 0}, {0.3f, 0}, {0.4f, 2}};
  const int32_t targets[ROWS] = {0, 3};
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output in_place = {columns, XENT_F32, {1, ROWS, 1}};
  problem.rows = ROWS, problem.classes = CLASSES;
  problem.logits = (xent_input){columns, XENT_F32, {1, ROWS, 1}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  results.loss = &loss;
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &in_place));
  expect("transposed: loss", loss, 0.941644);
  expect("transposed: gradient at the second target", columns[3][1], -0.144383);
}

/* Unequal classes, and rows that do not count: padding may hold anything. */
static void class_weights(void) {
  const float logits[3][4] = {{0.1f, 0.2f, 0.3f, 0.4f}, {0, 0, 0, 2}, {NAN, NAN, NAN, NAN}};
  const int32_t targets[3] = {0, 3, -1};
  const float weights[4] = {1, 2, 3, 4};
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  problem.rows = 3, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  problem.class_weights = (xent_input){weights, XENT_F32, {0}};
  problem.ignore_index = -1; /* -100 unless set */
  results.loss = &loss;
  ok(xent_forward(&problem, &results));
  expect("class weights, ignore_index: loss", loss, 0.581109);
}

/* Sequences of unequal length by a mask, and a weight for each row that counts. */
static void row_mask(void) {
  const float logits[3][4] = {{0.1f, 0.2f, 0.3f, 0.4f}, {0, 0, 0, 2}, {NAN, NAN, NAN, NAN}};
  const int32_t targets[3] = {0, 3, 12345}; /* a masked target may be anything, too */
  const uint8_t mask[3] = {1, 1, 0};
  const float weights[3] = {1, 3, 1};
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  problem.rows = 3, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  problem.row_mask = (xent_input){mask, XENT_U8, {0}};
  problem.row_weights = (xent_input){weights, XENT_F32, {0}};
  results.loss = &loss;
  ok(xent_forward(&problem, &results));
  expect("row mask, row weights: loss", loss, 0.641199);
}

/* Targets softened by a tenth, against overconfidence. */
static void label_smoothing(void) {
  const float logits[2][4] = {{0.1f, 0.2f, 0.3f, 0.4f}, {0, 0, 0, 2}};
  const int32_t targets[2] = {0, 3};
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  problem.rows = 2, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  problem.label_smoothing = 0.1;
  results.loss = &loss;
  ok(xent_forward(&problem, &results));
  expect("label smoothing: loss", loss, 1.009144);
}

/* Distillation: the targets are a teacher's probabilities, at a temperature. */
static void distillation(void) {
  const double temperature = 2;
  const float logits[4] = {0, 0, 0, 2}, teacher[4] = {0.1f, 0.1f, 0.1f, 0.7f};
  float grad[4];
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output grad_logits = {grad, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){teacher, XENT_F32, {0}};
  problem.logit_scale = 1 / temperature;
  results.loss = &loss;
  /* grad_scale is for the gradient alone */
  ok(xent_forward_backward(&problem, NULL, temperature * temperature, &results, &grad_logits));
  expect("distillation: loss", temperature * temperature * loss, 4.174674);
  expect("distillation: gradient", grad[3], -0.449266);
}

/* Distillation from the classes that a teacher thinks most of, as lists of them are stored. */
static void sparse_targets(void) {
  const float logits[8] = {0.1f, 0.2f, 0.3f, 0.4f, 0.4f, 0.3f, 0.2f, 0.1f};
  const int32_t classes[4] = {3, 0, 1, -100}; /* -100: unused */
  const float probabilities[4] = {0.75f, 0.25f, 1, 0};
  float grad[8];
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output grad_logits = {grad, XENT_F32, {0}};
  problem.rows = 2, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.target_classes = (xent_input){classes, XENT_I32, {0}};
  problem.target_count = 2;
  problem.targets = (xent_input){probabilities, XENT_F32, {0}};
  results.loss = &loss;
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &grad_logits));
  expect("sparse targets: loss", loss, 1.330036);
  expect("sparse targets: gradient", grad[3], -0.230674);
}

/* Distillation from a teacher's logits at a temperature, and the divergence from it. */
static void teacher_logits(void) {
  const double temperature = 2;
  const float logits[8] = {0.1f, 0.2f, 0.3f, 0.4f, 0.4f, 0.3f, 0.2f, 0.1f};
  const float teacher[8] = {1, 2, 3, 4, 2, 2, 0, 0};
  float grad[8];
  double loss = 0, kl[2];
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output grad_logits = {grad, XENT_F32, {0}};
  problem.rows = 2, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){teacher, XENT_F32, {0}};
  problem.logit_scale = problem.target_scale = 1 / temperature;
  results.loss = &loss;
  results.kl = (xent_output){kl, XENT_F64, {0}};
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &grad_logits));
  expect("teacher: loss", loss, 1.361689);
  expect("teacher: divergence of the first row", kl[0], 0.113577);
  expect("teacher: gradient", grad[0], 0.032509);
}

/* The gradient that a teacher gets, or labels that are learned: -ln p of each class. */
static void target_gradient(void) {
  const float logits[4] = {0, 0, 0, 2}, teacher[4] = {0.1f, 0.1f, 0.1f, 0.7f};
  float grad[4];
  double lse = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output grad_targets = {grad, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){teacher, XENT_F32, {0}};
  results.lse = &lse;
  ok(xent_forward(&problem, &results));
  ok(xent_backward_targets(&problem, &lse, NULL, 1.0, &grad_targets));
  expect("gradient of the targets: the first", grad[0], 2.340753);
}

/* NLLLoss: the model ends in log-probabilities, a mixture's for one. */
static void nll_loss(void) {
  const float log_probs[2][3] = {{logf(0.5f), logf(0.25f), logf(0.25f)},
                                 {logf(0.1f), logf(0.1f), logf(0.8f)}};
  const int32_t targets[2] = {0, 2};
  float grad[2][3];
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output grad_log_probs = {grad, XENT_F32, {0}};
  problem.rows = 2, problem.classes = 3;
  problem.flags = XENT_FLAG_LOG_PROBS;
  problem.logits = (xent_input){log_probs, XENT_F32, {0}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  results.loss = &loss;
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &grad_log_probs));
  expect("NLLLoss: loss", loss, 0.458145);
  expect("NLLLoss: gradient at the target", grad[0][0], -0.5);
}

/* z-loss, which keeps lse near 0, and its part of the loss. */
static void z_loss(void) {
  const float logits[4] = {0, 0, 0, 2};
  const int32_t target = 3;
  double loss = 0, part = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  problem.rows = 1, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){&target, XENT_I32, {0}};
  problem.z_loss = 0.01;
  results.loss = &loss, results.z_loss = &part;
  ok(xent_forward(&problem, &results));
  expect("z-loss: loss", loss, 0.395544);
  expect("z-loss: its part", part, 0.054791);
}

/* An entropy bonus, as PPO and GRPO add to their losses, and its part of the loss. */
static void entropy_bonus(void) {
  const float logits[4] = {0, 0, 0, 2};
  const int32_t target = 3;
  float grad[4];
  double loss = 0, part = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output grad_logits = {grad, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){&target, XENT_I32, {0}};
  problem.entropy_bonus = 0.01;
  results.loss = &loss, results.entropy_bonus = &part;
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &grad_logits));
  expect("entropy bonus: loss", loss, 0.331570);
  expect("entropy bonus: its part", part, -0.009183);
  expect("entropy bonus: gradient at the target", grad[3], -0.284658);
}

/* Micro-batches that add up to the batch: each gets the denominators of the whole. */
static void gradient_accumulation(void) {
  const float logits[4][3] = {{1, 2, 3}, {0, 2, 0}, {9, 9, 9}, {3, 1, 0}};
  const int32_t targets[4] = {0, 1, -100, 2};
  const float weights[3] = {1, 2, 3};
  float whole[4][3], parts[4][3];
  double loss = 0, loss_of_part = 0, sum = 0, apart = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  xent_output grad = {whole, XENT_F32, {0}};
  problem.rows = 4, problem.classes = 3, problem.z_loss = 0.01;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  problem.class_weights = (xent_input){weights, XENT_F32, {0}};
  results.loss = &loss;
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &grad));

  for (int row = 0; row < 4; row++)
    if (targets[row] != -100) {
      problem.normalizer += (double)weights[targets[row]]; /* 1 without class weights */
      problem.z_normalizer += 1;
    }
  problem.rows = 2, results.loss = &loss_of_part;
  for (int row = 0; row < 4; row += 2) {
    problem.logits.data = logits[row], problem.targets.data = &targets[row];
    grad.data = parts[row];
    ok(xent_forward_backward(&problem, NULL, 1.0, &results, &grad));
    sum += loss_of_part;
  }
  for (int i = 0; i < 12; i++)
    apart = fmax(apart, fabs((double)whole[i / 3][i % 3] - (double)parts[i / 3][i % 3]));
  expect("gradient accumulation: sum of the losses", sum, loss);
  expect("gradient accumulation: gradients apart by", apart, 0);
}

/* The head of a model like Gemma: scaled logits, kept within a cap. */
static void softcap(void) {
  float logits[4] = {100, 800, -1000, 0};
  const int32_t target = 0;
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_output in_place = {logits, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){&target, XENT_I32, {0}};
  problem.logit_scale = 1.0 / 16, problem.softcap = 30;
  results.loss = &loss;
  ok(xent_forward_backward(&problem, NULL, 1.0, &results, &in_place));
  expect("softcap, logit scale: loss", loss, 21.772168);
  expect("softcap, logit scale: gradient", logits[0], -0.059864);
}

/* Perplexity and accuracy over batches, however many rows of each count. */
static void evaluation(void) {
  const float logits[4][4] = {{0.1f, 0.2f, 0.3f, 0.4f}, {0, 0, 0, 2}, {0, 0, 0, 0}, {0, 0, 0, 2}};
  const int32_t targets[4] = {0, 3, -100, 3};
  double loss = 0, total = 0;
  uint64_t kept = 0, correct = 0, rows = 0, hits = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  problem.rows = 2, problem.classes = 4, problem.reduction = XENT_SUM;
  results.loss = &loss, results.kept_rows = &kept, results.correct = &correct;
  for (int row = 0; row < 4; row += 2) {
    problem.logits = (xent_input){logits[row], XENT_F32, {0}};
    problem.targets = (xent_input){&targets[row], XENT_I32, {0}};
    ok(xent_forward(&problem, &results));
    total += loss, rows += kept, hits += correct;
  }
  expect("evaluation: perplexity", exp(total / (double)rows), 2.098761);
  expect("evaluation: accuracy", (double)hits / (double)rows, 2.0 / 3);
}

/* What there is of each row, from one pass. */
static void row_results(void) {
  const float logits[2][4] = {{0.1f, 0.2f, 0.3f, 0.4f}, {0, 0, 0, 2}};
  const int32_t targets[2] = {0, 3};
  float losses[2], entropy[2];
  double lse[2];
  int64_t argmax[2];
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  problem.rows = 2, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  results.row_losses = (xent_output){losses, XENT_F32, {0}};
  results.entropy = (xent_output){entropy, XENT_F32, {0}};
  results.lse = lse, results.argmax = argmax;
  ok(xent_forward(&problem, &results));
  expect("rows: loss of the second", losses[1], 0.340753);
  expect("rows: lse of the second", lse[1], 2.340753);
  expect("rows: entropy of the second", entropy[1], 0.918284);
  expect("rows: argmax of the second", (double)argmax[1], 3);
}

/* The two largest logits of each row with their log-probabilities, and how many classes come before the target. */
static void top_k(void) {
  const float logits[2][4] = {{0.1f, 0.4f, 0.3f, 0.2f}, {0, 0, 0, 2}};
  const int32_t targets[2] = {3, 3};
  float log_probs[2][2];
  int64_t classes[2][2], ranks[2];
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  problem.rows = 2, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  results.top_count = 2;
  results.top_classes = classes[0];
  results.top_log_probs = (xent_output){log_probs, XENT_F32, {0}};
  results.target_ranks = ranks;
  ok(xent_forward(&problem, &results));
  expect("top-k: second class of the first row", (double)classes[0][1], 2);
  expect("top-k: its log-probability", log_probs[0][1], -1.342536);
  expect("top-k: rank of the target", (double)ranks[0], 2);
}

/* Without targets: what the model says, and how sure it is. */
static void predictions(void) {
  const float logits[2][4] = {{0.1f, 0.2f, 0.3f, 0.4f}, {0, 0, 0, 2}};
  double lse[2];
  int64_t argmax[2];
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  problem.rows = 2, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  results.lse = lse, results.argmax = argmax;
  ok(xent_forward(&problem, &results));
  expect("predictions: class of the second row", (double)argmax[1], 3);
  expect("predictions: its probability", exp((double)logits[1][argmax[1]] - lse[1]), 0.711235);
}

/* Two losses on the same logits: 0.3 of the label's and 0.7 of the teacher's. */
static void accumulate(void) {
  const float logits[4] = {0, 0, 0, 2}, teacher[4] = {0.1f, 0.1f, 0.1f, 0.7f};
  const int32_t target = 3;
  float grad[4];
  xent_problem problem = XENT_PROBLEM_INIT;
  const xent_output grad_logits = {grad, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){&target, XENT_I32, {0}};
  ok(xent_forward_backward(&problem, NULL, 0.3, NULL, &grad_logits)); /* writes */
  problem.targets = (xent_input){teacher, XENT_F32, {0}};
  problem.flags = XENT_FLAG_ACCUMULATE;
  ok(xent_forward_backward(&problem, NULL, 0.7, NULL, &grad_logits)); /* adds */
  expect("accumulate: gradient of both", grad[3], -0.078765);
}

/* A vocabulary of 3 in rows of 4, for the matrix products' sake: the gradient has 0 between its rows.
 * What follows the last row stays as it is. */
static void padded_vocabulary(void) {
  float logits[2][4] = {{0.1f, 0.2f, 0.3f, 9}, {0.3f, 0.2f, 0.1f, 9}};
  const int32_t targets[2] = {0, 2};
  xent_problem problem = XENT_PROBLEM_INIT;
  const xent_output grad_logits = {logits, XENT_F32, {4, 1}}; /* in place; row stride, class stride */
  problem.flags = XENT_FLAG_ZERO_PADDING;
  problem.rows = 2, problem.classes = 3;
  problem.logits = (xent_input){logits, XENT_F32, {4, 1}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  ok(xent_forward_backward(&problem, NULL, 1.0, NULL, &grad_logits));
  logits[1][3] = 0;
  expect("padded vocabulary: gradient at the target", logits[0][0], -0.349695);
  expect("padded vocabulary: padding", logits[0][3], 0);
}

/* A loss of one's own over the row losses (here the sum of their squares): its gradient comes back
 * as grad_output, one number a row. */
static void per_row(void) {
  const float logits[2][4] = {{0.1f, 0.2f, 0.3f, 0.4f}, {0, 0, 0, 2}};
  const int32_t targets[2] = {0, 3};
  float losses[2], upstream[2], grad[2][4];
  double lse[2];
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  const xent_input grad_output = {upstream, XENT_F32, {0}};
  const xent_output grad_logits = {grad, XENT_F32, {0}};
  problem.rows = 2, problem.classes = 4, problem.reduction = XENT_NONE;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  results.row_losses = (xent_output){losses, XENT_F32, {0}}, results.lse = lse;
  ok(xent_forward(&problem, &results));
  for (int row = 0; row < 2; row++)
    upstream[row] = 2 * losses[row];
  ok(xent_backward(&problem, lse, &grad_output, 1.0, &grad_logits));
  expect("gradient for each row: at the first target", grad[0][0], -2.425365);
}

/* Softmax over the axis in the middle of [A, B, C], and the gradient through it. */
static void softmax_axis(void) {
  enum { A = 2, B = 3, C = 2 };
  float x[A][B][C] = {{{0, 5}, {1, 5}, {2, 5}}, {{0, 0}, {0, 0}, {0, 0}}};
  float grad[A][B][C] = {{{0, 0}, {0, 0}, {1, 0}}, {{0, 0}, {0, 0}, {0, 0}}};
  xent_shape shape = XENT_SHAPE_INIT;
  const xent_input y = {x, XENT_F32, {0}}, grad_y = {grad, XENT_F32, {0}};
  const xent_output in_place = {x, XENT_F32, {0}}, grad_x = {grad, XENT_F32, {0}};
  shape.rows = A, shape.classes = B, shape.inner = C;
  ok(xent_softmax(&shape, &y, &in_place));
  expect("softmax over an axis", x[0][2][0], 0.665241);
  ok(xent_softmax_backward(&shape, &y, &grad_y, &grad_x));
  expect("softmax over an axis: gradient", grad[0][2][0], 0.222695);
}

/* Log-softmax over the first axis of [A, B], and the gradient through it. */
static void log_softmax_axis(void) {
  enum { A = 3, B = 2 };
  const float x[A][B] = {{0, 5}, {1, 5}, {2, 5}}, upstream[A][B] = {{0, 0}, {0, 0}, {1, 0}};
  float logp[A][B], grad[A][B];
  xent_shape shape = XENT_SHAPE_INIT;
  const xent_input from = {x, XENT_F32, {0}}, y = {logp, XENT_F32, {0}};
  const xent_input grad_y = {upstream, XENT_F32, {0}};
  const xent_output to = {logp, XENT_F32, {0}}, grad_x = {grad, XENT_F32, {0}};
  shape.rows = 1, shape.classes = A, shape.inner = B;
  ok(xent_log_softmax(&shape, &from, &to));
  expect("log-softmax over an axis", logp[2][0], -0.407606);
  ok(xent_log_softmax_backward(&shape, &y, &grad_y, &grad_x));
  expect("log-softmax over an axis: gradient", grad[2][0], 0.334759);
}

/* A vocabulary in shards, as blocks of one matrix here, or with processes and machines: the states of their rows
 * merge in any order into the results and the gradient of the whole. */
static void shards(void) {
  float logits[2][4] = {{0.1f, 0.2f, 0.3f, 0.4f}, {0.4f, 0.3f, 0.2f, 0.1f}};
  const int32_t targets[2] = {0, 3};
  const size_t offset[2] = {0, 1}, classes[2] = {1, 3};
  xent_partial merged[2] = {XENT_PARTIAL_INIT, XENT_PARTIAL_INIT}, partials[2];
  double loss = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  problem.rows = 2;
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  for (int k = 0; k < 2; k++) {
    problem.classes = classes[k];
    problem.logits = (xent_input){&logits[0][offset[k]], XENT_F32, {4, 1}};
    ok(xent_partial_forward(&problem, offset[k], 4, partials));
    xent_partial_merge(merged, partials, 2);
  }
  results.loss = &loss;
  ok(xent_partial_finish(&problem, 4, merged, &results));
  expect("shards: loss", loss, 1.542536);
  for (int k = 0; k < 2; k++) {
    const xent_output in_place = {&logits[0][offset[k]], XENT_F32, {4, 1}};
    problem.classes = classes[k];
    problem.logits = (xent_input){&logits[0][offset[k]], XENT_F32, {4, 1}};
    ok(xent_partial_backward(&problem, offset[k], 4, merged, NULL, 1.0, &in_place));
  }
  expect("shards: gradient at a target", logits[1][3], -0.393081);
}

/* The calling thread alone, or threads apart from those of the process; the bits are the same. */
static void threads(void) {
  enum { ROWS = 64, CLASSES = 4096 };
  static float logits[ROWS][CLASSES];
  static int32_t targets[ROWS];
  double alone = 0, pooled = 0;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  for (int i = 0; i < ROWS * CLASSES; i++)
    logits[i / CLASSES][i % CLASSES] = (float)(i % 1009) / 100;
  problem.rows = ROWS, problem.classes = CLASSES;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){targets, XENT_I32, {0}};
  problem.threads = 1;
  results.loss = &alone;
  ok(xent_forward(&problem, &results));

  xent_pool *pool = xent_pool_new(2);
  ok(pool ? XENT_OK : XENT_ERR_PARAM);
  problem.threads = 0, problem.pool = pool; /* 0: all of the pool */
  results.loss = &pooled;
  ok(xent_forward(&problem, &results));
  xent_pool_free(pool);
  expect("threads and pool: same bits", alone > pooled || alone < pooled, 0);
}

/* A linear layer and its loss: the logits (0.5, -0.5, 1.7) and (-0.15, 0.55, -0.35) are never stored. */
static void linear_layer(void) {
  const float hidden[4] = {1, 2, 0.5f, -1}, weight[6] = {0.1f, 0.2f, 0.3f, -0.4f, 0.5f, 0.6f};
  const int64_t targets[2] = {2, 0};
  float grad_hidden[4], grad_weight[6];
  double loss;
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_linear linear = XENT_LINEAR_INIT;
  xent_results results = XENT_RESULTS_INIT;
  xent_linear_grads grads = XENT_LINEAR_GRADS_INIT;
  problem.rows = 2, problem.classes = 3; /* no logits */
  problem.targets = (xent_input){targets, XENT_I64, {0}};
  linear.features = 2;
  linear.hidden = (xent_input){hidden, XENT_F32, {0}};
  linear.weight = (xent_input){weight, XENT_F32, {0}};
  results.loss = &loss;
  grads.hidden = (xent_output){grad_hidden, XENT_F32, {0}};
  grads.weight = (xent_output){grad_weight, XENT_F32, {0}};
  ok(xent_linear_forward_backward(&problem, &linear, NULL, 1.0, &results, &grads));
  expect("linear layer: loss", loss, 0.844259);
  expect("linear layer: gradient of the weight", grad_weight[0], -0.078113);
}

/* A failure has a status and a message, and has written nothing. */
static void errors(void) {
  float logits[4] = {0, 0, 0, 2};
  const int32_t target = 7;
  xent_problem problem = XENT_PROBLEM_INIT;
  const xent_output in_place = {logits, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 4;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){&target, XENT_I32, {0}};
  const xent_status status = xent_forward_backward(&problem, NULL, 1.0, NULL, &in_place);
  printf("%s: %s\n", xent_status_name(status), xent_last_error());
  expect("errors: status", status, XENT_ERR_TARGET);
  expect("errors: the logits as before", logits[3], 2);
}

int main(void) {
  f64_logits();
  half_logits();
  images();
  transposed();
  class_weights();
  row_mask();
  label_smoothing();
  distillation();
  sparse_targets();
  teacher_logits();
  target_gradient();
  nll_loss();
  z_loss();
  entropy_bonus();
  gradient_accumulation();
  softcap();
  evaluation();
  row_results();
  top_k();
  predictions();
  accumulate();
  padded_vocabulary();
  per_row();
  softmax_axis();
  log_softmax_axis();
  shards();
  linear_layer();
  threads();
  errors();
  return failures != 0;
}
