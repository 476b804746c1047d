// A neural word model trained on the King James Bible with xent as its loss.
//
//   cargo xtask demo            builds the library and this file, and runs it
//   train_lm kjv.txt [--full]   the program by itself
//
// The model is the classic one: the embeddings of the last words, a tanh layer,
// and an output layer with a logit for every word that the text has at least
// twice. The output layer is one xent call, which takes its input, its weights
// and the words that follow, and returns the loss and all three gradients. The
// [batch, classes] matrix of logits is never there.
//
// The same steps then run twice more from the same start, with the logits stored:
// a matrix product writes them, a loss turns them, in place, into their gradient,
// and two more products make the gradients. Once the loss is xent's, once it is
// plain loops. All losses agree; the program prints what a step takes each way,
// and the memory.
//
// Everything is seeded, and no sum depends on the number of threads, so two runs
// of one binary print the same losses.

#include <xent.hpp>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {

using std::size_t;

constexpr size_t kContext = 5;    // words the model looks back
constexpr size_t kEmbedding = 48; // numbers a word becomes
constexpr size_t kHidden = 128;
constexpr size_t kBatch = 256;
constexpr float kLearningRate = 4e-3F; // at the start; falls linearly to zero
constexpr size_t kCompared = 700;      // steps that run in all three ways
constexpr double kAgreement = 1e-4;    // a step's losses may differ by this
constexpr double kPerplexity = 300.0;  // the trained model has to be below

double now() {
  using clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

// SplitMix64: small, and the same numbers with every standard library.
class Random {
public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15U);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  size_t below(size_t n) { return static_cast<size_t>(uniform() * static_cast<double>(n)); }

private:
  std::uint64_t state_;
};

// ---- threads ------------------------------------------------------------------

// A fixed team: run(work) calls work(part) once for every part in [0, size) and
// returns when all are done. Idle members sleep, so that xent's own threads have
// the cores to themselves during the loss.
class Team {
public:
  explicit Team(size_t size) {
    for (size_t part = 1; part < size; ++part) {
      members_.emplace_back([this, part] { serve(part); });
    }
  }
  Team(const Team &) = delete;
  Team &operator=(const Team &) = delete;
  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      ++round_;
    }
    wake_.notify_all();
    for (std::thread &member : members_) {
      member.join();
    }
  }

  size_t size() const { return members_.size() + 1; }

  void run(const std::function<void(size_t)> &work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      busy_ = members_.size();
      ++round_;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  // Splits [0, count) into one range a member, with borders at multiples of
  // `grain`, and calls work(begin, end).
  template <class Work> void split(size_t count, size_t grain, const Work &work) {
    const size_t grains = (count + grain - 1) / grain;
    run([&](size_t part) {
      const size_t begin = std::min(count, grains * part / size() * grain);
      const size_t end = std::min(count, grains * (part + 1) / size() * grain);
      if (begin < end) {
        work(begin, end);
      }
    });
  }

private:
  void serve(size_t part) {
    std::uint64_t seen = 0;
    for (;;) {
      const std::function<void(size_t)> *work = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (stop_) {
          return;
        }
        work = work_;
      }
      (*work)(part);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) {
        done_.notify_one();
      }
    }
  }

  std::vector<std::thread> members_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  const std::function<void(size_t)> *work_ = nullptr;
  size_t busy_ = 0;
  std::uint64_t round_ = 0;
  bool stop_ = false;
};

// ---- matrix product -----------------------------------------------------------

// An operand of the product: element (i, j) is data[i * row + j * column], so a
// transposed matrix is one with its strides swapped.
struct Matrix {
  const float *data;
  size_t row;
  size_t column;
};

// Eight floats that the compiler keeps in a register; gcc and clang both know it.
using Lanes = float __attribute__((vector_size(32)));

constexpr size_t kLanes = 8;
constexpr size_t kTileRows = 6; // 6 rows of 2 x 8 sums fit the 16 registers of AVX2
constexpr size_t kTileColumns = 2 * kLanes;
constexpr size_t kTileDepth = 256; // a packed panel of b: 16 KiB, at home in L1

