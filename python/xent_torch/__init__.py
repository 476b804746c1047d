"""Softmax cross-entropy for PyTorch on CPUs, computed by xent.

    import xent_torch

    loss = xent_torch.cross_entropy(logits, targets)     # as torch.nn.functional.cross_entropy
    loss.backward()

The functions have the signatures of ``torch.nn.functional``; :class:`Options` has what PyTorch
lacks.
"""

from .cross_entropy import cross_entropy
from .evaluate import Evaluation, evaluate, linear_evaluate
from .linear import linear_cross_entropy
from .modules import CrossEntropyLoss, LinearCrossEntropyLoss
from .options import Options
from .softmax import log_softmax, softmax

__all__ = [
    "CrossEntropyLoss",
    "Evaluation",
    "LinearCrossEntropyLoss",
    "Options",
    "cross_entropy",
    "evaluate",
    "linear_cross_entropy",
    "linear_evaluate",
    "log_softmax",
    "softmax",
]
