"""What the documentation says, held against the code: names, commands, files, and a page that is run."""

import argparse
import importlib.util
import inspect
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch.distributed.run
import yaml

from sharding.demo import load_demo
from train.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
API = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
_COMMAND = re.compile(r"(?:(?:# )? {2,})((?:python -m|torchrun|make) .*)")


def commands(page: Path) -> list[list[str]]:
    """The words of all commands that stand on a line of code of their own, also in the comments of a recipe."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.sub(r"^```.*?^```", lambda block: re.sub("^", "    ", block[0], flags=re.M), text, flags=re.M | re.S)
    lines = [line for line in fenced.splitlines() if line.startswith(("    ", "#  "))]
    matches = [match for line in lines if (match := _COMMAND.fullmatch(line))]
    return [shlex.split(match[1], comments=True) for match in matches]


COMMANDS = [pytest.param(words, id=" ".join(words)) for page in [*PAGES, *RECIPES] for words in commands(page)]


def public_members(name: str) -> Iterator[tuple[str, Any]]:
    """The object of an API entry and, of a class, its own public functions and properties."""
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    yield name, found
    for key, member in vars(found).items() if inspect.isclass(found) else ():
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if inspect.isfunction(member) and not key.startswith("_"):
            yield f"{name}.{key}", member


@pytest.mark.parametrize("name", API)
def test_public_names_have_a_docstring(name: str) -> None:
    for member, found in public_members(name):
        text = found.__doc__ or ""
        if text.startswith(f"{name.rpartition('.')[2]}("):  # as dataclass and NamedTuple write it
            text = ""
        assert text, f"{member} is on docs/api.md and has no docstring"


class ParsedError(Exception):
    """Where a command would begin to work; carries its options."""


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace | None:
    """The options of a command, which is run as far as to its arguments; None if it has none."""
    if words[0] == "torchrun":
        options = torch.distributed.run.get_args_parser().parse_args(words[1:])
        assert options.module, "expected torchrun ... -m module"
        words = ["python", "-m", options.training_script, *options.training_script_args]
    original = argparse.ArgumentParser.parse_args

    def stop(*arguments: Any) -> None:
        raise ParsedError(original(*arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", ["command", *words[3:]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        try:
            runpy.run_module(words[2], run_name="__main__")
        except ParsedError as parsed:
            return parsed.args[0]
    assert not words[3:], f"{words[2]} takes no arguments"
    return None


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {words[1]}"
        return
    if words[2].startswith("tests."):  # rewritten by pytest, so not to be run as a program here
        assert importlib.util.find_spec(words[2])
        return
    options = parse(words, monkeypatch)
    if "train.pretrain" in words:
        assert options is not None
        load_config(options.config, options.overrides)


def test_files_for_many_machines_are_what_their_readers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bash, YAML, and a command that says which settings there are; SLURM, Kubernetes and SkyPilot are not here."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "many-machines.md").read_text()
    (slurm,), (job, task) = (re.findall(rf"^```{kind}\n(.*?)^```", page, re.M | re.S) for kind in ("bash", "yaml"))
    assert slurm.startswith("#!"), "sbatch refuses others"
    job, task = yaml.safe_load(job), yaml.safe_load(task)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    options = parse(replicas["Master"]["template"]["spec"]["containers"][0]["command"], monkeypatch)
    assert options is not None
    load_config(options.config, options.overrides)
    for script in (slurm, task["run"], task["setup"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_commands_are_found() -> None:
    found = [" ".join(param.values[0]) for param in COMMANDS]  # type: ignore[arg-type]
    assert "make demo" in found
    assert "python -m sharding.build --out /data/shards" in found
    assert any(" optim.epochs=200 method.temperature=0.2 " in command for command in found)  # continued on a line
    assert any("data.shards=s3://BUCKET/shards" in command for command in found)  # in a script within YAML
    assert any("--image-column img" in command for command in found)  # in the comments of a recipe


def test_files_exist() -> None:
    for page in PAGES:
        if page.name != "log.md":  # it tells of files that are gone
            for path in re.findall(
                r"`((?:sharding|pipeline|train|benchmarks|tests|configs)/[\w/.-]*)`", page.read_text()
            ):
                assert (ROOT / path).exists() or path.rpartition("/")[2] in ("mine.py", "test_mine.py"), (page, path)


def test_modules_of_commands_within_sentences_exist() -> None:
    for page in [*PAGES, *RECIPES]:
        for module in re.findall(r"python -m ([\w.]+)", page.read_text() if page.name != "log.md" else ""):
            assert importlib.util.find_spec(module), f"{page}: python -m {module}"


# The page's own numbers, and those that make the same commands small.
SMALLER = {
    "--lanes 4": "--lanes 4 --workers 1",
    "--views simclr": "--views simclr --images 1",
    "encoder.name=resnet18": "encoder.name=resnet18 encoder.width=8 method.hidden=32 views.size=32 data.num_threads=1",
    "global_batch_size=256": "global_batch_size=16",
    "optim.epochs=100": "optim.steps=2",
    "(1, 3, 224, 224)": "(1, 3, 32, 32)",
}


def code_of(page: Path) -> str:
    text = "\n".join(line[4:] for line in page.read_text().splitlines() if line.startswith("    ") or not line)
    for own, small in SMALLER.items():
        assert own in text, f"{page}: {own!r} is not there any more"
        text = text.replace(own, small)
    return text


def write_image_folder(folder: Path, num_images: int) -> None:
    data = load_demo("train", num_images=num_images).cast_column("image", datasets.Image(decode=False))
    for number, row in enumerate(data):
        path = folder / data.features["label"].names[row["label"]] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])


def run(command: str) -> None:
    """``python -m package.module arguments``, in this process."""
    _, _, name, *arguments = shlex.split(command)
    module = importlib.import_module(name if name != "train.evaluate" else "train.evaluate.__main__")
    assert module.main(arguments) == 0, command


def test_own_data_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_image_folder(tmp_path / "FOLDER", 48)
    code = code_of(ROOT / "docs" / "own-data.md")
    done = re.findall(r"^python -m .*", code, re.MULTILINE)
    for command in done:
        run(command)
    assert len(done) == 6
    for name in (
        "data/mine/manifest.json",
        "pictures/contact-sheet.png",
        "pictures/views.png",
        "runs/mine/report.html",
    ):
        assert Path(name).exists(), name
    names: dict[str, Any] = {}
    exec(code[code.index("import torch") :], names)
    assert names["h"].shape == (1, 8 * 8)
    assert [view.shape for view in names["batch"].views] == 2 * [(16, 3, 224, 224)]
