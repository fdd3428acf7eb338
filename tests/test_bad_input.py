"""Wrong recipes and command lines: which setting is to blame, who set it, and its value; for a dozen, every word.

Every problem at once, exit code 2, no traceback, before any work; nothing is written and nothing is lost.
"""

from __future__ import annotations

import gzip
import os
import re
import resource
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from command_line import RECIPE, prepare, refused, run, run_command, run_process, write_recipe

from pqqp_lightning import Trainer
from pqqp_lightning.callbacks import RTN, Magnitude
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.storage.run_folder import MANIFEST, WEIGHTS

DECODER = "model.model.layers"


@dataclass
class Wrong:
    """A recipe or a command line, and what is wrong with it.

    Attributes:
        what: the test's name.
        problems: one or several, as ``"SOURCE: KEY=VALUE ~ WORDS"``. VALUE and WORDS, if given, are part of what the
            user reads; without KEY no setting is to blame.
        message: all that the user reads, where that is tested.
        arguments: of the command, after ``--config recipe.yaml``.
        recipe: what is replaced in the recipe.
        command: all before the arguments.
        files: in the working folder.
    """

    what: str
    problems: str | list[str]
    arguments: str = ""
    recipe: dict[str, str] = field(default_factory=dict)
    command: str = "fit --config recipe.yaml"
    files: dict[str, str | bytes] = field(default_factory=dict)
    message: str = ""


