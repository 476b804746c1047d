"""The options of a loss, and the checks that need no tensor's values."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from . import _xent
from .routes import wants_gradient


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What xent computes and PyTorch has no argument for.

    Every option is off by default. Tensors among them have no gradient.

    Attributes:
        z_loss: λ ≥ 0, finite; each row's loss includes λ·lse².
        softcap: logits x become softcap·tanh(x/softcap), after ``logit_scale``; finite and ≥ 0, 0
            is off.
        logit_scale: logits are multiplied by it, one over the temperature; finite and > 0.
        row_mask: bool or uint8, of the shape of the row losses; a row whose element is 0 is
            ignored.
        row_weights: any floating-point dtype, of the shape of the row losses; factors of the row
            losses.
        normalizer: if > 0, what a mean divides the cross-entropy by, in place of the sum of
            weights.
        z_normalizer: if > 0, what a mean divides the z-loss and the entropy bonus by, in place of
            the sum of row weights.
        empty_is_zero: a mean over no rows is 0 instead of NaN.
        log_probs: the input holds log-probabilities, as for NLLLoss. With ``z_loss``,
            ``entropy_bonus``, ``softcap`` or ``logit_scale``, and for linear layers, it is a
            ValueError.
        loss_dtype: a floating-point dtype for the loss, in place of the input's.
        workspace: bytes of working memory for linear layers, where 0 means as few as run near full
            speed. For other losses it is a ValueError.
        entropy_bonus: β, finite; each row's loss includes −β·H, with the entropy H of its softmax.
        target_classes: int64, int32, uint8, uint16 or uint32, of the shape of ``input`` with any k
            in place of C: for each row the classes that have a probability. ``target`` then has the
            same shape and holds their probabilities; those of a class that is listed twice add up.
            A place that holds ``ignore_index`` is unused. ``target`` gets no gradient, and one that
            requires grad is a ValueError.
        target_scale: if > 0, ``target`` holds a teacher's logits, and the probabilities are
            softmax(target_scale·target), over all classes or over ``target_classes``. ``target``
            gets no gradient, and one that requires grad is a ValueError.
    """

    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    row_mask: Tensor | None = None
    row_weights: Tensor | None = None
    normalizer: float = 0.0
    z_normalizer: float = 0.0
    empty_is_zero: bool = False
    log_probs: bool = False
    loss_dtype: torch.dtype | None = None
    workspace: int = 0
    entropy_bonus: float = 0.0
    target_classes: Tensor | None = None
    target_scale: float = 0.0


DEFAULT = Options()
_HALVES = (torch.bfloat16, torch.float16)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

# The options that are numbers, in the order of `Numbers` in src/problem.rs, as arguments of an
# operator.
NUMBERS_SCHEMA = (
    "int reduction, int ignore_index, float label_smoothing, float z_loss, float softcap, "
    "float logit_scale, float normalizer, float z_normalizer, float entropy_bonus, "
    "float target_scale, bool empty_is_zero, bool log_probs"
)
NUMBERS = 12
_DEFAULT_TAIL = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, False, False)
_PLAIN = {name: (code, -100, 0.0, *_DEFAULT_TAIL) for name, code in REDUCTIONS.items()}
_PREPARED = {id(plain): _xent.Numbers(plain) for plain in _PLAIN.values()}

# The operands beside the logits: target, weight, row_weights, row_mask, target_classes.
BESIDE = 5

REDUCTION_NONE = 0


def numbers(
    options: Options, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[int | float | bool, ...]:
    """The options that are numbers. An unknown reduction is a ValueError."""
    code = REDUCTIONS.get(reduction)
    if code is None:
        raise ValueError(f"reduction = {reduction!r} is neither 'none', 'mean' nor 'sum'")
    if options is DEFAULT:
        if ignore_index == -100 and label_smoothing == 0.0:
            return _PLAIN[reduction]
        return (code, ignore_index, label_smoothing, *_DEFAULT_TAIL)
    return (
        code,
        ignore_index,
        label_smoothing,
        options.z_loss,
        options.softcap,
        options.logit_scale,
        options.normalizer,
        options.z_normalizer,
        options.entropy_bonus,
        options.target_scale,
        options.empty_is_zero,
        options.log_probs,
    )


def prepared(numbers: tuple[int | float | bool, ...]) -> _xent.Numbers:
    """The same numbers as the compiled part takes them. Reading a tuple takes a small call a tenth of
    its time."""
    return _PREPARED.get(id(numbers)) or _xent.Numbers(numbers)


def check_weights(**tensors: Tensor | None) -> None:
    """Refuses weights that want a gradient, which they would not get."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, and xent computes no gradient of it")


def check_fixed_target(target: Tensor, target_classes: Tensor | None) -> None:
    """Refuses sparse targets and a teacher's logits that want a gradient, which they would not
    get.
    """
    if torch.is_grad_enabled() and wants_gradient(target):
        kind = "a teacher's logits" if target_classes is None else "sparse targets"
        raise ValueError(f"target requires grad, and xent computes no gradient of {kind}")


def loss_dtype(input: Tensor, options: Options) -> torch.dtype | None:
    """The dtype of the loss; None for the input's. Under autocast that of halves is f32."""
    if options.loss_dtype is not None:
        return options.loss_dtype
    if input.dtype in _HALVES and torch.is_autocast_enabled("cpu"):
        return torch.float32
    return None


def empty_loss(
    input: Tensor, rows: tuple[int, ...], reduction: int, dtype: torch.dtype | None
) -> Tensor:
    """The loss without its values, for fake implementations."""
    return input.new_empty(rows if reduction == REDUCTION_NONE else (), dtype=dtype or input.dtype)


def positions(rows: tuple[int, ...]) -> int:
    """The number of softmax distributions."""
    return math.prod(rows)
