"""Golden data, small pipelines and pictures that several test files share. No test needs a network, a GPU or a download."""

import atexit
import copy
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# before transformers and diffusers are imported, which read these once
MODULES_CACHE = tempfile.mkdtemp(prefix="kosmos_g_modules_")
atexit.register(shutil.rmtree, MODULES_CACHE, ignore_errors=True)
os.environ["HF_MODULES_CACHE"] = MODULES_CACHE
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import diffusers.utils.logging  # noqa: E402
import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers.utils.logging  # noqa: E402
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from kosmos_g_diffusers import (  # noqa: E402
    KosmosGTextEncoder,
    KosmosGTextEncoderConfig,
    KosmosGTokenizer,
)
from kosmos_g_diffusers.conversion.checkpoint import read_checkpoint  # noqa: E402
from kosmos_g_diffusers.conversion.keys import match_keys  # noqa: E402
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN  # noqa: E402
from kosmos_g_diffusers.testing import build_random_controlnet, build_tiny_pipeline  # noqa: E402

# the models are tiny: threads would cost more than they bring, above all on a busy machine
torch.set_num_threads(1)
# pytest would keep a record of each guard of a graph that is traced
logging.getLogger("torch.__trace").disabled = True
# tqdm's own lock is shared with forked children, and stays locked for ever when a test kills the one that holds it
tqdm.set_lock(threading.RLock())

REFERENCE = Path(__file__).parent / "fixtures" / "reference"
SENTENCEPIECE = Path(__file__).parents[2] / "shared" / "tokenizer" / "sentencepiece.bpe.model"
CASES = {case["name"]: case for case in json.loads((REFERENCE / "cases.json").read_text(encoding="utf-8"))}


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps the precision of the first run of a process, and refuses another."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


# Golden data -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reference():
    """Folder with the official implementation's inputs, weights and outputs (see its README.md)."""
    return REFERENCE


def _load_case(name):
    case = SimpleNamespace(**CASES[name])
    case.tensors = load_file(REFERENCE / case.file)
    case.pictures = [
        [PIL.Image.open(REFERENCE / "images" / f"{image}.png") for image in images] for images in case.images
    ]
    pixels = load_file(REFERENCE / "pixel_values.safetensors")
    case.pixel_values = torch.stack([pixels[name] for name in case.image_order]) if case.image_order else None
    # what the official code gives to its model, for `KosmosGTextEncoder.forward`
    case.inputs = {
        "input_ids": case.tensors["input_ids"],
        "image_token_mask": case.tensors["image_mask"],
        "pixel_values": case.pixel_values,
    }
    return case


@pytest.fixture(params=CASES)
def golden_case(request):
    """Each golden case in turn: fields of cases.json, `tensors`, `pictures`, `pixel_values` and `inputs`."""
    return _load_case(request.param)


@pytest.fixture
def load_case():
    """Function from the name of a golden case to the case."""
    return _load_case


@pytest.fixture(scope="session")
def golden_encoder():
    """The encoder with the golden weights, float32. Shared: tests that change it take a copy."""
    sizes = json.loads((REFERENCE / "config.json").read_text(encoding="utf-8"))
    config = KosmosGTextEncoderConfig(
        text_config={
            "vocab_size": sizes["vocab_size"],
            "embed_dim": sizes["dec_dim"],
            "layers": sizes["dec_layers"],
            "attention_heads": sizes["dec_heads"],
            "ffn_dim": sizes["dec_ffn"],
        },
        vision_config={
            "hidden_size": sizes["vis_width"],
            "num_hidden_layers": sizes["vis_layers"],
            "num_attention_heads": sizes["vis_width"] // sizes["vis_head_width"],
            "intermediate_size": int(sizes["vis_width"] * sizes["vis_mlp_ratio"]),
            "image_size": sizes["image_size"],
            "patch_size": sizes["patch"],
        },
        latent_query_num=sizes["latent"],
        aligner_hidden_size=sizes["al_dim"],
        aligner_layers=sizes["al_layers"],
        aligner_attention_heads=sizes["al_heads"],
        aligner_ffn_dim=sizes["al_ffn"],
        aligner_max_positions=sizes["al_pos"],
        num_queries=sizes["num_queries"],
        image_token_id=sizes["boi"],
        end_of_image_token_id=sizes["eoi"],
    )
    encoder = KosmosGTextEncoder(config)
    weights = read_checkpoint(REFERENCE / "tiny_reference_checkpoint.pt")
    expected = {
        "text_encoder": encoder.state_dict(),
        "aligner_n": AlignerNetN(config).state_dict(),
        "unet": {},
        "vae": {},
    }
    names = match_keys(weights, expected)["text_encoder"]
    encoder.load_state_dict({ours: weights[official] for ours, official in names.items()}, strict=True)
    return encoder.eval()


