"""What a run shows and records: progress bar, ``metrics.jsonl``, TensorBoard.

How to read the numbers: ``images_per_second`` counts source images over all processes since the previous line;
``data_wait_percent`` is the share of that time in which the main process stood waiting for the loader: near 0 the
accelerator is the limit, far from 0 the input pipeline is.
"""

import json
import time
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

_TEXT = "{images_per_second:.1f} images/s  loss {loss:.3f}  lr {learning_rate:.3g}  wait {data_wait_percent:.1f}%"


class Monitor:
    """Use as a context on the main process only. Nothing here asks the device for a value."""

    def __init__(self, directory: Path, start_step: int, total_steps: int, global_batch_size: int) -> None:
        self._total_steps, self._global_batch_size = total_steps, global_batch_size
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step)
        self._progress = Progress(  # 80 columns wide at most
            MofNCompleteColumn(),
            BarColumn(bar_width=6),
            TextColumn("{task.fields[text]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._console = self._progress.console
        self._progress.disable = not self._console.is_terminal
        self._task = self._progress.add_task("pretrain", total=total_steps, completed=start_step, text="")
        self._last_step, self._last_time, self._last_wait = start_step, time.perf_counter(), 0.0

    def __enter__(self) -> "Monitor":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._board.close()
        self._file.close()

    def advance(self, step: int) -> None:
        """Move the bar: ``step`` updates are done."""
        self._progress.update(self._task, completed=step)

    def log(self, step: int, metrics: dict[str, float], loader: dict[str, float]) -> None:
        """Record host values after ``step`` updates; ``loader`` is `Loader.stats`."""
        now = time.perf_counter()
        seconds = max(now - self._last_time, 1e-9)
        record = {
            "step": step,
            **metrics,
            "images_per_second": (step - self._last_step) * self._global_batch_size / seconds,
            "data_wait_percent": 100 * (loader["wait_seconds"] - self._last_wait) / seconds,
            "replaced_samples": loader["replaced_samples"],
        }
        self._last_step, self._last_time, self._last_wait = step, now, loader["wait_seconds"]
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        text = _TEXT.format(**record)
        self._progress.update(self._task, text=text)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._total_steps}  " + text, soft_wrap=True)
