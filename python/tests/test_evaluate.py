"""evaluate and linear_evaluate beside PyTorch's operations."""

import itertools
import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from xent_torch import Evaluation, Options, cross_entropy, evaluate, linear_evaluate

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
N, C, D, K = 6, 9, 5, 3
SHAPES = [(C,), (N, C), (3, C, 4), (2, C, 3, 4), (2, C, 2, 3, 2)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def class_axis(shape):
    return 1 if len(shape) > 1 else 0


def rows_of(shape):
    return (*shape[:1], *shape[2:]) if len(shape) > 1 else ()


def layouts(shape):
    yield lambda t: t
    if len(shape) == 2:
        yield lambda t: t.t().contiguous().t()
    if len(shape) == 4:
        yield lambda t: t.contiguous(memory_format=torch.channels_last)
        yield lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        yield lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2]


def expected(input, target=None, top_k=0, scale=1.0, smoothing=0.0):
    """The results in PyTorch's operations, in f64. `target` is class indices or probabilities."""
    axis = class_axis(input.shape)
    stored, input = input, input.double() * scale
    logp = input.log_softmax(axis)
    order = stored.sort(dim=axis, descending=True, stable=True).indices
    classes = order.narrow(axis, 0, top_k) if top_k else None
    ranks = kl = None
    if target is not None and target.is_floating_point():
        t = target.double() * (1 - smoothing) + smoothing / input.shape[axis]
        kl = (torch.xlogy(t, t) - t * logp).sum(axis)
    elif target is not None:
        ranks = (order == target.unsqueeze(axis)).long().argmax(axis)
        ranks = ranks.where(target != -100, -1)
    return Evaluation(
        input.logsumexp(axis),
        -(logp.exp() * logp).sum(axis),
        order.select(axis, 0),
        classes,
        logp.gather(axis, classes) if top_k else None,
        ranks,
        kl,
    )


def assert_evaluation(got, wanted, dtype):
    assert type(got) is Evaluation
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for name, of, want in zip(Evaluation._fields, got, wanted, strict=True):
        assert (of is None) == (want is None), name
        if of is None:
            continue
        assert not of.requires_grad
        if name == "lse":
            # The sums of f32 and halves are those of f32.
            exact = {} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
            assert_close(of, want, **exact)
        else:
            assert_close(of, want.to(real) if want.is_floating_point() else want)


def indices(shape):
    target = torch.randint(C, rows_of(shape))
    target[torch.rand(target.shape) < 0.3] = -100
    return target


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evaluate(shape, dtype):
    for of in layouts(shape):
        input = of(torch.randn(shape).to(dtype)).requires_grad_()
        soft = torch.rand(shape)
        for target, top_k in itertools.product((None, indices(shape), soft), (0, 1, K, C)):
            got = evaluate(input, target, top_k=top_k)
            assert_evaluation(got, expected(input, target, top_k), dtype)


def test_options():
    for shape in SHAPES:
        input, soft = torch.randn(shape), torch.rand(shape)
        got = evaluate(input, soft, top_k=K, options=Options(logit_scale=0.5), label_smoothing=0.2)
        assert_evaluation(got, expected(input, soft, K, 0.5, 0.2), torch.float32)


def test_equal_logits_and_nan():
    input = torch.tensor([[1.0, 2.0, 2.0, -torch.inf], [0.0, torch.nan, 1.0, torch.nan]])
    got = evaluate(input, torch.tensor([2, 3]), top_k=4)
    assert got.top_classes.tolist() == [[1, 2, 0, 3], [1, 3, 2, 0]]
    assert got.argmax.tolist() == [1, 1]
    assert got.target_ranks.tolist() == [1, 1]
    assert got.top_log_probs[0, 3] == -torch.inf


def test_ignored_rows():
    input, target = torch.randn(N, C), torch.randint(C, (N,))
    mask = torch.tensor([True, False] * 3)
    target[2] = 5000
    options = Options(row_mask=mask)
    got = evaluate(input, target, ignore_index=5000, top_k=2, options=options)
    whole = evaluate(input, top_k=2)
    kept = mask & (target != 5000)
    assert (got.target_ranks[~kept] == -1).all() and (got.target_ranks[kept] >= 0).all()
    assert_close(got[:5], whole[:5])
    kl = evaluate(input, torch.rand(N, C), options=options).kl
    assert (kl[~mask] == 0).all() and (kl[mask] != 0).all()