@pytest.fixture(scope="session")
def sentencepiece_file():
    """The official sentencepiece.bpe.model, which is too large to be part of this repository."""
    pytest.importorskip("sentencepiece", reason="reading the official tokenizer needs the extra `convert`")
    if not SENTENCEPIECE.is_file():
        pytest.skip(f"the official tokenizer is not at {SENTENCEPIECE}")
    return SENTENCEPIECE


@pytest.fixture(scope="session")
def real_tokenizer(sentencepiece_file):
    """The official 64,000-piece tokenizer. Shared: tests do not change it."""
    return KosmosGTokenizer.from_sentencepiece(sentencepiece_file)


@pytest.fixture(scope="session")
def golden_components(golden_encoder):
    """What a `KosmosGPipeline` with the golden weights is made of, but for the tokenizer. Shared, not to be changed."""
    folder = REFERENCE / "tiny_stable_diffusion"
    return {
        "text_encoder": golden_encoder,
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet").eval(),
        "vae": AutoencoderKL.from_pretrained(folder / "vae").eval(),
        "scheduler": PNDMScheduler.from_pretrained(folder / "scheduler"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


# Small pipelines ---------------------------------------------------------------------------------------------------


def _strengthen(model):
    """Random weights under which every token and picture counts: transformers' initial ones hardly let pictures through."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                spread = (
                    1.0 if "embed_tokens" in name or "quer" in name else 0.8 * parameter[0].numel() ** -0.5
                )
                parameter.normal_(0, spread, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
        model.get_input_embeddings().weight.mul_(model.config.text_config.embed_dim**-0.5)


def _build_pipe():
    pipe = build_tiny_pipeline()
    _strengthen(pipe.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def build_pipe():
    """Function that builds a small `KosmosGPipeline` (image size 32, 4 latent queries), always with the same weights."""
    return _build_pipe


@pytest.fixture
def pipe():
    """A small `KosmosGPipeline` of the test's own."""
    return _build_pipe()


@pytest.fixture(scope="session")
def build_controlnet():
    """Function that builds a ControlNet of random weights, in which the control image counts, for a U-Net."""

    def build(unet, seed=0):
        controlnet = build_random_controlnet(unet, seed)
        for parameter in controlnet.controlnet_cond_embedding.parameters():
            parameter.data.mul_(2)
        return controlnet

    return build


@pytest.fixture(scope="session")
def photos():
    """Four RGB pictures of different sizes and contents."""
    rng = np.random.default_rng(0)
    pictures = []
    for width, height in ((40, 50), (64, 32), (33, 47), (32, 32)):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        pictures.append(PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC))
    return pictures


@pytest.fixture(scope="session")
def draw():
    """Function that calls a pipeline with few steps and a small size and returns the images as an array."""

    def draw(pipe, *args, seed=0, **kwargs):
        settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"} | kwargs
        if "generator" not in settings:
            settings["generator"] = torch.Generator().manual_seed(seed)
        return pipe(*args, **settings).images

    return draw


@pytest.fixture(scope="session")
def no_model_runs():
    """Context manager in which any forward pass of a pipeline's models fails the test."""

    @contextmanager
    def forbid(pipe):
        def ran(*args, **kwargs):
            raise AssertionError("a model ran")

        with mock.patch.multiple(pipe.text_encoder, forward=ran, get_image_features=ran, get_condition=ran):
            with mock.patch.object(pipe.unet, "forward", ran):
                with mock.patch.multiple(pipe.vae, encode=ran, decode=ran):
                    yield

    return forbid


@pytest.fixture(scope="session")
def snapshot():
    """Function that copies everything a call could change in a module: weights, buffers, configuration, mode, hooks."""

    def take(module):
        state = {"weights": {name: tensor.clone() for name, tensor in module.state_dict().items()}}
        state["buffers"] = {name: tensor.clone() for name, tensor in module.named_buffers()}
        state["config"] = copy.deepcopy(
            dict(module.config.to_dict() if hasattr(module.config, "to_dict") else module.config)
        )
        state["modules"] = {
            name: (type(part), part.training, list(part._forward_hooks), sorted(map(str, vars(part))))
            for name, part in module.named_modules()
        }
        state["dtypes"] = {name: (tensor.dtype, tensor.device) for name, tensor in module.named_parameters()}
        return state

    return take


@pytest.fixture
def logged(caplog):
    """pytest's caplog, which also sees what transformers and diffusers log."""
    libraries = (transformers.utils.logging, diffusers.utils.logging)
    for library in libraries:
        library.enable_propagation()
    yield caplog
    for library in libraries:
        library.disable_propagation()
