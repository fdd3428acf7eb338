"""Logits of a model folder by transformers alone: python transformers_logits.py FOLDER ids.npy logits.npy.

A folder with an adapter of PEFT is loaded on the model in its subfolder ``base``.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main(folder: str, given: str, out: str) -> str:
    """Write the logits [B, T, V] in float32; returns the version of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    adapted = (Path(folder) / "adapter_config.json").is_file()
    weights = Path(folder) / "base" if adapted else folder
    model = transformers.AutoModelForCausalLM.from_pretrained(weights, trust_remote_code=False).eval()
    if adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder).eval()
    ids = torch.from_numpy(np.load(given))
    written = None
    with torch.no_grad():
        for index, row in enumerate(ids):
            logits = model(input_ids=row[None], use_cache=False).logits[0].float().numpy()
            if written is None:
                written = np.lib.format.open_memmap(out, "w+", np.float32, (len(ids), *logits.shape))
            written[index] = logits
    return transformers.__version__


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
    assert "pqqp_lightning" not in sys.modules, "this check must load the model without pqqp_lightning"
