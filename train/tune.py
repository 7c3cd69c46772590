"""Search for settings: an Optuna study whose trials are runs.

    python -m train.tune --config study.yaml --study runs/study --trials 40

The same command again continues the study, after kill -9 too; started several times at once, it is shared.
"""

import argparse
import ctypes
import fcntl
import json
import math
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired
from typing import Any, TextIO

import numpy as np
from rich.progress import Progress

from sharding.command import UserError, command
from sharding.manifest import open_shards
from train.config import load_config
from train.engine.automatic import PROVENANCE
from train.engine.monitor import read_lines, read_metrics
from train.online import has_labels
from train.overrides import ConfigError, read_yaml
from train.pretrain import parser, run_facts
from train.processes import stop

try:
    import optuna
    from sqlalchemy.exc import SQLAlchemyError
except ImportError:
    optuna = None  # type: ignore[assignment]

_METRICS = {"knn": "online_knn_percent", "linear": "online_linear_percent"}
_PARTS = 20  # of a run, at which trials are compared, whatever their length and batch
_POLL_SECONDS = 0.5
_prctl, _PR_SET_PDEATHSIG = ctypes.CDLL(None).prctl, 1
Values = dict[str, Any]


@command("train.tune")
def main(arguments: Sequence[str] | None = None) -> int:
    made = study_parser("train.tune", "Search for settings: an Optuna study whose trials are runs.", "knn")
    made.add_argument("--trials", type=int, default=20, help="of the study, over all its processes (default: 20)")
    pruning = "of a run, after which it ends if it is worse than the median of 5 or more (default: 0.25; 1: never)"
    made.add_argument("--prune-after", type=float, default=0.25, metavar="PART", help=pruning)
    options = made.parse_args(arguments)
    section, settings = read_study(options, "search")
    seed, space = load_config(None, settings).run.seed, search_space(section, settings, options)

    def sampler(number: int) -> "optuna.samplers.BaseSampler":
        """Seeded by the trial, so that a continued study suggests what one that was never stopped would have."""
        state = np.random.SeedSequence([seed, number]).generate_state(1)
        return optuna.samplers.TPESampler(seed=int(state[0]), constant_liar=True)

    study = Study(options, settings, space, sampler, overrides)
    finished = study.run()
    study.keep()
    return 0 if finished else stop.EXIT_CODE


def study_parser(name: str, description: str, objective: str) -> argparse.ArgumentParser:
    made = parser(f"python -m {name}", description, "Exit codes: those of train.pretrain.")
    add, objectives = made.add_argument, [taken + metric for taken in ("", "best-") for metric in _METRICS]
    add("--study", type=Path, default=Path("runs/study"), help="directory named as the study (default: %(default)s)")
    add("--storage", metavar="URL", help="database that machines share (default: SQLite in the study's directory)")
    add("--objective", choices=objectives, default=objective, help="online accuracy to maximise (default: %(default)s)")
    add("--nproc_per_node", type=int, default=1, help="processes of a trial (default: 1)")
    return made


def read_study(options: argparse.Namespace, section: str, default: Any = None) -> tuple[Values, list[str]]:
    """What a section of the file says is to be tried, and all other settings as overrides."""
    if optuna is None:
        raise UserError("Optuna is not installed; pip install 'parallax-ssl[tune]'")
    tree = read_yaml(options.config) if options.config else {}
    tried = tree.pop(section, default)
    if not isinstance(tried, dict) or not tried:
        raise ConfigError(f"{options.config}: expected a section {section!r} that says what to try, found {tried!r}")
    given: Values = {}
    for name, fields in tree.items():
        given |= {f"{name}.{key}": v for key, v in fields.items()} if isinstance(fields, dict) else {name: fields}
    lengths = {"optim.epochs", "optim.steps"}  # of which an override replaces what the file says
    if lengths & _keys(options.overrides):
        given = {key: value for key, value in given.items() if key not in lengths}
    of_file = [f"{key}={json.dumps(value)}" for key, value in given.items() if "." in key or value is not None]
    return tried, [*of_file, *options.overrides]


def search_space(section: Values, settings: Sequence[str], options: argparse.Namespace) -> Values:
    """Optuna's distribution for each key. Raises `ConfigError`, which names the key."""
    space = {}
    for key, values in section.items():
        try:
            if key in _keys(options.overrides):
                raise ValueError("given as an override as well; remove one of the two")
            space[key] = distribution(values)
            for value in vars(space[key]).get("choices") or (space[key].low, space[key].high):
                load_config(None, [*settings, *overrides({key: value})])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{options.config}: search: {key}: {error}") from None
    return space


