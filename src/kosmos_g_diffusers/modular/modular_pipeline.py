"""The modular pipeline, and what its blocks share: the ordinary pipelines' preparations, saving together with their code."""

import copy
import inspect
import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.image_processor import PipelineImageInput
from diffusers.loaders import ModularIPAdapterMixin, StableDiffusionLoraLoaderMixin
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines import modular_pipeline_utils as utils
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.utils import logging
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from ..modeling_kosmos_g import KosmosGTextEncoder
from ..pipeline_kosmos_g import MODULES, KosmosGPipeline
from ..processing_kosmos_g import KosmosGTokenizer

# what saved blocks carry; they are loaded from the last, which imports all: diffusers copies what a file imports, no further
FILES = (*MODULES, "modular_pipeline", "encoders", "before_denoise", "denoise", "decoders", "modular_blocks")
CLASSES = {"text_encoder": KosmosGTextEncoder, "tokenizer": KosmosGTokenizer}
# their stead in an index that diffusers alone reads: these find the code next to the weights
AUTO_CLASSES = {"text_encoder": ("diffusers", "AutoModel"), "tokenizer": ("transformers", "AutoTokenizer")}
COMPONENTS = CLASSES | {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "scheduler": DDIMScheduler}
COMPONENTS |= {"controlnet": ControlNetModel, "guider": ClassifierFreeGuidance}
COMPONENTS |= {"image_encoder": CLIPVisionModelWithProjection, "feature_extractor": CLIPImageProcessor}
FROM_CONFIG = {"config": FrozenDict({"guidance_scale": 7.5}), "default_creation_method": "from_config"}
# type and meaning of what diffusers' templates do not know, or know otherwise; None is the default
VALUES = {
    "prompt": (Any, "A string with a <i> per image, a list of strings and images, chat content, or a batch."),
    "images": (list, "The images of the <i> marks: a list for one prompt, a list of lists for a batch."),
    "negative_prompt": (Any, "One for all prompts or a list with one for each, in any form that prompt has."),
    "negative_images": (list, "What images is, for the negative prompt."),
    "cross_attention_kwargs": (dict, "For the attention processors; scale is that of LoRA layers."),
    "clip_skip": (int, "Number of AlignerNet query layers to leave out at the end, for the prompt."),
    "prompt_embeds": (torch.Tensor, "(B, 77, 768), from the input step on (N, 77, 768)."),
    "negative_prompt_embeds": (torch.Tensor, "Like prompt_embeds, or None without guidance."),
    "ip_adapter_image": (PipelineImageInput, "An image, or a list with one for each IP-Adapter."),
    "ip_adapter_embeds": (
        list,
        "(1 or B, images, ...) for each IP-Adapter, from the input step on (N, ...).",
    ),
    "negative_ip_adapter_embeds": (list, "Like ip_adapter_embeds, or None without guidance."),
    "strength": (float, "Share of the steps that is drawn: 0.8 by default, 1 for inpainting."),
    "latent_timestep": (torch.Tensor, "(N,) the first timestep, whose noise is added."),
    "image_latents": (torch.Tensor, "(images, 4, h, w) of the image to be changed."),
    "mask": (torch.Tensor, "(images, 1, H, W), 1 where something is to be drawn; at last (N, 1, h, w)."),
    "masked_image": (torch.Tensor, "(images, 3, H, W), the image where the mask is 0."),
    "masked_image_latents": (torch.Tensor, "(N, 4, h, w), or given in place of masked_image."),
    "crops_coords": (tuple, "The part that padding_mask_crop has cut out, or None."),
    "controlnet_conditioning_scale": (float, "One, or a list: 1 by default, 0.8 or 0.5 with image or mask."),
}


def component_of(name: str) -> utils.ComponentSpec:
    """A component by its name; a guider is made, the others are loaded."""
    return utils.ComponentSpec(name, COMPONENTS[name], **(FROM_CONFIG if name == "guider" else {}))


