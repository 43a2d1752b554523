"""Products by quantised weights with the GPU's kernels, interpreted on the CPU, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton_quantized_cases as cases
from interpreter import dots_in_order
from quantized import FORMS

from nanovllm.errors import WeightError
from nanovllm.ops.invariant_ops import InvariantTritonOps
from nanovllm.ops.triton_packing import layout_of
from nanovllm.triton_kernels.packed_codes import LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled")
DEVICES = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float16, marks=HERE),
        *(pytest.param("cpu", t, marks=[HERE, pytest.mark.slow]) for t in (torch.bfloat16, torch.float32)),
        *(pytest.param("cuda", t, marks=pytest.mark.gpu) for t in (torch.bfloat16, torch.float16, torch.float32)),
    ],
    ids=str,
)
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
QUICK = ("q4", "q8_fine", "q4_nested", "e4m3_128")
FEW = pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[] if name in QUICK else pytest.mark.slow) for name, form in FORMS.items()],
    ids=FORMS,
)
LARGE = pytest.param(200, (8200, 512), marks=pytest.mark.gpu)


def test_every_layout_is_compiled():
    assert {layout_of(form) for form in FORMS.values()} == {*LAYOUTS}


@DEVICES
@FORM
@pytest.mark.parametrize(("rows", "shape"), [(3, (18, 290)), LARGE])
def test_linear(device, dtype, form, rows, shape):
    cases.check_linear(device, dtype, form, rows, shape)


@DEVICES
@pytest.mark.parametrize("name", ["q8_fine", "q4_64"])
@pytest.mark.parametrize(("rows", "shape"), [(1, (1, 1)), (17, (33, 31)), (40, (5, 520))])
def test_odd_sizes(device, dtype, name, rows, shape):
    """One row and no whole tile of them; odd numbers of columns; groups and chunks that are not whole."""
    cases.check_linear(device, dtype, FORMS[name], rows, shape)


@DEVICES
@FEW
@pytest.mark.parametrize(("rows", "shape"), [(17, (19, 40)), LARGE])
def test_gated_linear(device, dtype, form, rows, shape):
    cases.check_gated(device, dtype, form, rows, shape)


@DEVICES
@FEW
def test_rows_of_a_table(device, dtype, form):
    cases.check_embed(device, dtype, form)


@HERE
def test_linear_in_float32():
    cases.check_linear("cpu", torch.float32, FORMS["q4_nested"], 3, (33, 290))


@DEVICES
def test_rows_of_several_forms_in_one_weight(device, dtype):
    cases.check_mixed_forms(device, dtype)


@DEVICES
def test_rows_that_are_floats(device, dtype):
    cases.check_floats_alone(device, dtype)


def test_scales_that_would_become_infinite_are_refused():
    codes = cases.random_codes(FORMS["e4m3_128"], 3, 40)
    codes.scales[1] = 256
    with pytest.raises(WeightError, match="scales of 256 and more: set quantization='dequantize'"):
        cases.packed(cases.TRITON, codes)


@DEVICES
def test_columns_in_another_order(device, dtype):
    cases.check_order(device, dtype)


MIXTURES = [
    *(("q4", "q8"), ("q5", None)),
    *(pytest.param(*forms, marks=pytest.mark.slow) for forms in [((None, "q8_fine"),), (("q4_nested", "q5_nested"),)]),
]


@DEVICES
@pytest.mark.parametrize("forms", MIXTURES)
@pytest.mark.parametrize(
    "tokens", [pytest.param(1, marks=pytest.mark.slow), 30, pytest.param(600, marks=pytest.mark.gpu)]
)
def test_mixture(device, dtype, forms, tokens):
    cases.check_mixture(device, dtype, forms, tokens)


@DEVICES
@pytest.mark.parametrize("name", ["q4", pytest.param("q8_fine", marks=pytest.mark.slow)])
def test_rows_are_their_own_where_that_is_asked_for(device, dtype, name, monkeypatch):
    if device == "cpu":
        dots_in_order(monkeypatch)
    cases.check_rows_are_their_own(device, dtype, FORMS[name], InvariantTritonOps())


EIGHT = [
    *(pytest.param("cpu", torch.float16, name, marks=HERE) for name in ("q8_128", "e4m3_128")),
    *(
        pytest.param("cuda", dtype, name, marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float16)
        for name in ("q8_128", "e4m3_128")
    ),
]


@pytest.fixture
def multiplied(name):
    """Skips what the device has no tensor cores for."""
    needed = (8, 9) if name == "e4m3_128" else (8, 0)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < needed:
        pytest.skip("multiplies no such numbers")


@pytest.mark.parametrize(("device", "dtype", "name"), [EIGHT[0], *EIGHT[2:]])  # the interpreter rounds float8 wrongly
@pytest.mark.usefixtures("multiplied")
def test_activations_of_8_bits(device, dtype, name):
    cases.check_activations(device, dtype, torch.int8 if name == "q8_128" else torch.float8_e4m3fn)


@pytest.mark.parametrize(("device", "dtype", "name"), EIGHT)
@pytest.mark.usefixtures("multiplied")
def test_products_of_8_bits(device, dtype, name):
    for rows, shape in ((3, (34, 300)), *([(700, (1032, 2048))] if device == "cuda" else [])):
        cases.check_eight_bits(device, dtype, name, rows, shape)
