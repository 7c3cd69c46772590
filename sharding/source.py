"""Where images come from: any Hugging Face data set as rows of (encoded bytes, label), in any order."""

import contextlib
import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from sharding.archive import ARCHIVES, find_archive, list_archive
from sharding.command import UserError
from sharding.demo import load_demo
from sharding.hub import download, files_of, load_from_hub, sample
from sharding.manifest import MANIFEST_FILE, Manifest
from sharding.storage import Directory

if TYPE_CHECKING:
    from datasets import Dataset

IMAGENET = "ILSVRC/imagenet-1k"
DEMO = "demo"
_LABEL_NAMES = ("label", "labels", "cls")  # of columns that hold labels, where no class label column exists
_KEY = "__key__"  # column of an archive's member names
_WNID = re.compile(r"(?:.*/)?(n\d{8})_\d+")  # ILSVRC's member names: the class and a number
_ILSVRC_FILE = re.compile(r"n\d{8}_\d+|ILSVRC2012_(?:val|test)_\d+")
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}  # by suffix; others: imagefolder


class SourceError(UserError):
    """The source cannot be opened or does not hold what is needed; the message says what to do."""


@dataclass(frozen=True)
class SourceSpec:
    """What the user asked for. Recorded in the manifest."""

    dataset: str = IMAGENET  # hub id, local folder, fsspec URL of a folder, or "demo"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str | None = None  # None: the only image column
    label_column: str | None = None  # None: the only class label column, if any
    labels: str | None = None  # file of (image file, class)
    classes: str | None = None  # file of class names
    subset: str | None = None  # file of names of image files
    per_class: int | None = None  # images
    fraction: float | None = None  # of each class


