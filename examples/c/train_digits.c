/* Handwritten digits: a 64-64-10 network that learns to read 8x8 images.
 *
 *   cc -std=c11 -O2 train_digits.c -Iinclude libxent.a -lpthread -ldl -lm -o train_digits
 *   ./train_digits digits.csv
 *
 * Each line of the file is 64 pixels from 0 to 16 and the digit. A fifth of the
 * images is held out; exits with 0 if at least 97 % of them are read correctly. */
#include <xent.h>

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { PIXELS = 64, HIDDEN = 64, CLASSES = 10, BATCH = 32, EPOCHS = 40 };

/* All weights in one block, so that one loop updates them. */
struct weights {
  float w1[PIXELS][HIDDEN], b1[HIDDEN];
  float w2[HIDDEN][CLASSES], b2[CLASSES];
};

struct image {
  float pixels[PIXELS];
  uint8_t digit;
};

struct activations {
  float hidden[BATCH][HIDDEN];
  float logits[BATCH][CLASSES]; /* their gradient, after the loss */
  uint8_t targets[BATCH];
};

static uint64_t random_state = 1;

/* SplitMix64: the same numbers on every machine. */
static uint64_t random_bits(void) {
  uint64_t z = (random_state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

static float random_weight(float limit) {
  return ((float)(random_bits() >> 40) * (2.0f / 16777216.0f) - 1.0f) * limit;
}

static void shuffle(struct image *images, size_t count) {
  for (size_t i = count; i > 1; i--) {
    const size_t j = (size_t)(random_bits() % i);
    const struct image other = images[j];
    images[j] = images[i - 1];
    images[i - 1] = other;
  }
}

/* The images of the file, to be freed by the caller; NULL after a message. */
static struct image *read_images(const char *path, size_t *count) {
  FILE *file = fopen(path, "r");
  if (!file) {
    perror(path);
    return NULL;
  }
  struct image *images = NULL;
  size_t used = 0, room = 0;
  const char *trouble = NULL;
  for (int value; !trouble && fscanf(file, "%d", &value) == 1; used++) {
    if (used == room) {
      room = room ? 2 * room : 256;
      struct image *more = realloc(images, room * sizeof *images);
      if (!more) {
        trouble = "out of memory";
        break;
      }
      images = more;
    }
    for (int i = 0; i < PIXELS && !trouble; i++) {
      images[used].pixels[i] = (float)value / 16.0f;
      if (value < 0 || value > 16 || fscanf(file, " ,%d", &value) != 1)
        trouble = "a line is not 64 pixels and a digit";
    }
    if (!trouble && (value < 0 || value >= CLASSES))
      trouble = "a label is not a digit";
    images[used].digit = (uint8_t)value;
  }
  if (!trouble && (ferror(file) || !feof(file)))
    trouble = "cannot be read to its end";
  if (!trouble && used < 10)
    trouble = "too few images";
  fclose(file);
  if (trouble) {
    fprintf(stderr, "train_digits: %s: %s\n", path, trouble);
    free(images);
    return NULL;
  }
  *count = used;
  return images;
}

static void forward(const struct weights *net, const struct image *images, size_t rows,
                    struct activations *at) {
  for (size_t r = 0; r < rows; r++) {
    float *hidden = at->hidden[r], *logits = at->logits[r];
    for (int j = 0; j < HIDDEN; j++)
      hidden[j] = net->b1[j];
    for (int i = 0; i < PIXELS; i++)
      for (int j = 0; j < HIDDEN; j++)
        hidden[j] += images[r].pixels[i] * net->w1[i][j];
    for (int c = 0; c < CLASSES; c++)
      logits[c] = net->b2[c];
    for (int j = 0; j < HIDDEN; j++) {
      hidden[j] = hidden[j] > 0 ? hidden[j] : 0;
      for (int c = 0; c < CLASSES; c++)
        logits[c] += hidden[j] * net->w2[j][c];
    }
    at->targets[r] = images[r].digit;
  }
}

/* From the gradient of the logits to that of the weights. */
static void backward(const struct weights *net, const struct image *images, size_t rows,
                     const struct activations *at, struct weights *gradient) {
  *gradient = (struct weights){0};
  for (size_t r = 0; r < rows; r++) {
    const float *hidden = at->hidden[r], *logits = at->logits[r];
    float back[HIDDEN] = {0};
    for (int j = 0; j < HIDDEN; j++) {
      for (int c = 0; c < CLASSES; c++) {
        gradient->w2[j][c] += hidden[j] * logits[c];
        back[j] += net->w2[j][c] * logits[c];
      }
      back[j] = hidden[j] > 0 ? back[j] : 0;
      gradient->b1[j] += back[j];
    }
    for (int c = 0; c < CLASSES; c++)
      gradient->b2[c] += logits[c];
    for (int i = 0; i < PIXELS; i++)
      for (int j = 0; j < HIDDEN; j++)
        gradient->w1[i][j] += images[r].pixels[i] * back[j];
  }
}

/* Descriptors for `rows` rows of the activations; targets may be u8 as they are. */
static xent_problem describe(const struct activations *at, size_t rows) {
  xent_problem problem = XENT_PROBLEM_INIT;
  problem.rows = rows;
  problem.classes = CLASSES;
  problem.logits.data = at->logits;
  problem.logits.dtype = XENT_F32;
  problem.targets.data = at->targets;
  problem.targets.dtype = XENT_U8;
  return problem;
}

static int report(xent_status status) {
  if (status != XENT_OK)
    fprintf(stderr, "train_digits: %s: %s\n", xent_status_name(status), xent_last_error());
  return status == XENT_OK;
}

/* Momentum gradient descent, one pass over the images; the mean loss, negative on failure. */
static double train(struct weights *net, struct weights *momentum, struct weights *gradient,
                    const struct image *images, size_t count, struct activations *at) {
  double sum = 0;
  for (size_t first = 0; first < count; first += BATCH) {
    const size_t rows = count - first < BATCH ? count - first : BATCH;
    forward(net, images + first, rows, at);

    double loss = 0;
    const xent_problem problem = describe(at, rows);
    xent_results results = XENT_RESULTS_INIT;
    results.loss = &loss;
    const xent_output in_place = {at->logits, XENT_F32, {0, 0, 0}};
    if (!report(xent_forward_backward(&problem, NULL, 1.0, &results, &in_place)))
      return -1;
    sum += loss * (double)rows;

    backward(net, images + first, rows, at, gradient);
    float *w = (float *)net, *m = (float *)momentum;
    const float *g = (const float *)gradient;
    for (size_t i = 0; i < sizeof *net / sizeof *w; i++) {
      m[i] = 0.9f * m[i] + g[i];
      w[i] -= 0.05f * m[i];
    }
  }
  return sum / (double)count;
}

/* How many digits are read correctly, and the mean loss; forward only. 0 on failure. */
static int evaluate(const struct weights *net, const struct image *images, size_t count,
                    struct activations *at, size_t *correct, double *mean_loss) {
  double sum = 0;
  *correct = 0;
  for (size_t first = 0; first < count; first += BATCH) {
    const size_t rows = count - first < BATCH ? count - first : BATCH;
    forward(net, images + first, rows, at);
    double loss = 0;
    xent_problem problem = describe(at, rows);
    problem.reduction = XENT_SUM;
    xent_results results = XENT_RESULTS_INIT;
    results.loss = &loss;
    if (!report(xent_forward(&problem, &results)))
      return 0;
    sum += loss;
    for (size_t r = 0; r < rows; r++) {
      int best = 0;
      for (int c = 1; c < CLASSES; c++)
        best = at->logits[r][c] > at->logits[r][best] ? c : best;
      *correct += best == at->targets[r];
    }
  }
  *mean_loss = sum / (double)count;
  return 1;
}

int main(int argc, char **argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s digits.csv\n", argv[0]);
    return 2;
  }
  size_t count = 0;
  struct image *images = read_images(argv[1], &count);
  struct weights *net = calloc(1, sizeof *net);
  struct weights *momentum = calloc(1, sizeof *momentum);
  struct weights *gradient = calloc(1, sizeof *gradient);
  struct activations *at = calloc(1, sizeof *at);
  int passed = 0;
  if (!images)
    goto end;
  if (!net || !momentum || !gradient || !at) {
    fprintf(stderr, "train_digits: out of memory\n");
    goto end;
  }

  for (int i = 0; i < PIXELS; i++)
    for (int j = 0; j < HIDDEN; j++)
      net->w1[i][j] = random_weight(0.2f);
  for (int j = 0; j < HIDDEN; j++)
    for (int c = 0; c < CLASSES; c++)
      net->w2[j][c] = random_weight(0.2f);

  shuffle(images, count);
  const size_t held_out = count / 5, kept = count - held_out;
  printf("%zu images to train on, %zu held out\n", kept, held_out);
  for (int epoch = 1; epoch <= EPOCHS; epoch++) {
    const double loss = train(net, momentum, gradient, images, kept, at);
    if (loss < 0)
      goto end;
    if (epoch % 10 == 0)
      printf("epoch %2d   loss %.4f\n", epoch, loss);
    shuffle(images, kept);
  }

  size_t correct = 0;
  double loss = 0;
  if (!evaluate(net, images + kept, held_out, at, &correct, &loss))
    goto end;
  printf("held out: loss %.4f, %zu of %zu correct (%.1f %%)\n", loss, correct, held_out,
         100.0 * (double)correct / (double)held_out);
  passed = 100 * correct >= 97 * held_out;
  if (!passed)
    fprintf(stderr, "train_digits: fewer than 97 %% are correct\n");

end:
  free(at);
  free(gradient);
  free(momentum);
  free(net);
  free(images);
  return passed ? 0 : 1;
}
