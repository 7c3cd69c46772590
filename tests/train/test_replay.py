from pathlib import Path

import pytest
from PIL import Image

from sharding.manifest import open_shards
from tests.train.runs import settings
from train.config import load_config
from train.pretrain import build_loader, pretrain
from train.processes.distributed import World
from train.replay import main


def test_names_the_images_of_a_step_and_draws_their_views(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, settings(shards, tmp_path / "run", "optim.steps=1", "run.seed=3"))
    assert pretrain(config, World())
    capsys.readouterr()
    assert main([str(tmp_path / "run"), "--step", "3", "--images", "2"]) == 0
    *lines, picture = capsys.readouterr().out.splitlines()
    opened = open_shards(shards)
    with build_loader(config, opened, World(), 2) as loader:
        batch = next(loader)
    names = opened.manifest.class_names
    assert len(lines) == len(batch.ids)
    for row, (line, sample, label) in enumerate(zip(lines, batch.ids.tolist(), batch.labels.tolist(), strict=True)):
        shard = opened.manifest.shards[int(opened.index.shard[sample])].path
        assert line.startswith(f"row {row}: label {label} {names[label]}, sample {sample} ({shard}, offset ")
    assert picture == str(tmp_path / "run" / "step-000000003.png")
    with Image.open(picture) as image:
        assert image.size[0] / image.size[1] == pytest.approx(3 * 1.7 / (2 * 2.0), rel=0.01)


@pytest.mark.parametrize("arguments", [["--step", "0"], ["--step", "1", "--images", "0"]])
def test_refuses_numbers_that_mean_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err.startswith("train.replay: expected --step from 1")