def input_of(word: str) -> utils.InputParam:
    """An input by its name; "name!" is required, "name?" is not, else diffusers' template decides."""
    name = word.rstrip("?!")
    kind, text = VALUES.get(name, (None, None))
    settings = {"type_hint": kind, "description": text, "default": None} if text else {}
    settings |= {"required": word.endswith("!")} if word != name else {}
    make = utils.InputParam.template if name in utils.INPUT_PARAM_TEMPLATES else utils.InputParam
    return make(name, **settings)


def output_of(name: str) -> utils.OutputParam:
    """An output by its name. Embeddings are for the loop, whose guider chooses among them."""
    if name in utils.OUTPUT_PARAM_TEMPLATES and name not in VALUES:
        return utils.OutputParam.template(name)
    kind = "denoiser_input_fields" if name.endswith("_embeds") else None
    return utils.OutputParam(name, *VALUES.get(name, (None, "")), kind)


def ordinary(components: Any, values: Any) -> KosmosGPipeline:
    """The ordinary pipeline of the task that `values` say, around a modular one's components: for its checks and methods."""
    given = {name for name, value in values.as_dict().items() if value is not None}
    task = "Img2Img" if given & {"image", "image_latents"} else ""
    task = "Inpaint" if given & {"mask_image", "mask"} else task
    control = "ControlNet" if given & {"control_image", "controlnet_cond"} else ""
    pipeline_class = getattr(sys.modules[KosmosGPipeline.__module__], f"KosmosG{control}{task}Pipeline")
    names = COMPONENTS.keys() - {"guider"} - (set() if control else {"controlnet"})
    parts = {name: getattr(components, name, None) for name in names}
    return pipeline_class(**parts, safety_checker=None, requires_safety_checker=False)


