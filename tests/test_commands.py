"""Every command of README and docs/ is run as it stands there, but on small data, for few steps, by narrow networks."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import pyarrow.parquet
import pytest

from sharding.source import IMAGENET
from tests.hub import HUB
from tests.processes import NO_GPU
from tests.test_docs import PAGES, ROOT, commands, demo_commands, write_image_folder

# Commands that are not run here, by how they begin, and why.
LEFT_OUT = {
    "make test": "is what runs this",
    "make lint": "is a part of make test",
    "make demo": "its commands are run here, and the target itself in tests/test_demo.py",
    "python -m sharding.build --dataset demo": "it draws 5000 images; tests/sharding/test_demo.py draws some",
    "python -m tests.train.test_golden": "it writes the files that the tests compare with",
    "python -m tests.throttled_link": "it takes network namespaces, so root",
    "python -m train.tune --config study.yaml --study /scratch/study --storage postgresql": "no server is here",
    "python -m train.export --checkpoint runs/x --out exported --push-to-hub": "tests/train/test_export.py runs it",
}
DOCUMENTED = {" ".join(words): words for page in PAGES for words in commands(page)}
DOCUMENTED |= {" ".join(words): words for words in demo_commands()}
RUN = {text: words for text, words in DOCUMENTED.items() if not text.startswith(tuple(LEFT_OUT))}

# What stands for the reader's own names, in this order.
NAMES = {
    "/data/shards": "shards",
    "/shared/": "shared/",
    "/tmp/": "tmp/",
    "FOLDER_OR_HUB_ID": "FOLDER",
    "HUB_ID": "someone/pictures",
    "BUCKET": "ready",
    "FOLDER --split train validation --labels FILE": "ARCHIVES --split train validation --labels ARCHIVES/labels.txt",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "--nproc_per_node=$(NUM_PROCESSES)": "--nproc_per_node=2",
    "configs/demo.yaml --study": "augment.yaml --study",
    "trials 40": "trials 1",
    "4711": "1",
}
_NARROW = "encoder.name=resnet18 encoder.width=8 views.size=32 views.kernel=5 run.global_batch_size=16"
_SHORT = f"{_NARROW} optim.steps=2 run.log_every=1 data.num_threads=1 data.shards=DIR"
_QUICK = f"{_NARROW} data.num_threads=1 --rounds 1 --seconds 0.02"
# What makes a command small, by its module: settings take the place of those that are there, options are added.
SMALLER = {
    "sharding.build": "--lanes 2 --workers 1 --cache cache",
    "sharding.verify": "--workers 1",
    "pipeline.preview": "--images 1",
    "train.pretrain": _SHORT,
    "train.verify": f"{_SHORT} --images 8",
    "train.tune": _SHORT,
    "train.augment": _SHORT,
    "train.report": "--images 1",
    "benchmarks.throughput": f"{_QUICK} --threads 1",
    "benchmarks.doctor": _QUICK,
    "benchmarks.scaling": _QUICK,
    "benchmarks.parity": "--images 2",
    "benchmarks.methods": "encoder.width=8 run.global_batch_size=16 optim.steps=2 run.log_every=1 data.num_threads=1",
    "benchmarks.batch_size": "encoder.width=8 --batches 64 --rates 0.001 --target 1 --images 2560",
}
# And for some of them more, by what stands in them.
MORE = {
    "method.name=distill": "method.teacher={name: resnet18, width: 8}",
    "python -m benchmarks.methods$": "--methods simclr",
    "python -m benchmarks.throughput(?! --shards)": "--backends cpu --peers decode-only",
    "python -m benchmarks.scaling run.global_batch_size": "--world-sizes 1",
    "knn.preset=lightly": "knn.k=20",
    "protocol finetune": "finetune.epochs=1 finetune.batch_size=16",
    "protocol linear-augmented": "linear-augmented.epochs=1 linear-augmented.batch_size=16",
}
_SETTING = re.compile(r"[a-z][a-z_-]*(\.\w+)+=")


def small(text: str) -> list[str]:
    """The words of a documented command with names that exist here and everything small."""
    added = [more for pattern, more in MORE.items() if re.search(pattern, text)]
    for name, own in NAMES.items():
        text = text.replace(name, own)
    words = text.split()
    module = words[words.index("-m") + 1]
    head, words = words[: words.index(module) + 1], words[words.index(module) + 1 :]
    settings: dict[str, str] = {}
    options: list[str] = []
    more = " ".join([SMALLER.get(module, ""), *added])
    for word in [*words, *re.split(r" (?![^{]*})", more)]:
        if match := _SETTING.match(word):
            settings[match[0]] = word
        else:
            options.append(word)
    if "optim.steps=" in settings:
        settings.pop("optim.epochs=", None)
    if options.count("--lanes") > 1:  # the page's stay
        added_last = len(options) - 1 - options[::-1].index("--lanes")
        del options[added_last : added_last + 2]
    return [*head, *settings.values(), *filter(None, options)]


@pytest.fixture(scope="module")
def place(program: str, s3: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """A folder with what the commands name: images, archives, shards, runs, a study."""
    folder = tmp_path_factory.mktemp("place")
    write_image_folder(folder / "FOLDER", 160)
    write_image_folder(folder / "PICTURES", 40, "test")
    write_imagenet(folder)
    shutil.copytree(ROOT / "configs", folder / "configs")
    page = (ROOT / "docs" / "tuning.md").read_text()
    search, augment = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (folder / "study.yaml").write_text(search)
    demo = (folder / "configs" / "demo.yaml").read_text()
    (folder / "augment.yaml").write_text(demo + augment.partition("  weak colour")[0])
    (folder / "benchmarks" / "results").mkdir(parents=True)
    for bucket in ("bucket", "ready"):
        fsspec.filesystem("s3").mkdir(bucket)
    for source, out in (("FOLDER", "DIR"), ("FOLDER", "s3://ready/shards"), ("PICTURES", "TEST")):
        build = f"python -m sharding.build {SMALLER['sharding.build']} --dataset {source} --out {out}"
        end(start(build.split(), folder, program))
    end(start(f"python -m train.pretrain {_SHORT} run.dir=runs/x".split(), folder, program))
    splits = [f"{data}/{split}" for data in ("data/demo", "cars", "pets") for split in ("train", "test")]
    for link in ("data/mine", "data/val", "data/1percent", "shards", *splits):
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        shards = folder / ("TEST" if link.endswith(("test", "val")) else "DIR")
        (folder / link).symlink_to(os.path.relpath(shards, (folder / link).parent))
    for run in ("mine", "other", "demo", "imagenet-mocov2", "study/trial-0003", "study/trial-0007"):
        shutil.copytree(folder / "runs" / "x", folder / "runs" / run)
    return folder


def write_imagenet(folder: Path) -> None:
    """In the layouts in which people have it, and on the hub; a list of some of its images."""
    jpegs = [path.read_bytes() for path in sorted(folder.glob("FOLDER/*/*.jpg"))[:36]]
    names = [f"n0144{4 + i % 3}_{i}.JPEG" for i in range(36)]
    (folder / "1percent.txt").write_text("\n".join(names[4:8]))
    table = pyarrow.table(
        {
            "image": [{"bytes": data, "path": name} for data, name in zip(jpegs, names, strict=True)],
            "label": [i % 3 for i in range(36)],
        }
    )
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    files = {f"data/{split}-00000-of-00001.parquet": file.getvalue() for split in ("train", "validation")}
    HUB.files = {f"datasets/{name}": {"README.md": CARD.encode(), **files} for name in (IMAGENET, "someone/pictures")}
    for split in ("train", "val"):
        for name, data in zip(names, jpegs, strict=True):
            path = folder / "EXTRACTED" / split / name.partition("_")[0] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (folder / "ARCHIVES").mkdir()
    with tarfile.open(folder / "ARCHIVES" / "ILSVRC2012_img_train.tar", "w") as archive:
        for wnid in (folder / "EXTRACTED" / "train").iterdir():
            with tarfile.open(folder / f"{wnid.name}.tar", "w") as of_class:
                for image in wnid.iterdir():
                    of_class.add(image, image.name)
            archive.add(folder / f"{wnid.name}.tar", f"{wnid.name}.tar")
    with tarfile.open(folder / "ARCHIVES" / "ILSVRC2012_img_val.tar", "w") as archive:
        for number, image in enumerate(sorted(folder.glob("EXTRACTED/val/*/*")), 1):
            archive.add(image, f"ILSVRC2012_val_{number:08d}.JPEG")
    (folder / "ARCHIVES" / "labels.txt").write_text("".join(f"n0144{4 + i % 3}\n" for i in range(36)))


CARD = """---
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': n01444, '1': n01445, '2': n01446}}}}
  splits: [{name: train, num_examples: 36, num_bytes: 100000}, {name: validation, num_examples: 36, num_bytes: 100000}]
