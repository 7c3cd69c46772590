"""A run that is over in a second, for tests of whole runs."""

from pathlib import Path

from train.methods import method_class

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


def settings_of(method: str, shards: Path, run: Path, *more: str) -> list[str]:
    """A short run of any method by its own recipe, but for the sizes of everything."""
    chosen = method_class(method)
    widths = sorted({"hidden", "out", "slices", "num_classes"} & chosen.Config.model_fields.keys())
    teacher = ["method.teacher={name: resnet18, width: 8, stem: cifar}"] if method == "distill" else []
    is_vit = chosen.recipe.sections.get("encoder", {}).get("name", "").startswith("timm:vit")
    vit = ["encoder.name=timm:vit_tiny_patch16_224", "encoder.image_size=32"]
    return [
        *(
            f"method.name={method}",
            "views.size=32",
            "views.kernel=5",
            *(f"method.{width}=48" for width in widths),
            *teacher,
        ),
        *(vit if is_vit else ["encoder.name=resnet18", "encoder.width=8", "encoder.stem=cifar"]),
        *("optim.steps=20", "run.global_batch_size=24", "run.log_every=1", "data.num_threads=1"),
        *(f"data.shards={shards}", f"run.dir={run}", *more),
    ]
