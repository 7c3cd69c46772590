from pathlib import Path

import pytest

from benchmarks import energy
from benchmarks.measure import rate_of


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As Linux shows a processor of two packages, one of which has a part with a counter of its own."""
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    for zone, name in {"0": "package-0", "0:0": "core", "1": "package-1"}.items():
        (tmp_path / f"intel-rapl:{zone}").mkdir()
        (tmp_path / f"intel-rapl:{zone}" / "name").write_text(f"{name}\n")
        (tmp_path / f"intel-rapl:{zone}" / "max_energy_range_uj").write_text("1000000000\n")
        (tmp_path / f"intel-rapl:{zone}" / "energy_uj").write_text("990000000\n")
    return tmp_path


def spend(powercap: Path, zone: str, joules: int) -> None:
    counter = powercap / f"intel-rapl:{zone}" / "energy_uj"
    counter.write_text(f"{(int(counter.read_text()) + joules * 10**6) % 10**9}\n")


def test_joules_are_those_of_all_packages_also_where_a_counter_begins_again(powercap: Path) -> None:
    meter = energy.Meter()
    for zone, joules in {"0": 25, "0:0": 20, "1": 5}.items():
        spend(powercap, zone, joules)
    assert meter.joules() == pytest.approx(30)


def test_a_turn_tells_the_joules_of_1000_images(powercap: Path) -> None:
    def work() -> int:
        spend(powercap, "1", 3)
        return 10

    assert rate_of(work, seconds=0.0, warmup=1)["joules_per_1000_images"] == pytest.approx(300)


def test_a_machine_that_does_not_tell_has_no_joules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "_gpus", dict)
    assert energy.Meter().joules() is None
    assert "joules_per_1000_images" not in rate_of(lambda: 1, seconds=0.0, warmup=0)
