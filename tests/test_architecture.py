"""Who may import whom, and that there are no cycles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pqqp_lightning"
LAYERS = {
    # a module may import modules of its own layer and of lower ones
    "errors": 0,
    "storage": 0,
    "memory": 0,
    "seeding": 0,
    "algorithms": 1,
    "modules": 2,
    "models": 3,
    "data": 3,
    "calibration": 4,
    "metrics": 4,
    "data_source": 4,
    "distillation": 4,
    "stage": 5,
    "pruning": 6,
    "quantization": 6,
    "second_order": 6,
    "allocation": 1,
    "sensitivity": 6,
    "one_shot": 6,
    "callbacks": 7,
    "hold": 6,
    "segment": 7,
    "bundle": 0,
    "spill": 0,
    "packed": 5,
    "checkpoint": 6,
    "record": 5,
    "report": 6,
    "page": 7,
    "runner": 8,
    "recipe_check": 8,
    "run": 9,
    "trainer": 10,
    "digest": 0,
    "fingerprint": 8,
    "results": 8,
    "layerwise": 6,
    "prefix_tree": 9,
    "prediction": 11,
    "prediction_report": 6,
    "analysis": 11,
    "analysis_report": 6,
    "analysis_figure": 11,
    "strategies": 10,
    "executor": 10,
    "executor_ray": 10,
    "ray_worker": 10,
    "verdict": 11,
    "repeats": 11,
    "order": 11,
    "sweep": 11,
    "hypothesis": 1,
    "sweep_report": 6,
    "stages": 6,
    "listing": 7,
    "settings": 7,
    "diagnosis": 11,
    "saved_recipe": 11,
    "cli": 12,
    "help_cache": 12,
    "__main__": 13,
    "__init__": 13,
}
PURE = (
    *("torch", "triton", "math", "functools", "dataclasses", "collections", "importlib", "typing", "warnings"),
    "__future__",
    "pqqp_lightning",
)
LOWER_MODELS = {("models", "metrics"), ("models", "checkpoint")}  # a torchmetrics Metric; a run's weights, on demand


def sources():
    files = [f for f in PACKAGE.rglob("*.py") if "callbacks" not in f.relative_to(PACKAGE).parts]
    return [*files, *(ROOT / "callbacks").glob("*.py")]


def layer_of(file):
    relative = file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imports(file):
    """Modules that a file imports, lazily or not, without what is for type checkers only."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "pqqp_lightning":
                yield from (f"pqqp_lightning.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("file", sources(), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_to_lower_layers(file):
    own = layer_of(file)
    assert own in LAYERS, f"{own} has no layer yet: add it to LAYERS"
    for name in imports(file):
        parts = name.split(".")
        if parts[0] != "pqqp_lightning" or len(parts) < 2:
            continue
        target = parts[1]
        if target in LAYERS and (own, target) not in LOWER_MODELS:
            assert LAYERS[target] <= LAYERS[own], f"{own} imports {target}, a higher layer"


@pytest.mark.parametrize("file", list((PACKAGE / "algorithms").glob("*.py")), ids=lambda f: f.name)
def test_algorithms_are_pure_torch(file):
    for name in imports(file):
        assert name.split(".")[0] in PURE
        assert not name.startswith("torch.nn")
        assert name.split(".")[:2] != ["pqqp_lightning", "errors"]


def test_the_engine_never_imports_callbacks():
    for file in sources():
        if layer_of(file) != "callbacks":
            assert not any(name.startswith("pqqp_lightning.callbacks") for name in imports(file)), file


def test_no_import_cycles():
    graph = {}
    for file in sources():
        relative = file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file.relative_to(ROOT)
        module = ".".join(["pqqp_lightning", *relative.with_suffix("").parts]).removesuffix(".__init__")
        tree = ast.parse(file.read_text())
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [n.module for n in top if isinstance(n, ast.ImportFrom) and n.module]
        graph[module] = {n for n in names if n.startswith("pqqp_lightning.")}

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        for target in graph.get(module, ()):
            visit(target, [*path, module])

    for module in graph:
        visit(module, [])


def test_callbacks_cannot_be_imported_from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"import pqqp_lightning\.callbacks, not callbacks"):
        __import__("callbacks")
