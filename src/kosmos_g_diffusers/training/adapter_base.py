"""Which model an adapter belongs to: its weights' hash, its name and a model card, next to the adapter's files."""

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from ..environment import DTYPES, as_dtype
from ..files import read_json

if TYPE_CHECKING:
    from ..modeling_kosmos_g import KosmosGTextEncoder

FILE, CARD = "base.json", "README.md"
UNNAMED = "a model without a name"

logger = logging.getLogger(__name__)


def describe_base(text_encoder: "KosmosGTextEncoder", name: str = "") -> dict[str, Any]:
    """What an adapter keeps of the encoder it is trained on, which is as yet without adapter.

    Args:
        name: of the model, as others may know it: a Hub id, or the name of a folder.

    Returns:
        dict of `name` and `sha256`: name of a dtype -> hash of the weights cast to it, so that the same model is known again
        in whatever dtype it is loaded. Image words, which come and go, do not count.
    """
    with ThreadPoolExecutor(len(DTYPES)) as pool:
        hashes = pool.map(lambda dtype: _hash(text_encoder, dtype), DTYPES)
        return {"name": name, "sha256": dict(zip(DTYPES, hashes, strict=True))}


def check_base(text_encoder: "KosmosGTextEncoder", folder: Path) -> dict[str, Any] | None:
    """What `describe_base` told the adapter in a folder, or None if it was written before adapters kept that.

    Raises:
        ValueError: it was trained on other weights than the encoder's.
    """
    if not (folder / FILE).is_file():
        logger.warning(
            "The adapter in %s does not say which model it was trained on: none is refused.", folder
        )
        return None
    record = read_json(folder / FILE, "Get the adapter again.")
    hashes = record.get("sha256") if isinstance(record, dict) else None
    if not isinstance(hashes, dict):
        raise ValueError(f"{folder / FILE} does not describe a model. Get the adapter again.")
    kinds = {parameter.dtype for _, parameter in _weights(text_encoder)}
    if any(not kind.is_floating_point or kind.itemsize < 2 for kind in kinds):
        logger.warning(
            "The model is quantised: whether the adapter in %s was trained on it cannot be told.", folder
        )
        return record
    if not any(
        _holds_no_more_than(text_encoder, dtype) and hashes.get(dtype) == _hash(text_encoder, dtype)
        for dtype in DTYPES
    ):
        raise ValueError(
            f"The adapter in {folder} was trained on {record.get('name') or UNNAMED} (weights {str(hashes.get(DTYPES[0]))[:12]}), "
            f"and this model has other weights ({_hash(text_encoder, DTYPES[0])[:12]}). Pass the model it was trained on."
        )
    return record


def write_card(folder: Path, record: dict[str, Any], rank: int) -> None:
    """Write the model card of an adapter: what it is for, and how it is used."""
    name = record["name"]
    data = ModelCardData(
        library_name="peft",
        base_model=name if is_hub_id(name) else None,
        tags=["kosmos-g", "lora", "subject-driven-generation"],
    )
    text = f"""---
{data.to_yaml()}
---

# Adapter for a Kosmos-G text encoder

LoRA of rank {rank} for the language model and the AlignerNet of **{name or UNNAMED}**, whose weights in float32 have the SHA-256
`{record["sha256"]["float32"]}`. On other weights it is refused.

```python
from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.training import load_adapter

pipe = KosmosGPipeline.from_pretrained("{name or "path/or/repo"}")
load_adapter(pipe, "path/or/repo/of/this")
```

`kosmos-g train merge --adapter FOLDER --model MODEL --output FOLDER` makes a model folder of both.
"""
    ModelCard(text).save(folder / CARD)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, and no folder has it."""
    owner, slash, repo = name.partition("/")
    return (
        bool(owner and slash and repo)
        and "/" not in repo
        and owner[0] not in "./~"
        and not Path(name).exists()
    )


def _weights(text_encoder) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in text_encoder.named_parameters():
        if not name.startswith("image_words.") and ".lora_" not in name:  # of another adapter
            yield name.replace(".base_layer.", "."), parameter


def _holds_no_more_than(text_encoder, dtype):
    """Whether weights, or a part of them, have been rounded to a dtype: then they are compared in it, otherwise exactly."""
    kind = as_dtype(dtype)
    weights = [parameter.detach() for _, parameter in _weights(text_encoder)]
    return any(weight.dtype == kind for weight in weights) or all(
        torch.equal(weight, weight.to(kind).to(weight.dtype)) for weight in weights
    )


def _hash(text_encoder, dtype):
    digest = hashlib.sha256()
    for name, parameter in sorted(_weights(text_encoder)):
        values = parameter.detach().to("cpu", as_dtype(dtype)).contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
