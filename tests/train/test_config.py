import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.views import preset
from train.config import Config, load_config, validate
from train.overrides import ConfigError


def test_defaults_are_simclr_on_imagenet() -> None:
    config: Any = load_config()
    assert config.views == preset("simclr")
    assert (config.encoder.name, config.method.temperature) == ("resnet50", 0.1)


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("views: simclr-cifar\noptim: {name: sgd, learning_rate: 0.06}\n")
    config: Any = load_config(path, ["optim.epochs=200", "optim.weight_decay=5e-4", "method.temperature=0.5"])
    assert config.views == preset("simclr-cifar")
    assert (config.optim.name, config.optim.learning_rate, config.optim.weight_decay) == ("sgd", 0.06, 5e-4)
    assert (config.optim.epochs, config.method.temperature) == (200, 0.5)


def test_view_overrides_set_all_groups_or_one() -> None:
    config = load_config(None, ["views=byol", "views.size=96", "views.1.solarize=0.5"])
    assert [view.size for view in config.views] == [96, 96]
    assert [view.solarize for view in config.views] == [0.0, 0.5]
    assert [view.size for view in preset("byol")] == [224, 224], "the preset itself is unchanged"
    assert load_config(None, ["views.size=64"]).views == preset("simclr", size=64)


@pytest.mark.parametrize("length", ["optim.epochs=30", "optim.steps=30"])
def test_saved_configuration_is_the_same(tmp_path: Path, length: str) -> None:
    config = load_config(None, ["views=multicrop-2x160+4x96", "run.seed=7", length])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert validate(config.model_dump(mode="json"), "checkpoint") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.epoch=3", "optim.epoch: unknown; did you mean 'epochs'"),
        ("run.steps=3", "run.steps: unknown; did you mean 'optim.steps'"),
        ("run.colour=3", "run.colour: unknown; expected one of .*dir, seed,"),
        ("optimizer.epochs=3", "optimizer: unknown; did you mean 'optim'"),
        ("views.siez=3", "views.0.siez: unknown; did you mean 'size'"),
        ("method.gamma=3", "method.gamma: unknown; it belongs to ssl-hsic, and method.name is simclr"),
        ("method.momentum=0.99", "method.momentum: unknown; it belongs to mocov2 and dino, and method.name is simclr"),
        ("method.width=64", "method.width: unknown; it belongs to mae"),
        ("method.teacher_temperature=0.04", "method.teacher_temperature: unknown; it belongs to dino and distill"),
        ("method.temprature=0.2", "method.temprature: unknown; did you mean 'temperature'"),
        ("method.temperature=warm", "method.temperature: .*found 'warm'"),
        ("method.temperature=0", "method.temperature: .*greater than 0"),
        ("run.global_batch_size=1.5", "run.global_batch_size: .*found 1.5"),
        ("views.scale=[0.5, 0.1]", "scale: expected 0 < low <= high"),
        ("views.kernel=4", "views.0: kernel: expected an odd number of pixels, found 4$"),
        ("views=simclear", "views: expected .*simclr"),
        ("data.backend=magic", "data.backend"),
        ("optim", "expected section.field=value"),
        ("optim.epochs.x=1", "optim.epochs"),
        ("optim.lr=1", r"^override 'optim\.lr=1': optim\.lr: unknown; did you mean 'learning_rate'"),
        ("views=eval", "^override 'views=eval': views: expected at least 2 views .*found 1; set views.count=2"),
        ("views.count=1", "^override 'views.count=1': views: expected at least 2 views"),
        ("views.std=[0,1,1]", r"views\.0\.std\.0: .*greater than 0, found 0"),
        ("views={size: 3}", "views: expected a list of groups or one of simclr, .*found {'size': 3}; views.size=96"),
        ("views.7.size=32", "expected a group below 1, found 7"),
        ("optim.epochs=.inf", "optim.epochs: .*finite number, found inf"),
        ("optim.learning_rate=.inf", "optim.learning_rate: .*finite number, found inf"),
        ("method.temperature=.inf", "method.temperature: .*finite number, found inf"),
        ("optim.epochs=5", r"optim: warmup_epochs: expected less than the 5 optim\.epochs, found 10; set .*=0\.5"),
        ("optim.steps=", "override 'optim.steps=': expected a value after '=', found nothing; null means none"),
        ("data.prefetch=1000000", "data.prefetch: .*less than or equal to 64, found 1000000"),
        ("run.seed=18446744073709551616", "run.seed: .*less than 18446744073709551616"),
        ("run.seed=-1", "run.seed: .*greater than or equal to 0"),
        ("run.batchnorm=0", r"run.batchnorm: String should match pattern '.*local\|node\|global\|.*', found 0"),
        ("run.batchnorm=globe", r"run.batchnorm: .*local\|node\|global\|.*', found 'globe'"),
        ("run.log_every=true", "run.log_every: expected a number or a name, found true"),
        ("method.temperature=true", "method.temperature: expected a number or a name, found true"),
        ("encoder=resnet7", "encoder.name: unknown architecture; expected resnet50"),
        ("data=/shards", "data: expected a section with fields such as 'shards', found '/shards'"),
        ("run.dir=/etc/passwd", "run.dir: expected a directory that can be written to, found /etc/passwd in /etc/pass"),
        (
            "run.dir=/etc/passwd/x",
            "run.dir: expected a directory that can be written to, found /etc/passwd in /etc/pas",
        ),
        ("run.dir=a: b", "override 'run.dir=a: b': run.dir: .*valid path.*found {'a': 'b'}"),
        ("run.dir=runs/a #2", "' #' begins a comment in YAML; put the value in quotes"),
        ("run={seed: 1, seed: 2}", "override .*in YAML.*'seed' is given twice"),
        ("views.scale=[0.5", r"expected a value in YAML, found '\[0.5'"),
    ],
)
def test_errors_name_the_field(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("methods", "counts"),  # of views of 64 px, then of 32, then of 64
    [("dino swav lejepa visreg", (0, 4, 2)), ("dino swav", (1, 4, 0)), ("dino swav", (1, 1, 2))],
)
def test_views_that_are_global_for_a_method_come_first(methods: str, counts: tuple[int, int, int]) -> None:
    groups = [{"count": n, "size": size, "kernel": 5} for n, size in zip(counts, (64, 32, 64), strict=True) if n]
    for method in methods.split():
        with pytest.raises(
            ConfigError, match=r"views: expected at least [12] of the largest size, 64 px, to come first"
        ):
            load_config(None, [f"method.name={method}", f"views={json.dumps(groups)}"])
    load_config(None, [f"views={json.dumps(groups)}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"- a\n", "expected a mapping of sections, found list"),
        (b"a: [\n", "not valid YAML: line 2: "),
        (b"run:\n\tseed: 1\n", "not valid YAML: line 2: found character '.t'"),
        (b"run: !!python/object:os.system {}\n", "not valid YAML: line 1: could not determine a constructor"),
        (b"\x80\xff\x00", "expected a text file in YAML, found binary data"),
        (b"run: {seed: 1}\nrun: {dir: x}\n", "not valid YAML: line 2: 'run' is given twice"),
        (b"run:\n  seed: 1\n  dir: x\n  seed: 2\n", "not valid YAML: line 4: 'seed' is given twice"),
        (b"optim: {epochs: 20, steps: 3}\n", "expected optim.epochs or optim.steps, found both"),
        (b"foo: 1\n", "foo: unknown"),
        (b"foo:\n", "foo: unknown"),
    ],
)
def test_unusable_files_are_named_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"x\.yaml: {message}") as caught:
        load_config(path, ["run.seed=3"])
    assert "\n" not in str(caught.value)