def test_other_targets():
    """The divergence from sparse targets and from a teacher, as the loss has it."""
    for shape in SHAPES:
        input, teacher = torch.randn(shape), torch.randn(shape)
        axis = class_axis(shape)
        probabilities = (teacher * 0.5).softmax(axis)
        got = evaluate(input, teacher, options=Options(target_scale=0.5))
        assert_evaluation(got, expected(input, probabilities), torch.float32)
        values, classes = teacher.topk(K, axis)
        for scale in (0.0, 0.5):
            values = (values * scale).softmax(axis) if not scale else values
            probabilities = (values * scale).softmax(axis) if scale else values
            full = torch.zeros(shape).scatter_add(axis, classes, probabilities)
            options = Options(target_classes=classes, target_scale=scale)
            got = evaluate(input, values, options=options)
            assert_evaluation(got, expected(input, full), torch.float32)
    index = Options(target_classes=classes.where(classes != 0, 3000))
    got = evaluate(input, values.softmax(axis), ignore_index=3000, options=index)
    assert torch.isfinite(got.kl).all()


def test_log_probs():
    input, target = torch.randn(N, C).log_softmax(1), torch.randint(C, (N,))
    got = evaluate(input, target, top_k=K, options=Options(log_probs=True))
    wanted = expected(input, target, K)
    assert got.lse is None and got.entropy is None
    assert_close(got[2:4], wanted[2:4])
    assert_close(got.top_log_probs, input.gather(1, got.top_classes))
    assert_close(got.target_ranks, wanted.target_ranks)


def test_no_elements():
    for shape in ((0, C), (2, C, 0)):
        got = evaluate(torch.randn(shape), torch.zeros(rows_of(shape)).long(), top_k=K)
        assert got.argmax.shape == got.lse.shape == rows_of(shape)
        assert got.top_classes.shape == (shape[0], K, *shape[2:])


# Linear layers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_linear_evaluate(dtype):
    for rows in ((N,), (2, 3), (), (0,)):
        hidden = torch.randn(*rows, D).to(dtype).requires_grad_()
        layer, bias = torch.randn(C, D).to(dtype), torch.randn(C).to(dtype)
        logits = F.linear(hidden.double(), layer.double(), bias.double()).reshape(-1, C)
        for kind, top_k in itertools.product((None, "indices", "soft"), (0, K)):
            target = flat = None
            if kind == "indices":
                target = torch.randint(C, rows)
                flat = target.reshape(-1)
            elif kind == "soft":
                target = torch.rand(*rows, C)
                flat = target.reshape(-1, C)
            got = linear_evaluate(hidden, layer, target, bias, top_k=top_k)
            wanted = expected(logits, flat, top_k)
            wanted = Evaluation(
                *(None if of is None else of.reshape((*rows, *of.shape[1:])) for of in wanted)
            )
            assert_evaluation(got, wanted, dtype)


def test_linear_evaluate_of_other_targets():
    hidden, layer = torch.randn(2, 3, D), torch.randn(C, D)
    classes, teacher = torch.randint(C, (2, 3, K)), torch.randn(2, 3, K)
    mask = torch.rand(2, 3) < 0.5
    options = Options(target_classes=classes, target_scale=0.5, row_mask=mask, workspace=1 << 24)
    got = linear_evaluate(hidden, layer, teacher, options=options)
    values = (teacher * 0.5).softmax(-1)
    full = torch.zeros(2, 3, C).scatter_add(-1, classes, values)
    wanted = linear_evaluate(hidden, layer, full, options=Options(row_mask=mask))
    assert_close(got.kl, wanted.kl)
    stored = evaluate((hidden @ layer.t()).movedim(-1, 1), full.movedim(-1, 1))
    assert_close(wanted.kl[mask], stored.kl[mask])
    assert (wanted.kl[~mask] == 0).all()


def test_linear_evaluate_of_many_dimensions():
    hidden, layer, bias = torch.randn(N, D), torch.randn(C, 2, 3, D), torch.randn(C, 2, 3)
    target = torch.randint(C, (N, 2, 3))
    logits = torch.einsum("nd,cijd->ncij", hidden, layer) + bias
    got = linear_evaluate(hidden, layer, target, bias, top_k=K)
    assert_evaluation(got, expected(logits, target, K), torch.float32)


# The ways that a call takes.


def both(input, target, hidden, layer):
    first = evaluate(input, target, top_k=K)
    second = linear_evaluate(hidden, layer, target, top_k=K)
    return [of for of in (*first, *second) if of is not None]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, soft):
    target = torch.rand(N, C) if soft else torch.randint(C, (N,))
    arguments = (torch.randn(N, C), target, torch.randn(N, D), torch.randn(C, D))
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    assert_close(compiled(*arguments), both(*arguments))
    input = torch.randn(N, C, requires_grad=True)

    def weighted(x):
        """A loss whose rows have the entropy as factors."""
        return (cross_entropy(x * 2, target, reduction="none") * evaluate(x * 2).entropy).sum()

    got, wanted = torch.compile(weighted, fullgraph=True, backend=backend)(input), weighted(input)
    assert_close(got, wanted)
    assert_close(torch.autograd.grad(got, input), torch.autograd.grad(wanted, input))


