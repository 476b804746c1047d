"""Cross-entropy over stored logits, as torch.nn.functional.cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled
from torch.nn._reduction import legacy_get_string
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _xent, routes
from .options import (
    BESIDE,
    DEFAULT,
    NUMBERS,
    NUMBERS_SCHEMA,
    REDUCTION_NONE,
    Options,
    check_fixed_target,
    check_weights,
    empty_loss,
    loss_dtype,
    numbers,
    positions,
    prepared,
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    options: Options | None = None,
    inplace: bool = False,
) -> Tensor:
    """Computes the cross-entropy of logits and targets, and the gradient in the same pass.

    The arguments are those of :func:`torch.nn.functional.cross_entropy`.

    Args:
        input: logits, ``(C)``, ``(N, C)`` or ``(N, C, d1, .., dk)``; f32, f64, bf16 or f16, on the
            CPU. Strides by which rows, classes and positions have one step each cost no copy:
            transposed, sliced and channels-last tensors have such strides.
        target: class indices, int64, int32, uint8, uint16 or uint32, of the shape of ``input``
            without ``C``; or probabilities of any floating-point dtype, of the shape of ``input``,
            which may require grad. ``options.target_classes`` and ``options.target_scale`` change
            what it holds.
        weight: class weights ``(C)``, any floating-point dtype.
        size_average, reduce: deprecated, as in PyTorch.
        ignore_index: rows with this target are ignored. With probabilities of all classes, one that
            is ≥ 0 is a ValueError.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1].
        options: what PyTorch has no argument for.
        inplace: lets the gradient replace the logits, which hold no logits from then on. Autograd
            notices if an earlier operation needs them. Where the gradient is not computed in place
            (under ``torch.compile`` and ``torch.func``, without autograd, and for strides that need
            a copy), the logits stay.

    Returns:
        The loss: a scalar, or under ``"none"`` the row losses, of the shape of ``input`` without
        ``C``. Its dtype is that of ``input``, or f32 for halves under autocast;
        ``options.loss_dtype`` overrides it.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: a shape, a dtype or an option is wrong, or a tensor is not on the CPU.
        NotImplementedError: the gradient is differentiated.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            options=options,
            inplace=inplace,
        )
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    if options is None:
        options = DEFAULT
    elif options.workspace:
        raise ValueError("options.workspace is for linear layers alone")
    settings = numbers(options, reduction, ignore_index, label_smoothing)
    target_classes = options.target_classes
    # A target that is sparse or a teacher's logits has no gradient.
    is_fixed = target_classes is not None or options.target_scale != 0.0
    if is_fixed:
        check_fixed_target(target, target_classes)
    if ignore_index >= 0 and target_classes is None and target.is_floating_point():
        raise ValueError(f"ignore_index = {ignore_index}, and the targets are probabilities")
    row_weights, row_mask = options.row_weights, options.row_mask
    dtype = loss_dtype(input, options)
    # The forward computes the gradient of a loss that is one number: no factor that follows can
    # bring back what the dtype has lost. That of f16 logits waits for the factor of loss scaling.
    at_once = settings[0] != REDUCTION_NONE and input.dtype != torch.float16
    grad = is_grad_enabled()
    wants_input, wants_target = grad and input.requires_grad, grad and target.requires_grad
    if weight is not None or row_weights is not None:
        check_weights(weight=weight, row_weights=row_weights)

    beside = (target, weight, row_weights, row_mask, target_classes)
    if routes.is_direct(input, beside):
        ready = prepared(settings)
        if not (wants_input or wants_target):
            return _xent.cross_entropy(input, beside, ready, dtype, False, False, False)[0]
        if inplace:
            _check_inplace(input, wants_target)
        now = wants_input and at_once
        later = wants_target or not now
        variable = target if wants_target else None
        return _direct(input, variable, (beside, ready, dtype, inplace, now, later))
    routes.check_device(
        input=input,
        target=target,
        weight=weight,
        row_weights=row_weights,
        row_mask=row_mask,
        target_classes=target_classes,
    )
    if routes.is_transformed():
        # A transform outside of this one may want gradients that no argument shows.
        wants_input = grad
        wants_target = grad and target.is_floating_point() and not is_fixed
    now = wants_input and at_once
    later = wants_target or (wants_input and not now)
    if routes.is_transformed():
        return _Transformed.apply(input, *beside, settings, dtype, now, later)[0]
    return torch.ops.xent.cross_entropy(input, *beside, *settings, dtype, now, later)[0]


