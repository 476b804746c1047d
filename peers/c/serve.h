/* The protocol of peers/README.md, for peers in C and C++, and their inputs. */
#ifndef PEERS_SERVE_H
#define PEERS_SERVE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { FORWARD, BOTH, IN_PLACE };

typedef struct {
  size_t rows, classes;
  int bf16, kind;
  void *logits, *grad; /* float, or uint16_t that hold bf16 */
  void *original;      /* the logits, where those are overwritten */
  int32_t *targets;
} task;

/* Computes the loss, and the gradient if the kind is not FORWARD: in grad, or over the logits. */
typedef double (*step)(const task *);

static inline uint16_t bf16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float bf16_to(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

static float logit(size_t i) {
  uint32_t h = (uint32_t)i * 2654435761u + 12345u;
  h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
  return (float)((double)h * (12.0 / 4294967296.0) - 6.0);
}

static size_t bytes_of(const task *t) { return t->rows * t->classes * (t->bf16 ? 2 : 4); }

static void fill(const task *t) {
  size_t i, n = t->rows * t->classes;
  for (i = 0; i < n; i++)
    if (t->bf16)
      ((uint16_t *)t->original)[i] = bf16_of(logit(i));
    else
      ((float *)t->original)[i] = logit(i);
}

static void restore(const task *t) { memcpy(t->logits, t->original, bytes_of(t)); }

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* On a cache line, as tensors are. */
static void *buffer(size_t bytes) {
  void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) {
    printf("absent no memory\n");
    exit(1);
  }
  memset(p, 0, bytes);
  return p;
}

/* Answers requests until standard input ends. `change` is told of another problem; it returns 0, or
 * why it cannot have that. */
static int serve(const char *version, const char *(*change)(const task *), step run) {
  task now = {0, 0, 0, 0, NULL, NULL, NULL, NULL};
  char line[256];
  printf("ready %s\n", version);
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    task next = now;
    char dtype[16], kind[16];
    double budget, begin, best = 1e9, loss = 0;
    const char *why;
    if (sscanf(line, "run %zu %zu %15s %15s %lf", &next.rows, &next.classes, dtype, kind, &budget) != 5) {
      printf("absent not understood\n");
      return 1;
    }
    next.bf16 = !strcmp(dtype, "bf16");
    next.kind = !strcmp(kind, "forward") ? FORWARD : !strcmp(kind, "both") ? BOTH : IN_PLACE;
    if (next.rows != now.rows || next.classes != now.classes || next.bf16 != now.bf16) {
      size_t i, bytes = bytes_of(&next);
      free(now.logits), free(now.grad), free(now.original), free(now.targets);
      next.logits = buffer(bytes), next.grad = buffer(bytes), next.original = buffer(bytes);
      next.targets = (int32_t *)buffer(next.rows * sizeof(int32_t));
      for (i = 0; i < next.rows; i++) next.targets[i] = (int32_t)(i * 7919 % next.classes);
      fill(&next);
    }
    now = next;
    why = change ? change(&now) : NULL;
    if (why) {
      printf("absent %s\n", why);
      fflush(stdout);
      continue;
    }
    restore(&now);
    run(&now); /* not timed: pages, threads, tables */
    begin = seconds();
    do {
      double start;
      if (now.kind == IN_PLACE) restore(&now);
      start = seconds();
      loss = run(&now);
      start = seconds() - start;
      if (start < best) best = start;
    } while (seconds() - begin < budget);
    printf("%e %e\n", best, loss);
    fflush(stdout);
  }
  return 0;
}

#endif
