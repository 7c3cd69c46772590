"""The curves of a run as a picture: ``python -m train.curves runs/x``."""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_PANELS = ("loss", "alignment", "gradient_norm", "learning_rate", "images_per_second", "data_wait_percent")
_SPEEDS = _PANELS[4:]


def draw_curves(run: Path) -> Path:
    """Draw ``metrics.jsonl`` of a run directory into its ``curves.png``; returns the picture's path."""
    from matplotlib.figure import Figure

    records = read_metrics(run)
    figure = Figure(figsize=(10, 9), layout="constrained")
    for axes, name in zip(figure.subplots(3, 2).flat, _PANELS, strict=True):
        points = [r for r in records if name in r]
        axes.plot([r["step"] for r in points], [r[name] for r in points])
        for step in (r["resumed_at"] for r in records if "resumed_at" in r):
            axes.axvline(step, color="grey", linestyle=":")
        axes.set(xlabel="step (dotted: resumed)", ylabel=name.replace("_", " "))
        if name in _SPEEDS:
            axes.set_ylim(0, speed_limit(records, name))
        axes.grid(alpha=0.3)
    path = run / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def speed_limit(records: Sequence[dict[str, float]], name: str) -> float:
    """The top of a speed's axis. Intervals after a start, which hold warming up, may leave the picture."""
    steady = [r[name] for r in records[1:] if "resumed_at" not in r]
    return 1.1 * max(steady or [r[name] for r in records], default=0) or 1.0


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The records of a run in step order; where a resumed run repeated steps, the later record counts.

    A line that a crash left half written is reported and passed over.
    """
    path, records = run / "metrics.jsonl", {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["step"]] = record
        except (ValueError, TypeError, KeyError):
            log.warning("%s, line %d: not a whole record; passed over", path, number)
    return [record for _, record in sorted(records.items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the curves of a run into curves.png.")
    parser.add_argument("run", type=Path)
    print(draw_curves(parser.parse_args().run))