def distribution(values: Any) -> Any:
    """``[1, 2]``: choices. ``{low: 1, high: 8}``, also with ``log: true`` or ``step: 2``: a range, of whole numbers
    where these are. Raises ValueError or TypeError."""
    kinds = optuna.distributions
    if isinstance(values, list):
        return kinds.CategoricalDistribution([json.dumps(v) if isinstance(v, list | dict) else v for v in values])
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        raise ValueError(f"expected a list of choices, or low and high with log or step, found {values!r}")
    log, numbers = bool(values.get("log")), {name: value for name, value in values.items() if name != "log"}
    if all(isinstance(value, int) for value in numbers.values()):
        return kinds.IntDistribution(log=log, **numbers)
    return kinds.FloatDistribution(log=log, **{name: float(value) for name, value in numbers.items()})


def overrides(values: Values) -> list[str]:
    """Of a trial. Texts are as on a command line; among choices, lists are texts in JSON."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def _keys(given: Sequence[str]) -> set[str]:
    return {override.partition("=")[0] for override in given}


class Study:
    """A study in Optuna's database, and its directory, in which each trial has the directory of its run.

    Who runs a trial, the tuner and the run that it started, has the lock ``tuner.lock`` there. A trial that is
    unfinished in the database while its lock is free was left by a process that died: who looks for work continues it.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        settings: Sequence[str],
        space: Values,
        sampler: "Callable[[int], optuna.samplers.BaseSampler]",
        meaning: Callable[[Values], list[str]],
    ) -> None:
        """``sampler`` is that of the trial with a number, ``meaning`` the overrides that a trial's values stand for."""
        self._options, self._settings, self._directory = options, settings, options.study
        self._space, self._sampler, self._meaning = space, sampler, meaning
        config = load_config(None, settings)
        shards = open_shards(config.data.shards)
        if not (config.run.online and has_labels(shards)):
            raise UserError("the objective is an online accuracy: expected run.online=true and images with labels")
        facts = {**run_facts(config, shards, 0), "the objective": options.objective}
        facts |= {f"search: {key}": str(tried) for key, tried in space.items()}
        del facts["the source code (its checksum)"]
        self._directory.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=round(_PARTS * options.prune_after))
        with self._alone():
            try:
                storage = optuna.storages.RDBStorage(
                    options.storage or f"sqlite:///{self._directory.resolve()}/study.db"
                )
            except (ImportError, SQLAlchemyError) as error:
                raise UserError(f"--storage: {str(error).splitlines()[0]}") from None
            self._place = {"study_name": self._directory.resolve().name, "storage": storage, "pruner": pruner}
            self._study = optuna.create_study(direction="maximize", load_if_exists=True, **self._place)
            before = self._study.user_attrs.get("settings", facts)
            for name in sorted(name for name in before | facts if before.get(name) != facts.get(name)):
                begun = f"begun with {name} {before.get(name)!r}, now {facts.get(name)!r}"
                raise UserError(f"{self._directory}: {begun}; choose a different --study")
            self._study.set_user_attr("settings", facts)

    def run(self) -> bool:
        """Run trials until the study has as many as it should and none is unfinished here; False if stopped before."""
        with stop.StopRequest() as request, Progress(disable=not sys.stdout.isatty()) as progress:
            bar = progress.add_task("trials", total=self._options.trials)
            while not request.requested:
                progress.update(bar, completed=sum(trial["state"] != "running" for trial in self.trials()))
                if taken := self._take():
                    with taken[1]:
                        self._follow(*taken, request)
                elif not self._unfinished_here():
                    return True
                else:
                    time.sleep(_POLL_SECONDS)  # who runs them may die
        return False

    def trials(self) -> list[Values]:
        """Of each its number, state, value (None before its end) and parameters."""
        found = self._study.get_trials(deepcopy=False)
        return [{"trial": t.number, "state": t.state.name.lower(), "value": t.value, **t.params} for t in found]

    def keep(self, **more: Any) -> None:
        """Print what was found, and leave it in the directory: the best configuration, and all for `train.report`."""
        record: Values = {"study": str(self._directory), "objective": self._options.objective, **more}
        record["trials"] = self.trials()
        states = Counter(trial["state"] for trial in record["trials"])
        print(f"{self._directory}: trials: {', '.join(f'{count} {state}' for state, count in states.items())}")
        if states["complete"] > 1:
            record["importances"] = optuna.importance.get_param_importances(self._study)
            print("importances:", ", ".join(f"{key} {share:.2f}" for key, share in record["importances"].items()))
        if states["complete"]:
            best, path = self._study.best_trial, self._directory / "best.yaml"
            record["best"] = load_config(None, [*self._settings, *self._meaning(best.params)]).to_yaml()
            path.write_text(record["best"])
            print(f"best: trial {best.number}, {best.value:.1f} %: {' '.join(overrides(best.params))}")
            print(f"to train it: python -m train.pretrain --config {path}")
        (self._directory / "study.json").write_text(json.dumps(record))

    def _take(self) -> "tuple[optuna.Trial, TextIO] | None":
        """A trial to run, and its lock: one that was left, or a new one, or None if there are enough."""
        with self._alone():
            for left in self._unfinished_here():
                if lock := self._lock(left.number):
                    return optuna.Trial(self._study, left._trial_id), lock  # as `ask` does, which makes new ones only
            number = len(self._study.get_trials(deepcopy=False))
            if number >= self._options.trials:
                return None
            lock = self._lock(number)  # and its directory, before the trial: dying in between loses nothing
            trial = optuna.load_study(sampler=self._sampler(number), **self._place).ask()
            if trial.number != number:  # a different machine was faster
                lock = self._lock(trial.number)
            assert lock
            return trial, lock

    def _unfinished_here(self) -> "list[optuna.trial.FrozenTrial]":
        running = self._study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])
        return [trial for trial in running if self._run_of(trial.number).exists()]

    def _run_of(self, number: int) -> Path:
        return self._directory / f"trial-{number:04d}"

    def _lock(self, number: int) -> TextIO | None:
        """None while someone else has it."""
        self._run_of(number).mkdir(exist_ok=True)
        file = (self._run_of(number) / "tuner.lock").open("a")
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        file.close()
        return None

    def _follow(self, trial: "optuna.Trial", lock: TextIO, request: stop.StopRequest) -> None:
        """Run a trial, or the rest of it, and tell the study what came of it."""
        run, pruned = self._run_of(trial.number), False
        values = {
            key: trial._suggest(key, tried) for key, tried in self._space.items()
        }  # as `ask`; a second time equal
        print(f"trial {trial.number}: {' '.join(overrides(values))}", flush=True)
        many = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self._options.nproc_per_node}", "-m"]
        words = [sys.executable, "-m", *(many if self._options.nproc_per_node > 1 else []), "train.pretrain"]
        words += [*self._settings, *self._meaning(values), f"run.dir={run}"]
        with (run / "output.log").open("a") as log, _start(words, log, lock) as process:
            try:
                while process.poll() is None and not (pruned or request.requested):
                    with suppress(TimeoutExpired):
                        process.wait(_POLL_SECONDS)
                    pruned = self._report(trial, dict(list(self._parts(run).items())[:-1]))
            finally:
                process.terminate()  # saves and ends
        self._tell(trial, process.returncode, pruned, request)

    def _tell(self, trial: "optuna.Trial", code: int, pruned: bool, request: stop.StopRequest) -> None:
        """What became of it, from its run's exit code; of a stopped one nothing, so that it is continued."""
        states, run = optuna.trial.TrialState, self._run_of(trial.number)
        state, value, parts = states.FAIL, None, self._parts(run)
        if code == 0 and parts:
            self._report(trial, parts)
            state = states.COMPLETE
            value = max(parts.values()) if self._options.objective.startswith("best") else parts[max(parts)]
        elif pruned:
            state = states.PRUNED
        elif request.requested or code == stop.EXIT_CODE:
            request.requested = True
            print(f"trial {trial.number}: stopped; the same command continues it")
            return
        self._study.tell(trial.number, value, state)
        why = f", exit code {code}, figures: {len(parts)}; see {run / 'output.log'}" if state == states.FAIL else ""
        print(f"trial {trial.number}: {state.name.lower()}{why if value is None else f', {value:.1f} %'}", flush=True)

    def _report(self, trial: "optuna.Trial", parts: dict[int, float]) -> bool:
        """Whether the trial should be pruned."""
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for part in sorted(parts.keys() - known.keys()):
            trial.report(parts[part], part)
        return trial.should_prune()

    def _parts(self, run: Path) -> dict[int, float]:
        """The mean of the objective's metric in each twentieth of a run that has records of it."""
        metric, found = _METRICS[self._options.objective.rpartition("-")[2]], defaultdict(list)
        starts, _ = read_lines(run / PROVENANCE, "total_steps")
        for record in read_metrics(run):
            if metric in record:
                found[math.ceil(_PARTS * record["step"] / starts[-1]["total_steps"])].append(record[metric])
        return {part: statistics.fmean(values) for part, values in found.items()}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Of the tuners in this directory one at a time."""
        with (self._directory / "study.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _start(words: Sequence[str], log: TextIO, lock: TextIO) -> "Popen[str]":
    """A run that has the lock as well, until it has ended; the kernel sends it SIGTERM if the tuner dies, even of
    SIGKILL. A terminal's Ctrl-C reaches the tuner only."""

    def end_with_the_tuner() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    inherited: Values = {"pass_fds": [lock.fileno()], "preexec_fn": end_with_the_tuner, "start_new_session": True}
    return Popen(words, stdout=log, stderr=STDOUT, **inherited)


if __name__ == "__main__":
    sys.exit(main())
