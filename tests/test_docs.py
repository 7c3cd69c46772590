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

from sharding.command import Parser
from sharding.demo import load_demo
from train.config import load_config
from train.evaluate.__main__ import choose_protocols

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


def demo_commands() -> list[list[str]]:
    """The words of what `make demo` runs."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    lines = re.findall(r"^demo: \$\(INSTALLED\)\n((?:\t.*\n)+)", text, re.MULTILINE)[0].splitlines()
    return [shlex.split(line.removeprefix("\t$(BIN)/")) for line in lines if "$(BIN)" in line]


WORDS = [*(words for page in [*PAGES, *RECIPES] for words in commands(page)), *demo_commands()]
COMMANDS = [pytest.param(words, id=" ".join(words)) for words in WORDS]


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
        assert isinstance(arguments[0], Parser), "all commands say what is wrong with their arguments alike"
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
    given = [*getattr(options, "overrides", ()), *getattr(options, "settings", ())]
    if "train.evaluate" in words:
        assert options is not None
        _, given = choose_protocols([*options.protocol, *given])
    for config in configs_of(words, options) if given or "train.pretrain" in words else ():
        load_config(config, given)


def configs_of(words: list[str], options: Any) -> list[Path | None]:
    """Files that a command reads; none of those that are the reader's own."""
    if "benchmarks.methods" in words:
        return [Path(f"configs/demo-{method}.yaml") for method in options.methods]
    config: Path | None = getattr(options, "config", None)
    return [config if config and config.exists() else None]


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
    found = [" ".join(words) for words in WORDS]
    assert "make demo" in found
    assert "python -m sharding.build --dataset demo --split train test --out data/demo" in found  # in the Makefile
    assert "python -m sharding.build --out /data/shards" in found
    assert any(" optim.epochs=200 method.temperature=0.2 " in command for command in found)  # continued on a line
    assert any("data.shards=s3://BUCKET/shards" in command for command in found)  # in a script within YAML
    assert any("--image-column img" in command for command in found)  # in the comments of a recipe


def test_what_is_shown_of_byol_is_the_code() -> None:
    files = [ROOT / "train" / "methods" / f"{name}.py" for name in ("__init__", "networks", "byol")]
    code = {line.strip() for file in files for line in file.read_text().splitlines()}
    page = (ROOT / "docs" / "add-a-method.md").read_text().splitlines()
    shown = [line.strip() for line in page if line.startswith("    ") and "python -m" not in line]
    assert len(shown) > 25
    assert set(shown) - code == {"..."}


def test_files_exist() -> None:
    for page in PAGES:
        if page.name != "log.md":  # it tells of files that are gone
            for path in re.findall(
                r"`((?:sharding|pipeline|train|benchmarks|tests|configs)/[\w/.-]*)`", page.read_text()
            ):
                assert (ROOT / path).exists() or path.rpartition("/")[2] in ("mine.py", "test_mine.py"), (page, path)


def test_the_layout_names_every_file() -> None:
    """But for those that it tells of by their folder, and the twins for GPUs."""
    layout = (ROOT / "docs/design.md").read_text().split("\n## Layout\n")[1].split("\n## ")[0]
    folders, names = {"sharding", "dali", "evaluate", "losses", "methods", "peers"}, set(re.findall(r"\w+", layout))
    for package in ("sharding", "pipeline", "train", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            known = path.stem.removesuffix("_gpu") in names or path.stem.startswith("__")
            assert known or path.parent.name in folders, f"docs/design.md: Layout lacks {path.relative_to(ROOT)}"


def test_the_first_page_leads_to_every_other() -> None:
    linked = set(re.findall(r"\((\S+\.md)\)", (ROOT / "docs/index.md").read_text()))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


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


def write_image_folder(folder: Path, num_images: int, split: str = "train") -> None:
    data = load_demo(split, num_images=num_images).cast_column("image", datasets.Image(decode=False))
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
