"""cross_entropy beside F.cross_entropy; what PyTorch lacks; errors."""

import itertools
import math
import re
import warnings

import pytest
import torch
from like_torch import assert_like
from torch.nn import functional as F
from torch.testing import assert_close

import xent_torch
from xent_torch import Options, cross_entropy

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
C = 7


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def logits(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def layouts(dtype):
    """Logits whose strides xent can use, and some that need a copy."""
    image = torch.randn(3, C, 4, 5, dtype=dtype)
    return {
        "one row": torch.randn(C, dtype=dtype),
        "matrix": torch.randn(6, C, dtype=dtype),
        "transposed": torch.randn(C, 6, dtype=dtype).t(),
        "padded rows": torch.randn(6, C + 3, dtype=dtype)[:, :C],
        "every other row": torch.randn(12, C, dtype=dtype)[::2],
        "every other class": torch.randn(6, 2 * C, dtype=dtype)[:, ::2],
        "a vector of positions": torch.randn(3, C, 4, dtype=dtype),
        "images": image,
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "volumes": torch.randn(2, C, 2, 3, 2, dtype=dtype),
        "cropped images": image[:, :, 1:3, 1:4],
        "every other column": image[:, :, :, ::2],
        "expanded rows": torch.randn(1, C, dtype=dtype).expand(6, C),
        "expanded classes": torch.randn(6, 1, dtype=dtype).expand(6, C),
        "expanded number": torch.randn(1, dtype=dtype).expand(6, C),
        "one class": torch.randn(6, 1, dtype=dtype),
        "one class, expanded": torch.randn(1, 1, dtype=dtype).expand(6, 1),
        "one row of the batch": torch.randn(1, C, 4, 5, dtype=dtype),
        "no rows": torch.randn(0, C, dtype=dtype),
        "no positions": torch.randn(2, C, 0, dtype=dtype),
    }


def row_shape(input):
    return (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()


def class_axis(input):
    return 1 if input.dim() > 1 else 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_layouts(layout, dtype):
    for reduction in REDUCTIONS:
        input = layouts(dtype)[layout].requires_grad_()
        classes = input.shape[class_axis(input)]
        target = torch.randint(classes, row_shape(input))
        assert_like(cross_entropy, F.cross_entropy, (input, target), {"reduction": reduction})
        probabilities = torch.rand_like(input, requires_grad=True)
        assert_like(
            cross_entropy, F.cross_entropy, (input, probabilities), {"reduction": reduction}
        )


def test_logits_and_probabilities_of_two_layouts():
    for dims in itertools.permutations((1, 2, 3)):
        input = torch.randn(3, C, 4, 5).permute(0, *dims).contiguous()
        back = [0] + [dims.index(axis) + 1 for axis in (1, 2, 3)]
        input = input.permute(back).requires_grad_()
        for target in (torch.rand(3, C, 4, 5), torch.rand(3, 4, 5, C).permute(0, 3, 1, 2)):
            for reduction in ("mean", "none"):
                target.requires_grad_()
                assert_like(
                    cross_entropy, F.cross_entropy, (input, target), {"reduction": reduction}
                )


def test_the_gradient_has_the_layout_of_the_logits():
    for name in ("matrix", "transposed", "images", "channels last"):
        input = layouts(torch.float32)[name].requires_grad_()
        target = torch.randint(C, row_shape(input))
        for reduction in ("mean", "none"):
            (grad,) = torch.autograd.grad(
                cross_entropy(input, target, reduction=reduction).sum(), input
            )
            assert grad.stride() == input.stride(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_options_of_pytorch(kind, reduction, dtype):
    weights = [None, torch.rand(C, dtype=dtype), torch.tensor([0.0, 1, 2, 0.5, 1, 1, -1]).to(dtype)]
    for weight, smoothing, shape in itertools.product(
        weights, (0.0, 0.1, 1.0), ((6, C), (2, C, 3, 4))
    ):
        input = logits(*shape, dtype=dtype)
        if kind == "indices":
            targets = [torch.randint(C, row_shape(input))]
            targets.append(targets[0].clone())
            targets[1].flatten()[::2] = -100
        else:
            targets = [torch.rand(shape, dtype=dtype).requires_grad_()]
        for target in targets:
            keywords = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
            # Weights of both signs may cancel.
            assert_like(
                cross_entropy, F.cross_entropy, (input, target), keywords, rtol=2e-2, atol=2e-3
            ) if dtype == torch.bfloat16 else assert_like(
                cross_entropy, F.cross_entropy, (input, target), keywords, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 1000])
def test_ignore_index(ignore_index):
    input, target = logits(8, C), torch.randint(C, (8,))
    target[2:5] = ignore_index
    for reduction in REDUCTIONS:
        keywords = {"ignore_index": ignore_index, "reduction": reduction}
        assert_like(cross_entropy, F.cross_entropy, (input, target), keywords)


def test_deprecated_reductions():
    input, target = logits(4, C), torch.randint(C, (4,))
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        keywords = {"size_average": size_average, "reduce": reduce}
        if size_average is None and reduce is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_like(cross_entropy, F.cross_entropy, (input, target), keywords)
        with pytest.warns(UserWarning, match="size_average and reduce"):
            cross_entropy(input, target, **keywords)


def test_positional_arguments_are_those_of_pytorch():
    input, target, weight = torch.randn(4, C), torch.randint(C, (4,)), torch.rand(C)
    arguments = (input, target, weight, None, 2, None, "sum", 0.1)
    assert_close(cross_entropy(*arguments), F.cross_entropy(*arguments))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.uint16, torch.uint32]
)
def test_dtypes_of_indices(dtype):
    input, target = logits(8, C), torch.randint(C, (8,))
    assert_close(cross_entropy(input, target.to(dtype)), F.cross_entropy(input, target))


