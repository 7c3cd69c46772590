"""Data sets of the Hugging Face hub: the files of one split are downloaded, and a hub that fails is asked again."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from sharding.command import UserError, say

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

    from sharding.source import SourceSpec

    Files = dict[str, list[str]]  # by split
    Found = tuple[Dataset, int, int]  # rows, how many there are in all and bytes of their files (0: unknown)
    Attempt = Callable[[SourceSpec, str | None, DatasetBuilder, Files], Found]

_LONGEST_PAUSE_SECONDS = 64  # between attempts, each of which is several of the library's
_FINAL = ("scripts are no longer supported", "doesn't contain any data files")  # errors that have no class of their own
_NUM_SAMPLED = 64


def load_from_hub(spec: "SourceSpec", cache: str | None, attempt: "Attempt") -> "Found":
    """What ``attempt`` (`download`, `sample`) returns. Where the hub cannot be asked: what was downloaded before."""
    import huggingface_hub
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    try:
        commit = huggingface_hub.HfApi().dataset_info(spec.dataset, revision=spec.revision, timeout=10).sha
    except Exception as error:  # in the words of whichever HTTP client the hub library uses
        if _may_pass(error) and (found := _downloaded(spec, cache)):
            return found, len(found), 0
        if not isinstance(error, huggingface_hub.errors.HfHubHTTPError):
            reason = f"{error}." if isinstance(error, ValueError) else f"the hub cannot be reached ({error})."
            raise UserError(_no_access(spec.dataset, reason)) from None
        commit = spec.revision
    seconds = 1
    while True:
        try:
            builder = load_dataset_builder(spec.dataset, spec.config, revision=commit, cache_dir=cache)
            return attempt(spec, cache, builder, files_of(spec, builder.config.data_files or {}))
        except DatasetNotFoundError as error:
            raise UserError(_no_access(spec.dataset, str(error))) from None
        except Exception as error:
            if not _may_pass(error):
                raise
            reason = str(_origin(error)).partition("\n")[0]
            if seconds > _LONGEST_PAUSE_SECONDS:
                reason += "; when the hub answers again, the same command continues"
                raise UserError(f"{spec.dataset}: {reason}") from None
            say("sharding", f"{spec.dataset}: {reason}; trying again in {seconds} s")
            time.sleep(seconds)
            seconds *= 4


def download(spec: "SourceSpec", cache: str | None, builder: "DatasetBuilder", files: "Files") -> "Found":
    """The split on this machine's disk. Files that are there already stay."""
    from datasets import load_dataset

    folder = Path(builder.cache_dir).parents[3]
    needed = sum(builder.info.splits[name].num_bytes for name in files) if builder.info.splits else 0
    free = shutil.disk_usage(folder).free
    if needed > free and not _downloaded(spec, cache):
        what = f"needs {needed / 1e9:,.0f} GB for its files, and as much for what is made of them"
        raise UserError(f"{spec.dataset}: {what}; {folder} has {free / 1e9:,.0f} GB; see --cache")
    options = {"features": builder.info.features, "revision": builder.hash, "cache_dir": cache}
    dataset = load_dataset(spec.dataset, spec.config, split=spec.split, data_files=files, **options)
    return dataset, len(dataset), 0


def sample(spec: "SourceSpec", _: str | None, builder: "DatasetBuilder", files: "Files") -> "Found":
    """The first rows, in memory."""
    from datasets import Dataset

    stream = builder.as_streaming_dataset(spec.split).decode(False)
    dataset = Dataset.from_list(list(stream.take(_NUM_SAMPLED)), features=stream.features)
    num_rows = builder.info.splits[spec.split].num_examples if builder.info.splits else 0  # as the card says
    return dataset, num_rows, sum(fsspec.url_to_fs(file)[0].size(file) for file in files[spec.split])


def files_of(spec: "SourceSpec", files: dict[Any, list[str]]) -> "Files":
    """Those of the splits that the split of ``spec`` names, such as "train", "train[:10%]", "train+test"."""
    asked = {part.partition("[")[0].strip() for part in spec.split.split("+")}
    found = {str(name): names for name, names in files.items() if name in asked}
    if asked != found.keys():
        raise UserError(f"{spec.dataset}: has no split {spec.split!r}, only {', '.join(map(str, files))}; see --split")
    return found


def _downloaded(spec: "SourceSpec", cache: str | None) -> "Dataset | None":
    """The split as it was converted last, here."""
    import datasets

    owner, _, name = spec.dataset.rpartition("/")
    folder = f"{owner}___" * bool(owner) + datasets.naming.camelcase_to_snakecase(name)
    root = Path(cache or datasets.config.HF_DATASETS_CACHE)
    found = root.glob(f"{folder}/{spec.config or ''}*/*/*/dataset_info.json")
    for info in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        names = (f"*-{spec.split}.arrow", f"*-{spec.split}-?????-of-?????.arrow")
        files = sorted(file for name in names for file in info.parent.glob(name))
        if files and info.parent.suffix != ".incomplete":
            return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    return None


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help: not after a refusal, a mistake in what is asked, or a full disk."""
    from datasets.exceptions import DatasetsError

    if "Couldn't find cache" in str(error):  # the hub failed, and the library looked for what was once converted
        return True
    response = getattr(_origin(error), "response", None)
    is_refused = response is not None and response.status_code < 500 and response.status_code not in (408, 429)
    is_ours = isinstance(error, DatasetsError | ValueError) or getattr(error, "errno", None)
    return not (is_refused or is_ours or any(text in str(error) for text in _FINAL))


def _origin(error: BaseException) -> BaseException:
    return _origin(error.__cause__) if error.__cause__ else error


def _no_access(dataset: str, reason: str) -> str:
    terms = f"accept the terms on https://huggingface.co/datasets/{dataset}"
    if "gated" in reason:
        return f"{dataset}: is gated: {terms}, then log in as the same user with `hf auth login`"
    if reason.startswith("Revision"):
        return f"{dataset}: {reason} See --revision"
    return (
        f"{dataset}: {reason} There is no such folder here. To get it from the hub: be online, log in with "
        f"`hf auth login`, and {terms} if it is gated. Or choose other data: --dataset FOLDER, HUB_ID or demo"
    )
