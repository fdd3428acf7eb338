"""``report.html`` and ``report.md``: what the records say and nothing else, for any run, in a real browser."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import permutations
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from command_line import RECIPE, prepare, run, write_recipe
from tiny import RegressionData, Regressor, trainer

from pqqp_lightning.callbacks import RTN, Magnitude
from pqqp_lightning.report.formatting import human_bytes
from pqqp_lightning.report.html import to_html
from pqqp_lightning.report.pages import read_page, write_pages
from pqqp_lightning.report.terminal import print_page
from pqqp_lightning.storage.run_folder import RunFolder

STAGES = RECIPE[RECIPE.index("stages:") :]
WITH_FINETUNING = """\
stages:
  prune: {class_path: Magnitude, init_args: {sparsity: 0.5}}
  tune: {class_path: Finetune, init_args: {epochs: 1, learning_rate: 0.01}}
  quantize: {class_path: RTN, init_args: {bits: 4}}
"""
EMPTY_TAGS = {"meta"}
LONG = "prune_" + 8 * "half_of_everything_"


class Reader(HTMLParser):
    """The page's text and attributes; a tag that is closed in the wrong place is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished ``fit`` and a finished ``order`` in which three of the orders cannot run."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        prepare(folder, monkeypatch)
        assert run("fit", "--config", "recipe.yaml", "--run_dir", "fit") == 0
        write_recipe(folder, {STAGES: WITH_FINETUNING, "evaluation: ": "train: train.npy, evaluation: "})
        assert run("order", "--config", "recipe.yaml", "--run_dir", "order") == 0
    return folder


@pytest.fixture
def fit(runs, tmp_path):
    return shutil.copytree(runs / "fit", tmp_path / "fit")


@pytest.fixture
def order(runs, tmp_path):
    return copied(runs / "order", tmp_path)


def copied(folder: Path, into: Path) -> Path:
    """A copy of a run; a search's keeps only what every search's records hold."""
    copied = shutil.copytree(folder, into / folder.name)
    if (copied / "order.json").is_file():
        report = records(copied)
        needed = ("status", "seed", "versions", "metric", "higher_is_better", "orders", "best", "advantage", "refused")
        needed += ("verdict",)
        report = {name: report[name] for name in needed}
        parts = ("order", "stages", "metrics", "size_bytes")
        report["orders"] = [{name: entry[name] for name in parts} for entry in report["orders"]]
        (copied / "order.json").write_text(json.dumps(report))
    return copied


def records(folder: Path, **changes) -> dict:
    """The records of a run, after changes."""
    path = next(folder / name for name in ("order.json", "report.json") if (folder / name).is_file())
    report = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(report))
    return report


def written(folder: Path) -> tuple[Reader, str]:
    """The page and the Markdown."""
    page, markdown = write_pages(folder)
    assert (page, markdown) == (folder / "report.html", folder / "report.md")
    return Reader(page.read_text(encoding="utf-8")), markdown.read_text(encoding="utf-8")


def searched(report: dict, lead: tuple | None = None, pairs: tuple | None = None) -> dict:
    """The new form of ``order.json``: intervals, the best order's lead, marks and notes."""
    report = copy.deepcopy(report)
    for entry in report["orders"]:
        value = entry["metrics"][report["metric"]]
        entry["interval"] = [value - 60, value + 60]
    report["orders"][-1]["marks"] = ["other size than the best: 156.5 MB"]
    report |= {"strategy": "exhaustive", "notes": ["Intervals are of 4 samples."], "hardware": {"threads": 7}}
    if lead:
        report["lead"] = {
            "over": report["orders"][1]["order"],
            **dict(zip(("value", "low", "high"), lead, strict=True)),
        }
    value, low, high = pairs or (1.5, -0.5, 3.5)
    report["advantage"] = {
        "prune->tune": {"value": value, "low": low, "high": high},
        "tune->prune": {"value": -value, "low": None if high is None else -high, "high": None if low is None else -low},
    }
    return report


# What the page says


def test_the_page_of_a_fit_holds_the_records(fit):
    page, markdown = written(fit)
    assert "2.44x smaller, perplexity from 306.63 to 307.66." in page.text
    assert "quantize (RTN) 307.66 50.0% (32.8%) 3.22 (13.13) 16.00x 184.6 kB 2.44x" in page.text
    assert "| quantize (RTN) | 307.66 | 50.0% (32.8%) | 3.22 (13.13) | 16.00x | 184.6 kB | 2.44x |" in markdown
    assert "cover 66% of the parameters; left: embeddings 17%, output head 17%." in page.text
    on_disk = human_bytes(RunFolder(fit).model_bytes())
    for text in (page.text, markdown):
        assert "CausalLM, TokenData" in text
        assert f"{on_disk} on disk (184.6 kB counted)" in text
        assert "model.model.layers.1.mlp.down" in text.replace("\\", "")
        assert f"pqqp-lightning fit --config {fit}/recipe.yaml --run_dir {fit}-again" in text
        assert "torchmetrics" in text
    recipe = (fit / "recipe.yaml").read_text().strip()
    assert " ".join(recipe.split()) in page.text
    assert f"```yaml\n{recipe}\n```" in markdown
    assert page.attributes.count(("class", "line")) == 2  # in light and in dark
    assert page.attributes.count(("class", "bar")) == 2 * 4


