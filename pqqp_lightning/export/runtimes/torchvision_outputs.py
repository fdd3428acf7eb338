"""Outputs of a folder by torchvision alone: python torchvision_outputs.py FOLDER inputs.npz outputs.npy AT_ONCE."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from safetensors.torch import load_file


def main(folder: str, given: str, out: str, at_once: str) -> str:
    """Write the outputs [B, classes] in float32; returns the version of torchvision."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model = torchvision.models.get_model(config["architecture"], weights=None, **config["model_args"]).eval()
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    with np.load(given) as arrays:
        images = torch.from_numpy(arrays["arr_0"])
    with torch.no_grad():
        found = [model(part).numpy() for part in images.split(int(at_once))]
    np.save(out, np.concatenate(found))
    return torchvision.__version__


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
    assert "pqqp_lightning" not in sys.modules, "this check must load the model without pqqp_lightning"