// One tile of c += a * panel. The sums live in registers over the whole depth,
// which needs the number of rows to be a constant.
template <size_t Rows>
void tile(size_t depth, Matrix a, const float *panel, float *c, size_t c_row, size_t columns) {
  Lanes sum[Rows][2] = {};
  for (size_t k = 0; k < depth; ++k) {
    Lanes b[2];
    std::memcpy(b, panel + k * kTileColumns, sizeof b);
    for (size_t i = 0; i < Rows; ++i) {
      const float x = a.data[i * a.row + k * a.column];
      sum[i][0] += x * b[0];
      sum[i][1] += x * b[1];
    }
  }
  for (size_t i = 0; i < Rows; ++i) {
    float row[kTileColumns];
    std::memcpy(row, sum[i], sizeof row);
    for (size_t j = 0; j < columns; ++j) {
      c[i * c_row + j] += row[j];
    }
  }
}

void tiles(size_t rows, size_t depth, Matrix a, const float *panel, float *c, size_t c_row,
           size_t columns) {
  size_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    const Matrix block = {a.data + i * a.row, a.row, a.column};
    tile<kTileRows>(depth, block, panel, c + i * c_row, c_row, columns);
  }
  for (; i < rows; ++i) {
    const Matrix block = {a.data + i * a.row, a.row, a.column};
    tile<1>(depth, block, panel, c + i * c_row, c_row, columns);
  }
}

// c = bias + a * b, with a [m, depth], b [depth, n] and c packed [m, n]; bias is
// [n] or null. Each element is summed in the order of k whichever thread does it.
void multiply(Team &team, size_t m, size_t n, size_t depth, Matrix a, Matrix b, const float *bias,
              float *c) {
  const auto block = [&](size_t row_begin, size_t row_end, size_t column_begin,
                         size_t column_end) {
    std::vector<float> panel(kTileDepth * kTileColumns);
    for (size_t i = row_begin; i < row_end; ++i) {
      float *out = c + i * n;
      if (bias != nullptr) {
        std::copy(bias + column_begin, bias + column_end, out + column_begin);
      } else {
        std::fill(out + column_begin, out + column_end, 0.0F);
      }
    }
    for (size_t k0 = 0; k0 < depth; k0 += kTileDepth) {
      const size_t k_count = std::min(kTileDepth, depth - k0);
      for (size_t j0 = column_begin; j0 < column_end; j0 += kTileColumns) {
        const size_t columns = std::min(kTileColumns, column_end - j0);
        for (size_t k = 0; k < k_count; ++k) {
          const float *from = b.data + (k0 + k) * b.row + j0 * b.column;
          for (size_t j = 0; j < kTileColumns; ++j) {
            panel[k * kTileColumns + j] = j < columns ? from[j * b.column] : 0.0F;
          }
        }
        const Matrix left = {a.data + row_begin * a.row + k0 * a.column, a.row, a.column};
        tiles(row_end - row_begin, k_count, left, panel.data(), c + row_begin * n + j0, n,
              columns);
      }
    }
  };
  if (n > m) {
    team.split(n, kTileColumns, [&](size_t begin, size_t end) { block(0, m, begin, end); });
  } else {
    team.split(m, kTileRows, [&](size_t begin, size_t end) { block(begin, end, 0, n); });
  }
}

// ---- text ---------------------------------------------------------------------

struct Corpus {
  std::vector<std::string> words;  // by class; 0 = unknown, 1 = end of a verse
  std::vector<std::int32_t> train; // the text as classes
  std::vector<std::int32_t> held_out;
  size_t verses = 0;
};

constexpr std::int32_t kUnknown = 0;
constexpr std::int32_t kVerseEnd = 1;

