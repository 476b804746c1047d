"""linear_cross_entropy beside F.linear_cross_entropy."""

import itertools
import re

import pytest
import torch
from like_torch import assert_like
from torch.nn import functional as F
from torch.testing import assert_close

from xent_torch import LinearCrossEntropyLoss, Options, cross_entropy, linear_cross_entropy

N, C, D = 6, 11, 8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_like_torch(reduction, dtype):
    for bias, soft, smoothing, weighted in itertools.product((False, True), repeat=4):
        hidden, layer = random(N, D, dtype=dtype), random(C, D, dtype=dtype)
        target = (
            torch.rand(N, C, dtype=dtype, requires_grad=bias) if soft else torch.randint(C, (N,))
        )
        keywords = {
            "linear_bias": random(C, dtype=dtype) if bias else None,
            "weight": torch.rand(C, dtype=dtype) if weighted else None,
            "reduction": reduction,
            "label_smoothing": 0.1 if smoothing else 0.0,
        }
        ours, operands = linear_cross_entropy, (hidden, layer, target)
        assert_like(ours, F.linear_cross_entropy, operands, keywords, is_product=True)


def test_one_row_and_many_axes():
    layer = random(C, D)
    assert_like(linear_cross_entropy, F.linear_cross_entropy, (random(D), layer, torch.tensor(3)))
    soft = torch.rand(C)
    assert_like(linear_cross_entropy, F.linear_cross_entropy, (random(D), layer, soft))
    hidden, target = random(2, 3, D), torch.randint(C, (2, 3))
    rows = linear_cross_entropy(hidden, layer, target, reduction="none")
    flat = F.linear_cross_entropy(hidden.flatten(0, 1), layer, target.flatten(), reduction="none")
    assert_close(rows, flat.view(2, 3))
    mask = torch.rand(2, 3) > 0.5
    options = Options(row_mask=mask)
    assert_close(
        linear_cross_entropy(hidden, layer, target, reduction="sum", options=options),
        rows[mask].sum(),
    )


def test_layers_of_many_dimensions():
    hidden, layer, bias = random(N, D), random(C, 2, 3, D), random(C, 2, 3)
    for target in (torch.randint(C, (N, 2, 3)), torch.rand(N, C, 2, 3)):
        assert_like(
            linear_cross_entropy,
            F.linear_cross_entropy,
            (hidden, layer, target),
            {"linear_bias": bias},
        )


def test_layouts():
    target = torch.randint(C, (N,))
    for hidden in (
        random(D, N).t(),
        random(N, 2 * D)[:, ::2],
        random(N, D + 3)[:, :D],
        random(1, D).expand(N, D),
    ):
        for layer in (random(D, C).t(), random(2 * C, D)[::2], random(1, D).expand(C, D)):
            hidden, layer = hidden.detach().requires_grad_(), layer.detach().requires_grad_()
            assert_like(linear_cross_entropy, F.linear_cross_entropy, (hidden, layer, target))
    one = random(1, 1).expand(N, 1).detach().requires_grad_()
    assert_like(linear_cross_entropy, F.linear_cross_entropy, (one, random(C, 1), target))


def test_only_gradients_that_are_wanted():
    target = torch.randint(C, (N,))
    for wanted in itertools.product((False, True), repeat=3):
        tensors = [random(N, D), random(C, D), random(C)]
        for tensor, want in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(want)
        for reduction in ("mean", "none"):
            hidden, layer, bias = tensors
            loss = linear_cross_entropy(hidden, layer, target, bias, reduction=reduction).sum()
            assert loss.requires_grad == any(wanted)
            if any(wanted):
                leaves = [tensor for tensor in tensors if tensor.requires_grad]
                theirs = F.linear_cross_entropy(
                    hidden, layer, target, linear_bias=bias, reduction=reduction
                ).sum()
                assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(theirs, leaves))


def test_options():
    hidden, layer = random(N, D), random(C, D)
    target = torch.randint(C, (N,))
    options = Options(
        z_loss=0.01,
        softcap=3.0,
        logit_scale=0.7,
        row_weights=torch.rand(N),
        normalizer=5.0,
        loss_dtype=torch.float64,
    )
    loss = linear_cross_entropy(hidden, layer, target, options=options)
    stored = cross_entropy(hidden @ layer.t(), target, options=options)
    assert loss.dtype == torch.float64
    assert_close(loss, stored, rtol=1e-6, atol=1e-6)
    leaves = (hidden, layer)
    assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(stored, leaves))


def test_workspace():
    hidden, layer, target = random(600, D), random(C, D), torch.randint(C, (600,))
    loss = linear_cross_entropy(hidden, layer, target)
    more = linear_cross_entropy(hidden, layer, target, options=Options(workspace=1 << 26))
    assert_close(loss, more)
    with pytest.raises(ValueError, match="workspace"):
        linear_cross_entropy(hidden, layer, target, options=Options(workspace=1))


def test_gradients_of_f16_survive_loss_scaling():
    hidden = torch.full((4, 8), 1e-4, dtype=torch.float16, requires_grad=True)
    layer = torch.full((5000, 8), 1e-3, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(4, dtype=torch.long)
    (linear_cross_entropy(hidden, layer, target) * 32768).backward()
    wide = hidden.detach().float().requires_grad_(), layer.detach().float().requires_grad_()
    (F.linear_cross_entropy(*wide, target) * 32768).backward()
    assert wide[1].grad[1].abs().max() / 32768 < 2**-24 / 2  # nothing without the scale
    assert_close(layer.grad, wide[1].grad.half())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.full((N,), C)}, IndexError, "targets[0] = 11 is outside [0, 11)"),
        (
            {"input": torch.randn(N, D + 1)},
            ValueError,
            "input has 9 features, and linear_weight has 8",
        ),
        ({"linear_weight": torch.randn(D)}, ValueError, "linear_weight [8]"),
        ({"linear_bias": torch.randn(C - 1)}, ValueError, "linear_bias has the shape [10]"),
        ({"linear_weight": torch.randn(C, D).double()}, ValueError, "weight"),
        ({"target": torch.randint(C, (N, 1))}, ValueError, "target has the shape [6, 1]"),
        ({"target": torch.rand(N, C), "ignore_index": -100}, ValueError, "ignore_index = -100"),
        ({"options": Options(log_probs=True)}, ValueError, "LOG_PROBS"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    arguments = {
        "input": torch.randn(N, D),
        "linear_weight": torch.randn(C, D),
        "target": torch.randint(C, (N,)),
        **change,
    }
    with pytest.raises(error, match=re.escape(message)):
        linear_cross_entropy(**arguments)


def test_module():
    module = LinearCrossEntropyLoss(D, C, bias=True, reduction="sum")
    hidden, target = torch.randn(N, D), torch.randint(C, (N,))
    module(hidden, target).backward()
    assert module.linear.weight.grad.shape == (C, D)
    kept = torch.tensor([True, False] * 3)
    assert_close(module(hidden, target, Options(row_mask=kept)), module(hidden[kept], target[kept]))
    with pytest.raises(ValueError, match="label_smoothing = 2"):
        LinearCrossEntropyLoss(D, C, label_smoothing=2)
