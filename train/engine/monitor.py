"""What a run shows and records: progress bar, ``metrics.jsonl``, and what `train.engine.loggers` has.

How to read the numbers: ``images_per_second`` counts source images over all processes since the previous line, in the
time of training; ``pause_seconds`` is the time since that line that was not training (checkpoints, health, kNN).
``data_wait_percent`` is the share of training time in which the main process stood waiting for the loader: near 0 the
accelerator is the limit, far from 0 the input pipeline is. The first record after a resume says ``resumed_at``, 0 where
there was no checkpoint yet; one of a collapsed run has ``collapse``, the name of the sign (`train.engine.health`).
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from pipeline.stats import Stats
from train.engine.loggers import open_loggers

log = logging.getLogger(__name__)

# What matters most comes first: a narrow terminal cuts the end off.
_TEXT = "loss {loss:.3f}  {images_per_second:.1f} images/s  wait {data_wait_percent:.1f}%  lr {learning_rate:.3g}"


def progress_bar(console: Console) -> Progress:
    """80 columns wide; where there are fewer, the text is cut, as a bar of several lines could not be redrawn."""
    text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    left = TextColumn("left", table_column=Column(no_wrap=True))
    done, remaining = (kind(table_column=Column(no_wrap=True)) for kind in (MofNCompleteColumn, TimeRemainingColumn))
    return Progress(done, BarColumn(bar_width=6), text, left, remaining, console=console)


def _open_for_lines(path: Path) -> TextIO:
    """To append to, on a line of its own: what a crash left half written must not spoil the next record."""
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    file = path.open("a", buffering=1)
    if torn:
        file.write("\n")
    return file


class Monitor:
    """Use as a context on the main process only. Nothing here asks the device for a value."""

    def __init__(
        self, directory: Path, start_step: int, total_steps: int, global_batch_size: int, loggers: Sequence[str]
    ) -> None:
        self._total_steps, self._global_batch_size = total_steps, global_batch_size
        self._file = _open_for_lines(directory / "metrics.jsonl")
        self._loggers = open_loggers(loggers, directory, start_step)
        continues = start_step or self._file.tell()  # also one that was killed before its first checkpoint
        self._resumed_at: dict[str, float] = {"resumed_at": start_step} if continues else {}
        self._progress = progress_bar(Console())
        self._console = self._progress.console
        self._progress.disable = not self._console.is_terminal
        self._task = self._progress.add_task("pretrain", total=total_steps, completed=start_step, text="")
        self._last_step, self._last_time, self._last_wait = start_step, time.perf_counter(), 0.0
        self._last_pause = 0.0

    def __enter__(self) -> "Monitor":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for logger in self._loggers:
            logger.close()
        self._file.close()

    def advance(self, step: int) -> None:
        """Move the bar: ``step`` updates are done."""
        self._progress.update(self._task, completed=step)

    def log(self, step: int, metrics: dict[str, Any], loader: Stats, pause_seconds: float) -> None:
        """Record host values after ``step`` updates; ``loader`` is `Loader.stats`, ``pause_seconds`` `loop.Clock`'s."""
        now, paused = time.perf_counter(), pause_seconds - self._last_pause
        seconds = max(now - self._last_time - paused, 1e-9)
        record = {
            "step": step,
            **metrics,
            "images_per_second": (step - self._last_step) * self._global_batch_size / seconds,
            "data_wait_percent": 100 * (loader.wait_seconds - self._last_wait) / seconds,
            "pause_seconds": paused,
            "replaced_samples": loader.replaced_samples,
            **self._resumed_at,
        }
        self._resumed_at = {}
        self._last_step, self._last_time, self._last_wait = step, now, loader.wait_seconds
        self._last_pause = pause_seconds
        self._file.write(json.dumps(record) + "\n")
        values = {name: v for name, v in record.items() if name not in ("step", "resumed_at", "collapse")}
        for logger in self._loggers:
            logger.log(step, values)
        text = _TEXT.format(**record)
        self._progress.update(self._task, text=text)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._total_steps}  " + text, soft_wrap=True)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, `settled`. A line that a crash left half written is reported and passed over."""
    lines, problems = read_lines(run / "metrics.jsonl", "step")
    for problem in problems:
        log.warning("%s", problem)
    return settled(lines)


def settled(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records in step order; what a resumed run did again replaces what had been done before."""
    records: dict[int, dict[str, Any]] = {}
    for line in lines:
        if "resumed_at" in line:
            records = {step: record for step, record in records.items() if step <= line["resumed_at"]}
        records[line["step"]] = line
    return [record for _, record in sorted(records.items())]


def read_lines(path: Path, key: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a file of JSON lines, if there is one, and what is to be said of lines that are no record."""
    records, problems = [], []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        try:
            record = json.loads(line)
            record[key]
            records.append(record)
        except (ValueError, TypeError, KeyError):
            problems.append(f"{path}, line {number}: not a whole record; passed over")
    return records, problems
