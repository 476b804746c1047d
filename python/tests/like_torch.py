"""Compares a function with the one of PyTorch that it stands for: result and all gradients."""

import torch
from torch import Tensor
from torch.testing import assert_close

HALVES = (torch.bfloat16, torch.float16)


def widened(value):
    """A tensor of halves in f32. xent computes with halves in f32, and so does the reference."""
    if isinstance(value, Tensor) and value.dtype in HALVES:
        wide = value.detach().float()
        return wide.requires_grad_(value.requires_grad)
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value


def fresh(value):
    """A leaf of the same values and layout."""
    if isinstance(value, Tensor):
        leaf = value.detach()
        return leaf.requires_grad_(value.requires_grad)
    return value


def assert_gradient(got, wanted, *, is_product=False, **tolerances):
    """Compares a gradient with that in a wider type.

    `is_product`: where it is bf16, a linear layer has made it from gradients of logits that are
    rounded to bf16 too, as PyTorch's are. Terms that cancel leave an error relative to the largest.
    """
    if is_product and got.dtype == torch.bfloat16 and wanted.numel() > 0:
        largest = wanted.nan_to_num(0.0).abs().max().item()
        tolerances = {"rtol": 1.6e-2, "atol": 1e-5 + largest * 2**-7}
    assert_close(got, wanted.to(got.dtype), equal_nan=True, **tolerances)


def assert_like(
    ours, theirs, arguments, keywords=None, *, reference=widened, is_product=False, **tolerances
):
    """Calls both functions with copies of the arguments, and compares results and gradients.

    `reference` makes the copies for PyTorch; for `is_product` see assert_gradient.
    """
    keywords = keywords or {}
    mine = [fresh(value) for value in arguments], {k: fresh(v) for k, v in keywords.items()}
    copies = [reference(value) for value in arguments]
    named = {key: reference(value) for key, value in keywords.items()}
    loss, expected = ours(*mine[0], **mine[1]), theirs(*copies, **named)
    assert loss.shape == expected.shape
    dtypes = {value.dtype for value in arguments if isinstance(value, Tensor)}
    if not dtypes & set(HALVES):
        assert loss.dtype == expected.dtype
    assert_close(loss, expected.to(loss.dtype), equal_nan=True, **tolerances)
    if not expected.requires_grad:
        assert not loss.requires_grad
        return
    generator = torch.Generator().manual_seed(1)
    grad = torch.rand(loss.shape, generator=generator, dtype=torch.float32) + 0.5
    loss.backward(grad.to(loss.dtype))
    expected.backward(grad.to(loss.dtype).to(expected.dtype))
    pairs = [*zip(mine[0], copies, strict=True)]
    pairs += [(mine[1][key], named[key]) for key in keywords]
    for got, wanted in pairs:
        if isinstance(got, Tensor) and got.requires_grad:
            assert got.grad.dtype == got.dtype
            assert_gradient(got.grad, wanted.grad, is_product=is_product, **tolerances)


class _FromRounded(torch.autograd.Function):
    """A softmax whose gradient starts from its output in a half."""

    @staticmethod
    def forward(ctx, input, function, dim, half):
        output = function(input, dim).to(half).float()
        ctx.save_for_backward(output)
        ctx.dim, ctx.log = dim, function.__name__ == "log_softmax"
        return output

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        if ctx.log:
            return grad - y.exp() * grad.sum(ctx.dim, keepdim=True), None, None, None
        return y * (grad - (y * grad).sum(ctx.dim, keepdim=True)), None, None, None


def softmax_of(function, half):
    """The reference for softmax of halves, over widened inputs. xent computes in f32 and rounds the
    output once; PyTorch rounds on the way, too.
    """
    if half not in HALVES:
        return function

    def softmax(input, dim, dtype=None):
        if dtype is not None:
            return function(input, dim, dtype=dtype)
        return _FromRounded.apply(input, function, dim, half)

    return softmax
