"""Who may import whom: a room imports rooms on lower floors only, lazy imports included."""

import ast
from pathlib import Path

import pytest
from composition import STAGES

from pqqp_lightning.stages import LayerwiseStage

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pqqp_lightning"
FLOORS = {
    "__main__": 10,
    "__init__": 10,
    "cli": 9,
    "experiments": 8,
    "trials": 7,
    "inference": 7,
    "runs": 6,
    "callbacks": 6,
    "data": 6,
    "stages": 5,
    "models": 5,
    "export": 4,
    "surgery": 3,
    "calibration": 3,
    "checkpoint": 3,
    "report": 3,
    "network": 2,
    "storage": 2,
    "algorithms": 1,
    "metrics": 1,
    "argument_types": 1,
    "errors": 0,
    "seeding": 0,
}
STANDARD = {
    "__future__",
    "collections",
    "dataclasses",
    "functools",
    "importlib",
    "itertools",
    "math",
    "typing",
    "warnings",
}
PURE = STANDARD | {"torch", "triton", "numpy", "scipy", "sklearn"}


def sources():
    engine = [file for file in PACKAGE.rglob("*.py") if "callbacks" not in file.relative_to(PACKAGE).parts]
    return sorted([*engine, *(ROOT / "callbacks").glob("*.py")])


def module_of(file):
    """The dotted name of the module in ``file``."""
    relative = file.relative_to(PACKAGE if file.is_relative_to(PACKAGE) else ROOT)
    return ".".join(["pqqp_lightning", *relative.with_suffix("").parts])


def room_of(module):
    """``"checkpoint"`` of ``"pqqp_lightning.checkpoint.load"``."""
    return module.split(".")[1]


MODULES = {module_of(file): file for file in sources()}
ROOT_MODULE = "pqqp_lightning.__init__"  # has the version and lazy imports: anyone may import it


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(file):
    """The modules that a file imports anywhere, without what only type checkers read."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if is_type_checking(node):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def our_imports(file):
    """Those of them that are modules of this package, packages as their ``__init__``."""
    for name in imports(file):
        if name in MODULES:
            yield name
        elif f"{name}.__init__" in MODULES:
            yield f"{name}.__init__"


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_rooms_below_it(module):
    room = room_of(module)
    assert room in FLOORS, f"{room} has no floor yet: add it to FLOORS"
    for target in our_imports(MODULES[module]):
        if room_of(target) != room and target != ROOT_MODULE:
            assert FLOORS[room_of(target)] < FLOORS[room], f"{module} imports {target}, which is not below it"


def test_no_import_cycles():
    graph = {module: set(our_imports(file)) for module, file in MODULES.items()}
    graph[ROOT_MODULE] = set()
    finished = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for target in graph[module]:
                visit(target, [*path, module])
            finished.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("file", sorted((PACKAGE / "algorithms").glob("*.py")), ids=lambda file: file.name)
def test_algorithms_are_pure_functions_of_tensors(file):
    for name in imports(file):
        own = name.startswith("pqqp_lightning.algorithms")
        assert own or name.split(".")[0] in PURE, name
        assert not name.startswith("torch.nn")


LAYERWISE = [name for name, cls in STAGES.items() if cls.compress is LayerwiseStage.compress]


@pytest.mark.parametrize("name", LAYERWISE)
def test_a_layerwise_method_needs_the_stages_and_the_algorithms_alone(name):
    for target in our_imports(MODULES[STAGES[name].__module__]):
        assert target == "pqqp_lightning.stages.__init__" or room_of(target) == "algorithms", target


def test_callbacks_cannot_be_imported_from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"import pqqp_lightning\.callbacks, not callbacks"):
        __import__("callbacks")
