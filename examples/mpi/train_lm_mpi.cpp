// The word model of examples/cpp/train_lm.cpp over the ranks of MPI: its vocabulary in shards, and, by a flag, its
// batch in parts.
//
//   tests/mpi/run                                          builds it, and runs it over 1 to 4 ranks
//   mpirun -n 6 train_lm_mpi kjv.txt [--steps N] [--batch B] [--losses FILE]
//
// The ranks are a grid of B parts of the batch times shards of the vocabulary. Each rank holds the output weights
// of its classes, and a copy of everything below them. A step sends two things between the shards of a part: the
// states of its rows, which xent_partial_merge merges as an MPI_Op, and the gradient of its hidden layer. Logits never
// leave their rank. With B > 1 the parts also add up the number of rows that count, which every part divides by, and
// the gradients of the weights that they share.
//
// Everything is seeded: whatever the grid, the losses of the steps are the same but for rounding.

#include <xent.hpp>

#define OMPI_SKIP_MPICXX 1 // the bindings for C++ that MPI 3 has dropped
#include <mpi.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using std::size_t;

constexpr size_t kContext = 5;    // words the model looks back
constexpr size_t kEmbedding = 32; // numbers a word becomes
constexpr size_t kInput = kContext * kEmbedding;
constexpr size_t kHidden = 64;
constexpr size_t kBatch = 128;
constexpr float kLearningRate = 4e-3F; // at the start; falls linearly to zero
constexpr std::int32_t kUnknown = 0;   // no target: rows that are to predict it are ignored

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

// ---- MPI ----------------------------------------------------------------------

// A state as a datatype: five doubles and an integer.
MPI_Datatype state_type() {
  const int lengths[2] = {5, 1};
  const MPI_Aint places[2] = {offsetof(xent_partial, lse), offsetof(xent_partial, argmax)};
  const MPI_Datatype types[2] = {MPI_DOUBLE, MPI_INT64_T};
  MPI_Datatype type = MPI_DATATYPE_NULL;
  MPI_Type_create_struct(2, lengths, places, types, &type);
  MPI_Type_commit(&type);
  return type;
}

// The merge as a reduction. It commutes, so that MPI may choose the tree.
void merge(void *from, void *into, int *count, MPI_Datatype *) {
  xent_partial_merge(static_cast<xent_partial *>(into), static_cast<const xent_partial *>(from),
                     static_cast<size_t>(*count));
}

MPI_Op merge_op() {
  MPI_Op op = MPI_OP_NULL;
  MPI_Op_create(merge, 1, &op);
  return op;
}

// Where a rank is: its shard of the vocabulary and its part of the batch, and the ranks beside it.
struct Grid {
  explicit Grid(int parts_) : parts(parts_) {
    int size = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (parts < 1 || size % parts != 0) {
      throw std::runtime_error("the number of ranks is no multiple of the parts of the batch");
    }
    shards = size / parts;
    shard = rank % shards;
    part = rank / shards;
    MPI_Comm_split(MPI_COMM_WORLD, part, shard, &same_part);
    MPI_Comm_split(MPI_COMM_WORLD, shard, part, &same_shard);
  }
  ~Grid() {
    MPI_Comm_free(&same_part);
    MPI_Comm_free(&same_shard);
  }
  Grid(const Grid &) = delete;
  Grid &operator=(const Grid &) = delete;

  // The part of `count` things that belongs to index `i` of `n`.
  static size_t cut(size_t count, int i, int n) {
    return count * static_cast<size_t>(i) / static_cast<size_t>(n);
  }

  int rank = 0, shards = 1, parts, shard = 0, part = 0;
  MPI_Comm same_part = MPI_COMM_NULL;  // the shards of this rank's rows
  MPI_Comm same_shard = MPI_COMM_NULL; // the parts that hold this rank's classes
};

template <class Type>
void add_up(std::vector<Type> &values, MPI_Comm comm) {
  const MPI_Datatype type = sizeof(Type) == 8 ? MPI_DOUBLE : MPI_FLOAT;
  MPI_Allreduce(MPI_IN_PLACE, values.data(), static_cast<int>(values.size()), type, MPI_SUM, comm);
}

double sum_of(double value, MPI_Comm comm) {
  MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_DOUBLE, MPI_SUM, comm);
  return value;
}

// ---- text ---------------------------------------------------------------------

