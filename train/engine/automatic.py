"""What is chosen for the user where the configuration says ``auto`` or 0, and what it is that all this runs on."""

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import xxhash

from train.config import Config
from train.processes.distributed import World

PROVENANCE = "provenance.jsonl"  # in a run's directory: a line for each start of the run
_LIBRARIES = (
    *("torch", "torchvision", "nvidia-dali-cuda120", "numba", "simplejpeg", "webdataset", "datasets", "pillow"),
    *("albumentations", "opencv-python-headless", "torchcodec"),
)
_PROC = Path("/proc")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def dtype(config: Config, world: World) -> torch.dtype:
    """The dtype of the batches: for bf16 and fp16 autocast's; parameters, losses and optimizer state are float32."""
    automatic = "bf16" if world.device.type == "cuda" else "fp32"
    return _DTYPES[automatic if config.run.precision == "auto" else config.run.precision]


def num_threads(configured: int) -> int:
    """The cores this process may use, shared with the other processes of its node."""
    return configured or max(1, len(os.sched_getaffinity(0)) // processes_on_node())


def processes_on_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@cache
def code_version() -> str:
    """A checksum of the source code that decides what a run computes."""
    root, digest = Path(__file__).parent.parent, xxhash.xxh3_64()
    for package in ("sharding", "pipeline", "train"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def commit() -> str | None:
    """The checkout's commit, with a mark if the tree is changed; None outside a git checkout."""
    return _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"])


def environment() -> dict[str, Any]:
    """Processor and its mean clock, cores this process may use, load, page cache, GPU, library versions, commit (marked
    where the tree is changed); None for what the machine does not tell."""
    clocks, cached = [float(clock) for clock in _told("cpuinfo", "cpu MHz")], _told("meminfo", "Cached")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": (_told("cpuinfo", "model name") or [platform.processor()])[0],
        "cpu_mhz": statistics.fmean(clocks) if clocks else None,
        "page_cache_bytes": 1024 * int(cached[0].removesuffix("kB")) if cached else None,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(command: Sequence[str]) -> str | None:
    """What a program prints, None where it is missing or fails: no git checkout, no GPU."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _told(file: str, what: str) -> list[str]:
    """The values of a file of Linux's /proc; none where there is no such file."""
    path = _PROC / file
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(what)]