def test_strided_and_expanded_targets():
    input = logits(6, C)
    for target in (
        torch.randint(C, (12,))[::2],
        torch.tensor(3).expand(6),
        torch.randint(C, (6, 2))[:, 1],
    ):
        assert_like(cross_entropy, F.cross_entropy, (input, target))
    image = logits(2, C, 3, 4)
    for target in (
        torch.randint(C, (2, 4, 3)).transpose(1, 2),
        torch.randint(C, (1, 3, 4)).expand(2, 3, 4),
        torch.randint(C, (2, 1, 1)).expand(2, 3, 4),
    ):
        assert_like(cross_entropy, F.cross_entropy, (image, target))
    weight = torch.rand(2 * C)[::2]
    assert_like(cross_entropy, F.cross_entropy, (image, target), {"weight": weight})
    weight = torch.rand(1).expand(C)
    assert_like(cross_entropy, F.cross_entropy, (image, target), {"weight": weight})


def test_an_imaginary_part():
    """Its memory has the other sign."""
    input = torch.randn(4, C, dtype=torch.complex64).conj().imag
    assert input.is_neg()
    target = torch.randint(C, (4,))
    assert_close(cross_entropy(input, target), F.cross_entropy(input, target))


def test_f16_keeps_gradients_for_loss_scaling():
    """A gradient of 1e-9 is 0 in f16 unless the scale reaches it before it is rounded."""
    input = torch.zeros(4, 1000, dtype=torch.float16)
    input[:, 0] = 12.0
    input.requires_grad_()
    (cross_entropy(input, torch.zeros(4, dtype=torch.long)) * 32768).backward()
    reference = input.detach().float().requires_grad_()
    (F.cross_entropy(reference, torch.zeros(4, dtype=torch.long)) * 32768).backward()
    assert reference.grad[0, 1] > 0
    assert_close(input.grad, reference.grad.half())


# What PyTorch lacks, beside its operations.


def reference(input, target, *, z_loss=0.0, softcap=0.0, logit_scale=1.0):
    """Row losses and lse in PyTorch's operations."""
    x = input * logit_scale
    x = softcap * torch.tanh(x / softcap) if softcap else x
    lse = torch.logsumexp(x, 1)
    return F.cross_entropy(x, target, reduction="none") + z_loss * lse.square()


@pytest.mark.parametrize(
    "options",
    [{"z_loss": 0.01}, {"softcap": 3.0}, {"logit_scale": 0.5}],
    ids=lambda options: next(iter(options)),
)
def test_options_per_class(options):
    for shape in ((6, C), (2, C, 3, 4)):
        input = logits(*shape, dtype=torch.float64)
        target = torch.randint(C, row_shape(input))
        ours = cross_entropy(input, target, options=Options(**options))
        theirs = reference(input, target, **options).mean()
        assert_close(ours, theirs)
        assert_close(*(torch.autograd.grad(loss, input)[0] for loss in (ours, theirs)))