// Words in lower case, and punctuation marks on their own, as classes; 0 for words that appear once.
std::vector<std::int32_t> read_text(const char *path, size_t &classes) {
  std::ifstream file(path);
  if (!file) {
    throw std::runtime_error(std::string("cannot open ") + path);
  }
  std::vector<std::string> words;
  for (std::string line; std::getline(file, line);) {
    std::string word;
    for (const char byte : line + "\n") {
      const auto c = static_cast<unsigned char>(byte);
      if (std::isalnum(c) != 0 || c == '\'') {
        word.push_back(static_cast<char>(std::tolower(c)));
        continue;
      }
      if (!word.empty()) {
        words.push_back(word);
        word.clear();
      }
      if (byte == '\n' || std::isspace(c) == 0) {
        words.emplace_back(1, byte);
      }
    }
  }
  std::unordered_map<std::string, size_t> count;
  for (const std::string &word : words) {
    ++count[word];
  }
  std::unordered_map<std::string, std::int32_t> index;
  std::vector<std::int32_t> text;
  for (const std::string &word : words) {
    const auto next = static_cast<std::int32_t>(index.size() + 1);
    text.push_back(count[word] < 2 ? kUnknown : index.emplace(word, next).first->second);
  }
  if (text.size() <= kContext) {
    throw std::runtime_error(std::string(path) + " is too short to train on");
  }
  classes = index.size() + 1;
  return text;
}

// ---- model --------------------------------------------------------------------

// Weights with their gradient and Adam's two moments.
struct Parameter {
  explicit Parameter(size_t count) : weight(count), gradient(count), mean(count), square(count) {}

  void update(float rate, int step) {
    const float mean_scale = 1.0F / (1.0F - std::pow(0.9F, static_cast<float>(step)));
    const float square_scale = 1.0F / (1.0F - std::pow(0.99F, static_cast<float>(step)));
    for (size_t i = 0; i < weight.size(); ++i) {
      const float g = gradient[i];
      mean[i] = 0.9F * mean[i] + 0.1F * g;
      square[i] = 0.99F * square[i] + 0.01F * g * g;
      weight[i] -= rate * mean_scale * mean[i] / (std::sqrt(square_scale * square[i]) + 1e-4F);
    }
  }

  std::vector<float> weight, gradient, mean, square;
};

float symmetric(Random &random, double limit) {
  return static_cast<float>((2.0 * random.uniform() - 1.0) * limit);
}

// c[m, n] += a[m, depth] * b[depth, n] with a[i * a_row + k * a_column]; n in blocks that stay in the cache.
void multiply(size_t m, size_t n, size_t depth, const float *a, size_t a_row, size_t a_column, const float *b,
              float *c) {
  constexpr size_t block = 512;
  for (size_t first = 0; first < n; first += block) {
    const size_t width = std::min(block, n - first);
    for (size_t i = 0; i < m; ++i) {
      float *const to = c + i * n + first;
      for (size_t k = 0; k < depth; ++k) {
        const float x = a[i * a_row + k * a_column];
        const float *const from = b + k * n + first;
        for (size_t j = 0; j < width; ++j) {
          to[j] += x * from[j];
        }
      }
    }
  }
}

// c[m, rows] = a[m, n] * transposed b[rows, n], summed in double.
void multiply_transposed(size_t m, size_t rows, size_t n, const float *a, const float *b, double *c) {
  constexpr size_t lanes = 16;
  constexpr size_t block = 256;
  for (size_t i = 0; i < m; ++i) {
    for (size_t k = 0; k < rows; ++k) {
      const float *const x = a + i * n;
      const float *const y = b + k * n;
      double total = 0.0;
      for (size_t first = 0; first < n; first += block) {
        const size_t end = std::min(n, first + block);
        const size_t whole = first + (end - first) / lanes * lanes;
        float sums[lanes] = {};
        for (size_t j = first; j < whole; j += lanes) {
          for (size_t lane = 0; lane < lanes; ++lane) {
            sums[lane] += x[j + lane] * y[j + lane];
          }
        }
        for (const float sum : sums) {
          total += static_cast<double>(sum);
        }
        for (size_t j = whole; j < end; ++j) {
          total += static_cast<double>(x[j]) * static_cast<double>(y[j]);
        }
      }
      c[i * rows + k] = total;
    }
  }
}

class Model {
public:
  // `first` and `end` are the classes of this rank. The start of a weight depends on its place alone.
  Model(size_t classes, size_t first, size_t end)
      : first_(first), own_(end - first), embedding_(classes * kEmbedding), hidden_weight_(kInput * kHidden),
        hidden_bias_(kHidden), output_weight_(kHidden * own_), output_bias_(own_) {
    Random random(1);
    for (float &w : embedding_.weight) {
      w = symmetric(random, 0.5);
    }
    for (float &w : hidden_weight_.weight) {
      w = symmetric(random, 1.7 / std::sqrt(static_cast<double>(kInput)));
    }
    for (size_t c = 0; c < own_; ++c) {
      Random of_class(1000 + first_ + c);
      for (size_t k = 0; k < kHidden; ++k) {
        output_weight_.weight[k * own_ + c] = symmetric(of_class, 0.1 / std::sqrt(static_cast<double>(kHidden)));
      }
    }
  }

