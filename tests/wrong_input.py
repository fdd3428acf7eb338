"""The table of wrong recipes and command lines: for each, which setting is to blame and who set it."""

from __future__ import annotations

from dataclasses import dataclass, field

from command_line import RECIPE


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
SEARCH = "search --config recipe.yaml"
TRAINED = {"evaluation: evaluation.npy": "evaluation: evaluation.npy, train: train.npy"}
BARE_MODELS = """
from lightning.pytorch import LightningModule
from pqqp_lightning.models import CausalLM
from torch.nn.utils.parametrizations import weight_norm


class Normed(CausalLM):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for layer in self.model.model.layers:
            weight_norm(layer.mlp.up_proj)


class Untrained(CausalLM):
    configure_optimizers = LightningModule.configure_optimizers


class Unmeasured(CausalLM):
    validation_step = LightningModule.validation_step


class ByHand(CausalLM):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False
"""
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
        "--stages.mine NeverLoaded",  # a name that no other test gives a stage
        files={"mine.py": "import nothing\n\nclass NeverLoaded:\n    pass\n"},
    ),
    Wrong(
        "file named like a library",
        "json.py ~ Python has a module 'json' already",
        "--stages.mine NeverLoaded",
        files={"json.py": "class NeverLoaded:\n    pass\n"},
    ),
    # shapes and types
    Wrong(
        "text for a number",
        "recipe.yaml: stages.prune.sparsity='high'",
        recipe={"sparsity: 0.5": "sparsity: high"},
        message="recipe.yaml: stages.prune (Magnitude): sparsity='high' should be a number, {name: a number} or null.",
    ),
    Wrong(
        "weights that lie nowhere",
        "command line: model.offload='dsk'",
        "--model.offload dsk",
    ),
    Wrong(
        "a stage for the whole of an offloaded model",
        "command line: stages.prune.scope='global' ~ model.offload: none",
        "--model.offload disk --stages.prune.scope global",
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
    Wrong(
        "data without what it needs",
        "command line: data.calibration=None ~ should be text",
        "--data.calibration null",
    ),
    Wrong(
        "a model's folder with a slip",
        "command line: model='exports/modle' ~ Did you mean 'exports/model'?",
        "--model.model exports/modle",
        files={"exports/model": "not read"},
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
        "command line: ckpt_path ~ run: there is no run to resume",
        "--ckpt_path last",
    ),
    Wrong(
        "bos",
        "recipe.yaml: data.bos ~ 'start'",
        recipe={RECIPE_DATA: "  class_path: TextData\n  init_args: {bos: start}\n"},
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
        "command line: stages.prune.pattern='2:4' ~ cannot stand beside sparsity=0.5",
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
        "precision of calibration that is no word of torch's",
        "command line: calibration_precision='fast'",
        "--calibration_precision fast",
    ),
    Wrong(
        "two precisions of calibration",
        "command line: calibration_precision='high' ~ contradicts trainer.calibration_precision='medium'",
        "--calibration_precision high --trainer.calibration_precision medium",
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
            "command line: time_limit=-3.0",
            "command line: strategy='greedy'",
            "command line: max_runs=0",
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
        ["command line: max_runs=2 ~ strategy='predict'", "command line: executor='ray' ~ strategy='predict'"],
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
        "search under two budgets, by an unknown sampler, for no pipeline",
        ["command line: target_rate=8", "command line: sampler='tpee' ~ Did you mean 'tpe'?", "command line: trials=0"],
        "--target_rate 8 --target_bits 3 --sampler tpee --trials 0",
        command=SEARCH,
    ),
    Wrong(
        "search with a budget that begins with a dash",
        "command line: target_size='-5MB'",
        "--target_size -5MB",
        command=SEARCH,
        message="command line: target_size='-5MB' begins with a dash, as options do. Write --target_size=-5MB.",
    ),
    Wrong(
        "search with a seed that is none",
        "command line: sampler_seed=-1 ~ from 0 to 4294967295",
        "--target_rate 2 --sampler_seed -1",
        command=SEARCH,
    ),
    Wrong(
        "search in a range that a shell left without quotes",
        "command line: space.prune.sparsity='{low:0.3,high:0.7,step:0.2}' ~ with blanks after the colons",
        "--space.prune.sparsity {low:0.3,high:0.7,step:0.2}",
        command=SEARCH,
    ),
    Wrong(
        "search under a budget that is no size",
        "command line: target_size='60mugs'",
        "--target_size 60mugs",
        command=SEARCH,
    ),
    Wrong(
        "search under a rate that nothing reaches",
        "command line: target_rate=50.0 ~ than the smallest pipeline reaches: prune[sparsity=0.7] -> quantize[bits=2]",
        "--target_rate 50 --space.prune.sparsity [0.5,0.7] --space.quantize.bits [2,4]",
        command=SEARCH,
    ),
    Wrong(
        "search in a space that names no stage and no argument, in no order",
        [
            "command line: space.prun ~ Did you mean 'prune'?",
            "command line: space.prune.optional='maybe'",
            "command line: space.quantize.bitz ~ Did you mean 'bits'?",
            "command line: space.order='backwards'",
        ],
        "--space.prun.sparsity [0.5] --space.quantize.bitz [8,4] --space.prune.optional maybe --space.order backwards",
        command=SEARCH,
    ),
    Wrong(
        "search in ranges that are none",
        [
            "command line: space.prune.sparsity={'low': 0.3, 'high': 0.7}",
            "command line: space.quantize.bits={'low': 8, 'hi': 3}",
        ],
        '--space.prune.sparsity {"low":0.3,"high":0.7} --space.quantize.bits {"low":8,"hi":3}',
        command=SEARCH,
    ),
    Wrong(
        "search with values that the stage refuses",
        ["command line: space.prune.sparsity=1.5", "command line: space.quantize.bits=9"],
        "--space.prune.sparsity [0.5,1.5] --space.quantize.bits [4,9]",
        command=SEARCH,
    ),
    Wrong(
        "search with a value that the model refuses",
        ["command line: space.quantize.group_size=24", "command line: space.quantize.group_size=24"],
        "--space.quantize.group_size [24,32]",
        command=SEARCH,
    ),
    Wrong(
        "search over a stage without a search space",
        "command line: space.quantize ~ no search space",
        "--space.quantize {}",
        recipe={"RTN, init_args: {bits: 4}": "INT8"},
        command=SEARCH,
    ),
    Wrong(
        "search with nothing to choose",
        "command line: space ~ nothing to choose",
        "--space.prune.sparsity [0.5] --space.order fixed",
        command=SEARCH,
    ),
    Wrong(
        "search in a space of too many pipelines",
        "command line: space ~ 12 pipelines",
        "--space.prune.sparsity [0.3,0.5] --space.quantize.bits [8,4,3] --max_points 5",
        command=SEARCH,
    ),
    Wrong(
        "search for an objective that nobody measures",
        "command line: objectives='perplexty' ~ Did you mean 'perplexity'?",
        "--objectives [perplexty,size]",
        command=SEARCH,
    ),
    Wrong(
        "search for the size alone, and with an order that lacks a stage",
        ["command line: objectives=['size']", "command line: space.order=['prune']"],
        "--objectives [size] --space.order [[prune]]",
        command=SEARCH,
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
    # what a model lacks
    Wrong(
        "parametrized weights",
        "recipe.yaml: stages.prune ~ Set trainer.fold_parametrizations: true",
        message="recipe.yaml: stages.prune (Magnitude): 2 layers (model.model.layers.0.mlp.up_proj, "
        "model.model.layers.1.mlp.up_proj) compute their weights in every forward pass (weight_norm): a stage cannot "
        "change them. Set trainer.fold_parametrizations: true, which makes plain weights of them, or add them to "
        "ignore.",
        recipe={"class_path: CausalLM": "class_path: bare_models.Normed", "bits: 4": "bits: 4, ignore: [up_proj]"},
        files={"bare_models.py": BARE_MODELS},
    ),
    Wrong(
        "option of the trainer without its section",
        "command line: fold_parametrizations ~ Did you mean '--trainer.fold_parametrizations'?",
        "--fold_parametrizations true",
    ),
    Wrong(
        "folding that is neither true nor false",
        "command line: trainer.fold_parametrizations='maybe'",
        "--trainer.fold_parametrizations maybe",
    ),
    Wrong(
        "no optimizer for a stage that trains",
        "command line: stages.prune.epochs=1 ~ needs a configure_optimizers in Untrained",
        "--stages.prune.epochs 1",
        recipe={"class_path: CausalLM": "class_path: bare_models.Untrained", **TRAINED},
        files={"bare_models.py": BARE_MODELS},
    ),
    Wrong(
        "no validation_step",
        "recipe.yaml: model ~ Unmeasured has no validation_step",
        recipe={"class_path: CausalLM": "class_path: bare_models.Unmeasured"},
        files={"bare_models.py": BARE_MODELS},
    ),
    Wrong(
        "what has no effect on a model that optimizes by hand",
        [
            "command line: trainer.gradient_clip_val=1 ~ ByHand optimizes by hand",
            "command line: stages.prune.distill ~ has no effect",
        ],
        "--stages.prune.epochs 1 --trainer.gradient_clip_val 1 --stages.prune.distill.weight 0.5",
        recipe={"class_path: CausalLM": "class_path: bare_models.ByHand", **TRAINED},
        files={"bare_models.py": BARE_MODELS},
    ),
    Wrong(
        "an optimizer's eps in float16",
        "command line: trainer.precision='16-true' ~ AdamW's eps=1e-08 is 0 in float16",
        "--stages.prune.epochs 1 --trainer.precision 16-true",
        message="command line: trainer: precision='16-true' would make the weights NaN in training: AdamW's eps=1e-08 "
        "is 0 in float16. Use trainer.precision bf16-true or 16-mixed, or give the optimizer eps=1e-4.",
        recipe=TRAINED,
    ),
    Wrong(
        "training without batches",
        "command line: trainer.limit_train_batches=0",
        "--stages.prune.epochs 1 --trainer.limit_train_batches 0",
        recipe=TRAINED,
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
