"""What the page's buttons do: from values of components to the studio and back. No layout here."""

import asyncio
import contextlib
import inspect
import os

import gradio as gr

from ..generation.png import read_settings
from ..serving.errors import FieldError, at
from ..serving.models import NO_LORA, OWN
from ..serving.preview import data_uri
from ..serving.store import MAX_FILES, open_picture, picture_size
from ..sprites.world import IMAGE_SIZE
from . import html as render
from .form import CONTROL_SLOTS, NO_CONTROL, ControlForm, Form, presets

BOARD_SIDE = 768  # pixels of a picture to be painted on
BUILTIN_NOTE = (
    "This small model knows nothing but sprites: one or two shapes in 64 pixels. Photos and other words mean nothing to it. "
    "Start the app with a model (kosmos-g app --model) for more."
)
LARGE_NOTE = (
    f"A picture is larger than the {IMAGE_SIZE} x {IMAGE_SIZE} pixels of a sprite. This small model knows nothing but "
    "sprites: a photo means nothing to it."
)
KNOBS = ("kind", "picture", "strokes", "ready", "scale", "start", "end")  # of a slot of the controls panel


class Actions:
    """Handlers of gradio's events.

    Args:
        studio: Studio.
        message_names: fields that have a place for a message, in the order of the page.
    """

    def __init__(self, studio, message_names):
        self.studio, self.message_names = studio, message_names

    # Errors ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def errors(self, session, field="run"):
        """Give what goes wrong to the page by way of the session, and to a client of the API as its error."""
        session.error = None
        try:
            with at(field):
                yield
        except FieldError as error:
            session.error = error
            # no pop-up: the page shows it beside the field
            raise gr.Error(f"{error.field}: {error.message}", visible=False, print_exception=False) from None

    def show_error(self, session):
        """Messages of all fields: that of the last action beside its field, none elsewhere."""
        error, session.error = session.error, None
        if error is None:  # gradio itself refused a value
            error = FieldError("run", "A value is of the wrong kind or not offered here. Reload the page.")
        field = error.field if error.field in self.message_names else "run"
        return [
            gr.HTML(render.message(error.message) if name == field else "", visible=name == field)
            for name in self.message_names
        ]

    def clear_messages(self):
        return [gr.HTML("", visible=False)] * len(self.message_names)

    # Runs ------------------------------------------------------------------------------------------------------

    def generating(self, names):
        """The handler of a run, whose parameters are called as the fields are: gradio reads that from its signature."""

        async def generate(session, **values):
            """Draw a prompt of words and pictures. Yields how far it is, and at the end the images and their settings.

            Write <i> in the prompt for each of the pictures, which stand in that order. With surprise off, the seed
            decides the images.
            """
            with self.errors(session):
                # in a thread: large pictures take long to copy, and everybody's page waits for this one
                form = await asyncio.to_thread(self.read_form, values)
                async for ticket in self.studio.draw(session, form):
                    wait = self.studio.worker.seconds_until(ticket)
                    yield gr.skip(), gr.skip(), render.run_state(ticket, wait)
                session.shown = list(ticket.result or (ticket.progress.images if ticket.progress else ()))
                session.chosen = session.shown[0] if session.shown else None
                settings = [render.described(read_settings(path)) for path in session.shown]
                yield self.gallery(session.shown), settings, render.run_state(ticket)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, keyword, default=None) for name in ("session", *names)]
        generate.__signature__ = inspect.Signature(parameters)
        return generate

    def read_form(self, values):
        """Values of the fields by name -> Form, with the pictures kept."""
        paths = values["pictures"] or ()
        if len(paths) > MAX_FILES:
            raise FieldError(
                "pictures", f"A prompt may have {MAX_FILES} pictures, and {len(paths)} were given."
            )
        slots = [
            self.read_slot(slot, *(values[f"control_{slot}_{knob}"] for knob in KNOBS))
            for slot in range(1, CONTROL_SLOTS + 1)
            if f"control_{slot}_kind" in values
        ]
        pictures = tuple(self.studio.store.keep_picture(path, "pictures") for path in paths)
        plain = {name: value for name, value in values.items() if not name.startswith("control_")}
        texts = {name: plain[name] or "" for name in ("prompt", "negative_prompt")}
        return Form(**{**plain, **texts, "pictures": pictures, "controls": tuple(slots)})

    def read_slot(self, slot, kind, picture, strokes, ready, scale, start, end):
        kind = kind or NO_CONTROL
        picture, ready = self.studio.read_control(f"control_{slot}", kind, picture, strokes, bool(ready))
        return ControlForm(kind, picture, ready, scale, start, end)

    def gallery(self, paths):
        """Paths of images -> value of a gallery, with their seeds; a file that the user has deleted is left out."""
        return [
            (os.path.relpath(path), f"seed {read_settings(path).seed}") for path in paths if path.is_file()
        ]

    def cancel(self, session):
        """Give up this session's run at once if it waits, and at the end of the step if it is being drawn."""
        return "Cancelling." if self.studio.cancel(session) else "Nothing is running."

    def after_run(self, session):
        """History, and the settings of the first image."""
        return self.gallery(session.history), self.details(session)

    def after_failure(self, session):
        return self.gallery(session.history), ""

    def details(self, session):
        if session.chosen is None or not session.chosen.is_file():
            return ""
        return render.settings_table(read_settings(session.chosen), session.chosen)

    # Results -----------------------------------------------------------------------------------------------------

    def choose(self, session, event: gr.SelectData):
        return self._choose(session, session.shown, event.index)

    def choose_from_history(self, session, event: gr.SelectData):
        return self._choose(session, [path for path in session.history if path.is_file()], event.index)

    def _choose(self, session, paths, index):
        if isinstance(index, int) and 0 <= index < len(paths):
            session.chosen = paths[index]
        return self.details(session)

    def use_as_input(self, session, paths):
        """The pictures of the prompt, and the chosen image behind them."""
        with self.errors(session):
            if session.chosen is None:
                raise FieldError("run", "There is no image yet. Run, then choose one.")
            return [*(paths or ()), os.path.relpath(session.chosen)]

    def restore(self, session, path, names):
        """Values of the fields `names` from a PNG that was made here; a message; the words of the session."""
        with self.errors(session, "restore"):
            if path is None:
                return [*(gr.skip() for _ in names), gr.skip(), gr.skip()]
            settings, pictures, controls, notes = self.studio.restore(session, path)
            models = self.studio.models
            values = {
                "prompt": settings.prompt,
                "pictures": [os.path.relpath(picture) for picture in pictures] or None,
                "negative_prompt": settings.negative_prompt or "",
                "model": settings.model if settings.model in models.models else gr.skip(),
                "unet": settings.unet if settings.unet in models.unets else OWN,
                "lora": settings.lora if settings.lora in models.loras else NO_LORA,
                "width": settings.width or 0,
                "height": settings.height or 0,
                "surprise": False,
                "scheduler": settings.scheduler or OWN,
                **{
                    key: getattr(settings, key)
                    for key in ("lora_scale", "num_images", "steps", "guidance", "seed")
                },
            }
            model = values["model"] if settings.model in models.models else models.default
            if settings.model is None and models.is_builtin(models.default):
                values["model"] = models.default
            offered = models.controls(model) if "control_1_kind" in names else ()
            missing = sorted({control.name for control in settings.controls} - set(offered))
            if missing:
                notes.append(f"Controls that are not offered here: {', '.join(missing)}.")
            for slot in range(1, CONTROL_SLOTS + 1):
                control = settings.controls[slot - 1] if slot <= len(settings.controls) else None
                control = control if control and control.name in offered else None
                picture = controls[slot - 1] if control else None
                empty = {"kind": NO_CONTROL, "ready": False, "scale": 1.0, "start": 0.0, "end": 1.0}
                for knob, value in empty.items():
                    own = "name" if knob == "kind" else knob
                    values[f"control_{slot}_{knob}"] = getattr(control, own) if control else value
                values[f"control_{slot}_strokes"] = ""
                values[f"control_{slot}_picture"] = os.path.relpath(picture) if picture else None
            if len(settings.controls) > CONTROL_SLOTS:
                notes.append(f"It has {len(settings.controls)} controls; the first {CONTROL_SLOTS} are here.")
            note = render.message(" ".join(notes)) if notes else "<div>Its settings are back.</div>"
            return [*(values[name] for name in names), gr.HTML(note, visible=True), self.word_list(session)]

    # Controls, image words, the model --------------------------------------------------------------------------

    def previewing(self, slot):
        """The handler of a slot of the controls panel."""

        async def preview_control(
            session, width=None, height=None, kind=None, picture=None, strokes=None, ready=None
        ):
            """The control image that a ControlNet would read, of a kind of control and a picture.

            Strokes are a PNG as a data: URI, painted on the picture; for inpaint they are the mask.
            """
            field = f"control_{slot}"
            with self.errors(session, field):
                knobs = (kind, picture, strokes, ready, 1.0, 0.0, 1.0)
                form = await asyncio.to_thread(self.read_slot, slot, *knobs)
                return await self.studio.preview_control(field, form, int(width or 0), int(height or 0))

        return preview_control

    def board(self, path):
        """The drawing board with a picture on it."""
        picture = ""
        if path is not None:
            with contextlib.suppress(FieldError):  # said when the control is used
                opened = open_picture(path, "controls")
                opened.thumbnail((BOARD_SIDE, BOARD_SIDE))
                picture = data_uri(opened, side=0)
        return gr.HTML("", picture=picture)

    async def add_word(self, session, model, name=None, pictures=None):
        """Make pictures an image word of this session, to be used in prompts."""
        with self.errors(session, "words"):
            word = await self.studio.add_word(session, model, name or "", pictures or ())
            return self.word_list(session, word)

    async def save_words(self, session, model):
        """A file with all image words of this session."""
        with self.errors(session, "words"):
            return os.path.relpath(await self.studio.save_words(session, model))

    async def load_words(self, session, model, file=None):
        """Take the image words of a file into this session."""
        with self.errors(session, "words"):
            if file is None:
                raise FieldError("words", "No file was given.")
            return self.word_list(session, (await self.studio.load_words(session, model, file))[0])

    def forget_word(self, session, word):
        """Take an image word out of this session; returns one that is left, if there is any."""
        session.forget_word(word)
        return self.word_list(session)

    def word_list(self, session, chosen=None):
        words = list(session.words)
        return gr.Dropdown(choices=words, value=chosen or (words[-1] if words else None))

    def prompt_line(self, session, prompt, paths, model):
        paths, models = paths or (), self.studio.models
        sizes = [picture_size(path) for path in paths] if models.is_builtin(model or models.default) else ()
        is_larger = any(size is not None and max(size) > IMAGE_SIZE for size in sizes)
        return render.prompt_line(prompt or "", paths, session.words, LARGE_NOTE if is_larger else "")

    def preset(self, name, model):
        """Values of a preset that suit a model."""
        return list(presets(self.studio.models.is_small(model or self.studio.models.default))[name].values())

    def example_groups(self, model):
        """Sprites for a small model, photos for any other."""
        is_small = self.studio.models.is_small(model)
        return [gr.Row(visible=is_small is small) for small in (True, False)]

    def model_state(self):
        """Whether the model is loaded; and a timer that asks again as long as it is not."""
        models = self.studio.models
        note = BUILTIN_NOTE if models.is_builtin(models.default) else ""
        html = render.model_state(models.state, models.problem, note)
        return html, gr.Timer(active=models.state in ("waiting", "loading"))