@dataclass(frozen=True)
class Source:
    """Rows by number. Pickles small: a data set on disk travels as its path."""

    dataset: "Dataset"  # only the image and label columns, in Arrow format
    class_names: tuple[str, ...] = ()  # by label; in alphabetical order where labels are strings
    revision: str | None = None  # commit on the hub
    no_labels: str = ""  # why there are none
    classes_by_file: dict[str, str] | None = None  # by file key; before label column and file name; None: not asked
    new_labels: dict[int, int] = field(default_factory=dict)  # by integer label, where some classes were left out

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded bytes, untouched, and label (-1: none) of one row.

        Raises OSError for an unreadable file, and SourceError for a label that cannot be one.
        """
        columns = [column[0].as_py() for column in self.dataset[row].columns]
        label = columns[1] if len(columns) > 1 else None
        if self.classes_by_file is not None:
            label = self._class_of(file_key(columns[0]["path"]), label)
        return _encoded(columns[0]), self._label(label, row)

    def labels(self) -> NDArray[np.int64]:
        """Of all rows."""
        column = self.dataset.column_names[1:]
        values: list[Any] = [None] * len(self)
        if column:
            values = self.dataset.select_columns(column)[:].column(0).to_pylist()
        if self.classes_by_file is not None:
            values = list(map(self._class_of, self.file_keys(), values))
        return np.array([self._label(value, row) for row, value in enumerate(values)])

    def file_keys(self) -> list[str]:
        """What tells the files of all rows apart (see `file_key`); "" for images without a file name."""
        flat, column = self.dataset.flatten(), f"{self.dataset.column_names[0]}.path"
        if column not in flat.column_names:
            return [""] * len(self)
        return [file_key(path or "") for path in flat.select_columns(column)[:].column(0).to_pylist()]

    def class_name(self, label: int) -> str:
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)

    def _class_of(self, key: str, value: str | None) -> str:
        found = (self.classes_by_file or {}).get(key, value) or wordnet_id(key)
        if not found:
            raise SourceError(f"--labels: has no class for the image {key!r}, and neither has its name")
        return found

    def _label(self, value: int | str | None, row: int) -> int:
        if value is None:
            return -1
        if isinstance(value, str):
            return bisect_left(self.class_names, _class_name(value))
        label = self.new_labels.get(value, value)
        if not -1 <= label < 2**31:
            column = self.dataset.column_names[1]
            raise SourceError(f"row {row}: column {column!r} holds {label}; labels go from 0 to 2**31 - 1, -1 is none")
        return label

    def probe(self, num_probes: int = 1024) -> tuple[float, str]:
        """Mean encoded size of evenly spaced rows, and the xxh3_128 of the class names, these rows and their labels."""
        rows = range(0, len(self), max(1, len(self) // num_probes))
        hashed = xxhash.xxh3_128(json.dumps(self.class_names).encode())
        num_bytes = 0
        for data, label in map(self.read, rows):
            num_bytes += len(data)
            hashed.update(b"%d %d " % (label, len(data)) + data)
        return num_bytes / len(rows), hashed.hexdigest()


def open_source(spec: SourceSpec, cache: Path | None = None) -> Source:
    """Open a data set for random access, downloading or converting it first where that is needed.

    ``cache`` is where the Hugging Face libraries keep what they download or convert (None: where they always do).
    """
    import huggingface_hub

    if not Path(spec.dataset).exists() and spec.dataset.startswith(("/", ".")):
        raise SourceError(f"{spec.dataset}: no such folder; --dataset says where the data set is")
    if cache:  # the library's cache_dir is for what it converts, and not for what it downloads from the hub
        huggingface_hub.constants.HF_HUB_CACHE = str(cache)
    with _errors_of(spec.dataset):
        names, dataset = _load(spec, {"split": spec.split, "cache_dir": str(cache) if cache else None})
    files = dataset.cache_files if is_hub_id(spec.dataset) else []
    return _source(dataset, spec, names, Path(files[0]["filename"]).parent.name if files else None)


def peek_source(spec: SourceSpec, cache: Path | None = None) -> tuple[Source, int]:
    """The first rows of a data set of the hub, and about how many there are in all; its files are not downloaded."""
    with _errors_of(spec.dataset):
        dataset, num_rows, num_bytes = load_from_hub(spec, str(cache) if cache else None, sample)
    source = _source(dataset, spec, (), None)
    return source, num_rows or round(num_bytes / source.probe()[0])


@contextlib.contextmanager
def _errors_of(dataset: str) -> Iterator[None]:
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except UserError:
        raise
    except DatasetGenerationError as error:
        raise SourceError(f"{dataset}: {error.__cause__ or error}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{dataset}: {error}") from None


def _load(spec: SourceSpec, options: dict[str, Any]) -> "tuple[tuple[str, ...], Dataset]":
    """Class names, where they are known from elsewhere than the features, and the data set."""
    from datasets import load_dataset, load_from_disk

    if archive := find_archive(spec.dataset, spec.split):
        return (), list_archive(archive, options["cache_dir"])
    if spec.dataset == DEMO:
        return (), load_demo(spec.split)
    folder = Directory.at(spec.dataset)
    if "://" not in spec.dataset and Path(spec.dataset).is_file():
        what = "compressed, which cannot be read in any order; gunzip it" if spec.dataset.endswith("gz") else "a file"
        raise SourceError(f"{spec.dataset}: is {what}; expected a tar, or the folder that holds the data set")
    if is_hub_id(spec.dataset):
        return (), load_from_hub(spec, options["cache_dir"], download)[0]
    if folder.exists(MANIFEST_FILE):
        manifest = Manifest.load(folder)
        if (held := manifest.source["split"]) != spec.split:
            raise SourceError(f"{folder}: holds the split {held!r}, not {spec.split!r}; see --split")
        urls = [f"{folder}/{shard.path}" for shard in manifest.shards]
        return manifest.class_names, load_dataset("webdataset", data_files={spec.split: urls}, **options)
    if folder.exists("state.json"):
        return (), load_from_disk(spec.dataset)
    if "://" not in spec.dataset:
        return (), load_dataset(spec.dataset, spec.config, **options)
    builder, files = _remote_files(spec)
    return (), load_dataset(builder, data_files=files, **options)


def _remote_files(spec: SourceSpec) -> tuple[str, dict[str, list[str]]]:
    """The builder for most of the files below a URL, and the files of each split as the library names splits."""
    from datasets.data_files import get_data_patterns

    folder = Directory.at(spec.dataset)
    names = list(folder.sizes())
    if archives := {Path(name).name for name in (spec.dataset, *names)}.intersection(ARCHIVES.values()):
        raise SourceError(f"{folder}: {min(archives)} can only be read from a local disk; copy it there")
    patterns = get_data_patterns(spec.dataset)
    suffixes = Counter(Path(name).suffix for name in names)
    builder = next((b for suffix, b in _BUILDERS.items() if suffixes[suffix]), "imagefolder")
    patterns = files_of(spec, patterns)
    return builder, {split: [f"{folder}/{name}" for name in found] for split, found in patterns.items()}


def _source(dataset: "Dataset", spec: SourceSpec, names: tuple[str, ...], revision: str | None) -> Source:
    from datasets import ClassLabel, Image

    features = dataset.features
    image, label, no_labels = _columns(features, spec)
    dataset = dataset.select_columns([image, *([label] if label else [])])
    if isinstance(features[image], Image):
        dataset = dataset.cast_column(image, Image(decode=False))
    if label and isinstance(features[label], ClassLabel):
        names = tuple(features[label].names)
    by_file = read_labels(Path(spec.labels)) if spec.labels else {}
    is_text = bool(label) and getattr(features[label], "dtype", "").endswith("string")
    if not is_text and (by_file or not label):  # classes may be in the names of files
        dataset = dataset.select_columns([image])
        named = {*_named_classes(dataset), *by_file.values()}
        if named:
            return Source(dataset.with_format("arrow"), tuple(sorted(named)), revision, classes_by_file=by_file)
    if is_text:
        found = [value for value in dataset.unique(label) if value is not None]
        if label == _KEY and not all(map(_WNID.fullmatch, found)):
            dataset, found = dataset.select_columns([image]), []
        if not found:
            no_labels = "no labels: neither a label column nor names like n01440764_18.JPEG; --labels can give them"
        names = tuple(sorted({*map(_class_name, found), *by_file.values()}))
        if len(names) > max(100, len(dataset) // 2) and sum(name.count(" ") for name in names) > 2 * len(names):
            raise SourceError(
                f"{spec.dataset}: column {label!r} has {len(names)} different strings of several words for "
                f"{len(dataset)} images: captions, not classes; choose a different --label-column"
            )
    return Source(dataset.with_format("arrow"), names, revision, "" if by_file else no_labels, by_file or None)


def _named_classes(dataset: "Dataset") -> set[str]:
    """WordNet ids in the names of the files, if the first has one."""
    first, every = (Source(dataset.select(range(n)).with_format("arrow")) for n in (min(1, len(dataset)), len(dataset)))
    return set(map(wordnet_id, every.file_keys())) - {""} if any(map(wordnet_id, first.file_keys())) else set()


def wordnet_id(name: str) -> str:
    """That in the name of one of ILSVRC's training images; "" in others."""
    found = _WNID.fullmatch(name)
    return found[1] if found else ""


