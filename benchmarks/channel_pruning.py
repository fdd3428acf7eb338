"""Inference time of a network before and after half of its channels went, and what the pruning itself took.

    python benchmarks/channel_pruning.py [--rounds 15] [--threads 2] [--device cpu]

Random weights (time does not depend on them), float32, evaluation mode. Dense and narrow network run in turn, round by
round, since machines drift; times are medians, and so is the ratio of a round's two times. The narrow network is the
one that the stage left in memory; its checkpoint loads bit for bit, which the tests hold.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pqqp_lightning.callbacks import ChannelPruning
from pqqp_lightning.models import ImageClassifier
from pqqp_lightning.stages.stage import Context

CASES = {
    "ResNet-18": ("timm/resnet18", {}),
    "DeiT-tiny": ("timm/deit_tiny_patch16_224", {"head_ratio": 0.34}),
    "DeiT-small": ("timm/deit_small_patch16_224", {"head_ratio": 0.5}),
}


def seconds(network: nn.Module, images: Tensor) -> float:
    """One forward pass."""
    start = time.perf_counter()
    with torch.inference_mode():
        network(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def operations(network: nn.Module, images: Tensor) -> int:
    """Floating-point operations of one forward pass."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(images)
    return counter.get_total_flops()


def no_walk(blocks: dict[str, nn.Module]) -> None:
    raise AssertionError("the norm needs no data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 224, 224, device=options.device)
    where = torch.cuda.get_device_name() if images.is_cuda else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, {options.batch} images of 224x224, {options.rounds} rounds")
    for name, (network, arguments) in CASES.items():
        dense = ImageClassifier(network, pretrained=False).to(options.device).eval()
        narrow = copy.deepcopy(dense)
        start = time.perf_counter()
        ChannelPruning(0.5, **arguments).compress(narrow, Context(no_walk, progress=False))  # type: ignore[arg-type]
        took = time.perf_counter() - start
        for warm in (dense, narrow):
            seconds(warm, images), seconds(warm, images)
        pairs = [(seconds(dense, images), seconds(narrow, images)) for _ in range(options.rounds)]
        before, after = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
        ratios = [a / b for a, b in pairs]
        sizes = [sum(p.numel() for p in n.parameters()) for n in (dense, narrow)]
        flops = [operations(n, images) for n in (dense, narrow)]
        print(
            f"{name:11} {before:7.1f} ms -> {after:7.1f} ms, {statistics.median(ratios):.2f} times faster "
            f"({min(ratios):.2f} to {max(ratios):.2f}); parameters {sizes[0] / 1e6:.1f} M -> {sizes[1] / 1e6:.1f} M, "
            f"operations {flops[0] / flops[1]:.2f} times fewer; pruned in {took:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