def _check_inplace(input: Tensor, wants_target: bool) -> None:
    if wants_target:
        raise ValueError("inplace=True destroys the logits that the gradient of target needs")
    base = input._base if input._is_view() else input
    if base.is_leaf and base.requires_grad:
        raise ValueError("inplace=True would overwrite a leaf that requires grad")


class _Direct(torch.autograd.Function):
    """The loss of plain tensors."""

    @staticmethod
    def forward(ctx, input, _target, rest):
        beside, numbers, dtype, inplace, now, later = rest
        loss, gradient, lse = _xent.cross_entropy(
            input, beside, numbers, dtype, now, inplace, later
        )
        if gradient is input:
            torch.autograd.graph.increment_version(input)
            gradient = input.detach()
        if later:
            ctx.rest = (numbers, inplace)
            ctx.save_for_backward(gradient, input, *beside, lse)
        else:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        if len(saved) == 1:
            return routes.scaled_once(saved[0], grad_output), None, None
        gradient, input, *beside, lse = saved
        numbers, inplace = ctx.rest
        wants_input, wants_target, _ = ctx.needs_input_grad
        arguments = (grad_output, input, tuple(beside), numbers, lse)
        grad_target = _xent.target_backward(*arguments) if wants_target else None
        if gradient is not None:
            gradient = routes.scaled(gradient, grad_output)
        elif wants_input:
            gradient = _xent.cross_entropy_backward(*arguments, inplace)
            if gradient is input:
                torch.autograd.graph.increment_version(input)
                gradient = input.detach()
        return routes.once(gradient), routes.once(grad_target), None


_direct = routes.direct_apply(_Direct)

# The operators. Results that are not wanted are empty.

_OPERANDS = (
    "Tensor input, Tensor target, Tensor? weight, Tensor? row_weights, Tensor? row_mask, "
    "Tensor? target_classes, " + NUMBERS_SCHEMA
)


def _operator(name: str, schema: str):
    return torch.library.custom_op(
        f"xent::{name}", mutates_args=(), device_types="cpu", schema=schema
    )


def _parts(arguments) -> tuple[tuple, tuple, tuple]:
    """The operands beside the input, the options that are numbers, and the rest."""
    options = BESIDE + NUMBERS
    return (
        tuple(arguments[:BESIDE]),
        tuple(arguments[BESIDE:options]),
        tuple(arguments[options:]),
    )


