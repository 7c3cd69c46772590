"""Results with everything needed to judge them: machine, versions, commit."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Rate

_LIBRARIES = (
    *("torch", "torchvision", "nvidia-dali-cuda120", "numba", "simplejpeg", "webdataset", "datasets", "pillow"),
    *("kornia", "spdl", "ffcv"),
)


def environment() -> dict[str, Any]:
    """Processor, cores this process may use, GPU, library versions, commit (with a mark if the tree is changed)."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def save(path: Path, command: str, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": command, "environment": environment(), "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")


def show(title: str, unit: str, rates: Mapping[str, Rate], baseline: str) -> None:
    """Print rates with their spread, and each one's ratio to the baseline's."""
    table = Table("", f"{unit}: median (range)", f"x {baseline} (range)", title=title, title_justify="left")
    for name, rate in rates.items():
        table.add_row(name, str(rate), str(rate.ratio(rates[baseline])))
    Console().print(table)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, or None outside a git checkout."""
    root = Path(__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
