"""The bench measures what it says, forgets no row, and writes files that others can read."""

import csv
import io
import json

import pytest
import torch
from torch.nn import functional as F

from kernels import bench, bench_files, bench_measure, bench_paper, bench_place, bench_report
from kernels.bench_measure import Measured
from kernels.bench_rivals import RIVALS
from kernels.catalogue import ALL
from kernels.language import INTERPRETED
from kernels.spec import KernelSpec

LIGER = (
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,x_value,"
    "y_value_50,y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,liger_version"
)
PLACE = bench_place.Place("cpu", "a processor", "1 of 2 threads", "torch 2", "abc", "now", None)


def doubled(x):
    return x * 2


def toy(call=doubled, eager=lambda x: x + x, **changes):
    options = {
        "name": "toy",
        "call": call,
        "reference": doubled,
        "eager": eager,
        "inputs": lambda shape, dtype: {"x": torch.randn(shape["N"], 4).to(dtype)},
        "small": (),
        "real": {"few": {"N": 8}, "many": {"N": 16}},
        "grads": ("x",),
        "bytes_moved": lambda shape, size: 2 * size * 4 * shape["N"],
        **changes,
    }
    return KernelSpec(**options)


@pytest.fixture
def only_toy(monkeypatch):
    """Run the bench on a toy kernel, without a GPU and without a compiler."""

    def run(spec, *words):
        monkeypatch.setattr(bench, "ALL", {spec.name: spec})
        return bench.main(list(words))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(bench, "INTERPRETED", False)
    monkeypatch.setattr(bench, "resources", lambda specs: [])
    monkeypatch.setattr(bench_measure, "CPU_SECONDS", 0.0)
    return run


# What is measured


def test_cpu_peak_is_all_that_lives_at_once_above_the_inputs():
    x = torch.zeros(1000, 1000)
    assert bench_measure._cpu_peak(lambda: (x + x) + (x * x)) == 3 * x.nbytes
    chain = bench_measure._cpu_peak(lambda: x.add(1).add(1).add(1))
    assert 2 * x.nbytes <= chain < 2 * x.nbytes + 100  # and a few numbers wrapped in tensors
    assert bench_measure._cpu_peak(lambda: x.view(-1)) == 0


def test_backward_and_full_are_measured_where_there_are_gradients():
    x = torch.randn(64, 64, requires_grad=True)
    found = bench_measure.measure(lambda: x.square(), [x], [x.detach().double().square()])
    assert set(found.ms) == {"forward", "backward", "full"}
    for low, middle, high in found.ms.values():
        assert 0 < low <= middle <= high
    assert found.whole == found.ms["full"][1]
    assert found.peak is not None
    assert found.peak >= 2 * x.nbytes  # result and gradient
    assert found.error is not None
    assert found.error < 1e-6
    plain = bench_measure.measure(lambda: x.detach() * 2, [x], None)
    assert set(plain.ms) == {"forward"}
    assert plain.error is None


def test_error_takes_a_scalar_for_the_sum_and_says_nothing_of_other_shapes():
    want = [torch.tensor([1.0, 3.0], dtype=torch.float64)]
    assert bench_measure._error([torch.tensor(4.0)], want) == 0
    assert bench_measure._error([torch.tensor(5.0)], want) == pytest.approx(0.25)
    assert bench_measure._error([torch.tensor([1.0, 3.0, 0.0])], want) is None
    assert bench_measure._error([torch.tensor([1, 3])], want) is None


def test_every_provider_gets_the_same_arguments_and_names_of_types_are_widened():
    spec = ALL["queue_info_nce"]
    first, second = (
        bench_measure.arguments(spec, spec.small[3], torch.float32, "cpu") for _ in range(2)
    )
    assert torch.equal(first["q"], second["q"])
    assert first["q"].requires_grad
    want = bench_measure.exact(spec, first)["kernel"]
    assert want[0].dtype == torch.float64
    assert bench_measure._widened(torch.bfloat16) is torch.float64
    assert bench_measure._widened(torch.uint8) is torch.uint8


def test_traffic_is_what_operations_read_and_write_and_views_are_free():
    size = 4 * 8 * 4
    forward = {"N": 8}
    spec = toy(grads=())
    assert bench_paper.traffic(spec, forward, torch.float32) == (3 * size, 1)  # x + x reads x twice
    views = toy(eager=lambda x: x.view(-1)[2:], grads=())
    assert bench_paper.traffic(views, forward, torch.float32) == (0, 0)
    looks = toy(eager=lambda x: x if x.sum().item() > 0 else -x, grads=())
    assert bench_paper.traffic(looks, forward, torch.float32) is None


@pytest.mark.parametrize("name", ALL)
def test_reduced_shapes_differ_in_rows_and_images_only(name):
    spec = ALL[name]
    dtype = torch.float32 if spec.bench_dtype.is_floating_point else spec.bench_dtype
    for whole in spec.real.values():
        small = bench_paper.reduced(spec, whole, dtype)
        for axis, length in whole.items():
            if axis in bench_paper.COUNTED:
                assert 1 <= small[axis] <= length
            else:
                assert small[axis] == length


