"""Joules, where the machine tells them: of processors by RAPL (Linux's powercap), of GPUs by NVML.

Counters are those of whole packages and GPUs: what else the machine does is in them.
"""

from pathlib import Path

import torch

NOT_TOLD = "energy: not told by this machine (no counters of RAPL that this user may read, none of NVML)"
_POWERCAP = Path("/sys/class/powercap")
_NEVER = float("inf")  # where a counter begins again at 0


class Meter:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._start = {**_packages(), **_gpus()}

    def joules(self) -> float | None:
        """Spent so far; None where no counter can be read. A counter may have begun again at 0 once."""
        now = {**_packages(), **_gpus()}
        spent = [(now[name][0] - joules) % limit for name, (joules, limit) in self._start.items() if name in now]
        return sum(spent) if spent else None


def _packages() -> dict[str, tuple[float, float]]:
    """Joules, and those at which the counter begins again, by name."""
    found = {}
    for zone in _POWERCAP.glob("intel-rapl:*"):  # AMD's too
        try:
            if (zone / "name").read_text().startswith("package"):  # the others are parts of it
                joules, limit = (int((zone / f).read_text()) / 1e6 for f in ("energy_uj", "max_energy_range_uj"))
                found[zone.name] = joules, limit
        except OSError:  # for root only
            continue
    return found


def _gpus() -> dict[str, tuple[float, float]]:
    if not torch.cuda.is_available():
        return {}
    try:
        import pynvml

        pynvml.nvmlInit()
        uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
        spent = pynvml.nvmlDeviceGetTotalEnergyConsumption  # thousandths; of GPUs since Volta
        return {uuid: (spent(pynvml.nvmlDeviceGetHandleByUUID(uuid)) / 1000, _NEVER) for uuid in uuids}
    except ImportError:
        return {}
    except pynvml.NVMLError:  # as of a part of a GPU
        return {}
