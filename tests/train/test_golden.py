"""The first 20 losses of every method, against those that are kept in ``golden/``: nothing changes unnoticed.

A change that is meant is recorded by ``python -m tests.train.test_golden``, and explained in its commit. The first loss
has to agree to 1e-4, the others to half a percent of the range that they have: without any update those of SwAV are off
by 1 % of it, those of other methods by more. Rounding has been seen to make 0.03 % of it (SimCLR).
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.train.conftest import build_demo_shards
from tests.train.runs import settings_of
from train.config import load_config
from train.engine.monitor import read_metrics
from train.methods import METHODS
from train.pretrain import pretrain
from train.processes.distributed import World

GOLDEN = Path(__file__).parent / "golden"


def losses(method: str, shards: Path, run: Path) -> list[float]:
    """On one thread, at a tenth of the recipe's learning rate: runs that round otherwise part after a few steps."""
    rate = load_config(None, [f"method.name={method}"]).optim.learning_rate / 10
    config = load_config(
        None, settings_of(method, shards, run, "views.size=32", f"optim.learning_rate={rate}", "run.precision=fp32")
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert pretrain(config, World())
    torch.set_num_threads(threads)
    return [record["loss"] for record in read_metrics(run)]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_losses_are_those_of_before(method: str, shards: Path, tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / f"{method}.json").read_text())
    found = losses(method, shards, tmp_path / "run")
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found == pytest.approx(expected, rel=0, abs=0.005 * (max(expected) - min(expected)))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shards = build_demo_shards(Path(folder))
        for method in sys.argv[1:] or METHODS:
            values = losses(method, shards, Path(folder) / method)
            (GOLDEN / f"{method}.json").write_text(json.dumps([round(value, 6) for value in values]) + "\n")
            print(method, values[0], values[-1])
