"""One run on the worker's thread: from settings to PNGs, with what can be seen of it meanwhile."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..generation.png import maps_path, write_png
from ..provenance import MARKED, Marker
from .errors import FieldError, at
from .images import data_uri, decoding_of, image_file_size, open_image_file, open_square
from .libraries import drawing

if TYPE_CHECKING:
    from ..generation.settings import GenerationSettings
    from .models import Models
    from .queue import Ticket
    from .store import Store

PREVIEWS = 10  # of an image, at most
MAX_SIDE = 1024  # pixels of an image that is drawn here


@dataclass(frozen=True)
class Progress:
    """How far a run is. Replaced as a whole, never changed, so that other threads can read it."""

    phase: str
    step: int = 0  # of the whole run
    steps: int = 0
    images: tuple[Path, ...] = ()  # paths of those that are written
    num_images: int = 1
    seconds_left: float | None = None
    preview: str | None = None  # of the image being drawn, as a data: URI


def finished_images(ticket: "Ticket") -> tuple[Path, ...]:
    """Paths of the images of a run that are written so far."""
    return ticket.progress.images if ticket.progress else ()


class Drawing:
    """The job of a run, called with its ticket, whose progress tells the paths of the images.

    Args:
        models, store: of the app.
        settings: whose model, U-Net and LoRA are names of what `models` offers.
        marker: a `provenance.Marker`.
        maps: also write, next to each image, where the images of its prompt went.

    Raises:
        FieldError: a file that the settings name is not in the store.
    """

    marker: Marker

    models: "Models"
    store: "Store"
    settings: "GenerationSettings"
    reference_images: list[Path]
    control_images: list[Path]
    words: list[Path]
    changed: list[Path]  # the image to change and its mask, where there are any

    maps: bool

    def __init__(
        self,
        models: "Models",
        store: "Store",
        settings: "GenerationSettings",
        marker: Marker = MARKED,
        maps: bool = False,
    ):
        self.models, self.store, self.settings, self.marker = models, store, settings, marker
        self.maps = maps
        self.reference_images = store.find_all(settings.images, "pictures")
        self.control_images = store.find_all([control.picture for control in settings.controls], "controls")
        self.words = store.find_all(settings.image_words, "words")
        changed = [file for file in (settings.init_image, settings.mask) if file is not None]
        self.changed = store.find_all(changed, "init_image")
        store.hold(self, settings.files)

    def __call__(self, ticket: "Ticket") -> None:
        settings, paths = self.settings, []
        ticket.progress = Progress("getting the model ready", num_images=settings.num_images)
        pipe = self.models.prepare(settings)
        # a plan may have chosen otherwise when the model was loaded
        settings = replace(settings, dtype=self.models.dtype, quantize=self.models.quantize)
        try:
            with self.models.image_words(settings.model, self.words):
                arguments = self._read_inputs(pipe)
            ticket.check()
            follow, found = _Follower(ticket, settings, self.models.preview, paths, self.marker), []
            take_maps = (lambda *of_image: found.append(of_image)) if self.maps else None
            with at("run"):
                drawn = drawing().draw_images(pipe, settings, arguments, follow, take_maps=take_maps)
                for image, image_settings in drawn:
                    path = self.store.new_image_path()
                    drawn_here = [(path, image)]
                    for of_image in found:
                        drawn_here.append((maps_path(path), drawing().draw_overlay(image, *of_image)))
                    found.clear()
                    self.store.hold(self, [place for place, _ in drawn_here])
                    for place, content in drawn_here:
                        write_png(content, place, image_settings, marker=self.marker)
                        self.store.count_image(place, image_settings)
                    paths.append(path)
                    follow.image_is_done()
        finally:
            # a run that ends in the middle leaves diffusers' offloading hooks where they were
            pipe.maybe_free_model_hooks()

    def _read_inputs(self, pipe):
        for control, path in zip(self.settings.controls, self.control_images, strict=True):
            if control.ready:  # it decides the size of what is drawn
                check_side("controls", *(image_file_size(path) or (0, 0)))
        # what decides the size of the image
        field = "controls" if self.settings.controls else "init_image" if self.changed else "run"
        with at(field), decoding_of([*self.control_images, *self.changed]):
            # opened here, so that the library's errors name no file of the server
            changed = [open_image_file(path, "init_image") for path in self.changed]
            arguments = drawing().size_arguments(pipe, self.settings, self.control_images, changed)
        check_side(field, arguments["height"], arguments["width"])
        side = pipe.get_processor().image_size
        reference_images = [open_square(path, "pictures", side) for path in self.reference_images]
        with at("negative_prompt"):
            negative = self.settings.negative_prompt or ""
            pipe.get_processor()(negative, marks_are_text=True, name="negative prompt")
        with at("prompt"):
            arguments.update(drawing().prompt_arguments(pipe, self.settings, reference_images, self.maps))
        return arguments


def check_side(field: str, *sides: int) -> None:
    """Raise FieldError for an image that is too large to be drawn here."""
    if max(sides) > MAX_SIDE:
        raise FieldError(
            field,
            f"An image of {max(sides)} pixels a side would be drawn; {MAX_SIDE} are possible. Give a width and a height, or a "
            "smaller image.",
        )


class _Follower:
    """diffusers' callback at the end of each step: stops a run that was cancelled, and says how far it is.

    An exception ends the pipeline at once. Its own `interrupt` would go through the steps that are left without drawing,
    and then decode: seconds on a CPU, for an image that nobody wants.
    """

    def __init__(self, ticket, settings, preview, paths, marker):
        self.ticket, self.settings, self.make_preview, self.paths = ticket, settings, preview, paths
        self.marker = marker
        # of an image; schedulers of second order take more
        self.planned = settings.steps
        if settings.strength is not None:
            self.planned = max(1, int(settings.steps * settings.strength))
        self.started, self.done, self.preview = time.monotonic(), 0, None
        self._tell()

    def __call__(self, pipe, step, timestep, tensors):
        self.ticket.check()
        self.planned = pipe.num_timesteps
        self.done += 1
        if step % max(1, self.planned // PREVIEWS) == 0:
            image = self.make_preview(tensors["latents"])
            self.preview = data_uri(image, marker=self.marker, composite=self.settings.is_composite)
        self._tell()
        return {}

    def image_is_done(self):
        self.preview = None
        self._tell()
        self.ticket.check()

    def _tell(self):
        steps = self.planned * self.settings.num_images
        elapsed = time.monotonic() - self.started
        self.ticket.progress = Progress(
            "drawing",
            min(self.done, steps),
            steps,
            tuple(self.paths),
            self.settings.num_images,
            elapsed / self.done * (steps - self.done) if self.done else None,
            self.preview,
        )
