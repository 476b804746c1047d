"""Sparse targets, a teacher's logits and the entropy bonus, beside PyTorch's operations."""

import itertools
import re

import pytest
import torch
from like_torch import assert_like
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from xent_torch import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    Options,
    cross_entropy,
    linear_cross_entropy,
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
N, C, D, K = 6, 7, 5, 3
UNUSED = -100


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def matrix(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def class_axis(shape):
    return 1 if len(shape) > 1 else 0


def lists(shape, k=K, dtype=torch.float32):
    """Classes and probabilities for logits of this shape. Some places are unused, some classes are
    listed twice."""
    shape = list(shape)
    classes = shape[class_axis(shape)]
    shape[class_axis(shape)] = k
    listed = torch.randint(classes, shape)
    listed[torch.rand(shape) < 0.2] = UNUSED
    return listed, torch.rand(shape, dtype=dtype)


def dense(classes, values, shape):
    """The same targets with an element for each class, in f64."""
    used = classes != UNUSED
    values = values.double().where(used, 0.0)
    full = torch.zeros(shape, dtype=torch.float64)
    return full.scatter_add(class_axis(shape), classes.where(used, 0), values)


def softened(teacher, scale, classes=None, shape=None):
    """What a teacher's logits stand for, in f64."""
    axis = class_axis(teacher.shape)
    teacher = teacher.double() * scale
    if classes is None:
        return teacher.softmax(axis)
    used = classes != UNUSED
    values = teacher.masked_fill(~used, -torch.inf).softmax(axis)
    return dense(classes, values.nan_to_num(0.0), shape)


def assert_loss(input, target, full, options, **keywords):
    """Compares a loss with that of PyTorch over a target for each class."""
    assert_like(
        lambda x: cross_entropy(x, target, options=options, **keywords),
        lambda x: F.cross_entropy(x, full.to(x.dtype), **keywords),
        (input,),
    )


def layouts(shape):
    """A function for each layout, which gives it to a tensor."""
    yield "packed", lambda t: t
    if len(shape) == 2:
        yield "transposed", lambda t: t.t().contiguous().t()
        yield "padded", lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]
    if len(shape) == 4:
        yield "channels last", lambda t: t.contiguous(memory_format=torch.channels_last)
        yield "rows last", lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        yield "every other", lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(C,), (N, C), (3, C, 4), (2, C, 3, 4), (2, C, 2, 3, 2)], ids=str)
def test_sparse_targets(shape, dtype):
    for reduction, k in itertools.product(REDUCTIONS, (1, K, 12)):
        for (_, of_input), (_, of_target) in itertools.product(layouts(shape), repeat=2):
            input = of_input(torch.randn(shape).to(dtype)).requires_grad_()
            classes, values = lists(shape, k)
            options = Options(target_classes=of_target(classes))
            full = dense(classes, values, shape)
            assert_loss(input, of_target(values), full, options, reduction=reduction)
            options = Options(target_classes=classes)
            assert_loss(input, of_target(values), full, options, reduction=reduction)


def test_expanded_lists():
    input = matrix(2, C, 3, 4)
    for sizes in itertools.product((1, 2), (1, K), (1, 3), (1, 4)):
        if sizes[1] == 1:
            continue
        classes, values = torch.randint(C, sizes), torch.rand(sizes)
        classes, values = classes.expand(2, K, 3, 4), values.expand(2, K, 3, 4)
        full = dense(classes, values, input.shape)
        assert_loss(input, values, full, Options(target_classes=classes))
    classes, values = torch.randint(C, (2, 1, 1, 1)), torch.rand(2, 1, 1, 1)
    classes, values = classes.expand(2, K, 3, 4), values.expand(2, K, 3, 4)
    assert_loss(input, values, dense(classes, values, input.shape), Options(target_classes=classes))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "indices", [torch.int64, torch.int32, torch.uint8, torch.uint16, torch.uint32], ids=str
)
def test_dtypes_of_lists(indices, dtype):
    input, (classes, values) = matrix(N, C), lists((N, C))
    classes = classes.where(classes != UNUSED, 0)
    values = values.to(dtype)
    full = dense(classes, values, input.shape)
    assert_loss(input, values, full, Options(target_classes=classes.to(indices)))