configs:
- config_name: default
  data_files: [{split: train, path: data/train-*}, {split: validation, path: data/validation-*}]
---
"""


@pytest.fixture
def copied(place: Path) -> Iterator[Path]:
    """Each command has the folder for itself."""
    with TemporaryDirectory() as directory:
        yield Path(shutil.copytree(place, Path(directory) / "place", symlinks=True))


def start(words: list[str], directory: Path, program: str) -> "subprocess.Popen[str]":
    launcher = [] if words[0] == "python" else ["-m", "torch.distributed.run"]
    environment = {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.Popen(
        [program, *launcher, *words[1:]],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: "subprocess.Popen[str]") -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@pytest.mark.parametrize("text", RUN, ids=list(RUN))
def test_the_command_runs(text: str, copied: Path, program: str) -> None:
    words = small(text)
    written = [Path(word) for option, word in pairwise(words) if option in ("--out", "--apply")]
    written += [Path(word.partition("=")[2]) for word in words if word.startswith("run.dir=")]
    for path in written:
        remove(copied / path)
    if "--watch" in words:
        process = start([*words, "--watch", "0"], copied, program)
        assert process.stdout
        assert "Ctrl-C ends it" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        return
    if "--nnodes=2" in words:  # two machines are two torchruns
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = [word.replace("HOST:29500", f"127.0.0.1:{port}") for word in words]
        other = start(words, copied, program)
        end(start(words, copied, program))
        end(other)
    else:
        end(start(words, copied, program))
    for path in written:
        assert "s3:" in str(path) or (copied / path).exists(), path


def test_what_is_left_out_is_there() -> None:
    for text in LEFT_OUT:
        assert any(command.startswith(text) for command in DOCUMENTED), text
    assert len(RUN) > 60