// Words in lower case, punctuation marks on their own, and a mark after each verse.
std::vector<std::string> tokens_of(const std::string &verse) {
  std::vector<std::string> tokens;
  std::string word;
  const auto flush = [&] {
    if (!word.empty()) {
      tokens.push_back(word);
      word.clear();
    }
  };
  for (const char byte : verse) {
    const auto c = static_cast<unsigned char>(byte);
    if (std::isalnum(c) != 0 || c == '\'') {
      word.push_back(static_cast<char>(std::tolower(c)));
    } else {
      flush();
      if (std::isspace(c) == 0) {
        tokens.emplace_back(1, byte);
      }
    }
  }
  flush();
  tokens.emplace_back("\n");
  return tokens;
}

Corpus read_corpus(const char *path) {
  std::ifstream file(path);
  if (!file) {
    throw std::runtime_error(std::string("cannot open ") + path);
  }
  std::vector<std::vector<std::string>> verses;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty()) {
      verses.push_back(tokens_of(line));
    }
  }
  std::unordered_map<std::string, size_t> count;
  for (const auto &verse : verses) {
    for (const auto &word : verse) {
      ++count[word];
    }
  }

  Corpus corpus;
  corpus.verses = verses.size();
  corpus.words = {"<unknown>", "\n"};
  std::unordered_map<std::string, std::int32_t> classes = {{"\n", kVerseEnd}};
  const size_t train_verses = verses.size() - verses.size() / 20;
  for (size_t i = 0; i < verses.size(); ++i) {
    auto &part = i < train_verses ? corpus.train : corpus.held_out;
    for (const auto &word : verses[i]) {
      if (count[word] < 2) {
        part.push_back(kUnknown);
        continue;
      }
      const auto next = static_cast<std::int32_t>(corpus.words.size());
      const auto found = classes.emplace(word, next);
      if (found.second) {
        corpus.words.push_back(word);
      }
      part.push_back(found.first->second);
    }
  }
  if (corpus.held_out.size() <= kContext || corpus.train.size() <= kContext) {
    throw std::runtime_error(std::string(path) + " is too short to train on");
  }
  return corpus;
}

// ---- model --------------------------------------------------------------------

// Weights with their gradient and Adam's two moments.
struct Parameter {
  explicit Parameter(size_t count) : weight(count), gradient(count), mean(count), square(count) {}

  void randomise(Random &random, double limit) {
    for (float &w : weight) {
      w = static_cast<float>((2.0 * random.uniform() - 1.0) * limit);
    }
  }

  std::vector<float> weight, gradient, mean, square;
};

// Mean cross-entropy over the rows; the gradient replaces the logits.
using Loss = double (*)(Team &, float *, size_t, size_t, const std::int32_t *);

class Model {
public:
  // Without a `loss` the output layer is one xent call. With one it stores its logits.
  Model(Team &team, size_t classes, std::uint64_t seed, Loss loss)
      : team_(team), classes_(classes), loss_(loss), embedding_(classes * kEmbedding),
        hidden_weight_(kInput * kHidden), hidden_bias_(kHidden),
        output_weight_(classes * kHidden), output_bias_(classes), input_(kBatch * kInput),
        hidden_(kBatch * kHidden), logits_(loss != nullptr ? kBatch * classes : 0),
        hidden_gradient_(kBatch * kHidden), input_gradient_(kBatch * kInput) {
    Random random(seed);
    embedding_.randomise(random, 0.5);
    hidden_weight_.randomise(random, 1.7 / std::sqrt(static_cast<double>(kInput)));
    output_weight_.randomise(random, 0.1 / std::sqrt(static_cast<double>(kHidden)));
  }

  // The mean loss of the words that follow the contexts, and the gradients of all
  // weights. context[i] points at the kContext words before word i.
  double gradients(const std::vector<const std::int32_t *> &context, const std::int32_t *targets) {
    forward(context);
    const double start = now();
    const double loss = loss_ == nullptr ? output_layer(context.size(), targets)
                                         : stored_output_layer(context.size(), targets);
    output_seconds_ = now() - start;
    backward(context);
    return loss;
  }

  // The sum of the losses alone.
  double sum_of_losses(const std::vector<const std::int32_t *> &context,
                       const std::int32_t *targets) {
    forward(context);
    xent::options options = options_of_xent();
    options.reduction = xent::reduction::sum;
    return xent::forward(layer(), context.size(), classes_, targets, options);
  }