def test_unused_places():
    """They have the index of ignored rows, and what lies beside them is not read."""
    input, (classes, values) = matrix(N, C), lists((N, C))
    classes[2] = UNUSED
    full = dense(classes, values, input.shape)
    values[classes == UNUSED] = torch.nan
    assert_loss(input, values, full, Options(target_classes=classes))
    for index in (-1, 1000):
        moved = classes.where(classes != UNUSED, index)
        loss = cross_entropy(
            input, values, ignore_index=index, options=Options(target_classes=moved)
        )
        assert_close(loss, F.cross_entropy(input, full.float()))
        hidden, layer = matrix(N, D), matrix(C, D)
        loss = linear_cross_entropy(
            hidden, layer, values, ignore_index=index, options=Options(target_classes=moved)
        )
        assert_close(loss, F.linear_cross_entropy(hidden, layer, full.float()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_beside_other_options(reduction):
    for shape in ((N, C), (2, C, 3, 4)):
        input = matrix(*shape, dtype=torch.float64)
        classes, values = lists(shape, dtype=torch.float64)
        full = dense(classes, values, shape)
        rows = full.sum(1).shape
        mask, weights = torch.rand(rows) > 0.3, torch.rand(rows)
        keywords = {"label_smoothing": 0.1, "weight": torch.rand(C), "reduction": reduction}
        rest = {"z_loss": 0.01, "softcap": 3.0, "row_mask": mask, "row_weights": weights}
        losses = [
            cross_entropy(input, target, options=Options(**rest, target_classes=of), **keywords)
            for target, of in ((values, classes), (full, None))
        ]
        assert_close(*losses)
        assert_close(*(torch.autograd.grad(loss.sum(), input)[0] for loss in losses))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_teachers(reduction, dtype):
    for shape in ((C,), (N, C), (2, C, 3, 4)):
        for (_, of_input), (_, of_target) in itertools.product(layouts(shape), repeat=2):
            for scale in (1.0, 0.25):
                input = of_input(torch.randn(shape).to(dtype)).requires_grad_()
                teacher = of_target(torch.randn(shape) * 3)
                options = Options(target_scale=scale)
                full = softened(teacher, scale)
                assert_loss(input, teacher, full, options, reduction=reduction)
                classes, teacher = lists(shape)
                options = Options(target_scale=scale, target_classes=of_target(classes))
                full = softened(teacher, scale, classes, shape)
                assert_loss(input, of_target(teacher), full, options, reduction=reduction)


def test_teachers_of_other_dtypes():
    input = matrix(N, C)
    for dtype in FLOATS:
        teacher = torch.randn(N, C).to(dtype)
        assert_loss(input, teacher, softened(teacher, 1.0), Options(target_scale=1.0))


def with_bonus(input, target, bonus, reduction):
    """The loss with −β·H in PyTorch's operations."""
    logp = input.log_softmax(class_axis(input.shape))
    entropy = -(logp.exp() * logp).sum(class_axis(input.shape))
    rows = F.cross_entropy(input, target, reduction="none") - bonus * entropy
    return {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]


def assert_bonus(input, target, bonus, reduction):
    def theirs(x):
        of = target.to(x.dtype) if target.is_floating_point() else target
        return with_bonus(x, of, bonus, reduction)

    options = Options(entropy_bonus=bonus)
    assert_like(
        lambda x: cross_entropy(x, target, reduction=reduction, options=options), theirs, (input,)
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_entropy_bonus(reduction, dtype):
    for shape, bonus in itertools.product(((C,), (N, C), (2, C, 3, 4)), (0.5, -0.5)):
        rows = [*shape[:1], *shape[2:]] if len(shape) > 1 else []
        for of in dict(layouts(shape)).values():
            for soft in (False, True):
                input = of(torch.randn(shape).to(dtype)).requires_grad_()
                target = torch.rand(shape) if soft else torch.randint(C, rows)
                assert_bonus(input, target, bonus, reduction)


# Linear layers.

KINDS = {
    "sparse": lambda shape: (*lists(shape), 0.0),
    "teacher": lambda shape: (None, torch.randn(shape), 0.5),
    "sparse teacher": lambda shape: (*lists(shape), 0.5),
}


def target_of(kind, shape):
    """Target, options, and the same target with an element for each class."""
    classes, target, scale = KINDS[kind](shape)
    options = Options(target_classes=classes, target_scale=scale)
    full = softened(target, scale, classes, shape) if scale else dense(classes, target, shape)
    return target, options, full.float()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers(kind, reduction, dtype):
    hidden, layer, bias = (matrix(*of, dtype=dtype) for of in ((N, D), (C, D), (C,)))
    target, options, full = target_of(kind, (N, C))
    assert_like(
        lambda h, w, b: linear_cross_entropy(h, w, target, b, reduction=reduction, options=options),
        lambda h, w, b: F.linear_cross_entropy(
            h, w, full.to(h.dtype), linear_bias=b, reduction=reduction
        ),
        (hidden, layer, bias),
        is_product=True,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_of_other_axes(kind):
    target, options, full = target_of(kind, (C,))
    hidden, layer = matrix(D), matrix(C, D)
    loss = linear_cross_entropy(hidden, layer, target, options=options)
    assert_close(loss, F.linear_cross_entropy(hidden, layer, full))
    # (2, 3, D): the classes are the last axis.
    target, options, full = target_of(kind, (6, C))
    hidden = matrix(2, 3, D)
    classes = options.target_classes
    shaped = Options(
        target_classes=None if classes is None else classes.view(2, 3, K),
        target_scale=options.target_scale,
    )
    rows = linear_cross_entropy(
        hidden, layer, target.view(2, 3, -1), reduction="none", options=shaped
    )
    flat = F.linear_cross_entropy(hidden.view(6, D), layer, full, reduction="none")
    assert_close(rows, flat.view(2, 3))
    # (C, 2, 3, D): a loss of two dimensions.
    target, options, full = target_of(kind, (N, C, 2, 3))
    assert_like(
        lambda h, w: linear_cross_entropy(h, w, target, options=options),
        lambda h, w: F.linear_cross_entropy(h, w, full),
        (matrix(N, D), matrix(C, 2, 3, D)),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_entropy_bonus_of_linear_layers(reduction):
    target, options = torch.randint(C, (N,)), Options(entropy_bonus=0.3)
    assert_like(
        lambda h, w: linear_cross_entropy(h, w, target, reduction=reduction, options=options),
        lambda h, w: with_bonus(h @ w.t(), target, 0.3, reduction),
        (matrix(N, D), matrix(C, D)),
    )


# The ways that a call takes.


def settings_of(kind):
    target, options, _ = target_of(kind, (N, C))
    return target, Options(
        target_classes=options.target_classes,
        target_scale=options.target_scale,
        entropy_bonus=0.2,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, reduction):
    target, options = settings_of(kind)
    keywords = {"reduction": reduction, "options": options, "label_smoothing": 0.1}
    input = matrix(N, C, dtype=torch.float64)
    assert gradcheck(lambda x: cross_entropy(x, target, **keywords), input)
    hidden, layer = matrix(N, D, dtype=torch.float64), matrix(C, D, dtype=torch.float64)
    assert gradcheck(lambda h, w: linear_cross_entropy(h, w, target, **keywords), (hidden, layer))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_in_place(kind, reduction):
    target, options, full = target_of(kind, (N, C))
    for layout in (lambda x: x, lambda x: x.t().contiguous().t()):
        leaf = matrix(N, C)
        logits, seen = layout(leaf * 1), []
        logits.register_hook(seen.append)
        address = logits.data_ptr()
        loss = cross_entropy(logits, target, reduction=reduction, options=options, inplace=True)
        loss.sum().backward()
        assert seen[0].data_ptr() == address
        reference = leaf.detach().requires_grad_()
        F.cross_entropy(reference, full, reduction=reduction).sum().backward()
        assert_close(leaf.grad, reference.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind, reduction):
    target, options, full = target_of(kind, (3, C, N))
    classes, scale = options.target_classes, options.target_scale
    inputs = torch.randn(3, N, C)
    # (batch, N, ..)
    target, full = target.transpose(1, 2), full.transpose(1, 2)
    classes = None if classes is None else classes.transpose(1, 2)

    def ours(x, t, c):
        options = Options(target_classes=c, target_scale=scale)
        return cross_entropy(x, t, reduction=reduction, options=options)

    def theirs(x, t, _):
        return F.cross_entropy(x, t, reduction=reduction)

    def both(transform, *, batch=True):
        of = slice(None) if batch else 0
        some = None if classes is None else classes[of]
        got = transform(ours)(inputs[of], target[of], some)
        assert_close(got, transform(theirs)(inputs[of], full[of], some))

    func, vmap = torch.func, torch.vmap
    dims = (0, 0, None if classes is None else 0)
    both(lambda f: func.grad(lambda *of: f(*of).sum()), batch=False)
    both(lambda f: func.jacrev(f), batch=False)
    both(lambda f: vmap(f, in_dims=dims))
    both(lambda f: vmap(func.grad(lambda *of: f(*of).sum()), in_dims=dims))
    both(lambda f: func.grad(lambda *of: vmap(f, in_dims=dims)(*of).sum()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_linear_layers(kind, reduction):
    target, options, full = target_of(kind, (N, C))
    layer = (torch.randn(N, D), torch.randn(C, D))

    def ours(h, w):
        return linear_cross_entropy(h, w, target, reduction=reduction, options=options).sum()

    def theirs(h, w):
        return F.linear_cross_entropy(h, w, full, reduction=reduction).sum()

    assert_close(*(torch.func.grad(of, (0, 1))(*layer) for of in (ours, theirs)))


@pytest.mark.parametrize(
    ("backend", "reduction"),
    [("aot_eager", reduction) for reduction in REDUCTIONS] + [("inductor", "mean")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind, backend, reduction):
    target, options = settings_of(kind)
    leaves = (matrix(N, D), matrix(C, D))

    def ours(h, w, t, classes):
        of = Options(target_classes=classes, target_scale=options.target_scale, entropy_bonus=0.2)
        stored = cross_entropy(h @ w.t(), t, reduction=reduction, options=of).sum()
        return stored + linear_cross_entropy(h, w, t, reduction=reduction, options=of).sum() * 2

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    arguments = (*leaves, target, options.target_classes)
    got, expected = compiled(*arguments), ours(*arguments)
    assert_close(got, expected)
    assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    ops, check = torch.ops.xent, torch.library.opcheck
    target, options = settings_of(kind)
    numbers = (UNUSED, 0.1, 0.0, 0.0, 1.0, 0.0, 0.0, 0.2, options.target_scale, False, False)
    beside = (target, None, None, None, options.target_classes)
    lse = torch.randn(N, dtype=torch.float64)
    for reduction, now in ((1, True), (0, False)):
        tail = (reduction, *numbers, None, now, not now)
        check(ops.cross_entropy.default, (matrix(N, C), *beside, *tail))
        tail = (reduction, *numbers, 0, None, True, True, False, now, not now)
        layer = (matrix(N, D), matrix(C, D), None)
        check(ops.linear_cross_entropy.default, (*layer, *beside, *tail))
    grad = torch.rand(N)
    arguments = (grad, torch.randn(N, C), *beside, 0, *numbers, lse)
    check(ops.cross_entropy_backward.default, arguments)
    with pytest.raises(ValueError, match="these targets have no gradient"):
        ops.target_backward(*arguments)
    layer = (torch.randn(N, D), torch.randn(C, D), None)
    arguments = (grad, *layer, *beside, 0, *numbers, 0, lse, True, True, False)
    check(ops.linear_cross_entropy_backward.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    target, options, full = target_of(kind, (N, C))
    input = matrix(N, C, dtype=torch.bfloat16)
    with torch.autocast("cpu"):
        loss = cross_entropy(input, target, options=options)
        linear = linear_cross_entropy(matrix(N, D), matrix(C, D), target, options=options)
    assert loss.dtype == linear.dtype == torch.float32
    assert_close(loss, F.cross_entropy(input.float(), full))


def test_meta_tensors():
    classes, values = lists((N, C))
    options = Options(target_classes=classes.to("meta"))
    loss = cross_entropy(matrix(N, C).to("meta"), values.to("meta"), options=options)
    assert loss.is_meta and loss.shape == ()


def test_modules():
    input, (classes, values) = matrix(N, C), lists((N, C))
    full, options = dense(classes, values, input.shape).float(), Options(target_classes=classes)
    assert_close(CrossEntropyLoss()(input, values, options), F.cross_entropy(input, full))
    module, hidden = LinearCrossEntropyLoss(D, C), matrix(N, D)
    assert_close(module(hidden, values, options), module(hidden, full))


# Errors.


def _value_of_inner(call, target):
    """The loss, computed under a transform that knows nothing of the target."""
    return torch.func.grad_and_value(lambda x: call(target) + x)(torch.zeros(()))[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_no_gradient_of_the_target(kind, compiled):
    target, options, _ = target_of(kind, (N, C))
    named = "sparse targets" if options.target_classes is not None else "a teacher's logits"
    message = f"target requires grad, and xent computes no gradient of {named}"
    wanting = target.clone().requires_grad_()
    input, hidden, layer = matrix(N, C), matrix(N, D), matrix(C, D)
    calls = [
        lambda t: cross_entropy(input, t, options=options),
        lambda t: linear_cross_entropy(hidden, layer, t, options=options),
    ]
    if compiled:
        for call in calls:
            with pytest.raises(Exception, match=re.escape(message)):
                torch.compile(call, fullgraph=True, backend="aot_eager")(wanting)
        return
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call(wanting)
        with torch.no_grad():
            assert_close(call(wanting), call(target))
        with pytest.raises(ValueError, match=re.escape(message)):
            torch.func.grad(call)(target)
        with pytest.raises(ValueError, match=re.escape(message)):
            # The outer transform differentiates by the target, and the inner one does not.
            torch.func.grad(lambda t, call=call: _value_of_inner(call, t))(target)
        with pytest.raises(ValueError, match=re.escape(message)):
            torch.func.grad(lambda t, call=call: torch.vmap(call)(t).sum())(torch.stack([target]))


CLASSES = torch.tensor([[0, 1, 2]] * N)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"target_classes": CLASSES + 5},
            IndexError,
            "target_classes[0, 2] = 7 is outside [0, 7)",
        ),
        (
            {"target_classes": CLASSES - 1},
            IndexError,
            "target_classes[0, 0] = -1 is outside [0, 7)",
        ),
        ({"target_classes": CLASSES[:4]}, ValueError, "target_classes has the shape [4, 3]"),
        ({"target_classes": CLASSES[:, 0]}, ValueError, "target_classes has the shape [6]"),
        ({"target_classes": CLASSES[:, :2]}, ValueError, "target has the shape [6, 3], and must"),
        ({"target_classes": CLASSES.float()}, ValueError, "target_classes must be an integer"),
        ({"target_classes": CLASSES > 1}, ValueError, "target_classes must be an integer"),
        ({"target_classes": CLASSES.to(torch.int8)}, ValueError, "target_classes cannot be"),
        ({"target": CLASSES}, ValueError, "target must be a floating-point tensor beside"),
        (
            {"target": torch.rand(N, 0), "target_classes": CLASSES[:, :0]},
            ValueError,
            "target_count = 0",
        ),
        ({"target_scale": -1.0}, ValueError, "target_scale = -1"),
        ({"target_scale": torch.nan}, ValueError, "target_scale = NaN"),
        (
            {"target": CLASSES[:, 0], "target_classes": None, "target_scale": 1.0},
            ValueError,
            "target_scale = 1 needs targets that are the logits of a teacher",
        ),
        ({"entropy_bonus": torch.inf}, ValueError, "entropy_bonus = inf"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    target = change.pop("target", torch.rand(N, 3))
    options = Options(**{"target_classes": CLASSES, **change})
    for call in (
        lambda: cross_entropy(matrix(N, C), target, options=options),
        lambda: torch.vmap(lambda x: cross_entropy(x, target, options=options))(
            torch.randn(2, N, C)
        ),
        lambda: linear_cross_entropy(matrix(N, D), matrix(C, D), target, options=options),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()


def test_errors_of_log_probs():
    input = torch.randn(N, C).log_softmax(1)
    with pytest.raises(ValueError, match="entropy_bonus"):
        cross_entropy(input, CLASSES[:, 0], options=Options(log_probs=True, entropy_bonus=0.1))
    with pytest.raises(ValueError, match="ignore_index = 1"):
        cross_entropy(input, input, ignore_index=1, options=Options(target_scale=1.0))
    loss = cross_entropy(
        input, torch.full((N, 3), 0.5), options=Options(log_probs=True, target_classes=CLASSES)
    )
    assert_close(loss, -0.5 * input[:, :3].sum(1).mean())
