"""What the tasks beside this file show: pictures of examples/images."""

from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).parents[1] / "images"


def doc_to_visual(doc):
    return [Image.open(PICTURES / name).convert("RGB") for name in doc["pictures"]]
