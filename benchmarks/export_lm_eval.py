"""lm-evaluation-harness on a run's exported folders, beside this project's own metrics on the same text and questions.

    PQQP_DATA=... python benchmarks/export_lm_eval.py RUN FOLDER ...

``wikitext`` measures the first article of WikiText-2's test split in windows of 512 tokens, ``arc_challenge`` the first
40 questions of its test split. Both tasks are the harness' own files, pointed at local data.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
from lm_eval.utils import get_rolling_token_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

import pqqp_lightning
from pqqp_lightning.data.questions import Questions
from pqqp_lightning.metrics import Perplexity

DATA = Path(os.environ.get("PQQP_DATA", "data"))
TASKS = Path(lm_eval.__file__).parent / "tasks"
QUESTIONS = 40
WINDOW = 512


def read_settings(*files: str) -> dict[str, Any]:
    """A task's YAML, the files it includes first; its data come from elsewhere."""

    class Loader(yaml.SafeLoader):
        """Reads the harness' ``!function`` as the function."""

    functions = {
        "preprocess_wikitext.wikitext_detokenizer": wikitext_detokenizer,
        "preprocess_wikitext.process_results": process_results,
    }
    Loader.add_constructor("!function", lambda loader, node: functions[str(node.value)])
    elsewhere = {"include", "tag", "training_split", "validation_split"}
    settings: dict[str, Any] = {}
    for file in files:
        part = yaml.load((TASKS / file).read_text(), Loader)  # a subclass of SafeLoader
        settings.update({key: value for key, value in part.items() if key not in elsewhere})
    return settings


def make_task(settings: dict[str, Any], file: Path) -> ConfigurableTask:
    """The task on a parquet file."""
    here = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(file)}}}
    return ConfigurableTask(config=settings | here)


def first_article(folder: Path) -> Path:
    """A file with the first article of WikiText-2's test split as one row."""
    lines = pq.read_table(next((DATA / "wikitext" / "wikitext-2-raw-v1").glob("test-*.parquet")))["text"].to_pylist()
    text = "".join(line + "\n" if not line.endswith("\n") else line for line in lines)
    starts = [match.start() for match in re.finditer(r"^ = [^=\n]+ = *$", text, re.MULTILINE)]
    file = folder / "article.parquet"
    pq.write_table(pa.Table.from_pylist([{"page": text[starts[0] : starts[1]]}]), file)
    return file


@torch.no_grad()
def own_perplexity(network: Any, tokenizer: Any, article: Path) -> float:
    """This project's metric on the harness' windows, for each word of the text as the harness counts them."""
    page = pq.read_table(article)["page"][0].as_py()
    text = wikitext_detokenizer({"page": page})
    ids = tokenizer(text, add_special_tokens=False).input_ids
    metric = Perplexity()
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for inputs, targets in get_rolling_token_windows(ids, first, WINDOW, 1):
        row = torch.tensor([[*inputs, targets[-1]]])  # the other targets are inputs, too
        predicted = network(input_ids=row[:, :-1], use_cache=False).logits[:, -len(targets) :]
        metric.update(predicted, row[:, -len(targets) :])
    words = len(re.split(r"\s+", page))
    return float(metric.compute()) ** (len(ids) / words)


def measure(network: Any, tokenizer: Any, tasks: list[ConfigurableTask]) -> dict[str, float]:
    """The harness' numbers."""
    harness = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=8, device="cpu", max_length=WINDOW)
    nothing_else = TaskManager(include_defaults=False)  # it would read thousands of files
    found = lm_eval.simple_evaluate(
        model=harness, tasks=tasks, limit=QUESTIONS, bootstrap_iters=0, task_manager=nothing_else
    )["results"]
    numbers = {"word_perplexity": found["wikitext"]["word_perplexity,none"]}
    for name in ("acc", "acc_norm"):
        numbers[name] = found["arc_challenge"][f"{name},none"]
    return numbers


def own_accuracies(module: Any, tokenizer: Any) -> dict[str, float]:
    """This project's accuracies on the same questions."""
    questions = Questions(str(DATA / "ai2_arc"), "ARC-Challenge", samples=QUESTIONS)
    loader = questions.loader(questions.read(tokenizer, module))
    module.acc.reset()
    module.acc_norm.reset()
    module.log = lambda *arguments, **options: None  # there is no trainer
    with torch.no_grad():
        for number, batch in enumerate(loader):
            module.validation_step(batch, number)
    return {"acc": float(module.acc.compute()), "acc_norm": float(module.acc_norm.compute())}


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    module = pqqp_lightning.load(arguments.run).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.run / "tokenizer")
    with tempfile.TemporaryDirectory() as temporary:
        article = first_article(Path(temporary))
        tasks = [
            make_task(read_settings("wikitext/wikitext.yaml"), article),
            make_task(
                read_settings("arc/arc_easy.yaml", "arc/arc_challenge.yaml"),
                next((DATA / "ai2_arc" / "ARC-Challenge").glob("test-*.parquet")),
            ),
        ]
        print(f"{arguments.run}, this project: word_perplexity {own_perplexity(module.model, tokenizer, article):.4f}")
        print(f"{arguments.run}, this project: {own_accuracies(module, tokenizer)}")
        print(f"{arguments.run}, lm-eval: {measure(module.model, tokenizer, tasks)}", flush=True)
        for folder in arguments.folders:
            start = time.perf_counter()
            network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            folder_tokenizer = AutoTokenizer.from_pretrained(folder)
            print(f"{folder}, lm-eval: {measure(network, folder_tokenizer, tasks)}", end="")
            print(f", {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
