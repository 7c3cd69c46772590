"""Where images come from: any Hugging Face data set as rows of (encoded bytes, label), in any order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

IMAGENET = "ILSVRC/imagenet-1k"
DEMO = "demo"


class SourceError(ValueError):
    """The source cannot be opened or does not hold what is needed; the message says what to do."""


@dataclass(frozen=True)
class SourceSpec:
    """What the user asked for. Recorded in the manifest."""

    dataset: str = IMAGENET  # hub id, local folder, or "demo"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str | None = None  # None: the only image column
    label_column: str | None = None  # None: the only class label column, if any


@dataclass(frozen=True)
class Source:
    """Rows by number. Pickles small: a data set on disk travels as its path."""

    dataset: Dataset  # only the image and label columns, in Arrow format
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded bytes, untouched, and label (-1: none) of one row. OSError for an unreadable file."""
        columns = self.dataset[row].columns
        label = columns[1][0].as_py() if len(columns) > 1 else None
        return _encoded(columns[0][0]), -1 if label is None else int(label)

    def mean_bytes(self, num_probes: int = 1024) -> float:
        """Mean encoded size of evenly spaced rows."""
        rows = range(0, len(self), max(1, len(self) // num_probes))
        return sum(len(self.read(row)[0]) for row in rows) / len(rows)


def open_source(spec: SourceSpec) -> Source:
    """
    Raises:
        SourceError: not found, no access, no network, or no usable image column.
    """
    dataset = _load(spec)
    image, label = _columns(dataset.features, spec)
    from datasets import ClassLabel, Image

    feature = dataset.features[label] if label else None
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    dataset = dataset.select_columns([image, *([label] if label else [])])
    if isinstance(dataset.features[image], Image):
        dataset = dataset.cast_column(image, Image(decode=False))
    return Source(dataset.with_format("arrow"), names)


def _load(spec: SourceSpec) -> Dataset:
    if spec.dataset == DEMO:
        from sharding.demo import load_demo

        return load_demo(spec.split)
    import datasets

    local = Path(spec.dataset).is_dir()
    if not local:
        _work_offline_if_unreachable(spec)
    try:
        return datasets.load_dataset(spec.dataset, spec.config, split=spec.split, revision=spec.revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise SourceError(_no_access(spec.dataset, str(error))) from None
    except ValueError as error:  # unknown split or configuration: the library lists what there is
        raise SourceError(f"{spec.dataset}: {error}") from None
    except (OSError, RuntimeError) as error:
        if local:
            raise SourceError(f"{spec.dataset}: {error}") from None
        raise SourceError(_no_access(spec.dataset, str(error))) from None


def _work_offline_if_unreachable(spec: SourceSpec) -> None:
    """One short request tells whether the hub answers; loading would retry for half a minute."""
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(spec.dataset, revision=spec.revision, timeout=10)
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError):
        return  # it answers (no such data set, no access): loading it says so
    except Exception:  # no connection, in the words of whichever HTTP client the hub library uses
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def _no_access(dataset: str, error: str) -> str:
    reason = error.strip().splitlines()[0] if error.strip() else "no reason given"
    steps = [
        f"cannot open the data set '{dataset}': {reason}",
        "There is no such local folder, and the Hugging Face hub did not give it. To get it from there:",
        "  1. be online, and log in with `hf auth login`;",
        f"  2. accept the terms on https://huggingface.co/datasets/{dataset} if it is gated.",
        "Or choose other data: `--dataset FOLDER` (parquet as on the hub, or ImageFolder), "
        "`--dataset HUB_ID`, or `--dataset demo`, which is generated here.",
    ]
    return "\n".join(steps)


def _columns(features: dict[str, Any], spec: SourceSpec) -> tuple[str, str | None]:
    from datasets import ClassLabel, Image

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    image = _choose(spec.image_column, images, list(features), "image", spec.dataset)
    label = _choose(spec.label_column, labels, list(features), "label", spec.dataset)
    if image is None:
        raise SourceError(f"{spec.dataset}: no image column in {list(features)}; name it with --image-column")
    return image, label


def _choose(asked: str | None, found: list[str], columns: list[str], kind: str, dataset: str) -> str | None:
    if asked is not None:
        if asked not in columns:
            raise SourceError(f"{dataset}: --{kind}-column {asked!r} is not a column; there are {columns}")
        return asked
    if len(found) > 1:
        raise SourceError(f"{dataset}: several {kind} columns, {found}; choose one with --{kind}-column")
    return found[0] if found else None


def _encoded(scalar: Any) -> bytes:
    """Bytes of an image cell: a {bytes, path} struct as the hub stores it, or plain binary."""
    value = scalar.as_py()
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        value = data if data is not None else Path(path).read_bytes() if path else b""
    return value or b""
