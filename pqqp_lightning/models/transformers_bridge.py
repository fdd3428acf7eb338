"""What we ask of transformers when a language model is built: its own errors worded, and no noise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pqqp_lightning.errors import Problem, RecipeError, near_miss, shorten, suggest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@contextmanager
def third_party_errors(problem: Problem) -> Iterator[None]:
    """Whatever a library raises inside becomes ``problem``, with the error's first sentence in parentheses."""
    try:
        yield
    except (RecipeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        reason = first.split(". ")[0].rstrip(". :")
        raise RecipeError(replace(problem, text=f"{problem.text} ({reason})")) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers: what matters is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_loading(source: str, info: dict[str, Any]) -> None:
    """Refuse a model of which any weight was left to chance or thrown away."""
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(f"{kind}_keys") or ())
        if keys:
            text = f"has {kind} weights in {shorten(keys)}"
            problems.append(Problem("model", source, text, "Use the config.json that belongs to these weights."))
    for message in info.get("error_msgs") or ():
        problems.append(Problem("model", source, f"cannot be loaded: {message}"))
    if problems:
        raise RecipeError(problem.within("model") for problem in problems)


def build_model(settings: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The architecture that a plain configuration dict describes, with random weights."""
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
    """transformers takes any name and heeds those it knows. One that is unknown, while a name much like it is not
    given, is misspelt; a model's own further values are not."""
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[name]()
    left = default.to_dict().keys() - settings.keys()
    unknown = [key for key in settings if not hasattr(default, key)]
    near = {key: near_miss(key, left, cutoff=0.8) for key in unknown}
    text = f"is not a setting of {name}"
    misspelt = [Problem(f"model.{key}", text=text, way_out=meant.strip()) for key, meant in near.items() if meant]
    if misspelt:
        raise RecipeError(problem.within("model") for problem in misspelt)


def plain_config(config: PretrainedConfig) -> dict[str, Any]:
    """The configuration as a JSON-able dict from which ``build_model`` makes the same structure."""
    settings = json.loads(config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "_model_name_or_path", "transformers_version", "quantization_config"):
        settings.pop(name, None)
    return {"model_type": config.model_type, **settings}
