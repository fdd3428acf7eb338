"""Outputs of a model by OpenVINO alone: python openvino_outputs.py MODEL inputs.npz outputs.npy AT_ONCE."""

import sys
from pathlib import Path

import numpy as np
import openvino


def main(model: str, given: str, out: str, at_once: str) -> str:
    """Write the first output [B, ...]; returns the version of OpenVINO."""
    file = Path(model) / "model.onnx" if Path(model).is_dir() else Path(model)
    # otherwise it may compute in 16 bits where the processor can, or round activations
    settings = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    with np.load(given) as arrays:
        inputs = [arrays[f"arr_{i}"] for i in range(len(compiled.inputs))]
    size = int(at_once)
    found = []
    for start in range(0, len(inputs[0]), size):
        found.append(np.array(compiled([array[start : start + size] for array in inputs])[0]))
    np.save(out, np.concatenate(found))
    return openvino.__version__.split("-")[0]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
    assert "pqqp_lightning" not in sys.modules, "this check must load the model without pqqp_lightning"