def test_roof_is_the_slower_of_memory_and_matrix_units():
    card = bench_place.Card("card", 86, gigabytes_per_s=1000, teraflops=100)
    assert card.milliseconds(1e9, 0) == pytest.approx(1)
    assert card.milliseconds(0, 1e12) == pytest.approx(10)
    assert card.milliseconds(1e9, 1e12) == pytest.approx(10)


# What is said


def test_unknown_kernel_is_one_sentence_with_the_nearest(capsys):
    assert bench.main(["queue_infonce"]) == 2
    said = capsys.readouterr().err
    assert said == ("make bench: no kernel is called queue_infonce; did you mean queue_info_nce?\n")


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_refuses_to_time_the_interpreter(capsys):
    assert bench.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_table_keeps_losing_and_absent_providers():
    case = bench_report.Case("toy", ("few",), {"N": 8}, ({"N": 32},), "float32", 100, 200)
    rows = [
        bench_report.Row(case, "torch-eager", Measured({"forward": (1.0, 2.0, 3.0)}, 10**6, 1e-7)),
        bench_report.Row(case, "ours", Measured({"forward": (4.0, 8.0, 9.0)}, 2 * 10**6, 2e-7)),
        bench_report.Row(case, "rival", Measured(absent="not measured: it needs a CUDA device")),
    ]
    text = bench_report.case_table(case, rows, None)
    assert "N 8 of 32; float32" in text
    assert "8.00 (4.00-9.00)" in text
    assert "0.25" in text
    assert "rival: not measured: it needs a CUDA device" in text
    assert "backward" not in text
    card = bench_place.Card("card", 86, 1e-4, 1)
    row = bench_report.case_table(case, rows[:1], card).splitlines()[3].split()
    assert row[-1] == "50%"  # 100 bytes at 1e-4 GB/s take 1 ms, measured were 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1234"), (99.95, "100.0"), (1.234, "1.23"), (0.00123, "0.00123")],
)
def test_numbers_have_no_exponents(value, text):
    assert bench_report.short(value) == text


def test_predictions_are_of_real_shapes_cards_and_providers():
    names = {card.name for card in bench_place.CARDS}
    for said in bench_paper.predictions():
        assert said.shape in ALL[said.kernel].real
        assert said.card in names
        rivals = {rival.name for rival in RIVALS if rival.kernel == said.kernel}
        assert said.provider in {"torch-eager", "torch-compile", "ours", *rivals}
        assert said.at_peaks_ms > 0
        assert said.likely_ms is None or said.likely_ms >= said.at_peaks_ms


# The whole command


