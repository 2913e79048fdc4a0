"""The report page: complete, self-contained, escaped, and tolerant of files still being written."""

import base64
import html.parser
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from dense_ssl.report.__main__ import main, read_jsonl, write_report
from dense_ssl.report.svg_plot import HEIGHT, WIDTH, Line, line_plot, tick_text, ticks
from dense_ssl.rundir import claimed

CONFIG = """
method:
  name: densecl
  views: [{name: global, count: 2, size: 96, scale: [0.2, 1.0]}]
  backbone: {name: resnet18}
data: {path: shards/coco, loader: ffcv}
optim: {name: sgd, lr: {start: 0.06, shape: cosine}}
train: {epochs: 10, steps: 50, batch_size: 32, precision: fp32, seed: 0}
"""
VOID = {"meta", "img", "path", "polyline", "circle"}


class Checker(html.parser.HTMLParser):
    """Follows the nesting of elements and collects what a page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(path):
    checker = Checker()
    checker.feed(path.read_text())
    checker.close()
    assert checker.open == []
    assert checker.tags.isdisjoint({"script", "link", "iframe"})
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    assert "@import" not in path.read_text()
    assert "url(" not in path.read_text()
    return checker


def result(task, metric, value, checkpoint):
    return {
        "task": task,
        "protocol": f"{task}/v1",
        "metric": metric,
        "value": value,
        "checkpoint": checkpoint,
        "data": "data/my images",
    }


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    records = [
        {
            "step": step,
            "epoch": step / 10,
            "loss": 8 - step / 20,
            "loss_global": 4.0,
            "loss_dense": 4 - step / 20,
            "lr": 0.06,
            "images_per_s": 64.0,
            "data_wait": 0.25,
        }
        for step in range(5, 55, 5)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(lines + '{"step": 55, "lo')
    return folder


def test_a_whole_run(run):
    results = [
        result("knn", "top1", 20.0, "random:runs/a"),
        result("knn", "top1", 90.0, "runs/a"),
        result("knn", "top1", 41.5, "runs/a"),  # evaluated again
        result("segment", "mIoU", 23.25, "runs/a"),
    ]
    (run / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results) + '{"task"')
    Image.new("RGB", (8, 8)).save(run / "crops.png")
    path = write_report(run)
    assert path == run / "report.html"
    page = check(path)
    text = " ".join(page.text)
    assert "50 of 50 steps, 5.00 epochs, finished" in text
    assert "25 s of training" in text  # 50 steps of 32 images at 64 images/s
    for word in ("nats", "images/s", "% of step time", "Learning rate", "shards/coco"):
        assert word in text
    cells = re.findall(r"<tr><td>knn</td>.*?</tr>", path.read_text())
    assert len(cells) == 1
    assert re.findall(r'number">([^<]*)<', cells[0]) == ["20.00", "41.50", "+21.50"]
    assert "'my images'" not in text
    assert "DATA='data/my images'" in text
    assert f"python -m dense_ssl.pretrain '{run}'/config.yaml" in text
    assert base64.b64decode(page.sources[0].partition(",")[2]) == (run / "crops.png").read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        "method: {name: moco, views: [1, null, {scale: 3}], backbone: resnet50}\noptim: 3\n"
        "train: {epochs: many, steps: soon, batch_size: big}\nrun: []\n",
        "method: moco\ntrain: {epochs: [1], steps: -3, batch_size: .inf}\ndata: 1\n",
    ],
    ids=["ours", "older", "strange"],
)
def test_garbled_lines_and_settings_take_nothing_but_themselves_away(tmp_path, config):
    lines = (
        '{"step": "x", "loss": {}, "epoch": "no"}', '{"step": 1e400, "loss": [1]}', "[1, 2]", "\xff{{{",
        '{"step": 5, "epoch": -1, "loss": null, "images_per_s": 0, "eta_s": "soon", "refused": "3"}',
        '{"step": 6, "epoch": 1e-300, "loss": NaN, "images_per_s": 1e-320, "memory_gb": 1e300}',
        '{"step": 7, "epoch": 0.1, "images_per_s": "fast", "loss": true}',
        '{"step": 8, "epoch": 0.5, "loss": 2.5, "images_per_s": 4, "data_wait": 0.1, "rankme": 7}',
        '{"kind": [], "time": {}, "machine": 3}', '{"task": 3, "value": true, "checkpoint": {}}',
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(config)
    for name in ("log", "watch", "events", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "crops.png").write_text("no picture")
    text = " ".join(check(write_report(tmp_path)).text)
    assert "2.5" in text
    assert "crops.png is no picture" in text


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    text = " ".join(check(write_report(tmp_path)).text)
    assert "no step logged yet" in text
    assert "Nothing evaluated yet" in text
    assert "no checkpoint yet" in text


def test_an_unfinished_run_says_so(run):
    (run / "config.yaml").write_text(CONFIG.replace("steps: 50, ", ""))
    assert "50 of 100 steps, 5.00 epochs, not finished" in write_report(run).read_text()


def test_how_a_run_stands_and_what_happened_to_it(run):
    look = {
        "step": 50,
        "epoch": 5.0,
        "spread": 0.001,
        "rankme": 1.0,
        "most_rank": 64.0,
        "seconds": 1.0,
    }
    (run / "watch.jsonl").write_text(json.dumps(look) + "\n")
    (run / "incidents").mkdir()
    refused = {
        "step": 7,
        "kind": "gradient not finite",
        "bundle": "step-7.pt",
        "time": "2026-01-01T11",
    }
    (run / "incidents" / "incidents.jsonl").write_text(json.dumps(refused) + "\n")
    events = [
        {"kind": "started", "time": "2026-01-01T10", "step": 0, "ranks": 1, "machine": "a machine"},
        {"kind": "halved", "time": "2026-01-01T12", "micro_batches": 2, "images": 16},
        {"kind": "started", "time": "2026-01-01T13", "step": 20, "ranks": 2, "machine": "another"},
        {"kind": "refused", "time": "2026-01-01T14", "reason": "the disk is <full>"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (run / "config.yaml").write_text(CONFIG.replace("steps: 50", "steps: 90"))
    text = " ".join(check(write_report(run)).text)
    assert "failed" in text
    assert "the disk is <full>" in text
    assert "Features collapse" in text
    assert "resumed at step 20, 2 ranks" in text
    assert "ended without a word" in text
    assert "python -m dense_ssl.replay" in text
    assert "2 micro-batches of 16 images" in text
    assert "a machine; then another" in text


def test_a_run_that_is_going_on_is_known_by_its_lock(run):
    (run / "config.yaml").write_text(CONFIG.replace("steps: 50", "steps: 90"))
    with claimed(run, 0):
        assert "running" in " ".join(check(write_report(run)).text)
    assert 'class="state unknown"' in write_report(run).read_text()


def test_a_loss_that_is_no_number_is_said_and_the_curve_goes_round_it(run):
    lines = (run / "log.jsonl").read_text().splitlines()[:10]
    lines[4] = lines[4].replace('"loss": 6.75', '"loss": NaN')
    assert "NaN" in lines[4]
    (run / "log.jsonl").write_text("\n".join(lines))
    text = check(write_report(run)).text
    assert "The loss is not finite from step 25 on: training diverged." in text
    assert "nan" not in (run / "report.html").read_text()


def test_long_logs_make_pages_of_the_same_size(run):
    first = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    with (run / "log.jsonl").open("w") as file:
        for step in range(10, 1_000_010, 10):
            file.write(
                json.dumps({**first, "step": step, "epoch": step / 100, "loss": step % 7}) + "\n"
            )
    assert len(read_jsonl(run / "log.jsonl")) <= 20_001
    page = write_report(run).read_text()
    assert len(page) < 200_000
    assert "1,000,000 of" in page  # the last line counts, whatever is left out


def test_everything_from_outside_is_escaped(run):
    evil = "<script>alert(1)</script>&\"'"
    (run / "config.yaml").write_text(CONFIG.replace("densecl", json.dumps(evil)))
    (run / "eval.jsonl").write_text(json.dumps(result(evil, evil, 1.0, evil)) + "\n")
    with (run / "log.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 60, "loss": 1.0, f"loss_{evil}": 2.0}) + "\n")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.pt").write_bytes(b"no checkpoint")
    assert evil in " ".join(check(write_report(run)).text)


def test_lines_cut_short_and_values_that_are_no_numbers_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_jsonl(path) == []
    path.write_bytes(b'{"step": 1, "loss": NaN}\n\xff\xfe\n[1]\n{"step": 2, "loss": "x"}\n{"st')
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]
    (tmp_path / "config.yaml").write_text(CONFIG)
    check(write_report(tmp_path))


def test_the_command_line(run, tmp_path, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    for folder in (tmp_path / "none", tmp_path):
        assert main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert "no readable config.yaml" in error
        assert error.count("\n") == 1


# --- plots -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.3, 7.9), (-3, 40), (0, 1e-6), (1e5, 3e7), (5, 5), (0, 0), (-2, -2)]
)
def test_ticks_are_round_and_enclose_the_range(low, high):
    values = ticks(low, high, 5)
    assert values[0] <= low + 1e-9 * abs(low)
    assert values[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(values) <= 9
    step = values[1] - values[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6
    labels = [tick_text(value, values) for value in values]
    assert len(set(labels)) == len(labels)


def test_points_stand_where_they_should():
    element = ET.fromstring(line_plot([Line("a", [(0, 0.0), (50, 5.0), (100, 10.0)])], "x", "y"))
    (line,) = element.iter("polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert (x1, y1) == (
        pytest.approx((x0 + x2) / 2, abs=0.1),
        pytest.approx((y0 + y2) / 2, abs=0.1),
    )
    assert 0 < x0 < x2 < WIDTH
    assert HEIGHT > y0 > y2 > 0


def test_long_series_are_averaged_and_end_exactly():
    points = [(i, float(i % 2)) for i in range(100_000)]
    (line,) = ET.fromstring(line_plot([Line("a", points)], "x", "y")).iter("polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert len(places) <= 401
    heights = [y for _, y in places[:-1]]
    assert max(heights) - min(heights) < 3  # the mean of zeros and ones everywhere
    assert places[-1][0] == pytest.approx(WIDTH - 24, abs=0.1)


@pytest.mark.parametrize(
    "points", [[], [(3, 2.0)], [(1, math.nan), (2, math.inf)], [(1, 4.0), (2, 4.0)]]
)
def test_series_with_little_in_them_still_plot(points):
    ET.fromstring(line_plot([Line("a & <b>", points), Line("c", [])], "x", "y", from_zero=True))
