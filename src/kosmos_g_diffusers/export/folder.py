"""Writes the folder of an exported encoder: graphs, tokenizer, kosmos_g.json and the runner, all of them or nothing."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..captioning import load_reader
from ..conversion.folder import appearing_atomically, check_output
from ..environment import as_dtype
from ..files import describe_write_error, write_text
from ..processing_kosmos_g import IMAGE_MARK, PAD, KosmosGProcessor
from . import runner
from .formats import DTYPES, PACKAGES, check_packages, write
from .graphs import trace
from .int8 import to_int8

RUNNER = "kosmos_g_runner.py"
SAMPLES = ("", f"a hat on {IMAGE_MARK}", f"{IMAGE_MARK} and {IMAGE_MARK}")  # what the error is measured on


@dataclass
class Exported:
    """What was written: the folder, its bytes, and the RMS error of its condition relative to torch's in float32 (None for pt2)."""

    folder: Path
    size: int
    error: float | None


def export_encoder(
    model: str | Path, output: str | Path, format: str = "onnx", dtype: str = "float32"
) -> Exported:
    """Write the text encoder of a model for programs without torch.

    Args:
        model: folder or Hub id of a saved pipeline.
        output: folder to write, new or empty; it appears when it is complete.
        format: "onnx", "openvino" or "pt2" (torch.export, which torch alone reads).
        dtype: of the weights: "float32", "float16", or "int8" with a scale for each row. Inputs and outputs are float32.

    Raises:
        ValueError: a wrong argument, or a model with image words or quantised weights.
        ImportError: a package of the format is not installed.
        OSError: the model cannot be loaded, or the disk is full.
    """
    for name, value, known in (("format", format, PACKAGES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}. Pass one of {', '.join(known)}.")
    check_packages(format)
    output = check_output(output)
    encoder, tokenizer = load_reader(model, torch.float32)
    if tokenizer.image_words:
        words = ", ".join(tokenizer.image_words)
        raise ValueError(
            f"The model has the image words {words}, which an exported folder cannot hold. Call remove_image_word for each on its "
            "pipeline and save that, or give their images with the prompts."
        )
    if getattr(encoder, "hf_quantizer", None) is not None:
        raise ValueError(
            f"The text encoder of {str(model)!r} was saved with quantised weights, which an exported folder cannot hold. Export the "
            "model that it was made of; --dtype int8 makes its weights small."
        )
    processor = KosmosGProcessor(tokenizer, encoder.config.vision_config.image_size)
    expected = None if format == "pt2" else _conditions(encoder, processor)
    halve = dtype == "float16" and format == "openvino"
    if dtype == "int8":
        to_int8(encoder)
    elif not halve:
        encoder.to(as_dtype(dtype))
    config = encoder.config
    sizes = (processor.image_size, processor.latent_query_num, config.text_config.embed_dim)
    sizes += (tokenizer.model_max_length, tokenizer.convert_tokens_to_ids(PAD))
    sizes += (tokenizer.image_token_id, tokenizer.end_of_image_token_id)
    settings = {"format_version": runner.FORMAT_VERSION, "format": format, "dtype": dtype}
    settings |= dict(zip(runner.SIZES, sizes, strict=True))
    settings |= {"condition": [config.num_queries, config.aligner_hidden_size]}
    with appearing_atomically(output) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        graphs = trace(encoder)
        try:
            write(format, graphs, folder, halve)
        except OSError as error:
            reason = describe_write_error(error, folder)
            raise OSError(
                f"The graphs cannot be written to {output} ({reason}). Pass an --output with more room."
            ) from error
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        write_text(folder / "kosmos_g.json", json.dumps(settings, indent=2) + "\n")
        error = None
        if expected is not None:
            shutil.copyfile(runner.__file__, folder / RUNNER)
            given = runner.Encoder(folder).encode(SAMPLES, images_of_samples(processor))
            error = float(np.sqrt(np.square(given - expected).mean() / np.square(expected).mean()))
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Exported(output, size, error)


def images_of_samples(processor):
    """Images of each of SAMPLES, of colours at random in large squares."""
    random, side = np.random.default_rng(0), processor.image_size
    counts = [sample.count(IMAGE_MARK) for sample in SAMPLES]
    squares = [[random.integers(0, 256, (4, 4, 3), np.uint8) for _ in range(count)] for count in counts]
    return [[one.repeat(-(-side // 4), 0).repeat(-(-side // 4), 1) for one in own] for own in squares]


@torch.no_grad()
def _conditions(encoder, processor):
    return encoder(**processor(list(SAMPLES), images_of_samples(processor))).last_hidden_state.numpy()
