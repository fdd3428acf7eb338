"""Writes a page as HTML: one file with its style and figures, without network or script."""

from __future__ import annotations

from itertools import count

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from pqqp_lightning.report.blocks import Page
from pqqp_lightning.report.plots import Plot

TEMPLATE = "report.html"


def to_html(page: Page) -> str:
    """The whole page as HTML; all text is escaped."""
    from pqqp_lightning.report.figure_style import DARK, LIGHT  # importing matplotlib takes a second
    from pqqp_lightning.report.figures import draw_svg

    number = count()

    def draw(plot: Plot) -> Markup:
        """Both versions of a figure, light and dark; the page's style shows one of them."""
        place = next(number)
        drawn = [draw_svg(plot, style, f"{style.name}-{place}") for style in (LIGHT, DARK)]
        return Markup('<div class="light">{}</div><div class="dark">{}</div>').format(*map(Markup, drawn))

    templates = Environment(
        loader=PackageLoader("pqqp_lightning.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template(TEMPLATE).render(page=page, draw=draw)
