"""Write an encoder as others read it: ``python -m train.export --checkpoint runs/x --out FOLDER``.

The folder has ``model.safetensors`` by the names of timm, which are torchvision's for ResNets, ``config.json`` with
how images are scaled and where the weights are from, and a model card with an evaluation. With ``--onnx`` it
has ``model.onnx`` instead, with the same JSON as metadata.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import save_file

from pipeline.views import ViewSpec
from sharding.command import Parser, UserError, command
from train.engine import automatic
from train.engine.checkpoint import Pretrained, load_pretrained
from train.engine.monitor import read_lines
from train.evaluate.__main__ import RESULTS
from train.evaluate.data import enlarged
from train.evaluate.features import weights_of
from train.model.encoder import TIMM, Encoder

_CARD = """---
{library}pipeline_tag: image-feature-extraction
---

# {title}

    {call}

{table}

{origin}`config.json` has all settings.
"""
_TIMM_CALL = 'timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf-hub:USER/NAME"'
# what timm says of weights of its own, and at which size it tests those
_NOT_OURS = ("paper_ids", "paper_name", "origin_url", "url", "hf_hub_id", "test_input_size", "test_crop_pct")
_FILES = ["README.md", "config.json", "model.safetensors", "model.onnx"]


@command("train.export")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m train.export", "Write an encoder as others read it.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's directory, a checkpoint, or a file")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for weights, JSON and model card")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx instead, of any encoder")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the files to this repository of the hub too")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="as of python -m train.evaluate")
    options = parser.parse_args(arguments)
    write = export_onnx if options.onnx else export
    write(load_pretrained(options.checkpoint, options.settings), options.out)
    if options.push_to_hub:
        print(push(options.out, options.push_to_hub))
    return 0


def export(pretrained: Pretrained, out: Path) -> None:
    """For timm; a ResNet of a width or stem that it does not have by torchvision's names alone."""
    from timm.models import save_for_hf

    config, source, evaluation = pretrained.config, _source(pretrained), _evaluation(pretrained)
    scaling = _scaling(pretrained, evaluation)
    if model := _as_timm(pretrained.encoder, config.encoder.name):
        tag = None if pretrained.step is None else config.method.name
        own = {"tag": tag, "license": None, **dict.fromkeys(_NOT_OURS)}
        model.pretrained_cfg = model.pretrained_cfg | scaling | own
        save_for_hf(model, str(out), {"parallax": source}, safe_serialization=True)
    else:
        out.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in pretrained.encoder.backbone.state_dict().items()}
        save_file(weights, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps({"pretrained_cfg": scaling, "parallax": source}, indent=2))
    (out / "README.md").write_text(_card(pretrained, source, evaluation, in_timm=model is not None))


def export_onnx(pretrained: Pretrained, out: Path) -> None:
    """``images`` (n, 3, S, S) to ``h`` (n, F), any n, at the size S of evaluation. Checked with onnxruntime: raises
    `UserError` where its representations are further from the encoder's than 1e-5 of the largest of them."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # the exporter of torch needs it
    except ImportError as error:
        raise UserError(f"--onnx: {error.name} is not installed: pip install 'parallax-ssl[onnx]'") from None
    scaling, encoder = _scaling(pretrained, _evaluation(pretrained)), pretrained.encoder
    images = torch.randn(3, *scaling["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = encoder(images)
    made = torch.onnx.export(
        encoder,
        (images[:2],),
        input_names=["images"],
        output_names=["h"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
        opset_version=18,
        verbose=False,
    )
    assert made is not None
    made.model.metadata_props["parallax"] = json.dumps({**scaling, **_source(pretrained)})
    out.mkdir(parents=True, exist_ok=True)
    made.save(path := out / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    difference = abs(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) - expected).max()
    if not difference <= 1e-5 * expected.abs().max():
        path.unlink()
        raise UserError(f"{path}: its representations were {difference:.2g} from the encoder's; it is removed")


def push(folder: Path, repository: str) -> str:
    """Upload what `export` or `export_onnx` wrote to the Hugging Face hub, or where ``HF_ENDPOINT`` says. A repository
    that is not there is made, private. Returns the address; raises `UserError` where that fails."""
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        return hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=_FILES).commit_url
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:  # type: ignore[attr-defined]
        reason = f"{' '.join(str(error).split())}; the files are in {folder}; `hf auth login` logs in"
        raise UserError(f"--push-to-hub {repository}: {reason}") from None


def _evaluation(pretrained: Pretrained) -> dict[str, Any] | None:
    """The newest of these weights; rather one with the images that they were pretrained on than one by transfer."""
    weights = weights_of(pretrained.encoder)
    found = [r for r in read_lines(pretrained.directory / RESULTS, "weights")[0] if r["weights"] == weights]
    own = [record for record in found if record["train"]["fingerprint"] == pretrained.data]
    return next(reversed(own or found), None)


def _source(pretrained: Pretrained) -> dict[str, Any]:
    """Where the weights are from: a run, or a file of other people."""
    config = pretrained.config.model_dump(mode="json")
    if pretrained.step is None:
        return {"file": pretrained.path.name, "config": {"encoder": config["encoder"]}}
    starts, _ = read_lines(pretrained.directory / automatic.PROVENANCE, "commit")
    commit = starts[-1]["commit"] if starts else None
    return {"step": pretrained.step, "data": pretrained.data, "commit": commit, "config": config}


def _scaling(pretrained: Pretrained, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """How images are to be seen, by timm's names: as in the evaluation of the card."""
    view = max(pretrained.config.views, key=lambda view: view.size)
    view = ViewSpec(**evaluation["view"]) if evaluation else view.model_copy(update={"resize": enlarged(view.size)})
    return {
        "input_size": (3, view.size, view.size),
        "mean": view.mean,
        "std": view.std,
        "interpolation": view.interpolation,
        "crop_pct": view.size / view.resize,
        "crop_mode": "center",
    }


def _as_timm(encoder: Encoder, name: str) -> Any:
    """timm's model with the encoder's weights; None where it has no such model."""
    from timm import create_model

    if name.startswith(TIMM):
        return encoder.backbone
    try:
        model = create_model(name, num_classes=0)
        model.load_state_dict(encoder.backbone.state_dict())
    except RuntimeError:
        return None
    return model


def _card(pretrained: Pretrained, source: dict[str, Any], evaluation: dict[str, Any] | None, *, in_timm: bool) -> str:
    config = pretrained.config
    title, origin = f"{config.encoder.name}, weights of {pretrained.path.name}", ""
    if pretrained.step is not None:
        title = f"{config.encoder.name}, pretrained by {config.method.name}"
        origin = "{step} steps on data of fingerprint {data}; Parallax at commit {commit}. ".format(**source)
    encoder = [f"encoder.{field}={value}" for field, value in config.encoder.model_dump(exclude_defaults=True).items()]
    call = " ".join(["python -m train.evaluate --checkpoint FOLDER/model.safetensors", *encoder])
    library, call = ("library_name: timm\n", _TIMM_CALL) if in_timm else ("", call)
    return _CARD.format(library=library, title=title, call=call, table=_table(evaluation), origin=origin)


def _table(evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return "Not evaluated."
    results, test = evaluation["results"]["pretrained"], evaluation["test"]
    rows = [f"| {p} | {name} | {value:.4g} |" for p, values in results.items() for name, value in values.items()]
    title = f"| {test['num_images']} test images of fingerprint {test['fingerprint']} | | |"
    return "\n".join([title, "|---|---|--:|", *rows])


if __name__ == "__main__":
    sys.exit(main())
