"""Draws the figure of an analysis: errors and interference by layer."""

from __future__ import annotations

from matplotlib.figure import Figure

from pqqp_lightning.report.analysis_numbers import interference, order_key
from pqqp_lightning.report.figure_style import SHAPES, WIDTH, Style, plain_text, rule_out, title_text
from pqqp_lightning.report.plots import LayerPlot


def draw_layers(plot: LayerPlot, style: Style) -> Figure:
    """Two panels over the layers in the order of the forward pass: errors above, interference below."""
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    layers = plot.report["layers"]
    keys = list(layers[0]["errors"])
    for i, key in enumerate(keys):
        values = [layer["errors"][key] or float("nan") for layer in layers]  # a logarithmic axis has no 0
        label = plain_text(key.replace("->", " → "))
        above.plot(values, SHAPES[i], markersize=3, color=style.palette[i], label=label)
    above.set_yscale("log")
    above.set_ylabel("relative squared error")
    above.legend(fontsize=8)
    for i, order in enumerate(plot.report["orders"]):
        deltas = [interference(layer["errors"], order) for layer in layers]
        known = [float("nan") if delta is None else delta for delta in deltas]
        colour = style.palette[keys.index(order_key(order))]
        label = plain_text(f"Δ {' → '.join(order)}")
        below.plot(known, SHAPES[2 + i], markersize=3, color=colour, label=label)
    below.axhline(0, color=style.quiet, linewidth=0.8)
    below.set(xlabel="layer, from the input to the output", ylabel="interference Δ")
    below.legend(fontsize=8)
    for axes in (above, below):
        rule_out(axes, style)
    explained = "Errors e of the layers' outputs on the dense model's inputs, and Δ = e(both) - e(one) - e(other)"
    figure.suptitle(title_text(explained))
    return figure
