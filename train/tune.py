"""Search for settings: an Optuna study whose trials are runs.

    python -m train.tune --config study.yaml --study runs/study --trials 40

The same command again continues the study, after kill -9 too; started several times at once, it is shared.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean
from subprocess import STDOUT, Popen, TimeoutExpired
from time import sleep
from typing import Any, TextIO

from rich.progress import Progress

from sharding.command import UserError, command
from sharding.manifest import open_shards
from sharding.storage import locked
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
    made = study_parser("train.tune", str(__doc__), "knn", arguments)
    made.add_argument("--trials", type=int, default=20, help="of the study, over all its processes (default: 20)")
    pruning = "of a run, after which it ends if it is worse than the median of 5 or more (default: 0.25; 1: never)"
    made.add_argument("--prune-after", type=float, default=0.25, metavar="PART", help=pruning)
    options = made.parse_args(arguments)
    tried, settings = read_study(options, "search")
    seed, space = load_config(None, settings).run.seed, search_space(tried, settings, options.config)

    def sampler(number: int) -> "optuna.samplers.BaseSampler":  # a continued study suggests what a whole one would
        return optuna.samplers.TPESampler(seed=(seed + number) % 2**32, constant_liar=True)

    study = Study(options, settings, tried, space, sampler, overrides)
    finished = study.run()
    study.keep()
    return 0 if finished else stop.EXIT_CODE


def study_parser(name: str, description: str, objective: str, words: Sequence[str] | None) -> argparse.ArgumentParser:
    made = parser(f"python -m {name}", description.splitlines()[0], "Exit codes: those of train.pretrain.")
    add = made.add_argument
    add("--study", type=Path, default=Path("runs/study"), help="directory named as the study (default: %(default)s)")
    add("--storage", metavar="URL", help="database that machines share (default: SQLite in the study's directory)")
    add("--objective", choices=_METRICS, default=objective, help="online accuracy to maximise (default: %(default)s)")
    add("--nproc_per_node", type=int, default=1, help="processes of a trial (default: 1)")
    add("--engine", choices=("local", "ray"), default="local", help="ray: tuners wherever a Ray cluster has room")
    add("--cpus", type=int, help="that Ray keeps for a trial (default: one a process; and a GPU, where it has any)")
    made.set_defaults(words=[name, *(sys.argv[1:] if words is None else words)])
    return made


def read_study(options: argparse.Namespace, section: str, default: Any = None) -> tuple[Values, list[str]]:
    """What a section of the file says is to be tried, and all other settings as overrides."""
    if optuna is None:
        raise UserError("Optuna is not installed; pip install 'parallax-ssl[tune]'")
    given: Values = {}
    tree = read_yaml(options.config) if options.config else {}
    tried = tree.pop(section, default)
    if not isinstance(tried, dict) or not tried:
        raise ConfigError(f"{options.config}: expected a section {section!r} that says what to try, found {tried!r}")
    for name, fields in tree.items():
        given |= {f"{name}.{key}": v for key, v in fields.items()} if isinstance(fields, dict) else {name: fields}
    replaced = {override.partition("=")[0] for override in options.overrides}
    if twice := sorted(replaced & tried.keys()):
        raise ConfigError(f"{options.config}: {section}: {twice[0]} is an override as well; remove one of the two")
    if replaced & (lengths := {"optim.epochs", "optim.steps"}):
        replaced |= lengths
    of_file = [f"{k}={json.dumps(v)}" for k, v in given.items() if k not in replaced and ("." in k or v is not None)]
    return tried, [*of_file, *options.overrides]


def search_space(section: Values, settings: Sequence[str], where: Path) -> Values:
    """Optuna's distribution for each key. Raises `ConfigError`, which names the key."""
    space = {}
    for key, values in section.items():
        try:
            space[key] = distribution(values)
            for value in vars(space[key]).get("choices") or (space[key].low, space[key].high):
                load_config(None, [*settings, *overrides({key: value})])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}: search: {key}: {error}") from None
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


