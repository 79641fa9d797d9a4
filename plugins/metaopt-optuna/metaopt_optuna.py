"""Optuna's samplers and pruning as tuners of metaopt: Optuna chooses, metaopt trains."""

import contextlib
import hashlib
import math
import multiprocessing
from abc import abstractmethod
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from metaopt import Example, ProblemError, Task, Tried, Tuner, hookimpl, hyper

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
# after which shares of a run a setting may be given up
RUNGS = (1 / 9, 1 / 3)
# how often workers may all end before the last trial without having made one
PATIENCE = 3
POINT, SHARE = "metaopt.point", "metaopt.share"


class Seeded(BaseSampler):
    """A sampler made anew for each trial, from the seed and the number of trials done: so a resumed study goes on."""

    def __init__(self, tuner: "OptunaTuner", seed: int) -> None:
        self._tuner, self._seed = tuner, seed
        self._own = tuner.sampler(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        done = len(study.get_trials(deepcopy=False, states=DONE))
        digest = hashlib.sha256(f"{self._seed} {done}".encode()).digest()
        self._own = self._tuner.sampler(int.from_bytes(digest[:4], "little"))
        self._own.before_trial(study, trial)

    def infer_relative_search_space(self, *args: Any) -> Any:
        return self._own.infer_relative_search_space(*args)

    def sample_relative(self, *args: Any) -> Any:
        return self._own.sample_relative(*args)

    def sample_independent(self, *args: Any) -> Any:
        return self._own.sample_independent(*args)

    def after_trial(self, *args: Any) -> None:
        self._own.after_trial(*args)


class OptunaTuner(Tuner):
    """What both tuners share: a study in a storage, workers that call Optuna's own `optimize`, heartbeats."""

    prune: bool = hyper(
        False, doc="give a setting up that is worse than the median after a ninth or a third of its run"
    )
    storage: str | None = hyper(None, doc="URL of a database; by default SQLite in the folder of the search")
    heartbeat: int = hyper(60, ge=1, doc="seconds between two signs of life of a worker")

    @abstractmethod
    def sampler(self, seed: int) -> BaseSampler:
        """Return the sampler."""

    def run(self, task: Task) -> list[Tried]:
        study = self.study(task)
        if self.storage is None:
            # the folder is this search's alone: what is still running there was killed, and will be chosen again
            for trial in study.get_trials(states=(TrialState.RUNNING,)):
                study.tell(trial.number, state=TrialState.FAIL)
        idle = 0
        while (left := task.trials - len(done_of(study))) > 0:
            if task.jobs == 1:
                self.work(task)
            else:
                self._elsewhere(task, min(task.jobs, left))
            idle = idle + 1 if len(done_of(study)) == task.trials - left else 0
            if idle == PATIENCE:
                raise ProblemError("the workers of the search end without a trial: see what they print")
        # workers that end at the same time make a trial or two more
        return [
            Tried(tuple(trial.user_attrs[POINT]), trial.user_attrs[SHARE]) for trial in done_of(study)[: task.trials]
        ]

    def study(self, task: Task) -> optuna.Study:
        """Return the study of this search, made if it is new; its tables too, before any worker looks for them."""
        url = self.storage or f"sqlite:///{task.folder.parent / 'optuna.db'}"
        storage = RDBStorage(
            url,
            heartbeat_interval=self.heartbeat,
            grace_period=2 * self.heartbeat,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
            # a worker that waits for another's write waits, and does not fail
            engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True},
        )
        # at first sight of a share, four runs are what a median needs
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if self.prune else optuna.pruners.NopPruner()
        return optuna.create_study(
            study_name=f"metaopt-{task.name}",
            storage=storage,
            sampler=Seeded(self, task.seed),
            pruner=pruner,
            load_if_exists=True,
        )

    def work(self, task: Task) -> None:
        """Make trials until there are enough, as one of several workers or as the only one."""
        study = self.study(task)
        if len(done_of(study)) < task.trials:
            stop = MaxTrialsCallback(task.trials, states=DONE)
            study.optimize(lambda trial: self._objective(task, trial), callbacks=[stop])

    def _objective(self, task: Task, trial: optuna.Trial) -> float:
        point = tuple(_suggested(trial, path, space) for path, space in task.spaces.items())
        trial.set_user_attr(POINT, point)
        trial.set_user_attr("values", {path: repr(value) for path, value in task.values(point).items()})
        for step, share in enumerate(RUNGS if self.prune else ()):
            trial.set_user_attr(SHARE, share)
            trial.report(_bounded(task.loss(Tried(point, share))), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        trial.set_user_attr(SHARE, 1.0)
        return _bounded(task.loss(Tried(point)))

    def _elsewhere(self, task: Task, count: int) -> None:
        context = _context()
        workers = [context.Process(target=_work, args=(self, task)) for _ in range(count)]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


class TPE(OptunaTuner):
    """The tree-structured Parzen estimator of Optuna: where good settings are dense and bad ones are not."""

    known_as = ("TPESampler", "hyperopt")
    startup: int = hyper(10, ge=1, doc="trials before it learns from them")

    def sampler(self, seed: int) -> BaseSampler:
        return TPESampler(seed=seed, n_startup_trials=self.startup, multivariate=True)


class GaussianProcess(OptunaTuner):
    """A Gaussian process over the settings, by Optuna: for expensive runs with few, continuous hyperparameters."""

    known_as = ("GPSampler", "bayesian_optimization", "botorch")
    startup: int = hyper(10, ge=1, doc="trials before it learns from them")

    def sampler(self, seed: int) -> BaseSampler:
        return GPSampler(seed=seed, n_startup_trials=self.startup)


def done_of(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ended, in the order in which they began."""
    return study.get_trials(deepcopy=False, states=DONE)


def _context() -> Any:
    """Return how processes start: never by a fork of this one; what they import is imported once for all."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # the first optimizer would import torch._dynamo, and the first storage sqlalchemy and alembic, in each
    context.set_forkserver_preload([__name__, "torch._dynamo", "optuna.storages._rdb.storage", "alembic.command"])
    return context


def _work(tuner: OptunaTuner, task: Task) -> None:
    task.begin_process()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with contextlib.suppress(KeyboardInterrupt):
        tuner.work(task)


def _suggested(trial: optuna.Trial, path: str, space: Any) -> float:
    """Return what Optuna chose for a space, as a number from 0 to 1."""
    options = space.options()
    if options is None:
        return trial.suggest_float(path, 0.0, 1.0)
    if space.ordered:
        return (trial.suggest_int(path, 0, len(options) - 1) + 0.5) / len(options)
    return (trial.suggest_categorical(path, tuple(range(len(options)))) + 0.5) / len(options)


def _bounded(loss: float) -> float:
    """Return a loss that a database and a Gaussian process can take: a diverged run is worse than all others."""
    return loss if math.isfinite(loss) else 1e30


@hookimpl
def metaopt_tuners() -> dict[str, type[Tuner]]:
    return {"optuna.tpe": TPE, "optuna.gp": GaussianProcess}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    return {"optuna.tpe": Example("optuna.tpe()"), "optuna.gp": Example("optuna.gp()")}