RECIPE_DATA = RECIPE[RECIPE.index("  class_path: TokenData") : RECIPE.index("trainer:")]
PRUNE = "{class_path: Magnitude, init_args: {sparsity: 0.5}}"
SWEEP = "sweep --config recipe.yaml"
WRONG = [
    # names
    Wrong(
        "command",
        " ~ 'fti'",
        command="fti",
        message="Unknown command 'fti'. Did you mean 'fit'?",
    ),
    Wrong(
        "option",
        "command line: stagse ~ Did you mean '--stages'?",
        "--stagse.prune.sparsity 0.4",
        message="command line: Unknown option '--stagse'. Did you mean '--stages'?",
    ),
    Wrong("flag", "command line: print_confg ~ Did you mean '--print_config'?", "--print_confg"),
    Wrong("section", "recipe.yaml: stagse ~ Did you mean 'stages'?", recipe={"stages:": "stagse:"}),
    Wrong(
        "stray word",
        "command line ~ 'stray'",
        "stray",
        message="command line: Unexpected argument 'stray'. Options start with --.",
    ),
    Wrong(
        "option without a value",
        "command line: run_dir ~ has no value",
        "--run_dir",
        message="command line: run_dir has no value. Write --run_dir VALUE.",
    ),
    Wrong(
        "stage name",
        "command line: stages.prun ~ Did you mean 'prune'?",
        "--stages.prun.sparsity 0.4",
    ),
    Wrong(
        "stage class",
        "recipe.yaml: stages.prune ~ Unknown class 'Magnitud'. Did you mean 'Magnitude'?",
        recipe={"Magnitude": "Magnitud"},
    ),
    Wrong(
        "argument",
        "recipe.yaml: stages.quantize.bitz ~ Did you mean 'bits'?",
        recipe={"bits": "bitz"},
        message="recipe.yaml: stages.quantize (RTN): Unknown argument 'bitz'. Did you mean 'bits'?",
    ),
    Wrong(
        "argument on the command line",
        "command line: stages.prune.sparsty",
        "--stages.prune.sparsty 0.4",
    ),
    Wrong(
        "model class",
        "recipe.yaml: model ~ Did you mean 'CausalLM'?",
        recipe={"CausalLM": "CausalML"},
    ),
    Wrong(
        "data class",
        "command line: data ~ Did you mean 'TokenData'?",
        "--data TokenDat",
    ),
    Wrong(
        "data argument, and the one it was meant for is missing",
        ["recipe.yaml: data.evaluaton", "recipe.yaml: data.evaluation"],
        recipe={"evaluation:": "evaluaton:"},
    ),
    Wrong(
        "trainer argument",
        "recipe.yaml: trainer.acelerator",
        recipe={"accelerator": "acelerator"},
    ),
    Wrong(
        "class inside the trainer",
        "recipe.yaml: trainer.callbacks ~ Did you mean 'EarlyStopping'?",
        recipe={"{accelerator": "{callbacks: [{class_path: EarlyStoping, init_args: {monitor: a}}], accelerator"},
    ),
    Wrong(
        "a callback without what it needs",
        "recipe.yaml: trainer.callbacks.monitor",
        recipe={"{accelerator": "{callbacks: [{class_path: EarlyStopping}], accelerator"},
    ),
    Wrong(
        "argument of the optimizer",
        "recipe.yaml: model.optimizer.lrr",
        recipe={"LM\n  init_args:": "LM\n  init_args:\n    optimizer: {class_path: AdamW, init_args: {lrr: 1}}"},
    ),
    Wrong(
        "architecture",
        "recipe.yaml: model ~ Did you mean 'llama'?",
        recipe={"model_type: llama": "model_type: lama"},
    ),
    Wrong(
        "architecture that cannot be",
        "recipe.yaml: model ~ Change the values named",
        recipe={"hidden_size: 64": "hidden_size: 63"},
    ),
    Wrong(
        "target",
        "recipe.yaml: stages.prune.targets ~ Did you mean 'q_proj'?",
        recipe={"sparsity: 0.5": "sparsity: 0.5, targets: [q_prj]"},
    ),
    Wrong(
        "module of a stage",
        "command line: stages.mine ~ 'nothing.Mine' cannot be imported",
        "--stages.mine nothing.Mine",
    ),
    Wrong(
        "a class that is no stage",
        "command line: stages.mine ~ 'torch.nn.Linear' is not a Stage",
        "--stages.mine torch.nn.Linear",
    ),
    Wrong(
        "broken file in the working folder",
        "mine.py ~ cannot be imported",
        "--stages.mine Mine",
        files={"mine.py": "import nothing\n\nclass Mine:\n    pass\n"},
    ),
    # shapes and types
    Wrong(
        "text for a number",
        "recipe.yaml: stages.prune.sparsity='high'",
        recipe={"sparsity: 0.5": "sparsity: high"},
        message="recipe.yaml: stages.prune (Magnitude): sparsity='high' should be a number, {name: a number} or null.",
    ),
    Wrong(
        "a choice that is none",
        "command line: stages.prune.scope='globl' ~ Did you mean 'global'?",
        "--stages.prune.scope globl",
        message="command line: stages.prune (Magnitude): scope='globl' should be one of 'layer', 'global'. "
        "Did you mean 'global'?",
    ),
    Wrong(
        "seed",
        "command line: seed_everything='abc'",
        "--seed_everything abc",
    ),
    Wrong(
        "a stage in place of stages",
        "recipe.yaml: stages ~ 'SparseGPT'",
        recipe={RECIPE[RECIPE.index("stages:") :]: "stages: SparseGPT\n"},
        message="recipe.yaml: stages should map names to stages, but is 'SparseGPT'. "
        "Write stages: {prune: {class_path: SparseGPT, init_args: {sparsity: 0.5}}}.",
    ),
    Wrong(
        "a list in place of stages",
        "recipe.yaml: stages ~ ['SparseGPT', 'RTN']",
        recipe={RECIPE[RECIPE.index("stages:") :]: "stages: [SparseGPT, RTN]\n"},
    ),
    Wrong(
        "arguments without a class",
        "recipe.yaml: stages.prune ~ class_path is missing",
        recipe={PRUNE: "{sparsity: 0.5}"},
    ),
    Wrong(
        "a word in place of the trainer",
        "recipe.yaml: trainer ~ 'cpu'",
        recipe={"{accelerator: cpu, devices: 1, enable_progress_bar: false}": "cpu"},
    ),
    Wrong(
        "seed out of range",
        "command line: seed_everything=-1",
        "--seed_everything -1",
    ),
    Wrong(
        "no data",
        "recipe.yaml: data ~ there is no evaluation data",
        recipe={RECIPE[RECIPE.index("data:") : RECIPE.index("trainer:")]: ""},
    ),
    Wrong("methods of something", "command line ~ Unexpected argument 'SparseGPT'", command="methods SparseGPT"),
    Wrong(
        "no model",
        "recipe.yaml: model ~ is missing",
        recipe={RECIPE[: RECIPE.index("data:")]: ""},
    ),
    Wrong(
        "no recipe",
        "command line: model ~ is missing",
        command="fit",
        message="command line: model is missing. Add model: {class_path: CausalLM}, or give --config.",
    ),
    Wrong(
        "a name for a stage that no folder can have",
        "recipe.yaml: stages ~ 'a/b'",
        recipe={"  prune:": "  a/b:"},
    ),
    Wrong(
        "two stages of one name",
        "recipe.yaml ~ line 13, column 3: Duplicate key 'prune'",
        recipe={"  quantize:": "  prune:"},
        message="recipe.yaml: line 13, column 3: Duplicate key 'prune'. Rename one.",
    ),
    # files
    Wrong(
        "recipe that is not there",
        "recipee.yaml ~ Did you mean 'recipe.yaml'?",
        command="fit --config recipee.yaml",
        message="recipee.yaml: there is no such file. Did you mean 'recipe.yaml'?",
    ),
    Wrong(
        "recipe that is not YAML",
        "bad.yaml ~ line 2, column 7: is not YAML",
        command="fit --config bad.yaml",
        files={"bad.yaml": "model: [1, 2\nstages: }{"},
    ),
    Wrong(
        "recipe that is no text",
        "bad.yaml ~ is not UTF-8 text (byte 1)",
        command="fit --config bad.yaml",
        files={"bad.yaml": b"\xff\xfe\x00"},
    ),
    Wrong(
        "recipe that is a list",
        "bad.yaml ~ is not a recipe",
        command="fit --config bad.yaml",
        files={"bad.yaml": "- 1\n- 2\n"},
    ),
    Wrong(
        "fragment that is not there",
        "configs/modle.yaml ~ Did you mean 'model.yaml'?",
        recipe={RECIPE[: RECIPE.index("data:")]: "model: configs/modle.yaml\n"},
        files={"configs/model.yaml": "class_path: CausalLM\n"},
    ),
    Wrong(
        "argument in a fragment",
        "configs/model.yaml: model.dtpe",
        recipe={RECIPE[: RECIPE.index("data:")]: "model: configs/model.yaml\n"},
        files={"configs/model.yaml": "class_path: CausalLM\ninit_args: {dtpe: float16}\n"},
    ),
    Wrong(
        "data file that is not there",
        "command line: data.evaluation='nothing.npy'",
        "--data.evaluation nothing.npy",
    ),
    Wrong(
        "data file of another kind",
        "command line: data.evaluation='bad.npy'",
        "--data.evaluation bad.npy",
        files={"bad.npy": b"nonsense"},
    ),
    Wrong(
        "corrupt parquet",
        "recipe.yaml: data ~ texts/test-0.parquet",
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {source: ./texts}\n"},
        files={"texts/train-0.parquet": b"PAR1 nonsense", "texts/test-0.parquet": b"PAR1 nonsense"},
    ),
    Wrong(
        "questions with a misspelt argument, and without a source",
        ["recipe.yaml: data.questions.sampels", "recipe.yaml: data.questions.source"],
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {questions: {sampels: 3}}\n"},
    ),
    Wrong(
        "an argument of the questions on the command line",
        "command line: data.questions.sampels",
        "--data.questions.sampels 3",
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {questions: {source: ./questions}}\n"},
    ),
    Wrong(
        "so many questions as no one has",
        "command line: data.questions.samples=-1",
        "--data.questions.samples -1",
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {questions: {source: allenai/ai2_arc}}\n"},
    ),
    Wrong(
        "questions that are not there",
        "recipe.yaml: data.questions.source='./questions'",
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {questions: {source: ./questions}}\n"},
    ),
    Wrong(
        "model folder that is not there",
        "command line: model.model='./nothing'",
        "--model.model ./nothing",
    ),
    Wrong(
        "model that is not on the hub",
        "command line: model.model='nobody/nothing'",
        "--model.model nobody/nothing",
    ),
    Wrong(
        "corrupt GGUF",
        "command line: model.model='bad.gguf'",
        "--model.model bad.gguf",
        files={"bad.gguf": b"GGUF" + bytes(100)},
    ),
    Wrong(
        "run folder below a file",
        "command line: run_dir='notes.txt/run'",
        "--run_dir notes.txt/run",
        files={"notes.txt": "mine"},
    ),
    Wrong(
        "report of no folder",
        "nothing ~ no such folder",
        command="report nothing",
    ),
    Wrong(
        "report of no run",
        ". ~ report.json",
        command="report .",
    ),
    Wrong(
        "report of a search that is not finished",
        ". ~ --ckpt_path last",
        command="report .",
        files={"run.json": '{"command": "order"}'},
    ),
    Wrong(
        "report of a sweep that is not finished",
        ". ~ --ckpt_path last",
        command="report .",
        files={"run.json": '{"command": "sweep"}'},
    ),
    Wrong(
        "report of half a search",
        "order.json ~ truncated or altered",
        command="report .",
        files={"order.json": '{"ord'},
    ),
    Wrong(
        "report of nothing",
        "command line ~ report needs one run folder",
        command="report",
    ),
    Wrong(
        "test of no run",
        "command line: run_dir='nothing' ~ has no recipe.yaml",
        command="test --run_dir nothing",
    ),
    Wrong(
        "checkpoint that is not there",
        "command line: ckpt_path='nothing.ckpt'",
        "--ckpt_path nothing.ckpt",
        command="test --config recipe.yaml",
    ),
    Wrong(
        "fit from a file",
        "command line: ckpt_path='some.ckpt' ~ Use --ckpt_path last.",
        "--ckpt_path some.ckpt",
    ),
    Wrong(
        "nothing to go on with",
        "command line: ckpt_path ~ there is no run",
        "--ckpt_path last",
    ),
    # values
    Wrong(
        "sparsity",
        "command line: stages.prune.sparsity=1.5",
        "--stages.prune.sparsity 1.5",
    ),
    Wrong(
        "neither sparsity nor pattern",
        "recipe.yaml: stages.prune ~ pattern",
        recipe={PRUNE: "{class_path: Magnitude}"},
    ),
    Wrong(
        "both sparsity and pattern",
        "command line: stages.prune ~ pattern",
        "--stages.prune.pattern 2:4",
    ),
    Wrong(
        "pattern that keeps more than there is",
        "recipe.yaml: stages.prune.pattern='4:2'",
        recipe={"sparsity: 0.5": "pattern: 4:2"},
    ),
    Wrong(
        "pattern that is none",
        "recipe.yaml: stages.prune.pattern='abc'",
        recipe={"sparsity: 0.5": "pattern: abc"},
    ),
    Wrong(
        "pattern that does not divide",
        ["recipe.yaml: stages.prune.pattern", "recipe.yaml: stages.prune.pattern"],
        recipe={"sparsity: 0.5": "pattern: '2:5'"},
    ),
    Wrong(
        "pattern for a layer that is ignored",
        "recipe.yaml: stages.prune.pattern",
        recipe={"sparsity: 0.5": "pattern: {q_proj: '2:4', '*': '1:4'}, ignore: [q_proj]"},
    ),
    Wrong(
        "every layer ignored",
        "recipe.yaml: stages.prune.ignore ~ no layer",
        recipe={"sparsity: 0.5": "pattern: '2:4', ignore: ['*']"},
    ),
    Wrong(
        "stage that matches no layer",
        "command line: stages.prune.targets",
        "--stages.prune.targets [conv9]",
    ),
    Wrong(
        "block",
        "command line: stages.prune.blocks ~ Did you mean 'model.model.layers'?",
        "--stages.prune.blocks [model.layer]",
    ),
    Wrong("bits", "command line: stages.quantize.bits=9", "--stages.quantize.bits 9"),
    Wrong(
        "group size that divides no layer",
        ["command line: stages.quantize.group_size=48", "command line: stages.quantize.group_size=48"],
        "--stages.quantize.group_size 48",
    ),
    Wrong(
        "group size zero",
        "command line: stages.quantize.group_size=0",
        "--stages.quantize.group_size 0",
    ),
    Wrong(
        "damping and block size",
        ["command line: stages.quantize.block_size=0", "command line: stages.quantize.damping=2.0"],
        "--stages.quantize GPTQ --stages.quantize.block_size 0 --stages.quantize.damping 2",
    ),
    Wrong(
        "the same layers quantized twice",
        "command line: stages.again ~ allow_undo",
        "--stages.again RTN",
    ),
    Wrong(
        "negative epochs",
        "command line: stages.prune.epochs=-1",
        "--stages.prune.epochs -1",
    ),
    Wrong(
        "learning rate",
        "command line: stages.prune.learning_rate=0.0",
        "--stages.prune.learning_rate 0 --stages.prune.epochs 1 --data.train train.npy",
    ),
    Wrong(
        "learning rate without epochs",
        "command line: stages.prune.learning_rate=0.1",
        "--stages.prune.learning_rate 0.1",
    ),
    Wrong(
        "epochs without training data",
        "command line: stages.prune.epochs=1",
        "--stages.prune.epochs 1",
    ),
    Wrong(
        "finetuning after quantization",
        "command line: stages.tune.epochs=1",
        "--stages.tune Finetune --data.train train.npy",
    ),
    Wrong(
        "max_epochs that contradict the stages",
        "command line: trainer.max_epochs=3",
        "--trainer.max_epochs 3",
    ),
    Wrong(
        "token ids beyond the vocabulary",
        "recipe.yaml: data.calibration='calibration.npy'",
        recipe={"vocab_size: 300": "vocab_size: 100"},
    ),
    Wrong(
        "more calibration samples than there are",
        "command line: data.calibration_samples=9",
        "--data.calibration_samples 9",
    ),
    Wrong(
        "NaN weights",
        "recipe.yaml: model ~ NaN",
        recipe={"CausalLM": "odd_models.NaNWeights"},
    ),
    Wrong(
        "devices",
        "command line: trainer.devices='0'",
        "--trainer.devices 0",
    ),
    Wrong(
        "precision",
        "command line: trainer.precision=17",
        "--trainer.precision 17",
    ),
    Wrong(
        "option that Lightning refuses",
        "command line: trainer.limit_val_batches=7.5",
        "--trainer.limit_val_batches 7.5",
    ),
    # orders
    Wrong(
        "order that names an unknown stage and leaves one out",
        [
            "command line: stage_order ~ Unknown stage 'prun'. Did you mean 'prune'?",
            "command line: stage_order=['quantize', 'prun'] ~ leaves out prune",
        ],
        "--stage_order [quantize,prun]",
    ),
    Wrong(
        "order that leaves one out",
        "command line: stage_order=['quantize']",
        "--stage_order [quantize]",
        message="command line: stage_order=['quantize'] leaves out prune. Name every stage once.",
    ),
    Wrong(
        "order that names one twice",
        "command line: stage_order=['quantize', 'prune', 'prune']",
        "--stage_order [quantize,prune,prune]",
    ),
    Wrong(
        "order with bad options, all at once",
        [
            "command line: store='recipe.yaml/store'",
            "command line: strategy='greedy'",
            "command line: max_runs=0",
            "command line: time_limit=-3.0",
        ],
        "--strategy greedy --max_runs 0 --time_limit -3 --store recipe.yaml/store",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "order of one stage",
        "recipe.yaml: stages ~ the recipe has 1",
        command="order --config recipe.yaml",
        recipe={RECIPE[RECIPE.index("  quantize:") :]: ""},
    ),
    Wrong(
        "order of five stages",
        "recipe.yaml: stages ~ the recipe has 5",
        "--stages.a RTN --stages.b RTN --stages.c RTN",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "metric that is not measured",
        "command line: metric='perplexty' ~ Did you mean 'perplexity'?",
        "--metric perplexty",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "options of a search and a stage, all at once",
        ["command line: max_runs=0", "command line: stages.prune.sparsity=50.0"],
        "--max_runs 0 --stages.prune.sparsity 50",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "options that predict does not heed",
        ["command line: max_runs=2 ~ strategy=predict", "command line: executor='ray' ~ strategy=predict"],
        "--strategy predict --max_runs 2 --executor ray",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "search to go on with by another name",
        "command line: ckpt_path='Last' ~ Use --ckpt_path last.",
        "--ckpt_path Last",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "store in the run folder",
        "command line: store='found/store'",
        "--run_dir found --store found/store",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "misspelt value of a model",
        "recipe.yaml: model ~ Did you mean 'vocab_size'?",
        recipe={"vocab_size": "vocab_sise"},
    ),
    # nulls
    Wrong(
        "sections that are empty",
        ["recipe.yaml: stages ~ None", "recipe.yaml: trainer ~ None"],
        recipe={
            RECIPE[RECIPE.index("stages:") :]: "stages:\n",
            "trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false}": "trainer:",
        },
    ),
    Wrong(
        "arguments and options that are null",
        [
            "command line: repeats=None",
            "recipe.yaml: stages.prune.epochs=None",
            "recipe.yaml: stages.quantize.bits=None",
        ],
        "--repeats null",
        command="order --config recipe.yaml",
        recipe={"bits: 4": "bits: null", "sparsity: 0.5": "sparsity: 0.5, epochs: null"},
    ),
    Wrong(
        "value of a grid that is null",
        "command line: grid.quantize.bits=None",
        "--grid.quantize.bits [null,4]",
        command=SWEEP,
    ),
    Wrong(
        "devices that Lightning cannot count",
        "command line: trainer.devices='-3'",
        "--trainer.devices -3",
    ),
    Wrong(
        "classes that are null",
        ["command line: stages.prune ~ is null", "command line: model ~ is null"],
        "--model null --stages.prune null",
    ),
    # words that stand alone
    Wrong(
        "option with one dash, and one without its value",
        ["command line: config ~ has no value", "command line: max_runs ~ one dash"],
        command="order -max_runs 1 --config",
    ),
    Wrong(
        "recipe without --config",
        "command line ~ Give a recipe with --config recipe.yaml.",
        command="fit recipe.yaml",
    ),
    Wrong(
        "list with a blank",
        "command line ~ Unexpected argument '0.7]'. Quote",
        "--grid.prune.sparsity [0.5, 0.7]",
        command=SWEEP,
    ),
    Wrong(
        "folder for a recipe",
        ". ~ Name a file in it: recipe.yaml.",
        command="fit --config .",
    ),
    # grids
    Wrong(
        "curve of a stage that prunes",
        "command line: curve='prune'",
        "--grid.prune.sparsity [0.5] --curve prune",
        command=SWEEP,
    ),
    Wrong(
        "sweep without a grid",
        "recipe.yaml: grid ~ is missing",
        command=SWEEP,
    ),
    Wrong(
        "grid over what is not there, and no points allowed",
        [
            "command line: max_points=0",
            "command line: grid.prun ~ Did you mean 'prune'?",
            "command line: grid.quantize.bitz ~ Did you mean 'bits'?",
        ],
        "--grid.prun.sparsity [0.5] --grid.quantize.bitz [8,4] --max_points 0",
        command=SWEEP,
    ),
    Wrong(
        "grid with lists that are none",
        [
            "command line: grid.prune.sparsity=[0.5, 0.5]",
            "command line: grid.prune.scope='globl'",
            "command line: grid.quantize.bits=4",
            "command line: grid.quantize.clip=[]",
        ],
        "--grid.quantize.bits 4 --grid.prune.sparsity [0.5,0.5] --grid.prune.scope [globl] --grid.quantize.clip []",
        command=SWEEP,
    ),
    Wrong(
        "grid in the recipe with values that the stages refuse",
        ["command line: time_limit=0.0", "recipe.yaml: grid.prune.sparsity=1.5", "recipe.yaml: grid.quantize.bits=9"],
        "--time_limit 0",
        command=SWEEP,
        recipe={"stages:": "grid: {prune: {sparsity: [0.5, 1.5]}, quantize: {bits: [4, 9]}}\nstages:"},
    ),
    Wrong(
        "grid with a value that the model refuses",
        ["command line: grid.quantize.group_size=24", "command line: grid.quantize.group_size=24"],
        "--grid.quantize.group_size [24,32]",
        command=SWEEP,
    ),
    Wrong(
        "grid of too many points",
        "command line: grid ~ 6 points",
        "--grid.prune.sparsity [0.3,0.5] --grid.quantize.bits [8,4,3] --max_points 5",
        command=SWEEP,
    ),
    Wrong(
        "curve of no stage",
        "command line: curve ~ Did you mean 'quantize'?",
        "--grid.prune.sparsity [0.3,0.5] --curve quantise",
        command=SWEEP,
    ),
    Wrong(
        "curve of either of two stages",
        "command line: grid ~ --curve prune",
        "--grid.prune.bits [3,2] --grid.quantize.bits [8,4]",
        recipe={"Magnitude, init_args: {sparsity: 0.5}": "RTN, init_args: {bits: 3}"},
        command=SWEEP,
    ),
    Wrong(
        "curve at bits that there are none of",
        "command line: curve_bits ~ 1",
        "--grid.prune.sparsity [0.3,0.5] --curve_bits [4,1]",
        command=SWEEP,
    ),
    Wrong(
        "grid in a recipe for another command",
        "recipe.yaml: grid ~ run pqqp-lightning sweep",
        message="recipe.yaml: 'grid' is an option of sweep. Remove it, or run pqqp-lightning sweep.",
        recipe={"stages:": "grid: {prune: {sparsity: [0.5, 0.7]}}\nstages:"},
    ),
    # several at once
    Wrong(
        "wrong everywhere, found by the parser",
        [
            "recipe.yaml: sed_everything ~ Did you mean 'seed_everything'?",
            "recipe.yaml: stages.prune.sparsity='high'",
            "recipe.yaml: stages.quantize.bits=12",
            "recipe.yaml: data.evaluation='eval.npy'",
            "recipe.yaml: trainer.device",
        ],
        recipe={
            "run_dir": "sed_everything: 1\nrun_dir",
            "sparsity: 0.5": "sparsity: high",
            "bits: 4": "bits: 12",
            "evaluation.npy": "eval.npy",
            "devices": "device",
        },
    ),
    Wrong(
        "a model that cannot be built, and the rest",
        [
            "recipe.yaml: model",
            "command line: stages.prune.sparsity=3.0",
            "recipe.yaml: stages.quantize.bits=12",
            "recipe.yaml: data.evaluation='eval.npy'",
        ],
        "--stages.prune.sparsity 3",
        recipe={"model_type: llama": "model_type: lama", "bits: 4": "bits: 12", "evaluation.npy": "eval.npy"},
    ),
    Wrong(
        "wrong values of several stages, of the data and of the trainer",
        [
            "command line: run_dir='recipe.yaml/run'",
            "recipe.yaml: data.evaluation='eval.npy'",
            "command line: trainer.max_epochs=3",
            "recipe.yaml: stages.prune.sparsity=0.0",
            "recipe.yaml: stages.quantize.group_size=100",
        ],
        "--trainer.max_epochs 3 --run_dir recipe.yaml/run",
        recipe={
            "sparsity: 0.5": "sparsity: 0",
            "bits: 4": "group_size: 100, ignore: [down_proj]",
            "evaluation.npy": "eval.npy",
        },
    ),
]

