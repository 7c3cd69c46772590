"""A run that is over in a second, for tests of whole runs."""

from pathlib import Path
from typing import Any

from train.methods import MethodConfig, method_class

SMALL = [
    "views.size=32",
    "views.kernel=5",
    "encoder.name=resnet18",
    "encoder.width=8",
    "method.hidden=32",
    "method.out=16",
    "optim.name=sgd",
    "optim.learning_rate=0.05",
    "method.temperature=0.5",
    "optim.steps=6",
    "run.global_batch_size=24",
    "run.log_every=1",
    "run.checkpoint_every=2",
    "data.num_threads=1",
]


def settings(shards: Path, run: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.shards={shards}", f"run.dir={run}", *more]


def narrow(config: type[MethodConfig]) -> dict[str, Any]:
    """Widths of a method's networks, which some papers have in the thousands, and a teacher where it has one."""
    widths = dict.fromkeys({"hidden", "out", "slices", "num_classes"} & config.model_fields.keys(), 48)
    decoder = {"width": 48, "depth": 2, "heads": 4} if "depth" in config.model_fields else {}
    teacher = {"teacher": {"name": "resnet18", "width": 8, "stem": "cifar"}} if "teacher" in config.model_fields else {}
    return widths | decoder | teacher


def has_vit(method: str) -> bool:
    """Whether its recipe has one, whose patches need views of 32 px or more."""
    encoder: dict[str, Any] = method_class(method).recipe.sections.get("encoder", {})
    return str(encoder.get("name", "")).startswith("timm:vit")


def settings_of(method: str, shards: Path, run: Path, *more: str) -> list[str]:
    """A short run of any method by its own recipe, but for the sizes of everything."""
    chosen = method_class(method)
    is_vit = has_vit(method)
    vit = ["encoder.name=timm:test_vit", "encoder.image_size=32"]
    return [
        *(f"method.name={method}", f"views.size={32 if is_vit else 16}", "views.kernel=5"),
        *(f"method.{name}={value}" for name, value in narrow(chosen.Config).items()),
        *(vit if is_vit else ["encoder.name=resnet18", "encoder.width=8", "encoder.stem=cifar"]),
        *("optim.steps=20", "run.global_batch_size=24", "run.log_every=1", "data.num_threads=1"),
        *(f"data.shards={shards}", f"run.dir={run}", *more),
    ]