@pytest.mark.parametrize("form", ["with numbers alone", "with intervals"])
def test_the_page_of_a_search_holds_the_records(form, order):
    report = records(order)
    if form == "with numbers alone":
        values = {"prune->tune": 6.295, "tune->prune": -6.295}
        report["advantage"] = {pair: {"value": value, "low": None, "high": None} for pair, value in values.items()}
    if form == "with intervals":
        report = searched(report, lead=(8.15, 2.25, 14.5), pairs=(6.295, 1.125, 9.75))
    records(order, **report)
    page, markdown = written(order)
    for entry in report["orders"]:
        assert f"{' → '.join(entry['order'])}" in page.text
        assert f"| {' → '.join(entry['order'])} | " in markdown.replace("**", "").replace(" (best)", "")
        assert f"{entry['metrics']['perplexity']:.2f}" in page.text
    for text in (page.text, markdown):
        text = text.replace(" | ", " ")
        assert "dense model's perplexity is 306.63." in text
        assert "3 cannot run" in text
        assert "prune → quantize → tune; quantize → prune → tune; quantize → tune → prune" in text
        assert "off the grid of stage 'quantize'" in text
        assert "prune → tune" in text
        assert "perplexity 307.54 before finetuning, 309.54 after." in text
        assert ("A(prune → tune) +6.295" in text) != ("A(tune → prune)" in text)
    if form == "with intervals":
        assert "6.295 +1.125 to +9.75 prune first is better" in page.text
        assert "other size than the best: 156.5 MB" in page.text
        assert "Exhaustive search: 3 orders, 3 cannot run" in page.text
        assert "Intervals are of 4 samples." in page.text
        assert "threads 7" in page.text
        assert page.attributes.count(("class", "interval")) == 2 * 3
        assert page.attributes.count(("class", "hollow dot")) == 2


def test_what_the_search_says_itself_comes_first(order):
    report = searched(records(order), lead=(2.0, -1.0, 5.0))
    report["verdict"] = "prune -> tune -> quantize is best, by 2 (1 to 3)."
    report["hypothesis"] = {"order": report["orders"][1]["order"], "behind": {"value": 8.25, "low": 7.5, "high": 9.0}}
    report["orders"][1]["behind"] = {"value": 8.25, "low": 7.5, "high": 9.0}
    report["orders"][2]["behind"] = {"value": None, "low": None, "high": None}
    records(order, **report)
    page, _ = written(order)
    assert "prune → tune → quantize is best, by 2 (1 to 3)." in page.text
    behind = "8.2500 (7.5000 to 9.0000)"
    assert f"strongest last (tune → prune → quantize) is behind the best by {behind} in perplexity." in page.text
    assert f"tune → prune → quantize {behind}" in page.text
    assert page.attributes.count(("class", "interval")) == 2 * (3 + 1)
    records(order, hypothesis={"order": report["best"], "behind": {"value": 0.0, "low": 0.0, "high": 0.0}})
    assert "strongest last (prune → tune → quantize) is the best." in written(order)[0].text


def test_a_run_from_python_has_no_recipe_to_show_but_its_stages(tmp_path):
    trainer(tmp_path / "run", Magnitude(0.5), RTN(4)).fit(Regressor(), datamodule=RegressionData())
    page, markdown = written(tmp_path / "run")
    assert "Regressor, RegressionData" in page.text
    assert "sparsity: 0.5" in page.text
    assert "without a recipe.yaml" in markdown
    assert "pqqp-lightning fit" not in page.text


# Any run


def many_stages(fit: Path) -> None:
    stages = records(fit)["stages"]
    stages = [copy.deepcopy(stages[min(i, 2)]) for i in range(10)]
    for i, stage in enumerate(stages):
        stage["metrics"] = {"perplexity": None if i == 4 else 14.69 * 4.0**i, "top1": 0.9 - i / 20}
    records(fit, status="failed", stages=stages, checkpoint=None, layers=[])


def first_stages(count: int, status: str):
    def change(fit: Path) -> None:
        report = records(fit, status=status, stages=records(fit)["stages"][:count])
        if status != "finished":
            records(fit, checkpoint=None, layers=report["layers"][:0])

    return change


