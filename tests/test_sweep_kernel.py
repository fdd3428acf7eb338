"""The column sweep's GPU kernel against the sweep tensor by tensor; on the CPU in Triton's interpreter."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from pqqp_lightning import algorithms
from pqqp_lightning.algorithms import column_sweep as sweep
from pqqp_lightning.algorithms.gptq import quantize_gptq
from pqqp_lightning.algorithms.grid import ColumnGrid, fit_grid
from pqqp_lightning.algorithms.hessian import factorize_inverse
from pqqp_lightning.algorithms.sparsegpt import prune_sparsegpt

pytest.importorskip("triton", reason="torch came without Triton on this platform")
ROWS, COLUMNS = 70, 96  # more rows than a program has, and not a multiple
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = {
    "none": None,
    "rows": {"bits": 4},
    "asymmetric": {"bits": 3, "symmetric": False},
    "groups": {"bits": 3, "group_size": 16},
    "asymmetric groups": {"bits": 2, "symmetric": False, "group_size": 24},
    "matrix": {"bits": 4, "per_tensor": True},
    "asymmetric matrix": {"bits": 4, "per_tensor": True, "symmetric": False},
}


@pytest.fixture
def kernel(monkeypatch):
    """The module of the kernel, interpreted where there is no GPU."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    name = "pqqp_lightning.algorithms.column_sweep_triton"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [O, I] and the Hessian of correlated inputs [I, I]."""
    torch.manual_seed(0)
    inputs = torch.randn(4 * COLUMNS, COLUMNS) @ torch.randn(COLUMNS, COLUMNS)
    return torch.randn(ROWS, COLUMNS, device=DEVICE), (inputs.T @ inputs).to(DEVICE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_a_step_is_what_it_is_tensor_by_tensor(kernel, layer, name, masked):
    weight, hessian = layer
    options = GRIDS[name]
    grid = None
    if options is not None:
        grid = ColumnGrid(COLUMNS, options.get("group_size"))
        grid.add(fit_grid(weight, **options))
    mask = torch.rand(COLUMNS, ROWS, device=DEVICE) > 0.5 if masked else None
    factor = factorize_inverse(hessian, 0.01).factor
    found = []
    for step in (kernel.sweep_step, sweep._sweep_step):
        columns, errors = weight.T.contiguous(), torch.zeros(64, ROWS, device=DEVICE)
        step(columns, factor, errors[8:], mask, grid, 32, 64)
        found.append((columns, errors))
    (columns, errors), (expected, expected_errors) = found
    torch.testing.assert_close(columns, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(errors, expected_errors, atol=1e-3, rtol=1e-3)
    assert not torch.equal(errors[8:40], torch.zeros_like(errors[8:40])) or (grid is None and mask is None)


@pytest.mark.parametrize("options", [{}, {"group_size": 16}, {"activation_order": True}, {"symmetric": False}], ids=str)
def test_both_methods_end_where_they_do_without_it(kernel, layer, monkeypatch, options):
    weight, hessian = layer

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        pruned = prune_sparsegpt(weight, hessian, sparsity=0.5)
        quantized = quantize_gptq(pruned.weight, hessian, bits=4, mask=pruned.mask, **options)
        again = prune_sparsegpt(quantized.weight, hessian, pattern=(1, 4), mask=pruned.mask, grid=quantized.grid)
        return pruned.weight, again.weight

    def with_step(step):
        monkeypatch.setattr(sweep, "step_for", lambda *_: step)
        return both()

    calls = []

    def counted(*arguments):
        calls.append(arguments)
        kernel.sweep_step(*arguments)

    for found, expected in zip(with_step(counted), with_step(sweep._sweep_step), strict=True):
        differ = (found - expected).abs() > 1e-3
        assert differ.float().mean() < 0.02, "beyond a few entries that sums in another order tip over"
    assert calls


@pytest.mark.skipif(DEVICE == "cpu", reason="asks which step a GPU gets")
def test_a_gpu_gets_the_kernel(kernel, layer):
    grid = ColumnGrid(COLUMNS, None)
    assert sweep.step_for(layer[0], grid).__module__ == kernel.__name__


def test_where_triton_cannot_build_it_the_sweep_goes_on_without(kernel, monkeypatch):
    def build():
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernel, "build", build)
    monkeypatch.setattr(algorithms, "sweep_kernel", kernel, raising=False)
    with pytest.warns(UserWarning, match="they run slower.*Failed to find C compiler"):
        assert sweep._kernel.__wrapped__() is None
