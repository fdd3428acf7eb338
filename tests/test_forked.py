"""The tests' commands import the clone that the tests lie in, not another editable install."""

import subprocess
import sys
from pathlib import Path

from forked import run_forked

PACKAGE = Path(__file__).parent.parent / "pqqp_lightning"
WHERE = "from importlib.util import find_spec; print(find_spec('pqqp_lightning').origin)"


def test_a_forked_command_imports_this_clone(tmp_path):
    (tmp_path / "where.py").write_text("import pqqp_lightning; print(pqqp_lightning.__file__)")
    done = run_forked(["where.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent.resolve() == PACKAGE.resolve()


def test_a_fresh_interpreter_finds_this_clone(tmp_path):
    done = subprocess.run([sys.executable, "-c", WHERE], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent.resolve() == PACKAGE.resolve()
