"""Logits of a model folder by GPTQModel: python gptqmodel_logits.py FOLDER ids.npy logits.npy."""

import sys

import gptqmodel
import numpy as np
import torch


def main(folder: str, given: str, out: str) -> str:
    """Write the logits [B, T, V] in float32; returns the version of GPTQModel."""
    # on a processor it would choose bfloat16, which rounds more
    loaded = gptqmodel.GPTQModel.load(folder, device="cpu", backend=gptqmodel.BACKEND.GPTQ_TORCH, dtype=torch.float16)
    ids = torch.from_numpy(np.load(given))
    written = None
    with torch.no_grad():
        for index, row in enumerate(ids):
            logits = loaded.model(input_ids=row[None], use_cache=False).logits[0].float().numpy()
            if written is None:
                written = np.lib.format.open_memmap(out, "w+", np.float32, (len(ids), *logits.shape))
            written[index] = logits
    return gptqmodel.__version__


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
    assert "pqqp_lightning" not in sys.modules, "this check must load the model without pqqp_lightning"