  // Fills logits with [rows, own classes].
  void forward(const std::vector<const std::int32_t *> &context, std::vector<float> &logits) {
    const size_t rows = context.size();
    input_.resize(rows * kInput);
    hidden_.resize(rows * kHidden);
    logits.resize(rows * own_);
    for (size_t i = 0; i < rows; ++i) {
      for (size_t j = 0; j < kContext; ++j) {
        const float *const from = &embedding_.weight[static_cast<size_t>(context[i][j]) * kEmbedding];
        std::copy(from, from + kEmbedding, &input_[i * kInput + j * kEmbedding]);
      }
      std::copy(hidden_bias_.weight.begin(), hidden_bias_.weight.end(), hidden_.begin() + offset(i * kHidden));
      std::copy(output_bias_.weight.begin(), output_bias_.weight.end(), logits.begin() + offset(i * own_));
    }
    multiply(rows, kHidden, kInput, input_.data(), kInput, 1, hidden_weight_.weight.data(), hidden_.data());
    for (float &h : hidden_) {
      h = std::tanh(h);
    }
    multiply(rows, own_, kHidden, hidden_.data(), kHidden, 1, output_weight_.weight.data(), logits.data());
  }

  // The gradients of the output weights from that of the logits, and this shard's part of the hidden layer's.
  void backward_output(size_t rows, const std::vector<float> &gradient, std::vector<double> &hidden_gradient) {
    std::fill(output_weight_.gradient.begin(), output_weight_.gradient.end(), 0.0F);
    std::fill(output_bias_.gradient.begin(), output_bias_.gradient.end(), 0.0F);
    hidden_gradient.resize(rows * kHidden);
    multiply(kHidden, own_, rows, hidden_.data(), 1, kHidden, gradient.data(), output_weight_.gradient.data());
    for (size_t i = 0; i < rows * own_; ++i) {
      output_bias_.gradient[i % own_] += gradient[i];
    }
    multiply_transposed(rows, kHidden, own_, gradient.data(), output_weight_.weight.data(), hidden_gradient.data());
  }

  // The gradients of everything below, from that of the hidden layer.
  void backward_hidden(const std::vector<const std::int32_t *> &context, const std::vector<double> &hidden_gradient) {
    const size_t rows = context.size();
    std::vector<float> inner(rows * kHidden);
    for (size_t i = 0; i < inner.size(); ++i) {
      const double h = static_cast<double>(hidden_[i]);
      inner[i] = static_cast<float>(hidden_gradient[i] * (1.0 - h * h));
    }
    for (Parameter *p : {&embedding_, &hidden_weight_, &hidden_bias_}) {
      std::fill(p->gradient.begin(), p->gradient.end(), 0.0F);
    }
    multiply(kInput, kHidden, rows, input_.data(), 1, kInput, inner.data(), hidden_weight_.gradient.data());
    for (size_t i = 0; i < inner.size(); ++i) {
      hidden_bias_.gradient[i % kHidden] += inner[i];
    }
    std::vector<double> input_gradient(rows * kInput);
    multiply_transposed(rows, kInput, kHidden, inner.data(), hidden_weight_.weight.data(), input_gradient.data());
    for (size_t i = 0; i < rows; ++i) {
      for (size_t j = 0; j < kInput; ++j) {
        const auto word = static_cast<size_t>(context[i][j / kEmbedding]);
        embedding_.gradient[word * kEmbedding + j % kEmbedding] += static_cast<float>(input_gradient[i * kInput + j]);
      }
    }
  }

  // Adds up the gradients of the parts of a batch.
  void add_up_parts(MPI_Comm same_shard) {
    for (Parameter *p : {&embedding_, &hidden_weight_, &hidden_bias_, &output_weight_, &output_bias_}) {
      add_up(p->gradient, same_shard);
    }
  }

  void update(float rate) {
    ++steps_;
    for (Parameter *p : {&embedding_, &hidden_weight_, &hidden_bias_, &output_weight_, &output_bias_}) {
      p->update(rate, steps_);
    }
  }

private:
  static std::ptrdiff_t offset(size_t i) { return static_cast<std::ptrdiff_t>(i); }

  size_t first_, own_;
  Parameter embedding_, hidden_weight_, hidden_bias_, output_weight_, output_bias_;
  std::vector<float> input_, hidden_;
  int steps_ = 0;
};

// ---- training -----------------------------------------------------------------

struct Settings {
  const char *text = nullptr;
  size_t steps = 60;
  int parts = 1;
  const char *losses = nullptr;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0.0 : values[values.size() / 2];
}

