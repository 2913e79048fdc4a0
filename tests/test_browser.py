"""Our pages as a browser shows them: at two widths, light and dark, without a network.

The pages have no script of their own. A page around them holds each in a frame and measures it.
"""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from dataprep.synthetic import write_random_images
from dense_ssl.compare import write_comparison
from dense_ssl.preview import write_preview
from dense_ssl.report.__main__ import write_report
from tests.test_report import CONFIG, result

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1200, 500)
FINE = 4.5  # contrast of text: WCAG 2.2, success criterion 1.4.3
AROUND = """<!doctype html><meta charset="utf-8"><pre id="found"></pre><script>
const pages = PAGES, widths = WIDTHS, found = [];
const channels = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = text => channels(text).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
function behind(view, node) {
  for (; node; node = node.parentElement) {
    const colour = view.getComputedStyle(node).backgroundColor;
    if (!/rgba\\(.*, 0\\)/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
}
function measured(name, width, frame) {
  const view = frame.contentWindow, page = frame.contentDocument, wide = [], faint = [];
  for (const node of page.body.querySelectorAll("*")) {
    const box = node.getBoundingClientRect(), apart = node.closest(".scroll, pre");
    if (box.right > width + 0.5 && (!apart || apart === node)) wide.push(node.outerHTML.slice(0, 120));
    const says = [...node.childNodes].some(c => c.nodeType === 3 && c.textContent.trim());
    if (!says || !box.width) continue;
    const style = view.getComputedStyle(node), shapes = node.namespaceURI.endsWith("svg");
    const both = [light(shapes ? style.fill : style.color), light(behind(view, node))];
    const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (ratio < FINE) faint.push(ratio.toFixed(2) + " " + node.outerHTML.slice(0, 120));
  }
  const fetched = view.performance.getEntriesByType("resource").map(e => e.name.slice(0, 80))
    .filter(address => !address.startsWith("data:"));
  const pictures = [...page.images].filter(image => !image.naturalWidth).length;
  return {name, width, scroll: page.documentElement.scrollWidth, wide, faint, fetched, pictures,
    characters: page.body.innerText.length, dark: light(behind(view, page.body)) < 0.2};
}
let left = pages.length * widths.length;
for (const [name, text] of pages) for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    found.push(measured(name, width, frame));
    if (!--left) document.getElementById("found").textContent = JSON.stringify(found);
  };
  frame.srcdoc = text;
  document.body.append(frame);
}
</script>"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """Return a page that holds the three pages, each as full as it gets."""
    folder = tmp_path_factory.mktemp("pages")
    images = folder / "images"
    write_random_images(images, 4)
    runs = [
        folder / f"a run with quite a long name, the {number}th of several" for number in (1, 2)
    ]
    for number, run in enumerate(runs):
        write_run(run, 0.06 + number / 10)
    write_comparison(runs, folder / "compare.html")
    data = ("data.loader=folder", f"data.path={images}")
    write_preview("demo/ibot_dc", data, folder / "preview.html", 1)
    pages = {
        "report": write_report(runs[0]).read_text(),
        "compare": (folder / "compare.html").read_text(),
        "preview": (folder / "preview.html").read_text(),
    }
    text = AROUND.replace("FINE", str(FINE)).replace("WIDTHS", json.dumps(WIDTHS))
    text = text.replace("PAGES", json.dumps(list(pages.items())).replace("</", "<\\/"))
    path = folder / "around.html"
    path.write_text(text)
    return path


def write_run(folder, lr):
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.replace("0.06", str(lr)))
    log = [
        {"step": step, "epoch": step / 10, "loss": 8 - step / 20, "loss_dense": 123456.789 - step, "lr": lr,
         "images_per_s": 64.0, "data_wait": 0.25, "refused": 1, "replaced": 2, "gpu_memory_gb": 3.5}
        for step in range(5, 35, 5)
    ]  # fmt: skip
    looks = [
        {"step": step, "epoch": step / 10, "rankme": 1.0, "spread": 0.001, "most_rank": 64.0, "knn": 41.5,
         "match_one_cell": 33.0, "match_chance": 30.0, "class_chance": 10.0, "uniformity": -0.01}
        for step in (0, 15, 30)
    ]  # fmt: skip
    results = [
        {**result("segment-finetune/imagenet-s", "mIoU", 20.0 + i, name), "random_init": 10.0}
        for i, name in enumerate(["runs/a", "runs/" + "long-" * 20])
    ]
    events = [{"time": 1.7e9, "event": "started", "machine": "8 x NVIDIA GeForce RTX 3090 " * 4}]
    for name, records in {
        "log.jsonl": log, "watch.jsonl": looks, "eval.jsonl": results, "events.jsonl": events,
    }.items():  # fmt: skip
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    Image.new("RGB", (1600, 300)).save(folder / "crops.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_whole_readable_and_alone(browser, around, tmp_path, scheme):
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={tmp_path}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
         "--virtual-time-budget=20000", "--dump-dom", around.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = re.search(r'<pre id="found">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert said and said[1], shown.stderr
    found = json.loads(said[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
    assert len(found) == 3 * len(WIDTHS)
    for page in found:
        where = f"{page['name']} at {page['width']} px"
        assert page["scroll"] <= page["width"], f"{where} scrolls sideways: {page['wide']}"
        assert page["wide"] == [], where
        assert page["faint"] == [], where
        assert page["fetched"] == [], where
        assert page["pictures"] == 0, f"{where}: pictures that are not shown"
        assert page["characters"] > 400, where
        assert page["dark"] == (scheme == "dark"), where