ODD_MODELS = """
import torch
from pqqp_lightning.models import CausalLM


class NaNWeights(CausalLM):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with torch.no_grad():
            self.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")


class NaNActivations(CausalLM):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with torch.no_grad():
            for layer in (self.model.model.layers[1].mlp.up_proj, self.model.model.layers[1].mlp.gate_proj):
                layer.weight.mul_(3e38)


class Buggy(CausalLM):
    def forward(self, input_ids):
        raise KeyError("a bug of ours")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "odd_models.py").write_text(ODD_MODELS)
    sys.modules.pop("odd_models", None)
    return prepare(tmp_path, monkeypatch)


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """All files but the store's: what a search measured before it met the mistake is kept for the next try."""
    found = (path for path in folder.rglob("*") if not {"__pycache__", "store"} & set(path.parts))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def is_about(problem: Problem, expected: str) -> bool:
    """Whether a problem is the one that ``"SOURCE: KEY=VALUE ~ WORDS"`` names."""
    setting, _, words = expected.partition(" ~ ")
    source, _, setting = setting.partition(": ")
    key, _, value = setting.partition("=")
    message = str(problem)
    if value not in message or words not in message:
        return False
    if not key:
        return not problem.key and message.startswith(f"{source}: " if source else "")
    if problem.key in ("", problem.section):  # the check that found it does not say which argument is to blame
        return key.startswith(problem.key) and key.rpartition(".")[2] in message
    return problem.source == source and f"{problem.key}.".startswith(f"{key}.")


