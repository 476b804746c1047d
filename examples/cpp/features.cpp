// One function for each feature, to copy from. The README lists them.
//
//   c++ -std=c++17 features.cpp -Iinclude libxent.a -lpthread -ldl -lm -o features
//
// Prints each figure, and exits with 1 if a figure is not as expected.
#include <xent.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <limits>
#include <vector>

namespace {

using std::size_t;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

bool failed = false;

void expect(const char *what, double got, double expected) {
  const bool met = std::abs(got - expected) <= 1e-6 * (1 + std::abs(expected));
  std::printf("%-44s %10.6f\n", what, got);
  if (!met)
    std::fprintf(stderr, "features: %s: expected %.6f, got %.9g\n", what, expected, got);
  failed = failed || !met;
}

// Double precision: these logits are one and the same float.
void f64_logits() {
  const std::vector<double> logits = {1e6 + 0.001, 1e6 + 0.002, 1e6 + 0.003, 1e6 + 0.004};
  const std::vector<std::int64_t> targets = {0};
  std::vector<double> grad(4);
  const double loss = xent::forward_backward(logits, 4, targets, grad);
  expect("f64: loss", loss, 1.387795);
  expect("f64: gradient at the target", grad[0], -0.750375);
}

// Logits of bfloat16 or half, as mixed precision has them, and a gradient of float. Halves of
// another library: xent::as_bf16(pointer), xent::as_f16(pointer).
void half_logits() {
  const std::vector<xent::bf16> bf16 = {{0x3f80}, {0x4000}, {0x3f00}, {0}}; // 1, 2, 0.5, 0
  const std::vector<xent::f16> f16 = {{0x3c00}, {0x4000}, {0x3800}, {0}};   // likewise
  const std::vector<std::uint16_t> targets = {1};
  std::vector<float> grad(4);
  expect("bf16: loss", xent::forward_backward(bf16, 4, targets, grad), 0.546006);
  xent::forward_backward(f16, 4, targets, grad);
  expect("f16: gradient at the target, in f32", grad[1], -0.420741);
}

// Segmentation: logits [N, C, H, W] and targets [N, H, W] as they are, without a permute.
void images() {
  const size_t classes = 3, height = 2, width = 2;
  std::vector<float> pixels = {2, 0, 0, 1, 0, 1, 0, 0, 0, 0, 3, 0};
  const std::vector<std::uint8_t> labels = {0, 1, 2, 0};
  xent::options options;
  options.inner = height * width;
  const double loss = xent::forward_backward(pixels, classes, labels, pixels, options); // in place
  expect("images: loss", loss, 0.359339);
  expect("images: gradient of the first pixel", pixels[0], -0.053253);
}

// A matrix that has its classes first, [classes, rows]; the gradient in its place.
void transposed() {
  const size_t rows = 2, classes = 4;
  std::vector<float> columns = {0.1f, 0, 0.2f, 0, 0.3f, 0, 0.4f, 2};
  const std::vector<int> targets = {0, 3};
  const xent::strides by{1, rows};
  const double loss = xent::forward_backward(xent::input(columns, by), rows, classes, targets,
                                             xent::output(columns, by));
  expect("transposed: loss", loss, 0.941644);
  expect("transposed: gradient at the second target", columns[7], -0.144383);
}

// Unequal classes, and rows that do not count: padding may hold anything.
void class_weights() {
  const std::vector<float> logits = {0.1f, 0.2f, 0.3f, 0.4f, 0, 0, 0, 2, kNan, kNan, kNan, kNan};
  const std::vector<int> targets = {0, 3, -1};
  const std::vector<float> weights = {1, 2, 3, 4};
  xent::options options;
  options.class_weights = weights;
  options.ignore_index = -1; // -100 unless set
  const double loss = xent::forward(logits, 4, targets, options);
  expect("class weights, ignore_index: loss", loss, 0.581109);
}

// Sequences of unequal length by a mask, and a weight for each row that counts.
void row_mask() {
  const std::vector<float> logits = {0.1f, 0.2f, 0.3f, 0.4f, 0, 0, 0, 2, kNan, kNan, kNan, kNan};
  const std::vector<int> targets = {0, 3, 12345}; // a masked target may be anything, too
  const std::array<bool, 3> mask = {true, true, false};
  const std::vector<float> weights = {1, 3, 1};
  xent::options options;
  options.row_mask = mask;
  options.row_weights = weights;
  const double loss = xent::forward(logits, 4, targets, options);
  expect("row mask, row weights: loss", loss, 0.641199);
}

// Targets softened by a tenth, against overconfidence.
void label_smoothing() {
  const std::vector<float> logits = {0.1f, 0.2f, 0.3f, 0.4f, 0, 0, 0, 2};
  const std::vector<int> targets = {0, 3};
  xent::options options;
  options.label_smoothing = 0.1;
  expect("label smoothing: loss", xent::forward(logits, 4, targets, options), 1.009144);
}

// Distillation: the targets are a teacher's probabilities, at a temperature.
void distillation() {
  const double temperature = 2;
  const std::vector<float> logits = {0, 0, 0, 2}, teacher = {0.1f, 0.1f, 0.1f, 0.7f};
  std::vector<float> grad(4);
  xent::options options;
  options.logit_scale = 1 / temperature;
  options.grad_scale = temperature * temperature; // for the gradient alone
  const double loss = xent::forward_backward(logits, 4, teacher, grad, options);
  expect("distillation: loss", temperature * temperature * loss, 4.174674);
  expect("distillation: gradient", grad[3], -0.449266);
}

// Distillation from the classes that a teacher thinks most of, as lists of them are stored.
void sparse_targets() {
  const std::vector<float> logits = {0.1f, 0.2f, 0.3f, 0.4f, 0.4f, 0.3f, 0.2f, 0.1f};
  const std::vector<std::int32_t> classes = {3, 0, 1, -100}; // -100: unused
  const std::vector<float> probabilities = {0.75f, 0.25f, 1, 0};
  std::vector<float> grad(8);
  xent::options options;
  options.target_classes = classes;
  const double loss = xent::forward_backward(logits, 4, probabilities, grad, options);
  expect("sparse targets: loss", loss, 1.330036);
  expect("sparse targets: gradient", grad[3], -0.230674);
}

// Distillation from a teacher's logits at a temperature, and the divergence from it.
void teacher_logits() {
  const double temperature = 2;
  const std::vector<float> logits = {0.1f, 0.2f, 0.3f, 0.4f, 0.4f, 0.3f, 0.2f, 0.1f};
  const std::vector<float> teacher = {1, 2, 3, 4, 2, 2, 0, 0};
  std::vector<float> grad(8);
  std::vector<double> kl(2);
  double loss = 0;
  xent::options options;
  options.logit_scale = options.target_scale = 1 / temperature;
  xent::results results;
  results.loss = &loss;
  results.kl = kl;
  xent::forward_backward(logits, 4, teacher, results, grad, options);
  expect("teacher: loss", loss, 1.361689);
  expect("teacher: divergence of the first row", kl[0], 0.113577);
  expect("teacher: gradient", grad[0], 0.032509);
}

// The gradient that a teacher gets, or labels that are learned: -ln p of each class.
void target_gradient() {
  const std::vector<float> logits = {0, 0, 0, 2}, teacher = {0.1f, 0.1f, 0.1f, 0.7f};
  std::vector<float> grad(4);
  std::vector<double> lse(1);
  xent::results results;
  results.lse = lse.data();
  xent::forward(logits, 4, teacher, results);
  xent::backward_targets(logits, 4, teacher, lse, grad);
  expect("gradient of the targets: the first", grad[0], 2.340753);
}

// NLLLoss: the model ends in log-probabilities, a mixture's for one.
void nll_loss() {
  std::vector<float> log_probs;
  for (const float p : {0.5f, 0.25f, 0.25f, 0.1f, 0.1f, 0.8f})
    log_probs.push_back(std::log(p));
  const std::vector<int> targets = {0, 2};
  std::vector<float> grad(6);
  xent::options options;
  options.log_probs = true;
  expect("NLLLoss: loss", xent::forward_backward(log_probs, 3, targets, grad, options), 0.458145);
  expect("NLLLoss: gradient at the target", grad[0], -0.5);
}

// z-loss, which keeps lse near 0, and its part of the loss.
void z_loss() {
  const std::vector<float> logits = {0, 0, 0, 2};
  const std::vector<int> targets = {3};
  double loss = 0, part = 0;
  xent::options options;
  options.z_loss = 0.01;
  xent::results results;
  results.loss = &loss;
  results.z_loss = &part;
  xent::forward(logits, 4, targets, results, options);
  expect("z-loss: loss", loss, 0.395544);
  expect("z-loss: its part", part, 0.054791);
}

// An entropy bonus, as PPO and GRPO add to their losses, and its part of the loss.
void entropy_bonus() {
  const std::vector<float> logits = {0, 0, 0, 2};
  const std::vector<int> targets = {3};
  std::vector<float> grad(4);
  double loss = 0, part = 0;
  xent::options options;
  options.entropy_bonus = 0.01;
  xent::results results;
  results.loss = &loss;
  results.entropy_bonus = &part;
  xent::forward_backward(logits, 4, targets, results, grad, options);
  expect("entropy bonus: loss", loss, 0.331570);
  expect("entropy bonus: its part", part, -0.009183);
  expect("entropy bonus: gradient at the target", grad[3], -0.284658);
}

// Micro-batches that add up to the batch: each gets the denominators of the whole.
void gradient_accumulation() {
  const size_t rows = 4, classes = 3;
  const std::vector<float> logits = {1, 2, 3, 0, 2, 0, 9, 9, 9, 3, 1, 0}, weights = {1, 2, 3};
  const std::vector<int> targets = {0, 1, -100, 2};
  std::vector<float> whole(12), parts(12);
  xent::options options;
  options.class_weights = weights;
  options.z_loss = 0.01;
  const double loss = xent::forward_backward(logits, classes, targets, whole, options);

  for (const int target : targets)
    if (target != -100) {
      options.normalizer += static_cast<double>(weights[static_cast<size_t>(target)]); // or 1
      options.z_normalizer += 1;
    }
  double sum = 0, apart = 0;
  for (size_t row = 0; row < rows; row += 2)
    sum += xent::forward_backward(&logits[row * classes], 2, classes, &targets[row],
                                  &parts[row * classes], options);
  for (size_t i = 0; i < whole.size(); i++)
    apart = std::fmax(apart, std::abs(whole[i] - parts[i]));
  expect("gradient accumulation: sum of the losses", sum, loss);
  expect("gradient accumulation: gradients apart by", apart, 0);
}

// The head of a model like Gemma: scaled logits, kept within a cap.
void softcap() {
  std::vector<float> logits = {100, 800, -1000, 0};
  const std::vector<int> targets = {0};
  xent::options options;
  options.logit_scale = 1.0 / 16;
  options.softcap = 30;
  const double loss = xent::forward_backward(logits, 4, targets, logits, options); // in place
  expect("softcap, logit scale: loss", loss, 21.772168);
  expect("softcap, logit scale: gradient", logits[0], -0.059864);
}

// Perplexity and accuracy over batches, however many rows of each count.
void evaluation() {
  const std::vector<std::vector<float>> batches = {{0.1f, 0.2f, 0.3f, 0.4f, 0, 0, 0, 2},
                                                   {0, 0, 0, 0, 0, 0, 0, 2}};
  const std::vector<std::vector<int>> targets = {{0, 3}, {-100, 3}};
  double loss = 0, total = 0;
  std::uint64_t kept = 0, correct = 0, rows = 0, hits = 0;
  xent::options options;
  options.reduction = xent::reduction::sum;
  xent::results results;
  results.loss = &loss;
  results.kept_rows = &kept;
  results.correct = &correct;
  for (size_t i = 0; i < batches.size(); i++) {
    xent::forward(batches[i], 4, targets[i], results, options);
    total += loss, rows += kept, hits += correct;
  }
  expect("evaluation: perplexity", std::exp(total / static_cast<double>(rows)), 2.098761);
  expect("evaluation: accuracy", static_cast<double>(hits) / static_cast<double>(rows), 2.0 / 3);
}

// What there is of each row, from one pass.
void row_results() {
  const std::vector<float> logits = {0.1f, 0.2f, 0.3f, 0.4f, 0, 0, 0, 2};
  const std::vector<int> targets = {0, 3};
  std::vector<float> losses(2), entropy(2);
  std::vector<double> lse(2);
  std::vector<std::int64_t> argmax(2);
  xent::results results;
  results.row_losses = losses;
  results.entropy = entropy;
  results.lse = lse.data();
  results.argmax = argmax.data();
  xent::forward(logits, 4, targets, results);
  expect("rows: loss of the second", losses[1], 0.340753);
  expect("rows: lse of the second", lse[1], 2.340753);
  expect("rows: entropy of the second", entropy[1], 0.918284);
  expect("rows: argmax of the second", static_cast<double>(argmax[1]), 3);
}

// The two largest logits of each row with their log-probabilities, and how many classes come before the target.
void top_k() {
  const std::vector<float> logits = {0.1f, 0.4f, 0.3f, 0.2f, 0, 0, 0, 2};
  const std::vector<int> targets = {3, 3};
  std::vector<float> log_probs(4);
  std::vector<std::int64_t> classes(4), ranks(2);
  xent::results results;
  results.top_count = 2;
  results.top_classes = classes.data();
  results.top_log_probs = log_probs;
  results.target_ranks = ranks.data();
  xent::forward(logits, 4, targets, results);
  expect("top-k: second class of the first row", static_cast<double>(classes[1]), 2);
  expect("top-k: its log-probability", log_probs[1], -1.342536);
  expect("top-k: rank of the target", static_cast<double>(ranks[0]), 2);
}

// Without targets: what the model says, and how sure it is.
void predictions() {
  const std::vector<float> logits = {0.1f, 0.2f, 0.3f, 0.4f, 0, 0, 0, 2};
  std::vector<double> lse(2);
  std::vector<std::int64_t> argmax(2);
  xent::results results;
  results.lse = lse.data();
  results.argmax = argmax.data();
  xent::evaluate(logits, 4, results);
  const double largest = logits[4 + static_cast<size_t>(argmax[1])];
  expect("predictions: class of the second row", static_cast<double>(argmax[1]), 3);
  expect("predictions: its probability", std::exp(largest - lse[1]), 0.711235);
}

// Two losses on the same logits: 0.3 of the label's and 0.7 of the teacher's.
void accumulate() {
  const std::vector<float> logits = {0, 0, 0, 2}, teacher = {0.1f, 0.1f, 0.1f, 0.7f};
  const std::vector<int> targets = {3};
  std::vector<float> grad(4);
  xent::options label, distilled;
  label.grad_scale = 0.3;
  distilled.grad_scale = 0.7;
  distilled.accumulate = true;
  xent::forward_backward(logits, 4, targets, grad, label);     // writes
  xent::forward_backward(logits, 4, teacher, grad, distilled); // adds
  expect("accumulate: gradient of both", grad[3], -0.078765);
}

// A vocabulary of 3 in rows of 4, for the matrix products' sake: the gradient has 0 between its rows.
// What follows the last row stays as it is.
void padded_vocabulary() {
  std::vector<float> logits = {0.1f, 0.2f, 0.3f, 9, 0.3f, 0.2f, 0.1f, 9};
  const std::vector<int> targets = {0, 2};
  xent::options options;
  options.zero_padding = true;
  const xent::strides padded(4);
  xent::forward_backward(xent::input(logits.data(), padded), 2, 3, targets, xent::output(logits.data(), padded),
                         options);
  logits[7] = 0;
  expect("padded vocabulary: gradient at the target", logits[0], -0.349695);
  expect("padded vocabulary: padding", logits[3], 0);
}

// A loss of one's own over the row losses (here the sum of their squares): its gradient comes back
// as grad_output, one number a row.
void per_row() {
  const std::vector<float> logits = {0.1f, 0.2f, 0.3f, 0.4f, 0, 0, 0, 2};
  const std::vector<int> targets = {0, 3};
  std::vector<float> losses(2), upstream, grad(8);
  std::vector<double> lse(2);
  xent::options options;
  options.reduction = xent::reduction::none;
  xent::results results;
  results.row_losses = losses;
  results.lse = lse.data();
  xent::forward(logits, 4, targets, results, options);
  for (const float loss : losses)
    upstream.push_back(2 * loss);
  options.grad_output = upstream;
  xent::backward(logits, 4, targets, lse, grad, options);
  expect("gradient for each row: at the first target", grad[0], -2.425365);
}

// Softmax over the axis in the middle of [A, B, C], and the gradient through it.
void softmax_axis() {
  const size_t b = 3, c = 2; // and a = 2, which follows from the size
  std::vector<float> x = {0, 5, 1, 5, 2, 5, 0, 0, 0, 0, 0, 0};
  std::vector<float> grad = {0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0};
  xent::softmax_options options;
  options.inner = c;
  xent::softmax(x, b, x, options); // in place
  expect("softmax over an axis", x[4], 0.665241);
  xent::softmax_backward(x, b, grad, grad, options);
  expect("softmax over an axis: gradient", grad[4], 0.222695);
}

// Log-softmax over the first axis of [A, B], and the gradient through it.
void log_softmax_axis() {
  const size_t a = 3, b = 2;
  const std::vector<float> x = {0, 5, 1, 5, 2, 5}, upstream = {0, 0, 0, 0, 1, 0};
  std::vector<float> logp(6), grad(6);
  xent::softmax_options options;
  options.inner = b;
  xent::log_softmax(x, a, logp, options);
  expect("log-softmax over an axis", logp[4], -0.407606);
  xent::log_softmax_backward(logp, a, upstream, grad, options);
  expect("log-softmax over an axis: gradient", grad[4], 0.334759);
}

// A vocabulary in shards, as blocks of one matrix here, or with processes and machines: the states of their rows
// merge in any order into the results and the gradient of the whole.
void shards() {
  const std::vector<float> first = {0.1f, 0.4f}, others = {0.2f, 0.3f, 0.4f, 0.3f, 0.2f, 0.1f}; // of 4 classes
  const std::vector<int> targets = {0, 3};
  std::vector<xent::partial> merged(2), partials(2);
  xent::partial_forward(first, 1, targets, 0, 4, merged);
  xent::partial_forward(others, 3, targets, 1, 4, partials);
  xent::partial_merge(merged, partials);
  expect("shards: loss", xent::partial_finish(targets, 4, merged), 1.542536);
  std::vector<float> grad(6);
  xent::partial_backward(others, 3, targets, 1, 4, merged, grad);
  expect("shards: gradient at a target", grad[5], -0.393081);
}

// The calling thread alone, or threads apart from those of the process; the bits are the same.
void threads() {
  const size_t rows = 64, classes = 4096;
  std::vector<float> logits(rows * classes);
  for (size_t i = 0; i < logits.size(); i++)
    logits[i] = static_cast<float>(i % 1009) / 100;
  const std::vector<int> targets(rows);
  xent::options options;
  options.threads = 1;
  const double alone = xent::forward(logits, classes, targets, options);

  const xent::pool pool(2);
  options.threads = 0; // all of the pool
  options.pool = &pool;
  const double pooled = xent::forward(logits, classes, targets, options);
  expect("threads and pool: same bits", alone > pooled || alone < pooled, 0);
}

// A linear layer and its loss: the logits (0.5, -0.5, 1.7) and (-0.15, 0.55, -0.35) are never stored.
void linear_layer() {
  const std::vector<float> hidden = {1, 2, 0.5f, -1}, weight = {0.1f, 0.2f, 0.3f, -0.4f, 0.5f, 0.6f};
  const std::vector<std::int64_t> targets = {2, 0};
  std::vector<float> grad_hidden(4), grad_weight(6);
  xent::linear layer;
  layer.features = 2;
  layer.hidden = hidden;
  layer.weight = weight;
  xent::linear_grads grads;
  grads.hidden = grad_hidden;
  grads.weight = grad_weight;
  expect("linear layer: loss", xent::forward_backward(layer, 2, 3, targets, grads), 0.844259);
  expect("linear layer: gradient of the weight", grad_weight[0], -0.078113);
}

// A failure throws, with a status and a message, and has written nothing.
void errors() {
  std::vector<float> logits = {0, 0, 0, 2};
  const std::vector<int> targets = {7};
  xent_status status = XENT_OK;
  try {
    xent::forward_backward(logits, 4, targets, logits);
  } catch (const xent::error &error) {
    std::printf("%s: %s\n", error.name(), error.what());
    status = error.status();
  }
  expect("errors: status", status, XENT_ERR_TARGET);
  expect("errors: the logits as before", logits[3], 2);
}

} // namespace

int main() {
  try {
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
  } catch (const std::exception &error) {
    std::fprintf(stderr, "features: %s\n", error.what());
    return 1;
  }
  return failed ? 1 : 0;
}
