"""Autograd, its transforms, compilation, autocast, and gradients in place."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing import assert_close

import xent_torch
from xent_torch import Options, cross_entropy, linear_cross_entropy

C, D, N = 7, 5, 6
LINEAR = F.linear_cross_entropy
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def matrix(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


INDICES = torch.tensor([0, 3, 6, -100, 2, 2])
OPTIONS = {
    "none": Options(),
    "all": Options(
        z_loss=0.01,
        softcap=3.0,
        logit_scale=0.7,
        row_mask=torch.tensor([True, True, False, True, True, True]),
        row_weights=torch.rand(N, dtype=torch.float64),
        normalizer=3.0,
        z_normalizer=2.0,
    ),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(reduction, options):
    keywords = {"reduction": reduction, "options": options, "label_smoothing": 0.1}
    weight = torch.rand(C, dtype=torch.float64)
    input = matrix(N, C, dtype=torch.float64)
    assert gradcheck(lambda x: cross_entropy(x, INDICES, weight, **keywords), input)
    soft = torch.rand(N, C, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, t: cross_entropy(x, t, weight, **keywords), (input, soft))
    assert gradcheck(lambda t: cross_entropy(input.detach(), t, weight, **keywords), soft)
    hidden, layer = matrix(N, D, dtype=torch.float64), matrix(C, D, dtype=torch.float64)
    bias = matrix(C, dtype=torch.float64)
    assert gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, INDICES, b, weight=weight, **keywords),
        (hidden, layer, bias),
    )


def test_one_scale_or_another():
    """The saved gradient is multiplied in its own memory if nobody needs it again."""
    input = matrix(N, C)
    for scale in (1.0, -2.5):
        for retain in (False, True):
            loss = cross_entropy(input, INDICES)
            expected = torch.autograd.grad(F.cross_entropy(input, INDICES), input)[0] * scale
            for _ in range(3 if retain else 1):
                (grad,) = torch.autograd.grad(loss * scale, input, retain_graph=retain)
                assert_close(grad, expected)
                grad.zero_()


def test_the_gradient_becomes_that_of_the_leaf():
    """Autograd copies a gradient that somebody else holds."""
    input = matrix(2048, 2048)
    cross_entropy(input, torch.zeros(2048, dtype=torch.long)).backward()
    assert_close(input.grad.sum(1), torch.zeros(2048), atol=1e-6, rtol=0.0)
    again = cross_entropy(input, torch.zeros(2048, dtype=torch.long))
    again.backward()
    assert_close(
        input.grad[:, 0],
        2
        * torch.autograd.grad(F.cross_entropy(input, torch.zeros(2048, dtype=torch.long)), input)[
            0
        ][:, 0],
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_are_errors(reduction):
    message = "first derivatives"
    input, soft = matrix(N, C), torch.rand(N, C, requires_grad=True)
    hidden, layer = matrix(N, D), matrix(C, D)

    def loss(x, target=INDICES):
        return cross_entropy(x, target, reduction=reduction).sum()

    def linear(w):
        return linear_cross_entropy(hidden.detach(), w, INDICES, reduction=reduction).sum()

    for value, leaf in (
        (loss(input), input),
        (loss(input, soft), input),
        (loss(input.detach(), soft), soft),
        (linear(layer), layer),
    ):
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match=message):
            grad.sum().backward()
    for function, leaf in ((loss, input.detach()), (linear, layer.detach())):
        first = torch.func.grad(function)
        with pytest.raises(NotImplementedError, match=message):
            torch.func.grad(lambda x, first=first: first(x).sum())(leaf)


def test_forward_mode_is_an_error():
    with pytest.raises(NotImplementedError):
        torch.func.jvp(
            lambda x: cross_entropy(x, INDICES), (torch.randn(N, C),), (torch.ones(N, C),)
        )


# In place.


def test_in_place():
    for reduction in REDUCTIONS:
        for layout in (lambda x: x, lambda x: x[:, 1:], lambda x: x.t().contiguous().t()):
            leaf = matrix(N, C + 1)
            logits = layout(leaf * 1)
            target = INDICES.clamp(max=logits.shape[1] - 1)
            address = logits.data_ptr()
            seen = []
            logits.register_hook(seen.append)
            loss = cross_entropy(logits, target, reduction=reduction, inplace=True)
            loss.sum().backward()
            assert seen[0].data_ptr() == address
            assert_close(logits.detach(), seen[0])
            reference = leaf.detach().requires_grad_()
            F.cross_entropy(layout(reference * 1), target, reduction=reduction).sum().backward()
            assert_close(leaf.grad, reference.grad)


def test_in_place_is_seen_by_autograd():
    leaf = matrix(N, C)
    logits = leaf.tanh()  # tanh needs its output in its backward
    loss = cross_entropy(logits, INDICES, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_refuses_what_it_would_destroy():
    leaf = matrix(N, C)
    for logits in (leaf, leaf.view(N, C), leaf.t().t()):
        with pytest.raises(ValueError, match="leaf"):
            cross_entropy(logits, INDICES, inplace=True)
    with pytest.raises(ValueError, match="gradient of target"):
        cross_entropy(leaf * 1, torch.rand(N, C, requires_grad=True), inplace=True)


def test_in_place_leaves_logits_that_it_cannot_or_need_not_replace():
    logits = (matrix(N, 1) * 1).expand(N, C)
    before = logits.detach().clone()
    (grad,) = torch.autograd.grad(cross_entropy(logits, INDICES, inplace=True), logits)
    assert_close(grad, torch.autograd.grad(F.cross_entropy(logits, INDICES), logits)[0])
    assert torch.equal(logits, before)
    plain = torch.randn(N, C)
    before = plain.clone()
    cross_entropy(plain, INDICES, inplace=True)
    assert torch.equal(plain, before)


# torch.func.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_transforms(reduction, soft):
    batch = 3
    inputs = torch.randn(batch, N, C)
    targets = torch.rand(batch, N, C) if soft else torch.randint(C, (batch, N))

    def both(transform, *arguments):
        def loss(function):
            return lambda x, t: function(x, t, reduction=reduction)

        ours = transform(loss(cross_entropy))(*arguments)
        assert_close(ours, transform(loss(F.cross_entropy))(*arguments))

    func, vmap = torch.func, torch.vmap
    both(lambda f: func.grad(lambda x, t: f(x, t).sum()), inputs[0], targets[0])
    both(vmap, inputs, targets)
    both(lambda f: vmap(f, in_dims=(1, None)), inputs.transpose(0, 1), targets[0])
    both(lambda f: vmap(func.grad(lambda x, t: f(x, t).sum())), inputs, targets)
    both(lambda f: func.grad(lambda x, t: vmap(f)(x, t).sum()), inputs, targets)
    both(lambda f: func.jacrev(f), inputs[0], targets[0])
    if soft:
        both(lambda f: func.grad(lambda x, t: f(x, t).sum(), argnums=(0, 1)), inputs[0], targets[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_transforms_of_linear_layers(reduction):
    hidden, layer, bias = torch.randn(3, N, D), torch.randn(C, D), torch.randn(C)
    targets = torch.randint(C, (3, N))

    def of(function):
        return lambda h, w, b, t: function(h, w, t, linear_bias=b, reduction=reduction).sum()

    def both(transform, *arguments):
        ours = transform(of(linear_cross_entropy))(*arguments)
        assert_close(ours, transform(of(F.linear_cross_entropy))(*arguments))

    both(lambda f: torch.func.grad(f, (0, 1, 2)), hidden[0], layer, bias, targets[0])
    both(
        lambda f: torch.vmap(torch.func.grad(f, (0, 1, 2)), in_dims=(0, None, None, 0)),
        hidden,
        layer,
        bias,
        targets,
    )
    both(
        lambda f: torch.func.grad(
            lambda h, w, b, t: torch.vmap(f, in_dims=(0, None, None, 0))(h, w, b, t).sum(),
            (0, 1, 2),
        ),
        hidden,
        layer,
        bias,
        targets,
    )


def test_transforms_of_probabilities_of_linear_layers():
    """The gradient of the target is there if a transform outside of the others wants it."""
    hidden, layer, targets = torch.randn(3, N, D), torch.randn(C, D), torch.rand(3, N, C)

    def of(function):
        def loss(t):
            return torch.vmap(lambda h, t: function(h, layer, t))(hidden, t).sum()

        return loss

    ours, theirs = (torch.func.grad(of(f))(targets) for f in (linear_cross_entropy, LINEAR))
    assert_close(ours, theirs)


# torch.compile.


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile(reduction, backend):
    soft = torch.rand(N, C, requires_grad=True)
    hidden, layer, bias = matrix(N, D), matrix(C, D), matrix(C)

    def ours(h, w, b, t):
        logits = F.linear(h, w, b) * 2
        keywords = {"reduction": reduction, "options": Options(z_loss=1e-3)}
        first = cross_entropy(logits, INDICES, **keywords).sum()
        second = cross_entropy(logits, t, **keywords).sum()
        third = linear_cross_entropy(h, w, INDICES, b, **keywords).sum()
        return first * 3 + second + third + xent_torch.log_softmax(logits, 1).square().sum()

    leaves = (hidden, layer, bias, soft)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for _ in range(2):
        got, expected = compiled(*leaves), ours(*leaves)
        assert_close(got, expected)
        assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))
    with torch.no_grad():
        assert_close(compiled(*leaves), expected.detach())


def test_compile_with_dynamic_shapes():
    compiled = torch.compile(
        lambda x, t: cross_entropy(x, t), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 5, 8):
        input, target = matrix(rows, C), torch.randint(C, (rows,))
        grads = [torch.autograd.grad(f(input, target), input) for f in (compiled, F.cross_entropy)]
        assert_close(*grads)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, x, t):
            return cross_entropy(x, t, label_smoothing=0.1)

    input = torch.randn(N, C)
    exported = torch.export.export(Loss(), (input, INDICES))
    assert "xent.cross_entropy" in str(exported.graph)
    assert_close(
        exported.module()(input, INDICES), F.cross_entropy(input, INDICES, label_smoothing=0.1)
    )


NUMBERS = (-100, 0.1, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, False, False)


def test_opcheck():
    ops, check = torch.ops.xent, torch.library.opcheck
    soft = torch.rand(N, C, requires_grad=True)
    lse = torch.randn(N, dtype=torch.float64)
    image = torch.randn(2, C, 3, 4).contiguous(memory_format=torch.channels_last)
    cropped = torch.randn(2, C, 3, 8)[..., ::2]
    beside = (None, None, None, None)
    for input in (matrix(N, C), image, cropped):
        rows = (*input.shape[:1], *input.shape[2:])
        target = torch.randint(C, rows)
        check(ops.cross_entropy.default, (input, target, *beside, 1, *NUMBERS, None, True, False))
        check(ops.cross_entropy.default, (input, target, *beside, 0, *NUMBERS, None, False, True))
    check(ops.cross_entropy.default, (matrix(N, C), soft, *beside, 1, *NUMBERS, None, True, True))
    input = torch.randn(N, C)
    for reduction, grad in ((1, torch.tensor(1.0)), (0, torch.rand(N))):
        numbers = (reduction, *NUMBERS)
        check(ops.cross_entropy_backward.default, (grad, input, INDICES, *beside, *numbers, lse))
        arguments = (grad, input, soft.detach(), *beside, *numbers, lse)
        check(ops.target_backward.default, arguments)
    for dtype in (torch.float32, torch.float16):
        layer = (matrix(N, D, dtype=dtype), matrix(C, D, dtype=dtype), matrix(C, dtype=dtype))
        for reduction, now in ((1, True), (0, False)):
            tail = (reduction, *NUMBERS, 0, None, True, True, True, now, not now)
            check(ops.linear_cross_entropy.default, (*layer, INDICES, *beside, *tail))
        layer = tuple(tensor.detach() for tensor in layer)
        tail = (0, *NUMBERS, 0, lse, True, False, True)
        grad = torch.rand(N, dtype=dtype)
        arguments = (grad, *layer, INDICES, *beside, *tail)
        check(ops.linear_cross_entropy_backward.default, arguments)
    for log in (False, True):
        check(ops.softmax.default, (matrix(N, C), 1, log))
        check(ops.softmax_backward.default, (torch.rand(N, C), input, -1, log))


def test_modes_and_subclasses():
    """Where something watches operators, it sees the loss as one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Watch.seen += (str(func),)
            return func(*args, **(kwargs or {}))

    input = matrix(N, C)
    with Watch():
        loss = cross_entropy(input, INDICES)
    assert "xent.cross_entropy.default" in Watch.seen
    assert_close(loss, F.cross_entropy(input, INDICES))

    class Named(torch.Tensor):
        pass

    named = torch.randn(N, C).as_subclass(Named).requires_grad_()
    loss = cross_entropy(named, INDICES)
    assert type(loss) is Named
    loss.backward()
    assert named.grad.shape == (N, C)
    with torch.device("cpu"):
        assert_close(cross_entropy(input, INDICES), F.cross_entropy(input, INDICES))


