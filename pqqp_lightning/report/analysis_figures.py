"""The picture of an analysis: errors and interference, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pqqp_lightning.report.analysis import interference, order_key
from pqqp_lightning.report.sweep_figures import COLOURS, SHAPES, plain_text, save_figure


def draw(path: Path, report: dict[str, Any]) -> None:
    """Two panels over the layers in the order of the forward pass: errors above, interference below."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    layers = report["layers"]
    for i, key in enumerate(layers[0]["errors"]):
        values = [layer["errors"][key] or None for layer in layers]  # 0 has no place on a logarithmic axis
        above.plot(values, SHAPES[i], markersize=3, color=COLOURS[i], label=plain_text(key.replace("->", " → ")))
    above.set_yscale("log")
    above.set_ylabel("relative squared error")
    above.legend(fontsize=8)
    for i, order in enumerate(report["orders"]):
        deltas = [interference(layer["errors"], order) for layer in layers]
        colour = COLOURS[list(layers[0]["errors"]).index(order_key(order))]
        below.plot(deltas, SHAPES[2 + i], markersize=3, color=colour, label=plain_text(f"Δ {' → '.join(order)}"))
    below.axhline(0, color="black", linewidth=0.8)
    below.set(xlabel="layer, from the input to the output", ylabel="interference Δ")
    below.legend(fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.suptitle("Errors e of the layers' outputs on the dense model's inputs, and Δ = e(both) - e(one) - e(other)")
    save_figure(figure, path)
