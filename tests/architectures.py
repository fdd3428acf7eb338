"""Small models of many architectures, as the libraries define them: what ``docs/models.md`` is made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.vgg import VGG
from tiny import OPT, TOKENS, write_tokens
from torch import Tensor, nn
from torchvision.models import VisionTransformer, vit_b_16
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pqqp_lightning.data import ImageData, TokenData
from pqqp_lightning.models import CausalLM, ImageClassifier

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = _SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

LANGUAGE: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "mistral": _DECODER | {"sliding_window": 4},
    "qwen2": _DECODER,
    "qwen3": _DECODER | {"head_dim": 8},
    "gemma2": _DECODER | {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": _DECODER | {"head_dim": 8, "sliding_window": 4},
    "phi3": _DECODER | {"pad_token_id": 0},
    "opt": OPT,
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": _SIZES | {"intermediate_size": 64, "max_position_embeddings": 64},
    "falcon": _SIZES,
    "falcon, new decoder": _SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "bert, as decoder": _SIZES | {"intermediate_size": 64, "is_decoder": True},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mixtral": _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": _DECODER | {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _DECODER | _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": _DECODER | _EXPERTS | {"head_dim": 8},
    "qwen3_next": _DECODER | _EXPERTS | _LINEAR_ATTENTION | {"head_dim": 8, "shared_expert_intermediate_size": 32},
    "deepseek_v3": _DECODER
    | _LATENT_ATTENTION
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    "gpt_oss": _DECODER | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Arguments of a small configuration by transformers' model type; words after a comma tell two of one type apart."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "opt": {},
    "falcon, new decoder": {"new_decoder_architecture": True, "num_kv_heads": 8},
    "bloom": {"hidden_size": 1024, "n_layer": 24, "n_head": 16},
    "bert, as decoder": {"is_decoder": True},
}
"""Where transformers' default configuration is not that of a published model, what makes it one."""

_RESNET = {"stem_width": 8, "channels": [8, 8, 16, 16]}
_VIT = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
_BLOCKS = [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e4_c8"], ["ir_r2_k5_s2_e4_c16"]]
_BLOCKS_WITH_GATES = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k5_s2_e4_c16_se0.25"]]
_FOUR_STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}


def _make_efficient(blocks: list[list[str]], act_layer: type[nn.Module]) -> nn.Module:
    return EfficientNet(decode_arch_def(blocks), num_classes=10, num_features=64, stem_size=8, act_layer=act_layer)


Vision = tuple[str, int, dict[str, Any] | Callable[[], nn.Module]]
VISION: dict[str, Vision] = {
    "resnet18": ("timm/resnet18", 32, _RESNET),
    "resnet50": ("timm/resnet50", 32, _RESNET),
    "resnext50_32x4d": ("timm/resnext50_32x4d", 32, _RESNET | {"cardinality": 4, "base_width": 16}),
    "seresnet18": ("timm/seresnet18", 32, _RESNET),
    "regnety_002": (
        "timm/regnety_002",
        32,
        lambda: RegNet(RegNetCfg(depth=6, w0=8, wa=8.0, wm=2.0, group_size=8, se_ratio=0.25), num_classes=10),
    ),
    "mobilenetv2_050": ("timm/mobilenetv2_050", 32, lambda: _make_efficient(_BLOCKS, nn.ReLU6)),
    "mobilenetv3_small_050": (
        "timm/mobilenetv3_small_050",
        32,
        lambda: MobileNetV3(decode_arch_def(_BLOCKS_WITH_GATES), num_classes=10, num_features=64, stem_size=8),
    ),
    "efficientnet_lite0": ("timm/efficientnet_lite0", 32, lambda: _make_efficient(_BLOCKS, nn.SiLU)),
    "convnext_atto": ("timm/convnext_atto", 32, _FOUR_STAGES),
    "densenet121": ("timm/densenet121", 32, {"growth_rate": 4, "block_config": (2, 2, 2, 2)}),
    "vgg11": ("timm/vgg11", 32, lambda: VGG([8, "M", 8, "M", 16, "M", 16, "M", 16, "M"], 10, mlp_ratio=0.01)),
    "deit_tiny": ("timm/deit_tiny_patch16_224", 32, _VIT),
    "vit_tiny": ("timm/vit_tiny_patch16_224", 32, _VIT),
    "swin_tiny": (
        "timm/swin_tiny_patch4_window7_224",
        32,
        {"window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)},
    ),
    "beit_base": ("timm/beit_base_patch16_224", 32, _VIT),
    "eva02_tiny": ("timm/eva02_tiny_patch14_224", 32, _VIT),
    "mixer_s16": ("timm/mixer_s16_224", 32, lambda: MlpMixer(10, 32, patch_size=8, num_blocks=2, embed_dim=48)),
    "poolformer_s12": ("timm/poolformer_s12", 32, lambda: MetaFormer(num_classes=10, **_FOUR_STAGES)),
    "coatnet_pico": ("timm/coatnet_pico_rw_224", 64, {"embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}),
    "torchvision ViT": (
        "torchvision/vit_b_16",
        32,
        lambda: VisionTransformer(32, 8, 2, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=10),
    ),
}
"""The network's name, the pixels of its images, and what makes it small: arguments, or the whole of it."""


def make_language_model(name: str) -> LightningModule:
    """A small model of one of ``LANGUAGE``, seeded."""
    torch.manual_seed(0)
    return CausalLM({"model_type": name.partition(",")[0]} | LANGUAGE[name])


def make_vision_model(name: str) -> LightningModule:
    """A small model of one of ``VISION``, seeded."""
    network, image_size, small = VISION[name]
    torch.manual_seed(0)
    if callable(small):
        return ImageClassifier(small(), num_classes=10)
    return ImageClassifier(network, pretrained=False, num_classes=10, image_size=image_size, model_args=small)


def make_data(name: str, folder: Path) -> LightningDataModule:
    """Data for either of them; token files go to ``folder``."""
    if name in LANGUAGE:
        return TokenData(**write_tokens(folder))
    image_size = VISION[name][1]
    return ImageData(
        train_samples=32, calibration_samples=32, evaluation_samples=32, batch_size=32, image_size=image_size
    )


def make_model(name: str) -> LightningModule:
    """A small model of one of ``LANGUAGE`` or ``VISION``."""
    return make_language_model(name) if name in LANGUAGE else make_vision_model(name)


def published_model(name: str) -> nn.Module:
    """The model in the size that the library knows it in, without memory for its weights."""
    with torch.device("meta"):
        if name in LANGUAGE:
            config = CONFIG_MAPPING[name.partition(",")[0]](**PUBLISHED.get(name, {}))
            return AutoModelForCausalLM.from_config(config)
        network = VISION[name][0]
        if network == "torchvision/vit_b_16":
            return vit_b_16()
        return timm.create_model(network.removeprefix("timm/"))


def make_inputs(name: str) -> Tensor:
    """Random inputs of the small model: tokens [2, T] or images [2, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    if name in LANGUAGE:
        return torch.randint(0, 64, (2, TOKENS), generator=generator)
    image_size = VISION[name][1]
    return torch.randn(2, 3, image_size, image_size, generator=generator)
