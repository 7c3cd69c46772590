from dataclasses import replace
from typing import Any

import pytest

from sharding.command import UserError
from sharding.manifest import Manifest, open_shards
from tests.train.runs import settings
from train.config import load_config
from train.engine.checkpoint import checkpoints, load
from train.engine.plan import RunPlan, check_labels, plan_run
from train.pretrain import main


def plan(shards: Any, *overrides: str) -> RunPlan:
    """Of 96 images in batches of 24: 4 steps an epoch."""
    manifest: Manifest = open_shards(shards).manifest
    return plan_run(load_config(None, ["run.global_batch_size=24", *overrides]), manifest.num_samples)


def test_the_rate_is_scaled_and_ends_where_it_is_told(shards: Any) -> None:
    chosen = plan(shards, "optim.learning_rate=0.8", "optim.final_learning_rate=0.01", "optim.epochs=25")
    assert (chosen.total_steps, chosen.warmup_steps) == (100, 40)
    assert [chosen.learning_rate(step) for step in (39, 40, 70, 100)] == pytest.approx(
        [0.075, 0.075, 0.037875, 0.00075]
    )
    assert str(chosen) == (
        "100 steps; learning rate 0.075 after 40 steps of warm-up, 0.00075 at the end (cosine); weight decay 1e-06"
    )


def test_a_constant_rate_is_reached_and_kept(shards: Any) -> None:
    chosen = plan(shards, "optim.learning_rate=0.8", "optim.schedule=constant", "optim.epochs=25")
    assert [chosen.learning_rate(step) for step in (3, 39, 70, 100)] == pytest.approx([0.0075, 0.075, 0.075, 0.075])


def test_the_supervised_baseline_divides_by_ten_at_epochs_30_60_and_80(shards: Any) -> None:
    chosen = plan(shards, "method.name=supervised", "optim.learning_rate=0.1")
    peak = 0.1 * 24 / 256
    rates = [chosen.learning_rate(4 * epoch) for epoch in (5, 29, 30, 59, 60, 79, 80, 90)]
    assert rates == pytest.approx([peak, peak, peak / 10, peak / 10, peak / 100, peak / 100, peak / 1000, peak / 1000])


def test_dinos_weight_decay_rises_by_a_cosine(shards: Any) -> None:
    chosen = plan(shards, "method.name=dino", "optim.epochs=25")
    assert [chosen.moving("weight_decay", step) for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert plan(shards).moving("weight_decay", 7) == 1e-6, "by default it does not move"


@pytest.mark.parametrize(("optimizer", "name"), [("sgd", "momentum"), ("lamb", "momentum"), ("adamw", "betas")])
def test_a_run_moves_its_momentum(optimizer: str, name: str, shards: Any, tmp_path: Any) -> None:
    """Of two updates the second's is half way by the cosine."""
    more = [f"optim.name={optimizer}", "optim.momentum=0.8", "optim.momentum_end=0.4", "optim.steps=2"]
    assert main(settings(shards, tmp_path, *more)) == 0
    for group in load(checkpoints(tmp_path)[-1])["optimizer"]["param_groups"]:
        assert (group[name][0] if name == "betas" else group[name]) == pytest.approx(0.6)


def test_a_run_moves_its_weight_decay_and_shows_what_is_derived(
    shards: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(settings(shards, tmp_path, "optim.steps=2", "optim.weight_decay=0.1", "optim.weight_decay_end=0.3")) == 0
    )
    groups = load(checkpoints(tmp_path)[-1])["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [pytest.approx(0.2), 0.0]
    assert "derived: 2 steps; learning rate 0.004688 after 0 steps" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["supcon", "supervised"])
def test_methods_that_take_labels_want_all_of_them(method: str, shards: Any) -> None:
    config, opened = load_config(None, [f"method.name={method}"]), open_shards(shards)
    check_labels(config, opened)
    for label, found in ((-1, "96 of 96 without a label .* and 0 classes"), (0, "0 of 96 without .* and 1 classes")):
        spoilt = replace(opened.index, label=0 * opened.index.label + label)
        with pytest.raises(
            UserError, match=rf"data\.shards: .*2 classes or more for method.name={method}, found {found}"
        ):
            check_labels(config, replace(opened, index=spoilt))
        check_labels(load_config(), replace(opened, index=spoilt))


def test_the_baseline_knows_all_classes_before_it_starts(
    shards: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", "run.global_batch_size=24"]
    assert main(["method.name=supervised", "method.num_classes=9", *wanted]) == 2
    assert "method.num_classes: expected 10 or more for" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