def no_metric(fit: Path) -> None:
    stages = records(fit)["stages"]
    for stage in stages:
        stage["metrics"] = {"perplexity": None}
    records(fit, stages=stages)


def all_orders_of_four(order: Path) -> None:
    report = records(order)
    names = [LONG, "a" * 90, "quantize", "tune"]
    entries = []
    for place, chosen in enumerate(permutations(names)):
        entry = copy.deepcopy(report["orders"][0])
        entry["order"] = list(chosen)
        entry["stages"] = [*entry["stages"], copy.deepcopy(entry["stages"][-1])]
        for name, stage in zip(("dense", *chosen), entry["stages"], strict=True):
            stage["name"] = name
        entry["metrics"] = {"perplexity": 300.0 + place}
        entries.append(entry)
    report |= {"orders": entries, "best": entries[0]["order"]}
    report["verdict"] = f"{' -> '.join(report['best'])} is best."
    records(order, **searched(report, lead=(0.5, 0.25, 0.75)))


def one_order(order: Path) -> None:
    done = records(order)["orders"][:1]
    advantage = {"prune->tune": {"value": None, "low": None, "high": None}}
    records(order, orders=done, best=done[0]["order"], advantage=advantage, refused=[])


def nothing_but_overflow(order: Path) -> None:
    report = records(order)
    for entry in report["orders"]:
        entry["metrics"], entry["interval"], entry["behind"] = {"perplexity": 1.797e308}, None, None
    records(order, orders=report["orders"], verdict="Nothing is left.", hypothesis=None)


ODD = {
    "a fit of nothing": ("fit", first_stages(0, "failed"), "Nothing was measured."),
    "a fit without stages": ("fit", first_stages(1, "finished"), "The dense model: 449.8 kB, perplexity 306.63."),
    "a fit that goes on": (
        "fit",
        first_stages(2, "running"),
        "So far 1.44x smaller, perplexity from 306.63 to 307.54.",
    ),
    "a fit that failed after nine stages": (
        "fit",
        many_stages,
        "So far 2.44x smaller, perplexity from 14.69 to 3850895",
    ),
    "a fit whose metric is never finite": ("fit", no_metric, "2.44x smaller, perplexity from - to -."),
    "twenty-four orders of long names": ("order", all_orders_of_four, f"{LONG} → aaa"),
    "one order": ("order", one_order, "prune → tune → quantize (perplexity 308.7) is best"),
    "perplexities that overflow": ("order", nothing_but_overflow, "Nothing is left."),
}


@pytest.fixture(params=ODD)
def odd(request, tmp_path, runs):
    """A run folder that is unlike most, and its verdict."""
    kind, change, verdict = ODD[request.param]
    folder = copied(runs / kind, tmp_path)
    change(folder)
    return folder, verdict


def test_any_run_has_a_whole_page(odd, capsys):
    folder, verdict = odd
    assert run("report", str(folder)) == 0
    assert f"{folder}/report.html" in capsys.readouterr().out
    page = Reader((folder / "report.html").read_text())
    assert verdict in page.text
    drawn = [value for name, value in page.attributes if name in ("x", "y", "width")]
    assert not [value for value in drawn if not re.fullmatch(r"-?[0-9.]+", value or "")]
    shown = page.text.partition("Run it again")[0] + " ".join(value for name, value in page.attributes if name == "d")
    assert not re.search(r"\b(None|nan|inf|null)\b", shown)
    assert ("Resume with --ckpt_path last" in page.text) == (records(folder)["status"] != "finished")


def test_nothing_comes_from_elsewhere(fit, order):
    records(order, **searched(records(order), lead=(0.5, 0.25, 0.75)))
    for folder in (fit, order):
        page, _ = written(folder)
        assert not {"script", "link", "img", "iframe", "object", "image", "base", "a"} & set(page.tags)
        assert not {"src", "href", "action", "data"} & {name for name, _ in page.attributes}
        assert all(value.startswith("#") for name, value in page.attributes if name == "xlink:href")
        assert not re.search(r"https?:|//|url\([^#]|@import", (folder / "report.html").read_text())


def test_names_and_notes_are_escaped(order):
    report = searched(records(order), lead=(0.5, 0.25, 0.75))
    odd = "<script>alert(1)</script>"
    text = json.dumps(report).replace("prune", f"{odd} | `x` *b*")
    report = json.loads(text)
    report["notes"] = [f"{odd} & more"]
    report["orders"][0]["marks"] = [f'" onload="{odd}']
    records(order, **report)
    page, markdown = written(order)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert f"{odd} & more" in page.text
    assert f"{odd} | `x` *b* → tune → quantize" in page.text
    assert r"&lt;script>alert(1)&lt;/script> \| \`x\` \*b\* → tune → quantize" in markdown
    rows = [line.replace(r"\|", "") for line in markdown.splitlines() if line.startswith("| ")]
    assert len({row.count("|") for row in rows if "tune" in row and "%" in row}) == 1
    assert "<script" not in markdown


