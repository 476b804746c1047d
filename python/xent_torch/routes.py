"""Which way a call takes, and what the ways have in common.

A call on plain tensors goes straight to the compiled function, in an ``autograd.Function``: the
operators of ``torch.library`` would take several times as long as a small loss. Where something
traces or transforms, the call goes through these operators: under ``torch.compile`` and
``torch.export``, under dispatch modes, for subclasses and for meta tensors. Under ``torch.func`` it
goes through an ``autograd.Function`` with a context of its own, which the transforms ask for, and
this calls the operators.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

try:
    from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph
except ImportError:  # Without the function, no gradient is taken to be the last.

    def keeps_graph() -> bool:
        """Whether a backward that is running may run again."""
        return True


_PLAIN = (Tensor, Parameter)

SECOND_DERIVATIVE = "xent_torch computes first derivatives, and this loss is differentiated twice"


def is_direct(input: Tensor, beside: tuple[Tensor | None, ...] = ()) -> bool:
    """Whether nothing traces or transforms the call, and all tensors are plain ones on the CPU."""
    if (
        is_compiling()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or _get_tracing_state() is not None
    ):
        return False
    for tensor in beside:
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return type(input) in _PLAIN and not input.is_meta


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is active."""
    return not is_compiling() and _are_functorch_transforms_active()


def wants_gradient(tensor: Tensor) -> bool:
    """Whether a tensor requires grad, be it for a transform outside of the present one."""
    while not tensor.requires_grad and is_transformed() and is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.requires_grad


def check_device(**tensors: Tensor | None) -> None:
    """Refuses tensors that are not on the CPU. Meta tensors have no values, and results without
    values.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name} is on {tensor.device}, and xent computes on the CPU")


def direct_apply(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` without its look for transforms, which :func:`is_direct` has had, and with a
    backward that is called without a look for the kind of `function`. The two take a tenth of a
    small call.
    """
    function._backward_cls.apply = function.backward
    return super(torch.autograd.Function, function).apply


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(SECOND_DERIVATIVE)


def scaled_once(gradient: Tensor, grad_output: Tensor) -> Tensor:
    """:func:`scaled` and :func:`once`."""
    if grad_output.item() == 1.0 and not (keeps_graph() or is_grad_enabled()):
        return gradient
    return once(scaled(gradient, grad_output))


def once(gradient: Tensor | None) -> Tensor | None:
    """A gradient that raises NotImplementedError where it is differentiated."""
    if gradient is None or not is_grad_enabled():
        return gradient
    return _Once.apply(gradient.detach().requires_grad_())


def scaled(gradient: Tensor, grad_output: Tensor) -> Tensor:
    """A saved gradient times that of what follows the loss, in the saved memory if nobody needs it
    again.
    """
    scale = grad_output.item()
    if keeps_graph():
        return gradient * scale
    return gradient if scale == 1.0 else gradient.mul_(scale)


def loop_over_batch(operator: Callable) -> Callable:
    """A vmap rule that calls an operator for each element of the batch."""

    def rule(info, in_dims, *args):
        def element(index):
            return [
                arg if dim is None else arg.select(dim, index)
                for arg, dim in zip(args, in_dims, strict=True)
            ]

        results = [operator(*element(index)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(list(result)) for result in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