def _class_name(value: str) -> str:
    """The class that a string says: its WordNet id where it is the name of one of ILSVRC's files, else itself."""
    return wordnet_id(value) or value


def file_key(path: str) -> str:
    """What tells an image's file apart: the name that ILSVRC gave it, else its folder and stem."""
    file = Path(path)
    found = _ILSVRC_FILE.match(file.name)
    return found[0] if found else f"{file.parent.name}/{file.stem}".lstrip("/")


def read_labels(path: Path) -> dict[str, str]:
    """Classes by `file_key`, from lines of a file's name and its class (Kaggle's `LOC_val_solution.csv`, `valprep.sh`),
    or of a class alone, in the order of ILSVRC's validation images.
    """
    lines = [line.removeprefix("mv ").rstrip("/ ") for line in path.read_text().splitlines()]
    words = [re.split(r"[,\s]+", line) for line in lines if line not in ("", "ImageId,PredictionString")]
    if all(word.isdecimal() for word, *rest in words):
        raise SourceError(f"{path}: holds numbers of ILSVRC's own; docs/sharding.md says how they become WordNet ids")
    if all(len(row) == 1 for row in words):
        return {f"ILSVRC2012_val_{number:08d}": row[0] for number, row in enumerate(words, 1)}
    return {file_key(row[0]): row[1] for row in words if len(row) > 1}