def test_checkpoint():
    from torch.utils.checkpoint import checkpoint

    hidden, layer = matrix(N, D), matrix(C, D)
    loss = checkpoint(lambda h: cross_entropy(h @ layer.t(), INDICES), hidden, use_reentrant=False)
    grads = torch.autograd.grad(loss, (hidden, layer))
    expected = torch.autograd.grad(F.cross_entropy(hidden @ layer.t(), INDICES), (hidden, layer))
    assert_close(grads, expected)


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_autocast(dtype):
    input, soft = matrix(N, C, dtype=dtype), torch.rand(N, C, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu"):
        for arguments in ((input, INDICES), (input, soft)):
            for reduction in REDUCTIONS:
                ours = cross_entropy(*arguments, reduction=reduction)
                theirs = F.cross_entropy(*arguments, reduction=reduction)
                assert ours.dtype == theirs.dtype
                assert_close(ours, theirs)
                assert_close(*(torch.autograd.grad(of.sum(), input)[0] for of in (ours, theirs)))
        for name in ("softmax", "log_softmax"):
            ours, theirs = (getattr(module, name)(input, 1) for module in (xent_torch, F))
            assert ours.dtype == theirs.dtype


def test_autocast_of_linear_layers():
    """Autocast casts the operands of the product, as it does for F.linear, and the loss is f32."""
    hidden, layer, bias = matrix(N, D), matrix(C, D), matrix(C)
    with torch.autocast("cpu"):
        ours = linear_cross_entropy(hidden, layer, INDICES, bias)
        theirs = F.linear_cross_entropy(hidden, layer, INDICES, linear_bias=bias)
    assert ours.dtype == theirs.dtype == torch.float32
    assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    low = [tensor.detach().bfloat16().float() for tensor in (hidden, layer, bias)]
    exact = F.linear_cross_entropy(*low[:2], INDICES, linear_bias=low[2])
    assert_close(ours, exact)
    grads = torch.autograd.grad(ours, (hidden, layer, bias))
    assert [grad.dtype for grad in grads] == [torch.float32] * 3


def test_softmax_can_be_differentiated_twice():
    for function in (xent_torch.softmax, xent_torch.log_softmax):
        for dim in (0, 1, -1):
            assert gradgradcheck(
                lambda x, f=function, d=dim: f(x, d), matrix(3, 4, dtype=torch.float64)
            )
