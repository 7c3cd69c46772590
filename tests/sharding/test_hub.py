"""Data sets, shards and buckets of the Hugging Face hub, for which a server of our own stands in (`tests.hub`)."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow.parquet
import pytest

from pipeline.reading.cache import CacheOptions
from pipeline.reading.reader import Reader
from sharding.arguments import Layout
from sharding.build import build, main
from sharding.encode import Policy
from sharding.manifest import open_shards
from sharding.source import IMAGENET, SourceSpec
from sharding.storage import Directory
from tests.hub import HUB, TOKEN, Hub
from tests.sharding.conftest import CLASS_NAMES, files

# As ImageNet's card: it says which files and how many images a split has, and names the classes.
CARD = """---
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': circle, '1': square, '2': triangle}}}}
  splits:
  - {name: train, num_examples: 166, num_bytes: 300000}
  - {name: validation, num_examples: 8, num_bytes: 20000}
configs:
- config_name: default
  data_files: [{split: train, path: data/train-*}, {split: validation, path: data/validation-*}]
---
"""


def parquet_file(images: list[bytes]) -> bytes:
    """Without the library's metadata, so that the card is needed."""
    file = io.BytesIO()
    cells = [{"bytes": data, "path": f"{row}.JPEG"} for row, data in enumerate(images)]
    table = pyarrow.table({"image": cells, "label": [row % 3 for row in range(len(images))]})
    pyarrow.parquet.write_table(table, file, 33, compression="none", use_dictionary=False)
    return file.getvalue()


