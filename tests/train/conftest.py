"""Shards of 96 generated images in 4 lanes, for whole runs."""

from pathlib import Path

import pytest

from sharding.build import main as build_shards
from sharding.demo import load_demo


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_shards(tmp_path_factory.mktemp("pretrain"))


def build_demo_shards(root: Path) -> Path:
    load_demo("train", num_images=96).to_parquet(root / "images" / "train-00000-of-00001.parquet")
    arguments = ["--dataset", str(root / "images"), "--out", str(root / "shards"), "--lanes", "4", "--workers", "1"]
    assert build_shards(arguments) == 0
    return root / "shards"
