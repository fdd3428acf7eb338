"""Joint compression of single layers: SparseGPT then GPTQ, polished, and OBR's published rule beside them.

    PQQP_DATA=... python benchmarks/joint.py [--blocks 4 14 24] [--windows 32]

OBR (Guo et al., arXiv 2509.11177) is written here from the paper and its published code, and is no part of the package.
What is compared is tr((V - W) H (V - W)^T), the squared error of a layer's outputs, on the windows that every method
calibrates on and on evaluation windows that none has seen. All layers get the dense model's inputs.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from pqqp_lightning.algorithms.alps import damp, prune_alps
from pqqp_lightning.algorithms.gptq import quantize_gptq
from pqqp_lightning.algorithms.grid import Quantized, fit_grid
from pqqp_lightning.algorithms.hessian import add_gram, factorize_inverse, mirror_upper_triangle
from pqqp_lightning.algorithms.polish import damped_hessian, objective, polish
from pqqp_lightning.algorithms.selection import keep_highest
from pqqp_lightning.algorithms.sparsegpt import Pruned, prune_sparsegpt
from pqqp_lightning.algorithms.wanda import scores_wanda
from pqqp_lightning.data import TokenData
from pqqp_lightning.models import CausalLM

TOKENS = "$PQQP_DATA/smollm2-135m-tokens"
SETTINGS = ((0.5, 4), (0.5, 3), (0.7, 4), (0.7, 3))
DAMPING = 0.01

PASSED_ON = 0.5
"""OBR's alpha: the share of the columns whose rounding errors the columns after them make up for at once."""

SHRINK_STEPS = 80
"""OBR's scale search: ranges of 1, 0.99, ... 0.21 times the largest weight."""

SEARCH_NORM = 2.4
"""Exponent of the error that OBR's scale search minimizes."""


@dataclass(eq=False)  # so that it can be a key of the caches
class Layer:
    """A layer, with X^T X of its inputs on the calibration and on the evaluation windows.

    Attributes:
        name: the layer's.
        weight: dense [O, I].
        calibration: [I, I]; what every method sees.
        evaluation: [I, I].
    """

    name: str
    weight: Tensor
    calibration: Tensor
    evaluation: Tensor

    @cached_property
    def damped(self) -> Tensor:
        """H with damping [I, I]."""
        return damped_hessian(self.calibration, DAMPING)

    @cache  # noqa: B019 - the layers live as long as the program
    def sparsegpt(self, sparsity: float) -> Pruned:
        """SparseGPT's weights and mask."""
        return prune_sparsegpt(self.weight, self.calibration, sparsity=sparsity)

    @cache  # noqa: B019
    def alps(self, sparsity: float) -> Pruned:
        """ALPS's weights and mask."""
        return prune_alps(self.weight, damp(self.calibration, DAMPING), sparsity=sparsity)

    @cache  # noqa: B019
    def wanda(self, sparsity: float) -> Pruned:
        """Wanda's mask, and OBR's update for it: -H_RR^-1 H_RE e_E, where E are the pruned entries of a row."""
        mask = keep_highest(scores_wanda(self.weight, self.calibration.diagonal().sqrt()), sparsity=sparsity)
        updated = torch.zeros_like(self.weight)
        for row, kept in enumerate(mask):
            retained = kept.nonzero().squeeze(1)
            evicted = (~kept).nonzero().squeeze(1)
            rows = self.damped[retained]
            update = _solve(rows[:, retained], rows[:, evicted] @ self.weight[row, evicted])
            updated[row, retained] = self.weight[row, retained] + update
        return Pruned(updated, mask)


def obr(layer: Layer, sparsity: float, bits: int) -> Tensor:
    """OBR with GPTQ as published: one scale for each row, searched on the dense weights."""
    return obr_on(layer, sparsity, bits, _searched_scale(layer.weight, bits))


def obr_fitted(layer: Layer, sparsity: float, bits: int) -> Tensor:
    """OBR with the scales that this project's GPTQ would take."""
    importance = factorize_inverse(layer.calibration, DAMPING).factor.diagonal().pow(-2)
    grid = fit_grid(layer.wanda(sparsity).weight, bits, clip=True, importance=importance)
    return obr_on(layer, sparsity, bits, grid.scale.float())


def obr_on(layer: Layer, sparsity: float, bits: int, scale: Tensor) -> Tensor:
    """OBR's rounding: errors of the first half of the columns are passed on at once, those of the second by a sweep.

    Args:
        layer: whose update for Wanda's mask is taken.
        sparsity: of every row.
        bits: of a symmetric grid.
        scale: of each row [O, 1].
    """
    weight, mask = layer.wanda(sparsity).weight, layer.wanda(sparsity).mask
    half = int(weight.shape[1] * PASSED_ON)
    restored = weight.clone()
    errors = weight - _rounded(weight, scale, bits)
    for row, kept in enumerate(mask):
        retained = kept.nonzero().squeeze(1)
        first, second = retained[retained < half], retained[retained >= half]
        rows = layer.damped[second]
        restored[row, second] += _solve(rows[:, second], rows[:, first] @ errors[row, first])
    # The sweep of GPTQ over the second half: the factor of the inverse that belongs to these columns alone.
    later = torch.linalg.cholesky(layer.damped[half:, half:])
    factor = torch.linalg.cholesky(torch.cholesky_inverse(later), upper=True)
    swept = restored[:, half:].clone()
    for column in range(swept.shape[1]):
        decided = _rounded(swept[:, column], scale[:, 0], bits) * mask[:, half + column]
        error = (swept[:, column] - decided) / factor[column, column]
        swept[:, column:] -= torch.outer(error, factor[column, column:])
        swept[:, column] = decided
    return torch.cat([_rounded(restored[:, :half], scale, bits), swept], dim=1)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right[:, None], torch.linalg.cholesky(matrix)).squeeze(1)