def _rows(input: Tensor) -> tuple[int, ...]:
    return (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """A gradient in the layout that the fake implementations promise."""
    promised = torch.empty_like(tensor)
    if promised.stride() == gradient.stride():
        return gradient
    return promised.copy_(gradient)


@_operator(
    "cross_entropy",
    f"({_OPERANDS}, ScalarType? loss_dtype, bool now, bool later) -> (Tensor, Tensor, Tensor)",
)
def _cross_entropy(input, *rest):
    beside, settings, (dtype, now, later) = _parts(rest)
    loss, gradient, lse = _xent.cross_entropy(
        input, beside, prepared(settings), dtype, now, False, later
    )
    gradient = input.new_empty(0) if gradient is None else _like(gradient, input)
    lse = input.new_empty(0, dtype=torch.float64) if lse is None else lse
    return loss, gradient, lse


@_cross_entropy.register_fake
def _(input, *rest):
    _, settings, (dtype, now, later) = _parts(rest)
    rows = _rows(input)
    has_lse = later and not settings[-1]
    return (
        empty_loss(input, rows, settings[0], dtype),
        torch.empty_like(input) if now else input.new_empty(0),
        input.new_empty(positions(rows) if has_lse else 0, dtype=torch.float64),
    )


_BACKWARD = f"(Tensor grad_output, {_OPERANDS}, Tensor lse) -> Tensor"


@_operator("cross_entropy_backward", _BACKWARD)
def _cross_entropy_backward(grad_output, input, *rest):
    beside, settings, (lse,) = _parts(rest)
    gradient = _xent.cross_entropy_backward(
        grad_output, input, beside, prepared(settings), lse, False
    )
    return _like(gradient, input)


@_cross_entropy_backward.register_fake
def _(grad_output, input, *rest):
    return torch.empty_like(input)


@_operator("target_backward", _BACKWARD)
def _target_backward(grad_output, input, target, *rest):
    beside, settings, (lse,) = _parts((target, *rest))
    gradient = _xent.target_backward(grad_output, input, beside, prepared(settings), lse)
    return _like(gradient, target)


@_target_backward.register_fake
def _(grad_output, input, target, *rest):
    return torch.empty_like(target)


def _save(ctx, inputs, output) -> None:
    input, *rest = inputs
    beside, ctx.settings, (_, ctx.now, later) = _parts(rest)
    _, gradient, lse = output
    ctx.mark_non_differentiable(gradient, lse)
    operands = (input, *beside) if later else (None,) * (1 + BESIDE)
    ctx.save_for_backward(gradient, *operands, lse)


def _backward(ctx, grad_output, _grad_gradient, _grad_lse):
    gradient, input, target, *beside, lse = ctx.saved_tensors
    wants_input, wants_target = ctx.needs_input_grad[:2]
    arguments = (grad_output, input, target, *beside, *ctx.settings, lse)
    grad_input = grad_target = None
    if wants_input:
        grad_input = (
            gradient * grad_output.to(gradient.dtype)
            if ctx.now
            else torch.ops.xent.cross_entropy_backward(*arguments)
        )
    if wants_target:
        grad_target = torch.ops.xent.target_backward(*arguments)
    if not torch.compiler.is_compiling():
        grad_input, grad_target = routes.once(grad_input), routes.once(grad_target)
    return grad_input, grad_target, *(None,) * (BESIDE - 1 + NUMBERS + 3)


_cross_entropy.register_autograd(_backward, setup_context=_save)
_cross_entropy.register_vmap(routes.loop_over_batch(torch.ops.xent.cross_entropy))
_cross_entropy_backward.register_vmap(routes.loop_over_batch(torch.ops.xent.cross_entropy_backward))
_target_backward.register_vmap(routes.loop_over_batch(torch.ops.xent.target_backward))


class _Transformed(torch.autograd.Function):
    """The loss under transforms of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        *operands, settings, dtype, now, later = arguments
        return torch.ops.xent.cross_entropy(*operands, *settings, dtype, now, later)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *operands, ctx.settings, _, ctx.now, _ = inputs
        _, gradient, lse = output
        ctx.mark_non_differentiable(gradient, lse)
        ctx.save_for_backward(gradient, *operands, lse)

    @staticmethod
    def backward(ctx, grad_output, _grad_gradient, _grad_lse):
        gradient, input, target, *beside, lse = ctx.saved_tensors
        wants_input, wants_target = ctx.needs_input_grad[:2]
        arguments = (grad_output, input, target, *beside, ctx.settings, lse)
        grad_input = grad_target = None
        if wants_input:
            grad_input = (
                _TransformedProduct.apply(gradient, grad_output, input, target)
                if ctx.now
                else _TransformedGradient.apply(torch.ops.xent.cross_entropy_backward, *arguments)
            )
        if wants_target:
            grad_target = _TransformedGradient.apply(torch.ops.xent.target_backward, *arguments)
        return grad_input, grad_target, *(None,) * (BESIDE - 1 + 4)


class _TransformedProduct(torch.autograd.Function):
    """The gradient times that of what follows the loss. The input and the target are arguments so
    that differentiating the product by them is an error, and not 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient, grad_output, input, target):
        return gradient * grad_output.to(gradient.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(routes.SECOND_DERIVATIVE)


class _TransformedGradient(torch.autograd.Function):
    """A gradient from lse, by one of the operators."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator, *arguments):
        *operands, settings, lse = arguments
        return operator(*operands, *settings, lse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(routes.SECOND_DERIVATIVE)
