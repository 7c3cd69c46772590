"""Which rows of a source are taken: those of some classes, of a published list of files, so many of each class."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharding.plan import shuffled_rows
from sharding.source import Source, SourceError, SourceSpec, file_key


def is_part(spec: SourceSpec) -> bool:
    """Whether some of the rows are left out."""
    return bool(spec.classes or spec.subset or spec.per_class or spec.fraction)


def select(source: Source, spec: SourceSpec, seed: int) -> Source:
    """The rows for which ``spec`` asks, in the order of the source; ``classes`` also numbers the labels anew.

    With the same seed a smaller ``per_class`` or ``fraction`` takes a part of what a larger one takes.
    """
    if not is_part(spec):
        return source
    labels, keys = source.labels(), source.file_keys()
    kept = np.ones(len(source), bool)
    if spec.subset:
        kept &= _listed(f"--subset {spec.subset}", Path(spec.subset), [(key,) for key in keys], file_key)
    if spec.classes:  # by name, or by the WordNet id with which the names of ILSVRC's files begin
        names = [(_wordnet_id(source.class_name(n)), k.split("_")[0]) for n, k in zip(labels, keys, strict=True)]
        kept &= _listed(f"--classes {spec.classes}", Path(spec.classes), names, _wordnet_id)
    if spec.per_class or spec.fraction:
        kept = _balanced(source, labels, kept, spec, seed)
    classes = np.unique(labels[kept & (labels >= 0)]).tolist()
    source = replace(source, dataset=source.dataset.select(np.flatnonzero(kept)))
    if not spec.classes:
        return source
    names_kept = tuple(map(source.class_name, classes))
    return replace(source, class_names=names_kept, new_labels={label: new for new, label in enumerate(classes)})


def _balanced(
    source: Source, labels: NDArray[np.int64], kept: NDArray[np.bool_], spec: SourceSpec, seed: int
) -> NDArray[np.bool_]:
    """Of the kept rows of each class the first of a shuffle."""
    if (labels[kept] < 0).any():
        raise SourceError(f"{spec.dataset}: --per-class and --fraction need a label for every image")
    rows = shuffled_rows(len(source), seed)
    rows = rows[kept[rows]]
    rows = rows[np.argsort(labels[rows], kind="stable")]  # class by class
    balanced = np.zeros_like(kept)
    for label, first, size in zip(*np.unique(labels[rows], return_index=True, return_counts=True), strict=True):
        count = spec.per_class or max(1, round(size * (spec.fraction or 0)))
        if count > size:
            raise SourceError(f"--per-class {count}: class {source.class_name(label)!r} has {size} images")
        balanced[rows[first : first + count]] = True
    return balanced


def _listed(option: str, path: Path, names: Sequence[tuple[str, ...]], key: Callable[[str], str]) -> NDArray[np.bool_]:
    """Which rows have one of their names in a file that has one a line. Each line must have a row."""
    wanted = {key(line.strip()) for line in path.read_text().splitlines() if line.strip()}
    if missing := wanted.difference(*names):
        found = next((name for row in names for name in row if name), "none")
        raise SourceError(
            f"{option}: expected the names of images or classes in the data (such as {found!r}), "
            f"found {len(missing)} that are not, such as {min(missing)!r}"
        )
    return np.array([not wanted.isdisjoint(row) for row in names])


def _wordnet_id(name: str) -> str:
    """The id in front of a class name, if it has one, else the name."""
    found = re.match(r"n\d{8}\b", name)
    return found[0] if found else name
