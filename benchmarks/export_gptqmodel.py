"""A folder of ``--to gptq`` in GPTQModel, which has an environment of its own, beside the run that it came from.

python benchmarks/export_gptqmodel.py runs/quickstart quickstart-gptq gptqmodel-env/bin/python
"""

import sys
from pathlib import Path

from pqqp_lightning.export.runtime_check import compare_outputs
from pqqp_lightning.export.source import read_source
from pqqp_lightning.export.stock import stock_model
from pqqp_lightning.export.target import ExportedModel
from pqqp_lightning.export.targets.gptq import GPTQFolder


def main(run: str, folder: str, python: str) -> None:
    """Print the agreement of GPTQModel's outputs with the run's."""
    source = read_source(Path(run))
    stock = stock_model(source.network, source.dense_config, pad=False)
    sys.executable = python  # what the check starts
    print(compare_outputs(ExportedModel(source, stock, "float16", widen=True), GPTQFolder.runtime, Path(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
