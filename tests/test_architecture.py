"""What the design says of imports, held against the import statements."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "sharding": {"sharding"},
    "pipeline": {"sharding", "pipeline"},
    "train": {"sharding", "pipeline", "train"},
    "benchmarks": {"sharding", "pipeline", "train", "benchmarks"},
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    assert modules(package)
    for path in modules(package):
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in MAY_IMPORT or top in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


# Each folder of `train` may import those above it in this list, and itself; the commands import all of them. `engine`
# may import the settings of a run as well.
SETTINGS = ("config", "overrides")
FLOORS = ("losses", "processes", "optim", "model", "methods", "engine")


@pytest.mark.parametrize("folder", FLOORS)
def test_the_folders_of_train_stand_on_each_other(folder: str) -> None:
    below = FLOORS[: FLOORS.index(folder) + 1]
    for path in modules(f"train/{folder}"):
        for name in imports(path):
            parts = name.split(".")
            allowed = parts[0] != "train" or parts[1] in below or (folder == "engine" and parts[1] in SETTINGS)
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_only_four_files_talk_to_torch_distributed() -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in MAY_IMPORT
        for path in modules(package)
        if any(name.startswith("torch.distributed") for name in imports(path))
    }
    assert users == {f"train/processes/{name}.py" for name in ("distributed", "neighbours", "communication", "fsdp")}


def test_core_arithmetic_knows_no_devices() -> None:
    for name in (
        "pipeline/order.py",
        "pipeline/plan.py",
        "pipeline/random.py",
        "pipeline/views.py",
        "train/optim/schedule.py",
    ):
        assert not any(module.split(".")[0] == "torch" for module in imports(ROOT / name)), name