  // The logits for the word that follows one context.
  std::vector<float> logits(const std::int32_t *context) {
    forward({context});
    std::vector<float> logits(classes_);
    multiply_logits(1, logits.data());
    return logits;
  }

  // One step of Adam.
  void update(float rate) {
    constexpr float keep_mean = 0.9F;
    constexpr float keep_square = 0.99F;
    ++steps_;
    const float mean_scale = 1.0F / (1.0F - std::pow(keep_mean, static_cast<float>(steps_)));
    const float square_scale = 1.0F / (1.0F - std::pow(keep_square, static_cast<float>(steps_)));
    for (Parameter *p : {&embedding_, &hidden_weight_, &hidden_bias_, &output_weight_,
                         &output_bias_}) {
      float *const weight = p->weight.data();
      float *const mean = p->mean.data();
      float *const square = p->square.data();
      const float *const gradient = p->gradient.data();
      team_.split(p->weight.size(), 64, [=](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
          const float g = gradient[i];
          mean[i] = keep_mean * mean[i] + (1.0F - keep_mean) * g;
          square[i] = keep_square * square[i] + (1.0F - keep_square) * g * g;
          weight[i] -=
              rate * mean_scale * mean[i] / (std::sqrt(square_scale * square[i]) + kAdamEpsilon);
        }
      });
    }
  }

  size_t classes() const { return classes_; }
  // What the output layer took of the last step.
  double output_seconds() const { return output_seconds_; }

private:
  static constexpr size_t kInput = kContext * kEmbedding;
  static constexpr float kAdamEpsilon = 1e-6F;

  static size_t word(std::int32_t index) { return static_cast<size_t>(index); }

  // Fills hidden_ for the words that follow the contexts.
  void forward(const std::vector<const std::int32_t *> &context) {
    const size_t rows = context.size();
    for (size_t i = 0; i < rows; ++i) {
      for (size_t j = 0; j < kContext; ++j) {
        const float *from = &embedding_.weight[word(context[i][j]) * kEmbedding];
        std::copy(from, from + kEmbedding, &input_[i * kInput + j * kEmbedding]);
      }
    }
    multiply(team_, rows, kHidden, kInput, {input_.data(), kInput, 1},
             {hidden_weight_.weight.data(), kHidden, 1}, hidden_bias_.weight.data(),
             hidden_.data());
    for (size_t i = 0; i < rows * kHidden; ++i) {
      hidden_[i] = std::tanh(hidden_[i]);
    }
  }

  // The output layer and its loss: the loss, and the gradients of its input and weights.
  double output_layer(size_t rows, const std::int32_t *targets) {
    xent::linear_grads gradients;
    gradients.hidden = hidden_gradient_;
    gradients.weight = output_weight_.gradient;
    gradients.bias = output_bias_.gradient;
    return xent::forward_backward(layer(), rows, classes_, targets, gradients, options_of_xent());
  }

  // The same with its logits in memory.
  double stored_output_layer(size_t rows, const std::int32_t *targets) {
    float *const gradient = logits_.data();
    multiply_logits(rows, gradient);
    const double loss = loss_(team_, gradient, rows, classes_, targets);
    multiply(team_, classes_, kHidden, rows, {gradient, 1, classes_}, {hidden_.data(), kHidden, 1},
             nullptr, output_weight_.gradient.data());
    sum_rows(gradient, rows, classes_, output_bias_.gradient.data());
    multiply(team_, rows, kHidden, classes_, {gradient, classes_, 1},
             {output_weight_.weight.data(), kHidden, 1}, nullptr, hidden_gradient_.data());
    return loss;
  }

  void multiply_logits(size_t rows, float *logits) {
    multiply(team_, rows, classes_, kHidden, {hidden_.data(), kHidden, 1},
             {output_weight_.weight.data(), 1, kHidden}, output_bias_.weight.data(), logits);
  }

  xent::linear layer() const {
    xent::linear layer;
    layer.features = kHidden;
    layer.hidden = hidden_.data();
    layer.weight = output_weight_.weight;
    layer.bias = output_bias_.weight;
    return layer;
  }

  xent::options options_of_xent() const {
    xent::options options;
    options.threads = static_cast<std::uint32_t>(team_.size());
    return options;
  }

  // From the gradient of the tanh layer's output to those of the weights below it.
  void backward(const std::vector<const std::int32_t *> &context) {
    const size_t rows = context.size();
    for (size_t i = 0; i < rows * kHidden; ++i) {
      hidden_gradient_[i] *= 1.0F - hidden_[i] * hidden_[i];
    }
    multiply(team_, kInput, kHidden, rows, {input_.data(), 1, kInput},
             {hidden_gradient_.data(), kHidden, 1}, nullptr, hidden_weight_.gradient.data());
    sum_rows(hidden_gradient_.data(), rows, kHidden, hidden_bias_.gradient.data());
    multiply(team_, rows, kInput, kHidden, {hidden_gradient_.data(), kHidden, 1},
             {hidden_weight_.weight.data(), 1, kHidden}, nullptr, input_gradient_.data());
    std::fill(embedding_.gradient.begin(), embedding_.gradient.end(), 0.0F);
    for (size_t i = 0; i < rows; ++i) {
      for (size_t j = 0; j < kContext; ++j) {
        const float *from = &input_gradient_[i * kInput + j * kEmbedding];
        float *to = &embedding_.gradient[word(context[i][j]) * kEmbedding];
        for (size_t k = 0; k < kEmbedding; ++k) {
          to[k] += from[k];
        }
      }
    }
  }

  void sum_rows(const float *from, size_t rows, size_t columns, float *to) {
    team_.split(columns, 64, [=](size_t begin, size_t end) {
      std::fill(to + begin, to + end, 0.0F);
      for (size_t i = 0; i < rows; ++i) {
        for (size_t j = begin; j < end; ++j) {
          to[j] += from[i * columns + j];
        }
      }
    });
  }

  Team &team_;
  size_t classes_;
  Loss loss_;
  Parameter embedding_, hidden_weight_, hidden_bias_, output_weight_, output_bias_;
  std::vector<float> input_, hidden_, logits_, hidden_gradient_, input_gradient_;
  double output_seconds_ = 0.0;
  int steps_ = 0;
};

