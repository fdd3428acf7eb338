"""The figures of reports: what is drawn of which numbers, in colours that can be read, the same bytes each time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pqqp_lightning.report import basic_figures
from pqqp_lightning.report.blocks import Page
from pqqp_lightning.report.figure_style import DARK, LIGHT, styled
from pqqp_lightning.report.figures import DRAW, draw_png, draw_svg
from pqqp_lightning.report.html import to_html
from pqqp_lightning.report.plots import Bar, BarPlot, Dot, DotPlot, Line, LinePlot, is_logarithmic

DOTS = DotPlot([Dot("a", None), Dot("b", 1.0, None, 2.0), Dot("c", 2.0, 1.0, 3.0)])
BARS = BarPlot([Bar("whole", "4 B", 4), Bar("half", "2 B", 2), Bar("none", "0 B", 0, other=True)])
STYLE = to_html(Page("", "", "")).partition("</style>")[0]
LINES = LinePlot([Line("a", [1.0, None, 3.0, 4.0], best=True)], ["w", "x", "y", "z"])


def drawn(plot, style=LIGHT):
    """The figure as matplotlib has it."""
    with styled(style):
        return DRAW[type(plot)](plot, style)


def ticks(values):
    """The numbers beside the axis of dots with these values."""
    (axes,) = drawn(DotPlot([Dot("", value) for value in values])).axes
    low, high = axes.get_xlim()
    return [tick for tick in axes.get_xticks() if low <= tick <= high]


def test_an_axis_has_a_few_round_values_and_holds_all():
    for values in (
        [306.63, 307.66],
        [0.0, 1.0],
        [14.69, 27.2],
        [-3.0, 5.0],
        [5.0, 5.0],
        [0.0],
        [1e-9, 2e-9],
        [1, 1e30],
    ):
        assert 2 <= len(ticks(values)) <= 8, values
        (axes,) = drawn(DotPlot([Dot("", value) for value in values])).axes
        assert axes.get_xlim()[0] < min(values) <= max(values) < axes.get_xlim()[1]
    assert is_logarithmic([1.0, 100.0])
    assert not is_logarithmic([-1.0, 100.0])
    assert not is_logarithmic([None, float("nan")])


def test_what_is_not_finite_is_left_out():
    dots = draw_svg(DOTS, LIGHT, "")
    assert (dots.count('class="dot"'), dots.count('class="interval"')) == (2, 1)
    (axes,) = drawn(LINES).axes
    (line,) = axes.get_lines()
    assert [str(value) for value in line.get_ydata()] == ["1.0", "nan", "3.0", "4.0"]
    assert [text.get_text() for text in axes.texts] == ["1.0000", "3.0000", "4.0000"]
    overflow = DotPlot([Dot("a", 1.797e308), Dot("b", float("inf"))])
    assert 'class="dot"' not in draw_svg(overflow, LIGHT, "")


def test_bars_are_as_long_as_their_amounts():
    (axes,) = drawn(BARS).axes
    assert [bar.get_width() for bar in axes.patches] == [4, 2, 0]
    assert axes.get_xlim() == (0, 4)


def test_names_are_text_and_no_formulas():
    svg = draw_svg(BarPlot([Bar("<b> $x_1$ & y", "1 B", 1)]), LIGHT, "")
    assert "&lt;b&gt; $x_1$ &amp; y</text>" in svg


def test_long_names_are_wrapped():
    (axes,) = drawn(BarPlot([Bar(20 * "half_of_everything ", "1 B", 1)])).axes
    assert max(len(text.get_text()) for text in axes.texts) <= basic_figures.LABEL


@pytest.mark.parametrize("plot", [DOTS, BARS, LINES], ids=["dots", "bars", "lines"])
def test_a_figure_is_the_same_bytes_each_time_and_two_share_no_ids(plot, tmp_path: Path):
    assert draw_svg(plot, DARK, "3") == draw_svg(plot, DARK, "3")
    ids = [re.findall(r' id="([^"]*)"', draw_svg(plot, style, salt)) for style, salt in ((LIGHT, "1"), (DARK, "2"))]
    assert not set(ids[0]) & set(ids[1])
    for name in ("a.png", "b.png"):
        draw_png(plot, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_enough_contrast(theme):
    style = STYLE
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+)", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    colours = light if theme == "light" else light | dark
    drawn = LIGHT if theme == "light" else DARK
    for name in ("page", "text", "quiet", "rule", "accent", "other"):
        assert whole(colours[name]) == getattr(drawn, name)  # figures and page have the same colours
    assert min(contrast(colour, drawn.page) for colour in drawn.palette) >= 2
    for front, back, least in [
        ("text", "page", 7),
        ("text", "tint", 7),
        ("text", "panel", 7),
        ("quiet", "page", 4.5),
        ("accent", "page", 4.5),
        ("warn", "warn-page", 4.5),
        ("other", "page", 3),
    ]:
        assert contrast(colours[front], colours[back]) >= least, (front, back)


def contrast(a: str, b: str) -> float:
    """Of two colours as WCAG 2 defines it."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def whole(colour: str) -> str:
    """``#fff`` as ``#ffffff``."""
    return colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])


def luminance(colour: str) -> float:
    digits = whole(colour).lstrip("#")
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
