"""What the tasks next to this file show: examples/images."""

from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parents[1] / "images"


def doc_to_visual(doc):
    return [Image.open(IMAGES / name).convert("RGB") for name in doc["images"]]