// ---- losses of stored logits ----------------------------------------------------

double xent_loss(Team &team, float *logits, size_t rows, size_t classes,
                 const std::int32_t *targets) {
  xent::options options;
  options.threads = static_cast<std::uint32_t>(team.size());
  return xent::forward_backward(logits, rows, classes, targets, logits, options);
}

// What one writes without a library: the maximum, then one loop for the sum of
// exp and one for the gradient. Rows are shared out over as many threads, and
// the compiler vectorises all three loops, exp included where its library can.
double plain_loss(Team &team, float *logits, size_t rows, size_t classes,
                  const std::int32_t *targets) {
  std::vector<double> row_loss(rows);
  const float scale = 1.0F / static_cast<float>(rows);
  team.split(rows, 1, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      float *const x = logits + i * classes;
      const auto target = static_cast<size_t>(targets[i]);
      const float at_target = x[target];
      float max = x[0];
      for (size_t c = 1; c < classes; ++c) {
        max = x[c] > max ? x[c] : max;
      }
      float sum = 0.0F;
      for (size_t c = 0; c < classes; ++c) {
        x[c] = std::exp(x[c] - max);
        sum += x[c];
      }
      const float factor = scale / sum;
      for (size_t c = 0; c < classes; ++c) {
        x[c] *= factor;
      }
      x[target] -= scale;
      row_loss[i] = static_cast<double>(max - at_target) + std::log(static_cast<double>(sum));
    }
  });
  double loss = 0.0;
  for (const double one : row_loss) {
    loss += one;
  }
  return loss / static_cast<double>(rows);
}

// ---- training -----------------------------------------------------------------

struct Run {
  std::vector<double> losses;         // of every step
  std::vector<double> seconds;        // what it took
  std::vector<double> output_seconds; // what the output layer took of it
};

