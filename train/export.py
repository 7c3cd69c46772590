"""Write an encoder as others read it: ``python -m train.export --checkpoint runs/x --out FOLDER``.

The folder has ``model.safetensors`` by the names of timm, which are torchvision's for its ResNets, ``config.json`` with
how images are scaled and where the weights are from, and a model card with the newest evaluation.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.views import ViewSpec
from sharding.command import UserError, command
from train.engine import automatic
from train.engine.checkpoint import Pretrained, load_pretrained
from train.evaluate.__main__ import RESULTS
from train.evaluate.data import enlarged
from train.model.encoder import TIMM, Encoder

_CARD = """---
library_name: timm
pipeline_tag: image-feature-extraction
---

# {encoder}, pretrained by {method}

    timm.create_model("local-dir:FOLDER", pretrained=True)

{table}

{step} steps on data of fingerprint {data}; Parallax at commit {commit}. `config.json` has all settings.
"""


@command("train.export")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.export", description="Write an encoder as others read it.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's directory, a checkpoint, or a file")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for weights, JSON and model card")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="as of python -m train.evaluate")
    options = parser.parse_args(arguments)
    export(load_pretrained(options.checkpoint, options.settings), options.out)
    return 0


def export(pretrained: Pretrained, out: Path) -> None:
    """Raises `UserError` for an encoder that timm does not have."""
    from timm.models import save_for_hf

    config, results = pretrained.config, pretrained.directory / RESULTS
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    evaluation = next((record for record in reversed(records) if "results" in record), None)
    view = max(config.views, key=lambda view: view.size)
    view = ViewSpec(**evaluation["view"]) if evaluation else view.model_copy(update={"resize": enlarged(view.size)})
    scaling = {
        "input_size": (3, view.size, view.size),
        "mean": view.mean,
        "std": view.std,
        "interpolation": view.interpolation,
    }
    crop = {"crop_pct": view.size / view.resize, "crop_mode": "center"}
    model = _as_timm(pretrained.encoder, config.encoder.name)
    model.pretrained_cfg = model.pretrained_cfg | scaling | crop | {"tag": config.method.name, "license": None}
    source = {"step": pretrained.step, "data": pretrained.data, "commit": automatic.commit()}
    settings = config.model_dump(mode="json")
    save_for_hf(model, str(out), {"parallax": {**source, "config": settings}}, safe_serialization=True)
    names = {"encoder": config.encoder.name, "method": config.method.name}
    (out / "README.md").write_text(_CARD.format(**names, **source, table=_table(evaluation)))


def _as_timm(encoder: Encoder, name: str) -> Any:
    """timm's model with the encoder's weights."""
    from timm import create_model

    if name.startswith(TIMM):
        return encoder.backbone
    model = create_model(name, num_classes=0)
    try:
        model.load_state_dict(encoder.backbone.state_dict())
    except RuntimeError:
        raise UserError(
            f"encoder: timm has {name} with 64 channels in its first stage and the stem for ImageNet only; "
            "`train.engine.checkpoint.load_encoder` loads this one"
        ) from None
    return model


def _table(evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return "Not evaluated."
    results, test = evaluation["results"]["pretrained"], evaluation["test"]
    rows = [f"| {p} | {name} | {value:.4g} |" for p, values in results.items() for name, value in values.items()]
    title = f"| {test['num_images']} test images of fingerprint {test['fingerprint']} | | |"
    return "\n".join([title, "|---|---|--:|", *rows])


if __name__ == "__main__":
    sys.exit(main())
