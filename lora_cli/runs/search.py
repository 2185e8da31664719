"""A search: which values to try next, and which runs to give up early, by the held-out loss; optuna decides both.

Values come from a tree of Parzen estimators (TPE: Bergstra et al. 2011, section 4), which learns from every run that has
ended. A run whose held-out loss is above the median of what earlier ones had at the same step is given up: it stays as
an interrupted run in its folder, and `lora train --resume` would go on with it.
"""

from importlib.util import find_spec
from typing import Any

from lora_cli.errors import Problem, RecipeError
from lora_cli.recipe.grid import Range, Space, Trial, chosen
from lora_cli.recipe.schema import Recipe
from lora_cli.runs.outcomes import Outcome
from lora_cli.train.events import Evaluated, Event

BEFORE_PRUNING = 4  # runs that go to their end whatever their loss


def check_search(recipe: Recipe) -> None:
    """Raise RecipeError where there is nothing to decide by, or with."""
    problems = []
    if find_spec("optuna") is None:
        problems.append(Problem("`--search` needs optuna", fix="pip install 'lora-cli[search]', or use `--grid`"))
    if recipe.data.eval is None:
        what = "a search goes by the held-out loss, and the recipe holds out no rows"
        problems.append(Problem(what, fix="set `data.eval: 5%`"))
    if problems:
        raise RecipeError(*problems)


class Search:
    """Ask for a trial, report the events of its run, tell what came of it; one after another."""

    def __init__(self, space: Space, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space = space
        self.number = 0
        self.given_up = False
        self.trial: optuna.Trial | None = None
        self.study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=BEFORE_PRUNING),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=BEFORE_PRUNING),
        )

    def ask(self) -> Trial:
        self.number += 1
        self.given_up = False
        self.trial = self.study.ask({key: _distribution(of) for key, of in self.space.items()})
        return chosen(self.number, self.trial.params)

    def report(self, event: Event) -> None:
        """After this, `given_up` says whether the run is worth going on with."""
        if isinstance(event, Evaluated) and event.step > 0:
            self.trial.report(event.loss, event.step)
            self.given_up = self.trial.should_prune()

    def tell(self, outcome: Outcome) -> None:
        import optuna

        if outcome.state == "finished":
            self.study.tell(self.trial, outcome.loss)
        else:
            state = optuna.trial.TrialState.PRUNED if self.given_up else optuna.trial.TrialState.FAIL
            self.study.tell(self.trial, state=state)

    def remember(self, outcome: Outcome) -> bool:
        """Learn from a run of an earlier session; False for one that has not ended, which is asked for first."""
        from optuna.trial import TrialState, create_trial

        values = {key: _value(of, outcome.settings[key]) for key, of in self.space.items()}
        if outcome.state in ("interrupted", "waiting"):
            self.study.enqueue_trial(values)
            return False
        self.number += 1
        done = outcome.state == "finished"
        state = TrialState.COMPLETE if done else TrialState.FAIL
        of = {key: _distribution(of) for key, of in self.space.items()}
        self.study.add_trial(
            create_trial(state=state, value=outcome.loss if done else None, params=values, distributions=of)
        )
        return True


def _distribution(of: Range | list[str]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(of, list):
        return CategoricalDistribution(of)
    if of.whole:
        return IntDistribution(int(of.low), int(of.high), log=of.log)
    return FloatDistribution(of.low, of.high, log=of.log)


def _value(of: Range | list[str], text: str) -> Any:
    return text if isinstance(of, list) else int(text) if of.whole else float(text)