class KosmosGModularPipeline(ModularPipeline, StableDiffusionLoraLoaderMixin, ModularIPAdapterMixin):
    """diffusers' `ModularPipeline` of `KosmosGAutoBlocks`, or of `blocks`. Its guider, a component, has the guidance scale."""

    default_blocks_name = "KosmosGAutoBlocks"
    default_blocks: type[ModularPipelineBlocks]  # that class; its file says so, which imports this one

    def __init__(self, blocks: ModularPipelineBlocks | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(self.default_blocks() if blocks is None else blocks, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, trust_remote_code: bool = False, **kwargs: Any
    ) -> Self:
        """As diffusers', from a modular or an ordinary folder. Its own blocks are taken with `trust_remote_code=True` alone."""
        folder, blocks = str(pretrained_model_name_or_path), None
        if trust_remote_code:
            with suppress(OSError):  # no modular_config.json
                blocks = ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True, **kwargs)
        return cls(blocks, folder, **kwargs)

    @staticmethod
    def _dict_to_component_spec(name, spec_dict):
        """As diffusers', but our components' classes are the installed ones, and parts that a folder lacks are not looked for."""
        if name in CLASSES:
            spec_dict = {**spec_dict, "type_hint": (CLASSES[name].__module__, CLASSES[name].__name__)}
        spec = ModularPipeline._dict_to_component_spec(name, spec_dict)
        is_missing = spec.type_hint is None and "repo" in spec_dict
        return utils.ComponentSpec(name, COMPONENTS.get(name)) if is_missing else spec

    def load_components(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers', in float32 without `dtype`: transformers alone would take that of the file."""
        dtype = {} if "torch_dtype" in kwargs else {"dtype": torch.float32}
        super().load_components(*args, **dtype | kwargs)

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As `KosmosGPipeline.load_lora_weights`, with its spellings and errors."""
        ordinary(self, BlockState()).load_lora_weights(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As diffusers', but the folder gets the blocks with their code as well, and loads with diffusers alone."""
        kwargs.setdefault("overwrite_modular_index", True)
        if isinstance(self._blocks, KosmosGBlock):
            self._blocks.save_pretrained(save_directory)
        super().save_pretrained(str(save_directory), *args, **kwargs)

    def save_config(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As diffusers', but the index names what diffusers alone finds."""
        super().save_config(save_directory, *args, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text(encoding="utf-8")) | {"_class_name": ModularPipeline.__name__}
        for name, hint in AUTO_CLASSES.items():
            if name in index:
                index[name] = [*hint, {**index[name][2], "type_hint": hint}]
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class KosmosGBlock:
    """What a block has next to what diffusers' class gives it: its description, its pipeline, saving with its code."""

    model_name = "kosmos-g"
    _requirements = {"diffusers": ">=0.40", "transformers": ">=5.4"}
    description = property(lambda self: inspect.getdoc(type(self)).partition("\n\n")[0])

    def init_pipeline(self, *args: Any, **kwargs: Any) -> KosmosGModularPipeline:
        """A `KosmosGModularPipeline` of this block; arguments as diffusers'."""
        return KosmosGModularPipeline(copy.deepcopy(self), *args, **kwargs)

    # not save_pretrained, which calls this: diffusers writes the name of the class that defines it as the base class
    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As diffusers', but the folder gets the code as well, which diffusers leaves to the user to copy."""
        folder, here, own = Path(save_directory), Path(__file__).resolve().parent, type(self)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source = next(path for place in (here, here.parent) if (path := place / f"{name}.py").is_file())
            code = re.sub(r"^(\s*from )\.\.(?=\w)", r"\1.", source.read_text(encoding="utf-8"), flags=re.M)
            (folder / source.name).write_text(code, encoding="utf-8")
        if list(self.sub_blocks) != list(getattr(own, "block_names", ())):
            logging.get_logger(__name__).warning(
                "A class of blocks is saved, without what was put in or taken out."
            )
        if own.__module__.rpartition(".")[0] == __package__:
            name = own.__name__.replace("KosmosGSequentialBlocks", KosmosGModularPipeline.default_blocks_name)
            self.register_to_config(auto_map={"ModularPipelineBlocks": f"{FILES[-1]}.{name}"})
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """As diffusers' loops have it, for the loops within as well."""
        for block in (super(), *self.sub_blocks.values()):
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(**kwargs)


class KosmosGStep(KosmosGBlock, ModularPipelineBlocks):
    """A block that is not made of others: what it needs, takes and gives, and a `run` that works on the values by name."""

    needs, takes, gives = "", "", ""  # names: of components, inputs, outputs
    expected_components = property(lambda self: [*map(component_of, self.needs.split())])
    inputs = property(lambda self: [*map(input_of, self.takes.split())])
    intermediate_outputs = property(lambda self: [*map(output_of, self.gives.split())])

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        values = self.get_block_state(state)
        self.run(components, ordinary(components, values), values)
        self.set_block_state(state, values)
        return components, state


class KosmosGSequentialBlocks(KosmosGBlock, SequentialPipelineBlocks):
    """Blocks in a row. Before the first, ValueError names a missing component; a feature extractor has a default."""

    def get_execution_blocks(self, **kwargs: Any) -> "KosmosGSequentialBlocks":
        """As diffusers', of this class."""
        return KosmosGSequentialBlocks.from_blocks_dict(super().get_execution_blocks(**kwargs).sub_blocks)

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        given = {name: value for name, value in state.values.items() if value is not None}
        needed = self.get_execution_blocks(**given).component_names
        there = {name for name in needed if getattr(components, name, None) is not None} | {
            "feature_extractor"
        }
        if missing := [name for name in needed if name not in there]:
            hint = f"pipe.load_components() or pipe.update_components({missing[0]}=...)"
            raise ValueError(f"Components are missing: {', '.join(missing)}. Load or pass them: {hint}.")
        given["ip_adapter_image_embeds"] = given.get("ip_adapter_embeds")
        ordinary(components, BlockState(**given)).check_call(given)
        return super().__call__(components, state)