def write_files(wrong: Wrong, folder: Path) -> None:
    write_recipe(folder, wrong.recipe)
    for name, content in wrong.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.what)
def test_it_is_refused_before_any_work(wrong, folder, capfd):
    write_files(wrong, folder)
    before = everything_in(folder)
    problems = refused(*wrong.command.split(), *wrong.arguments.split())
    expected = [wrong.problems] if isinstance(wrong.problems, str) else wrong.problems
    assert len(problems) == len(expected), "\n".join(map(str, problems))
    for problem, one in zip(problems, expected, strict=True):
        assert is_about(problem, one), f"{problem.source}: {problem.key}: {problem}"
    printed = capfd.readouterr().err
    assert printed == "".join(f"{problem}\n" for problem in problems)
    assert not wrong.message or printed == f"{wrong.message}\n"
    assert everything_in(folder) == before


@pytest.mark.parametrize("what", ["corrupt GGUF", "a model that cannot be built, and the rest"])
def test_a_real_process_says_the_same(what, folder, capfd):
    wrong = next(wrong for wrong in WRONG if wrong.what == what)
    write_files(wrong, folder)
    command = [*wrong.command.split(), *wrong.arguments.split()]
    done = run_process(folder, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert not (folder / "run").exists()
    refused(*command)
    assert done.stderr == capfd.readouterr().err


def test_accelerator_that_is_none(folder):
    (problem,) = refused("fit", "--config", "recipe.yaml", "--trainer.accelerator", "quantum")
    assert (problem.source, problem.key, problem.value) == ("command line", "trainer.accelerator", "quantum")
    assert not (folder / "run").exists()


def test_environment_variable_with_a_wrong_value(folder, monkeypatch):
    monkeypatch.setenv("PQQP_FIT__TRAINER__MAX_EPOCHS", "many")
    (problem,) = refused("fit", "--config", "recipe.yaml")
    where = "PQQP_FIT__TRAINER__MAX_EPOCHS"
    assert (problem.source, problem.key, problem.value) == (where, "trainer.max_epochs", "many")
    assert str(problem) == f"{where}: trainer: max_epochs='many' should be a whole number or null."


def test_unquoted_pattern_is_understood(folder):
    write_recipe(folder, {"sparsity: 0.5": "pattern: 2:4"})  # which YAML 1.1 reads as 124
    assert run("fit", "--config", "recipe.yaml") == 0
    report = (folder / "run" / "report.json").read_text()
    assert '"pruned": 0.5' in report


def test_folder_without_permission(folder, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and (mode, path) != (os.W_OK, folder))
    (problem,) = refused("fit", "--config", "recipe.yaml")
    assert is_about(problem, f"recipe.yaml: run_dir='run' ~ {folder} is not writable. Choose another --run_dir.")


# What is found while a run goes on: it ends with the words, and what was finished stays.


def test_nan_activations_end_the_run_with_the_layer_named(folder, capfd):
    write_recipe(folder, {"CausalLM": "odd_models.NaNActivations", "RTN": "GPTQ"})
    (problem,) = refused("fit", "--config", "recipe.yaml")
    assert is_about(problem, f"recipe.yaml: stages.quantize ~ 1 layer ({DECODER}.1.mlp.down_proj) cannot be calibrated")
    assert '"status": "failed"' in (folder / "run" / "report.json").read_text()
    assert len((folder / "run" / "records.jsonl").read_text().splitlines()) == 2
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 2
    assert run("report", "run") == 0
    assert "prune (Magnitude)" in capfd.readouterr().out


def test_disk_full_loses_nothing_and_the_run_goes_on_once_there_is_room(folder):
    write_recipe(folder, {"Magnitude": "SparseGPT"})
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "whole") == 0
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, {resource.RLIM_INFINITY}))"
    (folder / "sitecustomize.py").write_text(limit)  # the disk of this process: no file above 250 kB
    done = run_process(folder, "fit", "--config", "recipe.yaml", PYTHONPATH=str(folder))
    (folder / "sitecustomize.py").unlink()
    assert done.returncode == 2
    assert done.stderr.startswith("recipe.yaml: run/stages/1-prune: cannot be written: ")
    assert "--ckpt_path last" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in (folder / "run" / "stages").iterdir()] == []
    assert len((folder / "run" / "records.jsonl").read_text().splitlines()) == 1
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 0
    assert (folder / "run/model" / WEIGHTS).read_bytes() == (folder / "whole/model" / WEIGHTS).read_bytes()