@pytest.fixture(scope="module")
def imagenet(images: list[bytes]) -> dict[str, bytes]:
    """Small images in the layout of the hub's ImageNet."""
    parts = [(images + images)[:100], images[:33], images[20:53]]
    named = {f"data/train-0000{number}-of-00003.parquet": parquet_file(part) for number, part in enumerate(parts)}
    held_out = {f"data/{name}-00000-of-00001.parquet": parquet_file(images[53:]) for name in ("validation", "test")}
    return {"README.md": CARD.encode(), **named, **held_out}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imagenet: dict[str, bytes]) -> Iterator[Hub]:
    """Has ImageNet; nobody is logged in, and nothing is downloaded."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    huge = imagenet | {"README.md": CARD.replace("300000", f"{10**15}").encode()}
    HUB.files = {
        f"datasets/{IMAGENET}": imagenet,
        "datasets/me/huge": huge,
        "datasets/me/empty": {".gitattributes": b""},
    }
    HUB.gated, HUB.requests, HUB.faults = set(), [], []
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield HUB
    HUB.files, HUB.faults = {}, []


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds for which somebody slept, who does not."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """``run(name, ...)`` builds ImageNet, or what the options say, into the folder of that name."""

    def command(name: str, *options: str) -> int:
        where = ["--out", str(tmp_path / name), "--cache", str(tmp_path / "cache")]
        return main([*where, "--lanes", "2", "--shard-mb", "0.05", "--workers", "1", *options])

    return command


def parquet_downloads(hub: Hub) -> list[str]:
    """Data files that were asked for, each as often; forgets them."""
    names = [m[1] for request in hub.requests if (m := re.search(r"resolve/\w+/data/(\w+-\d+)-", request))]
    hub.requests.clear()
    return names


def test_imagenet_by_its_name_is_that_of_a_folder(
    hub: Hub, run: Callable[..., int], tmp_path: Path, imagenet: dict[str, bytes]
) -> None:
    assert run("out") == 0
    assert sorted(set(parquet_downloads(hub))) == ["train-00000", "train-00001", "train-00002"]
    for name, content in imagenet.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(content)
    assert run("from-folder", "--dataset", str(tmp_path / "local")) == 0
    made, expected = files(tmp_path / "out"), files(tmp_path / "from-folder")
    manifest, theirs = (json.loads(found.pop("manifest.json")) for found in (made, expected))
    del made["manifest.copy.json"], expected["manifest.copy.json"]
    assert made == expected
    source = theirs["source"] | {"dataset": IMAGENET, "hub_commit": hub.commit(f"datasets/{IMAGENET}")}
    assert manifest == theirs | {"source": source}
    assert manifest["class_names"] == CLASS_NAMES
    assert manifest["num_read"] == 166


def test_nothing_is_downloaded_twice_and_a_split_alone(hub: Hub, run: Callable[..., int], tmp_path: Path) -> None:
    assert run("val", "--split", "validation") == 0
    assert set(parquet_downloads(hub)) == {"validation-00000"}
    assert run("both", "--split", "validation", "train") == 0
    assert {name[:5] for name in parquet_downloads(hub)} == {"train"}
    assert files(tmp_path / "both/validation") == files(tmp_path / "val")
    assert run("again", "--split", "train") == 0
    assert run("slice", "--split", "train[:40]") == 0
    assert parquet_downloads(hub) == []
    assert open_shards(tmp_path / "slice").manifest.num_read == 40
    assert (tmp_path / "cache/datasets--ILSVRC--imagenet-1k").is_dir()
    assert not (tmp_path / "elsewhere").exists()


def test_a_dry_run_reads_a_part_of_one_file(
    hub: Hub, run: Callable[..., int], images: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files["datasets/me/plain"] = {k: v for k, v in hub.files[f"datasets/{IMAGENET}"].items() if k != "README.md"}
    loose = {f"train/{name}/{i}.jpg": images[7] for name in ("cat", "dog") for i in range(3)}
    hub.files["datasets/me/loose"] = loose | {"test/cat/0.jpg": images[0]}
    assert run("out", "--dry-run", "--split", "train", "validation") == 0
    assert run("out", "--dry-run", "--dataset", "me/plain") == 0
    assert run("out", "--dry-run", "--dataset", "me/loose") == 0
    assert set(parquet_downloads(hub)) == {"train-00000", "validation-00000"}
    assert not list(tmp_path.rglob("*.parquet"))
    printed = capsys.readouterr().out
    assert printed.count("GB of downloads until they are built") == 4
    *exact, plain, images_alone = re.findall(r"out.*: (\d+) images of", printed)
    assert exact == ["166", "8"]
    assert 150 < int(plain) < 220
    assert images_alone == "6"


def test_a_gated_data_set_says_what_to_do(
    hub: Hub, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.gated.add(f"datasets/{IMAGENET}")
    for token in ("", "hf_other"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        assert run("out") == 2
        assert capsys.readouterr().err.strip() == (
            f"sharding.build: {IMAGENET}: is gated: accept the terms on https://huggingface.co/datasets/{IMAGENET}, "
            "then log in as the same user with `hf auth login`"
        )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run("out") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "me/nothing"], "me/nothing: Dataset 'me/nothing' doesn't exist on the Hub or cannot be acc"),
        (["--dataset", "me/empty"], "me/empty: The directory at hf://datasets/me/empty@"),
        (["--dataset", "a/b/c"], "a/b/c: Repo id must be in the form"),
        (["--revision", "v9"], f"{IMAGENET}: Revision 'v9' doesn't exist"),
        (["--split", "dev"], f"{IMAGENET}: has no split 'dev', only train, validation; see --split"),
        (
            ["--dataset", "me/huge"],
            "me/huge: needs 1,000,000 GB for its files, and as much for what is",
        ),
        (["--config", "small"], f"{IMAGENET}: BuilderConfig 'small' not found. Available: ['default']"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_downloaded(
    hub: Hub, run: Callable[..., int], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run("out", *options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"sharding.build: {message}")
    assert "\n" not in error
    assert parquet_downloads(hub) == []


def test_a_hub_that_fails_for_a_while_is_asked_again(
    hub: Hub, run: Callable[..., int], waits: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = [
        (r"GET /api/datasets/ILSVRC/imagenet-1k$", 1, 503),
        ("GET /storage", 1, 429),
        ("GET /storage", 1, "cut"),
        ("GET /storage", 1, 503),
        ("HEAD .*train-00001", 1, 500),
        ("GET /storage", 1, "gone"),
    ]
    assert run("out") == 0
    assert not any(left for _, left, _ in hub.faults)
    assert 8 in waits  # Retry-After, and one
    assert open_shards(tmp_path / "out").manifest.source["hub_commit"] == hub.commit(f"datasets/{IMAGENET}")
    assert f"sharding: {IMAGENET}: Server error '503 Service Unavailable' for url" in capsys.readouterr().err


def test_a_hub_that_fails_for_good_ends_the_build_which_can_go_on(
    hub: Hub, run: Callable[..., int], waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for fault, reason in ((500, "Server error '500 Internal"), ("gone", "Server disconnected without")):
        hub.faults = [("HEAD .*train-00001", 10**6, fault), ("GET /storage", 1, ""), ("GET /storage", 10**6, fault)]
        assert run("out") == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"sharding.build: {IMAGENET}: ")
        assert reason in last
        assert last.endswith("; when the hub answers again, the same command continues")
    assert sum(waits) > 85
    hub.faults.clear()
    parquet_downloads(hub)
    assert run("out") == 0
    assert set(parquet_downloads(hub)) == {"train-00001", "train-00002"}


@pytest.mark.usefixtures("hub")
def test_without_access_one_line_says_what_is_needed(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    assert run("out") == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    for needed in (f"{IMAGENET}: the hub cannot be reached", "hf auth login", "accept the terms", "--dataset"):
        assert needed in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", [503, "gone"])
def test_without_the_hub_what_was_downloaded_is_used(
    hub: Hub, run: Callable[..., int], waits: list[float], tmp_path: Path, fault: int | str
) -> None:
    assert run("first") == 0
    hub.faults = [("/", 10**6, fault)]
    assert run("second") == 0
    assert files(tmp_path / "second") == files(tmp_path / "first")
    assert waits == []
    assert run("other", "--split", "validation") == 2


@pytest.mark.parametrize("kind", ["datasets", "buckets"])
def test_urls_of_the_hub_are_sources_and_shards_to_train_from(
    hub: Hub, run: Callable[..., int], shards: Path, tmp_path: Path, kind: str
) -> None:
    hub.files[f"{kind}/me/images"] = {f"deep/{k}": v for k, v in hub.files[f"datasets/{IMAGENET}"].items()}
    hub.files[f"{kind}/me/shards"] = {f"deep/{name}": content for name, content in files(shards).items()}
    url = f"hf://{kind}/me/shards/deep"
    assert run("out", "--dataset", f"hf://{kind}/me/images/deep") == 0
    assert not hub.asked("validation|test-")
    assert run("again", "--dataset", url) == 0
    assert open_shards(tmp_path / "again").manifest.class_names == tuple(CLASS_NAMES)
    hub.requests.clear()
    local, remote = open_shards(shards), open_shards(url)
    room = 10**9
    here, there = Reader(local), Reader(remote, CacheOptions(tmp_path / "shards", room, room))
    assert all(bytes(here.read(i)) == bytes(there.read(i)) for i in range(len(local.index)))
    here.close()
    there.close()
    assert len(hub.asked(r"\.tar$")) == len(local.manifest.shards)  # each in one stream, without a range


def test_a_bucket_of_the_hub_takes_shards(
    hub: Hub, parquet: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the upload itself: the library's, by xet, which the stand-in does not speak."""
    bucket = hub.files["buckets/me/shards"] = {}

    def batch(_: Any, bucket_id: str, add: Sequence[tuple[Any, str]] = (), delete: Sequence[str] = ()) -> None:
        assert bucket_id == "me/shards"
        for content, name in add:
            bucket[name] = content if isinstance(content, bytes) else Path(content).read_bytes()
        for name in delete:
            del bucket[name]

    monkeypatch.setattr(huggingface_hub.HfApi, "batch_bucket_files", batch)
    url = "hf://buckets/me/shards/deep"
    build(SourceSpec(str(parquet)), Directory.at(url), Layout(4, 0.02, seed=3), Policy())
    assert {name.removeprefix("deep/"): content for name, content in bucket.items()} == files(shards)


def test_a_hub_that_fails_does_not_look_like_an_empty_one(hub: Hub) -> None:
    hub.files["buckets/me/shards"] = {"manifest.json": b"{}"}
    hub.faults = [("/api/buckets", 10**6, 503)]
    with pytest.raises(OSError, match="503 Service Unavailable"):
        open_shards("hf://buckets/me/shards")