@dataclass
class Study:
    """A study in Optuna's database, and its directory, in which each trial has the directory of its run.

    ``tried`` is what the user said of ``space``, ``sampler`` that of the trial with a number, and ``meaning`` the
    overrides that a trial's values stand for. Who runs a trial, the tuner and the run that it started, has the lock
    ``tuner.lock``. A trial that is unfinished while its lock is free was left: who looks for work next continues it.
    """

    options: argparse.Namespace
    settings: Sequence[str]
    tried: Values
    space: Values
    sampler: "Callable[[int], optuna.samplers.BaseSampler]"
    meaning: Callable[[Values], list[str]]

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.directory = self.options.study
        facts = self._facts()
        self.directory.mkdir(parents=True, exist_ok=True)
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=round(_PARTS * self.options.prune_after))
        with locked(self.directory / "study.lock"):
            url = self.options.storage or f"sqlite:///{self.directory.resolve()}/study.db"
            try:
                storage = optuna.storages.RDBStorage(url)
            except (ImportError, SQLAlchemyError) as error:
                raise UserError(f"--storage: {str(error).splitlines()[0]}") from None
            self._place = {"study_name": self.directory.resolve().name, "storage": storage, "pruner": pruner}
            self._study = optuna.create_study(direction="maximize", load_if_exists=True, **self._place)
            was = self._study.user_attrs.get("settings", facts)
            for name in sorted(name for name in was | facts if was.get(name) != facts.get(name)):
                different = f"begun with {name} {was.get(name)!r}, now {facts.get(name)!r}"
                raise UserError(f"{self.directory}: {different}; choose a different --study")
            self._study.set_user_attr("settings", facts)

    def _facts(self) -> Values:
        """What all trials must have in common. Raises UserError where nothing would say which is better."""
        config = load_config(None, self.settings)
        shards = open_shards(config.data.shards)
        if not (config.run.online and has_labels(shards)):
            raise UserError("the objective is an online accuracy: expected run.online=true and images with labels")
        facts = {**run_facts(config, shards, 0), **self.tried, "the objective": self.options.objective}
        return {name: value for name, value in facts.items() if not name.startswith("the source code")}

    def run(self) -> bool:
        """Run trials until the study has as many as it should and none is unfinished here; False if stopped before."""
        if self.options.engine == "ray" and self._missing():
            return self._run_on_ray()
        with stop.StopRequest() as request, Progress(disable=not sys.stdout.isatty()) as progress:
            bar = progress.add_task("trials", total=self.options.trials)
            while not request.requested:
                progress.update(bar, completed=self.options.trials - self._missing())
                if taken := self._take():
                    with taken[1]:
                        self._follow(taken[0], taken[1], request)
                elif not self._unfinished_here():
                    return True
                else:
                    sleep(_POLL_SECONDS)  # who runs them may die
        return False

    def _run_on_ray(self) -> bool:
        """By tuners like this one, as many as Ray has room for, which knows nothing else of the study. Raises UserError
        if they end too early."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UserError("Ray is not installed; pip install 'parallax-ssl[ray]'") from None
        options, folder, (name, *words) = self.options, Path.cwd(), self.options.words

        def tuner() -> None:  # Ray copies the function whole
            os.chdir(folder)
            import_module(name).main([*words, "--engine", "local"])

        with ray.init(include_dashboard=False):  # a cluster that there is, or one of its own
            if not options.storage and len(ray.nodes()) > 1:
                raise UserError("--storage: expected a database that all machines of the Ray cluster reach, found none")
            has, processes = ray.cluster_resources(), options.nproc_per_node
            needs = {"CPU": options.cpus or processes} | ({"GPU": processes} if has.get("GPU") else {})
            room = int(min(has.get(kind, 0) // count for kind, count in needs.items()))
            if not room:
                found = {kind: has.get(kind, 0) for kind in needs}
                raise UserError(f"--engine ray: expected a cluster with room for a trial, {needs}, found {found}")
            place = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0))(tuner).remote
            with stop.StopRequest() as request:
                tasks = waiting = [place() for _ in range(min(room, self._missing()))]
                while waiting and not request.requested:
                    _, waiting = ray.wait(waiting, timeout=_POLL_SECONDS)
                for task in waiting:
                    ray.cancel(task)  # is Ctrl-C to the tuner
                ray.wait(tasks, num_returns=len(tasks))
        if self._missing() and not request.requested:
            raise UserError(
                f"{self._missing()} trials are not done, and all tuners have ended; what they said is above"
            )
        return not request.requested

    def _missing(self) -> int:
        return max(0, self.options.trials - sum(trial["state"] != "running" for trial in self.trials()))

    def trials(self) -> list[Values]:
        """Of each its number, state, value (None before its end) and parameters."""
        found = self._study.get_trials(deepcopy=False)
        return [{"trial": t.number, "state": t.state.name.lower(), "value": t.value, **t.params} for t in found]

    def keep(self, **more: Any) -> None:
        """Print what was found, and leave it in the directory: the best configuration, and all for `train.report`."""
        record: Values = {"study": str(self.directory), "objective": self.options.objective, "trials": self.trials()}
        states = [trial["state"] for trial in record["trials"]]
        print(f"{self.directory}:", ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
        if states.count("complete") > 1 and len(self.space) > 1:
            record["importances"] = optuna.importance.get_param_importances(self._study)
            print("importances:", ", ".join(f"{key} {share:.2f}" for key, share in record["importances"].items()))
        if "complete" in states:
            best, path = self._study.best_trial, self.directory / "best.yaml"
            record["best"] = load_config(None, [*self.settings, *self.meaning(best.params)]).to_yaml()
            path.write_text(record["best"])
            print(f"best: trial {best.number}, {best.value:.1f} %: {' '.join(overrides(best.params))}")
            print(f"to train it: python -m train.pretrain --config {path}")
        with locked(self.directory / "study.lock"):
            whole = self.directory / "study.json.new"
            whole.write_text(json.dumps(record | more))
            whole.replace(self.directory / "study.json")

    def _take(self) -> "tuple[optuna.Trial, TextIO] | None":
        """A trial to run and its lock: one that was left, or a new one; None if there are enough."""
        with locked(self.directory / "study.lock"):
            for left in self._unfinished_here():
                lock = locked(self._run_of(left) / "tuner.lock", wait=False)
                if lock and self.trials()[left.number]["state"] == "running":  # it may have been finished just now
                    return optuna.Trial(self._sampling(left.number), left._trial_id), lock  # `ask` makes new ones only
            number = len(self.trials())
            if number >= self.options.trials:
                return None
            trial = self._sampling(number).ask()
            self._run_of(trial).mkdir()
            return trial, locked(self._run_of(trial) / "tuner.lock")

    def _sampling(self, number: int) -> "optuna.Study":
        """To ask of; not to tell, as `GridSampler` stops an optimization that is not there after the last cell."""
        return optuna.load_study(sampler=self.sampler(number), **self._place)

    def _unfinished_here(self) -> "list[optuna.trial.FrozenTrial]":
        """Not those of machines with a disk of their own."""
        running = self._study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])
        return [trial for trial in running if self._run_of(trial).exists()]

    def _run_of(self, trial: Any) -> Path:
        return self.directory / f"trial-{trial.number:04d}"

    def _follow(self, trial: "optuna.Trial", lock: TextIO, request: stop.StopRequest) -> None:
        """Run a trial, or the rest of it, and tell what came of it: of a stopped one nothing, so it is continued."""
        run, pruned = self._run_of(trial), False
        values = {key: trial._suggest(key, tried) for key, tried in self.space.items()}  # anew only what it lacks
        print(f"trial {trial.number}: {' '.join(overrides(values))}", flush=True)
        with self._start(run, values, lock) as process:
            try:
                while process.poll() is None and not (pruned or request.requested):
                    with suppress(TimeoutExpired):
                        process.wait(_POLL_SECONDS)
                    self._report(trial, run, ended=False)
                    pruned = trial.should_prune()
            finally:
                process.terminate()  # saves and ends
        parts, states, value, note = self._report(trial, run, ended=True), optuna.trial.TrialState, None, ""
        if process.returncode == 0 and parts:
            value = parts[-1]
            state, note = states.COMPLETE, f"{value:.1f} %"
        elif pruned:
            state = states.PRUNED
        elif request.requested or process.returncode == stop.EXIT_CODE:
            request.requested = True
            print(f"trial {trial.number}: stopped; the same command continues it", flush=True)
            return
        else:
            state, note = states.FAIL, f"exit code {process.returncode}, {len(parts)} accuracies; see {run}/output.log"
        self._study.tell(trial.number, value, state)
        print(f"trial {trial.number}: {state.name.lower()} {note}", flush=True)

    def _start(self, run: Path, values: Values, lock: TextIO) -> "Popen[str]":
        """The run, which holds the lock as well until it ends. If the tuner dies, the kernel sends it SIGTERM."""
        processes = self.options.nproc_per_node
        many = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
        words = [sys.executable, "-m", *many, "train.pretrain", *self.settings, *self.meaning(values), f"run.dir={run}"]
        alone: Values = {"start_new_session": True, "preexec_fn": lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)}
        with (run / "output.log").open("a") as log:
            return Popen(words, stdout=log, stderr=STDOUT, pass_fds=[lock.fileno()], **alone)

    def _report(self, trial: "optuna.Trial", run: Path, ended: bool) -> list[float]:
        """The metric's mean in each twentieth of the run that has records, so far; whole ones are told to Optuna."""
        metric, found = _METRICS[self.options.objective], defaultdict(list)
        starts, _ = read_lines(run / PROVENANCE, "total_steps")
        for record in read_metrics(run):
            if metric in record:
                found[math.ceil(_PARTS * record["step"] / starts[-1]["total_steps"])].append(record[metric])
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for part in list(found)[: None if ended else -1]:
            if part not in known:
                trial.report(fmean(found[part]), part)
        return [fmean(values) for values in found.values()]


if __name__ == "__main__":
    sys.exit(main())
