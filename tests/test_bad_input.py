"""Wrong recipes and command lines, each with the exact words it gets: where, what, the value, and the way out.

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
from command_line import RECIPE, prepare, run, run_command, run_process, write_recipe

from pqqp_lightning import Trainer
from pqqp_lightning.callbacks import RTN, Magnitude
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.stages.discovery import known_stages
from pqqp_lightning.storage.run_folder import MANIFEST, WEIGHTS

DECODER = "model.model.layers"
ALL = f"15 layers ({DECODER}.0.self_attn.q_proj, {DECODER}.0.self_attn.k_proj, {DECODER}.0.self_attn.v_proj, ...)"
INNER = ALL.replace("15", "12")
TARGETED = ALL.replace("15", "14")
DOWN = f"2 layers ({DECODER}.0.mlp.down_proj, {DECODER}.1.mlp.down_proj)"
WRITE_STAGES = "Write stages: {prune: {class_path: SparseGPT, init_args: {sparsity: 0.5}}}."
PATTERN = "is not N:M with 0 < N < M. Write it quoted, as in pattern: '2:4'."


@dataclass
class Wrong:
    """A recipe or a command line, and what is said about it.

    Attributes:
        what: the test's name.
        message: all of stderr; FOLDER stands for the working folder, STAGES for the installed methods.
        arguments: of the command, after ``--config recipe.yaml``.
        recipe: what is replaced in the recipe.
        command: all before the arguments.
        files: in the working folder.
    """

    what: str
    message: str
    arguments: str = ""
    recipe: dict[str, str] = field(default_factory=dict)
    command: str = "fit --config recipe.yaml"
    files: dict[str, str | bytes] = field(default_factory=dict)


RECIPE_DATA = RECIPE[RECIPE.index("  class_path: TokenData") : RECIPE.index("trainer:")]
PRUNE = "{class_path: Magnitude, init_args: {sparsity: 0.5}}"
SWEEP = "sweep --config recipe.yaml"
WRONG = [
    # names
    Wrong("command", "'fti' is no command. Did you mean 'fit'?", command="fti"),
    Wrong("option", "command line: '--stagse' is no option. Did you mean 'stages'?", "--stagse.prune.sparsity 0.4"),
    Wrong("flag", "command line: '--print_confg' is no option. Did you mean 'print_config'?", "--print_confg"),
    Wrong("section", "recipe.yaml: 'stagse' is no section. Did you mean 'stages'?", recipe={"stages:": "stagse:"}),
    Wrong("stray word", "command line: 'stray' belongs to no option. Options start with --.", "stray"),
    Wrong("option without a value", "command line: --run_dir has no value. Write --run_dir VALUE.", "--run_dir"),
    Wrong(
        "stage name",
        "command line: stages.prun: there is no such stage. Did you mean 'prune'? "
        "To add it, also give --stages.prun METHOD.",
        "--stages.prun.sparsity 0.4",
    ),
    Wrong(
        "stage class",
        "recipe.yaml: stages.prune: 'Magnitud' is no known class. Did you mean 'Magnitude'?",
        recipe={"Magnitude": "Magnitud"},
    ),
    Wrong(
        "knob",
        "recipe.yaml: stages.quantize (RTN): 'bitz' is no knob. Did you mean 'bits'?",
        recipe={"bits": "bitz"},
    ),
    Wrong(
        "knob on the command line",
        "command line: stages.prune (Magnitude): 'sparsty' is no knob. Did you mean 'sparsity'?",
        "--stages.prune.sparsty 0.4",
    ),
    Wrong(
        "model class",
        "recipe.yaml: model: 'CausalML' is no known class. Did you mean 'CausalLM'?",
        recipe={"CausalLM": "CausalML"},
    ),
    Wrong(
        "data class",
        "command line: data: 'TokenDat' is no known class. Did you mean 'TokenData'?",
        "--data TokenDat",
    ),
    Wrong(
        "data knob, and the one it was meant for is missing",
        "recipe.yaml: data (TokenData): 'evaluaton' is no knob. Did you mean 'evaluation'?\n"
        "recipe.yaml: data (TokenData): evaluation is required. Add it.",
        recipe={"evaluation:": "evaluaton:"},
    ),
    Wrong(
        "trainer knob",
        "recipe.yaml: trainer: 'acelerator' is no knob. Did you mean 'accelerator'?",
        recipe={"accelerator": "acelerator"},
    ),
    Wrong(
        "class inside the trainer",
        "recipe.yaml: trainer.callbacks: 'EarlyStoping' is no known class. Did you mean 'EarlyStopping'?",
        recipe={"{accelerator": "{callbacks: [{class_path: EarlyStoping, init_args: {monitor: a}}], accelerator"},
    ),
    Wrong(
        "a callback without what it needs",
        "recipe.yaml: trainer.callbacks (EarlyStopping): monitor is required. Add it.",
        recipe={"{accelerator": "{callbacks: [{class_path: EarlyStopping}], accelerator"},
    ),
    Wrong(
        "knob of the optimizer",
        "recipe.yaml: model.optimizer (AdamW): 'lrr' is no knob. Did you mean 'lr'?",
        recipe={"LM\n  init_args:": "LM\n  init_args:\n    optimizer: {class_path: AdamW, init_args: {lrr: 1}}"},
    ),
    Wrong(
        "architecture",
        "recipe.yaml: model: model.model_type='lama' is not a causal language model of transformers. "
        "Did you mean 'llama'?",
        recipe={"model_type: llama": "model_type: lama"},
    ),
    Wrong(
        "architecture that cannot be",
        "recipe.yaml: model: no llama model has this configuration (Class validation error for validator "
        "'validate_architecture': ValueError: The hidden size (63) is not a multiple of the number of attention heads "
        "(4)). Change the values named; the rest has the defaults of the architecture.",
        recipe={"hidden_size: 64": "hidden_size: 63"},
    ),
    Wrong(
        "target",
        "recipe.yaml: stages.prune (Magnitude): targets='q_prj' matches no Linear or Conv2d layer. "
        "Did you mean 'q_proj'?",
        recipe={"sparsity: 0.5": "sparsity: 0.5, targets: [q_prj]"},
    ),
    Wrong(
        "module of a stage",
        "command line: stages.mine: 'nothing.Mine' cannot be imported: ModuleNotFoundError: No module named 'nothing'.",
        "--stages.mine nothing.Mine",
    ),
    Wrong(
        "a class that is no stage",
        "command line: stages.mine: 'torch.nn.Linear' is no Stage.",
        "--stages.mine torch.nn.Linear",
    ),
    Wrong(
        "broken file in the working folder",
        "mine.py: cannot be imported: ModuleNotFoundError: No module named 'nothing'. Put it right: it defines Mine.",
        "--stages.mine Mine",
        files={"mine.py": "import nothing\n\nclass Mine:\n    pass\n"},
    ),
    # shapes and types
    Wrong(
        "text for a number",
        "recipe.yaml: stages.prune (Magnitude): sparsity='high': expected a number, {name: a number} or null.",
        recipe={"sparsity: 0.5": "sparsity: high"},
    ),
    Wrong(
        "a choice that is none",
        "command line: stages.prune (Magnitude): scope='globl': expected 'layer', 'global'. Did you mean 'global'?",
        "--stages.prune.scope globl",
    ),
    Wrong(
        "seed",
        "command line: seed_everything='abc': expected true or false or a whole number.",
        "--seed_everything abc",
    ),
    Wrong(
        "a stage in place of stages",
        f"recipe.yaml: stages: expected a mapping of names to stages, got 'SparseGPT'. {WRITE_STAGES}",
        recipe={RECIPE[RECIPE.index("stages:") :]: "stages: SparseGPT\n"},
    ),
    Wrong(
        "a list in place of stages",
        f"recipe.yaml: stages: expected a mapping of names to stages, got ['SparseGPT', 'RTN']. {WRITE_STAGES}",
        recipe={RECIPE[RECIPE.index("stages:") :]: "stages: [SparseGPT, RTN]\n"},
    ),
    Wrong(
        "knobs without a class",
        "recipe.yaml: stages.prune: class_path is missing. Known: STAGES.",
        recipe={PRUNE: "{sparsity: 0.5}"},
    ),
    Wrong(
        "a word in place of the trainer",
        "recipe.yaml: trainer: expected options, as in {precision: 32}, got 'cpu'.",
        recipe={"{accelerator: cpu, devices: 1, enable_progress_bar: false}": "cpu"},
    ),
    Wrong(
        "seed out of range",
        "command line: seed_everything=-1: -1 is not in bounds, numpy accepts from 0 to 4294967295.",
        "--seed_everything -1",
    ),
    Wrong(
        "no data",
        "recipe.yaml: data: there is no evaluation data. Add data: {class_path: TextData}, a datamodule or "
        "val_dataloaders.",
        recipe={RECIPE[RECIPE.index("data:") : RECIPE.index("trainer:")]: ""},
    ),
    Wrong("methods of something", "usage: pqqp-lightning methods", command="methods SparseGPT"),
    Wrong(
        "no model",
        "recipe.yaml: model: is missing. Add model: {class_path: CausalLM}, or give --config.",
        recipe={RECIPE[: RECIPE.index("data:")]: ""},
    ),
    Wrong(
        "no recipe",
        "command line: model: is missing. Add model: {class_path: CausalLM}, or give --config.",
        command="fit",
    ),
    Wrong(
        "a name for a stage that no folder can have",
        "recipe.yaml: stages: 'a/b' cannot be a stage's name. Use letters, digits, - and _; 'dense' is the model "
        "itself.",
        recipe={"  prune:": "  a/b:"},
    ),
    Wrong(
        "two stages of one name",
        "recipe.yaml: line 13, column 3: 'prune' stands there for the second time, and only one would count. "
        "Rename one.",
        recipe={"  quantize:": "  prune:"},
    ),
    # files
    Wrong(
        "recipe that is not there",
        "recipee.yaml: there is no such file. Did you mean 'recipe.yaml'?",
        command="fit --config recipee.yaml",
    ),
    Wrong(
        "recipe that is not YAML",
        "bad.yaml: line 2, column 7: is not YAML: expected ',' or ']', but got ':'.",
        command="fit --config bad.yaml",
        files={"bad.yaml": "model: [1, 2\nstages: }{"},
    ),
    Wrong(
        "recipe that is no text",
        "bad.yaml: is no UTF-8 text (byte 1). Save it as UTF-8.",
        command="fit --config bad.yaml",
        files={"bad.yaml": b"\xff\xfe\x00"},
    ),
    Wrong(
        "recipe that is a list",
        "bad.yaml: is not a recipe: expected 'model:', 'data:', 'stages:' ..., got [1, 2].",
        command="fit --config bad.yaml",
        files={"bad.yaml": "- 1\n- 2\n"},
    ),
    Wrong(
        "fragment that is not there",
        "configs/modle.yaml: there is no such file. Did you mean 'model.yaml'?",
        recipe={RECIPE[: RECIPE.index("data:")]: "model: configs/modle.yaml\n"},
        files={"configs/model.yaml": "class_path: CausalLM\n"},
    ),
    Wrong(
        "knob in a fragment",
        "configs/model.yaml: model (CausalLM): 'dtpe' is no knob. Did you mean 'dtype'?",
        recipe={RECIPE[: RECIPE.index("data:")]: "model: configs/model.yaml\n"},
        files={"configs/model.yaml": "class_path: CausalLM\ninit_args: {dtpe: float16}\n"},
    ),
    Wrong(
        "data file that is not there",
        "command line: data: evaluation='nothing.npy' does not exist (looked at FOLDER/nothing.npy).",
        "--data.evaluation nothing.npy",
    ),
    Wrong(
        "data file of another kind",
        "command line: data: evaluation='bad.npy' is not a readable .npy file (This file contains pickled "
        "(object) data). Write it with numpy.save.",
        "--data.evaluation bad.npy",
        files={"bad.npy": b"nonsense"},
    ),
    Wrong(
        "corrupt parquet",
        "recipe.yaml: data: source='./texts' has a file that cannot be read: texts/test-0.parquet "
        "(Parquet magic bytes not found in footer). Download it again.",
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {source: ./texts}\n"},
        files={"texts/train-0.parquet": b"PAR1 nonsense", "texts/test-0.parquet": b"PAR1 nonsense"},
    ),
    Wrong(
        "questions with a misspelt knob, and without a source",
        "recipe.yaml: data.questions (Questions): 'sampels' is no knob. Did you mean 'samples'?\n"
        "recipe.yaml: data.questions (Questions): source is required. Add it.",
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {questions: {sampels: 3}}\n"},
    ),
    Wrong(
        "a knob of the questions on the command line",
        "command line: data.questions (Questions): 'sampels' is no knob. Did you mean 'samples'?",
        "--data.questions.sampels 3",
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {questions: {source: ./questions}}\n"},
    ),
    Wrong(
        "so many questions as no one has",
        "command line: data: questions.samples=-1 is too small. Use 1 or more.",
        "--data.questions.samples -1",
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {questions: {source: allenai/ai2_arc}}\n"},
    ),
    Wrong(
        "questions that are not there",
        "recipe.yaml: data: questions.source='./questions' does not exist (looked at FOLDER/questions).",
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {questions: {source: ./questions}}\n"},
    ),
    Wrong(
        "model folder that is not there",
        "command line: model: model='./nothing' does not exist (looked at FOLDER/nothing).",
        "--model.model ./nothing",
    ),
    Wrong(
        "model that is not on the hub",
        "command line: model: model='nobody/nothing' cannot be loaded from the hub (We couldn't connect to "
        "'https://huggingface.co' to load the files, and couldn't find them in the cached files). Give a local folder "
        "(./my-model) or a .gguf file, or go online with HF_HUB_OFFLINE unset.",
        "--model.model nobody/nothing",
    ),
    Wrong(
        "corrupt GGUF",
        "command line: model: model='bad.gguf' is not a GGUF file of a known model (./bad.gguf is GGUF v0; this reader "
        "handles v2 and v3). Download the file again, or give a folder with config.json and safetensors.",
        "--model.model bad.gguf",
        files={"bad.gguf": b"GGUF" + bytes(100)},
    ),
    Wrong(
        "run folder below a file",
        "command line: run_dir='notes.txt/run' cannot be written: FOLDER/notes.txt is a file. "
        "Choose another --run_dir.",
        "--run_dir notes.txt/run",
        files={"notes.txt": "mine"},
    ),
    Wrong(
        "report of no folder",
        "nothing: there is no such folder. Name the folder of a run, such as runs/quickstart.",
        command="report nothing",
    ),
    Wrong(
        "report of no run",
        ".: holds no report.json. Name the folder of a run, such as runs/quickstart.",
        command="report .",
    ),
    Wrong(
        "report of a search that is not finished",
        ".: the search for the best order is not finished. Go on with --ckpt_path last.",
        command="report .",
        files={"run.json": '{"command": "order"}'},
    ),
    Wrong(
        "report of a sweep that is not finished",
        ".: the sweep is not finished. Go on with --ckpt_path last.",
        command="report .",
        files={"run.json": '{"command": "sweep"}'},
    ),
    Wrong(
        "report of half a search",
        "order.json: is truncated or altered (Unterminated string starting at: line 1 column 2 (char 1)). "
        "Run the recipe again.",
        command="report .",
        files={"order.json": '{"ord'},
    ),
    Wrong(
        "report of nothing",
        "usage: pqqp-lightning report RUN, as in pqqp-lightning report runs/quickstart",
        command="report",
    ),
    Wrong(
        "test of no run",
        "nothing: holds no recipe.yaml. Name the folder of a run, or give --config.",
        command="test --run_dir nothing",
    ),
    Wrong(
        "checkpoint that is not there",
        "command line: ckpt_path='nothing.ckpt' is neither a run folder nor a complete Lightning checkpoint.",
        "--ckpt_path nothing.ckpt",
        command="test --config recipe.yaml",
    ),
    Wrong(
        "fit from a file",
        "command line: ckpt_path='some.ckpt' is not supported: fit resumes the run in --run_dir. Use --ckpt_path last.",
        "--ckpt_path some.ckpt",
    ),
    Wrong(
        "nothing to go on with",
        "recipe.yaml: run: there is no run to resume. Leave --ckpt_path out to start one.",
        "--ckpt_path last",
    ),
    # values
    Wrong(
        "sparsity",
        "command line: stages.prune (Magnitude): sparsity=1.5 is not in (0, 1). 0.5 removes half of the weights.",
        "--stages.prune.sparsity 1.5",
    ),
    Wrong(
        "neither sparsity nor pattern",
        "recipe.yaml: stages.prune (Magnitude): neither of sparsity and pattern given. Set one: sparsity: 0.5, or "
        "pattern: '2:4'.",
        recipe={PRUNE: "{class_path: Magnitude}"},
    ),
    Wrong(
        "both sparsity and pattern",
        "command line: stages.prune (Magnitude): both of sparsity and pattern given. Set one: sparsity: 0.5, or "
        "pattern: '2:4'.",
        "--stages.prune.pattern 2:4",
    ),
    Wrong(
        "pattern that keeps more than there is",
        f"recipe.yaml: stages.prune (Magnitude): pattern='4:2' {PATTERN}",
        recipe={"sparsity: 0.5": "pattern: 4:2"},
    ),
    Wrong(
        "pattern that is none",
        f"recipe.yaml: stages.prune (Magnitude): pattern='abc' {PATTERN}",
        recipe={"sparsity: 0.5": "pattern: abc"},
    ),
    Wrong(
        "pattern that does not divide",
        f"recipe.yaml: stages.prune (Magnitude): pattern='2:5' does not divide the 64 input channels of {INNER}. Add "
        "them to ignore, or use sparsity.\n"
        f"recipe.yaml: stages.prune (Magnitude): pattern='2:5' does not divide the 128 input channels of {DOWN}. Add "
        "them to ignore, or use sparsity.",
        recipe={"sparsity: 0.5": "pattern: '2:5'"},
    ),
    Wrong(
        "pattern for a layer that is ignored",
        "recipe.yaml: stages.prune (Magnitude): pattern='q_proj' matches none of the layers that the stage acts on "
        "(targets=None, ignore=['q_proj']). Take it out, or change targets or ignore.",
        recipe={"sparsity: 0.5": "pattern: {q_proj: '2:4', '*': '1:4'}, ignore: [q_proj]"},
    ),
    Wrong(
        "every layer ignored",
        f"recipe.yaml: stages.prune (Magnitude): targets=None and ignore=['*'] leave no layer. The model has {ALL}.",
        recipe={"sparsity: 0.5": "pattern: '2:4', ignore: ['*']"},
    ),
    Wrong(
        "stage that matches no layer",
        f"command line: stages.prune (Magnitude): targets='conv9' matches no Linear or Conv2d layer. The model has "
        f"{ALL}.",
        "--stages.prune.targets [conv9]",
    ),
    Wrong(
        "block",
        "command line: stages.prune (Magnitude): blocks='model.layer' is not a module of the model. Did you mean "
        "'model.model.layers'?",
        "--stages.prune.blocks [model.layer]",
    ),
    Wrong("bits", "command line: stages.quantize (RTN): bits=9 is not between 2 and 8.", "--stages.quantize.bits 9"),
    Wrong(
        "group size that divides no layer",
        f"command line: stages.quantize (RTN): group_size=48 does not divide in_features=64 of {INNER}. Use 8, 16, 32 "
        "or 64, or add them to ignore.\n"
        f"command line: stages.quantize (RTN): group_size=48 does not divide in_features=128 of {DOWN}. Use 8, 16, 32 "
        "or 64, or add them to ignore.",
        "--stages.quantize.group_size 48",
    ),
    Wrong(
        "group size zero",
        "command line: stages.quantize (RTN): group_size=0 is not above 0. Use 'channel' for one scale an output "
        "channel.",
        "--stages.quantize.group_size 0",
    ),
    Wrong(
        "damping and block size",
        "command line: stages.quantize (GPTQ): block_size=0 is not above 0. The papers use 128.\n"
        "command line: stages.quantize (GPTQ): damping=2.0 is not in [0, 1]. The papers use 0.01.",
        "--stages.quantize GPTQ --stages.quantize.block_size 0 --stages.quantize.damping 2",
    ),
    Wrong(
        "the same layers quantized twice",
        f"command line: stages.again (RTN): 14 layers ({DECODER}.0.mlp.down_proj, {DECODER}.0.mlp.gate_proj, "
        f"{DECODER}.0.mlp.up_proj, ...) would leave the grid of stage 'quantize'. Give the stages disjoint targets, "
        "drop one, or set allow_undo: true to replace the earlier grid.",
        "--stages.again RTN",
    ),
    Wrong(
        "negative epochs",
        "command line: stages.prune (Magnitude): epochs=-1 is negative. Use 0 for no finetuning.",
        "--stages.prune.epochs -1",
    ),
    Wrong(
        "learning rate",
        "command line: stages.prune (Magnitude): learning_rate=0.0 is not above 0. Leave it out for the model's own.",
        "--stages.prune.learning_rate 0 --stages.prune.epochs 1 --data.train train.npy",
    ),
    Wrong(
        "learning rate without epochs",
        "command line: stages.prune (Magnitude): learning_rate=0.1 has no effect with epochs=0. Set epochs, or drop "
        "it.",
        "--stages.prune.learning_rate 0.1",
    ),
    Wrong(
        "epochs without training data",
        "command line: stages.prune (Magnitude): epochs=1 needs training data. Give TokenData some, or set epochs: 0.",
        "--stages.prune.epochs 1",
    ),
    Wrong(
        "finetuning after quantization",
        f"command line: stages.tune (Finetune): epochs=1 would move {TARGETED.replace('_proj', '_proj.weight')} off "
        "the grid of stage 'quantize'. Finetune before quantizing, recover with LoRA, set epochs: 0, or freeze these "
        "weights (requires_grad=False) in the model.",
        "--stages.tune Finetune --data.train train.npy",
    ),
    Wrong(
        "max_epochs that contradict the stages",
        "command line: trainer: max_epochs=3 contradicts the stages' epochs, 0 in all (no stage has any). Leave "
        "trainer.max_epochs out; it follows from the stages.",
        "--trainer.max_epochs 3",
    ),
    Wrong(
        "token ids beyond the vocabulary",
        "recipe.yaml: data: calibration='calibration.npy' gives a token id 299, but the model knows 100 tokens. "
        "Use the tokenizer that the model was trained with.",
        recipe={"vocab_size: 300": "vocab_size: 100"},
    ),
    Wrong(
        "more calibration samples than there are",
        "command line: data: calibration_samples=9 is more than the 4 windows in calibration.npy. Lower "
        "calibration_samples.",
        "--data.calibration_samples 9",
    ),
    Wrong(
        "NaN weights",
        f"recipe.yaml: model: 1 layer ({DECODER}.1.mlp.up_proj.weight) hold NaN or infinite weights. Use another "
        "checkpoint of the model.",
        recipe={"CausalLM": "odd_models.NaNWeights"},
    ),
    Wrong(
        "devices",
        "command line: trainer: `Trainer(devices='0')` value is not a valid input using cpu accelerator. Change the "
        "option, or leave it out.",
        "--trainer.devices 0",
    ),
    Wrong(
        "precision",
        "command line: trainer: precision=17: expected 64, 32, 16, 'transformer-engine', "
        "'transformer-engine-float16', '16-true', '16-mixed', 'bf16-true', 'bf16-mixed', '32-true', '64-true', '64', "
        "'32', '16', 'bf16' or null.",
        "--trainer.precision 17",
    ),
    Wrong(
        "option that Lightning refuses",
        "command line: trainer: You have passed invalid value 7.5 for limit_val_batches, it has to be in [0.0, 1.0] or "
        "an int. Change the option, or leave it out.",
        "--trainer.limit_val_batches 7.5",
    ),
    # orders
    Wrong(
        "order that names an unknown stage and leaves one out",
        "command line: stage_order: 'prun' is no stage. Did you mean 'prune'?\n"
        "command line: stage_order=['quantize', 'prun'] leaves out prune. Name every stage once.",
        "--stage_order [quantize,prun]",
    ),
    Wrong(
        "order that leaves one out",
        "command line: stage_order=['quantize'] leaves out prune. Name every stage once.",
        "--stage_order [quantize]",
    ),
    Wrong(
        "order that names one twice",
        "command line: stage_order=['quantize', 'prune', 'prune'] names a stage twice. Name every stage once.",
        "--stage_order [quantize,prune,prune]",
    ),
    Wrong(
        "order with bad options, all at once",
        "command line: store='recipe.yaml/store' cannot be written: FOLDER/recipe.yaml is a file. Choose another "
        "--store.\n"
        "command line: strategy='greedy' is unknown. Known: exhaustive, predict, progressive.\n"
        "command line: max_runs=0 measures no order. Use 1 or more.\n"
        "command line: time_limit=-3.0 is not above 0. Give minutes, or leave it out.",
        "--strategy greedy --max_runs 0 --time_limit -3 --store recipe.yaml/store",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "order of one stage",
        "recipe.yaml: stages: order needs 2 to 4 stages, but the recipe has 1. Change the stages.",
        command="order --config recipe.yaml",
        recipe={RECIPE[RECIPE.index("  quantize:") :]: ""},
    ),
    Wrong(
        "order of five stages",
        "recipe.yaml: stages: order needs 2 to 4 stages, but the recipe has 5. Change the stages.",
        "--stages.a RTN --stages.b RTN --stages.c RTN",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "metric that is not measured",
        "command line: metric='perplexty' is not measured. Did you mean 'perplexity'?",
        "--metric perplexty",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "options of a search and a stage, all at once",
        "command line: max_runs=0 measures no order. Use 1 or more.\n"
        "command line: stages.prune (Magnitude): sparsity=50.0 is not in (0, 1). 0.5 removes half of the weights.",
        "--max_runs 0 --stages.prune.sparsity 50",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "options that predict does not heed",
        "command line: max_runs=2 has no effect with strategy='predict', which measures no order. Leave it out.\n"
        "command line: executor='ray' has no effect with strategy='predict', which measures no order. Leave it out.",
        "--strategy predict --max_runs 2 --executor ray",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "search to go on with by another name",
        "command line: ckpt_path='Last' is not supported: order resumes the run in --run_dir. Use --ckpt_path last.",
        "--ckpt_path Last",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "store in the run folder",
        "command line: store='found/store' lies in run_dir='found', which the next search there moves aside. Choose "
        "another --store.",
        "--run_dir found --store found/store",
        command="order --config recipe.yaml",
    ),
    Wrong(
        "misspelt value of a model",
        "recipe.yaml: model: model.vocab_sise is not a setting of llama. Did you mean 'vocab_size'?",
        recipe={"vocab_size": "vocab_sise"},
    ),
    # nulls
    Wrong(
        "sections that are empty",
        "recipe.yaml: stages: expected a mapping of names to stages, got None. " + WRITE_STAGES + "\n"
        "recipe.yaml: trainer: expected options, as in {precision: 32}, got None.",
        recipe={
            RECIPE[RECIPE.index("stages:") :]: "stages:\n",
            "trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false}": "trainer:",
        },
    ),
    Wrong(
        "knobs and options that are null",
        "command line: repeats=None: expected a whole number.\n"
        "recipe.yaml: stages.prune (Magnitude): epochs=None: expected a whole number.\n"
        "recipe.yaml: stages.quantize (RTN): bits=None: expected a whole number or {name: a whole number}.",
        "--repeats null",
        command="order --config recipe.yaml",
        recipe={"bits: 4": "bits: null", "sparsity: 0.5": "sparsity: 0.5, epochs: null"},
    ),
    Wrong(
        "value of a grid that is null",
        "command line: grid.quantize (RTN): bits=None is not accepted: expected a whole number or {name: a whole "
        "number}.",
        "--grid.quantize.bits [null,4]",
        command=SWEEP,
    ),
    Wrong(
        "devices that Lightning cannot count",
        "command line: trainer: `devices` selected with `CPUAccelerator` should be an int > 0. Change the option, or "
        "leave it out.",
        "--trainer.devices -3",
    ),
    Wrong(
        "classes that are null",
        "command line: stages.prune: is null. Give a class, or leave it out.\n"
        "command line: model: is null. Give a class, or leave it out.",
        "--model null --stages.prune null",
    ),
    # words that stand alone
    Wrong(
        "option with one dash, and one without its value",
        "command line: --config has no value. Write --config recipe.yaml.\n"
        "command line: '-max_runs' has one dash. Write --max_runs.",
        command="order -max_runs 1 --config",
    ),
    Wrong(
        "recipe without --config",
        "command line: 'recipe.yaml' belongs to no option. A recipe is given with --config recipe.yaml.",
        command="fit recipe.yaml",
    ),
    Wrong(
        "list with a blank",
        "command line: '0.7]' belongs to no option. Quote a value that holds blanks, as in '[0.5, 0.7]'.",
        "--grid.prune.sparsity [0.5, 0.7]",
        command=SWEEP,
    ),
    Wrong(
        "folder for a recipe",
        ".: is a folder. Name a file in it: recipe.yaml.",
        command="fit --config .",
    ),
    # grids
    Wrong(
        "curve of a stage that prunes",
        "command line: curve='prune' is a Magnitude, which does not quantize. Name the stage that does.",
        "--grid.prune.sparsity [0.5] --curve prune",
        command=SWEEP,
    ),
    Wrong(
        "sweep without a grid",
        "recipe.yaml: grid: is missing. Add --grid.STAGE.ARGUMENT [a,b], where STAGE is prune or quantize.",
        command=SWEEP,
    ),
    Wrong(
        "grid over what is not there, and no points allowed",
        "command line: max_points=0 allows no point. Use 1 or more.\n"
        "command line: grid.prun: there is no such stage. Did you mean 'prune'?\n"
        "command line: grid.quantize (RTN): bitz is not an argument of this stage. Did you mean 'bits'?",
        "--grid.prun.sparsity [0.5] --grid.quantize.bitz [8,4] --max_points 0",
        command=SWEEP,
    ),
    Wrong(
        "grid with lists that are none",
        "command line: grid.prune (Magnitude): sparsity=[0.5, 0.5] names 0.5 twice. Name every value once.\n"
        "command line: grid.prune (Magnitude): scope='globl' is not accepted: expected 'layer', 'global'. Did you mean "
        "'global'?\n"
        "command line: grid.quantize (RTN): bits=4 is not a list. Write its values as in [4].\n"
        "command line: grid.quantize (RTN): clip=[] is empty. Write its values as in [False].",
        "--grid.quantize.bits 4 --grid.prune.sparsity [0.5,0.5] --grid.prune.scope [globl] --grid.quantize.clip []",
        command=SWEEP,
    ),
    Wrong(
        "grid in the recipe with values that the stages refuse",
        "command line: time_limit=0.0 is not above 0. Give minutes, or leave it out.\n"
        "recipe.yaml: grid.prune (Magnitude): sparsity=1.5 is not in (0, 1). 0.5 removes half of the weights.\n"
        "recipe.yaml: grid.quantize (RTN): bits=9 is not between 2 and 8.",
        "--time_limit 0",
        command=SWEEP,
        recipe={"stages:": "grid: {prune: {sparsity: [0.5, 1.5]}, quantize: {bits: [4, 9]}}\nstages:"},
    ),
    Wrong(
        "grid with a value that the model refuses",
        "command line: grid.quantize (RTN): group_size=24 does not divide in_features=64 of "
        f"{INNER}. Use 8, 16, 32 or 64, or add them to ignore.\n"
        f"command line: grid.quantize (RTN): group_size=24 does not divide in_features=128 of {DOWN}. "
        "Use 8, 16, 32 or 64, or add them to ignore.",
        "--grid.quantize.group_size [24,32]",
        command=SWEEP,
    ),
    Wrong(
        "grid of too many points",
        "command line: grid: has 6 points, more than max_points=5. Shorten it, or raise max_points.",
        "--grid.prune.sparsity [0.3,0.5] --grid.quantize.bits [8,4,3] --max_points 5",
        command=SWEEP,
    ),
    Wrong(
        "curve of no stage",
        "command line: curve='quantise' is not the name of a stage. Did you mean 'quantize'?",
        "--grid.prune.sparsity [0.3,0.5] --curve quantise",
        command=SWEEP,
    ),
    Wrong(
        "curve of either of two stages",
        "command line: grid: prune and quantize both have 'bits'. Say which one the curve is of: --curve prune.",
        "--grid.prune.bits [3,2] --grid.quantize.bits [8,4]",
        recipe={"Magnitude, init_args: {sparsity: 0.5}": "RTN, init_args: {bits: 3}"},
        command=SWEEP,
    ),
    Wrong(
        "curve at bits that there are none of",
        "command line: curve_bits (RTN): 1 is not between 2 and 8.",
        "--grid.prune.sparsity [0.3,0.5] --curve_bits [4,1]",
        command=SWEEP,
    ),
    Wrong(
        "grid in a recipe for another command",
        "recipe.yaml: 'grid' belongs to sweep. Take it out, or run pqqp-lightning sweep.",
        recipe={"stages:": "grid: {prune: {sparsity: [0.5, 0.7]}}\nstages:"},
    ),
    # several at once
    Wrong(
        "wrong everywhere, found by the parser",
        "recipe.yaml: 'sed_everything' is no section. Did you mean 'seed_everything'?\n"
        "recipe.yaml: stages.prune (Magnitude): sparsity='high': expected a number, {name: a number} or null.\n"
        "recipe.yaml: stages.quantize (RTN): bits=12 is not between 2 and 8.\n"
        "recipe.yaml: data: evaluation='eval.npy' does not exist (looked at FOLDER/eval.npy).\n"
        "recipe.yaml: trainer: 'device' is no knob. Did you mean 'devices'?",
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
        "recipe.yaml: model: model.model_type='lama' is not a causal language model of transformers. Did you mean "
        "'llama'?\n"
        "command line: stages.prune (Magnitude): sparsity=3.0 is not in (0, 1). 0.5 removes half of the weights.\n"
        "recipe.yaml: stages.quantize (RTN): bits=12 is not between 2 and 8.\n"
        "recipe.yaml: data: evaluation='eval.npy' does not exist (looked at FOLDER/eval.npy).",
        "--stages.prune.sparsity 3",
        recipe={"model_type: llama": "model_type: lama", "bits: 4": "bits: 12", "evaluation.npy": "eval.npy"},
    ),
    Wrong(
        "wrong values of several stages, of the data and of the trainer",
        "command line: run_dir='recipe.yaml/run' cannot be written: FOLDER/recipe.yaml is a file. Choose another "
        "--run_dir.\n"
        "recipe.yaml: data: evaluation='eval.npy' does not exist (looked at FOLDER/eval.npy).\n"
        "command line: trainer: max_epochs=3 contradicts the stages' epochs, 0 in all (no stage has any). Leave "
        "trainer.max_epochs out; it follows from the stages.\n"
        "recipe.yaml: stages.prune (Magnitude): sparsity=0.0 is not in (0, 1). 0.5 removes half of the weights.\n"
        f"recipe.yaml: stages.quantize (RTN): group_size=100 does not divide in_features=64 of {INNER}. Use 8, 16, "
        "32 or 64, or add them to ignore.",
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


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.what)
def test_it_is_refused_with_exactly_these_words(wrong, folder, capfd):
    write_recipe(folder, wrong.recipe)
    for name, content in wrong.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    before = everything_in(folder)
    code = run(*wrong.command.split(), *wrong.arguments.split())
    message = wrong.message.replace("FOLDER", str(folder)).replace("STAGES", ", ".join(known_stages()))
    assert capfd.readouterr().err == f"{message}\n"
    assert code == 2
    assert everything_in(folder) == before


@pytest.mark.parametrize("what", ["corrupt GGUF", "a model that cannot be built, and the rest"])
def test_a_real_process_says_the_same(what, folder):
    wrong = next(wrong for wrong in WRONG if wrong.what == what)
    write_recipe(folder, wrong.recipe)
    for name, content in wrong.files.items():
        (folder / name).write_bytes(content)
    done = run_process(folder, *wrong.command.split(), *wrong.arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == wrong.message.replace("FOLDER", str(folder)) + "\n"
    assert not (folder / "run").exists()


def test_accelerator_that_is_none(folder, capfd):
    assert run("fit", "--config", "recipe.yaml", "--trainer.accelerator", "quantum") == 2
    words = capfd.readouterr().err
    assert words.startswith("command line: trainer: You selected an invalid accelerator name: `accelerator='quantum'`.")
    assert words.endswith("Change the option, or leave it out.\n")
    assert not (folder / "run").exists()


def test_environment_variable_with_a_wrong_value(folder, monkeypatch, capfd):
    monkeypatch.setenv("PQQP_FIT__TRAINER__MAX_EPOCHS", "many")
    assert run("fit", "--config", "recipe.yaml") == 2
    where = "PQQP_FIT__TRAINER__MAX_EPOCHS"
    assert capfd.readouterr().err == f"{where}: trainer: max_epochs='many': expected a whole number or null.\n"


def test_unquoted_pattern_is_understood(folder):
    write_recipe(folder, {"sparsity: 0.5": "pattern: 2:4"})  # which YAML 1.1 reads as 124
    assert run("fit", "--config", "recipe.yaml") == 0
    report = (folder / "run" / "report.json").read_text()
    assert '"pruned": 0.5' in report


def test_folder_without_permission(folder, monkeypatch, capfd):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and (mode, path) != (os.W_OK, folder))
    assert run("fit", "--config", "recipe.yaml") == 2
    assert capfd.readouterr().err == (
        f"recipe.yaml: run_dir='run' cannot be written: {folder} is not writable. Choose another --run_dir.\n"
    )


# What is found while a run goes on: it ends with the words, and what was finished stays.


def test_nan_activations_end_the_run_with_the_layer_named(folder, capfd):
    write_recipe(folder, {"CausalLM": "odd_models.NaNActivations", "RTN": "GPTQ"})
    assert run("fit", "--config", "recipe.yaml") == 2
    assert capfd.readouterr().err == (
        f"recipe.yaml: stages.quantize: 1 layer ({DECODER}.1.mlp.down_proj) cannot be calibrated: its calibration "
        "inputs hold NaN or infinite values. Check the model and the calibration data, or add the layer to ignore.\n"
    )
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
    assert done.stderr == (
        "recipe.yaml: run/stages/1-prune: cannot be written: Error while serializing: I/O error: File too large (os "
        "error 27). What was finished before is still there: make room and go on with --ckpt_path last, or choose "
        "another --run_dir.\n"
    )
    assert [path.name for path in (folder / "run" / "stages").iterdir()] == []
    assert len((folder / "run" / "records.jsonl").read_text().splitlines()) == 1
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 0
    assert (folder / "run/model" / WEIGHTS).read_bytes() == (folder / "whole/model" / WEIGHTS).read_bytes()


def test_disk_full_in_the_second_stage_keeps_the_first(folder, monkeypatch, capfd):
    import pqqp_lightning.checkpoint.save as checkpoint

    save, calls = checkpoint.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert run("fit", "--config", "recipe.yaml") == 2
    assert capfd.readouterr().err == (
        "recipe.yaml: run/stages/2-quantize: cannot be written: No space left on device. What was finished before is "
        "still there: make room and go on with --ckpt_path last, or choose another --run_dir.\n"
    )
    assert (folder / "run/stages/1-prune" / MANIFEST).is_file()
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 0


def test_disk_full_while_lightning_writes_is_worded_too(folder, capfd):
    arguments = ["--data.train", "train.npy", "--stages.prune.epochs", "1"]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, {resource.RLIM_INFINITY}))"
    (folder / "sitecustomize.py").write_text(limit)  # room for the stage's checkpoint, not for the training state
    done = run_process(folder, "fit", "--config", "recipe.yaml", *arguments, PYTHONPATH=str(folder))
    assert done.returncode == 2
    assert done.stderr == (
        "recipe.yaml: a file of the run: cannot be written: File too large. What was finished before is still there: "
        "make room and go on with --ckpt_path last, or choose another --run_dir.\n"
    )
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


def test_checkpoint_of_another_architecture(damaged, capfd):
    assert run("test", "--run_dir", "run", "--model.model.vocab_size", "400") == 2
    assert capfd.readouterr().err == (
        "command line: run/model: model.model.embed_tokens.weight has shape [300, 64] instead of [400, 64]: it is of "
        "another model. Use the recipe that made it.\n"
    )


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
def test_last_of_another_recipe_is_refused_and_nothing_is_lost(command, arguments, difference, damaged, capfd):
    before = everything_in(damaged)
    assert run(command, "--config", "recipe.yaml", "--ckpt_path", "last", *arguments.split()) == 2
    assert capfd.readouterr().err == (
        f"recipe.yaml: run: holds a run of another recipe: {difference}. Use that recipe, another --run_dir, or leave "
        "--ckpt_path out to start over.\n"
    )
    assert everything_in(damaged) == before


def test_damaged_lightning_checkpoint(folder, capfd):
    (folder / "some.ckpt").write_bytes(b"PK nonsense")
    assert run("test", "--config", "recipe.yaml", "--ckpt_path", "some.ckpt") == 2
    words = "ckpt_path='some.ckpt' is neither a run folder nor a complete Lightning checkpoint."
    assert capfd.readouterr().err == f"command line: {words}\n"


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
        f"data: calibration='nothing.npy' does not exist (looked at {folder}/nothing.npy).",
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
