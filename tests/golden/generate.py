#!/usr/bin/env python3
"""Golden vectors: what PyTorch computes, and what is exactly true, for tests/golden.rs.

To run, from the root of the repository, with the virtual environment anywhere outside it:

    python3 -m venv ../venv
    ../venv/bin/pip install torch==2.15.0 numpy mpmath
    ../venv/bin/python tests/golden/generate.py

It takes half a minute or so, runs on one thread of a CPU, and writes next to itself

    index.txt       CrossEntropyLoss with class indices: options, ranks, widths, edges
    soft.txt        CrossEntropyLoss with class probabilities
    nll.txt         NLLLoss, whose input is log-probabilities
    softmax.txt     Softmax and LogSoftmax over any axis, forward and backward
    composed.txt    what PyTorch has no single call for, composed of its operations: z-loss, softcap,
                    logit scale, row weights and masks, smoothed NLL, lse, entropy, argmax
    bonus.txt       the entropy bonus, composed of PyTorch's operations too
    distillation.txt    sparse targets, a teacher's logits as targets, and the divergence, composed too
    intro.txt       the examples with which PyTorch's documentation introduces its losses
    linear.txt      linear layers: F.linear and CrossEntropyLoss, the same composed as in composed.txt, and
                    F.linear_cross_entropy in chunks

Inputs come from one seed. PyTorch's own results may differ in their last bits on another processor
(its kernels are chosen at run time); inputs, but for the convolution in intro.txt, and exact results
do not.

Each case holds the inputs as stored, PyTorch's results in their dtype, and the exact results rounded
once to f64. Exact means: the formulas of docs/semantics.md by mpmath with 640 bits on the stored
inputs. They share nothing with PyTorch but the inputs, and wherever both are finite they are held
against PyTorch in float64 right here.

Where the two differ in kind (one is NaN or infinite and the other is not) the case must say why, by a
key of DIFFERENCES; a difference without a reason, or a reason without a difference, ends this script.

Format: text, one record a line, fields separated by one space. Lines starting with # are comments.

    t <id> <dtype> <shape> <data>       a tensor; ids count from 0
    c <name> <key>=<value> ...          a case; @<id> refers to a tensor above it

A shape is sizes joined by commas, "-" for a scalar. Data of f64, f32, bf16, f16 are base64 of the bytes
of all elements, row-major, each little-endian; data of i64 are decimals joined by commas. "-" is no data.
Equal tensors are stored once.

Keys of every case:

    call        cross_entropy, linear, softmax or log_softmax
    dims        rows,classes,inner: the tensor [N, C, d1..dk] seen as three axes
    rank        of the input as PyTorch had it

Of cross_entropy; what is absent has its default:

    logits      [N, C, d..], or the log-probabilities where log_probs=1
    targets     i64 [N, d..], or floats [N, C, d..]
    target_classes    i64 [N, k, d..]: the targets are floats [N, k, d..] of these classes
    target_scale      the targets are a teacher's logits, and t = softmax(target_scale * targets)
    weights, row_weights, row_mask, upstream (the gradient of the loss, or of each row loss)
    ignore, eps, z, beta, cap, scale, normalizer, z_normalizer, reduction (mean, sum, none)
    wide        1: PyTorch widened halves to f32 first, so its loss is f32
    torch_X, X  PyTorch's and the exact result, for X of loss, rows (row losses), grad, grad_targets,
                lse, entropy, kl; argmax is PyTorch's and exact
    differs     why they differ in kind

Of linear, whose dims are rows,classes,1 and whose logits are hidden * weight^T + bias; the keys of
cross_entropy but logits, and

    features    of the hidden states
    hidden      [rows, features]
    weight      [classes, features]
    bias        [classes]; absent in some
    by          composed or chunked, where PyTorch computed it so
    torch_grad_X, grad_X    of hidden, weight and bias

The logits of the exact results are exact too. PyTorch's have the dtype of the operands.

Of softmax and log_softmax: x, torch_y, y; grad_y, torch_grad, grad. The backward starts from PyTorch's
rounded y, and so does its exact result.
"""

import base64
import itertools
import math
import os
import warnings

import mpmath
import torch
import torch.nn.functional as F
from mpmath import mp, mpf

mp.prec = 640
torch.set_num_threads(1)

HERE = os.path.dirname(os.path.abspath(__file__))
INF, NAN = math.inf, math.nan

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]
NAMES = {F32: "f32", F64: "f64", BF16: "bf16", F16: "f16", torch.int64: "i64"}

DIFFERENCES = {
    "zero-times-infinity": "a factor of 0 makes a term 0, even beside an infinity; PyTorch has NaN",
    "ignored-row": "what an ignored row holds reaches nothing; PyTorch's gradient there is NaN",
    "zero-denominator": "x/0 is infinite at the target too; PyTorch has inf - inf there",
    "half-range": "losses are f64, and no intermediate is a half; PyTorch overflows f16",
    "weightless-row": "a row weight of 0 hides the row; composed in PyTorch it is 0*NaN",
}



# ---- exact results ----------------------------------------------------------------------------


def times(factor, x):
    return mpf(0) if factor == 0 else factor * x


def over(a, b):
    if b == 0:
        return mp.nan if a == 0 or mpmath.isnan(a) else mp.inf * mpmath.sign(a)
    return a / b


def softmax(x):
    """(p, log p, lse) of one row."""
    if any(mpmath.isnan(v) for v in x):
        lse = mp.nan
    elif mpmath.isinf(max(x)):
        lse = max(x)
    else:
        e = [mp.exp(v - max(x)) for v in x]
        total = mpmath.fsum(e)
        log_total = mp.log(total) if total > 2 else mp.log1p(total - 1)
        lse = max(x) + log_total
        return [v / total for v in e], [v - max(x) - log_total for v in x], lse
    return [mp.nan] * len(x), [mp.nan] * len(x), lse


def numbers(tensor):
    if isinstance(tensor, list):
        return tensor
    return [mpf(v) for v in tensor.detach().double().flatten().tolist()]


class Axes:
    """A tensor's elements as [rows, classes, inner]."""

    def __init__(self, shape, dim):
        self.rows = math.prod(shape[:dim])
        self.classes = shape[dim]
        self.inner = math.prod(shape[dim + 1 :])

    def positions(self):
        return itertools.product(range(self.rows), range(self.inner))

    def of(self, row, k):
        """Flat indices of a row's classes."""
        return [(row * self.classes + c) * self.inner + k for c in range(self.classes)]

    def __str__(self):
        return f"{self.rows},{self.classes},{self.inner}"


def exact_softmax(call, axes, x):
    x, y = numbers(x), [None] * x.numel()
    for row, k in axes.positions():
        at = axes.of(row, k)
        p, log_p, _ = softmax([x[i] for i in at])
        for i, v in zip(at, p if call == "softmax" else log_p):
            y[i] = v
    return y


def exact_softmax_backward(call, axes, y, grad_y):
    y, g, out = numbers(y), numbers(grad_y), [None] * y.numel()
    for row, k in axes.positions():
        at = axes.of(row, k)
        if call == "softmax":
            dot = mpmath.fsum(y[i] * g[i] for i in at)
        else:
            dot = mpmath.fsum(g[i] for i in at)
        for i in at:
            out[i] = y[i] * (g[i] - dot) if call == "softmax" else g[i] - mp.exp(y[i]) * dot
    return out


def exact_targets(o, axes):
    """The probabilities of all classes, from those of a list or a teacher's logits."""
    listed = o["target_classes"].flatten().tolist() if "target_classes" in o else None
    places = len(listed) // (axes.rows * axes.inner) if listed else axes.classes
    values, out = numbers(o["targets"]), [mpf(0)] * (axes.rows * axes.classes * axes.inner)
    for row, k in axes.positions():
        at = [(row * places + place) * axes.inner + k for place in range(places)]
        if listed:
            at = [i for i in at if listed[i] != o.get("ignore", -100)]
        t = [values[i] for i in at]
        if "target_scale" in o:
            t = softmax([mpf(o["target_scale"]) * y for y in t])[0] if t else []
        for place, (i, value) in enumerate(zip(at, t)):
            c = listed[i] if listed else place
            out[(row * axes.classes + c) * axes.inner + k] += value
        if any(mpmath.isnan(value) for value in t):
            for j in axes.of(row, k):
                out[j] = mp.nan
    return out