void train(const Settings &settings) {
  const Grid grid(settings.parts);
  MPI_Datatype state = state_type();
  MPI_Op merging = merge_op();
  size_t classes = 0;
  const std::vector<std::int32_t> text = read_text(settings.text, classes);
  const size_t first = Grid::cut(classes, grid.shard, grid.shards);
  const size_t end = Grid::cut(classes, grid.shard + 1, grid.shards);
  const size_t from = Grid::cut(kBatch, grid.part, grid.parts);
  const size_t rows = Grid::cut(kBatch, grid.part + 1, grid.parts) - from;

  Model model(classes, first, end);
  Random random(2);
  std::vector<const std::int32_t *> context(rows);
  std::vector<std::int32_t> targets(rows);
  std::vector<float> logits;
  std::vector<xent::partial> states(rows);
  std::vector<double> hidden_gradient, losses, seconds, waiting;
  xent::options options;
  options.threads = 1; // the ranks are the threads
  options.ignore_index = kUnknown;

  for (size_t step = 0; step < settings.steps; ++step) {
    // Every rank draws the whole batch, and keeps its part.
    for (size_t i = 0; i < kBatch; ++i) {
      const size_t at = random.below(text.size() - kContext);
      if (i >= from && i < from + rows) {
        context[i - from] = &text[at];
        targets[i - from] = text[at + kContext];
      }
    }
    const auto ignored = std::count(targets.begin(), targets.end(), kUnknown);
    options.normalizer = sum_of(static_cast<double>(rows) - static_cast<double>(ignored), grid.same_shard);
    model.forward(context, logits);

    // The loss layer: the states of this shard, those of all shards, and the gradient of this shard's logits.
    const double start = MPI_Wtime();
    xent::partial_forward(logits, end - first, targets, first, classes, states, options);
    const double sent = MPI_Wtime();
    MPI_Allreduce(MPI_IN_PLACE, states.data(), static_cast<int>(rows), state, merging, grid.same_part);
    const double received = MPI_Wtime();
    const double loss = xent::partial_finish(targets, classes, states, options);
    xent::partial_backward(logits, end - first, targets, first, classes, states, logits, options);
    seconds.push_back(MPI_Wtime() - start - (received - sent));
    waiting.push_back(received - sent);

    model.backward_output(rows, logits, hidden_gradient);
    add_up(hidden_gradient, grid.same_part);
    model.backward_hidden(context, hidden_gradient);
    if (grid.parts > 1) {
      model.add_up_parts(grid.same_shard);
    }
    const double done = static_cast<double>(step) / static_cast<double>(settings.steps);
    model.update(kLearningRate * static_cast<float>(1.0 - done));
    losses.push_back(sum_of(loss, grid.same_shard));
  }

  const double own[2] = {median(seconds), median(waiting)};
  double slowest[2] = {0.0, 0.0};
  MPI_Reduce(own, slowest, 2, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
  if (grid.rank == 0) {
    std::printf("%d shards of %zu classes, %d parts of %zu rows: loss %.6f to %.6f in %zu steps\n", grid.shards,
                classes, grid.parts, kBatch, losses.front(), losses.back(), losses.size());
    std::printf("  loss layer %.3f ms a step on the slowest rank; exchange of states %.3f ms, waits included\n",
                1e3 * slowest[0], 1e3 * slowest[1]);
    std::printf("  exchanged a step in each part: states %zu bytes, hidden gradient %zu bytes; its logits are %zu\n",
                rows * sizeof(xent_partial), rows * kHidden * sizeof(double), rows * classes * sizeof(float));
    if (settings.losses != nullptr) {
      std::ofstream file(settings.losses);
      file.precision(12);
      for (const double loss : losses) {
        file << loss << "\n";
      }
      if (!file.flush()) {
        throw std::runtime_error(std::string("cannot write ") + settings.losses);
      }
    }
  }
  MPI_Op_free(&merging);
  MPI_Type_free(&state);
}

Settings read_settings(int argc, char **argv) {
  Settings settings;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option.rfind("--", 0) != 0) {
      settings.text = argv[i];
      continue;
    }
    if (i + 1 == argc) {
      throw std::runtime_error(option + " needs a value");
    }
    const char *const value = argv[++i];
    if (option == "--steps") {
      settings.steps = std::strtoul(value, nullptr, 10);
    } else if (option == "--batch") {
      settings.parts = std::atoi(value);
    } else if (option == "--losses") {
      settings.losses = value;
    } else {
      throw std::runtime_error("unknown option " + option);
    }
  }
  if (settings.text == nullptr || settings.steps == 0) {
    throw std::runtime_error("usage: train_lm_mpi kjv.txt [--steps N] [--batch B] [--losses FILE]");
  }
  return settings;
}

} // namespace

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  try {
    train(read_settings(argc, argv));
  } catch (const std::exception &failure) {
    std::fprintf(stderr, "train_lm_mpi: %s\n", failure.what());
    MPI_Abort(MPI_COMM_WORLD, 1); // the other ranks wait for this one
  }
  MPI_Finalize();
  return 0;
}
