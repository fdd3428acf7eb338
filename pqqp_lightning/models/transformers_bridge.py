"""Builds language models through transformers, and words its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pqqp_lightning.errors import Problem, RecipeError, near_miss, shorten, suggest
from pqqp_lightning.network.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@contextmanager
def third_party_errors(problem: Problem) -> Iterator[None]:
    """Turn any exception of a library inside into ``problem``, with the error's first sentence in parentheses."""
    try:
        yield
    except (RecipeError, MemoryError, torch.OutOfMemoryError):  # these say more than the wording here could
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = lines[0]
        if first.endswith(":"):  # the reason stands on the next line
            first = " ".join(lines[:2])
        reason = first.split(". ")[0].rstrip(". :")
        raise RecipeError(replace(problem, text=f"{problem.text} ({reason})")) from error


def check_loading(source: str, info: dict[str, Any]) -> None:
    """Refuse a loaded model that lacks weights, or whose file has weights that it does not use.

    transformers initialises missing weights randomly and only logs a warning.

    Raises:
        RecipeError: with the missing, unexpected and mismatched weights that ``info`` of ``from_pretrained`` lists.
    """
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        listed = info.get(f"{kind}_keys") or ()
        keys = sorted(key if isinstance(key, str) else str(key[0]) for key in listed)  # mismatched: name and shapes
        if keys:
            text = f"has {kind} weights in {shorten(keys)}"
            problems.append(Problem("model", source, text, "Use the config.json that belongs to these weights."))
    for message in info.get("error_msgs") or ():
        problems.append(Problem("model", source, f"cannot be loaded: {message}"))
    if problems:
        raise RecipeError(problem.within("model") for problem in problems)


def build_model(settings: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Build the architecture that a plain configuration dict describes, with random weights.

    Raises:
        RecipeError: the type is unknown, or the settings are misspelt or contradict each other.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = dict(settings)
    name = str(settings.pop("model_type", ""))
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = suggest(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).strip() if name else "For instance: llama, opt, gpt2."
        text = "is not a causal language model of transformers"
        raise RecipeError(Problem("model.model_type", name, text, known).within("model"))
    if settings.pop("quantization_config", None):
        way_out = "Remove it: a compressed checkpoint carries its own plan."
        raise RecipeError(Problem("model.quantization_config", text="is set", way_out=way_out).within("model"))
    _refuse_misspelt(name, settings)
    with quiet_transformers():
        way_out = "Change the values named; the rest has the defaults of the architecture."
        problem = Problem(text=f"no {name} model has this configuration", way_out=way_out)
        with third_party_errors(problem.within("model")):
            config = CONFIG_MAPPING[name].from_dict(settings)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model.tie_weights()
    return model


def _refuse_misspelt(name: str, settings: dict[str, Any]) -> None:
    """Refuse settings whose names look misspelt; transformers would ignore them.

    An unknown name is misspelt if a similar setting of the architecture is not given. Other unknown names may be a
    model's own additions.
    """
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[name]()
    not_given = default.to_dict().keys() - settings.keys()
    problems = []
    for key in settings:
        if hasattr(default, key):
            continue
        suggestion = near_miss(key, not_given, cutoff=0.8)
        if suggestion:
            problem = Problem(f"model.{key}", text=f"is not a setting of {name}", way_out=suggestion.strip())
            problems.append(problem.within("model"))
    if problems:
        raise RecipeError(problems)


def plain_config(config: PretrainedConfig) -> dict[str, Any]:
    """The configuration as a JSON-able dict, from which :func:`build_model` builds the same structure."""
    settings = json.loads(config.to_json_string(use_diff=False))
    # Paths and versions differ between machines; they do not describe the structure.
    for name in ("_name_or_path", "_model_name_or_path", "transformers_version", "quantization_config"):
        settings.pop(name, None)
    return {"model_type": config.model_type, **settings}
