"""The address of a result: whatever decides the numbers changes it, and nothing else does."""

import sys
from importlib import import_module, invalidate_caches

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from tiny import Regressor, regression_data, regression_loader, trainer
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from pqqp_lightning.callbacks import RTN, Finetune, Magnitude
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.trials.fingerprint import digest_of
from pqqp_lightning.trials.prefix_tree import PrefixTree

STAGE = """\
import torch
from pqqp_lightning.stages import OneShotPruning

def scores(weight):
    return weight.abs()

class _Beside(OneShotPruning):
    source = "here"
    def __init__(self, sparsity=0.5, amount=1.0, **kwargs):
        super().__init__(sparsity, **kwargs)
        self._amount = amount
"""
NETWORK = """\
import torch
from tiny import Regressor

class Net(torch.nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x))

class Module(Regressor):
    def __init__(self):
        super().__init__()
        self.head = Net(8, 2)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def defined(folder, text, name):
    """A class from a file that may have held something else before."""
    (folder / "file_of_mine.py").write_text(text)
    sys.modules.pop("file_of_mine", None)
    invalidate_caches()
    return getattr(import_module("file_of_mine"), name)


def keys(folder, stages, module=None, loader=None, **options):
    """The addresses of the dense model and of all ``stages`` in turn."""
    engine = trainer(folder / "run", *stages, **options)
    source = RunData(module or Regressor(), loader or regression_loader(), regression_loader(16, seed=1))
    tree = PrefixTree(engine, source, {stage.name: stage for stage in stages}, ResultStore(folder / "store"))
    tree.identify()
    return tree.key(()), tree.key(tuple(stage.name for stage in stages))


def test_the_same_again_has_the_same_address(folder):
    stages = [Magnitude(0.5), Finetune(epochs=1)]
    assert keys(folder, stages) == keys(folder, [Magnitude(sparsity=0.5), Finetune(epochs=1)])
    assert keys(folder, stages) == keys(folder, stages, enable_progress_bar=True)


@pytest.mark.parametrize(
    "change",
    [
        {"module": lambda: Regressor(lr=0.5)},
        {"module": lambda: Regressor(optimizer=torch.optim.AdamW, lr=0.05)},
        {"module": lambda: Regressor(schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))},
        {"max_steps": 3},
        {"gradient_clip_algorithm": "value"},
        {"callbacks": lambda: [EarlyStopping("mse")]},
        {"loader": lambda: regression_loader(batch_size=4)},
        {"loader": lambda: regression_loader(shuffle=True)},
        {"loader": lambda: DataLoader(regression_data(24), 8, collate_fn=mixed)},
        {"loader": lambda: regression_loader(seed=2)},
    ],
)
def test_what_decides_the_training_counts_where_something_is_trained(folder, change):
    change = {name: value() if callable(value) else value for name, value in change.items()}
    plain, tuned = [Magnitude(0.5)], [Magnitude(0.5), Finetune(epochs=1)]
    assert keys(folder, tuned)[1] != keys(folder, tuned, **change)[1]
    if not {"loader", "module"} & change.keys():  # calibrated on; and a number of the model may decide what it computes
        assert keys(folder, tuned)[0] == keys(folder, tuned, **change)[0]
        assert keys(folder, plain) == keys(folder, plain, **change)


def mixed(rows):
    x, y = torch.utils.data.default_collate(rows)
    return x + x.flip(0), y


def test_a_function_beside_the_stage_counts(folder):
    before = keys(folder, [defined(folder, STAGE, "_Beside")()])
    after = keys(folder, [defined(folder, STAGE.replace("abs()", "square()"), "_Beside")()])
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_the_code_of_a_network_inside_counts(folder):
    modules, found = [], []
    for activation in ("relu", "tanh"):
        modules.append(defined(folder, NETWORK.replace("relu", activation), "Module")())
        found.append(keys(folder, [RTN()], modules[-1])[0])
    first, second = (module.state_dict() for module in modules)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert found[0] != found[1]


SLOPE = """\
import torch
from tiny import Regressor

class Leaky(Regressor):
    def __init__(self, slope=0.01, path="/somewhere"):
        super().__init__()
        self.slope, self.path = slope, path

    def forward(self, x):
        return torch.nn.functional.leaky_relu(super().forward(x), self.slope)
"""


def test_a_number_that_no_hyperparameter_records_counts(folder):
    leaky = defined(folder, SLOPE, "Leaky")
    assert keys(folder, [RTN()], leaky()) != keys(folder, [RTN()], leaky(slope=0.3))
    assert keys(folder, [RTN()], leaky()) == keys(folder, [RTN()], leaky(path="/elsewhere"))


def test_an_argument_that_is_kept_under_another_name_counts(folder):
    cls = defined(folder, STAGE, "_Beside")
    assert keys(folder, [cls(amount=0.1)])[1] != keys(folder, [cls(amount=0.9)])[1]


def test_digests_of_values_keep_borders_kinds_and_contents_apart():
    long = torch.zeros(5000)
    other = long.index_fill(0, torch.tensor([2500]), 1.0)
    values = [["ab", "c"], ["a", "bc"], ("ab", "c"), {"ab": "c"}, [["ab"], "c"], 1, 1.0, "1", True, None, [], {}]
    values += [BatchEncoding({"x": long}), BatchEncoding({"x": other}), {"x": long}, mixed, lambda x: x, lambda x: -x]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({1, 2, 3}) == digest_of({3, 2, 1})
    assert digest_of(Loop()) == digest_of(Loop())


class Loop:
    """Holds itself."""

    def __init__(self):
        self.itself = self