// The first `count` of `steps` steps: the learning rate falls to zero over all of them.
Run train(Model &model, const Corpus &corpus, size_t count, size_t steps) {
  Run run;
  Random random(2);
  std::vector<const std::int32_t *> context(kBatch);
  std::vector<std::int32_t> targets(kBatch);
  const size_t report = std::max<size_t>(1, count / 10);
  double sum = 0.0; // of the losses since the last report, and so on
  double seconds = 0.0;
  double output_seconds = 0.0;
  for (size_t step = 0; step < count; ++step) {
    for (size_t i = 0; i < kBatch; ++i) {
      const size_t at = random.below(corpus.train.size() - kContext);
      context[i] = &corpus.train[at];
      targets[i] = corpus.train[at + kContext];
    }
    const double start = now();
    run.losses.push_back(model.gradients(context, targets.data()));
    const double done = static_cast<double>(step) / static_cast<double>(steps);
    model.update(kLearningRate * static_cast<float>(1.0 - done));
    run.seconds.push_back(now() - start);
    run.output_seconds.push_back(model.output_seconds());

    sum += run.losses.back();
    seconds += run.seconds.back();
    output_seconds += run.output_seconds.back();
    if ((step + 1) % report == 0) {
      std::printf("  step %5zu of %zu   loss %.4f   %6.0f words/s   %4.1f %% of the step in the output layer\n",
                  step + 1, count, sum / static_cast<double>(report),
                  static_cast<double>(report * kBatch) / seconds, 100.0 * output_seconds / seconds);
      std::fflush(stdout);
      sum = seconds = output_seconds = 0.0;
    }
  }
  return run;
}

// exp of the mean loss over the held-out verses: forward only.
double perplexity(Model &model, const Corpus &corpus) {
  const std::vector<std::int32_t> &text = corpus.held_out;
  std::vector<const std::int32_t *> context;
  double sum = 0.0;
  for (size_t at = kContext; at < text.size(); at += kBatch) {
    const size_t rows = std::min(kBatch, text.size() - at);
    context.resize(rows);
    for (size_t i = 0; i < rows; ++i) {
      context[i] = &text[at + i - kContext];
    }
    sum += model.sum_of_losses(context, &text[at]);
  }
  return std::exp(sum / static_cast<double>(text.size() - kContext));
}

// Samples a few words that follow the start of a verse.
void speak(Model &model, const Corpus &corpus, size_t count) {
  constexpr double temperature = 0.7; // below 1: prefers what the model is sure of
  Random random(3);
  std::vector<std::int32_t> text(kContext, kVerseEnd);
  std::vector<double> weight(model.classes());
  std::string line = " ";
  for (size_t n = 0; n < count; ++n) {
    const std::vector<float> logits = model.logits(&text[text.size() - kContext]);
    const double max = *std::max_element(logits.begin(), logits.end());
    double sum = 0.0;
    for (size_t c = 0; c < weight.size(); ++c) {
      weight[c] = std::exp((static_cast<double>(logits[c]) - max) / temperature);
      sum += c == kUnknown ? (weight[c] = 0.0) : weight[c];
    }
    double left = random.uniform() * sum;
    size_t pick = kVerseEnd;
    for (size_t c = 0; c < weight.size(); ++c) {
      left -= weight[c];
      if (left < 0.0) {
        pick = c;
        break;
      }
    }
    text.push_back(static_cast<std::int32_t>(pick));
    const std::string &word = corpus.words[pick];
    const auto first = static_cast<unsigned char>(word[0]);
    if (std::isalnum(first) != 0 || word == "(") {
      line += ' ';
    }
    line += word == "\n" ? "\n " : word;
  }
  std::printf("%s ...\n", line.c_str());
}

// Of the first `count`. Unlike the sum, it is not moved by what else the machine does.
double median(std::vector<double> values, size_t count) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(count / 2);
  std::nth_element(values.begin(), middle, values.begin() + static_cast<std::ptrdiff_t>(count));
  return *middle;
}

