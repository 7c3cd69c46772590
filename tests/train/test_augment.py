"""Which augmentations matter: the cells, the matrix, a study."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.train.test_tune import write_study
from train.augment import cells, draw, main, matrix
from train.config import load_config
from train.overrides import ConfigError
from train.report import read_runs, render

pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'parallax-ssl[tune]'")
pytestmark = pytest.mark.filterwarnings("ignore:.*importances will be equal")  # as they are of so few trials
TRIED = {"crop": {"crop": "random"}, "colour": {"jitter": 0.8}}


def test_one_view_stays_as_it_is_and_the_other_has_what_is_tried() -> None:
    made = cells(TRIED, ["views.size=32", "views.kernel=5", "views.scale=[0.3, 1.0]"])
    assert list(made) == ["crop", "crop + colour", "colour"]
    for name, crop, jitter in (("crop", "random", 0), ("crop + colour", "random", 0.8), ("colour", "center", 0.8)):
        plain, tried = load_config(None, [made[name]]).views
        assert (plain.crop, plain.jitter, plain.resize, plain.size) == ("center", 0, 32, 32)
        assert tried == plain.model_copy(update={"crop": crop, "jitter": jitter})
        assert (tried.scale, tried.flip, tried.grey, tried.blur) == ((0.3, 1.0), 0, 0, 0)


@pytest.mark.parametrize(
    ("tried", "message"),
    [
        ({"a": {"jiter": 1}}, "augment: a: .*did you mean 'jitter'"),
        ({"a": {"jitter": 1}, "b": {"jitter": 0.5}}, "augment: a [+] b: .*both set jitter"),
        ({"a": 1}, "augment: a: expected settings of a view such as {flip: 0.5}"),
    ],
)
def test_a_wrong_augmentation_is_told_by_its_name(tried: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(tried, [])


def test_the_matrix_is_symmetric_and_has_gaps_where_runs_failed(tmp_path: Path) -> None:
    trials = [
        {"trial": 0, "state": "complete", "value": 30.0, "augmentations": "crop"},
        {"trial": 1, "state": "complete", "value": 50.0, "augmentations": "crop + colour"},
        {"trial": 2, "state": "failed", "value": None, "augmentations": "colour"},
    ]
    rows = matrix(["crop", "colour"], trials)
    assert rows == [[30.0, 50.0], [50.0, None]]
    draw(["crop", "colour"], rows, "linear", tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as picture:
        assert picture.width > 100
    draw(["crop"], [[None]], "linear", tmp_path / "nothing-yet.png")


@pytest.mark.usefixtures("at_once")
def test_a_study_runs_every_cell_and_once_only(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write_study(tmp_path, shards, "augment", {"crop": {"crop": "random"}})
    for _ in range(2):
        assert main(arguments) == 0
    assert (tmp_path / "study" / "matrix.png").exists()
    kept = json.loads((tmp_path / "study" / "study.json").read_text())
    assert kept["matrix"] == {"names": ["crop"], "rows": [[kept["trials"][0]["value"]]]}
    assert len(kept["trials"]) == 1
    page = render(read_runs([tmp_path / "study" / "trial-0000"]), [])
    assert f"<tr><th>crop</th><td>{kept['trials'][0]['value']:.1f}</td></tr>" in page
    assert main([*arguments[:4], "--objective", "knn", *arguments[4:]]) == 2
    assert "begun with the objective 'linear', now 'knn'" in capsys.readouterr().err
