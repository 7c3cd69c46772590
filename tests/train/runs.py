"""A run that is over in a second, for tests of whole runs."""

from pathlib import Path

SMALL = [
    "views.size=32",
    "views.kernel=5",
    "encoder.name=resnet18",
    "encoder.width=8",
    "method.hidden=32",
    "method.out=16",
    "optim.name=sgd",
    "optim.learning_rate=0.05",
    "method.temperature=0.5",
    "optim.steps=6",
    "run.global_batch_size=24",
    "run.log_every=1",
    "run.checkpoint_every=2",
    "data.num_threads=1",
]


def settings(shards: Path, run: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.shards={shards}", f"run.dir={run}", *more]
