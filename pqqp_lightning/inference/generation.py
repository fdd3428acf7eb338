"""Continues a prompt with a run's language model, through transformers' own ``generate``."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pqqp_lightning.argument_types import path_problems, wrong_types
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.inference.finished_run import load_for_use
from pqqp_lightning.models.loading import load_tokenizer
from pqqp_lightning.network.quiet import quiet_transformers
from pqqp_lightning.storage.run_folder import check_run_folder, files_beside_model

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

STDIN = "-"
"""The prompt that means: read it from stdin."""


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        text: without the prompt.
        tokens: number of its tokens.
        elapsed_s: seconds of the generation.
    """

    text: str
    tokens: int
    elapsed_s: float


def generate_text(
    run: str | Path,
    *,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    packed: bool = False,
) -> Generated:
    """Continue a prompt with the language model of a run.

    The text is written to stdout token by token, without the prompt.

    Args:
        run: the run folder.
        prompt: the text to continue; - reads it from stdin.
        max_new_tokens: stop after this many tokens.
        temperature: of sampling; 0 always takes the most likely token.
        seed: of sampling.
        packed: keep weights packed. Takes the memory of the run's checkpoint, and is several times slower.

    Raises:
        RecipeError: with everything that is wrong with the arguments or the run, before the model is loaded; then,
            more tokens than the model reads.
    """
    if prompt == STDIN:
        prompt = sys.stdin.read()
    if problems := check_generation(
        run, prompt=prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, packed=packed
    ):
        raise RecipeError(problems)
    folder = Path(run)
    tokenizer = load_tokenizer(str(files_beside_model(folder).tokenizer))
    network = _network(folder, packed)
    ids: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"].to(network.device)  # [1, T]
    _require_room(network, ids.shape[1], max_new_tokens)
    torch.manual_seed(seed)
    start = time.perf_counter()
    with quiet_transformers(), torch.inference_mode():
        config = _generation_config(folder, network, max_new_tokens, temperature)
        output: Any = network.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=_streamer(tokenizer)
        )
    new = output[0, ids.shape[1] :]
    elapsed_s = time.perf_counter() - start
    return Generated(str(tokenizer.decode(new, skip_special_tokens=True)), len(new), elapsed_s)


def check_generation(
    run: str | Path,
    *,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    packed: bool = False,
) -> list[Problem]:
    """What is wrong with the arguments of :func:`generate_text`, before the model is loaded."""
    if problems := wrong_types(generate_text, locals()):
        return problems
    problems = path_problems(run=run) or _check_run(Path(run))
    problems += _check_numbers(max_new_tokens, temperature, seed)
    if not prompt.strip():
        problems.append(Problem("prompt", prompt, "is empty", 'Write --prompt "Once upon a time".'))
    return problems


def _check_run(folder: Path) -> list[Problem]:
    if problems := check_run_folder(folder):
        return problems
    files = files_beside_model(folder)
    if files.tokenizer.is_dir():
        return []
    if files.preprocessing.is_file():
        text = "holds an image classifier, which generates no text"
        return [Problem("run", str(folder), text, "Use pqqp-lightning classify.")]
    way_out = f"Save one with tokenizer.save_pretrained({str(files.tokenizer)!r})."
    return [Problem("run", str(folder), "has no tokenizer", way_out)]


def _check_numbers(max_new_tokens: int, temperature: float, seed: int) -> list[Problem]:
    problems = []
    if max_new_tokens < 1:
        problems.append(Problem("max_new_tokens", max_new_tokens, "is not above 0", "Use 100."))
    if not 0 <= temperature < float("inf"):
        problems.append(
            Problem("temperature", temperature, "is not a number from 0 up", "Use 0.8, or 0 for no chance.")
        )
    if not 0 <= seed < 2**63:
        problems.append(Problem("seed", seed, "is not a whole number from 0 up", "Use 0."))
    return problems


def _network(folder: Path, packed: bool) -> PreTrainedModel:
    """The transformers model of a run.

    Raises:
        RecipeError: the run holds another kind of model.
    """
    from transformers import PreTrainedModel

    module = load_for_use(folder, packed)
    network = getattr(module, "model", None)
    if isinstance(network, PreTrainedModel) and network.can_generate():
        return network
    text = f"holds a {type(module).__name__}, which is not a language model of transformers"
    raise RecipeError(Problem("run", str(folder), text, "Name a run of a CausalLM."))


def _require_room(network: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a prompt that, with the new tokens, is longer than the model's context."""
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest is None or prompt_tokens + new_tokens <= longest:
        return
    text = f"is too many: the prompt takes {prompt_tokens} of the {longest} tokens that the model reads"
    room = longest - prompt_tokens
    raise RecipeError(
        Problem("max_new_tokens", new_tokens, text, f"Use {room}." if room > 0 else "Shorten the prompt.")
    )


def _generation_config(
    folder: Path, network: PreTrainedModel, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """The run's own generation config (its end tokens), with our choice of tokens instead of its sampling."""
    from transformers import GenerationConfig

    tokenizer = files_beside_model(folder).tokenizer
    stored = (tokenizer / "generation_config.json").is_file()
    own = GenerationConfig.from_pretrained(tokenizer) if stored else network.generation_config
    assert own is not None
    ends = own.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends,
        # Padding never occurs in one row; without a token for it, transformers warns.
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else first_end,
        **sampling,
    )


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
