"""The table of `cargo xtask accuracy DIRECTORY`: ulps of xent and of PyTorch on the same inputs.

Exact results are of 80-bit floats, whose errors are some thousandths of an ulp of f64. Units:

    softmax, gradient   ulps of the logits' dtype, in which they are stored, at the exact value
    loss, lse           ulps of f32 at the exact value, of f64 for f64 logits, however they are stored

gradient is by the call that computes the loss too, which is how PyTorch's autograd comes to its own from
the log-probabilities that it saved; backward is from the logits and an lse of f64 (PyTorch: of the logits'
dtype, as logsumexp returns it) alone. Both are of the sum of the losses: p, and p - 1 at the target. Inputs are normal (standard deviation 2), spread (12:
probabilities down to 1e-37, and many confident rows) and low (one logit of 0, the others far below, so
that the softmax is the exponentials). Values below the smallest normal
number of the dtype are left out, and so are losses below 1e-30.
"""

import itertools
import os
import sys

import numpy as np

try:
    import torch
except ImportError as error:
    torch = None
    print(f"PyTorch absent: {error}")

L = np.longdouble
assert np.finfo(L).nmant == 63, "80-bit floats are needed"

# Bits of the significand, and exponent of the smallest normal number.
FORMATS = {"f32": (24, -126), "f64": (53, -1022), "bf16": (8, -126), "f16": (11, -14)}
WHATS = ["softmax", "loss", "lse", "gradient", "backward"]
# Kinds of input, as benches/accuracy.rs has them, with what is judged on them.
ROWS = [("low", "softmax")] + [(s, what) for s in ["normal", "spread"] for what in WHATS[1:]]
SETS = ["avx512", "avx2", "neon", "portable"]


def load(path, dtype):
    """As 80-bit floats, exactly, or (raw) as a tensor's dtype."""
    if dtype == "bf16":
        return (np.fromfile(path, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(L)
    return np.fromfile(path, {"f32": np.float32, "f64": np.float64, "f16": np.float16}[dtype]).astype(L)


def exact(x, y):
    """Row losses, lse, gradient of their sum, softmax."""
    rows = np.arange(len(x))
    top = x.max(axis=1, keepdims=True)
    e = np.exp(x - top)
    total = e.sum(axis=1)
    log_total = np.log1p(rest(e, x.argmax(axis=1)))
    lse = top[:, 0] + log_total
    others = rest(e, y)
    losses = np.where(
        others < e[rows, y],
        np.log1p(others / np.where(e[rows, y] == 0, 1, e[rows, y])),
        (top[:, 0] - x[rows, y]) + log_total,
    )
    p = e / total[:, None]
    grad = p.copy()
    grad[rows, y] = -others / total
    return losses, lse, grad, p


def rest(e, y):
    """The sum of a row without one element."""
    e = e.copy()
    e[np.arange(len(e)), y] = 0
    return e.sum(axis=1)


def ulps(got, want, dtype, least=0.0):
    bits, lowest = FORMATS[dtype]
    got, want = got.ravel(), want.ravel()
    keep = np.abs(want) >= max(L(2) ** lowest, L(least))
    got, want = got[keep], want[keep]
    _, exponent = np.frexp(np.abs(want))
    errors = np.abs(got - want) / np.ldexp(L(1), exponent - bits)
    return np.where(np.isfinite(errors), errors, np.inf).astype(float)


def of_torch(path, dtype, shape, y):
    raw = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
    with open(path, "rb") as file:
        x = torch.frombuffer(bytearray(file.read()), dtype=raw[dtype]).reshape(shape)
    wide = lambda t: t.detach().to(torch.float64).numpy().astype(L)
    x.requires_grad_()
    losses = torch.nn.functional.cross_entropy(x, torch.from_numpy(y), reduction="none")
    losses.sum().backward()
    lse = torch.logsumexp(x, 1)
    p = torch.exp(x - lse[:, None])
    from_lse = p - torch.nn.functional.one_hot(torch.from_numpy(y), shape[1]).to(p.dtype)
    return {
        "softmax": wide(torch.softmax(x, 1)),
        "loss": wide(losses),
        "lse": wide(lse),
        "gradient": wide(x.grad),
        "backward": wide(from_lse),
    }


def main():
    directory = sys.argv[1]
    # By dtype, kind of input, what and who: errors of all shapes.
    errors = {}
    for file in sorted(os.listdir(directory)):
        if not file.endswith(".x"):
            continue
        dtype, spread, extent, _ = file.split(".")
        shape = tuple(int(n) for n in extent.split("x"))
        path = os.path.join(directory, file)
        x = load(path, dtype).reshape(shape)
        y = np.arange(shape[0]) * 7919 % shape[1]
        losses, lse, grad, p = exact(x, y)
        wants = {"softmax": p, "loss": losses, "lse": lse, "gradient": grad, "backward": grad}
        wide = "f64" if dtype == "f64" else "f32"
        results = {"PyTorch": of_torch(path, dtype, shape, y)} if torch else {}
        for name in SETS:
            found = {}
            for what in WHATS:
                part = f"{path[:-2]}.{name}.{what}"
                if os.path.exists(part):
                    stored = "f64" if what in ("loss", "lse") else dtype
                    found[what] = load(part, stored)
            results[name] = found
        for who, values in results.items():
            for what in ["softmax"] if spread == "low" else WHATS[1:]:
                if what in values:
                    unit = wide if what in ("loss", "lse") else dtype
                    least = 1e-30 if what == "loss" else 0.0
                    error = ulps(values[what], wants[what], unit, least)
                    errors.setdefault((dtype, spread, what, who), []).append(error)

    present = [s for s in SETS if any(key[3] == s for key in errors)]
    columns = present + (["PyTorch"] if torch else [])
    print("| dtype | inputs | what | " + " | ".join(columns) + " |")
    print("| --- " * (3 + len(columns)) + "|")
    worse = []
    for dtype, (spread, what) in itertools.product(FORMATS, ROWS):
        cells, figures = [], {}
        for who in columns:
            if (dtype, spread, what, who) not in errors:
                cells.append("")
                continue
            error = np.concatenate(errors[dtype, spread, what, who])
            figures[who] = (error.max(), error.mean())
            cells.append(" / ".join(shown(f) for f in figures[who]))
        print(f"| {dtype} | {spread} | {what} | " + " | ".join(cells) + " |")
        for who in present:
            for i, kind in enumerate(["maximum", "mean"]):
                if "PyTorch" in figures and who in figures:
                    ours, theirs = figures[who][i], figures["PyTorch"][i]
                    if ours > theirs + 1:
                        name = f"{dtype} {spread} {what} on {who}"
                        worse.append(f"{name}: {kind} {shown(ours)}, PyTorch {shown(theirs)}")
    print()
    if torch:
        print("worse than PyTorch by more than an ulp: " + ("; ".join(worse) if worse else "none"))


def shown(x):
    return f"{x:.3f}" if x < 10 else f"{x:.0f}" if x < 1e5 else f"{x:.1e}"


main()
