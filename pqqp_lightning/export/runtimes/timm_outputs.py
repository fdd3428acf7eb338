"""Outputs of a model folder by timm alone: python timm_outputs.py FOLDER inputs.npz outputs.npy AT_ONCE."""

import sys

import numpy as np
import timm
import torch


def main(folder: str, given: str, out: str, at_once: str) -> str:
    """Write the outputs [B, classes] in float32; returns the version of timm."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
    with np.load(given) as arrays:
        images = torch.from_numpy(arrays["arr_0"])
    with torch.no_grad():
        found = [model(part).numpy() for part in images.split(int(at_once))]
    np.save(out, np.concatenate(found))
    return timm.__version__


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
    assert "pqqp_lightning" not in sys.modules, "this check must load the model without pqqp_lightning"
