"""softmax and log_softmax beside those of PyTorch."""

import pytest
import torch
from like_torch import assert_like, softmax_of
from torch.nn import functional as F
from torch.testing import assert_close

import xent_torch

NAMES = ["softmax", "log_softmax"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_any_axis_of_any_layout(name, dtype):
    torch.manual_seed(0)
    base = torch.randn(3, 4, 5, 6, dtype=dtype)
    for input in (
        base,
        base.contiguous(memory_format=torch.channels_last),
        base.permute(3, 1, 0, 2),
        base[:, ::2, 1:3],
        base[:, :, :, :1].expand(3, 4, 5, 6),
        base[:0],
        torch.randn((), dtype=dtype),
        torch.randn(3, 1, dtype=dtype),
    ):
        for dim in range(-max(input.dim(), 1), max(input.dim(), 1)):
            ours, theirs = getattr(xent_torch, name), softmax_of(getattr(F, name), dtype)
            # A half that is rounded to the other side moves the gradient by a unit or so.
            unit = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
            tolerances = {"atol": unit, "rtol": unit} if unit else {}
            assert_like(ours, theirs, (input.detach().requires_grad_(), dim), **tolerances)


@pytest.mark.parametrize("name", NAMES)
def test_dtype_and_dim(name):
    input = torch.randn(3, 4, dtype=torch.bfloat16)
    ours, theirs = getattr(xent_torch, name), getattr(F, name)
    assert_close(ours(input, 1, dtype=torch.float64), theirs(input, 1, dtype=torch.float64))
    integers = torch.arange(6).view(2, 3)
    assert_close(ours(integers, 1, dtype=torch.float32), theirs(integers, 1, dtype=torch.float32))
    with pytest.warns(UserWarning, match="Implicit dimension"):
        ours(input)
    with pytest.raises(IndexError, match=r"dim = 2 is outside \[-2, 2\)"):
        ours(input, 2)
    with pytest.raises(ValueError, match="floating-point"):
        ours(integers, 1)


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name):
    input = torch.randn(5, 3, 4)
    ours, theirs = getattr(xent_torch, name), getattr(F, name)
    for dim in (0, 1, -1, -2):
        assert_close(
            torch.vmap(lambda x, d=dim: ours(x, d))(input),
            torch.vmap(lambda x, d=dim: theirs(x, d))(input),
        )
        assert_close(
            torch.vmap(lambda x, d=dim: ours(x, d), in_dims=1)(input),
            torch.vmap(lambda x, d=dim: theirs(x, d), in_dims=1)(input),
        )
    numbers = torch.randn(5)
    assert_close(
        torch.vmap(lambda x: ours(x, 0))(numbers), torch.vmap(lambda x: theirs(x, 0))(numbers)
    )
    gradient = torch.func.grad(lambda x: ours(x, 0).square().sum())
    assert_close(
        torch.vmap(gradient)(input),
        torch.vmap(torch.func.grad(lambda x: theirs(x, 0).square().sum()))(input),
    )