def exact_cross_entropy(o, axes):
    """Every result of a problem, by docs/semantics.md."""
    C = axes.classes
    x = numbers(o["logits"])
    scale, cap, lam = (mpf(o.get(key, default)) for key, default in [("scale", 1), ("cap", 0), ("z", 0)])
    beta = mpf(o.get("beta", 0))
    eps = mpf(o.get("eps", 0.0))
    w = numbers(o["weights"]) if "weights" in o else [mpf(1)] * C
    rows = axes.rows * axes.inner
    r = numbers(o["row_weights"]) if "row_weights" in o else [mpf(1)] * rows
    mask = o["row_mask"].flatten().tolist() if "row_mask" in o else [1] * rows
    targets = o.get("targets")
    index = targets is not None and not targets.is_floating_point()
    distils = "target_classes" in o or "target_scale" in o
    dense = exact_targets(o, axes) if distils else None
    t = targets.flatten().tolist() if targets is not None else [None] * rows
    ignore = o.get("ignore", -100)
    kept = [bool(mask[i]) and not (index and t[i] == ignore) for i in range(rows)]
    log_probs = o.get("log_probs", 0)
    reduction = o.get("reduction", "mean")
    upstream = numbers(o["upstream"]) if "upstream" in o else [mpf(1)]
    if len(upstream) == 1:
        upstream = upstream * rows

    def denominator(key, term):
        given = mpf(o.get(key, 0))
        return given if given > 0 else mpmath.fsum(term(i) for i in range(rows) if kept[i])

    normalizer = denominator("normalizer", lambda i: times(r[i], w[t[i]] if index else 1))
    z_normalizer = denominator("z_normalizer", lambda i: r[i])
    out = {"rows": [], "lse": [], "entropy": [], "argmax": [], "kl": []}
    out["grad"] = [mpf(0)] * len(x)
    out["grad_targets"] = [mpf(0)] * len(x)
    ce_total, z_total, bonus_total = mpf(0), mpf(0), mpf(0)
    for row, k in axes.positions():
        i, at = row * axes.inner + k, axes.of(row, k)
        stored = [x[j] for j in at]
        nans = [c for c, v in enumerate(stored) if mpmath.isnan(v)]
        out["argmax"].append(nans[0] if nans else stored.index(max(stored)))
        v = [times(scale, s) for s in stored]
        slope = [scale] * C
        if cap > 0:
            slope = [scale * mp.sech(s / cap) ** 2 if mpmath.isfinite(s) else mpf(0) for s in v]
            v = [cap * mp.tanh(s / cap) for s in v]
        p, log_p, lse = ([mp.nan] * C, stored, mpf(0)) if log_probs else softmax(v)
        if not log_probs:
            out["lse"].append(lse)
            out["entropy"].append(-mpmath.fsum(times(a, b) for a, b in zip(p, log_p)))
        if targets is None:
            continue
        soft = [dense[j] for j in at] if distils else None
        if distils:
            smooth = [times(1 - eps, v) + eps / C for v in soft]
            wrong = any(mpmath.isnan(v) or v < 0 for v in smooth) or not log_probs and mpmath.isnan(log_p[0])
            kl = mp.nan if wrong else mpmath.fsum(s * (mp.log(s) - l) for s, l in zip(smooth, log_p) if s != 0)
            out["kl"].append(kl if kept[i] else mpf(0))
        if not kept[i] or r[i] == 0:
            out["rows"].append(mpf(0))
            continue
        if index:
            soft = [mpf(c == t[i]) for c in range(C)]
            present = [soft[c] != 0 or eps != 0 for c in range(C)]
        elif distils:
            present = [True] * C
        else:
            soft = [mpf(v) for v in targets.double().flatten()[at].tolist()]
            present = [True] * C
        mass = [times(w[c], times(1 - eps, soft[c]) + eps / C) for c in range(C)]
        ce = r[i] * mpmath.fsum(times(mass[c], -log_p[c]) for c in range(C))
        if not log_probs and mpmath.isnan(log_p[0]):
            ce = mp.nan
        z = times(r[i] * lam, lse * lse)
        entropy = mpf(0) if log_probs else out["entropy"][-1]
        bonus = times(-beta, r[i] * entropy)
        ce_total, z_total, bonus_total = ce_total + ce, z_total + z, bonus_total + bonus
        out["rows"].append(ce + z + bonus)
        total = mpmath.fsum(mass)
        factor = upstream[i] * r[i]
        mean = reduction == "mean"
        for c, j in enumerate(at):
            if log_probs:
                g = -mass[c] * factor
                out["grad"][j] = mpf(0) if not present[c] else over(g, normalizer) if mean else g
            else:
                g = (total * p[c] - mass[c]) * factor
                g = over(g, normalizer) if mean else g
                if lam != 0:
                    gz = 2 * lam * lse * p[c] * factor
                    g += over(gz, z_normalizer) if mean else gz
                if beta != 0:
                    gb = beta * times(p[c], log_p[c] + entropy) * factor
                    g += over(gb, z_normalizer) if mean else gb
                out["grad"][j] = g * slope[c]
            gt = times(w[c] * (1 - eps), -log_p[c] * factor)
            out["grad_targets"][j] = over(gt, normalizer) if mean else gt
    if targets is not None and reduction == "mean":
        part = lambda weight, total: over(total, z_normalizer) if weight != 0 else 0
        out["loss"] = [over(ce_total, normalizer) + part(lam, z_total) + part(beta, bonus_total)]
    elif targets is not None and reduction == "sum":
        out["loss"] = [ce_total + z_total + bonus_total]
    if targets is None:
        del out["rows"], out["grad"]
    if log_probs:
        del out["lse"], out["entropy"]
    if targets is None or index:
        del out["grad_targets"]
    return out


def exact_linear(o, axes):
    """Every result of a linear layer. A gradient of 0 makes a term 0, whatever it multiplies."""
    N, C, D = axes.rows, axes.classes, o["hidden"].shape[1]
    h, w = numbers(o["hidden"]), numbers(o["weight"])
    b = numbers(o["bias"]) if "bias" in o else [mpf(0)] * C
    dot = lambda n, c: mpmath.fsum(h[n * D + d] * w[c * D + d] for d in range(D))
    logits = [dot(n, c) + b[c] for n in range(N) for c in range(C)]
    out = exact_cross_entropy({**o, "logits": logits}, axes)
    g = out.pop("grad")
    out.pop("grad_targets", None)
    sums = lambda steps, term: [mpmath.fsum(times(*term(i, d)) for i in range(steps)) for d in range(D)]
    out["grad_hidden"], out["grad_weight"] = [], []
    for n in range(N):
        out["grad_hidden"] += sums(C, lambda c, d: (g[n * C + c], w[c * D + d]))
    for c in range(C):
        out["grad_weight"] += sums(N, lambda n, d: (g[n * C + c], h[n * D + d]))
    out["grad_bias"] = [mpmath.fsum(g[n * C + c] for n in range(N)) for c in range(C)]
    return out


# ---- PyTorch ----------------------------------------------------------------------------------


def as_type(tensor, dtype):
    tensor = tensor.detach()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def torch_plain(o, dtype):
    """CrossEntropyLoss or NLLLoss as a user would call them; `dtype` replaces every float."""
    leaf = as_type(o["logits"], dtype).requires_grad_()
    t = as_type(o["targets"], dtype)
    soft = t.is_floating_point()
    if soft:
        t.requires_grad_()
    args = {}
    if "weights" in o:
        args["weight"] = as_type(o["weights"], dtype)
    if not soft:
        args["ignore_index"] = o.get("ignore", -100)
    if not o.get("log_probs"):
        args["label_smoothing"] = o.get("eps", 0.0)
    call = F.nll_loss if o.get("log_probs") else F.cross_entropy
    rows = call(leaf.detach(), t.detach(), reduction="none", **args)
    loss = call(leaf, t, reduction=o.get("reduction", "mean"), **args)
    upstream = as_type(o["upstream"], dtype) if "upstream" in o else torch.ones_like(loss)
    loss.backward(upstream.reshape(loss.shape))
    out = {"rows": rows, "grad": leaf.grad}
    if o.get("reduction", "mean") != "none":
        out["loss"] = loss
    if soft:
        out["grad_targets"] = t.grad
    return out