def _rounded(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """On the levels -2^(b-1) to 2^(b-1) - 1 times ``scale``."""
    top = 2 ** (bits - 1) - 1
    return (values / scale).round().clamp(-top - 1, top) * scale


def _searched_scale(weight: Tensor, bits: int) -> Tensor:
    """The scale of each row, [O, 1], whose rounding changes the dense weights least."""
    largest = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    best, least = largest, torch.full_like(largest, torch.inf)
    for step in range(SHRINK_STEPS):
        scale = largest * (1 - step / 100)
        error = (_rounded(weight, scale, bits) - weight).abs().pow(SEARCH_NORM).sum(1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(least, error)
    return best


def gptq(layer: Layer, pruned: Pruned, bits: int) -> Quantized:
    """GPTQ with the search of the range, one scale for each row."""
    return quantize_gptq(pruned.weight, layer.calibration, bits=bits, clip=True, mask=pruned.mask)


def polished(layer: Layer, pruned: Pruned, bits: int) -> Tensor:
    """GPTQ, then Polish with its defaults."""
    quantized = gptq(layer, pruned, bits)
    return polish(quantized.weight, layer.weight, layer.damped, quantized.grid, pruned.mask).weight


METHODS: dict[str, Callable[[Layer, float, int], Tensor]] = {
    "OBR": obr,
    "OBR, GPTQ's scales": obr_fitted,
    "Wanda and refit, GPTQ, Polish": lambda layer, sparsity, bits: polished(layer, layer.wanda(sparsity), bits),
    "SparseGPT, GPTQ, Polish": lambda layer, sparsity, bits: polished(layer, layer.sparsegpt(sparsity), bits),
    "ALPS, GPTQ, Polish": lambda layer, sparsity, bits: polished(layer, layer.alps(sparsity), bits),
}
"""All are compared with SparseGPT and GPTQ."""


def collect(module: CausalLM, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """X^T X of the inputs of the layers ``names``, over all windows of ``tokens``."""
    totals: dict[str, Tensor] = {}
    handles = []
    for name in names:
        layer = module.get_submodule(name)
        totals[name] = torch.zeros(layer.weight.shape[1], layer.weight.shape[1])

        def add(_: object, args: tuple[Tensor, ...], name: str = name) -> None:
            add_gram(totals[name], args[0].flatten(0, 1))

        handles.append(layer.register_forward_pre_hook(add))
    with torch.no_grad():
        for window in tokens.split(4):
            module(window)
    for handle in handles:
        handle.remove()
    for total in totals.values():
        mirror_upper_triangle(total)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 14, 24])
    parser.add_argument("--windows", type=int, default=32)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    module = CausalLM("smollm2-135m").eval()
    data = TokenData(f"{TOKENS}/calibration.npy", f"{TOKENS}/evaluation.npy")
    data.setup("validate")
    last = max(options.blocks)
    module.model.model.layers = module.model.model.layers[: last + 1]  # the later blocks are not needed
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"model.model.layers.{block}.{part}" for block in options.blocks for part in parts]
    loaders = (data.calibration_dataloader(), data.val_dataloader())
    windows = [torch.cat([batch["input_ids"] for batch in loader])[: options.windows] for loader in loaders]
    calibration, evaluation = (collect(module, tokens, names) for tokens in windows)
    layers = [
        Layer(name, module.get_submodule(name).weight.detach(), calibration[name], evaluation[name]) for name in names
    ]
    print(f"{len(layers)} layers of blocks {options.blocks}, {options.windows} windows; errors by SparseGPT -> GPTQ's")
    for sparsity, bits in SETTINGS:
        bases = [gptq(layer, layer.sparsegpt(sparsity), bits).weight for layer in layers]
        for method, compress in METHODS.items():
            compressed = [compress(layer, sparsity, bits) for layer in layers]
            line = f"{sparsity:.0%} {bits} bits  {method:30}"
            for of in ("calibration", "evaluation"):
                ratios = []
                for layer, weight, base in zip(layers, compressed, bases, strict=True):
                    hessian = getattr(layer, of)
                    ratios.append(objective(weight, layer.weight, hessian) / objective(base, layer.weight, hessian))
                line += f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})   "
            print(line.rstrip(), flush=True)


if __name__ == "__main__":
    main()
