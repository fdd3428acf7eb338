"""Outputs of a model by ONNX Runtime alone: python onnx_runtime_outputs.py MODEL inputs.npz outputs.npy AT_ONCE."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(model: str, given: str, out: str, at_once: str) -> str:
    """Write the first output [B, ...]; returns the version of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # otherwise 8-bit weights are multiplied with activations that are rounded to 8 bits, too
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    file = Path(model) / "model.onnx" if Path(model).is_dir() else Path(model)
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    with np.load(given) as arrays:
        inputs = [arrays[f"arr_{i}"] for i in range(len(names))]
    size = int(at_once)
    found = []
    for start in range(0, len(inputs[0]), size):
        part = {name: array[start : start + size] for name, array in zip(names, inputs, strict=True)}
        found.append(session.run(None, part)[0])
    np.save(out, np.concatenate(found))
    return onnxruntime.__version__


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
    assert "pqqp_lightning" not in sys.modules, "this check must load the model without pqqp_lightning"
