"""Weights of the text encoder in 8 and 4 bits: which library rounds them, and what stays in the dtype of the model.

Linear layers are rounded; embeddings, norms, biases, learned queries and image words never are. What of the linear layers
stays as well was chosen by the error of the condition that each part brings (benchmarks/quantization.py).
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from .files import read_json

if TYPE_CHECKING:
    import torch
    from diffusers import PipelineQuantizationConfig

LIBRARIES = {"int8": "torchao", "int4": "bitsandbytes"}
LOWEST = {"torchao": "0.17", "bitsandbytes": "0.46.1"}  # with groups; that transformers takes
QUANTIZATIONS = ("none", *LIBRARIES)
GROUP = 32  # int8 weights that share a scale
# with the scales: of 32 bits for each group, and torchao's zero point of 8; of 8 bits for each 64 weights
BITS_A_WEIGHT = {"int8": 8 + (32 + 8) / GROUP, "int4": 4 + 8 / 64}
KEPT: dict[str, tuple[str, ...]] = {  # modules, with all below them
    "int8": (),
    "int4": ("aligner", "image_to_text_projection"),
}
INSTALL = "pip install 'kosmos-g-diffusers[quantize]'"


def quantization_config(quantize: str, dtype: "torch.dtype | None" = None) -> "PipelineQuantizationConfig":
    """What `KosmosGPipeline.from_pretrained(..., quantization_config=)` takes to round the text encoder while it loads.

    int8 is torchao's: weights alone, a scale for each 32. int4 is bitsandbytes' NF4: a scale for each 64 weights. Both run
    on CPUs and GPUs, and a pipeline that was loaded so is saved with its rounded weights (safetensors) and loaded again.

    Args:
        quantize: "int8" or "int4".
        dtype: that int4 weights are multiplied in, that of the model; None is float32.

    Raises:
        ValueError: another name.
        ImportError: the library is not installed.
    """
    if quantize not in LIBRARIES:
        raise ValueError(f"quantize={quantize!r} was given. Expected {' or '.join(map(repr, LIBRARIES))}.")
    check_library(quantize)
    import torch
    import transformers
    from diffusers import PipelineQuantizationConfig

    kept = list(KEPT[quantize]) or None
    if quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, PerGroup

        weights = Int8WeightOnlyConfig(version=2, granularity=PerGroup(GROUP))
        config = transformers.TorchAoConfig(weights, modules_to_not_convert=kept)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            # plain scales are saved wrongly after a call on a CPU with AVX-512 products of bfloat16 (bitsandbytes 0.50.2)
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype or torch.float32,
            llm_int8_skip_modules=kept,
        )
    return PipelineQuantizationConfig(quant_mapping={"text_encoder": config})


def has_library(quantize: str) -> bool:
    """Whether what "int8" or "int4" needs is installed, in a version that will do; "none" needs nothing."""
    if quantize == "none":
        return True
    from packaging.version import Version

    library = LIBRARIES[quantize]
    try:
        return Version(version(library)) >= Version(LOWEST[library])
    except PackageNotFoundError:
        return False


def check_library(quantize: str) -> None:
    """ImportError if what "int8" or "int4" needs is not installed; it is not imported."""
    if not has_library(quantize):
        library = LIBRARIES[quantize]
        raise ImportError(f"{quantize} weights need {library} {LOWEST[library]} or newer. Run: {INSTALL}")


def is_kept(name: str, quantize: str) -> bool:
    """Whether the linear layer of a name, such as "aligner.input_projection", stays in the dtype of the model."""
    return any(name == kept or name.startswith(f"{kept}.") for kept in KEPT[quantize])


def saved_quantization(folder: str | Path) -> str | None:
    """How the text encoder of a saved pipeline is rounded, as its file says ("torchao", "bitsandbytes"), or None.

    None too for a Hub id, which is not looked at.
    """
    path = Path(folder) / "text_encoder" / "config.json"
    if not path.is_file():
        return None
    values = read_json(path, "Download or make it again.")
    saved = values.get("quantization_config") if isinstance(values, dict) else None
    return str(saved.get("quant_method", "other")) if isinstance(saved, dict) else None
