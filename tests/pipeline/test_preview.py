import argparse
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from pipeline.backends.torchvision import decode
from pipeline.plan import BRIGHTNESS, CONTRAST, HUE, SATURATION, plan_samples, plan_view
from pipeline.preview import _parser, choose_samples, describe, draw_sheet, main, read_views
from pipeline.reading.reader import Reader
from pipeline.views import ViewSpec, preset
from sharding.manifest import ShardSet
from tests.pipeline.reference import apply

SMALL = "views:\n- {size: 32, kernel: 5}\n- {size: 24, kernel: 5, solarize: 1.0}\n"


@pytest.fixture
def views_file(tmp_path: Path) -> str:
    path = tmp_path / "views.yaml"
    path.write_text(SMALL)
    return str(path)


def arguments(shards: ShardSet, out: Path, *more: str) -> list[str]:
    return ["--shards", str(shards.directory), "--out", str(out), "--images", "3", *more]


def test_draws_a_row_per_image_and_a_column_per_view(
    shard_set: ShardSet, tmp_path: Path, views_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "views.png"
    assert main(arguments(shard_set, out, "--views", views_file)) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as picture:
        width, height = picture.size
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert width / height == pytest.approx(3 * 1.7 / (3 * 2.0), rel=0.01)
    for frame in ((31, 119, 180), (255, 127, 14)):  # of the views, and of their crops in the original
        assert (colours == frame).all(axis=1).sum() > 1000


def options(shards: ShardSet, *more: str) -> argparse.Namespace:
    return _parser().parse_args(["--shards", str(shards.root), *more])


def test_every_cell_shows_what_was_drawn_and_made(shard_set: ShardSet) -> None:
    specs = ViewSpec(count=2, size=32, kernel=5), ViewSpec(size=24, kernel=5)
    chosen = options(shard_set, "--images", "3", "--seed", "5", "--step", "2", "--backend", "dali")
    figure = draw_sheet(chosen, specs)
    ids = choose_samples(shard_set, chosen)
    plan = plan_samples(shard_set, specs, 5, 0, ids, np.zeros_like(ids))
    assert figure.get_suptitle() == "simclr, step 2, seed 5"
    with closing(Reader(shard_set)) as reader:
        for row, (first, *cells) in enumerate(np.array(figure.axes).reshape(3, 4)):
            sample = int(ids[row])
            image = decode(reader.read(sample))
            assert_array_equal(first.images[0].get_array(), np.asarray(image))
            assert first.get_title() == f"{sample}: {['disc', 'stripes', 'checks'][shard_set.index.label[sample]]}"
            for number, (axes, view) in enumerate(zip(cells, plan.views, strict=True)):
                top, left, height, width = view.box[row]
                assert first.patches[number].get_bbox().bounds == (left, top, width, height)
                assert axes.get_title() == f"view {number}, {view.spec.size} px, dali"
                assert axes.get_xlabel() == describe(view, row)
                shown = axes.images[0].get_array().astype(int)
                assert np.abs(shown - np.asarray(apply(image, view, row))).max() <= 1, "of ties in the blur"


def test_the_seed_and_the_step_choose_samples_of_all_lanes(shard_set: ShardSet) -> None:
    chosen = [
        choose_samples(shard_set, options(shard_set, "--images", "5", "--seed", seed, "--step", step)).tolist()
        for seed, step in (("0", "0"), ("1", "0"), ("0", "1"), ("0", "23"))
    ]
    assert len({tuple(ids) for ids in chosen}) == 4
    assert all({sample // 23 for sample in ids} == {0, 1, 2, 3} for ids in chosen)


def test_describes_what_was_drawn() -> None:
    n = 50
    numbers = np.arange(n)
    spec = ViewSpec(size=32, kernel=5, solarize=0.5)
    view = plan_view(spec, 0, 0, numbers, numbers * 0, numbers * 0 + 60, numbers * 0 + 80)
    for row in range(n):
        lines = describe(view, row).split("\n")
        top, left, height, width = view.edge[row]
        assert lines[0].startswith(f"{width} x {height} at {left}, {top}")
        assert lines[0].endswith("flipped") == view.flip[row]
        text = " ".join(lines[1:])
        assert ("hue" in text) == ("contrast \N{MULTIPLICATION SIGN}" in text) == view.jitter[row]
        assert ("grey" in text, "blur" in text, "solarized" in text) == (
            view.grey[row],
            view.sigma[row] > 0,
            view.solarize[row],
        )


def test_describes_jitter_in_the_order_in_which_it_applies() -> None:
    one = np.ones(1, np.int64)
    drawn = plan_view(ViewSpec(jitter=1, grey=1, blur=0, size=32), 0, 0, one * 3, one * 0, one * 60, one * 80)
    view = replace(
        drawn,
        edge=np.array([[5, 6, 30, 40]]),
        box=np.array([[5.0, 6.0, 30.0, 40.0]]),
        flip=np.array([True]),
        order=np.array([[HUE, CONTRAST, BRIGHTNESS, SATURATION]], np.int8),
        factors=np.array([[1.5, 0.4, 1.7, -0.1]], np.float32),
        sigma=np.array([1.25], np.float32),
    )
    assert describe(view, 0).split("\n") == [
        "40 x 30 at 6, 5, flipped",
        "hue -36\N{DEGREE SIGN}, contrast \N{MULTIPLICATION SIGN}0.40",
        "brightness \N{MULTIPLICATION SIGN}1.50, saturation \N{MULTIPLICATION SIGN}1.70",
        "grey, blur 1.25 px",
    ]


def test_reads_presets_and_files(views_file: str, tmp_path: Path) -> None:
    assert read_views("dino") == preset("dino")
    assert [spec.size for spec in read_views(views_file)] == [32, 24]
    run = tmp_path / "run.yml"
    run.write_text("views: byol\n")
    assert read_views(str(run)) == preset("byol")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("views: [", "not valid YAML"),
        ("seed: 1", "expected a section `views`"),
        ("views: 5", "expected a section `views`, a list of groups"),
        ("views: []", "a list of groups"),
        ("views: [5]", "views.0: expected a section with fields such as 'count', found 5"),
        ("views: [{}, {kernel: 4}]", "views.1: kernel: expected an odd number of pixels, found 4"),
        ("views: [{colour: 1}]", "views.0.colour: "),
    ],
)
def test_a_file_without_possible_views_is_an_error_of_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "views.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_views(str(path))
    assert "\n" not in str(raised.value)


def test_a_damaged_sample_is_left_out_and_named(
    damage: Callable[[int], ShardSet], caplog: pytest.LogCaptureFixture
) -> None:
    figure = draw_sheet(options(damage(7), "--images", "92"), (ViewSpec(size=32, kernel=5),))
    assert len(figure.axes) == 2 * 91
    assert re.search(r"left out sample 7 \(lane-00/.*checksum", caplog.text)


def test_shards_behind_a_url_come_through_a_cache(
    remote: ShardSet, tmp_path: Path, views_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, cache = tmp_path / "new" / "views.png", tmp_path / "cache"
    command = arguments(remote, out, "--views", views_file, "--images", "1")
    assert main(command) == 2
    assert "--cache-dir" in capsys.readouterr().err
    assert main([*command, "--cache-dir", str(cache)]) == 0
    assert out.is_file()
    assert len(list(cache.glob("*.tar"))) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--views", "nothing"], "expected one of simclr"),
        (["--views", "missing.yaml"], "missing.yaml"),
        (["--backend", "nothing"], "expected one of cpu"),
        (["--shards", "/nowhere"], "/nowhere: no such directory"),
        (["--shards", "memory://nowhere"], "memory://nowhere: no such directory"),
        (["--images", "0"], "--images: expected 1 to 200, found 0"),
        (["--images", "201"], "--images: expected 1 to 200, found 201"),
        (["--step", "-1"], "--step: expected at least 0, found -1"),
        (["--out", "picture.txt"], "expected a picture (avif, eps"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_wrong_arguments_are_one_clear_message(
    shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(arguments(shard_set, tmp_path / "x.png", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("pipeline.preview: ")
    assert message in error
    assert error.count("\n") == 1
