"""A run's page: what it says, and how a real browser shows it."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusellm_ray.config_file import parse_config
from fusellm_ray.errors import ConfigError
from fusellm_ray.report.charts import MAX_POINTS, Series, label, line_chart, thinned, ticks
from fusellm_ray.report.write import SCORES_FILE, write_report
from tests.runs import build_run

PROBE = """
<script>
window.problems = [];
addEventListener("error", (event) => problems.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const figure = document.querySelector(".chart"), svg = figure.querySelector("svg");
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 5}));
  const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll") || e.matches(".scroll"))
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 200));
  const probe = {
    innerWidth, scrollWidth: document.documentElement.scrollWidth, wide, problems,
    lines: [...document.querySelectorAll(".chart")].map((c) => c.querySelectorAll("polyline, circle").length),
    narrowest: Math.min(...[...document.querySelectorAll(".chart svg")].map((s) => s.getBoundingClientRect().width)),
    underPointer: figure.querySelector("output").textContent,
    background: getComputedStyle(document.body).backgroundColor,
  };
  parent.postMessage(JSON.stringify(probe), "*");
});
</script>
"""
# A frame, because a browser's window is never narrower than 500 pixels.
FRAME = """<!doctype html><script>
addEventListener("message", (event) => {
  document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: event.data}));
});
</script><body><iframe src="%s" width="%d" height="900" style="border: 0"></iframe>"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> Path:
    """The record of a run with two teachers, and models to compare it with."""
    folder = tmp_path_factory.mktemp("report")
    tree = build_run(folder / "run", tokenizer_folders)
    record = folder / "a-run_with.a-rather-long-name-that-no-line-of-a-telephone-can-hold"
    record.mkdir()
    records: list[dict[str, Any]] = [{"event": "run", "config": parse_config(tree).model_dump(mode="json")}]
    records += [{"event": "start", "step": 0, "ranks": 2}, *(step(n) for n in range(1, 41))]
    records += [
        {"event": "evaluation", "step": n, "bits_per_byte/prose": 4 - n / 20, "bits_per_byte": 4 - n / 20}
        for n in (20, 40)
    ]
    pool = {"ready": 1, "wanted": 1, "queued_tokens": 100, "restarts": 0, "problems": []}
    records += [{"event": "teachers", "pools": {"left": pool, "right": pool}} for _ in range(2)]
    records += [{"event": "end", "step": 40, "reason": "finished"}]
    lines = [json.dumps({"time": 1000.0 + at} | record) for at, record in enumerate(records)]
    (record / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    models = {
        name: {"mean": mean, "domains": {"prose": {"bits_per_byte": mean}}}
        for name, mean in {"target before": 2.5, "<fused> & more": 2.25}.items()
    }
    intervals = {"<fused> & more": {"mean": {"difference": -0.25, "low": -0.375, "high": -0.125}}}
    scores = {
        "models": models,
        "against": "target before",
        "differences": intervals,
        "bootstrap": {"level": 0.95},
    }
    (record / SCORES_FILE).write_text(json.dumps(scores))
    return record


def step(number: int) -> dict[str, Any]:
    figures: dict[str, float] = {
        "loss": 5 / number,
        "loss/clm": 6 / number,
        "loss/fusion": 1 / number,
        "loss/bits_per_byte": 3 / number,
        "grad_norm": 1.0,
        "lr": 1e-5,
        "tokens": 256.0,
        "skipped_steps": 0,
        "fusion/listened_share": 0.9,
        "time/wait_s": 0.1,
        "time/step_s": 1.0,
        "time/wait_share": 0.1,
        "perf/tokens_per_s": 256.0,
    }
    for teacher, share in {"left": 0.75, "right": 0.25}.items():
        own = {"win_share": share, "coverage": 0.9, "fidelity": 1.0, "residual": 0.2}
        own |= {
            f"{figure}/{domain}": share
            for figure in ("win_share", "advantage")
            for domain in ("prose", "code")
        }
        figures |= {f"teacher/{teacher}/{name}": value for name, value in own.items()}
    return {"event": "step", "step": number, "steps": 40} | figures


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Path:
    return write_report(str(run_folder), run_folder.parent / "page.html")


def test_a_run_is_named_by_its_folder_however_that_is_given(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(run_folder)
    assert write_report(".") == Path(f"{run_folder.name}.html")
    Path(f"{run_folder.name}.html").unlink()


def test_a_line_cut_off_does_not_cost_the_page(run_folder: Path, tmp_path: Path):
    first, *rest = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([first, '{"event": "st\n', *rest]))
    text = write_report(str(tmp_path), tmp_path / "page.html").read_text()
    assert "<dt>unreadable lines of the record</dt><dd>1</dd>" in text


def browse(page: Path, width: int, *flags: str) -> tuple[dict[str, Any], str]:
    """What a browser shows at this width, measured in the page; and what it wrote to its console."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on the PATH; Debian has it as the package chromium")
    probed = page.with_name(f"probed-{width}.html")
    probed.write_text(page.read_text().replace("<style>", PROBE + "<style>", 1))
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(FRAME % (probed.as_uri(), width))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *flags]
    command += [f"--user-data-dir={page.parent / f'profile-{width}'}", f"--window-size={width + 100},1000"]
    command += ["--virtual-time-budget=10000", "--dump-dom", frame.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    match = re.search(r'<pre id="probe">(.*?)</pre>', result.stdout, re.DOTALL)
    assert match, result.stderr[-3000:]
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(match[1])), "\n".join(console)


@pytest.mark.parametrize(
    ("width", "flags", "is_dark"), [(400, [], False), (1600, ["--force-dark-mode"], True)]
)
def test_a_browser_shows_every_chart_without_sideways_scrolling_or_an_error(
    page: Path, width: int, flags: list[str], is_dark: bool
):
    seen, console = browse(page, width, *flags)
    assert console == ""
    assert seen["problems"] == []
    assert seen["innerWidth"] == width
    assert seen["scrollWidth"] <= width
    assert seen["wide"] == []
    assert len(seen["lines"]) >= 18
    assert min(seen["lines"]) >= 1
    assert seen["narrowest"] >= 300
    assert re.fullmatch(r"step \d+", seen["underPointer"])
    red = int(re.findall(r"\d+", seen["background"])[0])
    assert (red < 60) is is_dark


def test_a_page_needs_no_network(page: Path):
    assert re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", page.read_text()) == []
    assert re.findall(r"url\(|@import|fetch\(|https?://(?!www\.w3\.org)", page.read_text()) == []


def test_a_page_says_what_the_record_says(page: Path):
    text = html.unescape(re.sub(r"<[^>]+>", " ", page.read_text()))
    for shown in (
        "finished at step 40",
        "40 / 40",
        "10.2 k",  # tokens
        "left 75.0 %",
        "right 25.0 %",
        "<fused> & more",
        "-0.2500 [-0.3750, -0.1250]",
        "with 95% intervals",
        "row_tokens: 64",
        "left, prose",  # an alignment sample
        "boundaries coincide",
    ):
        assert shown in " ".join(text.split()), shown


def test_models_that_are_gone_are_said_in_place_of_samples(run_folder: Path, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    text = (run_folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("/target", "/nowhere"))
    page = write_report(str(folder), tmp_path / "page.html").read_text()
    assert "No sample: " in page


def test_a_run_without_steps_or_teachers_is_a_page_too(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"time": 1.0, "event": "failed", "error": "no GPU\nat all"}) + "\n"
    )
    page = write_report(str(tmp_path), tmp_path / "page.html").read_text()
    assert "failed: no GPU" in page
    assert "<figure" not in page


@pytest.mark.parametrize(
    "text", ["", "[]", '{"models": {"a": {"mean": "x", "domains": {}}}}', '{"models": {}}']
)
def test_a_file_without_scores_is_refused(run_folder: Path, tmp_path: Path, text: str):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ConfigError, match=r"scores\.json: "):
        write_report(str(run_folder), tmp_path / "page.html", tmp_path / "scores.json")


@given(low=st.floats(-1e9, 1e9), width=st.floats(0, 1e9))
def test_ticks_enclose_the_values_evenly(low: float, width: float):
    high = low + width
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 12
    gaps = [b - a for a, b in itertools.pairwise(marks)]
    assert marks[0] <= low + 1e-6 * gaps[0]
    assert marks[-1] >= high - 1e-6 * gaps[0]
    assert max(gaps) == pytest.approx(min(gaps), rel=1e-3)


def test_thinning_keeps_the_mean_and_drops_what_is_no_number():
    thin = thinned(Series("a", list(range(10_000)), [1.0, 3.0, math.nan, math.inf] * 2500))
    assert len(thin.xs) <= MAX_POINTS
    assert sum(thin.ys) / len(thin.ys) == pytest.approx(2, abs=0.05)


def test_a_spike_does_not_flatten_a_line():
    figure = line_chart("a", "", [Series("s", list(range(100)), [100.0] + [1.0] * 99)])
    assert [float(y) for y in re.findall(r'class="y"[^>]*>([\d.]+)<', figure)][-1] <= 2


@pytest.mark.parametrize(
    ("value", "unit", "digits", "text"),
    [
        (0.25, "share", 0, "25 %"),
        (12345.0, "number", 0, "12.35 k"),
        (2e-5, "number", 4, "2e-5"),
        (9.5e-4, "number", 3, "0.001"),
        (9.5e-4, "number", 6, "9.5e-4"),
        (3.14159, "number", 2, "3.14"),
    ],
)
def test_labels_are_short(value: float, unit: Any, digits: int, text: str):
    assert label(value, unit, digits) == text