def is_hub_id(dataset: str) -> bool:
    return dataset != DEMO and "://" not in dataset and not Path(dataset).exists()


def _columns(features: dict[str, Any], spec: SourceSpec) -> tuple[str, str | None, str]:
    """Names of the image column and of the label column, if any; else why there is none."""
    from datasets import ClassLabel, Image, Video

    if videos := [name for name, f in features.items() if isinstance(f, Video)]:
        raise SourceError(f"{spec.dataset}: column {videos[0]!r} holds videos, which are not supported; extract frames")
    images = [name for name, f in features.items() if isinstance(f, Image)]
    images = images or [name for name, f in features.items() if _holds_bytes(f)]
    labels = [name for name, f in features.items() if isinstance(f, ClassLabel)]
    named = [name for name, f in features.items() if name in _LABEL_NAMES and _holds_labels(f)]
    image = _choose(spec.image_column, images, features, "image", spec.dataset)
    if image is None:
        raise SourceError(f"{spec.dataset}: no image column in {list(features)}; name it with --image-column")
    if not isinstance(features[image], Image) and not _holds_bytes(features[image]):
        raise SourceError(f"{spec.dataset}: column {image!r} holds {_kind(features[image])}, not encoded images")
    keys = [_KEY] if _KEY in features else []
    label = _choose(spec.label_column, labels or named or keys, features, "label", spec.dataset)
    if label and (label == image or not _holds_labels(features[label])):
        raise SourceError(
            f"{spec.dataset}: column {label!r} holds {_kind(features[label])}; "
            "--label-column needs class labels, integers or strings, one for each image"
        )
    found = ", ".join(f"{name!r} holds {_kind(feature)}" for name, feature in features.items())
    none = f"no labels: of the columns ({found}) none is known to hold labels; see --label-column and --labels"
    return image, label, "" if label else none


def _kind(feature: Any) -> str:
    """What a column holds, in short: int64, string, Image, List (of several labels), dict (of nested columns)."""
    name = type(feature).__name__
    return f"{feature.dtype}" if name == "Value" else name


def _holds_labels(feature: Any) -> bool:
    from datasets import ClassLabel, Value

    is_value = isinstance(feature, Value) and ("int" in feature.dtype or feature.dtype.endswith("string"))
    return is_value or isinstance(feature, ClassLabel)


def _holds_bytes(feature: Any) -> bool:
    """Images in parquet files without the hub's metadata: a {bytes, path} struct, or plain binary; or in an archive."""
    from datasets import Value

    if isinstance(feature, dict):
        return "archive" in feature or _holds_bytes(feature.get("bytes"))
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def _choose(asked: str | None, found: list[str], features: dict[str, Any], kind: str, dataset: str) -> str | None:
    if asked is not None:
        if asked not in features:
            raise SourceError(f"{dataset}: --{kind}-column {asked!r} is not a column; there are {list(features)}")
        return asked
    if len(found) > 1:
        raise SourceError(f"{dataset}: several {kind} columns, {found}; choose one with --{kind}-column")
    return found[0] if found else None


def _encoded(value: Any) -> bytes:
    """Bytes of an image cell: a {bytes, path} struct as the hub stores it, or plain binary."""
    if isinstance(value, dict):
        if "archive" in value:
            return Directory.at(value["archive"]).read("", value["offset"], value["offset"] + value["size"])
        data, path = value.get("bytes"), value.get("path")
        if data is None and path:
            with fsspec.open(path, "rb") as file:
                return file.read()
        return data or b""
    if value is not None and not isinstance(value, bytes):
        raise SourceError(f"the image column holds {type(value).__name__}, not encoded images; see --image-column")
    return value or b""
