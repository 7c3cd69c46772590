from pathlib import Path

import pytest

from pipeline.views import preset
from train.config import Config, ConfigError, load_config, validate


def test_defaults_are_simclr_on_imagenet() -> None:
    config = load_config()
    assert config.views == preset("simclr")
    assert (config.encoder.name, config.method.temperature) == ("resnet50", 0.1)


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("views: simclr-cifar\noptim: {name: sgd, learning_rate: 0.06}\n")
    config = load_config(path, ["optim.epochs=200", "optim.weight_decay=5e-4", "method.temperature=0.5"])
    assert config.views == preset("simclr-cifar")
    assert (config.optim.name, config.optim.learning_rate, config.optim.weight_decay) == ("sgd", 0.06, 5e-4)
    assert (config.optim.epochs, config.method.temperature) == (200, 0.5)


def test_view_overrides_set_all_groups_or_one() -> None:
    config = load_config(None, ["views=byol", "views.size=96", "views.1.solarize=0.5"])
    assert [view.size for view in config.views] == [96, 96]
    assert [view.solarize for view in config.views] == [0.0, 0.5]
    assert [view.size for view in preset("byol")] == [224, 224], "the preset itself is unchanged"
    assert load_config(None, ["views.size=64"]).views == preset("simclr", size=64)


def test_saved_configuration_is_the_same(tmp_path: Path) -> None:
    config = load_config(None, ["views=multicrop-2x160+4x96", "run.seed=7"])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert validate(config.model_dump(mode="json"), "checkpoint") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.epoch=3", "optim.epoch: unknown; did you mean 'epochs'"),
        ("run.steps=3", "run.steps: unknown; did you mean 'optim.steps'"),
        ("run.colour=3", "run.colour: unknown; expected one of dir, seed,"),
        ("optimizer.epochs=3", "optimizer: unknown; did you mean 'optim'"),
        ("views.siez=3", "views.0.siez: unknown; did you mean 'size'"),
        ("method.temperature=warm", "method.temperature: .*found 'warm'"),
        ("method.temperature=0", "method.temperature: .*greater than 0"),
        ("run.global_batch_size=1.5", "run.global_batch_size: .*found 1.5"),
        ("views.scale=[0.5, 0.1]", "scale: expected 0 < low <= high"),
        ("views.kernel=4", "views.0: kernel: expected an odd number of pixels, found 4$"),
        ("views=simclear", "views: expected .*simclr"),
        ("data.backend=magic", "data.backend"),
        ("optim", "expected section.field=value"),
        ("optim.epochs.x=1", "optim.epochs"),
        ("views.scale=[0.5", r"expected a value in YAML, found '\[0.5'"),
    ],
)
def test_errors_name_the_field(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize("content", [None, "- a\n", "a: [\n"])
def test_unusable_files_are_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_config(path)


def test_every_field_is_documented() -> None:
    for section in (Config.model_fields[name].annotation for name in ("data", "encoder", "run")):
        for name, field in section.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name
