"""The nodes, in ComfyUI's V3 form. What they do is in `encoder.py`; this module says what they look like."""

import os
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..environment import DTYPES
from ..files import hash_file
from ..sprites.pretrained import SPRITES
from .checks import AUTO, count_problem, read_weights

MODELS, WORDS = "kosmos_g", "kosmos_g_words"  # folders under models/
DEMO = "sprites (demo, only with its own U-Net)"
MOST_INPUTS = 16  # that a node grows to
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
CATEGORY = "conditioning/Kosmos-G"

for kind in (MODELS, WORDS):
    folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind))
folder_paths.add_model_folder_path(WORDS, os.path.join(folder_paths.get_output_directory(), WORDS))
del kind

EncoderLink = io.Custom("KOSMOS_G")


def schema(
    node: type, display_name: str, description: str, inputs: list, outputs: list, **more: Any
) -> io.Schema:
    texts = {"node_id": node.__name__, "display_name": display_name, "description": description}
    return io.Schema(**texts, category=CATEGORY, inputs=inputs, outputs=outputs, **more)


def encoder_input() -> Any:
    return EncoderLink.Input("kosmos_g", tooltip="The Kosmos-G encoder used for the text and the images.")


def encoder_output(tooltip: str) -> Any:
    return EncoderLink.Output(display_name="KOSMOS_G", tooltip=tooltip)


def prompt_inputs(text_tooltip: str) -> list[Any]:
    model = "Optional, only checked: stops a model that takes states of another width, such as SDXL."
    image = "An image for a <i> of the text. A batch is several images in its place."
    return [
        encoder_input(),
        io.String.Input("text", multiline=True, dynamic_prompts=True, default="", tooltip=text_tooltip),
        io.Model.Input("model", optional=True, tooltip=model),
        *growing(io.Image, "image", image),
    ]


def growing(kind: Any, prefix: str, tooltip: str) -> list[Any]:
    """Optional inputs PREFIX1, PREFIX2, ...; `web/kosmos_g.js` shows those that are connected and one more."""
    return [kind.Input(name, optional=True, tooltip=tooltip) for name in names_of(prefix)]


def connected(inputs: dict[str, Any], prefix: str) -> list[Any]:
    """The values of connected growing inputs, in the order of their numbers."""
    return [inputs[name] for name in names_of(prefix) if name in inputs]


def names_of(prefix: str) -> list[str]:
    return [f"{prefix}{number}" for number in range(1, MOST_INPUTS + 1)]


def model_folders() -> dict[str, str]:
    """Name -> path of every folder under models/kosmos_g, and of folders of that kind elsewhere."""
    places = [Path(place) for place in folder_paths.get_folder_paths(MODELS)]
    folders = [
        folder for place in places if place.is_dir() for folder in sorted(place.iterdir()) if folder.is_dir()
    ]
    return {folder.name: str(folder) for folder in reversed(folders)}


def find_model(name: str, hub_id: str) -> str:
    """Folder or Hub id of what was chosen. No path is taken: whoever may queue a prompt names what is offered."""
    if hub_id and (not HUB_ID.fullmatch(hub_id) or os.path.exists(hub_id)):
        raise ValueError(
            f"hub_id {hub_id[:100]!r} was given. Expected OWNER/NAME, a repository on the Hugging Face Hub."
        )
    folders = model_folders() | {DEMO: SPRITES}
    if not hub_id and name not in folders:
        places = " or ".join(folder_paths.get_folder_paths(MODELS))
        raise ValueError(
            f"There is no model {name[:100]!r}. Put a folder that kosmos-g convert wrote into {places}."
        )
    return hub_id or folders[name]


def work() -> ModuleType:
    """`encoder.py`, imported when a node runs: ComfyUI starts without diffusers."""
    return import_module(".encoder", __package__)


def conditioning(encode: str, encoder: Any, text: str, model: Any, inputs: dict[str, Any]) -> io.NodeOutput:
    if model is not None:
        work().check_model(encoder, model)
    return io.NodeOutput([[getattr(work(), encode)(encoder, text, connected(inputs, "image")), {}]])


class KosmosGLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [*sorted(model_folders()), DEMO]
        folder = "A folder under models/kosmos_g, as kosmos-g convert writes it. The demo draws with Load Sprites alone."
        hub_id = "A repository on the Hugging Face Hub, OWNER/NAME, in the place of a folder."
        dtype = "auto takes float16 on a GPU and float32 on a CPU."
        return schema(
            cls,
            "Load Kosmos-G",
            "Loads Kosmos-G's text encoder, which reads words and images for Stable Diffusion 1.5.",
            [
                io.Combo.Input("model_name", options=names, default=names[0], tooltip=folder),
                io.String.Input("hub_id", default="", optional=True, tooltip=hub_id),
                io.Combo.Input("dtype", options=[AUTO, *DTYPES], default=AUTO, optional=True, tooltip=dtype),
            ],
            [encoder_output("The encoder, for prompt and image word nodes.")],
        )

    @classmethod
    def execute(cls, model_name: str, hub_id: str = "", dtype: str = AUTO) -> io.NodeOutput:
        return io.NodeOutput(work().load(find_model(model_name, hub_id.strip()), dtype))


class KosmosGPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            cls,
            "Kosmos-G Prompt",
            "Encodes a prompt of words and images into a conditioning that can be used to guide the diffusion model.",
            prompt_inputs("The text to be encoded, with <i> for each image, in the order of the inputs."),
            [io.Conditioning.Output(tooltip="A conditioning containing the embedded text and images.")],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None, **inputs: Any) -> bool | str:
        # a text that is connected is not known yet
        return text is None or count_problem(text, len(connected(inputs, "image"))) or True

    @classmethod
    def execute(cls, kosmos_g: Any, text: str, model: Any = None, **images: Any) -> io.NodeOutput:
        return conditioning("encode", kosmos_g, text, model, images)


class KosmosGNegative(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            cls,
            "Kosmos-G Negative",
            "Encodes what is to be avoided. Without a text it is the null condition that Kosmos-G was trained with.",
            prompt_inputs("What is to be avoided; leave it empty for the null condition."),
            [io.Conditioning.Output(tooltip="A conditioning for the negative input of a sampler.")],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None, **inputs: Any) -> bool | str:
        n_images = len(connected(inputs, "image"))
        return text is None or count_problem(text, n_images, marks_are_text=True) or True

    @classmethod
    def execute(cls, kosmos_g: Any, text: str = "", model: Any = None, **images: Any) -> io.NodeOutput:
        return conditioning("encode_negative", kosmos_g, text, model, images)


class KosmosGImageWord(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        name, images = (
            "Lower-case letters, digits and hyphens, in <>.",
            "The image; a batch is several for one word.",
        )
        strength = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05}
        strength["tooltip"] = "How strongly the images act: 1 as they are, 0 not at all."
        return schema(
            cls,
            "Image Word",
            "Gives images a name, which prompts behind this node use like a word.",
            [
                encoder_input(),
                io.String.Input("name", default="<my-dog>", tooltip=name),
                io.Image.Input("images", tooltip=images),
                io.Float.Input("strength", **strength),
            ],
            [encoder_output("The encoder, which knows the word.")],
        )

    @classmethod
    def execute(cls, kosmos_g: Any, name: str, images: Any, strength: float) -> io.NodeOutput:
        return io.NodeOutput(work().add_word(kosmos_g, name.strip(), images, strength))


class KosmosGLoadImageWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [name for name in folder_paths.get_filename_list(WORDS) if name.endswith(".safetensors")]
        file = "A file under models/kosmos_g_words or output/kosmos_g_words."
        return schema(
            cls,
            "Load Image Words",
            "Loads image words from a file that Save Image Words, kosmos-g app or save_image_words wrote.",
            [encoder_input(), io.Combo.Input("words_name", options=names, tooltip=file)],
            [encoder_output("The encoder, which knows the words.")],
        )

    @classmethod
    def fingerprint_inputs(cls, words_name: str, **inputs: Any) -> str:
        path = folder_paths.get_full_path(WORDS, words_name)
        return hash_file(path) if path else ""

    @classmethod
    def execute(cls, kosmos_g: Any, words_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(WORDS, words_name)
        return io.NodeOutput(work().load_words(kosmos_g, path))


class KosmosGSaveImageWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        prefix = {"default": f"{WORDS}/words", "tooltip": "The prefix for the file to save."}
        return schema(
            cls,
            "Save Image Words",
            "Saves the image words of an encoder to your ComfyUI output directory.",
            [encoder_input(), io.String.Input("filename_prefix", **prefix)],
            [],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, kosmos_g: Any, filename_prefix: str) -> io.NodeOutput:
        output = folder_paths.get_output_directory()
        folder, name, counter, *_ = folder_paths.get_save_image_path(filename_prefix, output)
        work().save_words(kosmos_g, Path(folder) / f"{name}_{counter:05}_.safetensors")
        return io.NodeOutput()


class KosmosGBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        weights = "One number for each conditioning, in their order: 1, 0.5"
        return schema(
            cls,
            "Kosmos-G Blend",
            "Mixes conditionings: their weighted mean. A negative weight moves away from one.",
            [
                io.String.Input("weights", default="1, 1", tooltip=weights),
                *growing(io.Conditioning, "conditioning", "A conditioning to be mixed in."),
            ],
            [io.Conditioning.Output(tooltip="The weighted mean.")],
        )

    @classmethod
    def validate_inputs(cls, weights: str | None = None, **inputs: Any) -> bool | str:
        try:
            return weights is None or bool(read_weights(weights, len(connected(inputs, "conditioning"))))
        except ValueError as error:
            return str(error)

    @classmethod
    def execute(cls, weights: str, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(work().blend(connected(inputs, "conditioning"), weights))


class KosmosGSprites(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            cls,
            "Load Sprites (demo)",
            "The small model that ships with kosmos-g-diffusers, to try the nodes: it draws 64 pixel sprites.",
            [],
            [
                io.Model.Output(tooltip="Its U-Net, which the small encoder alone fits."),
                io.Vae.Output(tooltip="Its VAE: 4 pixels a latent, so Empty Latent Image takes 128 x 128."),
                io.ControlNet.Output(tooltip="Its ControlNet, for canny edges."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from .sprites import load_sprites

        return io.NodeOutput(*load_sprites())


class KosmosGExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            *(KosmosGLoader, KosmosGPrompt, KosmosGNegative, KosmosGImageWord),
            *(KosmosGLoadImageWords, KosmosGSaveImageWords, KosmosGBlend, KosmosGSprites),
        ]


async def comfy_entrypoint() -> ComfyExtension:
    return KosmosGExtension()