def test_empty_sections_have_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("run:\nviews:\nencoder:\n")
    assert load_config(path) == load_config()
    assert load_config(path, ["run.seed=3", "views.size=96"]) == load_config(None, ["run.seed=3", "views.size=96"])


def test_a_name_stands_for_its_section(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("encoder: resnet18\nmethod: simclr\n")
    expected = load_config(None, ["encoder.name=resnet18", "encoder.width=8"])
    assert load_config(path, ["encoder.width=8"]) == expected
    assert load_config(None, ["method=simclr", "encoder=resnet18", "encoder.width=8"]) == expected


def test_an_override_replaces_the_length_that_the_file_gives(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for content, override, steps in (("{epochs: 20}", "optim.steps=3", 3), ("{steps: 3}", "optim.epochs=20", None)):
        path.write_text(f"optim: {content}\n")
        assert load_config(path, [override]).optim.steps == steps
    with pytest.raises(ConfigError, match=r"overrides: expected optim\.epochs or optim\.steps, found both"):
        load_config(None, ["optim.epochs=20", "optim.steps=3"])


def test_seeds_are_64_bits() -> None:
    assert load_config(None, [f"run.seed={2**64 - 1}"]).run.seed == 2**64 - 1


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(None, ["run.dir=~/x", "data.shards=~/y", "data.cache_dir=~/z"])
    assert (config.run.dir, config.data.shards) == (tmp_path / "x", f"{tmp_path}/y")
    assert config.data.cache_dir == tmp_path / "z"


def test_errors_are_blamed_on_where_they_were_made(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("run: {colour: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["optim.epoch=3", "run.seed=1"])
    assert f"{path}: run.colour: unknown" in str(caught.value)
    assert "override 'optim.epoch=3': optim.epoch: unknown" in str(caught.value)


def test_differences_from_the_defaults() -> None:
    assert load_config().differences() == ""
    config = load_config(None, ["views.size=96", "optim.steps=3"])
    assert yaml.safe_load(config.differences()) == {"views": [{"count": 2, "size": 96}], "optim": {"steps": 3}}


def test_every_field_is_documented() -> None:
    for section in (Config.model_fields[name].annotation for name in ("data", "encoder", "run")):
        for name, field in section.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name


@pytest.mark.parametrize(("old", "new"), [(True, "global"), (False, "local")])
def test_batchnorm_by_its_name_of_before(old: bool, new: str) -> None:
    tree = load_config().model_dump(mode="json")
    del tree["run"]["batchnorm"]
    tree["run"]["sync_batchnorm"] = old
    assert validate(tree, "checkpoint").run.batchnorm == new
    with pytest.raises(ConfigError, match=r"run: expected batchnorm, found also sync_batchnorm, .* remove that one"):
        load_config(None, ["run.batchnorm=2", f"run.sync_batchnorm={str(old).lower()}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("gradient_compression=powersgd static_graph=true", "static_graph: .* with gradient_compression=powersgd; set"),
        ("gradient_compression=powersgd noise_scale=true", "noise_scale: .* with gradient_compression=powersgd; set"),
        ("local_sgd_period=4 shard_optimizer=true", "shard_optimizer: expected its default with local_sgd_period=4"),
        ("parallel=fsdp noise_scale=true", "noise_scale: expected its default with parallel=fsdp"),
        ("static_graph=true micro_batch_size=4", "micro_batch_size: expected its default with static_graph=True"),
        ("activation_checkpointing=true compile=true", "compile: expected its default with activation_checkpointing"),
        ("cuda_graphs=true micro_batch_size=4", "micro_batch_size: expected its default with cuda_graphs=True"),
        ("parallel=fsdp cuda_graphs=true", "parallel: expected its default with cuda_graphs=True"),
        ("parallel=fsdp precision=fp16", "parallel: expected its default with precision=fp16"),
    ],
)
def test_ways_to_work_together_that_do_not_fit_are_refused(settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"run.{setting}" for setting in settings.split()])