@pytest.mark.parametrize("soft", [False, True])
def test_transforms(soft):
    targets = torch.rand(3, N, C) if soft else torch.randint(C, (3, N))
    inputs, hidden, layer = torch.randn(3, N, C), torch.randn(3, N, D), torch.randn(C, D)
    got = torch.vmap(both, in_dims=(0, 0, 0, None))(inputs, targets, hidden, layer)
    for index in range(3):
        wanted = both(inputs[index], targets[index], hidden[index], layer)
        assert_close([of[index] for of in got], wanted)

    def loss(x):
        entropy = evaluate(x).entropy
        return (cross_entropy(x, targets[0], reduction="none") * entropy).sum(), entropy

    input = inputs[0].clone().requires_grad_()
    grad, entropy = torch.func.grad(loss, has_aux=True)(inputs[0])
    assert_close(entropy, evaluate(inputs[0]).entropy)
    assert_close(grad, torch.autograd.grad(loss(input)[0], input)[0])
    jacobian = torch.func.jacrev(lambda x: evaluate(x).entropy)(inputs[0])
    assert (jacobian == 0).all()


def test_opcheck():
    ops, check = torch.ops.xent, torch.library.opcheck
    numbers = (0, -100, 0.1, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, False, False)
    image = torch.randn(2, C, 3, 4).contiguous(memory_format=torch.channels_last)
    for input in (torch.randn(N, C), image, torch.randn(C)):
        for target in (None, indices(input.shape), torch.rand(input.shape)):
            for top_k in (0, K):
                check(ops.evaluate.default, (input, target, *[None] * 4, *numbers, top_k))
    layer = (torch.randn(N, D), torch.randn(C, D), torch.randn(C))
    for target in (None, torch.randint(C, (N,)), torch.rand(N, C)):
        check(ops.linear_evaluate.default, (*layer, target, *[None] * 4, *numbers, 0, K))


def test_autocast_and_meta_tensors():
    hidden, layer = torch.randn(N, D), torch.randn(C, D)
    with torch.autocast("cpu"):
        got = linear_evaluate(hidden, layer)
    low = linear_evaluate(hidden.bfloat16(), layer.bfloat16())
    assert_close(got.entropy, low.entropy)
    got = evaluate(torch.empty(2, C, 4, device="meta"), top_k=K)
    assert got.top_classes.is_meta and got.top_classes.shape == (2, K, 4)
    assert got.kl is None and got.lse.dtype == torch.float64


def test_subclasses():
    class Named(torch.Tensor):
        pass

    input = torch.randn(N, C)
    got = evaluate(input.as_subclass(Named), top_k=K)
    assert type(got) is Evaluation and type(got.entropy) is Named
    assert_close(got.entropy.as_subclass(torch.Tensor), evaluate(input).entropy)
    layer = torch.randn(D, C).as_subclass(Named)
    got = linear_evaluate(input, layer)
    assert type(got) is Evaluation and type(got.entropy) is Named


# Errors.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.full((N,), C)}, IndexError, "targets[0] = 9 is outside [0, 9)"),
        ({"target": torch.zeros(N, 1).long()}, ValueError, "target has the shape [6, 1]"),
        ({"top_k": -1}, ValueError, "top_k = -1"),
        ({"top_k": 65}, ValueError, "top_k = 65"),
        ({"top_k": C + 1}, ValueError, "top_k = 10 exceeds the 9 classes"),
        ({"target": torch.rand(N, C), "ignore_index": 3}, ValueError, "ignore_index = 3"),
        (
            {"options": Options(target_classes=torch.zeros(N, K).long())},
            ValueError,
            "target_classes is given, but target is None",
        ),
        ({"options": Options(row_mask=torch.ones(3).bool())}, ValueError, "row_mask"),
        ({"options": Options(softcap=-1.0)}, ValueError, "softcap"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    for call in (
        lambda: evaluate(torch.randn(N, C), **change),
        lambda: linear_evaluate(torch.randn(N, D), torch.randn(C, D), **change),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()


def test_errors_of_either():
    with pytest.raises(ValueError, match="workspace"):
        evaluate(torch.randn(N, C), options=Options(workspace=1))
    with pytest.raises(ValueError, match="LOG_PROBS"):
        linear_evaluate(torch.randn(N, D), torch.randn(C, D), options=Options(log_probs=True))
    with pytest.raises(ValueError, match="input has no class axis"):
        evaluate(torch.tensor(1.0))
    with pytest.raises(ValueError, match="logits"):
        evaluate(torch.zeros(N, C, dtype=torch.long))
    with pytest.raises(ValueError, match="input has 5 features"):
        linear_evaluate(torch.randn(N, D), torch.randn(C, D + 1))