def torch_composed(o, dtype):
    """The same from PyTorch's operations, with what it has no call for. Halves are widened."""
    leaf = as_type(o["logits"], dtype).requires_grad_()
    x = leaf.float() if dtype in (BF16, F16) else leaf
    wide = x.dtype
    unbatched = x.dim() == 1
    if unbatched:
        x = x[None]
    if o.get("scale", 1.0) != 1.0:
        x = x * o["scale"]
    if o.get("cap", 0.0) > 0.0:
        x = o["cap"] * torch.tanh(x / o["cap"])
    out = {}
    lse = None
    if not o.get("log_probs"):
        lse = torch.logsumexp(x, 1)
        log_p = F.log_softmax(x, 1)
        out["lse"] = lse
        out["entropy"] = -(log_p.exp() * log_p).sum(1)
    out["argmax"] = leaf.detach()[None].argmax(1) if unbatched else leaf.detach().argmax(1)
    if "targets" not in o:
        return out
    t = as_type(o["targets"], wide)
    t = t[None] if unbatched else t
    soft = t.is_floating_point()
    args = {}
    if "weights" in o:
        args["weight"] = as_type(o["weights"], wide)
    if soft:
        t = t.detach().requires_grad_()
    else:
        args["ignore_index"] = o.get("ignore", -100)
    if not o.get("log_probs"):
        ce = F.cross_entropy(x, t, reduction="none", label_smoothing=o.get("eps", 0.0), **args)
    else:
        eps, w = o.get("eps", 0.0), args.get("weight", torch.ones(x.shape[1], dtype=wide))
        w = w.reshape([1, -1] + [1] * (x.dim() - 2))
        mass = t if soft else F.one_hot(t.clamp(min=0), x.shape[1]).movedim(-1, 1).to(wide)
        ce = -(w * ((1 - eps) * mass + eps / x.shape[1]) * x).sum(1)
    ones = torch.ones_like(ce)
    r = as_type(o["row_weights"], wide).reshape(ce.shape) if "row_weights" in o else ones
    kept = ones
    if "row_mask" in o:
        kept = kept * o["row_mask"].reshape(ce.shape).to(wide)
    if not soft:
        kept = kept * (t != o.get("ignore", -100)).to(wide)
    r = r * kept
    z = o.get("z", 0.0) * lse**2 if o.get("z", 0.0) else torch.zeros_like(ce)
    if o.get("beta"):
        z = z - o["beta"] * out["entropy"]  # which has the denominator of z-loss
    if o.get("reduction", "mean") == "none":
        loss = r * (ce + z)
    else:
        ce_loss, z_loss = (r * ce).sum(), (r * z).sum()
        if o.get("reduction", "mean") == "mean":
            w_y = ones if soft or "weights" not in o else args["weight"][t.clamp(min=0)]
            ce_loss = ce_loss / (o.get("normalizer") or (r * w_y).sum())
            z_loss = z_loss / (o.get("z_normalizer") or r.sum())
        loss = ce_loss + z_loss if o.get("z") or o.get("beta") else ce_loss
        out["loss"] = loss
    out["rows"] = r * (ce + z)
    upstream = as_type(o["upstream"], wide) if "upstream" in o else torch.ones_like(loss)
    loss.backward(upstream.reshape(loss.shape))
    out["grad"] = leaf.grad
    if soft:
        out["grad_targets"] = t.grad[0] if unbatched else t.grad
    return out


def torch_distillation(o, dtype):
    """The same of sparse targets and teachers, whose probabilities are those of all classes here."""
    wide = F32 if dtype in (BF16, F16) else dtype
    logits, t = o["logits"], as_type(o["targets"], wide)
    dim = min(logits.dim() - 1, 1)
    if "target_classes" in o:
        used = o["target_classes"] != o.get("ignore", -100)
        classes = torch.where(used, o["target_classes"], 0)
    else:
        used = torch.tensor(True)
    if "target_scale" in o:
        t = torch.softmax(torch.where(used, o["target_scale"] * t, -INF), dim)
    t = torch.where(used, t, 0.0)
    if "target_classes" in o:
        t = torch.zeros(logits.shape, dtype=wide).scatter_add(dim, classes, t)
    out = torch_composed({**o, "targets": t}, dtype)
    del out["grad_targets"]
    x = as_type(logits, wide)
    if not o.get("log_probs"):
        x = x * o.get("scale", 1.0)
        if o.get("cap", 0.0) > 0.0:
            x = o["cap"] * torch.tanh(x / o["cap"])
        x = F.log_softmax(x, dim)
    eps = o.get("eps", 0.0)
    smooth = (1 - eps) * t + eps / logits.shape[dim]
    kl = (torch.xlogy(smooth, smooth) - smooth * x).sum(dim)
    if "row_mask" in o:
        kl = torch.where(o["row_mask"].reshape(kl.shape) != 0, kl, 0.0)
    return out | {"kl": kl}


LAYER = ["hidden", "weight", "bias"]


def torch_linear(o, dtype):
    """A linear layer and its loss; `dtype` replaces every float."""
    leaves = {key: as_type(o[key], dtype).requires_grad_() for key in LAYER if key in o}
    if o.get("by") == "chunked":
        out = torch_chunked(o, leaves, dtype)
    else:
        logits = F.linear(*leaves.values())
        run = torch_composed if o.get("by") == "composed" else torch_plain
        out = run({**o, "logits": logits}, dtype)
        logits.backward(out.pop("grad"))
        out.pop("grad_targets", None)
    return out | {f"grad_{key}": leaf.grad for key, leaf in leaves.items()}


def torch_chunked(o, leaves, dtype):
    """F.linear_cross_entropy, which makes the logits of a few rows at a time."""
    args = {"linear_bias": leaves.get("bias")}
    if "weights" in o:
        args["weight"] = as_type(o["weights"], dtype)
    if "ignore" in o:
        args["ignore_index"] = o["ignore"]
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    with warnings.catch_warnings():
        # PyTorch warns if it does not work in chunks.
        warnings.simplefilter("error")
        call = lambda reduction: F.linear_cross_entropy(
            leaves["hidden"], leaves["weight"], as_type(o["targets"], dtype),
            reduction=reduction, options=chunks, **args)
        with torch.no_grad():
            rows = call("none")
        loss = call(o.get("reduction", "mean"))
    upstream = as_type(o["upstream"], dtype) if "upstream" in o else torch.ones_like(loss)
    loss.backward(upstream.reshape(loss.shape))
    return {"rows": rows} | ({"loss": loss} if o.get("reduction", "mean") != "none" else {})


# ---- files ------------------------------------------------------------------------------------


class File:
    def __init__(self, name):
        self.name, self.lines, self.ids, self.names = name, [], {}, set()

    def tensor(self, value):
        """The reference to a tensor, or to exact numbers, stored once."""
        if isinstance(value, list):
            if all(isinstance(v, int) for v in value):
                value = torch.tensor(value, dtype=torch.int64)
            else:
                value = torch.tensor([float(v) for v in value], dtype=F64)
        value = value.detach().contiguous()
        dtype = NAMES.get(value.dtype, "i64")
        shape = ",".join(map(str, value.shape)) or "-"
        if value.is_floating_point():
            # One NaN, whatever its sign and payload: those are the processor's.
            value = torch.where(value.isnan(), torch.full_like(value, NAN), value)
            value = value.view(torch.uint8) if value.dim() else value.reshape(1).view(torch.uint8)
            data = base64.b64encode(value.numpy().tobytes()).decode()
        else:
            data = ",".join(map(str, value.long().flatten().tolist()))
        line = f"{dtype} {shape} {data or '-'}"
        if line not in self.ids:
            self.ids[line] = len(self.ids)
            self.lines.append(f"t {self.ids[line]} {line}")
        return f"@{self.ids[line]}"

    def case(self, name, fields):
        assert name not in self.names and " " not in name, name
        self.names.add(name)
        fields = [
            f"{key}={self.tensor(v) if isinstance(v, (torch.Tensor, list)) else v}"
            for key, v in fields.items()
        ]
        self.lines.append(" ".join(["c", name, *fields]))

    def close(self):
        path = os.path.join(HERE, self.name)
        with open(path, "w", encoding="ascii") as out:
            out.write("# Written by generate.py, which documents the format.\n")
            out.write("\n".join(self.lines) + "\n")
        print(f"{self.name}: {len(self.names)} cases, {os.path.getsize(path)} bytes")


def kind(v):
    v = float(v)
    return "nan" if math.isnan(v) else "finite" if math.isfinite(v) else v


def check_double(name, key, exact, double):
    """PyTorch in float64 and the exact result agree, wherever they agree in kind."""
    scale = max([1e-3] + [abs(float(e)) for e in exact if mpmath.isfinite(e)])
    for e, d in zip(exact, double):
        if kind(e) == kind(d) == "finite" and abs(float(e) - d) > 1e-9 * max(scale, 1.0):
            raise SystemExit(f"{name}: {key} is {float(e)!r}, PyTorch in float64 has {d!r}")


def differ_in_kind(results, exact):
    return any(
        kind(t) != kind(e)
        for key in results
        for t, e in zip(results[key].double().flatten().tolist(), exact[key])
    )


RESULTS = ["loss", "rows", "grad", "grad_targets", "lse", "entropy", "kl"]
RESULTS += [f"grad_{key}" for key in LAYER]


def linear(file, name, options, differs=None):
    """Computes a linear layer three ways and writes it."""
    hidden, weight = options["hidden"], options["weight"]
    axes = Axes([hidden.shape[0], weight.shape[0]], 1)
    fields = {"call": "linear", "dims": axes, "rank": 2, "features": hidden.shape[1], **options}
    run = lambda dtype: torch_linear(options, dtype)
    write(file, name, fields, exact_linear(options, axes), run, hidden.dtype, differs)


def cross_entropy(file, name, options, composed=False, differs=None):
    """Computes a case three ways and writes it."""
    logits = options["logits"]
    shape = list(logits.shape)
    axes = Axes([1] + shape if len(shape) == 1 else shape, 1)
    distils = "target_classes" in options or "target_scale" in options
    run = torch_distillation if distils else torch_composed if composed else torch_plain
    fields = {"call": "cross_entropy", "dims": axes, "rank": len(shape), **options}
    if composed:
        fields["wide"] = 1
    exact = exact_cross_entropy(options, axes)
    write(file, name, fields, exact, lambda dtype: run(options, dtype), logits.dtype, differs)


