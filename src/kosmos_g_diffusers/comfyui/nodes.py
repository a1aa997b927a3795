"""The nodes, in ComfyUI's V3 form. What they do is in `encoder.py`; this module says what they look like."""

import hashlib
import os
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..environment import DTYPES
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


def encoder_input() -> Any:
    return EncoderLink.Input(
        "kosmos_g", tooltip="The Kosmos-G encoder used for encoding the text and the images."
    )


def growing(kind: Any, prefix: str, tooltip: str) -> list[Any]:
    """Optional inputs PREFIX1, PREFIX2, ...; `web/kosmos_g.js` shows those that are connected and one more."""
    return [
        kind.Input(f"{prefix}{number}", optional=True, tooltip=tooltip)
        for number in range(1, MOST_INPUTS + 1)
    ]


def connected(inputs: dict[str, Any], prefix: str) -> list[Any]:
    """The values of connected growing inputs, in the order of their numbers."""
    return [
        inputs[name]
        for name in (f"{prefix}{number}" for number in range(1, MOST_INPUTS + 1))
        if name in inputs
    ]


def model_input() -> Any:
    tooltip = "Optional, only checked: stops a model that takes states of another width, such as SDXL."
    return io.Model.Input("model", optional=True, tooltip=tooltip)


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
        return io.Schema(
            node_id="KosmosGLoader",
            display_name="Load Kosmos-G",
            category=CATEGORY,
            description="Loads Kosmos-G's text encoder, which reads words and images for Stable Diffusion 1.5.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=names,
                    default=names[0],
                    tooltip=(
                        "A folder under models/kosmos_g, as kosmos-g convert writes it. The demo is a small model that draws "
                        "with Load Sprites alone."
                    ),
                ),
                io.String.Input(
                    "hub_id",
                    default="",
                    optional=True,
                    tooltip=("A repository on the Hugging Face Hub, OWNER/NAME, in the place of a folder."),
                ),
                io.Combo.Input(
                    "dtype",
                    options=[AUTO, *DTYPES],
                    default=AUTO,
                    optional=True,
                    tooltip=("auto takes float16 on a GPU and float32 on a CPU."),
                ),
            ],
            outputs=[
                EncoderLink.Output(
                    display_name="KOSMOS_G", tooltip="The encoder, for prompt and image word nodes."
                )
            ],
        )

    @classmethod
    def execute(cls, model_name: str, hub_id: str = "", dtype: str = AUTO) -> io.NodeOutput:
        return io.NodeOutput(work().load(find_model(model_name, hub_id.strip()), dtype))


class KosmosGPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KosmosGPrompt",
            display_name="Kosmos-G Prompt",
            category=CATEGORY,
            description="Encodes a prompt of words and images into a conditioning that can be used to guide the diffusion model.",
            inputs=[
                encoder_input(),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip=(
                        "The text to be encoded, with <i> for each image, in the order of the inputs: <i> in the suit of <i>"
                    ),
                ),
                model_input(),
                *growing(
                    io.Image,
                    "image",
                    "An image for a <i> of the text. A batch is several images in its place.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="A conditioning containing the embedded text and images.")
            ],
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
        return io.Schema(
            node_id="KosmosGNegative",
            display_name="Kosmos-G Negative",
            category=CATEGORY,
            description="Encodes what is to be avoided. Without a text it is the null condition that Kosmos-G was trained with.",
            inputs=[
                encoder_input(),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip=("What is to be avoided; leave it empty for the null condition."),
                ),
                model_input(),
                *growing(
                    io.Image,
                    "image",
                    "An image for a <i> of the text. A batch is several images in its place.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="A conditioning for the negative input of a sampler.")],
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
        return io.Schema(
            node_id="KosmosGImageWord",
            display_name="Image Word",
            category=CATEGORY,
            description="Gives images a name, which prompts behind this node use like a word.",
            inputs=[
                encoder_input(),
                io.String.Input(
                    "name", default="<my-dog>", tooltip="Lower-case letters, digits and hyphens, in <>."
                ),
                io.Image.Input(
                    "images", tooltip="The image; a batch is several, all of which the word means."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip=("How strongly the images act: 1 as they are, 0 not at all."),
                ),
            ],
            outputs=[
                EncoderLink.Output(display_name="KOSMOS_G", tooltip="The encoder, which knows the word.")
            ],
        )

    @classmethod
    def execute(cls, kosmos_g: Any, name: str, images: Any, strength: float) -> io.NodeOutput:
        return io.NodeOutput(work().add_word(kosmos_g, name.strip(), images, strength))


class KosmosGLoadImageWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KosmosGLoadImageWords",
            display_name="Load Image Words",
            category=CATEGORY,
            description="Loads image words from a file that Save Image Words, kosmos-g app or save_image_words wrote.",
            inputs=[
                encoder_input(),
                io.Combo.Input(
                    "words_name",
                    options=folder_paths.get_filename_list(WORDS),
                    tooltip=("A file under models/kosmos_g_words or output/kosmos_g_words."),
                ),
            ],
            outputs=[
                EncoderLink.Output(display_name="KOSMOS_G", tooltip="The encoder, which knows the words.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, words_name: str, **inputs: Any) -> str:
        path = folder_paths.get_full_path(WORDS, words_name)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""

    @classmethod
    def execute(cls, kosmos_g: Any, words_name: str) -> io.NodeOutput:
        return io.NodeOutput(
            work().load_words(kosmos_g, folder_paths.get_full_path_or_raise(WORDS, words_name))
        )


class KosmosGSaveImageWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KosmosGSaveImageWords",
            display_name="Save Image Words",
            category=CATEGORY,
            description="Saves the image words of an encoder to your ComfyUI output directory.",
            inputs=[
                encoder_input(),
                io.String.Input(
                    "filename_prefix", default=f"{WORDS}/words", tooltip="The prefix for the file to save."
                ),
            ],
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
        return io.Schema(
            node_id="KosmosGBlend",
            display_name="Kosmos-G Blend",
            category=CATEGORY,
            description="Mixes conditionings: their weighted mean. A negative weight moves away from one.",
            inputs=[
                io.String.Input(
                    "weights",
                    default="1, 1",
                    tooltip="One number for each conditioning, in their order: 1, 0.5",
                ),
                *growing(io.Conditioning, "conditioning", "A conditioning to be mixed in."),
            ],
            outputs=[io.Conditioning.Output(tooltip="The weighted mean.")],
        )

    @classmethod
    def validate_inputs(cls, weights: str | None = None, **inputs: Any) -> bool | str:
        try:
            read_weights("1" if weights is None else weights, len(connected(inputs, "conditioning")))
        except ValueError as error:
            return weights is None or str(error)
        return True

    @classmethod
    def execute(cls, weights: str, **inputs: Any) -> io.NodeOutput:
        given = connected(inputs, "conditioning")
        mixed = work().blend([states for one in given for states, _ in one[:1]], weights)
        return io.NodeOutput([[mixed, dict(given[0][0][1])]])


class KosmosGSprites(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KosmosGSprites",
            display_name="Load Sprites (demo)",
            category=CATEGORY,
            description="The small model that ships with kosmos-g-diffusers, to try the nodes: it draws 64 pixel sprites.",
            inputs=[],
            outputs=[
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