def test_disk_full_in_the_second_stage_keeps_the_first(folder, monkeypatch):
    import pqqp_lightning.checkpoint.save as checkpoint

    save, calls = checkpoint.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    (problem,) = refused("fit", "--config", "recipe.yaml")
    assert str(problem).startswith("recipe.yaml: run/stages/2-quantize: cannot be written: No space left on device.")
    assert (folder / "run/stages/1-prune" / MANIFEST).is_file()
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 0


def test_disk_full_while_lightning_writes_is_worded_too(folder, capfd):
    arguments = ["--data.train", "train.npy", "--stages.prune.epochs", "1"]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, {resource.RLIM_INFINITY}))"
    (folder / "sitecustomize.py").write_text(limit)  # room for the stage's checkpoint, not for the training state
    done = run_process(folder, "fit", "--config", "recipe.yaml", *arguments, PYTHONPATH=str(folder))
    assert done.returncode == 2
    assert done.stderr.startswith("recipe.yaml: a file of the run: cannot be written: File too large.")
    assert done.stderr.count("\n") == 1
    assert run("fit", "--config", "recipe.yaml", *arguments, "--ckpt_path", "last") == 0


def test_a_bug_shows_its_traceback(folder):
    write_recipe(folder, {"CausalLM": "odd_models.Buggy"})
    with pytest.raises(KeyError, match="a bug of ours"):
        run("fit", "--config", "recipe.yaml")
    done = run_command(folder, "fit", "--config", "recipe.yaml", "--run_dir", "other")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "KeyError: 'a bug of ours'" in done.stderr


