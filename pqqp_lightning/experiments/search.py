"""``search``: the best pipeline that fits a size, order and strength together.

The pipelines of the space that can run and fit are known before anything runs. A sampler chooses among them; their
beginnings are nodes of the prefix tree, which are measured once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.experiments.options import PipelineOptions
from pqqp_lightning.experiments.search_answer import Answer, Measured
from pqqp_lightning.experiments.search_budget import Candidates, check_count, check_targets, find_candidates
from pqqp_lightning.experiments.search_choice import SAMPLERS, Choice, Chooser
from pqqp_lightning.experiments.search_objectives import SIZE, Objectives, check_objectives, further_metrics
from pqqp_lightning.experiments.search_prior import count_weaker
from pqqp_lightning.experiments.search_space import Space, read_space
from pqqp_lightning.experiments.session import (
    Show,
    check_experiment,
    exclusive_run_folder,
    link_folder,
    open_search,
    store_of,
)
from pqqp_lightning.report.pictures import draw_search
from pqqp_lightning.report.search_numbers import write_pipelines
from pqqp_lightning.runs.checks import read_data
from pqqp_lightning.runs.layer_probe import probe_layers
from pqqp_lightning.runs.preparation import prepare
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.storage.files import write_json, write_text
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.storage.run_folder import RunFolder
from pqqp_lightning.trials.executors import LOCAL, Executor, is_installed, open_executor
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree, distinct_prefixes
from pqqp_lightning.trials.progress import Progress, TimeLimit
from pqqp_lightning.trials.rungs import Rungs
from pqqp_lightning.trials.verdict import Judge

AT_ONCE = 4
"""Pipelines that are chosen together for an executor that measures several at a time."""


def search_pipelines(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    options: PipelineOptions = PipelineOptions(),  # noqa: B008 (frozen)
    *,
    resume: bool = False,
    show: Show | None = None,
) -> None:
    """Find the best pipeline of the trainer's stages within a budget, and write ``search.json`` and ``best.yaml``.

    Args:
        trainer: has the stages, and the run folder as ``default_root_dir``.
        module: the dense model.
        datamodule: its data.
        options: the space, the budget, the objectives and the limits.
        resume: continue the search in the run folder.
        show: called with the run folder at the end, before another process may use it.

    Raises:
        RecipeError: with every problem, before any work.
    """
    results = store_of(trainer, options.store)
    data = RunData(module, datamodule=datamodule)
    prepare(trainer, data)
    space = check_search(trainer, data, results, options)
    read_data(trainer, data, trainer.stages)
    probe_layers(trainer, data, trainer.stages)  # the checks of the pipelines look at how the model uses its layers
    candidates = find_candidates(space, data, options)
    with exclusive_run_folder(trainer, results, show):
        PipelineSearch(trainer, data, space, candidates, results, options).run(resume=resume)


def check_search(trainer: Trainer, data: RunData, store: ResultStore, options: PipelineOptions) -> Space:
    """The space, if nothing can be refused before the data is read.

    Raises:
        RecipeError: with every problem.
    """
    problems = check_experiment(trainer, data, store, options)
    problems += check_targets(options) + check_objectives(options, trainer) + _check_sampler(options)
    try:
        space = read_space(trainer.stages, options.space)
        problems += check_count(space, options.max_points)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    return space


def _check_sampler(options: PipelineOptions) -> list[Problem]:
    problems = []
    if options.sampler not in SAMPLERS:
        problems.append(Problem("sampler", options.sampler, "is unknown", suggest(options.sampler, SAMPLERS).strip()))
    if not is_installed("optuna"):
        way_out = 'Run pip install "pqqp-lightning[search]".'
        problems.append(Problem(text="search needs Optuna, which is not installed", way_out=way_out))
    for name in ("trials", "at_once"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(Problem(name, value, "measures no pipeline", "Use 1 or more."))
    return problems


class PipelineSearch:
    """Measures the pipelines that a sampler chooses, and writes the answer.

    Args:
        trainer: for evaluation and training.
        data: the dense model and its data.
        space: what pipelines are made of.
        candidates: the pipelines that can run and fit.
        store: reads and keeps results.
        options: as the user gave them.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: RunData,
        space: Space,
        candidates: Candidates,
        store: ResultStore,
        options: PipelineOptions,
    ) -> None:
        self._trainer, self._data, self._space, self._candidates = trainer, data, space, candidates
        self._options = options
        self._folder = RunFolder(Path(trainer.default_root_dir))
        self._variants = space.steps
        stages = {step: variant.stage for step, variant in self._variants.items()}
        self._tree = PrefixTree(trainer, data, stages, store)
        self._progress = Progress("search", trainer, self._tree, bound="at most ")
        self._measured: list[Measured] = []

    def run(self, *, resume: bool) -> None:
        """Measure what the store does not have, and write report, tables, figures and the best recipe."""
        options = self._options
        named = options.objectives or []
        asked = {"command": "search", "space": json.loads(json.dumps(self._space.plain(), default=str))}
        asked["sampler"] = [options.sampler, options.sampler_seed, self._at_once]
        asked["objectives"] = [options.objectives, options.metric, options.stop_early]
        asked["budget"] = [self._candidates.budget.name, self._candidates.budget.value]
        deciding = replace(options, metric=named[0]) if named else options
        with open_executor(options.executor, self._trainer, self._tree, self._progress) as executor:
            metrics = further_metrics(options)
            judge = open_search(
                self._trainer, self._data, self._tree, asked, deciding, resume=resume, objectives=metrics
            )
            self._announce()
            names = named or ([judge.metric] if self._candidates.budget.name else [judge.metric, SIZE])
            objectives = Objectives(names, judge, self._data.module, self._folder)
            chooser = self._chooser(names)
            notes = objectives.notes() + self._measure(executor, judge, objectives, chooser)
        answer = Answer(judge, self._space, self._candidates, self._measured, names, self._trainer.recipe_text)
        self._finish(answer, chooser, notes)

    @property
    def _at_once(self) -> int:
        return self._options.at_once or (1 if self._options.executor == LOCAL else AT_ONCE)

    def _chooser(self, objectives: Sequence[str]) -> Chooser:
        journal = self._folder.study if self._trainer.is_global_zero else None
        found, options = self._candidates, self._options
        return Chooser(
            self._space,
            found.fitting,
            options.sampler,
            options.sampler_seed,
            len(objectives),
            journal,
            count_weaker(self._space, list(found.fitting), found.savings) if found.budget.name else None,
        )

    def _announce(self) -> None:
        found = self._candidates
        trials = min(self._options.trials, len(found.fitting))
        longest = max(len(steps) for steps in found.fitting)
        self._progress.most = trials * longest
        if self._trainer.is_global_zero:
            words = f"search: {len(found.fitting)} pipelines can run"
            if found.budget.name:
                words = f"search: {len(found.fitting)} pipelines fit, {found.over} are too large"
            words += f", {found.refused} cannot run" if found.refused else ""
            print(f"{words}: {trials} of them, at most {self._progress.most} stage applications", flush=True)

    def _measure(self, executor: Executor, judge: Judge, objectives: Objectives, chooser: Chooser) -> list[str]:
        """Measure one choice after another; the reasons if the search stopped early."""
        options, limit = self._options, TimeLimit(self._trainer, self._options.time_limit)
        while chooser.left and len(self._measured) < options.trials:
            if self._measured and limit.is_over():
                return [f"stopped after {len(self._measured)} pipelines: time_limit={limit.minutes:g} minutes"]
            count = min(self._at_once, options.trials - len(self._measured))
            choices = chooser.choose(count, lambda steps: self._strengths(steps, judge))
            if self._stops_early(objectives):
                for choice in choices:
                    self._measure_in_rungs(choice, executor, objectives, chooser)
            else:
                sequences = [choice.candidate.steps for choice in choices]
                done = set(executor.measure(sequences, lambda: bool(self._measured) and limit.is_over()))
                for choice in choices:  # in the sampler's order, whichever was measured first
                    if choice.candidate.steps in done:
                        self._keep(choice, objectives, chooser)
            self._drop(chooser, judge)
        if not chooser.left:
            return ["every pipeline of the space that fits was measured"]
        return []

    def _stops_early(self, objectives: Objectives) -> bool:
        """Whether evaluations may be stopped: with several objectives, behind in one does not say enough."""
        single = len(objectives.names) == 1 and self._trainer.world_size == 1
        return self._options.stop_early and single and self._options.executor == LOCAL

    def _measure_in_rungs(self, choice: Choice, executor: Executor, objectives: Objectives, chooser: Chooser) -> None:
        """Measure one choice, and stop its evaluation once it is clearly behind the best one."""
        steps, judge = choice.candidate.steps, objectives.judge
        best = max((one.steps for one in self._whole()), key=judge.score, default=None)
        if best is None:
            for _ in executor.measure([steps], lambda: False):
                self._keep(choice, objectives, chooser)
            return
        for _ in executor.measure([steps[:-1]] if steps[:-1] else [], lambda: False):
            pass
        rungs = Rungs(judge, best)
        known = self._tree.is_known(steps)
        result = self._tree.measure_unless(steps, judge.metric, lambda states: rungs.stop(states) is not None)
        if not known:
            self._progress.measured(steps)
        stop = rungs.stop(result) if isinstance(result, Tensor) else None
        if stop is None:
            self._keep(choice, objectives, chooser)
            return
        assert stop.behind.value is not None
        score = judge.score(best) - stop.behind.value
        value = score if judge.higher else -score
        self._measured.append(
            Measured(
                len(self._measured) + 1,
                choice.trial.number,
                choice.candidate,
                {judge.metric: value},
                [score],
                True,  # as expected; its size is not counted
                self._applications(steps),
                stop,
            )
        )
        chooser.tell_stopped(choice, score, stop.samples)

    def _whole(self) -> list[Measured]:
        """The pipelines that fit and were evaluated on all samples."""
        return [one for one in self._measured if one.fits and one.stop is None]

    def _applications(self, steps: Order) -> int:
        """How many stage applications all pipelines so far and this one need."""
        return len(distinct_prefixes([*(one.steps for one in self._measured), steps]))

    def _strengths(self, steps: Sequence[str], judge: Judge) -> list[float]:
        """How strong each step is alone: its loss of the metric if all are measured, else its expected saving."""
        known = judge.intensities(steps)
        if len(known) == len(steps):
            return [known[step] for step in steps]
        return [self._candidates.savings[step] for step in steps]

    def _keep(self, choice: Choice, objectives: Objectives, chooser: Chooser) -> None:
        """Take a measured pipeline into the report, and tell the sampler its values."""
        steps = choice.candidate.steps
        record = self._tree.measure(steps).record
        values = objectives.values(steps)
        scores = objectives.scores(values)
        fits = self._candidates.budget.allows(record["size_bytes"], record["bits_per_weight"])
        number, applications = len(self._measured) + 1, self._applications(steps)
        self._measured.append(
            Measured(number, choice.trial.number, choice.candidate, values, scores, fits, applications)
        )
        chooser.tell(choice, scores, steps=list(steps), size_bytes=record["size_bytes"])

    def _drop(self, chooser: Chooser, judge: Judge) -> None:
        """Drop the models that no later pipeline starts from, except the best one's."""
        needed = set(distinct_prefixes(chooser.left))
        best = max((one.steps for one in self._whole()), key=judge.score, default=None)
        for node in distinct_prefixes([measured.steps for measured in self._measured]):
            if node not in needed and node != best:
                self._tree.drop(node)

    def _finish(self, answer: Answer, chooser: Chooser, notes: list[str]) -> None:
        best = answer.best
        if best is not None:
            self._tree.take_model(best.steps, lambda model: link_folder(model, self._folder.model))
        if self._trainer.is_global_zero:
            scores = {one.trial: one.scores[0] for one in self._measured if one.stop is None}
            report = answer.report(chooser.importance(scores), self._options.sampler, self._tree.applications, notes)
            if text := answer.recipe():
                write_text(self._folder.best_recipe, text)
            report["figures"] = draw_search(self._folder, report)
            write_pipelines(self._folder, report)
            write_json(self._folder.search, report)
        for node in self._tree.results():
            if best is None or node != best.steps:
                self._tree.drop(node)