def test_row_options():
    for shape in ((6, C), (2, C, 3, 4)):
        input = logits(*shape, dtype=torch.float64)
        target = torch.randint(C, row_shape(input))
        mask, weights = torch.rand(target.shape) > 0.4, torch.rand(target.shape)
        factor = weights * mask
        for row_mask in (mask, mask.to(torch.uint8)):
            options = Options(row_mask=row_mask, row_weights=weights)
            rows = reference(input, target) * factor
            for reduction, theirs in {
                "none": rows,
                "sum": rows.sum(),
                "mean": rows.sum() / factor.sum(),
            }.items():
                ours = cross_entropy(input, target, options=options, reduction=reduction)
                assert_close(ours, theirs)
                grads = [
                    torch.autograd.grad(loss.sum(), input, retain_graph=True)[0]
                    for loss in (ours, theirs)
                ]
                assert_close(*grads)


def test_denominators():
    input, target = logits(6, C, dtype=torch.float64), torch.randint(C, (6,))
    rows = reference(input, target)
    ours = cross_entropy(input, target, options=Options(normalizer=24.0))
    assert_close(ours, rows.sum() / 24)
    z = torch.logsumexp(input, 1).square().sum() * 0.01
    options = Options(normalizer=24.0, z_loss=0.01, z_normalizer=12.0)
    assert_close(cross_entropy(input, target, options=options), rows.sum() / 24 + z / 12)
    nothing = torch.full((6,), -100)
    assert math.isnan(cross_entropy(input, nothing))
    assert cross_entropy(input, nothing, options=Options(empty_is_zero=True)) == 0


def test_log_probs():
    input = torch.randn(6, C).log_softmax(1).requires_grad_()
    target = torch.randint(C, (6,))
    for reduction in REDUCTIONS:
        ours = cross_entropy(input, target, reduction=reduction, options=Options(log_probs=True))
        theirs = F.nll_loss(input, target, reduction=reduction)
        assert_close(ours, theirs)
        assert_close(*(torch.autograd.grad(loss.sum(), input)[0] for loss in (ours, theirs)))


def test_loss_dtype():
    input = logits(6, C, dtype=torch.bfloat16)
    target = torch.randint(C, (6,))
    for dtype in FLOATS:
        for reduction in REDUCTIONS:
            options = Options(loss_dtype=dtype)
            loss = cross_entropy(input, target, reduction=reduction, options=options)
            assert loss.dtype == dtype
            wide = F.cross_entropy(input.double(), target, reduction=reduction)
            assert_close(loss, wide.to(dtype), rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=1e-6)
    assert cross_entropy(input, target).dtype == torch.bfloat16


# Where semantics.md says that PyTorch differs.