def test_command_prints_tables_and_leaves_csv_and_charts(only_toy, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert only_toy(toy(), "--out", str(tmp_path)) == 0
    assert only_toy(toy(), "toy", "--out", str(tmp_path)) == 0  # appends
    said = capsys.readouterr().out
    assert "no GPU time was measured" in said
    assert "toy: few" in said
    assert "bytes moved" in said
    text = (tmp_path / "kernels.csv").read_text()
    assert text.splitlines()[0] == LIGER
    assert text.count("kernel_name,") == 1
    records = list(csv.DictReader(io.StringIO(text)))
    measured = [r for r in records if r["y_value_50"]]
    kinds = {(r["kernel_provider"], r["kernel_operation_mode"], r["metric_name"]) for r in measured}
    for provider in ("torch-eager", "torch-compile", "ours", "reference"):
        assert {(provider, m, "speed") for m in ("forward", "backward", "full")} <= kinds
        assert (provider, "full", "memory") in kinds
    for record in measured:
        low, middle, high = (float(record[f"y_value_{q}"]) for q in (20, 50, 80))
        assert low <= middle <= high
        assert record["x_name"] == "N"
        assert json.loads(record["extra_benchmark_config_str"])["dtype"] == "float32"
    absent = [r for r in records if not r["y_value_50"]]  # compiled for the first shape alone
    assert {r["kernel_provider"] for r in absent} == {"torch-compile"}
    for name in ("speed.png", "memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_failure_of_ours_is_a_row_and_an_exit_code(only_toy, tmp_path, capsys):
    def broken(x):
        raise ValueError("no such luck\nat all")

    assert only_toy(toy(call=broken), "--out", str(tmp_path)) == 1
    assert "ours: failed: ValueError: no such luck\n" in capsys.readouterr().out


def test_results_are_written_where_they_belong(only_toy, tmp_path, monkeypatch):
    results = tmp_path / "RESULTS.md"
    results.write_text("# Head\n\n## RTX 3090\n\nWritten by hand.\n\n## CPU\n")
    monkeypatch.setattr(bench_files, "RESULTS", results)
    assert only_toy(toy(), "--out", str(tmp_path), "--write-results") == 0
    text = results.read_text()
    assert text.startswith(
        "# Head\n\n## RTX 3090\n\nWritten by hand.\n\n<!-- bench RTX 3090 / toy -->"
    )
    assert text.count(bench_files.NOT_YET) == len(bench_place.CARDS)
    assert bench_files.measured_blocks() == {("CPU", "toy"), ("On paper", "toy")}
    assert text.index("## RTX 3090") < text.index("## CPU") < text.index("## H200")


def test_results_keep_what_they_do_not_replace():
    text = bench_files.updated("# Head\n", {("A", "one"): "first", ("B", "one"): "second"})
    text += "\nafterword\n"
    changed = bench_files.updated(text, {("A", "two"): "third", ("A", "one"): "fourth"})
    assert [part in changed for part in ("first", "second", "third", "fourth")] == [
        False, True, True, True,
    ]  # fmt: skip
    assert changed.startswith("# Head\n")
    assert changed.endswith("\nafterword\n")
    assert changed.index("third") < changed.index("## B")
    assert bench_files.updated(changed, {("A", "two"): "third"}) == changed


def test_gpu_rows_name_achieved_rates_and_go_to_their_card(only_toy, tmp_path, monkeypatch, capsys):
    card = bench_place.Card("NVIDIA H200", 90, 1000.0, 100.0)
    place = bench_place.Place("cpu", "NVIDIA H200", "driver 1", "torch 2", "abc", "now", card)
    monkeypatch.setattr(bench, "here", lambda: place)
    monkeypatch.setattr(bench_files, "RESULTS", tmp_path / "RESULTS.md")
    spec = toy(bench_dtype=torch.bfloat16)
    assert only_toy(spec, "--out", str(tmp_path), "--write-results") == 0
    said = capsys.readouterr().out
    assert "of ceiling" in said
    assert "bfloat16" in said
    assert "no GPU time" not in said
    assert bench_files.measured_blocks() == {("H200", "toy")}


def test_backward_that_runs_only_once_is_what_is_left_of_full(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    clock = iter([(1.0, 2.0, 3.0), (5.0, 7.0, 9.0)])  # forward, full

    def timed(function, quantiles):
        function()
        function()
        return next(clock)

    monkeypatch.setattr(testing, "do_bench", timed)
    x = torch.randn(4, requires_grad=True)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.clone())
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            (saved,) = ctx.saved_tensors
            return saved.copy_(grad).mul_(2)

    found, remark = bench_measure._cuda_times(lambda: Once.apply(x), [x])
    assert found["backward"] == (4.0, 5.0, 6.0)
    assert "runs only once" in remark
    clock = iter([(1.0, 2.0, 3.0), (5.0, 7.0, 9.0), (0.1, 0.2, 0.3)])
    found, remark = bench_measure._cuda_times(lambda: x.square(), [x])
    assert (found["backward"], remark) == ((0.1, 0.2, 0.3), "")


# Rivals


@pytest.mark.parametrize(
    "rival",
    [r for r in RIVALS if r.result == "kernel" and not r.needs_cuda],
    ids=lambda r: f"{r.kernel}-{r.name}",
)
def test_rivals_that_claim_the_same_result_have_it(rival):
    spec = ALL[rival.kernel]
    shape = {"N": 12, "K": 40, "D": 16, "S": 20}
    given = bench_measure.arguments(spec, shape, torch.float32, "cpu")
    try:
        run = rival.bind(given)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert torch.allclose(run(), spec.reference(**given), rtol=1e-5, atol=1e-6)


def test_recast_queue_loss_is_a_linear_layer_and_hard_labels():
    spec = ALL["queue_info_nce"]
    given = bench_measure.arguments(spec, {"N": 5, "K": 7, "D": 4}, torch.float32, "cpu")
    rival = next(r for r in RIVALS if r.name == "torch-linear-ce" and r.kernel == spec.name)
    try:
        run = rival.bind(given)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    logits = given["q"] @ given["queue"].T / given["temperature"]
    want = F.cross_entropy(logits, torch.arange(5), reduction="sum")
    assert torch.allclose(run(), want)


def test_rival_that_is_not_installed_is_listed(monkeypatch):
    def missing(given):
        raise ModuleNotFoundError("No module named 'liger_kernel'", name="liger_kernel")

    provider = bench._Provider("liger", missing)
    found = bench._attempt(toy(), provider, {"x": torch.zeros(1)}, None)
    assert found.absent == "not measured: liger_kernel is not installed"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_every_provider_runs_on_a_gpu(name):
    spec = ALL[name]
    place = bench_place.Place("cuda", "GPU", "", "", "", "", bench_place.CARDS[0])
    title, whole = next(iter(spec.real.items()))
    shape = bench_paper.reduced(spec, whole, spec.bench_dtype)
    dtype = str(spec.bench_dtype).removeprefix("torch.")
    case = bench_report.Case(name, (title,), shape, (whole,), dtype, 1, 1)
    for row in bench._measured(spec, case, place, first=True):
        said = row.measured.absent
        assert said is None or said.startswith("not measured"), f"{row.provider}: {said}"
