from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sharding.inspect import _class_name, main
from sharding.manifest import open_shards
from tests.sharding.conftest import build_shards, jpeg, write_parquet


def test_table_and_pictures(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(shards), "--out", str(tmp_path / "pictures")]) == 0
    printed = capsys.readouterr().out
    for fact in ("60 in 12 shards", "4 of 15", "0, 1", "3 named, 3 present", "48, 48, 48, 48, 48", "images a class"):
        assert fact in printed
    sheet = np.asarray(Image.open(tmp_path / "pictures/contact-sheet.png"))
    assert sheet.shape == (5 * 142, 12 * 128, 3)
    assert sheet[:128].std() > 20


def test_unlabelled_single_sample(tmp_path: Path) -> None:
    build_shards(write_parquet(tmp_path / "source", [jpeg(1)]), tmp_path / "out", lanes=1)
    assert main([str(tmp_path / "out"), "--out", str(tmp_path)]) == 0


def test_images_that_occur_more_than_once_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_shards(write_parquet(tmp_path / "source", [jpeg(i) for i in (1, 2, 3, 2, 1, 2)]), tmp_path / "out", lanes=1)
    assert main([str(tmp_path / "out"), "--out", str(tmp_path)]) == 0
    assert re.search("occur more than once .* 5 images", capsys.readouterr().out)


def test_captions_name_the_class_without_its_wordnet_id(shards: Path) -> None:
    opened = open_shards(shards)
    names = ("n02096294 Australian terrier", "n02096294", "cat")
    named = replace(opened, manifest=replace(opened.manifest, class_names=names))
    by_label = {int(opened.index.label[sample]): _class_name(named, sample) for sample in range(60)}
    assert by_label == {0: "Australian terrier", 1: "n02096294", 2: "cat"}


def test_no_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
