"""A build that is stopped in any way ends, run again, with the bytes of one that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sharding import build as build_module
from sharding.build import main
from sharding.command import UserError
from sharding.manifest import ShardError, open_shards
from sharding.part import shard_name
from sharding.storage import STATE, Directory
from tests.census import wait_until
from tests.sharding.conftest import build_shards, encoded, files, jpeg, picture, write_parquet


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 images that take a while, six of them unusable, so that lanes must be levelled."""
    images = [encoded(picture(i, 500, 600)) for i in range(160)]
    for row in (5, 6, 7, 90, 91, 150):
        images[row] = images[row][:-2000]
    return write_parquet(tmp_path_factory.mktemp("resume"), images, [i % 3 for i in range(160)])


def command(source: Path, out: Path, workers: int = 1) -> list[str]:
    options = ["--lanes", "4", "--shard-mb", "0.06", "--max-quarantine", "0.1", "--workers", str(workers)]
    return ["--dataset", str(source), "--out", str(out), *options]


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    assert main(command(source, out)) == 0
    return files(out)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    def heed_ctrl_c() -> None:
        """Also where the tests run in the background of a shell, which has its children ignore it."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        [sys.executable, "-m", "sharding.build", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )


def wait_for_shards(out: Path, count: int) -> None:
    wait_until(lambda: len(list(out.glob("lane-*/*.tar"))) >= count)


def check_nothing_half_written(out: Path) -> None:
    for path in out.glob("lane-*/*.tar"):
        assert path.stat().st_size % 10240 == 0
        assert path.read_bytes()[-1024:] == bytes(1024)
    with pytest.raises(ShardError, match="unfinished"):
        open_shards(out)


def recorded_shards(out: Path) -> dict[Path, int]:
    """When each of the first two shards of the lanes was written, of those that have a record, and so are done.

    (Levelling may rewrite the last ones.)
    """
    parts = [tuple(map(int, p.stem.split("-"))) for p in (out / STATE / "parts").glob("[0-9]*-[01].arrow")]
    shards = [out / shard_name("train", lane, number) for lane, number in parts]
    return {p: p.stat().st_mtime_ns for p in shards}


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9(source: Path, expected: dict[str, bytes], tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    moments = random.Random(workers)
    for count in (1, 9):
        build = start(command(source, out, workers))
        wait_for_shards(out, count)
        time.sleep(moments.random() * 0.05)
        build.kill()
        build.communicate()
        check_nothing_half_written(out)
    finished = recorded_shards(out)
    assert len(finished) >= 4
    assert main(command(source, out, workers)) == 0
    assert files(out) == expected
    assert finished.items() <= {p: p.stat().st_mtime_ns for p in out.glob("lane-*/*.tar")}.items()


def test_workers_do_not_outlive_a_killed_build(source: Path, tmp_path: Path) -> None:
    build = start(command(source, tmp_path / "out", workers=2))
    wait_for_shards(tmp_path / "out", 1)
    build.kill()
    build.communicate()  # ends when the last process that holds the pipe has gone
    assert not processes_of_session(build.pid)


def processes_of_session(session: int) -> list[int]:
    alive = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4:3]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            alive.append(int(entry.name))
    return alive


def test_ctrl_c(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    build = start(command(source, out, workers=2))
    wait_for_shards(out, 1)
    os.killpg(build.pid, signal.SIGINT)
    _, message = build.communicate(timeout=300)
    assert build.returncode == 130
    assert "the same command continues" in message
    assert "Traceback" not in message
    assert main(command(source, out)) == 0
    assert files(out) == expected


@pytest.mark.parametrize("moment", [0, 7, 12, 14, 17, 20, 22, 23])
def test_stopped_while_lanes_are_levelled(
    source: Path, expected: dict[str, bytes], tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails at every publishing or moving of a file after the last planned shard, then goes on."""
    out = tmp_path / "out"
    left = [moment]

    def failing(self: Directory, *names: str) -> object:
        if "tail" in names[0] or names[0] in ("manifest.json", "index.arrow", "quarantine.jsonl"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError("pulled the plug")
        return original[len(names)](self, *names)

    original: dict[int, Callable[..., object]] = {1: Directory.publish, 2: Directory.rename}
    with monkeypatch.context() as patch:
        patch.setattr(Directory, "publish", failing)
        patch.setattr(Directory, "rename", failing)
        assert main(command(source, out)) == 2
    assert not (out / "manifest.json").exists()
    assert main(command(source, out)) == 0
    assert files(out) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 0.8 MB."""
    point = tmp_path / "disk"
    point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(point)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    return point


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(
    source: Path,
    expected: dict[str, bytes],
    small_disk: Path,
    workers: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        out = small_disk / "out"
        assert main(command(source, out, workers)) == 2
        assert "no space left on the disk; free some, then the same command continues" in capsys.readouterr().err
        check_nothing_half_written(out)
        assert list(out.glob("lane-*/*.tar"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
        assert main(command(source, out, workers)) == 0
        assert files(out) == expected
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)


IMAGES, LABELS = [jpeg(i) for i in range(20)] + [b""] * 5, [0, 1] * 12 + [0]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([jpeg(i) for i in range(30)], [0] * 30, "data whose number of rows is 25, now it is 30"),
        (IMAGES[::-1], LABELS, "data whose checksum of evenly spaced rows is [0-9a-f]{32}, now it is"),
        (IMAGES, [1 - label for label in LABELS], "data whose checksum of evenly spaced rows is"),
    ],
    ids=["rows", "order", "labels"],
)
def test_changed_data_are_noticed(tmp_path: Path, images: list[bytes], labels: list[int], message: str) -> None:
    out = tmp_path / "out"
    data = write_parquet(tmp_path / "data", IMAGES, LABELS)
    with pytest.raises(UserError, match="cannot be used"):
        build_shards(data, out)
    shutil.rmtree(data)
    write_parquet(data, images, labels)
    with pytest.raises(UserError, match=message):
        build_shards(data, out)


def test_two_builds_do_not_mix(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with Directory.at(out).lock():
        assert main(command(source, out)) == 2
    assert "another build is writing here" in capsys.readouterr().err
    assert not list(out.glob("lane-*"))


def test_a_killed_worker_is_named_and_nothing_hangs(source: Path, tmp_path: Path) -> None:
    build = start(command(source, tmp_path / "out", workers=2))
    wait_for_shards(tmp_path / "out", 1)
    workers = [p for p in processes_of_session(build.pid) if p != build.pid and is_worker(p)]
    os.kill(workers[0], signal.SIGKILL)
    _, message = build.communicate(timeout=300)
    assert build.returncode == 2
    assert "a worker process was killed" in message


def is_worker(process: int) -> bool:
    """A child of the fork server, which is itself a child of the build."""
    stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    parent = Path(f"/proc/{stat[1]}/cmdline").read_bytes()
    return b"forkserver" in parent


def test_a_finished_shard_that_was_damaged_meanwhile_is_made_again(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "finish", refuse)
        assert main(command(source, out)) == 2
    (out / "lane-00/train-000000.tar").write_bytes(b"cut short")
    (out / "lane-01/train-000000.tar").unlink()
    assert main(command(source, out)) == 0
    assert files(out) == expected


def refuse(*_: object, **__: object) -> None:
    raise OSError("pulled the plug")


@pytest.mark.parametrize("moment", range(0, 10, 3))
def test_shards_of_equal_size_are_not_taken_for_each_other(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while new last shards are moved over old ones that have the same size but other samples."""
    images = [padded(jpeg(row), 2000) for row in range(24)]
    images[3] = images[3][:-30]
    source = write_parquet(tmp_path / "source", images, [0] * 24)
    build_shards(source, tmp_path / "expected", lanes=3, max_quarantine=1)
    left = [moment]

    def failing(self: Directory, old: str, new: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("pulled the plug")
        rename(self, old, new)

    rename = Directory.rename
    with monkeypatch.context() as patch:
        patch.setattr(Directory, "rename", failing)
        try:
            build_shards(source, tmp_path / "out", lanes=3, max_quarantine=1)
        except OSError:
            assert (tmp_path / "out/.build/tail.json").exists()
    build_shards(source, tmp_path / "out", lanes=3, max_quarantine=1)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def padded(data: bytes, size: int) -> bytes:
    """The same picture in `size` bytes, by a comment segment."""
    length = size - len(data) - 2
    return data[:2] + b"\xff\xfe" + length.to_bytes(2, "big") + bytes(length - 2) + data[2:]
