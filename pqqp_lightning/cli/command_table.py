"""The commands, in the order of ``--help``. This file imports nothing: ``--help`` answers without torch."""

from __future__ import annotations

from dataclasses import dataclass

HELP_HEAD = """\
usage: pqqp-lightning COMMAND [options]

Prune, quantize and recover a trained network in any order. A recipe (YAML) names the model, the data and an ordered
list of stages; every stage is measured, and the result is a packed checkpoint that is as small as the table says.

commands:
"""

HELP_TAIL = """
Any option of a recipe can be set on the command line:
  --stages.NAME METHOD --stages.NAME.ARGUMENT VALUE   add a stage, or change one of its arguments
  --stage_order [b,a]                                 apply the recipe's stages in another order
  --run_dir DIR                                       the run folder (runs/RECIPE by default)
  --ckpt_path last                                    resume the run in the run folder
  --print_config                                      print the whole recipe with its defaults, and stop

pqqp-lightning COMMAND --help lists every option. Environment variables set options too: PQQP_FIT__RUN_DIR=DIR.
"""


@dataclass(frozen=True)
class Command:
    """A command of ``pqqp-lightning``.

    Attributes:
        summary: what it does, in a few words.
        example: the words after the command's name, one entry for each line.
        takes_recipe: whether it takes a recipe and its options.
        has_options: whether it has options of its own instead, which its own ``--help`` lists.
        resumable: whether ``--ckpt_path last`` resumes it after a kill.
        is_experiment: whether it runs the stages many times; its run folder is then ``runs/RECIPE-COMMAND``.
    """

    summary: str
    example: tuple[str, ...] = ()
    takes_recipe: bool = True
    has_options: bool = False
    resumable: bool = False
    is_experiment: bool = False


QUICKSTART = "--config recipes/quickstart.yaml"
COMMANDS = {
    "fit": Command("apply the stages in order", (QUICKSTART,), resumable=True),
    "order": Command("try every order of the stages", (QUICKSTART,), resumable=True, is_experiment=True),
    "sweep": Command(
        "try a grid of arguments in every order",
        (QUICKSTART, "--grid.prune.sparsity [0.5,0.7] --grid.quantize.bits [8,4]"),
        resumable=True,
        is_experiment=True,
    ),
    "search": Command(
        "the best pipeline that fits a size", (f"{QUICKSTART} --target_rate 3.5",), resumable=True, is_experiment=True
    ),
    "analyze": Command("errors of the layers in both orders", (QUICKSTART,), resumable=True, is_experiment=True),
    "validate": Command("measure a model, or a run's checkpoint", ("--run_dir runs/quickstart",)),
    "test": Command("the same on the test data", ("--run_dir runs/quickstart",)),
    "report": Command("show a run's table and page again", ("runs/quickstart",), takes_recipe=False),
    "export": Command(
        "write a run's model for other programs",
        ("runs/quickstart --to hf --out model",),
        takes_recipe=False,
        has_options=True,
    ),
    "generate": Command(
        "continue a prompt with a run's model",
        ('runs/quickstart --prompt "Once upon"',),
        takes_recipe=False,
        has_options=True,
    ),
    "classify": Command(
        "classify images with a run's model",
        ("runs/digits photos",),
        takes_recipe=False,
        has_options=True,
    ),
    "methods": Command("list the stages that can be used", takes_recipe=False),
}


def general_help() -> str:
    """The text of ``pqqp-lightning --help``."""
    lines = []
    for name, command in COMMANDS.items():
        first, *further = command.example or ("",)
        lines.append(f"  {name:<9} {command.summary:<39} pqqp-lightning {name} {first}".rstrip())
        lines += [f"{'':<56}{words}" for words in further]
    return HELP_HEAD + "\n".join(lines) + "\n" + HELP_TAIL
