"""Images and names of things in them -> the things, cut out. CLIPSeg finds them, from words alone.

Letters: H, W height and width of an image; h, w of CLIPSeg's map.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import AutoProcessor, CLIPSegForImageSegmentation

from ...quiet import brief_bars


class Segmenter:
    """Says where in an image things are.

    Args:
        model: folder or Hub id of a CLIPSeg, such as CIDAS/clipseg-rd64-refined.
        device, dtype: where and in what precision it runs.
        batch_size: (image, name) pairs that go through it together.

    Raises:
        OSError: the model cannot be loaded.
    """

    processor: Any
    model: CLIPSegForImageSegmentation
    batch_size: int

    @brief_bars()
    def __init__(self, model: str, *, device: str | torch.device, dtype: torch.dtype, batch_size: int = 8):
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = CLIPSegForImageSegmentation.from_pretrained(model, dtype=dtype).to(device).eval()
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(
        self, images: Sequence[PIL.Image.Image], names: Sequence[Sequence[str]]
    ) -> list[list[np.ndarray]]:
        """Maps of logits, above 0 where the thing is more likely than not.

        Args:
            images: RGB PIL images.
            names: for each image a list of names, which may be empty.

        Returns:
            for each image a list of float32 arrays (h, w), one for each name.
        """
        pairs = [(number, name) for number, listed in enumerate(names) for name in listed]
        maps = [[] for _ in images]
        for first in range(0, len(pairs), self.batch_size):
            numbers, texts = zip(*pairs[first : first + self.batch_size], strict=True)
            shown = sorted(set(numbers))  # each image is resized once, however many things it has
            pixels = self.processor(images=[images[number] for number in shown], return_tensors="pt")
            inputs = self.processor(text=list(texts), padding=True, truncation=True, return_tensors="pt")
            rows = torch.tensor([shown.index(number) for number in numbers])
            logits = self.model(
                input_ids=inputs["input_ids"].to(self.model.device),
                attention_mask=inputs["attention_mask"].to(self.model.device),
                pixel_values=pixels["pixel_values"][rows].to(self.model.device, self.model.dtype),
            ).logits
            for number, row in zip(numbers, logits.float().cpu().numpy(), strict=True):
                maps[number].append(row)
        return maps


def cut_out(
    image: PIL.Image.Image, logits: np.ndarray, threshold: float = 0.3, min_area: float = 0.005
) -> tuple[PIL.Image.Image, PIL.Image.Image, float] | None:
    """The largest piece of an image where a map is above a threshold, as a square with and without what is around it.

    As the official preparation does: the map is brought to the image's size, grown by a hundredth of it, and of its
    connected pieces the largest is kept; the square around that is moved into the image where it would reach out.

    Args:
        image: RGB PIL image (H, W); square, or the cut is no longer than its shorter side.
        logits: float array (h, w).
        threshold: of the probability, 0 to 1.
        min_area: share of the image that the piece has to cover.

    Returns:
        (whole, cutout, area): RGB PIL images of one size, in `cutout` everything but the thing is white; and the share
        of the image that the thing covers. None if there is no piece large enough.

    Raises:
        ImportError: OpenCV is not installed.
    """
    cv2 = _import_cv2()
    width, height = image.size
    mask = torch.from_numpy(np.asarray(logits, dtype=np.float32))[None, None]
    mask = torch.nn.functional.interpolate(mask, size=(height, width), mode="bilinear")
    mask = (mask[0, 0].sigmoid() > threshold).numpy().astype(np.uint8)
    reach = max(1, min(width, height) // 100)
    mask = cv2.dilate(mask, np.ones((reach, reach), np.uint8))
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    areas = boxes[1:, cv2.CC_STAT_AREA]  # piece 0 is what is below the threshold
    if not len(areas) or areas.max() < min_area * width * height:
        return None
    piece = 1 + int(areas.argmax())
    left, top, box_width, box_height = (int(number) for number in boxes[piece, :4])
    side = min(max(box_width, box_height), width, height)
    left = min(max(left + box_width // 2 - side // 2, 0), width - side)
    top = min(max(top + box_height // 2 - side // 2, 0), height - side)
    whole = np.asarray(image)[top : top + side, left : left + side]
    inside = labels[top : top + side, left : left + side] == piece
    cutout = np.where(inside[..., None], whole, np.uint8(255))
    area = float(areas[piece - 1]) / (width * height)
    return PIL.Image.fromarray(whole), PIL.Image.fromarray(cutout), area


def _import_cv2():
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "Cutting out needs the package opencv-python-headless: pip install 'kosmos-g-diffusers[data]'"
        ) from error
    return cv2