def write(file, name, fields, exact, run, dtype, differs):
    """Holds exact results against PyTorch's in float64, and writes them beside those of `dtype`."""
    results, double = run(dtype), run(F64)
    argmax = results.pop("argmax", None)
    if argmax is not None:
        assert argmax.flatten().tolist() == exact["argmax"], name
    results = {key: results[key] for key in RESULTS if key in results}
    for key in results:
        assert results[key].numel() == len(exact[key]), (name, key)
        check_double(name, key, exact[key], double[key].double().flatten().tolist())
    different = differ_in_kind(results, exact)
    if different != (differs is not None):
        for key in results:
            print(key, results[key], [float(e) for e in exact[key]])
        raise SystemExit(f"{name}: differs={differs}, but the results {'do' if different else 'do not'}")
    assert differs is None or differs in DIFFERENCES, differs
    if argmax is not None:
        fields["argmax"] = exact["argmax"]
    for key in results:
        fields[f"torch_{key}"] = results[key]
        fields[key] = exact[key]
    if differs:
        fields["differs"] = differs
    file.case(name, fields)


def softmaxes(file, name, x, dim, grad_y=None):
    for call in ["softmax", "log_softmax"]:
        function = torch.softmax if call == "softmax" else torch.log_softmax
        backward = getattr(torch.ops.aten, f"_{call}_backward_data")
        axes = Axes(list(x.shape), dim)
        y = function(x, dim)
        exact = exact_softmax(call, axes, x)
        check_double(name, call, exact, function(x.double(), dim).flatten().tolist())
        assert not differ_in_kind({"y": y}, {"y": exact}), name
        fields = {"call": call, "dims": axes, "rank": x.dim(), "x": x, "torch_y": y, "y": exact}
        if grad_y is not None:
            grad = backward(grad_y, y, dim, x.dtype)
            exact = exact_softmax_backward(call, axes, y, grad_y)
            double = backward(grad_y.double(), y.double(), dim, F64)
            check_double(name, call, exact, double.flatten().tolist())
            assert not differ_in_kind({"grad": grad}, {"grad": exact}), name
            fields |= {"grad_y": grad_y, "torch_grad": grad, "grad": exact}
        file.case(f"{call}/{name}", fields)


# ---- the grid ---------------------------------------------------------------------------------

REDUCTIONS = ["mean", "sum", "none"]
SHAPES = {1: [5], 2: [4, 5], 3: [2, 5, 3], 4: [2, 3, 2, 2], 5: [2, 3, 2, 1, 2]}


def normal(shape, dtype, spread=2.0):
    return (torch.randn(shape, dtype=F64) * spread).to(dtype)


def row_shape(shape):
    return [] if len(shape) == 1 else [shape[0]] + shape[2:]


def indices(shape):
    classes = shape[0] if len(shape) == 1 else shape[1]
    return torch.randint(classes, row_shape(shape))


def with_ignored(targets, ignore):
    """About a third of the targets ignored, one at least kept; an unbatched one is kept."""
    flat = targets.clone().flatten()
    flat[flat == ignore] = 0
    flat[1::3] = ignore
    return flat.reshape(targets.shape)


def some_weights(classes, dtype, signed=False):
    w = torch.rand(classes, dtype=F64) + 0.5
    if classes > 2:
        w[2] = 0.0
    if signed and classes > 1:
        w[1] = -0.25
    return w.to(dtype)


def upstream_for(options, shape, dtype):
    if options["reduction"] == "none":
        options["upstream"] = normal(row_shape(shape), dtype, 1.0)


