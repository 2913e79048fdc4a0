"""Every kernel at every real shape, compiled for GPUs that are not there, fits them."""

import pytest
import torch

from kernels.catalogue import ALL
from kernels.language import INTERPRETED, PRESENT

if not PRESENT:
    pytest.skip("triton is not installed", allow_module_level=True)
if INTERPRETED:
    pytest.skip("the interpreter is on: nothing is compiled", allow_module_level=True)

from kernels.ahead import Resources, compile_only


def launches(spec, shape, dtype, sm):
    """Resources of all launches, forward and backward."""
    with compile_only(sm) as found, torch.device("meta"):
        given = spec.inputs(shape, dtype)
        for name in spec.grads:
            given[name].requires_grad_()
        out = spec.call(**given)
        if spec.grads:
            results = [out] if isinstance(out, torch.Tensor) else out
            sum(x.sum() for x in results).backward()
    return found


@pytest.mark.parametrize("sm", [86, 90])
@pytest.mark.parametrize("name", ALL)
def test_fits_the_card(name, sm):
    spec = ALL[name]
    for dtype in dict.fromkeys([spec.bench_dtype, *spec.dtypes]):
        for title, shape in spec.real.items():
            found = launches(spec, shape, dtype, sm)
            assert found, f"{title}: nothing was launched"
            for launch in found:
                exact = launch.dots and dtype == torch.float32  # "ieee": no tensor core does it
                complaints = launch.complaints(wide=spec.wide_loads)
                wrong = [x for x in complaints if not (exact and "tensor" in x)]
                assert not wrong, f"{launch.kernel}, {title}, {dtype}: {'; '.join(wrong)}"


QUERIES = {"N": 1568, "K": 65536, "D": 512}
RELATIONS = {"B": 8, "H": 3, "P": 169, "R": 169, "D": 256}


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "precision"),
    [
        ("queue_info_nce", QUERIES, torch.float32, "highest"),
        ("queue_info_nce", QUERIES, torch.float32, "high"),
        ("relation_cross_entropy", RELATIONS, torch.bfloat16, "highest"),
    ],
)
def test_the_widest_vectors_that_are_taken_fit_the_smaller_card(name, shape, dtype, precision):
    """float32 as exact products ask for more registers, and as TF32, in which runs train, for memory."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = launches(ALL[name], shape, dtype, 86)
    finally:
        torch.set_float32_matmul_precision(before)
    exact = dtype == torch.float32 and precision == "highest"
    for launch in found:
        wrong = [x for x in launch.complaints(wide=True) if not (exact and "tensor" in x)]
        assert not wrong, f"{launch.kernel}: {'; '.join(wrong)}"


def test_the_gate_notices():
    fine = Resources("k", 86, 64, 0, 1024, 4, 8, 8, True)
    assert fine.complaints(wide=True) == []
    assert fine.resident_warps == 32
    wasteful = Resources("k", 86, 255, 400, 150_000, 8, 0, 0, True)
    assert len(wasteful.complaints(wide=True)) == 5


def test_a_strided_batch_loses_its_wide_loads_and_is_noticed():
    """The gate reads the code that a launch really gets, not the best the kernel could."""
    spec = ALL["dense_match"]
    with compile_only(86) as found, torch.device("meta"):
        given = spec.inputs({"B": 2, "P": 49, "R": 49, "C": 2047}, torch.bfloat16)
        spec.call(**given)
    assert any("16-byte" in said for launch in found for said in launch.complaints(wide=True))
