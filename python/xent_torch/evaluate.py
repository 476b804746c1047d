"""What a softmax has beside the loss: entropy, predictions, ranks, divergences."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _xent, routes
from .cross_entropy import _rows
from .linear import _autocast, _check_shapes, _check_target, _stored_logits
from .options import BESIDE, DEFAULT, NUMBERS, NUMBERS_SCHEMA, Options, numbers, prepared


class Evaluation(NamedTuple):
    """Results of each row, of the shape of the row losses; None where a call does not have them.

    Results that are real numbers are f64 for f64 logits, else f32, but for lse.
    """

    lse: Tensor | None
    """ln Σ exp of the scaled and capped logits, f64. None with ``log_probs``."""
    entropy: Tensor | None
    """The entropy of the softmax. None with ``log_probs``."""
    argmax: Tensor
    """The lowest index of the largest logit, or of a NaN, int64."""
    top_classes: Tensor | None
    """The classes of the ``top_k`` largest logits, the largest first, int64, with an axis of
    ``top_k`` in place of the classes. Of equal logits the lower class comes first; a NaN comes
    before every number."""
    top_log_probs: Tensor | None
    """The log-probabilities of the same classes, of the same shape."""
    target_ranks: Tensor | None
    """For class indices: the place of the target among all logits, in the order of ``top_classes``,
    from 0 on; -1 for ignored rows. int64."""
    kl: Tensor | None
    """For probabilities and a teacher's logits: their divergence from the softmax, 0 for
    ignored rows."""


def evaluate(
    input: Tensor,
    target: Tensor | None = None,
    *,
    top_k: int = 0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    options: Options | None = None,
) -> Evaluation:
    """Computes results beside the loss in one pass over the logits. They have no gradient.

    Args:
        input: logits, as for :func:`cross_entropy`.
        target: class indices, for ``target_ranks``, or probabilities or a teacher's logits, for
            ``kl``, as for :func:`cross_entropy`; or None.
        top_k: the number of classes that ``top_classes`` and ``top_log_probs`` list, at most 64; 0
            is no lists.
        ignore_index, label_smoothing, options: as for :func:`cross_entropy`. What concerns the loss
            alone changes none of the results.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: a shape, a dtype or an option is wrong, or a tensor is not on the CPU.
    """
    if has_torch_function_variadic(input, target):
        results = handle_torch_function(
            _evaluate_as_tuple,
            (input, target),
            input,
            target,
            top_k=top_k,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        return Evaluation(*results)
    if options is None:
        options = DEFAULT
    elif options.workspace:
        raise ValueError("options.workspace is for linear layers alone")
    settings = _settings(options, top_k, ignore_index, label_smoothing)
    if ignore_index >= 0 and _is_full(target, options):
        raise ValueError(f"ignore_index = {ignore_index}, and the targets are probabilities")
    input, beside = input.detach(), _beside(target, options)
    if routes.is_direct(input, beside):
        return Evaluation(*_xent.evaluate(input, beside, prepared(settings), top_k))
    _check_devices(beside, input=input)
    results = torch.ops.xent.evaluate(input, *beside, *settings, top_k)
    return _evaluation(results, target, settings, top_k)


def linear_evaluate(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    linear_bias: Tensor | None = None,
    *,
    top_k: int = 0,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Options | None = None,
) -> Evaluation:
    """Computes what :func:`evaluate` does, of ``input @ linear_weight.T + linear_bias``, which it
    never stores.

    The layer and the target are those of :func:`linear_cross_entropy`, the other arguments those of
    :func:`evaluate`.
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias):
        results = handle_torch_function(
            _linear_evaluate_as_tuple,
            (input, linear_weight, target, linear_bias),
            input,
            linear_weight,
            target,
            linear_bias,
            top_k=top_k,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        return Evaluation(*results)
    options = DEFAULT if options is None else options
    _check_shapes(input, linear_weight, linear_bias)
    if ignore_index is not None and _is_full(target, options):
        raise ValueError(f"ignore_index = {ignore_index}, and the targets are probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index
    settings = _settings(options, top_k, ignore_index, label_smoothing)
    bias = None if linear_bias is None else linear_bias.detach()
    layer = _autocast(input.detach(), linear_weight.detach(), bias)
    if linear_weight.dim() > 2:
        return evaluate(
            _stored_logits(*layer),
            target,
            top_k=top_k,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=dataclasses.replace(options, workspace=0),
        )
    if target is not None:
        _check_target(input, linear_weight, target, options.target_classes)
    beside, rows = _beside(target, options), input.shape[:-1]
    if len(rows) != 1:
        layer = (layer[0].reshape(-1, input.shape[-1]), *layer[1:])
        beside = tuple(
            None if tensor is None else tensor.reshape(-1, *tensor.shape[len(rows) :])
            for tensor in beside
        )
    if routes.is_direct(layer[0], (*layer[1:], *beside)):
        results = _xent.linear_evaluate(
            *layer, beside, prepared(settings), options.workspace, top_k
        )
        results = Evaluation(*results)
    else:
        _check_devices(beside, input=layer[0], linear_weight=layer[1], linear_bias=layer[2])
        results = torch.ops.xent.linear_evaluate(
            *layer, *beside, *settings, options.workspace, top_k
        )
        results = _evaluation(results, target, settings, top_k)
    if len(rows) == 1:
        return results
    return Evaluation(
        *(None if of is None else of.reshape((*rows, *of.shape[1:])) for of in results)
    )


# torch makes the results of a subclass again from one iterable, which a NamedTuple does not take.


def _evaluate_as_tuple(*args, **keywords) -> tuple:
    return tuple(evaluate(*args, **keywords))


def _linear_evaluate_as_tuple(*args, **keywords) -> tuple:
    return tuple(linear_evaluate(*args, **keywords))


def _settings(options: Options, top_k: int, ignore_index: int, label_smoothing: float) -> tuple:
    if not 0 <= top_k <= 64:
        raise ValueError(f"top_k = {top_k} is outside [0, 64]")
    return numbers(options, "none", ignore_index, label_smoothing)


def _is_full(target: Tensor | None, options: Options) -> bool:
    """Whether there is a target of all classes."""
    return target is not None and options.target_classes is None and target.is_floating_point()


def _beside(target: Tensor | None, options: Options) -> tuple:
    target = None if target is None else target.detach()
    return (target, None, options.row_weights, options.row_mask, options.target_classes)


def _check_devices(beside: tuple, **tensors: Tensor | None) -> None:
    target, _, row_weights, row_mask, target_classes = beside
    routes.check_device(
        **tensors,
        target=target,
        row_weights=row_weights,
        row_mask=row_mask,
        target_classes=target_classes,
    )


def _evaluation(results, target: Tensor | None, settings: tuple, top_k: int) -> Evaluation:
    """The results of an operator, whose empty tensors stand for what the call does not have."""
    has = _has(target, settings, top_k)
    return Evaluation(*(of if want else None for of, want in zip(results, has, strict=True)))


def _has(target: Tensor | None, settings: tuple, top_k: int) -> tuple[bool, ...]:
    """Which of the results a call has."""
    has_lse, has_lists = not settings[-1], top_k > 0
    is_float = target is not None and target.is_floating_point()
    is_index = target is not None and not is_float
    return has_lse, has_lse, True, has_lists, has_lists, is_index, is_float


# The operators. Results that a call does not have are empty.

_OPERANDS = (
    "Tensor? target, Tensor? weight, Tensor? row_weights, Tensor? row_mask, "
    f"Tensor? target_classes, {NUMBERS_SCHEMA}"
)
_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


def _operator(name: str, schema: str):
    return torch.library.custom_op(
        f"xent::{name}", mutates_args=(), device_types="cpu", schema=f"({schema}) -> {_RESULTS}"
    )


def _dtypes(input: Tensor) -> tuple[torch.dtype, ...]:
    real = torch.float64 if input.dtype == torch.float64 else torch.float32
    whole = torch.int64
    return torch.float64, real, whole, whole, real, whole, real


def _fake(input: Tensor, rows: tuple, arguments: tuple) -> tuple[Tensor, ...]:
    """The results without their values; `arguments` are those from the target on."""
    target, settings, top_k = arguments[0], arguments[BESIDE : BESIDE + NUMBERS], arguments[-1]
    lists = (*rows[:1], top_k, *rows[1:])
    shapes = (rows, rows, rows, lists, lists, rows, rows)
    has = _has(target, settings, top_k)
    return tuple(
        input.new_empty(shape if want else 0, dtype=dtype)
        for shape, dtype, want in zip(shapes, _dtypes(input), has, strict=True)
    )


def _full(results, input: Tensor) -> tuple[Tensor, ...]:
    """Results as the fake implementations promise them."""
    return tuple(
        input.new_empty(0, dtype=dtype) if of is None else of.contiguous()
        for of, dtype in zip(results, _dtypes(input), strict=True)
    )


@_operator("evaluate", f"Tensor input, {_OPERANDS}, int top_k")
def _evaluate(input, *arguments):
    beside, settings = arguments[:BESIDE], arguments[BESIDE : BESIDE + NUMBERS]
    results = _xent.evaluate(input, beside, prepared(settings), arguments[-1])
    return _full(results, input)


@_evaluate.register_fake
def _(input, *arguments):
    return _fake(input, _rows(input), arguments)


@_operator(
    "linear_evaluate",
    f"Tensor input, Tensor linear_weight, Tensor? linear_bias, {_OPERANDS}, int workspace, "
    "int top_k",
)
def _linear_evaluate(input, linear_weight, linear_bias, *arguments):
    beside, settings = arguments[:BESIDE], arguments[BESIDE : BESIDE + NUMBERS]
    results = _xent.linear_evaluate(
        input, linear_weight, linear_bias, beside, prepared(settings), *arguments[-2:]
    )
    return _full(results, input)


@_linear_evaluate.register_fake
def _(input, linear_weight, linear_bias, *arguments):
    return _fake(input, input.shape[:1], arguments)


_evaluate.register_vmap(routes.loop_over_batch(torch.ops.xent.evaluate))
_linear_evaluate.register_vmap(routes.loop_over_batch(torch.ops.xent.linear_evaluate))