# A finished run that was damaged, or is of another recipe.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        prepare(folder, monkeypatch)
        assert run("fit", "--config", "recipe.yaml") == 0
    return folder / "run"


@pytest.fixture
def damaged(finished, folder):
    shutil.copytree(finished, folder / "run")
    return folder / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def exchange(path: Path) -> None:
    manifest = gzip.decompress(path.read_bytes())
    assert b'"bits": 4' in manifest
    path.write_bytes(gzip.compress(manifest.replace(b'"bits": 4', b'"bits": 5', 1)))


SIZE = "has HALF bytes instead of WHOLE: truncated or altered. Run the recipe again."


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (f"model/{WEIGHTS}", cut, f"run/model/{WEIGHTS}: {SIZE}"),
        (f"model/{WEIGHTS}", flip, f"run/model/{WEIGHTS}: its checksum differs: altered. Run the recipe again."),
        (
            f"model/{WEIGHTS}",
            Path.unlink,
            f"run/model/{WEIGHTS}: {SIZE.replace('HALF', '0')}",
        ),
        (
            f"model/{MANIFEST}",
            cut,
            f"run/model/{MANIFEST}: is truncated or altered: not a manifest. Run the recipe again.",
        ),
        (
            f"model/{MANIFEST}",
            exchange,
            f"run/model/{MANIFEST}: is truncated or altered: its checksum differs. Run the recipe again.",
        ),
        (
            f"model/{MANIFEST}",
            Path.unlink,
            f"run/model: holds no checkpoint ({MANIFEST} is missing). Name a run folder or its model/.",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("command", ["test", "validate"])
def test_damaged_checkpoint_is_refused(command, file, damage, message, damaged, capfd):
    whole = (damaged / file).stat().st_size
    damage(damaged / file)
    assert run(command, "--run_dir", "run") == 2
    message = message.replace("HALF", str(whole // 2)).replace("WHOLE", str(whole))
    assert capfd.readouterr().err == f"run/recipe.yaml: {message}\n"


@pytest.mark.parametrize("file", ["run.json", "records.jsonl"])
def test_damaged_records_are_refused(file, damaged, capfd):
    content = (damaged / file).read_text()
    (damaged / file).write_text(content[:50] + "\n" + content[60:])
    before = everything_in(damaged)
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 2
    words = capfd.readouterr().err
    assert words.startswith(f"recipe.yaml: run/{file}: is truncated or altered (")
    assert words.endswith("). Run the recipe again.\n")
    assert everything_in(damaged) == before


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_damaged_report_is_refused(content, damaged, capfd):
    (damaged / "report.json").write_text(content)
    (damaged / "report.html").unlink()
    assert run("report", "run") == 2
    words = capfd.readouterr().err
    assert words.startswith("run/report.json: is truncated or altered (")
    assert words.count("\n") == 1
    assert not (damaged / "report.html").exists()


def test_a_page_that_cannot_be_written_costs_only_the_page(damaged, capfd):
    (damaged / "report.html").unlink()
    (damaged / "report.html").mkdir()
    assert run("report", "run") == 2
    printed, words = capfd.readouterr()
    assert "quantize (RTN)" in printed
    assert words == (
        "run/report.html: the page cannot be written: Is a directory. Make the folder writable, or report a copy of "
        "it.\n"
    )


def test_checkpoint_of_another_architecture(damaged):
    (problem,) = refused("test", "--run_dir", "run", "--model.model.vocab_size", "400")
    assert "embed_tokens.weight has shape [300, 64] instead of [400, 64]" in str(problem)


@pytest.mark.parametrize(
    ("command", "arguments", "difference"),
    [
        ("fit", "--seed_everything 3", "seed is 0 there and 3 here"),
        ("fit", "--stages.quantize.bits 3", "stages.quantize.init_args.bits is 4 there and 3 here"),
        (
            "fit",
            "--stage_order [quantize,prune]",
            "stages are ['prune', 'quantize'] there and ['quantize', 'prune'] here",
        ),
        ("fit", "--model.dtype bfloat16", "model.init_args.dtype is 'float32' there and 'bfloat16' here"),
        ("order", "", "command is 'fit' there and 'order' here"),
    ],
)
def test_last_of_another_recipe_is_refused_and_nothing_is_lost(command, arguments, difference, damaged):
    before = everything_in(damaged)
    (problem,) = refused(command, "--config", "recipe.yaml", "--ckpt_path", "last", *arguments.split())
    assert difference in str(problem)
    assert everything_in(damaged) == before


def test_damaged_lightning_checkpoint(folder):
    (folder / "some.ckpt").write_bytes(b"PK nonsense")
    (problem,) = refused("test", "--config", "recipe.yaml", "--ckpt_path", "some.ckpt")
    assert (problem.source, problem.key, problem.value) == ("command line", "ckpt_path", "some.ckpt")


# The same from Python.


def model() -> CausalLM:
    settings = RECIPE[RECIPE.index("{model_type") : RECIPE.index("data:")]
    pairs = (pair.partition(":") for pair in settings.strip("{}\n ").replace("\n", "").split(","))
    plain = {key.strip(): value.strip() for key, _, value in pairs}
    return CausalLM({key: int(value) if value.isdigit() else value for key, value in plain.items()})


def test_python_raises_every_problem_at_once(folder):
    trainer = Trainer(callbacks=[Magnitude(1.5), RTN(9)], accelerator="cpu", default_root_dir="run")
    with pytest.raises(RecipeError, match=re.escape("sparsity=1.5")) as caught:
        trainer.fit(model(), datamodule=TokenData("nothing.npy", "evaluation.npy"))
    assert [str(problem) for problem in caught.value.problems] == [
        f"data: calibration='nothing.npy': there is no such file (looked at {folder}/nothing.npy).",
        "stages.magnitude (Magnitude): sparsity=1.5 is not in (0, 1). 0.5 removes half of the weights.",
        "stages.rtn (RTN): bits=9 is not between 2 and 8.",
    ]
    assert not (folder / "run").exists()


def test_python_two_stages_of_one_name(folder):
    first, second = Magnitude(0.3), RTN(4)
    trainer = Trainer(callbacks=[first, second], accelerator="cpu", default_root_dir="run")
    first.name = second.name = "both"
    with pytest.raises(RecipeError, match=re.escape("stages: two stages are named 'both'. Give each its own name.")):
        trainer.fit(model(), datamodule=TokenData("calibration.npy", "evaluation.npy"))


def test_python_stages_of_one_class_get_names_of_their_own(folder):
    trainer = Trainer(callbacks=[Magnitude(0.3), RTN(4), Magnitude(0.5)], accelerator="cpu", default_root_dir="run")
    assert [stage.name for stage in trainer.stages] == ["magnitude", "rtn", "magnitude-2"]


def test_python_without_evaluation_data(folder):
    trainer = Trainer(callbacks=[Magnitude(0.3)], accelerator="cpu", default_root_dir="run")
    loader = torch.utils.data.DataLoader(torch.zeros(4, 8))
    words = "data: there is no evaluation data. Add data: {class_path: TextData}, a datamodule or val_dataloaders."
    with pytest.raises(RecipeError, match=re.escape(words)):
        trainer.fit(model(), loader)
