"""The curves of a run as a picture: ``python -m train.curves runs/x``."""

import argparse
import json
from pathlib import Path

_PANELS = ("loss", "learning_rate", "images_per_second", "data_wait_percent")


def draw_curves(run: Path) -> Path:
    """Draw ``metrics.jsonl`` of a run directory into its ``curves.png``; returns the picture's path."""
    from matplotlib.figure import Figure

    records = read_metrics(run)
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        axes.plot([r["step"] for r in records], [r[name] for r in records])
        axes.set(xlabel="step", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
    path = run / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The records of a run in step order; where a resumed run repeated steps, the later record counts."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for _, record in sorted({r["step"]: r for r in records}.items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the curves of a run into curves.png.")
    parser.add_argument("run", type=Path)
    print(draw_curves(parser.parse_args().run))
