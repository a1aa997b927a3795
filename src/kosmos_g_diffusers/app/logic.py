"""The app without a page: a visitor's wishes, read, queued, carried out, and told of while they last."""

import asyncio
import base64
import contextlib
import io
import tempfile
import time
from pathlib import Path

import PIL.Image
from safetensors import SafetensorError, safe_open

from ..control.controls import control_image, control_preview, control_size, find_control
from ..generation.png import read_settings
from ..serving.errors import FieldError, at, unexpected
from ..serving.job import Drawing
from ..serving.queue import QueueFull, Worker
from ..serving.session import MAX_WORDS
from ..serving.store import MAX_BYTES, MAX_FILES, check_picture, open_picture
from .form import NO_CONTROL, read_form

POLL = 0.1  # seconds between two looks at a run
PATIENCE = (
    1.0  # seconds after which a look is told even if nothing has changed, or a closed page would go unnoticed
)
CAPACITY = 16  # runs that may wait


class Studio:
    """Args: models: Models. store: Store. capacity: runs that may wait for the one that is running."""

    def __init__(self, models, store, capacity=CAPACITY):
        self.models, self.store = models, store
        self.worker = Worker(capacity, "drawing")
        self.annotating = Worker(capacity, "control images")  # on the CPU, beside the drawing

    def start(self):
        """Begin to load the default model; returns at once."""
        self.models.state = "loading"
        self.worker.submit(lambda ticket: self.models.load(self.models.default))

    def close(self):
        self.worker.close()
        self.annotating.close()

    # Runs ------------------------------------------------------------------------------------------------------

    async def draw(self, session, form):
        """Yield the ticket of a run whenever there is news of it; the last time it has ended well or was cancelled.

        Raises:
            FieldError: what was asked for cannot be done.
        """
        model = form.model or self.models.default
        settings = read_form(form, self.models, session.words_of(model))
        job = Drawing(
            self.models,
            self.store,
            settings,
            self._find(settings.images, "pictures"),
            self._find([control.picture for control in settings.controls], "controls"),
            self._find(settings.image_words, "words"),
        )
        ticket = self._submit(self.worker, job, "run")
        session.ticket = ticket
        try:
            async for _ in _news(ticket):
                yield ticket
            written = ticket.progress.images if ticket.progress else ()
            session.remember(ticket.result or written)
            _raise_error_of(ticket, "run")
            yield ticket
        finally:
            ticket.cancel()  # when the page was closed in the middle; nothing happens when the run has ended

    def cancel(self, session):
        """Give up the visitor's run; what it has finished stays. Returns whether there was one."""
        if session.ticket is None or session.ticket.ended.is_set():
            return False
        session.ticket.cancel()
        return True

    def _find(self, files, field):
        found = [self.store.find(file) for file in files]
        if None in found:
            raise FieldError(field, "A picture of this run is no longer on the server. Drop it again.")
        return found

    def _submit(self, worker, job, field):
        try:
            return worker.submit(job)
        except QueueFull as error:
            raise FieldError(field, str(error)) from error

    async def _carry_out(self, worker, job, field):
        """Wait for a job that has no progress to tell; returns its result."""
        ticket = self._submit(worker, job, field)
        try:
            async for _ in _news(ticket):
                pass
            _raise_error_of(ticket, field)
            return ticket.result
        finally:
            ticket.cancel()

    # Controls --------------------------------------------------------------------------------------------------

    def read_control(self, field, kind, path, strokes, ready):
        """Keep the picture of a control's slot, with what was painted on it.

        Args:
            path: of an uploaded picture, or None.
            strokes: PNG as a data: URI, or an empty text. For inpaint they are the mask, otherwise black.

        Returns:
            (InputImage or None, whether it is the control image itself)

        Raises:
            FieldError: the picture or the strokes cannot be read, or inpaint has no strokes.
        """
        if kind == NO_CONTROL:
            return None, ready
        with at(field):
            is_masked = find_control(kind).needs_mask and not ready
        strokes = read_strokes(strokes, field)
        if strokes is None:
            if is_masked:
                raise FieldError(field, "Paint over what is to be filled: the strokes are the mask.")
            return (None if path is None else self.store.keep_picture(path, field)), ready
        picture = PIL.Image.new("RGB", strokes.size, "white") if path is None else open_picture(path, field)
        strokes = strokes.resize(picture.size)
        if is_masked:
            with at(field):
                mask = strokes.point(lambda value: 255 if value > 127 else 0)
                image = control_image(kind, picture.convert("RGB"), mask=mask)
            return self.store.keep_image(control_preview(image)), True
        painted = picture.convert("RGB")
        painted.paste("black", mask=strokes)
        return self.store.keep_image(painted), ready

    async def preview_control(self, field, slot, width, height):
        """PIL image of what a ControlNet would read of a slot.

        Raises:
            FieldError: see `control_image`.
        """
        if slot.kind == NO_CONTROL or slot.picture is None:
            raise FieldError(field, "Choose a kind of control and drop a picture.")
        path = self._find([slot.picture], field)[0]

        def make(ticket):
            with at(field):
                picture = open_picture(path, field)
                if slot.ready:
                    return picture
                side = self._side()
                size = {"height": height or None, "width": width or None, "short_side": side}
                control_size(picture, **size)  # says at once what does not fit
                return control_preview(control_image(slot.kind, picture.convert("RGB"), **size))

        return await self._carry_out(self.annotating, make, field)

    def _side(self):
        pipe = self.models.pipe
        if pipe is None:
            return 512
        side = pipe.unet.config.sample_size
        return (side if isinstance(side, int) else min(side)) * pipe.vae_scale_factor

    # Image words -----------------------------------------------------------------------------------------------

    async def add_word(self, session, model, name, paths):
        """Make pictures a word of the session; returns the word."""
        word = f"<{name.strip().strip('<>').lower()}>"
        if not paths:
            raise FieldError("words", "Drop the picture that the word is to mean.")
        if word == "<>":
            raise FieldError("words", "Give the word a name, such as my-dog.")
        if len(paths) > MAX_FILES:
            raise FieldError("words", f"A word may mean {MAX_FILES} pictures, and {len(paths)} were given.")
        self._check_room(session, [word])

        def make(ticket):
            pictures = [open_picture(path, "words") for path in paths]
            self.models.load(model)
            with self.models.image_words(()) as pipe, at("words"), tempfile.TemporaryDirectory() as folder:
                pipe.add_image_word(word, pictures)
                file = Path(folder) / "word.safetensors"
                pipe.save_image_words(file, [word])
                return self.store.keep_words(file)

        session.words[word] = await self._carry_out(self.worker, make, "words")
        session.models[word] = model
        return word

    async def save_words(self, session, model):
        """Path of a file with the session's words of a model."""
        words = session.words_of(model)
        if not words:
            raise FieldError(
                "words", "This session knows no image words of this model. Name a picture first."
            )
        paths = self._find(words.values(), "words")

        def make(ticket):
            self.models.load(model)
            with self.models.image_words(dict.fromkeys(paths)) as pipe, at("words"):
                file = (
                    self.store.folder
                    / "uploads"
                    / f"image-words-{time.strftime('%Y%m%d-%H%M%S')}.safetensors"
                )
                pipe.save_image_words(file, list(words))
                return file

        return await self._carry_out(self.worker, make, "words")

    async def load_words(self, session, model, path):
        """Take the words of a file into the session; returns them."""
        with at("words"):
            if Path(path).stat().st_size > MAX_BYTES:
                raise ValueError(f"This file is larger than {MAX_BYTES // 2**20} MB.")
            try:
                with safe_open(path, framework="pt") as file:
                    names = sorted(file.keys())
            except (OSError, SafetensorError):
                raise ValueError("This is no file of image words. Pass one that was saved here.") from None
        self._check_room(session, names)

        def make(ticket):
            self.models.load(model)
            kept = {}
            with (
                tempfile.TemporaryDirectory() as folder,
                self.models.image_words([path]) as pipe,
                at("words"),
            ):
                for word in names:
                    file = Path(folder) / "word.safetensors"
                    pipe.save_image_words(file, [word])
                    kept[word] = self.store.keep_words(file)
            return kept

        kept = await self._carry_out(self.worker, make, "words")
        session.words.update(kept)
        session.models.update(dict.fromkeys(kept, model))
        return list(kept)

    def _check_room(self, session, names):
        taken = [name for name in names if name in session.words]
        if taken:
            raise FieldError(
                "words", f"{taken[0]} is an image word already. Take another name, or forget it first."
            )
        if len(session.words) + len(names) > MAX_WORDS:
            raise FieldError(
                "words", f"A session may have {MAX_WORDS} image words. Save and forget some first."
            )

    # Settings of an image --------------------------------------------------------------------------------------

    def restore(self, session, path):
        """Settings of a PNG that was made here, and the paths of what can be found again.

        Returns:
            (settings, paths of pictures, paths of the controls' pictures or None for each, notes for the visitor)

        Raises:
            FieldError: no such PNG.
        """
        check_picture(path, "restore")
        try:
            settings = read_settings(path)
        except ValueError as error:
            reason = str(error).partition("carries no settings")
            raise FieldError(
                "restore",
                "This PNG carries no settings. Drop one that was made here or with kosmos-g generate."
                if reason[1]
                else "The settings of this file cannot be read. Drop a PNG that was made here.",
            ) from error
        notes = []
        if settings.model is None and not self.models.is_builtin(self.models.default):
            notes.append("It was made with the small model that ships, which is not offered here.")
        pictures = [self.store.find(picture) for picture in settings.images]
        controls = [self.store.find(control.picture) for control in settings.controls]
        lost = sum(found is None for found in (*pictures, *controls))
        if lost:
            notes.append(f"{lost} of its pictures are not on this server: drop them again.")
        for what, name, offered in (
            ("model", settings.model, self.models.models),
            ("U-Net", settings.unet, self.models.unets),
            ("LoRA", settings.lora, self.models.loras),
        ):
            if name is not None and name not in offered:
                notes.append(f"Its {what} is not offered here.")
        if any(control.controlnet for control in settings.controls):
            notes.append("It was made with a ControlNet of its own, which is not offered here.")
        self._restore_words(session, settings, notes)
        return settings, [found for found in pictures if found], controls, notes

    def _restore_words(self, session, settings, notes):
        for file in settings.image_words:
            path = self.store.find(file)
            if path is None:
                notes.append("An image word of it is not on this server: load or make it again.")
                continue
            with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as opened:
                for word in opened.keys():
                    if word not in session.words and len(session.words) < MAX_WORDS:
                        session.words[word] = file
                        session.models[word] = settings.model or self.models.default


async def _news(ticket):
    """Come back whenever something about a ticket has changed, and at least every second, until it has ended."""
    told, at_time = None, 0.0
    while not ticket.ended.is_set():
        news = (ticket.state, ticket.place, ticket.progress)
        if news != told or time.monotonic() - at_time > PATIENCE:
            told, at_time = news, time.monotonic()
            yield news
        await asyncio.sleep(POLL)


def _raise_error_of(ticket, field):
    if ticket.error is None:
        return
    if isinstance(ticket.error, FieldError):
        raise ticket.error
    raise FieldError(field, unexpected(ticket.error)) from ticket.error


def read_strokes(text, field):
    """PNG as a data: URI -> L image, light where something was painted; None for nothing.

    Raises:
        FieldError: anything else.
    """
    head, _, body = (text or "").partition(",")
    if not body:
        return None
    try:
        if head != "data:image/png;base64":
            raise ValueError(head)
        file = io.BytesIO(base64.b64decode(body, validate=True))
    except ValueError:
        raise FieldError(field, "The strokes did not arrive as a PNG. Paint them again.") from None
    alpha = open_picture(file, field).convert("RGBA").getchannel("A")
    return alpha if alpha.getbbox() else None
