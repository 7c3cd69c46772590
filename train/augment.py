"""Which augmentations matter on these data: figure 5 of SimCLR (Chen et al., 2020), as a study of short runs.

    python -m train.augment --config configs/demo.yaml --study runs/augment optim.epochs=5

As in the paper one view stays as it is: here the middle of the image. The other view has a single augmentation (the
matrix's diagonal) or a pair. The paper's pairs have an order; here operations have one, so that the matrix is
symmetric.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np

from sharding.command import command
from train.config import load_config
from train.overrides import ConfigError
from train.processes import stop
from train.tune import Study, Values, read_study, study_parser

# SimCLR's own strengths, and BYOL's solarization; strengths that are not named are those of the configuration.
AUGMENTATIONS = {
    "crop": {"crop": "random"},
    "flip": {"flip": 0.5},
    "colour": {"jitter": 0.8},
    "grey": {"grey": 0.2},
    "blur": {"blur": 0.5},
    "solarize": {"solarize": 0.2},
}
_NONE = {"count": 1, "crop": "center", "flip": 0, "jitter": 0, "grey": 0, "blur": 0, "solarize": 0}
Matrix = list[list[float | None]]


@command("train.augment")
def main(arguments: Sequence[str] | None = None) -> int:
    made = study_parser("train.augment", str(__doc__), "linear", arguments)
    options = argparse.Namespace(**vars(made.parse_args(arguments)), prune_after=1)
    tried, settings = read_study(options, "augment", AUGMENTATIONS)
    views = cells(tried, settings)
    options.trials = len(views)
    import optuna  # read_study has said so if it is missing

    space = {"augmentations": optuna.distributions.CategoricalDistribution(list(views))}
    grid = optuna.samplers.GridSampler({"augmentations": list(views)}, seed=0)
    study = Study(options, settings, tried, space, lambda _: grid, lambda values: [views[values["augmentations"]]])
    finished = study.run()
    rows = matrix(list(tried), study.trials())
    draw(list(tried), rows, options.objective, options.study / "matrix.png")
    study.keep(matrix={"names": list(tried), "rows": rows})
    print(f"matrix: {options.study / 'matrix.png'}")
    return 0 if finished else stop.EXIT_CODE


def cells(tried: Values, settings: Sequence[str]) -> dict[str, str]:
    """By name the views of each single augmentation and pair, as an override. Raises `ConfigError` with that name."""
    group, made = load_config(None, settings).views[0], {}
    untouched = group.model_dump(mode="json") | _NONE | {"resize": group.size}
    for first, second in combinations_with_replacement(tried, 2):
        name = _name(first, second)
        try:
            if first != second and (both := ", ".join(tried[first].keys() & tried[second].keys())):
                raise ConfigError(f"both set {both}, so that they cannot be a pair")
            made[name] = f"views={json.dumps([untouched, untouched | tried[first] | tried[second]])}"
            load_config(None, [*settings, made[name]])
        except (ConfigError, AttributeError, TypeError) as error:
            raise ConfigError(f"augment: {name}: expected settings of a view such as {{flip: 0.5}}; {error}") from None
    return made


def matrix(names: Sequence[str], trials: Sequence[Values]) -> Matrix:
    """Accuracies, percent; None where a run is not complete."""
    values = {trial["augmentations"]: trial["value"] for trial in trials if trial["state"] == "complete"}
    return [[values.get(_name(*sorted((row, column), key=names.index))) for column in names] for row in names]


def _name(first: str, second: str) -> str:
    return first if first == second else f"{first} + {second}"


def draw(names: Sequence[str], rows: Matrix, objective: str, path: Path) -> None:
    """As in the paper, with the average of each row as a last column."""
    from matplotlib.figure import Figure

    table = np.ma.masked_invalid(np.array(rows, float))
    table = np.ma.column_stack([table, table.mean(axis=1)])
    figure = Figure(figsize=(2 + 0.8 * table.shape[1], 1.2 + 0.6 * len(table)), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(table, cmap="Blues", alpha=0.6), label=f"online {objective}, %")
    for (row, column), value in np.ndenumerate(table.filled(np.nan)):
        axes.text(column, row, "-" if np.isnan(value) else f"{value:.1f}", ha="center", va="center")
    axes.set_xticks(range(len(names) + 1), [*names, "average"])
    axes.set_yticks(range(len(names)), names)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
