"""Results with everything needed to judge them: machine, versions, commit; as a table, JSON lines and a chart."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Rate

_WIDTH = 140  # characters, of tables in files


def save(path: Path, start: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines: the command with the `environment` that it was started in, then the records, in which a `Rate` is
    the list of its rounds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]])
    lines = [{"command": f"python -m benchmarks.{command}", "environment": start}, *records]
    path.write_text("".join(json.dumps(line, default=lambda rate: rate.rounds) + "\n" for line in lines))


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; all columns but the first are numbers."""
    table = Table(columns[0], title=title, title_justify="left")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = console.width if console.is_terminal else _WIDTH
    console.print(table)


def chart(path: Path, title: str, unit: str, bars: Mapping[str, Mapping[str, Rate]]) -> None:
    """A PNG of horizontal bars with their 95 % intervals: a group for each name, a bar for each series in it."""
    from matplotlib.figure import Figure

    series = list(dict.fromkeys(name for group in bars.values() for name in group))
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(bars) * len(series)), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(series):
        places = [i + 0.8 * number / len(series) for i, group in enumerate(bars.values()) if name in group]
        rates = [group[name] for group in bars.values() if name in group]
        margins = [rate.margin if len(rate.rounds) > 1 else 0 for rate in rates]
        axes.barh(places, [r.mean for r in rates], 0.8 / len(series), xerr=margins, label=name, align="edge")
    axes.set_yticks([i + 0.4 for i in range(len(bars))], list(bars))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=f"{unit} (bars: 95 % intervals)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"chart: {path}")
