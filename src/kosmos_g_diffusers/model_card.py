"""The model card of a saved folder: what is in it, where it comes from, how to use it and what it is not for."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MARKER = "<!-- written by kosmos_g_diffusers; a card without this line is left alone when the folder is saved again -->"
NEWLINE = "\n"  # f-strings of older Pythons take no backslash
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
UNKNOWN_SOURCE = ("not recorded", "not recorded")
ENCODER = "Kosmos-G: Kosmos-2 modules of transformers and an AlignerNet"
SOURCES = {  # of a model of the released size
    "text_encoder": (ENCODER, "MIT (code of microsoft/unilm)"),
    "tokenizer": ("Kosmos-G", "MIT (microsoft/unilm)"),
    "unet": ("Stable Diffusion 1.5", "CreativeML Open RAIL-M"),
    "vae": ("Stable Diffusion 1.5", "CreativeML Open RAIL-M"),
    "safety_checker": ("Stable Diffusion 1.5", "CreativeML Open RAIL-M"),
    "scheduler": ("settings only", "Apache-2.0 (diffusers)"),
}


def write_model_card(
    pipeline: "DiffusionPipeline",
    folder: str | Path,
    *,
    provenance: Mapping[str, str] | None = None,
    results: str | None = None,
) -> None:
    """Write README.md into a saved folder.

    A card that is there already stays when a person wrote it, or when it was given provenance or results, and neither is
    given now.

    Args:
        pipeline: the pipeline whose folder it is.
        folder: where `save_pretrained` has written it.
        provenance: component name -> where its weights come from, a phrase. None says what the components themselves
            know.
        results: Markdown with measured results and the commands that made them; None says that there are none.
    """
    path = Path(folder) / "README.md"
    automatic = provenance is None and results is None
    if automatic and path.exists() and MARKER not in path.read_text(encoding="utf-8"):
        return
    ModelCard(model_card(pipeline, provenance=provenance, results=results)).save(path)


def model_card(
    pipeline: "DiffusionPipeline", *, provenance: Mapping[str, str] | None = None, results: str | None = None
) -> str:
    """The text of the card, YAML header included; arguments as `write_model_card`."""
    unet = getattr(pipeline, "unet", None)
    full_size = unet is not None and tuple(unet.config.block_out_channels) == (320, 640, 1280, 1280)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license="creativeml-openrail-m" if full_size else "mit",
        base_model=[STABLE_DIFFUSION] if full_size else None,
        tags=["kosmos-g", "subject-driven-generation", "image-prompt", type(pipeline).__name__],
        language="en",
    )
    words = ", ".join(f"`{word}`" for word in pipeline.image_words)
    checker = "The safety checker of Stable Diffusion is part of this folder."
    if getattr(pipeline, "safety_checker", None) is None:
        checker = "This folder has **no safety checker**: do not show unfiltered results in services open to the public."
    return f"""---
{data.to_yaml()}
---
{MARKER if provenance is None and results is None else ""}

# Kosmos-G for diffusers

Prompts of words **and images**: `<i> in the suit of <i>` with two images is read by a multimodal language model, mapped
into the space of Stable Diffusion 1.5's text encoder, and drawn by the untouched U-Net, with no tuning for the subject
([paper](https://arxiv.org/abs/2310.02992)).

## Use

```python
pipe = DiffusionPipeline.from_pretrained("path/or/repo", trust_remote_code=True)  # from diffusers
image = pipe("<i> in the suit of <i>", images=["dog.png", "armour.png"]).images[0]
```

With the package kosmos-g-diffusers installed, `{type(pipeline).__name__}.from_pretrained("path/or/repo")` needs no remote code.
ControlNets, LoRAs and fine-tuned U-Nets made for Stable Diffusion 1.5 plug in as they do there.
{"" if not words else f"{NEWLINE}Image words in this folder: {words}.{NEWLINE}"}
## What is inside

| component | class | parameters | from | licence |
|---|---|---|---|---|
{_component_rows(pipeline, provenance or {}, full_size)}

## Measured results

{results or "None were measured with these weights yet."}

## Intended use and limits

Research and creative work with images whose use you have the right to. It follows the licence of its parts; for the
U-Net and VAE of Stable Diffusion 1.5 that is the CreativeML Open RAIL-M with its use restrictions. {checker}
It inherits the biases of its training data, draws text and faces poorly, and may confuse several subjects. Do not use it
to depict people without their consent or to deceive.
"""


def _component_rows(pipeline, provenance, full_size):
    rows = []
    for name, component in pipeline.components.items():
        if component is None:
            continue
        source, licence = SOURCES.get(name, UNKNOWN_SOURCE) if full_size else UNKNOWN_SOURCE
        parameters = "-"
        if isinstance(component, torch.nn.Module):
            parameters = f"{sum(parameter.numel() for parameter in component.parameters()):,}"
        source = provenance.get(name) or _hub_id(component) or source
        rows.append(f"| {name} | {type(component).__name__} | {parameters} | {source} | {licence} |")
    return "\n".join(rows)


def _hub_id(component):
    """Where a component was loaded from, if that is a Hub id; a path on somebody's machine is nobody's business."""
    config = getattr(component, "config", None)
    name = getattr(component, "name_or_path", None) or getattr(config, "_name_or_path", None)
    is_hub_id = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return f"`{name}`" if is_hub_id and not os.path.exists(name) else None
