"""Chooses the pipelines to measure, with a sampler of Optuna over the ones that can run and fit.

The study lies in the run folder as a journal, for Optuna's own tools. It is written anew when a search starts or
resumes: a sampler's choices follow from its seed and from the results, and these are in the store.
"""

from __future__ import annotations

import json
import logging
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqqp_lightning.experiments.search_budget import Candidate
from pqqp_lightning.experiments.search_space import Space
from pqqp_lightning.trials.prefix_tree import Order

if TYPE_CHECKING:
    import optuna

TPE, NSGA2, RANDOM = "tpe", "nsga2", "random"
SAMPLERS = (TPE, NSGA2, RANDOM)
STARTS = 8
"""Pipelines that are drawn before a sampler has something to learn from."""
POPULATION = 8
"""Pipelines of one generation of NSGA-II."""
MOST_ASKED = 20
"""Proposals that cannot be used before the nearest pipeline that can is taken instead."""
ORDER, IN = "order", "in"
WORST = -1e300
"""What Optuna is told in place of minus infinity."""


@dataclass(frozen=True)
class Choice:
    """A pipeline to measure, and its trial in Optuna's study."""

    trial: Any
    candidate: Candidate


class Chooser:
    """Chooses pipelines.

    Args:
        space: what they are made of.
        candidates: those that can run and fit, by steps.
        sampler: one of :data:`SAMPLERS`.
        seed: of the sampler.
        objectives: number of values that each pipeline gets; more is better in all of them.
        journal: file of the study; None keeps it in memory.
        ranks: of the pipelines before anything is known; those of the lowest rank are drawn first. Without ranks all
            are drawn alike.
    """

    def __init__(
        self,
        space: Space,
        candidates: Mapping[Order, Candidate],
        sampler: str,
        seed: int,
        objectives: int,
        journal: Path | None,
        ranks: Mapping[Order, int] | None = None,
    ) -> None:
        self._space = space
        self._left = dict(candidates)
        self._variants_seen: set[frozenset[str]] = set()
        self._random = random.Random(seed)
        self._draws_all = sampler == RANDOM
        self._ranks = {} if ranks is None or self._draws_all else ranks
        self._steps = space.steps
        self._indices = {v.step: (name, i) for name, own in space.variants.items() for i, v in own.items()}
        self.study = _make_study(sampler, seed, objectives, journal)
        self._distributions = _distributions(space)
        self._chosen = 0

    @property
    def left(self) -> Mapping[Order, Candidate]:
        """The candidates that have not been chosen."""
        return self._left

    def choose(self, count: int, strength: Callable[[Sequence[str]], Sequence[float]]) -> list[Choice]:
        """Choose up to ``count`` further pipelines.

        Args:
            count: how many.
            strength: of each of some steps, on one scale; the order from weak to strong is tried first.
        """
        chosen: list[Choice] = []
        while len(chosen) < count and self._left:
            chosen.append(self._choose_one(strength))
        return chosen

    def tell(self, choice: Choice, values: Sequence[float], **facts: Any) -> None:
        """Report the values of a measured pipeline; ``facts`` are kept with its trial."""
        for name, value in facts.items():
            choice.trial.set_user_attr(name, value)
        self.study.tell(choice.trial, [max(WORST, value) for value in values])

    def tell_stopped(self, choice: Choice, value: float, samples: int) -> None:
        """Report a pipeline that was stopped early with this value on its first samples, as Optuna's pruners do."""
        import optuna

        choice.trial.report(max(WORST, value), samples)
        self.study.tell(choice.trial, state=optuna.trial.TrialState.PRUNED)

    def importance(self, scores: Mapping[int, float]) -> dict[str, float]:
        """The share of each parameter in the differences between the scores' ranks, by trial number; empty if few."""
        import optuna

        ordered = sorted(set(scores.values()))
        ranks = {number: float(ordered.index(score)) for number, score in scores.items()}
        if len(ordered) < 4:
            return {}
        study = optuna.create_study(direction="maximize")
        for trial in self.study.get_trials(deepcopy=False):
            if trial.number in ranks:
                study.add_trial(
                    optuna.trial.create_trial(
                        params=trial.params, distributions=trial.distributions, value=ranks[trial.number]
                    )
                )
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )
        return {name: round(float(share), 4) for name, share in found.items()}

    def _choose_one(self, strength: Callable[[Sequence[str]], Sequence[float]]) -> Choice:
        first = self._chosen < STARTS or self._draws_all
        steps = self._draw() if first else self._ask()
        if isinstance(steps, Choice):
            proposed, trial = steps.candidate.steps, steps.trial
        else:
            proposed, trial = steps, None
        wanted = proposed if self._draws_all else self._weak_first(proposed, strength)
        if trial is None or wanted != proposed:
            if trial is not None:
                self._refuse(trial, "the order from weak to strong comes first")
            self.study.enqueue_trial(self._parameters(wanted))
            trial = self.study.ask(self._distributions)
        candidate = self._left.pop(wanted)
        self._variants_seen.add(frozenset(wanted))
        self._chosen += 1
        return Choice(trial, candidate)

    def _draw(self) -> Order:
        """A pipeline at random, of the lowest rank among those whose strengths were in no pipeline so far."""
        pool = list(self._left)
        if self._ranks:
            pool = [steps for steps in pool if frozenset(steps) not in self._variants_seen] or pool
            lowest = min(self._ranks[steps] for steps in pool)
            pool = [steps for steps in pool if self._ranks[steps] == lowest]
        return self._random.choice(sorted(pool))

    def _ask(self) -> Choice | Order:
        """The sampler's next pipeline that can be used, or the nearest one to its last."""
        proposed: dict[str, Any] = {}
        for _ in range(MOST_ASKED):
            trial = self.study.ask(self._distributions)
            proposed = trial.params
            steps = self._pipeline(proposed)
            if steps in self._left:
                return Choice(trial, self._left[steps])
            self._refuse(trial, "does not fit, cannot run, or was chosen before")
        return min(self._left, key=lambda steps: (self._distance(proposed, self._parameters(steps)), steps))

    def _refuse(self, trial: Any, reason: str) -> None:
        import optuna

        trial.set_user_attr("not measured", reason)
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def _weak_first(self, steps: Order, strength: Callable[[Sequence[str]], Sequence[float]]) -> Order:
        """The order of these steps from weak to strong, unless one of their orders was chosen before."""
        if frozenset(steps) in self._variants_seen:
            return steps
        strengths = dict(zip(steps, strength(steps), strict=True))
        ordered = tuple(sorted(steps, key=lambda step: strengths[step]))
        return ordered if ordered in self._left else steps

    def _parameters(self, steps: Order) -> dict[str, Any]:
        """The values of all parameters for a pipeline; those of stages that are left out are the first ones."""
        names = tuple(self._steps[step].name for step in steps)
        indices = {name: next(iter(own)) for name, own in self._space.variants.items()}
        indices.update({self._indices[step][0]: self._indices[step][1] for step in steps})
        values: dict[str, Any] = {}
        for name, arguments in self._space.values.items():
            for (argument, several), i in zip(arguments.items(), indices[name], strict=True):
                values[f"{name}.{argument}"] = _shown(several, i)
        for name in self._space.optional:
            values[f"{name}.{IN}"] = name in names
        order = next(order for order in self._space.orders if tuple(n for n in order if n in names) == names)
        values[ORDER] = " -> ".join(order)
        return {name: value for name, value in values.items() if name in self._distributions}

    def _pipeline(self, values: Mapping[str, Any]) -> Order | None:
        """The steps that the parameters name; None if the space has no such variant."""
        order = self._space.orders[0]
        if ORDER in values:
            order = tuple(values[ORDER].split(" -> "))
        steps = []
        for name in order:
            if not values.get(f"{name}.{IN}", True):
                continue
            indices = []
            for argument, several in self._space.values[name].items():
                key = f"{name}.{argument}"
                shown = [_shown(several, i) for i in range(len(several))]
                indices.append(shown.index(values[key]) if key in values else 0)
            variant = self._space.variants[name].get(tuple(indices))
            if variant is None:
                return None
            steps.append(variant.step)
        return tuple(steps)

    def _distance(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
        """How many parameters differ; a number counts by how far apart its values are."""
        import optuna

        total = 0.0
        for name, distribution in self._distributions.items():
            if isinstance(distribution, optuna.distributions.IntDistribution):
                total += abs(a[name] - b[name]) / max(1, distribution.high)
            else:
                total += a[name] != b[name]
        return total


def _make_study(sampler: str, seed: int, objectives: int, journal: Path | None) -> optuna.Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of its options are marked as experimental
        if sampler == NSGA2:
            chosen: Any = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
        elif sampler == RANDOM:
            chosen = optuna.samplers.RandomSampler(seed=seed)
        else:
            chosen = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTS, multivariate=True)
        storage: Any = None
        if journal is not None:
            for leftover in journal.parent.glob(f"{journal.name}*"):  # of an earlier process, with its lock
                leftover.unlink()
            backend = JournalFileBackend(str(journal))
            storage = JournalStorage(backend)
        return optuna.create_study(
            storage=storage, sampler=chosen, study_name="search", directions=["maximize"] * objectives
        )


def _distributions(space: Space) -> dict[str, Any]:
    """The parameters with more than one value. Numbers are parameters by their index, so that they have an order."""
    import optuna

    found: dict[str, Any] = {}
    for name, arguments in space.values.items():
        for argument, several in arguments.items():
            if len(several) < 2:
                continue
            shown = [_shown(several, i) for i in range(len(several))]
            if shown == list(range(len(several))):
                found[f"{name}.{argument}"] = optuna.distributions.IntDistribution(0, len(several) - 1)
            else:
                found[f"{name}.{argument}"] = optuna.distributions.CategoricalDistribution(shown)
    for name in sorted(space.optional):
        found[f"{name}.{IN}"] = optuna.distributions.CategoricalDistribution([True, False])
    if len(space.orders) > 1:
        orders = [" -> ".join(order) for order in space.orders]
        found[ORDER] = optuna.distributions.CategoricalDistribution(orders)
    return found


def _shown(several: Sequence[Any], i: int) -> Any:
    """How Optuna sees the i-th value: a number by its index, anything else by its text."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in several):
        return i
    value = several[i]
    return value if isinstance(value, str) else json.dumps(value, default=str)
