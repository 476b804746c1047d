"""The losses as modules, with the arguments of those of torch.nn."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .cross_entropy import cross_entropy
from .linear import linear_cross_entropy
from .options import Options


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:func:`cross_entropy` as a module; a :class:`torch.nn.CrossEntropyLoss`, and so are its
    arguments.

    ``options`` and ``inplace`` are those of :func:`cross_entropy`. A call may bring options of its
    own, which take the place of the module's: row masks, row weights and the classes of sparse
    targets belong to a batch.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        options: Options | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.options = options
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor, options: Options | None = None) -> Tensor:
        """The loss of logits and targets."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            options=self.options if options is None else options,
            inplace=self.inplace,
        )


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer and :func:`linear_cross_entropy`, with the arguments, parameters and buffers
    of ``torch.nn.LinearCrossEntropyLoss``, but for ``options``, which are xent's.

    A call may bring options of its own, which take the place of the module's.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Options | None = None,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(
                f"weight has the shape {list(weight.shape)}, "
                f"and must have one element a class, [{num_classes}]"
            )
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing = {label_smoothing} is outside [0, 1]")
        self.num_classes = num_classes
        self.out_features = out_features
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.register_buffer("weight", weight)
        outputs = num_classes * math.prod(out_features)
        self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor, options: Options | None = None) -> Tensor:
        """The loss of the layer's outputs and targets."""
        weight, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            shape = (self.num_classes, *self.out_features)
            weight = weight.reshape(*shape, self.linear.in_features)
            bias = None if bias is None else bias.reshape(shape)
        return linear_cross_entropy(
            input,
            weight,
            target,
            bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options if options is None else options,
        )

    def extra_repr(self) -> str:
        """What the module's text shows beside the layer."""
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )
