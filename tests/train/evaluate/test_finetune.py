"""Evaluation that trains: what is trained, on which images, at which rates, on any number of processes."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharding.manifest import ShardSet, open_shards
from tests.census import wait_until
from tests.processes import run_ranks
from tests.train.evaluate.test_evaluate import records, save
from train.config import load_config
from train.engine.checkpoint import Pretrained, checkpoints, load_latest
from train.evaluate import build_protocol
from train.evaluate.__main__ import main
from train.evaluate.data import Images, choose_fraction, choose_images, evaluation_view
from train.evaluate.finetune import Finetune, LinearAugmented, Trained, layer_scales
from train.model.encoder import Encoder, EncoderConfig
from train.processes.distributed import World

SHORT = {"batch_size": 24, "steps": 6, "checkpoint_every": 2}
SEVERAL = LinearAugmented(**SHORT, learning_rate=[0.03, 30], weight_decay=0.01, nesterov=True)


def pretrained(shards: Path | str, directory: Path | str, *overrides: str) -> Pretrained:
    small = ["encoder=resnet18", "encoder.width=8", "views.size=32", "views.kernel=5", "data.num_threads=1"]
    config = load_config(None, [*small, f"data.shards={shards}", *overrides])
    torch.manual_seed(1)
    return Pretrained(Encoder(config.encoder).eval(), config, 1, None, Path(directory), Path(directory))


def trained(protocol: Trained, start: Pretrained, world: World | None = None, fitted: bool = False) -> dict[str, float]:
    """What it yields; ``fitted``: on the training images themselves, of which there are more."""
    images = choose_images(start.config.data.shards, None)
    images = (images[0], images[0]) if fitted else images
    view = evaluation_view(start.config.views, images[0].shards)
    found = protocol.run("it", start, *images, view, world or World())
    assert found is not None
    return found


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Of the only run in it, or of a grid and the run that follows, by their names."""
    states = [load_latest(folder) for folder in sorted(directory.glob("it-*"))]
    assert states
    return {name: value for state in states if state for name, value in state["method"].items()}


def test_a_fraction_is_as_large_for_each_class_and_part_of_a_larger_one(shard_set: ShardSet) -> None:
    images, _ = choose_images(str(shard_set.root), None)
    tenth, half = (choose_fraction(images, fraction, 0) for fraction in (0.1, 0.5))
    for chosen, fraction in ((tenth, 0.1), (half, 0.5)):
        for label in range(3):
            count = (shard_set.index.label[images.ids] == label).sum()
            assert (shard_set.index.label[chosen.ids] == label).sum() == round(fraction * count)
    assert set(tenth.ids) < set(half.ids) < set(images.ids)
    assert choose_fraction(images, 0.1, 0).ids.tolist() == tenth.ids.tolist()
    assert choose_fraction(images, 0.1, 1).ids.tolist() != tenth.ids.tolist()
    assert len(choose_fraction(images, 1e-6, 0).ids) == 3
    assert choose_fraction(images, 1.0, 0).ids.tolist() == images.ids.tolist()


def test_rates_fall_from_the_classifier_to_the_first_layer() -> None:
    vit = layer_scales(Encoder(EncoderConfig(name="timm:vit_tiny_patch16_224")), 0.5)
    assert vit["encoder.backbone.norm.weight"] == 1
    assert vit["encoder.backbone.blocks.11.mlp.fc1.weight"] == 0.5
    assert vit["encoder.backbone.blocks.0.norm1.bias"] == 0.5**12
    assert {vit[f"encoder.backbone.{n}"] for n in ("pos_embed", "cls_token", "patch_embed.proj.weight")} == {0.5**13}
    resnet = layer_scales(Encoder(EncoderConfig(name="resnet18", width=8)), 0.5)
    assert resnet["encoder.backbone.layer4.1.bn2.bias"] == 0.5
    assert resnet["encoder.backbone.layer1.0.conv1.weight"] == 0.5**4
    assert resnet["encoder.backbone.conv1.weight"] == resnet["encoder.backbone.bn1.weight"] == 0.5**5
    assert set(layer_scales(Encoder(EncoderConfig(name="resnet18", width=8)), 1.0).values()) == {1}


def test_decayed_rates_are_those_of_the_updates(shard_set: ShardSet, tmp_path: Path) -> None:
    """After one step from equal weights a parameter has moved by its share of what it moves without decay."""
    start = pretrained(shard_set.root, tmp_path)
    before, moved = start.encoder.state_dict(), []
    for decay in (1.0, 0.5):
        directory = tmp_path / str(decay)
        trained(
            Finetune(**(SHORT | {"steps": 1, "learning_rate": 10, "layer_decay": decay})),
            start._replace(directory=directory),
        )
        after = weights(directory)
        moved.append({n: after[f"encoder.{n}"] - before[n] for n in ("backbone.conv1.weight", "backbone.bn1.bias")})
    for name, whole in moved[0].items():
        torch.testing.assert_close(moved[1][name], whole * 0.5**5, rtol=0.02, atol=1e-7)
        assert whole.abs().max() > 1e-4


def test_fine_tuning_learns(shard_set: ShardSet, tmp_path: Path) -> None:
    start = pretrained(shard_set.root, tmp_path)
    found = trained(Finetune(batch_size=24, epochs=40, learning_rate=1), start, fitted=True)
    assert found["training images"] == 73
    assert found["top-1 %"] > 70, "of three classes"
    assert not torch.equal(weights(tmp_path)["encoder.backbone.conv1.weight"], start.encoder.backbone.conv1.weight)


def test_a_frozen_encoder_stays_as_it_is_and_its_classifier_learns(shard_set: ShardSet, tmp_path: Path) -> None:
    start = pretrained(shard_set.root, tmp_path)
    found = trained(LinearAugmented(batch_size=24, epochs=40, learning_rate=10), start, fitted=True)
    after = weights(tmp_path)
    for name, value in start.encoder.state_dict().items():  # BatchNorm's averages and counts as well
        assert torch.equal(after[f"encoder.{name}"], value), name
    assert found["top-1 %"] > 45, "of three classes, by an untrained encoder"


@pytest.fixture(scope="module")
def grid(shard_set: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretrained, dict[str, float]]:
    """What was trained at several rates, and what was found."""
    start = pretrained(shard_set.root, tmp_path_factory.mktemp("grid"), "run.precision=fp64")
    return start, trained(SEVERAL, start)


def test_classifiers_of_several_rates_are_those_of_each_rate_alone(
    grid: tuple[Pretrained, dict[str, float]], shard_set: ShardSet, tmp_path: Path
) -> None:
    start, found = grid
    images, _ = choose_images(str(shard_set.root), None)
    held_out = np.arange(len(images.ids)) % 5 == 0
    rest, part = (Images(shard_set, images.ids[which]) for which in (~held_out, held_out))
    view, scores = evaluation_view(start.config.views, shard_set), {}
    for number, rate in enumerate(SEVERAL.learning_rate):
        alone = SEVERAL.model_copy(update={"learning_rate": (rate,)})
        directory = tmp_path / str(number)
        results = alone.run("it", start._replace(directory=directory), rest, part, view, World())
        assert results is not None
        scores[rate] = results["top-1 %"]
        assert found[f"held-out top-1 % at {rate:g}"] == scores[rate]
        for name in ("weight", "bias"):
            expected = weights(directory)[f"classifier.{name}"]
            together = weights(start.directory)[f"classifiers.{number}.{name}"]
            torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-12)
    assert len(set(scores.values())) > 1, "so that there is a choice"
    assert scores[found["learning rate chosen"]] == max(scores.values())


def test_the_rate_that_was_chosen_is_trained_as_if_it_had_been_named(grid: tuple[Pretrained, dict[str, float]]) -> None:
    start, found = grid
    named = trained(LinearAugmented(**SEVERAL.model_dump() | {"learning_rate": found["learning rate chosen"]}), start)
    assert named.items() <= found.items()
    assert named["training images"] == 73
    assert len(list(start.directory.glob("it-*"))) == 2, "its run was there"


ALL: list[Trained] = [
    Finetune(**SHORT, fraction=0.5, nesterov=True, layer_decay=0.7),
    LinearAugmented(**SHORT),
    SEVERAL,
]


def trained_by_rank(world: World, shards: str, directory: str) -> list[dict[str, float]]:
    start = pretrained(shards, directory, "run.precision=fp64")
    parts = [start._replace(directory=Path(directory, str(number))) for number in range(len(ALL))]
    return [trained(protocol, part, world) for protocol, part in zip(ALL, parts, strict=True)]


def test_three_processes_train_what_one_trains(shard_set: ShardSet, tmp_path: Path) -> None:
    many = run_ranks(trained_by_rank, 3, str(shard_set.root), str(tmp_path / "many"))
    alone = trained_by_rank(World(), str(shard_set.root), str(tmp_path / "alone"))
    assert many == [alone] * 3
    for number in range(len(ALL)):
        expected, found = (weights(tmp_path / who / str(number)) for who in ("alone", "many"))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)
    folders = [sorted(path.name for path in (tmp_path / who).glob("*/it-*")) for who in ("alone", "many")]
    assert folders[0] == folders[1], "named by what decides the weights, which is the same"


def test_a_run_that_was_killed_continues_as_if_it_had_not_been(shard_set: ShardSet, tmp_path: Path) -> None:
    start, protocol = pretrained(shard_set.root, tmp_path), Finetune(**SHORT, fraction=0.5)
    found = trained(protocol, start)
    assert continued(protocol, start) == found


def test_several_rates_that_were_killed_continue_as_if_they_had_not_been(
    grid: tuple[Pretrained, dict[str, float]],
) -> None:
    assert continued(SEVERAL, grid[0]) == grid[1]


def continued(protocol: Trained, start: Pretrained) -> dict[str, float]:
    """What it yields as if it had been killed after its first checkpoints; the weights must be those of before."""
    expected = weights(start.directory)
    for folder in start.directory.glob("it-*"):
        for newer in checkpoints(folder)[1:]:
            newer.unlink()
        assert [path.name for path in checkpoints(folder)] == ["step-000000002.pt"]
    found = trained(protocol, start)
    for name, value in weights(start.directory).items():
        assert torch.equal(value, expected[name]), name
    return found


def test_what_is_finished_is_not_trained_again_and_other_settings_are_a_different_run(
    shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = pretrained(shard_set.root, tmp_path)
    found = trained(Finetune(**SHORT), start)
    assert trained(Finetune(**(SHORT | {"checkpoint_every": 3})), start) == found
    assert "step 6 is done, and the run is to have 6; nothing to do" in capsys.readouterr().out
    trained(Finetune(**SHORT, seed=1), start)
    trained(Finetune(**SHORT), start._replace(encoder=Encoder(start.config.encoder)))
    assert len(list(tmp_path.glob("it-*"))) == 3


def test_presets_are_the_published_protocols() -> None:
    published: dict[tuple[type[Trained], str], dict[str, Any]] = {
        (Finetune, "simclr-1%"): {"learning_rate": 0.05, "fraction": 0.01, "epochs": 60, "nesterov": True},
        (Finetune, "lightly"): {"learning_rate": 0.05, "fraction": 1.0, "epochs": 30, "nesterov": False},
        (LinearAugmented, "simclr"): {"learning_rate": 0.1, "batch_size": 4096, "epochs": 90, "schedule": "cosine"},
        (LinearAugmented, "dinov3"): {"batch_size": 1024, "epochs": 10, "schedule": "cosine", "nesterov": False},
        (LinearAugmented, "moco"): {"learning_rate": 30.0, "batch_size": 256, "milestones": (0.6, 0.8)},
    }
    for (kind, name), settings in published.items():
        protocol = kind(preset=name)
        assert settings.items() <= protocol.model_dump().items()
        assert (protocol.name, protocol.momentum, protocol.weight_decay, protocol.warmup_epochs) == ("sgd", 0.9, 0, 0)
    assert Finetune(preset="simclr-10%", epochs=5).epochs == 5
    expected = [step * 10.0**power for power in range(-5, -1) for step in (1, 2, 5)] + [0.1]
    assert LinearAugmented(preset="dinov3").learning_rate == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"finetune: preset: expected one of lightly, simclr-1%, .*, found 'x'"):
        build_protocol("finetune", {"preset": "x"})


def test_too_few_images_and_encoders_without_blocks_are_refused(shard_set: ShardSet, tmp_path: Path) -> None:
    start = pretrained(shard_set.root, tmp_path)
    with pytest.raises(ValueError, match=r"it\.batch_size: expected at most the 7 training images, found 24"):
        trained(Finetune(**SHORT, fraction=0.1), start)
    with pytest.raises(ValueError, match=r"finetune\.layer_decay: expected an encoder of blocks or stages"):
        layer_scales(Encoder(EncoderConfig(name="timm:dla46_c")), 0.5)


@pytest.mark.parametrize("settings", [("finetune", {}), ("linear-augmented", {"clip_norm": 1})])
def test_several_rates_are_refused_where_they_would_not_be_apart(settings: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"learning_rate: expected one number; several need a frozen encoder"):
        build_protocol(settings[0], {"learning_rate": [0.1, 1], **settings[1]})


def test_the_command_trains_beside_what_needs_representations(shard_set: ShardSet, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, shard_set, 1)
    settings = [f"finetune.{name}={value}" for name, value in SHORT.items()]
    arguments = ["--checkpoint", str(run), "--untrained", "--protocol", "finetune", "knn", "knn.k=5", *settings]
    assert main(arguments) == 0
    (record,) = records(run)
    for results in record["results"].values():
        assert list(results) == ["finetune", "knn"]
        assert set(results["finetune"]) == {"training images", "top-1 %"}
    assert record["settings"]["finetune"]["preset"] == "lightly"
    assert len(list(run.glob("finetune-*"))) == 2, "of both encoders"
    assert list((run / "tensorboard" / "evaluation").iterdir())


def test_a_signal_stops_it_without_a_result(shard_set: ShardSet, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, shard_set, 1)

    def interrupt() -> None:
        wait_until(lambda: any(run.glob("finetune-*/step-*.pt")))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    settings = ["finetune.batch_size=24", "finetune.epochs=100000", "finetune.checkpoint_every=2"]
    assert main(["--checkpoint", str(run), "--protocol", "finetune", *settings]) == 3
    thread.join()
    assert not (run / "evaluation.jsonl").exists()
    assert not (run / "features").exists(), "nothing needed representations"


def test_it_is_a_run_whose_encoder_can_be_evaluated(shard_set: ShardSet, tmp_path: Path) -> None:
    start = pretrained(open_shards(shard_set.root).root, tmp_path)
    trained(Finetune(**SHORT), start)
    (folder,) = tmp_path.glob("it-*")
    assert main(["--checkpoint", str(folder), "--protocol", "knn", "knn.k=5"]) == 0