// MiB that are resident; 0 where the system does not tell.
double resident_memory() {
#ifdef __GLIBC__
  malloc_trim(0); // what is free is not counted
#endif
  std::ifstream file("/proc/self/status");
  for (std::string name; file >> name;) {
    double kib = 0.0;
    if (name == "VmRSS:" && file >> kib) {
      return kib / 0x1p10;
    }
  }
  return 0.0;
}

int demo(const char *path, bool full) {
  const size_t steps = full ? 15000 : kCompared;
  const size_t threads = std::max(1U, std::thread::hardware_concurrency());
  Team team(threads);
  const Corpus corpus = read_corpus(path);
  const size_t classes = corpus.words.size();
  std::printf("%zu verses, %zu words to train on, %zu held out, %zu classes\n", corpus.verses,
              corpus.train.size(), corpus.held_out.size(), classes);
  std::printf("xent %s (%s), %zu threads, %zu words a step\n\n", xent_version(), xent_isa(),
              threads, kBatch);

  Run without_logits;
  double reached = 0.0;
  double memory = 0.0;
  {
    Model model(team, classes, 1, nullptr);
    std::printf("Training with xent. Held-out perplexity at the start: %.1f\n",
                perplexity(model, corpus));
    without_logits = train(model, corpus, steps, steps);
    memory = resident_memory();
    reached = perplexity(model, corpus);
    std::printf("Held-out perplexity at the end: %.1f\n\n", reached);
    speak(model, corpus, 60);
  }
  double stored_memory = 0.0;
  const auto again = [&](const char *what, Loss loss) {
    std::printf("\n%s %zu steps from the same start with stored logits, and %s.\n",
                full ? "The first" : "The same", kCompared, what);
    Model model(team, classes, 1, loss);
    const Run run = train(model, corpus, kCompared, steps);
    stored_memory = resident_memory();
    return run;
  };
  const Run stored = again("xent for the loss", xent_loss);
  const Run loops = again("plain loops for the loss", plain_loss);

  // All models stepped on their own from the same weights, so this covers the
  // gradients as well: an error in one would move every loss after it.
  double apart = 0.0;
  for (const Run *other : {&stored, &loops}) {
    for (size_t i = 0; i < kCompared; ++i) {
      const double gap = std::abs(without_logits.losses[i] - other->losses[i]);
      apart = gap <= apart ? apart : gap; // a NaN stays
    }
  }
  std::printf("\nThe losses of a step differ by at most %.1e over these %zu steps.\n\n", apart,
              kCompared);
  std::printf("Median of a step of %zu words and %zu classes, %zu threads; the output layer's part:\n",
              kBatch, classes, threads);
  const double own = 1e3 * median(without_logits.seconds, kCompared);
  const auto print = [&](const char *what, const Run &run) {
    const double step = 1e3 * median(run.seconds, kCompared);
    std::printf("  %-36s %7.2f ms  %7.2f ms   %.2fx\n", what, step,
                1e3 * median(run.output_seconds, kCompared), step / own);
  };
  print("one call of xent, no logits", without_logits);
  print("stored logits, xent for the loss", stored);
  print("stored logits, plain loops", loops);
  std::printf("The logits that are not there would take %.1f MiB. The process has %.1f MiB "
              "without them, %.1f MiB with.\n",
              static_cast<double>(kBatch * classes * sizeof(float)) / 0x1p20, memory,
              stored_memory);

  if (!(apart <= kAgreement)) {
    std::fprintf(stderr, "train_lm: the losses differ by more than %g\n", kAgreement);
    return 1;
  }
  if (!(reached < kPerplexity)) {
    std::fprintf(stderr, "train_lm: the held-out perplexity is not below %g\n", kPerplexity);
    return 1;
  }
  return 0;
}

} // namespace

int main(int argc, char **argv) {
  const bool full = argc == 3 && std::strcmp(argv[2], "--full") == 0;
  if (argc != 2 && !full) {
    std::fprintf(stderr, "usage: %s kjv.txt [--full]\n", argv[0]);
    return 2;
  }
  try {
    return demo(argv[1], full);
  } catch (const std::exception &failure) {
    std::fprintf(stderr, "train_lm: %s\n", failure.what());
    return 1;
  }
}