def test_a_fence_is_longer_than_what_it_holds(fit):
    (fit / "recipe.yaml").write_text("````")
    _, markdown = written(fit)
    assert "`````yaml\n````\n`````" in markdown


def test_the_command_line_is_quoted(fit):
    folder = fit.rename(fit.with_name("my run"))
    page, _ = written(folder)
    assert f"--config '{folder}/recipe.yaml' --run_dir '{folder}-again'" in page.text


def test_the_shown_command_line_repeats_the_run(runs, fit, monkeypatch):
    monkeypatch.chdir(runs)
    page, _ = written(fit)
    arguments = re.search(r"pqqp-lightning (fit --config \S+ --run_dir \S+)", page.text)[1].split()
    assert run(*arguments) == 0
    again = json.loads((fit.with_name("fit-again") / "report.json").read_text())
    assert [s["metrics"] for s in again["stages"]] == [s["metrics"] for s in records(fit)["stages"]]


def test_the_terminal_shows_the_summary_and_the_verdict_last(fit, order, capsys):
    print_page(read_page(fit))
    shown = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in shown[1].strip("┃").split("┃")] == [
        *("stage", "perplexity", "zeros (model)", "bits/weight (model)", "nominal C", "size", "C", "seconds"),
    ]
    assert shown[-1] == "2.44x smaller, perplexity from 306.63 to 307.66."
    print_page(read_page(order))
    shown = capsys.readouterr().out
    assert "prune -> tune -> quantize (best)" in shown
    assert "→" not in shown
    assert "off the grid of stage 'quantize'" in shown
    assert "behind the best" not in shown


def test_the_recipe_in_the_page_is_whole(order):
    page = (write_pages(order)[0]).read_text()
    shown = html.unescape(re.search(r"<code>(# lightning.*?)</code>", page, re.S)[1])
    assert yaml.safe_load(shown) == yaml.safe_load((order / "recipe.yaml").read_text())


# In a browser

CHROMIUM = shutil.which("chromium")
MEASURE = """
const page = document.querySelector("iframe").contentDocument;
page.querySelectorAll("details").forEach(details => details.open = true);
const root = page.documentElement;
const shown = page.querySelectorAll("svg text, h1, h2, p, li, span:not(.scroll span)");
const outside = [...shown].filter(element => {
  const box = element.getBoundingClientRect();
  return box.left < 0 || box.right > root.clientWidth;
});
document.title = encodeURIComponent(JSON.stringify({
  width: root.clientWidth,
  content: root.scrollWidth,
  outside: outside.map(element => element.textContent),
  background: frames[0].getComputedStyle(page.body).backgroundColor,
  figures: [...page.querySelectorAll("figure > div")].filter(f => f.clientHeight).map(f => f.className),
}));
"""


def browse(page: str, folder: Path, width: int, dark: bool = False) -> dict:
    """What a browser makes of the page in a frame that is ``width`` wide (its own windows are never that narrow)."""
    frame = f'<iframe style="width: {width}px; height: 812px; border: 0" srcdoc="{html.escape(page)}"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html>{frame}<script>onload = () => {{ {MEASURE} }}</script>")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--dump-dom",
    ]
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    profile = f"--user-data-dir={folder / 'profile'}"
    address = (folder / "frame.html").as_uri()
    done = subprocess.run(
        [*command, *quiet, theme, profile, "--window-size=1400,900", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search("<title>(.*?)</title>", done.stdout.rpartition("</iframe>")[0] or done.stdout)
    assert found, done.stdout[-500:] + done.stderr
    return json.loads(unquote(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH")
def test_a_phone_shows_any_page_without_scrolling_sideways(odd, tmp_path):
    seen = browse(to_html(read_page(odd[0])), tmp_path, width=375)
    assert (seen["width"], seen["outside"]) == (375, [])
    assert seen["content"] <= 375


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH")
def test_the_page_is_light_or_dark_as_its_reader_likes(fit, tmp_path):
    page = to_html(read_page(fit))
    light, dark = (browse(page, tmp_path, width=1280, dark=dark) for dark in (False, True))
    assert light["background"] == "rgb(255, 255, 255)"
    assert dark["background"] == "rgb(15, 20, 25)"
    assert set(light["figures"]) == {"light"}
    assert set(dark["figures"]) == {"dark"}
    assert light["content"] <= light["width"]