def grid(ranks, choices):
    """Half of all ranks x dtypes x choices of options, and a reduction for each: still every triple of
    rank, dtype and reduction, and every choice with every rank, every dtype and every reduction."""
    points = []
    for rank, (d, dtype), (n, choice) in itertools.product(ranks, enumerate(DTYPES), enumerate(choices)):
        if (n + rank + d) % 2 == 0:
            points.append((rank, dtype, choice, REDUCTIONS[(n // 2 + rank + d // 2) % 3]))
    met = lambda *axes: len({tuple(point[axis] for axis in axes) for point in points})
    assert met(0, 1, 3) == len(ranks) * len(DTYPES) * 3
    assert met(0, 2) == len(ranks) * len(choices)
    assert met(1, 2) == len(DTYPES) * len(choices) and met(2, 3) == len(choices) * 3
    return points


def label(*parts):
    return "/".join(str(part) for part in parts if part)


def index_targets():
    file = File("index.txt")
    torch.manual_seed(1)
    ignores = {"": None, "ignore": -100, "ignore-inside": 1, "ignore-255": 255}
    choices = list(itertools.product(["", "weights"], ["", "smooth"], ignores))
    data = {}
    for rank, dtype, (weights, smooth, ignore), reduction in grid(SHAPES, choices):
        shape = SHAPES[rank]
        classes = shape[0] if rank == 1 else shape[1]
        if (rank, dtype) not in data:
            # An unbatched row alone must not have the class of weight 0.
            targets = indices(shape) if rank > 1 else torch.tensor(3)
            data[rank, dtype] = normal(shape, dtype), targets, some_weights(classes, dtype)
        logits, targets, w = data[rank, dtype]
        options = {"logits": logits, "targets": targets, "reduction": reduction}
        if ignores[ignore] is not None:
            options["ignore"] = ignores[ignore]
            options["targets"] = with_ignored(targets, ignores[ignore])
        if weights:
            options["weights"] = w
        if smooth:
            options["eps"] = 0.1
        upstream_for(options, shape, dtype)
        name = label(f"rank{rank}", NAMES[dtype], weights, smooth, ignore, reduction)
        cross_entropy(file, name, options)

    # Weights of both signs, upstream gradients, all smoothing.
    for dtype in DTYPES:
        base = {"logits": normal([6, 5], dtype), "targets": torch.tensor([0, 1, -100, 4, 3, 1])}
        signed = some_weights(5, dtype, signed=True)
        for eps, reduction in itertools.product([0.0, 0.3, 1.0], REDUCTIONS[:2]):
            name = label("signed", NAMES[dtype], f"smooth{eps}", reduction)
            options = {**base, "weights": signed, "eps": eps, "reduction": reduction}
            cross_entropy(file, name, options)
        options = {**base, "upstream": torch.tensor(-3.5, dtype=dtype)}
        cross_entropy(file, label("upstream", NAMES[dtype]), options)

    # Widths around those of registers, blocks and chunks.
    widths = [(c, dtype) for c in [1, 2, 5, 10, 17, 64, 65, 130] for dtype in DTYPES]
    widths += [(1000, F32), (1000, BF16), (3001, F32)]
    for n, (classes, dtype) in enumerate(widths):
        shape = [1 if classes > 100 else 2, classes]
        options = {"logits": normal(shape, dtype, 3.0), "targets": indices(shape)}
        options["reduction"] = "sum" if n % 2 else "mean"
        if classes in (17, 64, 130):
            # Not the class of weight 0, which a mean could not divide by.
            options["targets"][options["targets"] == 2] = 1
            options |= {"weights": some_weights(classes, dtype), "eps": 0.1}
        cross_entropy(file, f"width{classes}/{NAMES[dtype]}", options)
    for shape, dtype in [([2, 17, 5], F32), ([1, 65, 3], BF16), ([1, 33, 2, 2], F64)]:
        options = {"logits": normal(shape, dtype), "targets": indices(shape), "eps": 0.2}
        cross_entropy(file, f"width{shape[1]}/inner{math.prod(shape[2:])}/{NAMES[dtype]}", options)

    edges(file)
    file.close()


def edges(file):
    zeros = torch.tensor([0, 0])
    for dtype in DTYPES:
        d = NAMES[dtype]

        def case(name, logits, targets, differs=None, **options):
            options = {"logits": torch.tensor(logits).to(dtype), "targets": torch.tensor(targets)} | options
            if "weights" in options:
                options["weights"] = torch.tensor(options["weights"]).to(dtype)
            cross_entropy(file, f"{name}/{d}", options, differs=differs)

        ordinary = [1.0, 2.0, 0.5]
        for smooth in [0.0, 0.1]:
            e = {"eps": smooth} if smooth else {}
            s = "/smooth" if smooth else ""
            for reduction in REDUCTIONS:
                case(f"all-ignored/{reduction}{s}", [ordinary, [0.0, -1.0, 3.0]], [-100, -100],
                     reduction=reduction, **e)
            for what, bad in [("nan", NAN), ("inf", INF)]:
                case(f"{what}{s}", [ordinary, [bad, 1.0, 2.0], [0.5, 1.0, bad]], [0, 0, 1],
                     reduction="none", **e)
                case(f"{what}-ignored{s}", [ordinary, [bad, 1.0, 2.0], [0.25, 1.0, 4.0]],
                     [0, -100, 1], differs="ignored-row", **e)
            case(f"low-beside{s}", [ordinary, [-INF, 1.0, 2.0], [0.5, 1.0, -INF]], [0, 1, 1],
                 reduction="none", **e)
            case(f"low-at-target{s}", [ordinary, [-INF, 1.0, 2.0]], [0, 0], reduction="sum", **e)
            case(f"low-row{s}", [ordinary, [-INF] * 3, [3.0, 0.0, 1.0]], [0, 1, 2], reduction="none", **e)
            case(f"low-ignored{s}", [ordinary, [-INF] * 3], [2, -100], differs="ignored-row", **e)
            # 0*(-inf) from a class weight of 0.
            case(f"low-weightless{s}", [[1.0, -INF, 2.0], ordinary], [0 if smooth else 1, 2],
                 weights=[1.0, 0.0, 2.0], differs="zero-times-infinity", **e)
        case("low-all-but-target", [[1.0, -INF, -INF], [-INF, -INF, -3.0]], [0, 2])
        case("nan-weightless", [[NAN, 1.0, 2.0], ordinary], [0, 1], weights=[0.0, 1.0, 2.0])
        case("weights-sum-0/nan", [ordinary, [3.0, 1.0, 0.0]], [0, 0], weights=[0.0, 1.0, 2.0])
        case("weights-sum-0/inf", [ordinary, [3.0, 1.0, 0.0]], [0, 1], weights=[-1.0, 1.0, 2.0],
             differs="zero-denominator")
        case("weights-sum-0/smooth", [ordinary], [0], weights=[0.0, 1.0, 2.0], eps=0.1,
             differs="zero-denominator")
        case("one-class", [[1.5], [-2.0], [0.0]], [0, 0, -100])
        case("one-class/smooth", [[1.5], [-2.0]], [0, 0], eps=0.3, weights=[2.0])
        case("unbatched-ignored", ordinary, -100, reduction="sum")
        case("equal", [[0.25] * 7], [3])

        # Confident rows: what is left of 1 after p is the result.
        for gap in [5.0, 12.0, 20.0, 40.0, 69.0]:
            case(f"confident/{gap:g}", [[gap, 0.5, -1.0, 0.0], [0.0, 0.25, -1.0, -gap]], [0, 1])
        case("confident/offset", [[-1000.0, -1024.0, -1032.0]], [0])
        case("confident/wrong", [[gap, 0.5, -1.0, 0.0]], [1])
        case("confident/smooth", [[40.0, 0.5, -1.0, 0.0]], [0], eps=0.1)
        case("perfect", [[200.0, 0.0, -200.0], [300.0, 100.0, 0.0]], [0, 0])
        if dtype != F16:
            case("saturated", [[3000.0, 0.0, -3000.0], [0.0, 1000.0, 0.0]], [0, 0])

    # The same row three times: at 0, and far from it where the dtype still has its digits.
    steps = torch.tensor([[0.0, 0.5, 1.0, -1.5, 3.25], [2.0, -2.0, 0.25, 0.75, -4.0]], dtype=F64)
    for offset, dtype in itertools.product([0.0, 1e4, -1e4], [F32, F64]):
        options = {"logits": (steps + offset).to(dtype), "targets": torch.tensor([4, 1])}
        for eps in [0.0, 0.1]:
            name = label("offset", f"{offset:g}", "smooth" if eps else "", NAMES[dtype])
            cross_entropy(file, name, {**options, "eps": eps, "reduction": "sum"})
    large = torch.tensor([[0.0, 8.0, 16.0, -24.0, 32.0]], dtype=F64)
    for offset in [1e4, -1e4]:
        options = {"logits": (large + 16 * round(offset / 16)).to(F16), "targets": torch.tensor([2])}
        cross_entropy(file, f"offset/{offset:g}/f16", options)
    # A sum of losses past what an f16 holds.
    logits = torch.tensor([[30000.0, -30000.0]] * 2, dtype=F16)
    options = {"logits": logits, "targets": zeros + 1, "reduction": "sum"}
    cross_entropy(file, "half-range/f16", options, differs="half-range")
    for reduction in REDUCTIONS:
        options = {"logits": torch.zeros([0, 4]), "targets": torch.zeros(0, dtype=torch.int64)}
        cross_entropy(file, f"no-rows/{reduction}", {**options, "reduction": reduction})


def probability_targets():
    file = File("soft.txt")
    torch.manual_seed(2)
    shapes = {1: [5], 2: [3, 5], 3: [2, 4, 2], 4: [1, 3, 2, 2], 5: [2, 3, 1, 1, 2]}
    choices = list(itertools.product(["", "weights"], ["", "smooth"], ["", "loose", "negative"]))
    data = {}
    for rank, dtype, (weights, smooth, sort), reduction in grid(shapes, choices):
        shape = shapes[rank]
        dim = 0 if rank == 1 else 1
        if (rank, dtype) not in data:
            p = torch.softmax(normal(shape, F64), dim)
            data[rank, dtype] = (
                normal(shape, dtype),
                {
                    "": p.to(dtype),
                    "loose": (torch.rand(shape, dtype=F64) * 1.5).to(dtype),
                    "negative": (p * 3 - 0.7).to(dtype),
                },
                some_weights(shape[dim], dtype, signed=True),
            )
        logits, targets, w = data[rank, dtype]
        options = {"logits": logits, "targets": targets[sort], "reduction": reduction}
        if weights:
            options["weights"] = w
        if smooth:
            options["eps"] = 0.1
        upstream_for(options, shape, dtype)
        name = label(f"rank{rank}", NAMES[dtype], sort, weights, smooth, reduction)
        cross_entropy(file, name, options)

    widths = list(itertools.product([1, 17, 65], DTYPES)) + [(130, F32), (130, BF16)]
    for n, (classes, dtype) in enumerate(widths):
        shape = [1, classes]
        targets = torch.softmax(normal(shape, F64), 1).to(dtype)
        options = {"logits": normal(shape, dtype, 3.0), "targets": targets}
        if n % 2:
            options |= {"weights": some_weights(classes, dtype), "eps": 0.1}
        cross_entropy(file, f"width{classes}/{NAMES[dtype]}", options)
    shape = [2, 17, 3]
    options = {"logits": normal(shape, F32), "targets": torch.softmax(normal(shape, F32), 1)}
    cross_entropy(file, "width17/inner3/f32", options)

    for dtype in DTYPES:
        def case(name, logits, targets, differs=None, **options):
            options = {key: torch.tensor(v).to(dtype) if key == "weights" else v for key, v in options.items()}
            options["logits"] = torch.tensor(logits).to(dtype)
            options["targets"] = torch.tensor(targets).to(dtype)
            cross_entropy(file, f"{name}/{NAMES[dtype]}", options, differs=differs)

        t = [[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]]
        case("low-without-mass", [[1.0, 2.0, 0.5], [1.0, -INF, 2.0]], t, differs="zero-times-infinity")
        case("low-with-mass", [[1.0, -INF, 0.5], [1.0, 0.5, 2.0]], t, reduction="sum")
        case("low-weightless", [[1.0, -INF, 0.5], [1.0, 0.5, 2.0]], t, reduction="sum",
             weights=[1.0, 0.0, 2.0], differs="zero-times-infinity")
        case("low-row", [[-INF] * 3, [1.0, 0.5, 2.0]], t, reduction="none")
        case("nan", [[NAN, 1.0, 0.5], [1.0, 0.5, INF]], t, reduction="none")
        case("all-smoothing", [[1.0, 2.0, 0.5], [1.0, 0.5, 2.0]], t, eps=1.0)
        case("nothing", [[1.0, 2.0, 0.5]], [[0.0, 0.0, 0.0]])
        case("confident", [[40.0, 0.0, -1.0]], [[1.0, 0.0, 0.0]])
    file.close()


def nll():
    file = File("nll.txt")
    torch.manual_seed(3)
    ignores = {"": None, "ignore": -100, "ignore-inside": 1}
    choices = list(itertools.product(["", "weights"], ignores))
    data = {}
    for rank, dtype, (weights, ignore), reduction in grid(SHAPES, choices):
        shape = SHAPES[rank]
        dim = 0 if rank == 1 else 1
        if (rank, dtype) not in data:
            log_p = torch.log_softmax(normal(shape, F64), dim).to(dtype)
            targets = indices(shape) if rank > 1 else torch.tensor(3)
            data[rank, dtype] = log_p, targets, some_weights(shape[dim], dtype)
        log_p, targets, w = data[rank, dtype]
        options = {"logits": log_p, "targets": targets, "reduction": reduction, "log_probs": 1}
        if ignores[ignore] is not None:
            options["ignore"] = ignores[ignore]
            options["targets"] = with_ignored(targets, ignores[ignore])
        if weights:
            options["weights"] = w
        upstream_for(options, shape, dtype)
        cross_entropy(file, label(f"rank{rank}", NAMES[dtype], weights, ignore, reduction), options)

    for dtype in DTYPES:
        def case(name, log_p, targets, differs=None, **options):
            options = {key: torch.tensor(v).to(dtype) if key == "weights" else v for key, v in options.items()}
            options |= {"logits": torch.tensor(log_p).to(dtype), "targets": torch.tensor(targets)}
            cross_entropy(file, f"{name}/{NAMES[dtype]}", options | {"log_probs": 1}, differs=differs)

        rows = [[-1.0, -2.0, -0.5], [-0.25, -3.0, -INF]]
        for reduction in REDUCTIONS:
            case(f"all-ignored/{reduction}", rows, [-100, -100], reduction=reduction)
        case("low", rows, [0, 2], reduction="none")
        case("unread", [[NAN, -1.0, INF], [-2.0, NAN, NAN]], [1, 0])
        case("nan", [[NAN, -1.0, INF], [-2.0, 0.0, 0.0]], [0, 0], reduction="none")
        case("ignored-nan", [[NAN] * 3, [-2.0, 0.0, 0.0]], [-100, 0])
        case("weights-sum-0/nan", rows, [0, 0], weights=[0.0, 1.0, 2.0])
        case("weights-sum-0/inf", rows, [0, 1], weights=[-1.0, 1.0, 2.0])
        case("low-weightless", rows, [0, 2], weights=[1.0, 1.0, 0.0], differs="zero-times-infinity")
        case("not-log-probabilities", [[3.0, -1.0, 7.0]], [2])
    for classes, dtype in itertools.product([1, 17, 65], [F32, BF16]):
        options = {"logits": normal([2, classes], dtype), "targets": indices([2, classes]), "log_probs": 1}
        cross_entropy(file, f"width{classes}/{NAMES[dtype]}", options)
    file.close()


def softmax_family():
    file = File("softmax.txt")
    torch.manual_seed(4)
    shapes = [[5], [3, 5], [2, 3, 2], [1, 3, 2, 2], [2, 1, 3, 1, 2]]
    for shape, dtype in itertools.product(shapes, DTYPES):
        x, g = normal(shape, dtype, 3.0), normal(shape, dtype, 1.0)
        # Half of the axes for each dtype where there are many.
        few = len(shape) <= 3
        for dim in range(0 if few else DTYPES.index(dtype) % 2, len(shape), 1 if few else 2):
            name = "x".join(map(str, shape)) + f"/dim{dim}/{NAMES[dtype]}"
            softmaxes(file, name, x, dim, g)
    widths = [([2, 17], 1, DTYPES), ([65], 0, [F32, F16]), ([17, 3], 0, [F64, BF16]), ([130], 0, [F32])]
    widths += [([2, 33, 3], 1, [F32, F16]), ([300], 0, [F32])]
    for shape, dim, dtypes in widths:
        for dtype in dtypes:
            name = "x".join(map(str, shape)) + f"/dim{dim}/{NAMES[dtype]}"
            softmaxes(file, name, normal(shape, dtype, 3.0), dim, normal(shape, dtype, 1.0))
    edges = {
        "low": [-INF, 1.0, 2.0, -INF, 0.0],
        "low-row": [-INF] * 5,
        "one-left": [-INF, -INF, 7.0, -INF, -INF],
        "nan": [1.0, NAN, 2.0, 0.0, -INF],
        "inf": [1.0, INF, 2.0, 0.0, -INF],
        "confident": [60.0, 0.0, -20.0, 1.0, -10.0],
        "offset": [8192.0, 8200.0, 8208.0, 8184.0, 8192.0],
        "low-offset": [-8192.0, -8200.0, -8208.0, -8184.0, -8192.0],
        "equal": [0.5] * 5,
    }
    for (name, x), dtype in itertools.product(edges.items(), DTYPES):
        # An ordinary row beside it, along both axes.
        x = torch.tensor([x, [0.0, 1.0, -1.0, 2.0, 0.5]]).to(dtype)
        g = torch.tensor([[0.5, -1.0, 2.0, 0.25, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]]).to(dtype)
        softmaxes(file, f"{name}/{NAMES[dtype]}", x, 1, g)
    for dtype in DTYPES:
        x = torch.tensor([[3.0], [-2.0]]).to(dtype)
        softmaxes(file, f"one-class/{NAMES[dtype]}", x, 1, x + 1)
    file.close()


def composed():
    file = File("composed.txt")
    torch.manual_seed(5)
    transforms = {
        "z": {"z": 1e-2},
        "cap": {"cap": 3.0},
        "scale": {"scale": 0.7},
        "cap-scale": {"cap": 2.5, "scale": 1.75},
        "z-cap-scale": {"z": 0.1, "cap": 30.0, "scale": 0.0625},
    }
    shapes = {1: [5], 2: [3, 5], 3: [2, 4, 2], 4: [1, 3, 2, 2]}
    data = {}
    for rank, dtype, choice, reduction in grid(shapes, list(itertools.product(transforms, ["index", "soft"]))):
        transform, sort = choice
        shape = shapes[rank]
        dim = 0 if rank == 1 else 1
        if (rank, dtype) not in data:
            soft = torch.softmax(normal(shape, F64), dim)
            data[rank, dtype] = (
                normal(shape, dtype, 4.0),
                {"index": with_ignored(indices(shape), -100), "soft": (1.5 * soft).to(F32)},
                some_weights(shape[dim], F32, signed=True),
            )
        logits, targets, w = data[rank, dtype]
        options = {"logits": logits, "targets": targets[sort], "reduction": reduction}
        options |= transforms[transform]
        if (rank + len(transform)) % 2:
            options["weights"] = w
        if transform in ("z", "cap-scale"):
            options["eps"] = 0.1
        upstream_for(options, shape, F64 if dtype == F64 else F32)
        name = label(f"rank{rank}", NAMES[dtype], transform, sort, reduction)
        cross_entropy(file, name, options, composed=True)

    # Row weights and masks, given denominators, smoothing over log-probabilities.
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        shape = [2, 4, 3]
        base = {"logits": normal(shape, dtype), "targets": with_ignored(indices(shape), -100)}
        base |= {"reduction": reduction}
        upstream_for(base, shape, F32)
        weights = {"row_weights": (torch.rand([2, 3]) * 2).to(F32)}
        weights["row_weights"][0, 2] = 0.0
        mask = {"row_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
        both = {**base, **weights, **mask, "weights": some_weights(4, F32), "eps": 0.1, "z": 1e-3}
        d = NAMES[dtype]
        cross_entropy(file, label("rows", d, reduction), {**base, **weights}, composed=True)
        cross_entropy(file, label("rows-mask-weights-smooth-z", d, reduction), both, composed=True)
        soft = {**base, **weights, **mask, "targets": torch.rand(shape, dtype=F32)}
        cross_entropy(file, label("rows-mask-soft", d, reduction), soft, composed=True)
        if reduction == "mean":
            given = {**both, "normalizer": 11.0, "z_normalizer": 7.0}
            cross_entropy(file, label("normalizers", d), given, composed=True)
        log_p = torch.log_softmax(normal(shape, F64), 1).to(dtype)
        smooth = {**base, "logits": log_p, "log_probs": 1, "eps": 0.1, "weights": both["weights"]}
        cross_entropy(file, label("log-probs-smooth", d, reduction), smooth, composed=True)
        soft = {**soft, "logits": log_p, "log_probs": 1, "eps": 0.1}
        cross_entropy(file, label("log-probs-soft", d, reduction), soft, composed=True)

    for dtype in DTYPES:
        d = NAMES[dtype]
        # A cap makes infinities finite: their slope is 0.
        logits = torch.tensor([[INF, 0.0, 1.0], [-INF, 2.0, 1.0], [50.0, -60.0, 70.0]]).to(dtype)
        options = {"logits": logits, "targets": torch.tensor([0, 0, 1]), "cap": 5.0, "reduction": "sum"}
        cross_entropy(file, f"cap-infinite/{d}", options, composed=True)
        logits = torch.tensor([[NAN, 1.0, 2.0], [1.0, 3.0, 0.5]]).to(dtype)
        options = {"logits": logits, "targets": torch.tensor([0, 1]), "row_weights": torch.tensor([0.0, 2.0])}
        cross_entropy(file, f"weightless-nan/{d}", options, composed=True, differs="weightless-row")
        confident = torch.tensor([[40.0, 0.0, -1.0], [12.0, 0.0, 1.0]]).to(dtype)
        options = {"logits": confident, "targets": torch.tensor([0, 0]), "z": 1e-4}
        cross_entropy(file, f"z-confident/{d}", options, composed=True)

        # Without targets: lse, argmax, entropy.
        for shape in [[4, 5], [2, 17, 2], [1, 130]]:
            name = label("evaluate", "x".join(map(str, shape)), d)
            cross_entropy(file, name, {"logits": normal(shape, dtype)}, composed=True)
        low = torch.tensor([[-INF, 1.0, 2.0], [1.0, 1.0, -INF]]).to(dtype)
        cross_entropy(file, f"evaluate/low/{d}", {"logits": low}, composed=True, differs="zero-times-infinity")
        odd = torch.tensor([[-INF] * 3, [NAN, INF, NAN], [3.0, 3.0, 1.0], [-0.0, 0.0, -1.0]]).to(dtype)
        cross_entropy(file, f"evaluate/odd/{d}", {"logits": odd}, composed=True)
    file.close()


def bonus():
    file = File("bonus.txt")
    torch.manual_seed(8)
    betas = itertools.cycle([0.01, -0.5, 1.0])
    shapes = [[5], [4, 5], [2, 4, 3], [1, 35, 2], [1, 130]]
    for n, (shape, dtype, sort) in enumerate(itertools.product(shapes, DTYPES, ["index", "soft"])):
        if shape == [1, 130] and (sort == "soft") == (dtype in (F64, BF16)):
            continue
        dim = 0 if len(shape) == 1 else 1
        soft = (1.5 * torch.softmax(normal(shape, F64), dim)).to(F32)
        options = {"logits": normal(shape, dtype, 3.0), "beta": next(betas)}
        options["targets"] = with_ignored(indices(shape), -100) if sort == "index" else soft
        options["reduction"] = REDUCTIONS[n % 3]
        options |= [{}, {"scale": 0.7}, {"cap": 2.5, "scale": 1.75}, {"z": 1e-2}][n // 2 % 4]
        if n % 5 == 1 and len(shape) > 1:
            options |= {"eps": 0.1, "weights": some_weights(shape[dim], F32, signed=True)}
        upstream_for(options, shape, F64 if dtype == F64 else F32)
        name = label("x".join(map(str, shape)), NAMES[dtype], sort, options["reduction"])
        cross_entropy(file, name, options, composed=True)

    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        shape, d = [2, 4, 3], NAMES[dtype]
        options = {"logits": normal(shape, dtype), "targets": with_ignored(indices(shape), -100)}
        options |= {"row_weights": (torch.rand([2, 3]) * 2).to(F32), "row_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
        options |= {"reduction": reduction, "beta": 0.25}
        upstream_for(options, shape, F32)
        cross_entropy(file, label("rows-mask", d, reduction), options, composed=True)
        if reduction == "mean":
            given = {**options, "normalizer": 11.0, "z_normalizer": 7.0}
            cross_entropy(file, label("normalizers", d), given, composed=True)

    for dtype in DTYPES:
        d = NAMES[dtype]

        def case(name, logits, targets, differs=None, **options):
            options |= {"logits": torch.tensor(logits).to(dtype), "targets": torch.tensor(targets)}
            options = {"beta": 0.5, "reduction": "sum"} | options
            cross_entropy(file, f"{name}/{d}", options, composed=True, differs=differs)

        case("equal", [[1.5] * 4, [-3.0] * 4], [0, 3], beta=-2.0)
        case("dominant", [[40.0, 0.0, -1.0, 2.0], [0.5, 12.0, 0.0, 1.0]], [0, 0])
        case("one-class", [[3.0], [-2.0]], [0, 0])
        case("offset", [[32768.0, 32512.0, 32768.0, 0.0], [-32768.0, -32768.0, -32512.0, -32768.0]], [0, 2])
        case("low", [[-INF, 1.0, 2.0, -INF], [1.0, -INF, -INF, 1.0]], [1, 0], "zero-times-infinity")
        case("nan", [[0.5, 1.0, 2.0, 0.0], [NAN, 1.0, 2.0, 0.0], [1.0, INF, 2.0, 0.0], [0.0, 1.0, 0.5, -1.0]], [0, 1, 2, 3])
        # Composed, the gradient of a mean over no rows is 0*NaN.
        for reduction in ["sum", "none"]:
            case(f"all-ignored/{reduction}", [[1.0, 2.0], [0.0, 3.0]], [-100, -100], reduction=reduction)
    file.close()


def distillation():
    file = File("distillation.txt")
    torch.manual_seed(9)
    shapes = [[5], [4, 5], [2, 4, 3], [2, 3, 2, 2], [1, 35, 2], [1, 130]]
    sorts = ["sparse", "teacher", "sparse-teacher"]
    transforms = [{}, {"scale": 0.7}, {"cap": 2.5, "scale": 1.75}, {"z": 1e-2}, {"beta": 0.25}, {}, {"log_probs": 1}]
    scales, transforms = itertools.cycle([1.0, 0.5, 0.7, 2.0, 1.3]), itertools.cycle(transforms)
    dtypes = itertools.cycle([F32, BF16, F64, F16, F32, F64, BF16])
    for n, (shape, dtype, sort) in enumerate(itertools.product(shapes, DTYPES, sorts)):
        if shape == [1, 130] and n % 2:
            continue
        dim = min(len(shape) - 1, 1)
        options = {"logits": normal(shape, dtype)} | next(transforms)
        if "log_probs" in options:
            options["logits"] = torch.log_softmax(options["logits"].double(), dim).to(dtype)
        places = [3, 1, shape[dim], shape[dim] + 3][n % 4]
        listed = shape[:dim] + [places] + shape[dim + 1 :]
        if "sparse" in sort:
            options["target_classes"] = listed_classes(listed, shape[dim], n % 3 != 1)
            options["ignore"] = -1
        of = listed if "sparse" in sort else shape
        if "teacher" in sort:
            options |= {"targets": normal(of, next(dtypes), 3.0), "target_scale": next(scales)}
        else:
            options["targets"] = torch.rand(of, dtype=F64).to(next(dtypes))
        options["reduction"] = REDUCTIONS[n % 3]
        if n % 5 < 2:
            options["eps"] = 0.1
        if n % 4 == 1:
            options["weights"] = some_weights(shape[dim], F32, signed=True)
        if n % 7 == 3 and len(shape) > 1:
            options["row_weights"] = (torch.rand(row_shape(shape)) * 2).to(F32)
            mask = torch.ones(math.prod(row_shape(shape)), dtype=torch.int64)
            mask[1::3] = 0
            options["row_mask"] = mask.reshape(row_shape(shape))
        upstream_for(options, shape, F64 if dtype == F64 else F32)
        name = label("x".join(map(str, shape)), NAMES[dtype], sort, options["reduction"])
        cross_entropy(file, name, options, composed=True)

    for dtype in DTYPES:
        d = NAMES[dtype]

        def case(name, logits, targets, differs=None, classes=None, **options):
            options |= {"logits": torch.tensor(logits).to(dtype), "targets": torch.tensor(targets).to(F32)}
            if classes is not None:
                options["target_classes"] = torch.tensor(classes)
            options = {"reduction": "sum"} | options
            cross_entropy(file, f"{name}/{d}", options, composed=True, differs=differs)

        rows = [[0.5, -1.0, 2.0, 0.0], [1.0, 3.0, -2.0, 0.25]]
        unused = -100
        case("unused-list", rows, [[0.5, NAN], [0.75, 0.25]], classes=[[unused, unused], [2, 0]])
        case("unused-list/teacher", rows, [[0.5, NAN], [0.75, 0.25]], classes=[[unused, unused], [2, 0]], target_scale=2.0)
        case("duplicates", rows, [[0.25, 0.5, 0.25], [0.75, 0.5, -0.75]], classes=[[1, 1, 1], [0, 2, 0]])
        case("duplicates/teacher", rows, [[1.0, 1.0, -INF], [0.5, -1.0, 0.5]], classes=[[1, 1, 3], [0, 2, 0]], target_scale=0.5)
        case("teacher-low", rows, [[0.5, -INF, 1.0, -INF], [-INF, 2.0, -INF, -INF]], target_scale=1.0)
        case("teacher-odd", rows + rows, [[NAN, 0.0, 1.0, 2.0], [0.0, INF, 1.0, 2.0], [-INF] * 4, [0.0, 1.0, 2.0, 3.0]],
             target_scale=1.0, reduction="none")
        case("teacher-equal", rows, rows, target_scale=1.0)
        case("negative", rows, [[-0.25, 1.25], [0.5, 0.5]], classes=[[0, 1], [2, 3]])
        case("low", [[-INF, 1.0, 2.0, 0.0], [1.0, -INF, 0.5, 0.0]], [[0.5, 0.5], [0.5, 0.5]], "zero-times-infinity",
             classes=[[1, 2], [0, 3]])
        case("low-listed", [[-INF, 1.0, 2.0, 0.0], [1.0, 3.0, 0.5, 0.0]], [[0.5, 0.5], [0.5, 0.5]], "zero-times-infinity",
             classes=[[0, 2], [0, 3]], reduction="none")
        case("one-class", [[3.0], [-2.0]], [[1.0, 0.5], [-1.0, 2.0]], classes=[[0, 0], [0, 0]], target_scale=1.5)
    file.close()


def listed_classes(shape, classes, has_unused):
    """Lists of classes, a few of them twice, and a third of the places unused."""
    listed = torch.randint(classes, shape)
    flat = listed.flatten()
    if has_unused:
        flat[1::3] = -1
    return flat.reshape(shape)


def introductions():
    file = File("intro.txt")
    torch.manual_seed(0)
    logits = torch.randn(3, 5, requires_grad=True)
    targets = torch.empty(3, dtype=torch.long).random_(5)
    rows = F.cross_entropy(logits, targets, reduction="none")
    printed = torch.tensor([1.4639, 3.0493, 2.3056])
    assert torch.allclose(rows, printed, rtol=0, atol=5e-5), rows
    for reduction, printed in [("mean", 2.2729), ("sum", 6.8188), ("none", None)]:
        options = {"logits": logits, "targets": targets, "reduction": reduction}
        assert printed is None or abs(F.cross_entropy(logits, targets, reduction=reduction) - printed) < 5e-5
        cross_entropy(file, f"indices/{reduction}", options)
    logits, targets = torch.randn(3, 5), torch.randn(3, 5).softmax(dim=1)
    cross_entropy(file, "probabilities", {"logits": logits, "targets": targets})
    log_p = torch.log_softmax(torch.randn(3, 5), 1)
    options = {"logits": log_p, "targets": torch.tensor([1, 0, 4]), "log_probs": 1}
    cross_entropy(file, "nll", options)
    data, conv = torch.randn(5, 16, 10, 10), torch.nn.Conv2d(16, 4, (3, 3))
    targets = torch.empty(5, 8, 8, dtype=torch.long).random_(0, 4)
    images = conv(data).detach()
    cross_entropy(file, "images", {"logits": images, "targets": targets})
    log_p = torch.log_softmax(images, 1)
    cross_entropy(file, "images/nll", {"logits": log_p, "targets": targets, "log_probs": 1})
    file.close()


def layer(shape, dtype, bias=False):
    """Operands whose logits have a spread of about 2."""
    rows, classes, features = shape
    options = {"hidden": normal([rows, features], dtype, 1.0)}
    options["weight"] = normal([classes, features], dtype, 2.0 / math.sqrt(features))
    if bias:
        options["bias"] = normal([classes], dtype, 1.0)
    return options


def linear_layers():
    file = File("linear.txt")
    torch.manual_seed(6)
    shapes = {1: [4, 5, 3], 2: [3, 9, 2]}
    sorts = ["index", "ignore", "soft"]
    choices = list(itertools.product(["", "bias"], ["", "weights"], ["", "smooth"], sorts))
    data = {}
    for rank, dtype, (bias, weights, smooth, sort), reduction in grid(shapes, choices):
        rows, classes, _ = shape = shapes[rank]
        if (rank, dtype) not in data:
            targets = indices([rows, classes])
            # Not the class of weight 0, which a mean could not divide by.
            targets[0] = 1
            soft = torch.softmax(normal([rows, classes], F64), 1).to(dtype)
            targets = {"index": targets, "ignore": with_ignored(targets, -100), "soft": soft}
            data[rank, dtype] = layer(shape, dtype, True), targets, some_weights(classes, dtype)
        operands, targets, w = data[rank, dtype]
        options = {key: value for key, value in operands.items() if bias or key != "bias"}
        options |= {"targets": targets[sort], "reduction": reduction}
        if weights:
            options["weights"] = w
        if smooth:
            options["eps"] = 0.1
        upstream_for(options, [rows, classes], dtype)
        name = label("x".join(map(str, shape)), NAMES[dtype], bias, weights, smooth, sort, reduction)
        linear(file, name, options)

    # Z-loss, softcap and logit scale.
    transforms = {
        "z": {"z": 1e-2},
        "cap": {"cap": 3.0},
        "scale": {"scale": 0.7},
        "z-cap-scale": {"z": 0.1, "cap": 2.5, "scale": 1.75},
    }
    for n, (transform, sort, dtype) in enumerate(itertools.product(transforms, sorts[1:], DTYPES)):
        operands, targets, w = data[1, dtype]
        options = {**operands, "targets": targets[sort], "reduction": REDUCTIONS[n % 3], "by": "composed"}
        options |= transforms[transform]
        if n % 2:
            options |= {"weights": w.to(F32), "eps": 0.1}
        upstream_for(options, [4, 5], F64 if dtype == F64 else F32)
        linear(file, label(transform, NAMES[dtype], sort, options["reduction"]), options)

    # Row weights and masks, given denominators.
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        operands, targets, w = data[1, dtype]
        options = {**operands, "targets": targets["ignore"], "reduction": reduction, "by": "composed"}
        upstream_for(options, [4, 5], F32)
        options["row_weights"] = torch.tensor([0.5, 1.5, 0.0, 2.0])
        linear(file, label("rows", NAMES[dtype], reduction), options)
        options |= {"row_mask": torch.tensor([1, 1, 1, 0]), "z": 1e-3, "eps": 0.1}
        options["row_weights"] = torch.tensor([0.5, 1.5, 0.25, 2.0])
        if reduction == "mean":
            options |= {"normalizer": 11.0, "z_normalizer": 7.0}
        linear(file, label("rows-mask-smooth-z", NAMES[dtype], reduction), options)

    # Logits that PyTorch does not store either.
    for n, (dtype, sort, weights) in enumerate(itertools.product(DTYPES, sorts[1:], ["", "weights"])):
        options = layer([7, 6, 3], dtype, n % 4 == 1)
        soft = torch.softmax(normal([7, 6], F64), 1).to(dtype)
        options["targets"] = soft if sort == "soft" else with_ignored(indices([7, 6]), -100)
        if weights:
            # Classes of weight 0 may be all that is left.
            options["weights"] = some_weights(6, dtype) + 0.25
        options |= {"reduction": REDUCTIONS[n % 3], "by": "chunked"}
        upstream_for(options, [7, 6], dtype)
        linear(file, label("chunked", NAMES[dtype], sort, weights, options["reduction"]), options)

    # Sizes around those of registers, panels, blocks and chains.
    sizes = [([1, 1, 1], DTYPES), ([1, 2, 1], DTYPES), ([6, 16, 8], [F32, BF16]), ([7, 17, 9], [F64, F16])]
    sizes += [([9, 15, 17], [F32, BF16]), ([5, 64, 7], [F32, F16]), ([8, 65, 5], [F64, BF16])]
    sizes += [([2, 3, 64], [F32, F16]), ([2, 3, 65], [F64, BF16]), ([1, 2, 257], [F32])]
    sizes += [([3, 255, 2], [F32]), ([2, 256, 1], [BF16, F64]), ([3, 257, 1], [F32, F16]), ([2, 300, 1], [F32, BF16])]
    for n, (shape, dtypes) in enumerate(sizes):
        for dtype in dtypes:
            options = layer(shape, dtype, n % 2 == 0)
            options["targets"] = indices(shape[:2])
            options["reduction"] = REDUCTIONS[n % 2]
            linear(file, label("size", "x".join(map(str, shape)), NAMES[dtype]), options)

    for dtype in DTYPES:
        d = NAMES[dtype]

        def case(name, hidden, weight, targets, bias=None, differs=None, **options):
            options |= {"hidden": torch.tensor(hidden).to(dtype), "weight": torch.tensor(weight).to(dtype)}
            if bias is not None:
                options["bias"] = torch.tensor(bias).to(dtype)
            linear(file, f"{name}/{d}", options | {"targets": torch.tensor(targets)}, differs)

        rows, weight = [[1.0, -0.5], [0.25, 2.0], [-1.5, 0.75]], [[1.0, 2.0], [-0.5, 0.25], [0.5, -1.0]]
        for what, bad in [("nan", NAN), ("inf", INF)]:
            poisoned = [rows[0], [bad, 1.0], rows[2]]
            case(f"{what}-ignored", poisoned, weight, [0, -100, 2], differs="ignored-row")
            case(f"{what}-ignored/bias", poisoned, weight, [0, -100, 2], [0.5, 0.0, -1.0], differs="ignored-row",
                 reduction="sum", eps=0.1)
            case(f"{what}-masked", poisoned, weight, [0, 1, 2], differs="ignored-row", by="composed",
                 row_mask=torch.tensor([1, 0, 1]))
            case(f"{what}-weightless", poisoned, weight, [0, 1, 2], differs="weightless-row", by="composed",
                 row_weights=torch.tensor([1.0, 0.0, 2.0]))
        case("nan", [rows[0], [NAN, 1.0], rows[2]], weight, [0, 1, 2], reduction="none")
        for reduction in REDUCTIONS:
            case(f"all-ignored/{reduction}", rows, weight, [-100] * 3, reduction=reduction)
        case("weights-sum-0/nan", rows, weight, [0, 0, 0], weights=torch.tensor([0.0, 1.0, 2.0]).to(dtype))
        # A class that its bias takes out.
        case("low-bias", rows, weight, [0, 2, 2], [0.5, -INF, 0.25])
        for gap in [12.0, 20.0, 40.0]:
            case(f"confident/{gap:g}", [[gap, 0.5], [-gap, 0.25]], [[1.0, 0.0], [0.0, 1.0], [-0.25, 0.5]], [0, 2],
                 reduction="none")
        case("offset", [[1.0, 0.5], [1.0, -0.25]], [[64.0, 1.0], [64.0, 2.0], [64.0, -3.0]], [2, 0])
    file.close()


if __name__ == "__main__":
    assert torch.__version__.startswith("2.15."), torch.__version__
    index_targets()
    probability_targets()
    nll()
    softmax_family()
    composed()
    introductions()
    linear_layers()
    bonus()
    distillation()
