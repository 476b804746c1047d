"""Peers in Python: `peer.py NAME`, by the protocol of peers/README.md."""

import os
import sys
import time

import numpy as np


def logits(rows, classes):
    """The logits that every peer has, f32."""
    h = np.arange(rows * classes, dtype=np.uint32) * np.uint32(2654435761) + np.uint32(12345)
    h ^= h >> np.uint32(15)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    return (h * (12.0 / 4294967296.0) - 6.0).astype(np.float32).reshape(rows, classes)


def targets(rows, classes):
    return np.arange(rows) * 7919 % classes


def torch_step(compiled, threads):
    import torch

    torch.set_num_threads(threads)
    compiled_for = None

    def prepare(rows, classes, dtype, kind):
        nonlocal compiled_for
        x = torch.from_numpy(logits(rows, classes))
        x = x.to(torch.bfloat16) if dtype == "bf16" else x
        y = torch.from_numpy(targets(rows, classes))
        loss_of = torch.nn.functional.cross_entropy
        if compiled:
            if compiled_for != (rows, classes, dtype):
                # Or it would give up after some shapes, without a word.
                torch._dynamo.reset()
                compiled_for = (rows, classes, dtype)
            loss_of = torch.compile(loss_of, dynamic=False)
        if kind == "forward":

            def step():
                with torch.no_grad():
                    return loss_of(x, y).item()

        else:
            x.requires_grad_()

            def step():
                x.grad = None
                loss = loss_of(x, y)
                loss.backward()
                return loss.item()

        return step

    return torch.__version__, prepare


def jax_step(threads):
    import jax
    import jax.numpy as jnp

    def loss_of(x, y):
        log_p = jax.nn.log_softmax(x)
        return -jnp.take_along_axis(log_p, y[:, None], axis=1).mean()

    def prepare(rows, classes, dtype, kind):
        x = jnp.asarray(logits(rows, classes), dtype=jnp.bfloat16 if dtype == "bf16" else jnp.float32)
        y = jnp.asarray(targets(rows, classes))
        call = jax.jit(loss_of if kind == "forward" else jax.value_and_grad(loss_of))

        def step():
            result = jax.block_until_ready(call(x, y))
            return float(result if kind == "forward" else result[0])

        return step

    return jax.__version__, prepare


def tensorflow_step(threads):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)

    def loss_of(x, y):
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=x)
        return tf.reduce_mean(losses)

    @tf.function
    def forward(x, y):
        return loss_of(x, y)

    @tf.function
    def both(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = loss_of(x, y)
        return loss, tape.gradient(loss, x)

    def prepare(rows, classes, dtype, kind):
        x = tf.constant(logits(rows, classes))
        x = tf.cast(x, tf.bfloat16) if dtype == "bf16" else x
        y = tf.constant(targets(rows, classes))

        def step():
            if kind == "forward":
                return float(forward(x, y).numpy())
            loss, grad = both(x, y)
            grad.numpy()  # waits; shares the memory
            return float(loss.numpy())

        return step

    return tf.__version__, prepare


def main():
    name, threads = sys.argv[1], len(os.sched_getaffinity(0))
    steps = {
        "torch": lambda: torch_step(False, threads),
        "torch-warm": lambda: torch_step(False, threads),
        "torch-compile": lambda: torch_step(True, threads),
        "jax": lambda: jax_step(threads),
        "tensorflow": lambda: tensorflow_step(threads),
    }
    # The protocol has standard output to itself.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        version, prepare = steps[name]()
    except Exception as error:
        print("absent", " ".join(f"{type(error).__name__}: {error}".split())[:200], file=out)
        return
    print("ready", version, file=out)
    # Compiled once for each kind; of one problem alone, since memory is not endless.
    problem, ready = None, {}
    for line in sys.stdin:
        _, rows, classes, dtype, kind, budget = line.split()
        if kind == "in-place":
            print("absent nothing in place", file=out)
            continue
        try:
            if problem != (rows, classes, dtype):
                ready.clear()
                problem = rows, classes, dtype
            if kind not in ready:
                ready[kind] = prepare(int(rows), int(classes), dtype, kind)
                ready[kind]()  # compiles
            step = ready[kind]
            step()
            best, begin = float("inf"), time.perf_counter()
            while best == float("inf") or time.perf_counter() - begin < float(budget):
                start = time.perf_counter()
                loss = step()
                best = min(best, time.perf_counter() - start)
            print(f"{best:e} {loss:e}", file=out)
        except Exception as error:
            ready.clear()
            print("absent", " ".join(f"{type(error).__name__}: {error}".split())[:200], file=out)


main()
