import os
from pathlib import Path

import pytest

from train.engine import automatic

_CPUINFO = "processor\t: {0}\nmodel name\t: A CPU: 2 cores\ncpu MHz\t\t: {1}\n\n"


def test_the_clock_and_the_page_cache_are_those_that_linux_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(_CPUINFO.format(0, 2000.5) + _CPUINFO.format(1, 3000.5))
    (tmp_path / "meminfo").write_text("MemFree:  1 kB\nCached:      4500 kB\nSwapCached:     7 kB\n")
    monkeypatch.setattr(automatic, "_PROC", tmp_path)
    found = automatic.environment()
    assert (found["cpu"], found["cpu_mhz"], found["page_cache_bytes"]) == ("A CPU: 2 cores", 2500.5, 4500 * 1024)
    monkeypatch.setattr(automatic, "_PROC", tmp_path / "nowhere")
    found = automatic.environment()
    assert found["cpu_mhz"] is found["page_cache_bytes"] is None


def test_the_machine_and_the_decoders_are_told() -> None:
    found = automatic.environment()
    if Path("/proc/meminfo").exists():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 0 < found["page_cache_bytes"] < total
    pytest.importorskip("torchcodec")
    assert "torchcodec" in found["libraries"]
