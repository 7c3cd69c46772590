from __future__ import annotations

import pytest

from sharding.arguments import parse
from sharding.source import IMAGENET


def test_defaults() -> None:
    args = parse("", ["--out", "/data/shards"])
    (spec,) = args.specs
    assert (spec.dataset, spec.split, args.layout.lanes, args.layout.shard_mb) == (
        IMAGENET,
        "train",
        8,
        256,
    )
    assert (args.policy.short_side, args.max_quarantine, args.layout.seed) == (None, 0.01, 0)
    assert args.workers >= 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("lanes", "0"), ("shard-mb", "0"), ("quality", "101"), ("max-quarantine", "2"), ("workers", "0"), ("seed", "-1")],
)
def test_values_out_of_range_are_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("", ["--out", "x", f"--{option}", value])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert f"--{option} must be from" in printed
    assert printed.count("\n") == 1


def test_options_without_effect_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("", ["--out", "x", "--quality", "80"])
    assert "--quality is that of --short-side" in capsys.readouterr().err
    assert parse("", ["--out", "x", "--quality", "80", "--short-side", "64"]).policy.quality == 80
    with pytest.raises(SystemExit):
        parse("", ["--out", "x", "--decode-free", "--quality", "80"])
    assert "--decode-free shards hold no JPEGs" in capsys.readouterr().err


def test_decode_free_shards_have_a_short_side_of_their_own() -> None:
    assert parse("", ["--out", "x", "--decode-free"]).policy.short_side == 256
    policy = parse("", ["--out", "x", "--decode-free", "--short-side", "320"]).policy
    assert (policy.decode_free, policy.short_side) == (True, 320)
