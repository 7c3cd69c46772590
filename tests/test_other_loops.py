"""The snippets of docs/other-loops.md, run as they stand there but for their size."""

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.manifest import ShardSet

PAGE = (Path(__file__).parent.parent / "docs" / "other-loops.md").read_text()
SMALLER = {
    '"data/mine"': "SHARDS",
    'preset("simclr")': 'preset("simclr", size=32)',
    "global_batch_size=256": "global_batch_size=8, num_threads=1",
    "== 1000": "== 2",
    "max_steps=1000, limit_train_batches=100,": "max_steps=2, limit_train_batches=1, **QUIET,",
    "(2048, 2048, 256)": "(16, 8)",
}
# Lightning's own, of a run without a log, a checkpoint and a bar.
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def code_of(section: str) -> str:
    """What is indented in a section of the page, made small."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line)
    for own, small in SMALLER.items():
        code = code.replace(own, small)
    return code


def run(section: str, shards: ShardSet) -> dict[str, Any]:
    names: dict[str, Any] = {"SHARDS": shards.root, "QUIET": QUIET, "__name__": section}
    exec(code_of(section), names)
    return names


def test_every_replacement_is_of_something_on_the_page() -> None:
    assert all(own in PAGE for own in SMALLER)
    assert len(re.findall(r"^## ", PAGE, re.MULTILINE)) == 3, "each section has a test below"


def test_a_plain_torch_loop(shard_set: ShardSet) -> None:
    names = run("A plain torch loop", shard_set)
    assert names["batch"].step == 1
    assert torch.isfinite(names["loss"])


def test_lightning_with_lightly(shard_set: ShardSet) -> None:
    for package in ("lightning", "lightly"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install lightning lightly")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        names = run("Lightning, with lightly's model and loss", shard_set)
    assert names["trainer"].global_step == 2


def test_stable_pretraining(shard_set: ShardSet) -> None:
    pytest.importorskip("stable_pretraining", reason="it is not installed: pip install stable-pretraining")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        importlib.import_module("stable_pretraining.methods")
        names = run("stable-pretraining", shard_set)
    assert names["batch"].step == 1
    assert torch.isfinite(names["loss"])
