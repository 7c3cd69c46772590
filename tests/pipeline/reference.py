"""What torchvision makes of an image."""

from PIL import Image

from pipeline.backends.torchvision import adjust, cut
from pipeline.plan import ViewPlan


def apply(image: Image.Image, plan: ViewPlan, row: int) -> Image.Image:
    """Row ``row`` of a plan."""
    return adjust(cut(image, plan, row), plan, row)