def test_documented_differences():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1.0, -inf, 2.0]])
    soft = torch.tensor([[0.25, 0.0, 0.75]])
    assert math.isnan(F.cross_entropy(x, soft))
    assert abs(cross_entropy(x, soft).item() - 0.5633) < 1e-4
    rows = torch.tensor([[1.0, nan], [1.0, 2.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(cross_entropy(rows, torch.tensor([-100, 1])), rows)
    assert grad[0].tolist() == [0, 0]
    confident = torch.tensor([[20.0, 0.0, 0.0]])
    assert F.cross_entropy(confident, torch.tensor([0])) == 0
    assert_close(
        cross_entropy(confident, torch.tensor([0])).item(), 4.1223e-09, rtol=1e-4, atol=0.0
    )


# Errors.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.tensor([0, 7, 1, 2])}, IndexError, "targets[1] = 7 is outside [0, 7)"),
        ({"target": torch.tensor([0, 1, 1, -3])}, IndexError, "targets[3] = -3 is outside [0, 7)"),
        ({"target": torch.tensor([0, 1])}, ValueError, "target has the shape [2]"),
        (
            {"target": torch.zeros(4, C, dtype=torch.long)},
            ValueError,
            "target has the shape [4, 7]",
        ),
        ({"target": torch.rand(4, C - 1)}, ValueError, "target has the shape [4, 6]"),
        ({"target": torch.zeros(4, dtype=torch.bool)}, ValueError, "target cannot be torch.bool"),
        ({"target": torch.zeros(4, dtype=torch.int8)}, ValueError, "target cannot be torch.int8"),
        ({"target": [0, 1, 2, 3]}, (TypeError, AttributeError), "list"),
        ({"input": torch.tensor(1.0)}, ValueError, "input has no class axis"),
        ({"input": torch.zeros(4, C, dtype=torch.complex64)}, ValueError, "complex64"),
        ({"input": torch.zeros(4, C, dtype=torch.long)}, ValueError, "floating-point"),
        ({"input": torch.zeros(4, C).to_sparse()}, ValueError, "torch.sparse_coo"),
        ({"weight": torch.rand(C + 1)}, ValueError, "weight has the shape [8]"),
        ({"weight": torch.ones(C, dtype=torch.long)}, ValueError, "class_weights"),
        ({"weight": torch.rand(C).requires_grad_()}, ValueError, "weight requires grad"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"reduction": "average"}, ValueError, "'average'"),
        ({"options": Options(z_loss=-1.0)}, ValueError, "z_loss"),
        ({"options": Options(softcap=math.nan)}, ValueError, "softcap"),
        ({"options": Options(logit_scale=0.0)}, ValueError, "logit_scale"),
        ({"options": Options(workspace=1)}, ValueError, "workspace"),
        ({"options": Options(loss_dtype=torch.int64)}, ValueError, "loss_dtype"),
        (
            {"options": Options(row_mask=torch.ones(3, dtype=torch.bool))},
            ValueError,
            "row_mask has",
        ),
        ({"options": Options(row_weights=torch.ones(4, 1))}, ValueError, "row_weights has"),
        ({"options": Options(row_mask=torch.ones(4))}, ValueError, "row_mask"),
        ({"options": Options(log_probs=True, z_loss=0.1)}, ValueError, "z_loss"),
        ({"target": torch.rand(4, C), "ignore_index": 1}, ValueError, "ignore_index = 1"),
        ({"input": torch.zeros(4, 0), "target": torch.full((4,), 1)}, ValueError, "classes"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    arguments = {"input": torch.randn(4, C), "target": torch.randint(C, (4,)), **change}
    with pytest.raises(error, match=re.escape(message)):
        cross_entropy(**arguments)


def test_tensors_elsewhere():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="input is on cuda:0, and xent"):
        cross_entropy(torch.empty(4, C, device="cuda"), torch.empty(4, device="cuda").long())
    with pytest.raises(ValueError, match="target is on meta"):
        cross_entropy(torch.randn(4, C), torch.zeros(4, dtype=torch.long, device="meta"))
    loss = cross_entropy(torch.empty(4, C, device="meta"), torch.empty(4, device="meta").long())
    assert loss.is_meta and loss.shape == ()


def test_a_storage_that_is_too_short():
    """Nothing is read past the end of a storage that somebody has shrunk."""
    for size in (0, 8):
        input, target = torch.randn(4, C), torch.randint(C, (4,))
        input.untyped_storage().resize_(size)
        with pytest.raises(ValueError, match="input reaches past the end of its storage"):
            cross_entropy(input, target)
        input = torch.randn(4, C)
        target.untyped_storage().resize_(size)
        with pytest.raises(ValueError, match="target reaches past the end of its storage"):
            cross_entropy(input, target)


def test_nothing_is_written_on_failure():
    input = torch.randn(4, C, requires_grad=True) * 1
    before = input.detach().clone()
    with pytest.raises(IndexError):
        cross_entropy(input, torch.tensor([0, 1, 2, 9]), inplace=True)
    assert torch.equal(input, before)


def test_module():
    module = xent_torch.CrossEntropyLoss(torch.rand(C), label_smoothing=0.1, reduction="sum")
    input, target = logits(4, C), torch.randint(C, (4,))
    theirs = torch.nn.CrossEntropyLoss(module.weight, label_smoothing=0.1, reduction="sum")
    assert_close(module(input, target), theirs(input, target))
    mask = torch.tensor([True, False, True, True])
    kept = module(input, target, Options(row_mask=mask))
    assert_close(kept, theirs(input[mask], target[mask]))
