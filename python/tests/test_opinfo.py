"""PyTorch's own samples for these functions and modules, with its own tolerances.

PyTorch computes halves in halves, and xent in f32: the reference for losses of halves is PyTorch on
the widened samples. Gradients of linear layers of bf16 are products of bf16 in both.
"""

import pytest
import torch
from like_torch import assert_gradient, assert_like, softmax_of
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import xent_torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

FUNCTIONS = {
    ("nn.functional.cross_entropy", ""): xent_torch.cross_entropy,
    ("nn.functional.linear_cross_entropy", ""): xent_torch.linear_cross_entropy,
    ("softmax", ""): xent_torch.softmax,
    ("softmax", "with_dtype"): xent_torch.softmax,
    ("log_softmax", ""): xent_torch.log_softmax,
    ("log_softmax", "with_dtype"): xent_torch.log_softmax,
}
OPS = [op for op in op_db if (op.name, op.variant_test_name) in FUNCTIONS]


def test_all_functions_have_samples():
    assert {(op.name, op.variant_test_name) for op in OPS} == set(FUNCTIONS)


def _without_torchs_options(keywords):
    """linear_cross_entropy's options choose how PyTorch cuts its work into chunks."""
    return {key: value for key, value in keywords.items() if key != "options"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name + op.variant_test_name)
def test_samples_of_functions(op, dtype):
    if dtype not in op.supported_dtypes("cpu"):
        pytest.skip(f"PyTorch has no samples of {dtype}")
    ours, count = FUNCTIONS[op.name, op.variant_test_name], 0
    theirs = softmax_of(getattr(F, op.name), dtype) if "softmax" in op.name else op.op
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        arguments = (sample.input, *sample.args)
        keywords = _without_torchs_options(sample.kwargs)
        assert_like(ours, theirs, arguments, keywords, is_product="linear" in op.name)
        count += 1
    assert count > 3


MODULES = {
    torch.nn.CrossEntropyLoss: xent_torch.CrossEntropyLoss,
    torch.nn.LinearCrossEntropyLoss: xent_torch.LinearCrossEntropyLoss,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_samples_of_modules(module, dtype):
    (info,) = [info for info in module_db if info.module_cls is module]
    if dtype not in info.dtypes:
        pytest.skip(f"PyTorch has no samples of {dtype}")
    count = 0
    for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=True):
        construct, forward = sample.constructor_input, sample.forward_input
        keywords = _without_torchs_options(construct.kwargs)
        torch.manual_seed(0)
        theirs = module(*construct.args, **keywords).to(dtype)
        torch.manual_seed(0)
        ours = MODULES[module](*construct.args, **keywords).to(dtype)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        if dtype in (torch.bfloat16, torch.float16):
            theirs.load_state_dict(ours.state_dict())
            theirs = theirs.float()
        is_linear = module is torch.nn.LinearCrossEntropyLoss
        assert_like(ours, theirs, forward.args, forward.kwargs, is_product=is_linear)
        for (name, got), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert_gradient(got.grad, wanted.grad, is_product=True, msg=name)
        count += 1
    assert count > 3


def test_wrong_samples_are_errors():
    """What PyTorch's own samples of errors are, except what semantics.md allows."""
    (op,) = [op for op in OPS if op.name == "nn.functional.cross_entropy"]
    if op.error_inputs_func is None:
        pytest.skip("PyTorch has no samples of errors")
    for sample in op.error_inputs("cpu"):
        with pytest.raises((ValueError, IndexError)):
            s = sample.sample_input
            xent_torch.cross_entropy(s.input, *s.args, **s.kwargs)


def test_modules_of_pytorch_are_drop_in():
    """A checkpoint of PyTorch's module loads into xent's."""
    theirs = torch.nn.LinearCrossEntropyLoss(6, 10, bias=True, weight=torch.rand(10))
    ours = xent_torch.LinearCrossEntropyLoss(6, 10, bias=True, weight=torch.zeros(10))
    ours.load_state_dict(theirs.state_dict())
    hidden, target = torch.randn(4, 6), torch.randint(10, (4,))
    torch.testing.assert_close(ours(hidden, target), theirs(hidden, target))
    assert isinstance(xent_torch.CrossEntropyLoss(), torch.nn.CrossEntropyLoss)
    assert F.cross_entropy is not xent_torch.cross_entropy
