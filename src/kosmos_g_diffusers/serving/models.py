"""The models, U-Nets and LoRAs that the app offers, and the pipeline made of those that a run asks for.

A client chooses by name out of what was found in the given folders when the app started; names are never paths.
"""

import contextlib
import gc
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..control.table import CONTROLS
from ..environment import check_device, default_device, default_dtype
from ..files import read_json
from ..generation import memory
from ..generation.schedulers import make_scheduler
from ..generation.settings import GenerationSettings
from ..quantization import check_library
from ..sprites.pretrained import SPRITES, SPRITES_CONTROL, with_small_model
from .errors import FieldError, at
from .libraries import controlling, drawing

if TYPE_CHECKING:
    from ..pipeline_kosmos_g import KosmosGControlNetPipeline, KosmosGPipeline
    from .preview import LatentPreview

logger = logging.getLogger(__name__)

BUILTIN = "sprites"  # what there is without a folder; settings call it None
OWN = "the model's own"  # choice of U-Net and of scheduler
NO_LORA = "none"
CONTROLNETS_KEPT = 3  # in memory after a run
SMALL_SIDE = 128  # pixels; models that draw no more take sprites as examples, not photos


class Models:
    """What is offered, by name; and what is loaded, which only the thread that draws may touch.

    Args:
        model_folders: Kosmos-G folders; none of them means the small model that needs no folder.
        lora_folder: of .safetensors files.
        unet_folder: of folders in diffusers' format.
        device, dtype, quantize: of every model, as settings name them; None takes the accelerator if there is one, and what
            suits it.
        memory_flag: what `memory.read_flag` read; each model is planned when it is loaded.
        must_exist: without it a model that is not there is an error when it is loaded, and may be there by then.

    Raises:
        ValueError: a folder that is not there.
        ImportError: the library that `quantize` needs is not installed.
    """

    models: dict[str, Path | None]
    loras: dict[str, Path | None]
    unets: dict[str, Path | None]
    default: str
    state: str
    problem: str | None
    preview: "LatentPreview | None"
    pipe: "KosmosGPipeline | None"

    def __init__(
        self,
        model_folders: Sequence[str | Path] = (),
        lora_folder: str | Path | None = None,
        unet_folder: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        must_exist: bool = True,
        quantize: str | None = None,
        memory_flag: str | float | None = None,
    ):
        check_library(quantize or "none")
        self._device, self._memory = device, memory_flag
        self._given = {"dtype": dtype, "quantize": quantize}
        self._plan = None  # of the model that is loaded
        folders = [_folder(path, "model") if must_exist else Path(path).resolve() for path in model_folders]
        for folder in folders if must_exist else ():
            _check_model(folder)
        self.models = _by_name(folders) or {BUILTIN: None}
        loras = sorted(_folder(lora_folder, "LoRA").glob("*.safetensors")) if lora_folder else []
        self.loras = {NO_LORA: None, **_by_name(loras)}
        unets = sorted(_folder(unet_folder, "U-Net").iterdir()) if unet_folder else []
        self.unets = {OWN: None, **_by_name(folder for folder in unets if folder.is_dir())}
        self.default = next(iter(self.models))
        self.state = "waiting"  # then "loading", then "ready" or "failed"
        self.problem = None  # why it failed
        self.preview = None  # LatentPreview of the loaded VAE
        self.pipe = None
        self._model = self._unet = None  # names of what is loaded
        self._loras = ()
        self._own_unet = self._own_scheduler = None
        self._vision_cache = None
        self._controlnets = OrderedDict()  # kind of control -> ControlNet

    @property
    def device(self) -> str:
        if self._device is None:
            drawing()  # torch, which knows
            self._device = default_device()
        return self._device

    @property
    def dtype(self) -> str:
        """Of the loaded model, or before one is loaded of those to come."""
        plan = self._plan  # another thread may load a model meanwhile
        return plan.dtype if plan else self._given["dtype"] or default_dtype(self.device)

    @property
    def quantize(self) -> str:
        """As `dtype`: how the weights of the text encoder are held."""
        plan = self._plan
        return plan.quantize if plan else self._given["quantize"] or "none"

    def is_builtin(self, name: str) -> bool:
        """Whether this is the small model that needs no folder."""
        return self.models[name] is None

    def is_small(self, name: str) -> bool:
        """Whether a model draws images so small that sprites suit it."""
        side = self.own_side(name)
        return self.models[name] is None or (side is not None and side <= SMALL_SIDE)

    def own_side(self, name: str) -> int | None:
        """Pixels a side of what a model draws unless it is told otherwise, by its configuration; None if that cannot be read."""
        folder = Path(self.models[name] or SPRITES)
        try:
            unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
            return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def controls(self, name: str) -> tuple[str, ...]:
        """Kinds of control that there are ControlNets for, with a model."""
        return (SPRITES_CONTROL,) if self.is_builtin(name) else tuple(CONTROLS)

    def vision_cache_count(self, name: str) -> int:
        """The `hits` or `misses` of the cache of vision states."""
        return getattr(self._vision_cache, name, 0)

    def short_side(self) -> int:
        """Pixels of the shorter side of what the loaded model draws unless it is told otherwise."""
        pipe = self.pipe  # another thread may load a model meanwhile
        return 512 if pipe is None else min(drawing().own_size(pipe))

    def load(self, name: str | None = None) -> None:
        """Load a model in the place of the loaded one; None is the first that is offered. After a FieldError none is loaded."""
        name = name or self.default
        if name == self._model:
            return
        self.state, self.pipe, self.preview, self._model = "loading", None, None, None
        self._own_unet = self._own_scheduler = self._unet = self._plan = None
        self._loras = ()
        self._controlnets.clear()
        try:
            with at("model"):
                drawing()
                # these need torch
                from ..modeling_kosmos_g import VisionCache
                from .preview import LatentPreview

                check_device(self.device)
                source = self.models[name] or SPRITES
                try:
                    _check_model(Path(source))
                    self._plan_memory(source)
                    pipe = drawing().load_model(source, self.dtype, self.quantize)
                except (OSError, ValueError) as error:  # users know it by its name
                    reason = str(error).replace(str(source), name)
                    raise ValueError(f"The model {name!r} cannot be loaded: {reason}") from error
                drawing().place(pipe, self.device, self._offload)
                if self._vision_cache is None:  # one for all models, in turn
                    self._vision_cache = VisionCache(drawing().VISION_CACHE_BYTES)
                pipe.vision_cache = self._vision_cache
                self.preview = LatentPreview(pipe.vae)
        except FieldError as error:
            self.state, self.problem = "failed", error.message
            raise
        self._own_unet, self._own_scheduler = pipe.unet, pipe.scheduler
        self.pipe, self._model, self._unet = pipe, name, OWN
        self.state, self.problem = "ready", None

    def prepare(self, settings: "GenerationSettings") -> "KosmosGPipeline | KosmosGControlNetPipeline":
        """The pipeline that draws these settings, whose model, U-Net and LoRA are names of what is offered.

        Raises:
            FieldError: something of it cannot be loaded or does not fit; the next run finds things as they were.
        """
        self.load(settings.model)
        self._set_unet(settings.unet or OWN)
        self._set_loras(settings.all_loras)
        pipe = self.pipe
        if settings.controls:
            with at("controls"):
                pipe = drawing().pipeline_for(pipe, settings, self._find_controlnets(settings))
                pipe.check_widths()
        else:
            pipe = drawing().pipeline_for(pipe, settings)
        if settings.scheduler is None:
            pipe.scheduler = self._own_scheduler
        else:
            pipe.scheduler = make_scheduler(settings.scheduler, self._own_scheduler.config)
        if self._offload != "none":  # parts that came since have no hooks
            drawing().place(pipe, self.device, self._offload)
        return pipe

    @property
    def _offload(self):
        return "none" if self._plan is None else self._plan.offload

    def _plan_memory(self, source):
        """Choose how the model of a folder is held, for a run with two images and a ControlNet."""
        gc.collect()  # of the model before, whose hooks hold it
        budget = memory.find_budget(self._memory, self.device)
        if budget is not None:
            asked = GenerationSettings(
                "", model=str(source), device=self.device, dtype=self.dtype, quantize=self.quantize
            )
            fixed = [name for name, value in self._given.items() if value is not None]
            self._plan = memory.plan_memory(asked, budget, fixed=fixed, images=2, controls=1)
            logger.warning("%s", self._plan)

    def _set_unet(self, name):
        if name == self._unet:
            return
        self._set_loras(())
        with at("unet"):
            if name == OWN:
                unet = self._own_unet
            else:
                path = self.unets[name]
                try:
                    unet = self._placed(drawing().load_unet(path, self._own_unet))
                except ValueError as error:
                    raise ValueError(str(error).replace(str(path), name)) from error
            if unet.config.cross_attention_dim != self._own_unet.config.cross_attention_dim:
                raise ValueError(
                    f"The U-Net {name!r} reads states of width {unet.config.cross_attention_dim}, the model gives "
                    f"{self._own_unet.config.cross_attention_dim}. Choose a U-Net made for the same Stable Diffusion."
                )
            self.pipe.register_modules(unet=unet)
        self._unet = name

    def _set_loras(self, loras):
        """LoraInputs, whose paths are names of what is offered."""
        names, scales = tuple(lora.path for lora in loras), [float(lora.scale) for lora in loras]
        if names == self._loras:
            if names:
                self.pipe.set_adapters(drawing().adapter_names(len(names)), scales)
            return
        if self._loras:
            self.pipe.unload_lora_weights()
            self._loras = ()
        found = [replace(lora, path=str(self.loras[lora.path])) for lora in loras]
        with at("lora"):
            try:
                drawing().add_loras(self.pipe, found)
            except ValueError as error:  # users know them by their names
                if len(found) > 1:
                    self.pipe.unload_lora_weights()
                text = str(error)
                for name, lora in zip(names, found, strict=True):
                    text = text.replace(lora.path, name)
                raise ValueError(text) from error
        self._loras = names

    def _placed(self, model):
        return model.to(self.device) if self._offload == "none" else model

    def _find_controlnets(self, settings):
        found = []
        for control in with_small_model(settings).controls:
            if control.name not in self._controlnets:
                source, dtype = control.controlnet or control.name, self._own_unet.dtype
                loaded = controlling().load_controlnet(source, dtype)
                self._controlnets[control.name] = self._placed(loaded)
            self._controlnets.move_to_end(control.name)
            found.append(self._controlnets[control.name])
        while len(self._controlnets) > max(CONTROLNETS_KEPT, len(found)):
            self._controlnets.popitem(last=False)
        return found

    @contextlib.contextmanager
    def image_words(self, model: str, paths: Sequence[str | Path] = ()) -> "Iterator[KosmosGPipeline]":
        """The pipeline of a model, which knows the image words of files as long as the block lasts: no session shares them.

        Raises:
            FieldError: the model or the words cannot be loaded, or a mistake in the block.
        """
        self.load(model)
        before = set(self.pipe.image_words)
        try:
            with at("words"):
                for path in dict.fromkeys(paths):
                    self.pipe.load_image_words(path)
                yield self.pipe
        finally:
            for word in set(self.pipe.image_words) - before:
                self.pipe.remove_image_word(word)


def _folder(path, what):
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(path)!r} to look for a {what} in. Pass one that is there.")
    return folder.resolve()


def _check_model(folder):
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"There is no model in {str(folder)!r}. Pass what kosmos-g convert wrote.")


def _by_name(paths):
    """Paths by their last part; where two are called the same, the second is `name (2)`."""
    named = {}
    for path in paths:
        name, count = path.name, 1
        while name in named:
            count += 1
            name = f"{path.name} ({count})"
        named[name] = path
    return named
