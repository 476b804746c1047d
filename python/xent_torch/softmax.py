"""Softmax and log-softmax, as those of torch.nn.functional."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import _get_softmax_dim
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import _xent, routes


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes the softmax of ``input`` over the axis ``dim``.

    The arguments are those of :func:`torch.nn.functional.softmax`. ``input`` is f32, f64, bf16 or
    f16, on the CPU, of any shape; ``dtype``, if given, is what it is cast to first. The result has
    the shape and the dtype of the input, and can be differentiated any number of times.

    Raises:
        IndexError: ``dim`` names no axis.
        ValueError: a dtype is wrong, or the tensor is not on the CPU.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype
        )
    return _softmax("softmax", input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes the logarithm of the softmax of ``input`` over the axis ``dim``; otherwise as
    :func:`softmax`.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            log_softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype
        )
    return _softmax("log_softmax", input, dim, _stacklevel, dtype)


def _softmax(name: str, input: Tensor, dim, stacklevel: int, dtype) -> Tensor:
    if dim is None:
        dim = _get_softmax_dim(name, input.dim(), stacklevel + 1)
    if dtype is not None:
        input = input.to(dtype)
    log = name == "log_softmax"
    if routes.is_direct(input):
        if input.requires_grad and torch.is_grad_enabled():
            return _direct(input, dim, log)
        return _xent.softmax(input, dim, log)
    routes.check_device(input=input)
    if routes.is_transformed():
        return _Transformed.apply(input, dim, log)
    return torch.ops.xent.softmax(input, dim, log)


def _formula(grad_output: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
    """The gradient in operations that can be differentiated."""
    if log:
        return grad_output - output.exp() * grad_output.sum(dim, keepdim=True)
    return output * (grad_output - (output * grad_output).sum(dim, keepdim=True))


class _Direct(torch.autograd.Function):
    """Softmax of a plain tensor."""

    @staticmethod
    def forward(ctx, input, dim, log):
        output = _xent.softmax(input, dim, log)
        ctx.dim, ctx.log = dim, log
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (output,) = ctx.saved_tensors
        of = _formula if torch.is_grad_enabled() else _xent.softmax_backward
        return of(grad_output, output, ctx.dim, ctx.log), None, None


class _Transformed(torch.autograd.Function):
    """Softmax under transforms of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, dim, log):
        return torch.ops.xent.softmax(input, dim, log)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.dim, ctx.log = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad_output):
        (output,) = ctx.saved_tensors
        return _formula(grad_output, output, ctx.dim, ctx.log), None, None


_direct = routes.direct_apply(_Direct)

# The operators.


def _operator(name: str, schema: str):
    return torch.library.custom_op(
        f"xent::{name}", mutates_args=(), device_types="cpu", schema=schema
    )


def _like(result: Tensor, tensor: Tensor) -> Tensor:
    """A result in the layout that the fake implementations promise."""
    promised = torch.empty_like(tensor)
    if promised.stride() == result.stride():
        return result
    return promised.copy_(result)


@_operator("softmax", "(Tensor input, int dim, bool log) -> Tensor")
def _softmax_operator(input, dim, log):
    return _like(_xent.softmax(input, dim, log), input)


@_softmax_operator.register_fake
def _(input, dim, log):
    return torch.empty_like(input)


@_operator("softmax_backward", "(Tensor grad_output, Tensor output, int dim, bool log) -> Tensor")
def _softmax_backward(grad_output, output, dim, log):
    return _like(_xent.softmax_backward(grad_output, output, dim, log), output)


@_softmax_backward.register_fake
def _(grad_output, output, dim, log):
    return torch.empty_like(output)


def _save(ctx, inputs, output) -> None:
    _, ctx.dim, ctx.log = inputs
    ctx.save_for_backward(output)


def _backward(ctx, grad_output):
    (output,) = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        gradient = _formula(grad_output, output, ctx.dim, ctx.log)
    else:
        gradient = torch.ops.xent.softmax_backward(grad_output, output, ctx.dim, ctx.log)
    return gradient, None, None


def _vmap(info, in_dims, input, dim, log):
    # The batch comes first; an axis that counts from the end stays where it is.
    moved = input.movedim(in_dims[0], 0)
    if input.dim() == 1:
        return torch.ops.xent.softmax(moved.unsqueeze(1), 1, log).squeeze(1), 0
    return torch.ops.xent.softmax(moved, dim + 1 if dim >= 0 else dim, log), 0


_softmax_operator.register_autograd(_backward, setup_context=_save)
_softmax_operator.register_vmap(_vmap)
