"""Cross-entropy of a linear layer whose logits are never stored, as
torch.nn.functional.linear_cross_entropy.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _xent, routes
from .cross_entropy import cross_entropy
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
    prepared,
)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Options | None = None,
) -> Tensor:
    """Computes the cross-entropy of ``input @ linear_weight.T + linear_bias``, whose logits it
    never stores.

    The arguments are those of :func:`torch.nn.functional.linear_cross_entropy`, but for
    ``options``. Under a scalar reduction the forward computes the gradients too.

    Args:
        input: ``(D)``, ``(N, D)`` or, with class indices or a probability for each of them, any
            ``(*, D)``; f32, f64, bf16 or f16, on the CPU.
        linear_weight: ``(C, D)``, of the dtype of ``input``. Weights ``(C, d1, .., dk, D)``, of a
            loss of k dimensions, go over stored logits, in f32 for halves.
        target: class indices ``(*)``, or probabilities ``(*, C)``, as for :func:`cross_entropy`.
            Probabilities that require grad go over stored logits, too. With
            ``options.target_classes``, both are ``(*, k)``.
        linear_bias: ``(C)``, any floating-point dtype.
        weight, reduction, ignore_index, label_smoothing, options: as for :func:`cross_entropy`.
            ``ignore_index`` is -100 if it is None, and must be None for probabilities of all
            classes. Row options
            have the shape ``(*)``.

    Returns:
        The loss: a scalar, or under ``"none"`` the row losses ``(*)``. Its dtype is that of
        ``input``, or f32 for halves under autocast, which casts input, weight and bias to its dtype
        first.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: a shape, a dtype or an option is wrong, or a tensor is not on the CPU.
        MemoryError: the working memory could not be had.
        NotImplementedError: a gradient is differentiated.
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight):
        return handle_torch_function(
            linear_cross_entropy,
            (input, linear_weight, target, linear_bias, weight),
            input,
            linear_weight,
            target,
            linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    options = DEFAULT if options is None else options
    target_classes = options.target_classes
    if target_classes is not None or options.target_scale != 0.0:
        check_fixed_target(target, target_classes)
    _check_shapes(input, linear_weight, linear_bias)
    if linear_weight.dim() == 2:
        _check_target(input, linear_weight, target, target_classes)
    is_probabilities = target_classes is None and target.is_floating_point()
    if is_probabilities and ignore_index is not None:
        raise ValueError(f"ignore_index = {ignore_index}, and the targets are probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index

    settings = numbers(options, reduction, ignore_index, label_smoothing)
    grad = torch.is_grad_enabled()
    check_weights(weight=weight, row_weights=options.row_weights)
    input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    dtype = loss_dtype(input, options)

    rows = input.shape[:-1]
    row_weights, row_mask = options.row_weights, options.row_mask
    if len(rows) != 1:
        input = input.reshape(-1, input.shape[-1])
        target = target.reshape(-1, *target.shape[len(rows) :])
        row_weights = None if row_weights is None else row_weights.reshape(-1)
        row_mask = None if row_mask is None else row_mask.reshape(-1)
        if target_classes is not None:
            target_classes = target_classes.reshape(-1, target_classes.shape[-1])

    operands = (input, linear_weight, linear_bias)
    if linear_weight.dim() > 2 or (grad and routes.wants_gradient(target)):
        logits = _stored_logits(*operands)
        options = dataclasses.replace(
            options,
            row_weights=row_weights,
            row_mask=row_mask,
            target_classes=target_classes,
            workspace=0,
            loss_dtype=dtype or input.dtype,
        )
        loss = cross_entropy(
            logits,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            options=options,
        )
        return loss.reshape(rows) if reduction == "none" and len(rows) != 1 else loss
    beside = (target, weight, row_weights, row_mask, target_classes)
    # Under transforms, one outside of this one may want gradients that no argument shows.
    transformed = routes.is_transformed()
    wanted = tuple(
        grad and tensor is not None and (transformed or tensor.requires_grad) for tensor in operands
    )
    now = any(wanted) and settings[0] != REDUCTION_NONE
    later = any(wanted) and not now
    rest = (options.workspace, dtype, now, later)
    if routes.is_direct(input, (linear_weight, linear_bias, *beside)):
        if any(wanted):
            loss = _direct(*operands, (beside, prepared(settings), *rest))
        else:
            loss = _xent.linear_cross_entropy(
                *operands, beside, prepared(settings), options.workspace, dtype, wanted, False
            )[0]
    else:
        routes.check_device(
            input=input,
            linear_weight=linear_weight,
            linear_bias=linear_bias,
            target=target,
            weight=weight,
            row_weights=row_weights,
            row_mask=row_mask,
            target_classes=target_classes,
        )
        if transformed:
            loss = _Transformed.apply(*operands, *beside, settings, *rest, wanted)[0]
        else:
            loss = torch.ops.xent.linear_cross_entropy(
                *operands, *beside, *settings, options.workspace, dtype, *wanted, now, later
            )[0]
    return loss.reshape(rows) if reduction == "none" and len(rows) != 1 else loss


def _autocast(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of the layer, as autocast casts those of a product."""
    if not torch.is_autocast_enabled("cpu") or input.dtype == torch.float64:
        return input, linear_weight, linear_bias
    low = torch.get_autocast_dtype("cpu")
    bias = None if linear_bias is None else linear_bias.to(low)
    return input.to(low), linear_weight.to(low), bias


def _check_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    if input.dim() < 1 or linear_weight.dim() < 2:
        raise ValueError(
            f"input has the shape {list(input.shape)} and linear_weight "
            f"{list(linear_weight.shape)}, which must have at least one axis and two"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(
            f"input has {input.shape[-1]} features, and linear_weight has {linear_weight.shape[-1]}"
        )
    wanted = linear_weight.shape[:-1]
    if linear_bias is not None and linear_bias.shape != wanted:
        raise ValueError(
            f"linear_bias has the shape {list(linear_bias.shape)}, and must have {list(wanted)}"
        )
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise ValueError(
            f"a loss of {linear_weight.dim() - 2} dimensions needs an input (N, D), "
            f"and input has the shape {list(input.shape)}"
        )


def _check_target(
    input: Tensor, linear_weight: Tensor, target: Tensor, target_classes: Tensor | None
) -> None:
    rows = input.shape[:-1]
    if target_classes is not None:
        if target_classes.shape[:-1] != rows or target_classes.dim() != input.dim():
            raise ValueError(
                f"target_classes has the shape {list(target_classes.shape)}, and for an input of "
                f"the shape {list(input.shape)} it has the shape [{', '.join(map(str, rows))}, k]"
            )
        if target.shape != target_classes.shape:
            raise ValueError(
                f"target has the shape {list(target.shape)}, and must have that of "
                f"target_classes, {list(target_classes.shape)}"
            )
        return
    wanted = linear_weight.shape[:-1]
    shape = (*rows, wanted[0]) if target.is_floating_point() else rows
    if target.shape != shape:
        kind = "probabilities" if target.is_floating_point() else "class indices"
        raise ValueError(
            f"target has the shape {list(target.shape)}, and for an input of the shape "
            f"{list(input.shape)} and {wanted[0]} classes {kind} have the shape {list(shape)}"
        )


def _stored_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """The logits (N, C) or (N, C, d1, .., dk): f32 or f64, as where they are not stored."""
    if input.dtype in (torch.bfloat16, torch.float16):
        input, linear_weight = input.float(), linear_weight.float()
        linear_bias = None if linear_bias is None else linear_bias.float()
    bias = None if linear_bias is None else linear_bias.flatten()
    with torch.autocast("cpu", enabled=False):
        logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    return logits.reshape(*input.shape[:1], *linear_weight.shape[:-1])


class _Direct(torch.autograd.Function):
    """The loss of plain tensors."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, rest):
        beside, numbers, workspace, dtype, now, later = rest
        wanted = ctx.needs_input_grad[:3]
        operands = (input, linear_weight, linear_bias)
        loss, gradients, lse = _xent.linear_cross_entropy(
            *operands, beside, numbers, workspace, dtype, wanted if now else (False,) * 3, later
        )
        if later:
            ctx.rest = (numbers, workspace)
            ctx.save_for_backward(*operands, *beside, lse)
        else:
            ctx.dtypes = [None if t is None else t.dtype for t in operands]
            ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        if len(saved) == 3:
            gradients = [
                None if gradient is None else routes.scaled(gradient, grad_output).to(dtype)
                for gradient, dtype in zip(saved, ctx.dtypes, strict=True)
            ]
        else:
            *operands, lse = saved
            operands, beside = operands[:3], tuple(operands[3:])
            wanted = ctx.needs_input_grad[:3]
            gradients = _xent.linear_cross_entropy_backward(
                grad_output, *operands, beside, *ctx.rest, lse, wanted
            )
            gradients = [
                None if gradient is None else gradient.to(operand.dtype)
                for gradient, operand in zip(gradients, operands, strict=True)
            ]
        return *map(routes.once, gradients), None


_direct = routes.direct_apply(_Direct)

# The operators. Results that are not wanted are empty.

_OPERANDS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    f"Tensor? row_weights, Tensor? row_mask, Tensor? target_classes, {NUMBERS_SCHEMA}, "
    "int workspace"
)
# The operands among the arguments: those of the layer, and those beside.
_COUNT = 3 + BESIDE
_WANTED = "bool wants_input, bool wants_weight, bool wants_bias"


def _operator(name: str, schema: str):
    return torch.library.custom_op(
        f"xent::{name}", mutates_args=(), device_types="cpu", schema=schema
    )


def _parts(arguments) -> tuple[tuple, tuple, tuple]:
    """The operands of the layer, those beside them, and the options that are numbers."""
    return arguments[:3], arguments[3:_COUNT], arguments[_COUNT : _COUNT + NUMBERS]


def _saved(tensors) -> tuple:
    """The operands, the three gradients, and lse."""
    return tensors[:_COUNT], tensors[_COUNT : _COUNT + 3], tensors[_COUNT + 3]


def _full(gradients, input: Tensor) -> tuple[Tensor, ...]:
    """Gradients, with empty tensors in place of those that are not wanted."""
    return tuple(input.new_empty(0) if g is None else g for g in gradients)


def _fake_gradients(operands, wanted) -> tuple[Tensor, ...]:
    input, _, bias = operands
    # Those of f16 matrices are f32.
    wide = torch.float32 if input.dtype == torch.float16 else input.dtype
    return tuple(
        input.new_empty(tensor.shape, dtype=tensor.dtype if tensor is bias else wide)
        if want
        else input.new_empty(0)
        for tensor, want in zip(operands, wanted, strict=True)
    )


@_operator(
    "linear_cross_entropy",
    f"({_OPERANDS}, ScalarType? loss_dtype, {_WANTED}, bool now, bool later) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_cross_entropy(*arguments):
    operands, beside, settings = _parts(arguments)
    workspace, dtype, *wanted, now, later = arguments[_COUNT + NUMBERS :]
    wanted = wanted if now else (False,) * 3
    loss, gradients, lse = _xent.linear_cross_entropy(
        *operands, beside, prepared(settings), workspace, dtype, wanted, later
    )
    input = operands[0]
    lse = input.new_empty(0, dtype=torch.float64) if lse is None else lse
    return loss, *_full(gradients, input), lse


@_linear_cross_entropy.register_fake
def _(*arguments):
    operands, reduction = arguments[:3], arguments[_COUNT]
    _, dtype, *wanted, now, later = arguments[_COUNT + NUMBERS :]
    input = operands[0]
    rows = input.shape[0]
    return (
        empty_loss(input, (rows,), reduction, dtype),
        *_fake_gradients(operands, wanted if now else (False,) * 3),
        input.new_empty(rows if later else 0, dtype=torch.float64),
    )


@_operator(
    "linear_cross_entropy_backward",
    f"(Tensor grad_output, {_OPERANDS}, Tensor lse, {_WANTED}) -> (Tensor, Tensor, Tensor)",
)
def _linear_cross_entropy_backward(grad_output, *arguments):
    operands, beside, settings = _parts(arguments)
    workspace, lse, *wanted = arguments[_COUNT + NUMBERS :]
    gradients = _xent.linear_cross_entropy_backward(
        grad_output, *operands, beside, prepared(settings), workspace, lse, wanted
    )
    return _full(gradients, operands[0])


@_linear_cross_entropy_backward.register_fake
def _(grad_output, *arguments):
    return _fake_gradients(arguments[:3], arguments[-3:])


def _save(ctx, inputs, output) -> None:
    ctx.settings = inputs[_COUNT : _COUNT + NUMBERS]
    ctx.workspace, _, *ctx.wanted, ctx.now, later = inputs[_COUNT + NUMBERS :]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*(inputs[:_COUNT] if later else (None,) * _COUNT), *output[1:])


def _backward(ctx, grad_output, *_grads):
    operands, gradients, lse = _saved(ctx.saved_tensors)
    if ctx.now:
        gradients = [gradient * grad_output.to(gradient.dtype) for gradient in gradients]
    elif any(ctx.wanted):
        gradients = torch.ops.xent.linear_cross_entropy_backward(
            grad_output, *operands, *ctx.settings, ctx.workspace, lse, *ctx.wanted
        )
    gradients = [
        gradient.to(dtype) if wanted else None
        for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
    ]
    if not torch.compiler.is_compiling():
        gradients = map(routes.once, gradients)
    return *gradients, *(None,) * (BESIDE + NUMBERS + 7)


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)
_linear_cross_entropy.register_vmap(routes.loop_over_batch(torch.ops.xent.linear_cross_entropy))
_linear_cross_entropy_backward.register_vmap(
    routes.loop_over_batch(torch.ops.xent.linear_cross_entropy_backward)
)


class _Transformed(torch.autograd.Function):
    """The loss under transforms of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        *operands, settings, workspace, dtype, now, later, wanted = arguments
        return torch.ops.xent.linear_cross_entropy(
            *operands, *settings, workspace, dtype, *wanted, now, later
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *operands, ctx.settings, ctx.workspace, _, ctx.now, _, ctx.wanted = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*operands, *output[1:])

    @staticmethod
    def backward(ctx, grad_output, *_grads):
        gradients = _TransformedGradients.apply(
            grad_output,
            ctx.settings,
            ctx.workspace,
            ctx.now,
            ctx.wanted,
            *ctx.saved_tensors,
        )
        gradients = [g if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True)]
        return *gradients, *(None,) * (BESIDE + 6)


class _TransformedGradients(torch.autograd.Function):
    """The gradients, from those of the forward or from lse. The operands are arguments so that
    differentiating the gradients by them is an error, and not 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_output, settings, workspace, now, wanted, *saved):
        operands, gradients, lse = _saved(saved)
        if now:
            gradients = [gradient * grad_output.to(gradient.dtype) for gradient in gradients]
        else:
            gradients = torch.ops.xent.linear_cross_entropy_backward(
                grad_output, *operands, *settings, workspace, lse, *wanted
            )
        return tuple(
            gradient.to(operand.dtype) if want else gradient.new_empty(0)
            for gradient, operand, want in zip(gradients, operands[:3], wanted, strict=True)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(routes.SECOND_DERIVATIVE)
