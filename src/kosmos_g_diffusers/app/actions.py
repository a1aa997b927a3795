"""What the page's buttons do: from values of components to the service and back. No layout here."""

import contextlib
import inspect
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from ..generation.png import maps_path, read_settings
from ..generation.settings import IMAGE_MARK
from ..serving import image_words
from ..serving.access import address_of
from ..serving.errors import FieldError, at
from ..serving.images import (
    MAX_FILES,
    check_image_file,
    data_uri,
    image_file_size,
    open_shrunk,
    read_data_url,
)
from ..serving.job import finished_images
from ..serving.limits import MAX_PROMPT
from ..serving.models import Models
from ..serving.queue import Caller
from ..serving.service import Service
from ..serving.session import Session
from ..serving.store import UPLOADS, Store, on_disk
from ..sprites.pretrained import SPRITES_ONLY
from ..sprites.world import IMAGE_SIZE
from . import html as render
from .blocks import caller
from .examples import placeholder
from .form import (
    NO_CONTROL,
    OTHER_SIZE,
    defaults,
    presets,
    read_control,
    read_values,
    restore_values,
    size_choice,
    sizes,
)

SHOWN = 4  # images of a word, at most
BOARD_SIDE = 768  # pixels of an image to be painted on
BUILTIN_NOTE = f"{SPRITES_ONLY} Start the app with a model (kosmos-g app --model) for more."
REMOVED = "removed: the disk space of the server was used up"
REMOVED_NOTE = "This image was removed: the disk space of the server was used up."
LARGE_NOTE = (
    f"An image is larger than the {IMAGE_SIZE} x {IMAGE_SIZE} pixels of a sprite. This small model knows nothing but "
    "sprites: a photo means nothing to it."
)


class Actions:
    """Handlers of gradio's events.

    Args:
        service: Service.
        message_names: fields that have a place for a message, in the order of the page.
    """

    service: Service
    message_names: Sequence[str]
    models: Models
    store: Store

    def __init__(self, service: Service, message_names: Sequence[str]):
        self.service, self.message_names = service, message_names
        self.models, self.store = service.models, service.store
        self._removed = self.store.put_example("removed.png", PIL.Image.new("RGB", (64, 64), "grey"))

    # Errors ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def errors(self, session: Session, field: str = "run") -> Iterator[None]:
        """Give what goes wrong to the page by way of the session, and to a client of the API as its error."""
        session.error = None
        try:
            with at(field):
                yield
        except FieldError as error:
            session.error = error
            # no pop-up: the page shows it at the field
            raise gr.Error(f"{error.field}: {error.message}", visible=False, print_exception=False) from None

    def show_error(self, session: Session) -> list[gr.HTML]:
        """Messages of all fields: that of the last action at its field, none elsewhere."""
        error, session.error = session.error, None
        if error is None:  # gradio itself refused a value
            error = FieldError("run", "A value is of the wrong kind or not offered here. Reload the page.")
        field = error.field if error.field in self.message_names else "run"
        return [
            gr.HTML(render.message(error.message) if name == field else "", visible=name == field)
            for name in self.message_names
        ]

    def clear_messages(self) -> list[gr.HTML]:
        return [gr.HTML("", visible=False)] * len(self.message_names)

    # Runs ------------------------------------------------------------------------------------------------------

    def generating(self, names: Sequence[str]) -> Callable[..., Any]:
        """The handler of a run, whose parameters are called as the fields are: gradio reads that from its signature."""

        async def generate(session, **values):
            """Draw a prompt of words and images. Yields how far it is, and at the end the drawn images and their settings.

            Write <i> in the prompt for each of its images, which `pictures` holds in that order. The seed decides what is
            drawn; empty or -1, and with surprise, one is drawn. An init_image is changed, as far as strength says; a mask, a
            PNG as a data: URI, is painted where it is drawn anew.
            """
            with self.errors(session):
                settings = await self._read(
                    read_values, values, session, self.models, self.store, field="run"
                )
                maps = bool(values.get("maps"))
                async for ticket in self.service.draw(session, settings, caller(), maps):
                    wait = self.service.worker.seconds_until(ticket)
                    yield gr.skip(), gr.skip(), render.run_state(ticket, wait)
                session.shown = list(finished_images(ticket))
                session.chosen = session.shown[0] if session.shown else None
                shown = filter(Path.is_file, session.shown)
                settings = [render.described(read_settings(path)) for path in shown]
                yield self.gallery(session.shown), settings, render.run_state(ticket)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, keyword, default=None) for name in ("session", *names)]
        generate.__signature__ = inspect.Signature(parameters)
        return generate

    async def draw_for_tool(self, given: dict[str, Any], request: Any) -> list[bytes]:
        """PNGs of what a program asks for, fields of the page and `images` as data: URLs. Raises FieldError."""
        session, images = Session(), given["images"]
        if len(images) > MAX_FILES:
            raise FieldError("images", f"A prompt may have {MAX_FILES} images, and {len(images)} were given.")
        address = address_of(request.scope) if request is not None else ""
        who = Caller(address, address)

        def keep(ticket):
            paths = []
            for content in [read_data_url(image, "images") for image in images]:
                check_image_file(io.BytesIO(content), "images")
                self.store.make_room(on_disk(len(content)))
                path = self.store.new_upload_path("image")
                path.write_bytes(content)
                paths.append(path)
            width, _, height = given.get("size", "0x0").partition("x")
            values = {
                **defaults(self.models.is_small(self.models.default)),
                **{name: given[name] for name in ("prompt", "negative_prompt")},
                **{"pictures": paths, "num_images": given["n"], "width": int(width), "height": int(height)},
                **{"seed": given.get("seed"), "surprise": "seed" not in given},
            }
            return read_values(values, session, self.models, self.store)

        with at("run"):
            settings = await self.service.carry_out(self.service.reading, keep, "run", who)
            tickets = [ticket async for ticket in self.service.draw(session, settings, who)]
            return [path.read_bytes() for path in finished_images(tickets[-1])]

    def gallery(self, paths: Iterable[Path]) -> list[tuple[str, str]]:
        """Paths of images -> value of a gallery, with their seeds.

        One that the limit of the disk has removed is marked; one that whoever runs the server has deleted is left out.
        """
        return [
            (os.path.relpath(path), f"seed {read_settings(path).seed}")
            if path.is_file()
            else (os.path.relpath(self._removed), REMOVED)
            for path in self._known(paths)
        ]

    def _known(self, paths):
        return [path for path in paths if path.is_file() or path.name in self.store.removed]

    def cancel(self, session: Session) -> str:
        """Cancel this session's run: at once if it waits, and at the end of the step if it is being drawn."""
        return "Cancelling." if self.service.cancel(session) else "Nothing is running."

    def after_run(self, session: Session) -> tuple[Any, ...]:
        """History, the settings of the first image, and the maps of all where they were asked for."""
        maps = self.gallery(map(maps_path, session.shown))
        return self.gallery(session.history), self.details(session), maps, gr.Tab(visible=bool(maps))

    def after_failure(self, session: Session) -> tuple[list[tuple[str, str]], str]:
        return self.gallery(session.history), ""

    def details(self, session: Session) -> str:
        if session.chosen is None:
            return ""
        if not session.chosen.is_file():
            return render.message(REMOVED_NOTE) if session.chosen.name in self.store.removed else ""
        return render.settings_table(read_settings(session.chosen), session.chosen)

    # Results -----------------------------------------------------------------------------------------------------

    def choose(self, session: Session, event: gr.SelectData) -> Any:
        return self._choose(session, session.shown, event.index)

    def choose_from_history(self, session: Session, event: gr.SelectData) -> Any:
        return self._choose(session, self._known(session.history), event.index)

    def _choose(self, session, paths, index):
        if isinstance(index, int) and 0 <= index < len(paths):
            session.chosen = paths[index]
        return self.details(session)

    def _chosen_image(self, session):
        if session.chosen is None:
            raise FieldError("run", "There is no image yet. Run, then choose one.")
        if not session.chosen.is_file():
            raise FieldError("run", REMOVED_NOTE)
        return os.path.relpath(session.chosen)

    def use_as_input(
        self, session: Session, prompt: str | None, paths: Sequence[str] | None
    ) -> tuple[str, list[str]]:
        """The prompt and its images, with the chosen image as the last, and an <i> for it."""
        with self.errors(session):
            images, prompt = [*(paths or ()), self._chosen_image(session)], prompt or ""
            if prompt.count(IMAGE_MARK) < len(images):
                prompt = f"{prompt.rstrip()} {IMAGE_MARK}".lstrip()
            return prompt, images

    def change_it(self, session: Session) -> tuple[str, gr.Accordion]:
        """The chosen image as the one to be changed, and the part of the page where that is done."""
        with self.errors(session):
            return self._chosen_image(session), gr.Accordion(open=True)

    async def restore(self, session: Session, path: str, names: Sequence[str]) -> list[Any]:
        """Values of the fields `names` from a PNG that was made here; a message, the words of the session, the size, and the
        parts of the page that are hidden where nothing is chosen in them."""
        with self.errors(session, "restore"):
            if path is None:
                return [gr.skip()] * (len(names) + 5)
            has_controls = "control_1_kind" in names
            given = (path, session, self.models, self.store, has_controls)
            values, notes = await self._read(restore_values, *given, field="restore")
            note = render.message(" ".join(notes)) if notes else "<div>Its settings are back.</div>"
            model = self.chosen(values.get("model"))
            # the board takes it when it has the image
            mask, values["mask"] = values["mask"], ""
            session.restored_mask = (values["init_image"], mask) if values["init_image"] else None
            shown = self.size_fields(
                model, size_choice(values["width"], values["height"], self.models.own_side(model))
            )
            values = [values.get(name, gr.skip()) for name in names]
            change = gr.Accordion(open=True) if session.restored_mask else gr.skip()
            return [*values, gr.HTML(note, visible=True), self.word_list(session), *shown, change]

    def size_fields(self, model: str, choice: str) -> tuple[gr.Dropdown, gr.Row]:
        """The choice of a size, of those that suit a model; and the fields of another size, which are hidden unless it is chosen."""
        offered = sizes(self.models.own_side(model))
        return gr.Dropdown(choices=offered, value=choice), gr.Row(visible=choice == OTHER_SIZE)

    # Controls, image words, the model --------------------------------------------------------------------------

    def chosen(self, model: str | None) -> str:
        """The name of a model; that of the first for None."""
        return model or self.models.default

    def previewing(self, slot: int) -> Callable[..., Any]:
        """The handler of a slot of the controls panel."""

        async def preview_control(
            session, width=None, height=None, kind=None, picture=None, strokes=None, ready=None
        ):
            """The control image that a ControlNet would read, of a kind of control and an image.

            Strokes are a PNG as a data: URI, painted on the image; for inpaint they are the mask.
            """
            field = f"control_{slot}"
            with self.errors(session, field):
                if kind in (None, NO_CONTROL) or not (picture or strokes):
                    raise FieldError(field, "Choose a kind of control and drop an image.")
                given = (field, self.store, kind, picture, strokes, ready)
                control = await self._read(read_control, *given, field=field)
                size = (int(side or 0) or None for side in (height, width))
                image = await self.service.control_image(field, control, *size, caller())
                return await self._read(self._write_control_image, image, field=field)

        return preview_control

    def _write_control_image(self, image):
        """Path of an image that its user alone is told."""
        file = io.BytesIO()
        image.save(file, format="PNG")
        content = file.getvalue()
        self.store.make_room(on_disk(len(content)))
        path = self.store.new_upload_path("control.png")
        path.write_bytes(content)
        return os.path.relpath(path)

    async def change_board(self, session: Session, path: str | None) -> gr.HTML:
        """The board of the image that is changed; a mask that was restored with the image is on it."""
        restored, session.restored_mask = session.restored_mask, None
        is_its = restored is not None and restored[0] == path
        if not is_its and path == session.board_path:  # told again, when its part of the page is unfolded
            return gr.skip()
        session.board_path = path
        return await self.board(path, restored[1] if is_its else "")

    async def board(self, path: str | None, strokes: str = "") -> gr.HTML:
        """The drawing board with an image on it, and strokes on that."""
        uri = ""
        if path is not None:
            with contextlib.suppress(FieldError):  # said when the control is used
                uri = await self._read(self._board_image, path)
        return gr.HTML(strokes, image=uri)

    def _board_image(self, path):
        return data_uri(open_shrunk(path, "controls", BOARD_SIDE), side=0)

    async def _read(self, function, *given, field="run"):
        """What a function returns that reads files of a user: one after the other on the whole server, in turns."""
        paths = [path for path in _texts(given) if path.startswith(f"{UPLOADS}/")]
        with self.store.using(paths):
            return await self.service.carry_out(
                self.service.reading, lambda ticket: function(*given), field, caller()
            )

    async def add_word(
        self,
        session: Session,
        model: str | None,
        name: str | None = None,
        pictures: Sequence[str] | None = None,
    ) -> gr.Dropdown:
        """Make images an image word of this session, to be used in prompts."""
        with self.errors(session, "words"):
            images = pictures or ()
            given = (self.chosen(model), name or "", images)
            word = await image_words.add_word(self.service, session, *given, caller())
            session.word_images[word] = await self._read(_thumbnails, images[:SHOWN], field="words")
            return self.word_list(session, word)

    def after_word(self, session: Session, word: str) -> tuple[str, None, gr.HTML]:
        """An empty form for the next word, and that the last was made."""
        note = render.word_note(word, session.word_images.get(word, ()))
        return "", None, gr.HTML(note, visible=True)

    async def save_words(self, session: Session, model: str | None) -> str:
        """A file with all image words of this session."""
        with self.errors(session, "words"):
            path = await image_words.save_words(self.service, session, self.chosen(model), caller())
            return os.path.relpath(path)

    async def load_words(self, session: Session, model: str | None, file: str | None = None) -> gr.Dropdown:
        """Take the image words of a file into this session."""
        with self.errors(session, "words"):
            if file is None:
                raise FieldError("words", "No file was given.")
            words = await image_words.load_words(self.service, session, self.chosen(model), file, caller())
            return self.word_list(session, words[0])

    def forget_word(self, session: Session, word: str) -> gr.Dropdown:
        """Take an image word out of this session; returns one that is left, if there is any."""
        image_words.forget_word(self.service, session, word)
        return self.word_list(session)

    def word_list(self, session: Session, chosen: str | None = None) -> gr.Dropdown:
        words = list(session.words)
        return gr.Dropdown(choices=words, value=chosen or (words[-1] if words else None))

    async def prompt_line(
        self, session: Session, prompt: str | None, paths: Sequence[str] | None, model: str | None
    ) -> tuple[str, gr.HTML]:
        """The line below the prompt, and the thumbnails of its images."""
        paths = (paths or ())[: 2 * MAX_FILES]
        is_builtin = self.models.is_builtin(self.chosen(model))

        def look():
            sizes = [image_file_size(path) for path in paths] if is_builtin else ()
            is_larger = any(size is not None and max(size) > IMAGE_SIZE for size in sizes)
            return is_larger, _thumbnails(paths)

        is_larger, images = False, [None] * len(paths)
        if paths:
            with contextlib.suppress(FieldError):  # too busy; the line is worth less than a run
                is_larger, images = await self._read(look)
        note = LARGE_NOTE if is_larger else ""
        words = {word: session.word_images.get(word, ()) for word in session.words}
        line = render.prompt_line((prompt or "")[:MAX_PROMPT], images, words, note)
        entries = zip(paths, images, strict=True)
        shown = [{"path": path, "name": Path(path).name, "source": source} for path, source in entries]
        return line, gr.HTML(images=shown)

    def preset(self, name: str, model: str | None) -> list[Any]:
        """Values of a preset that suit a model."""
        return list(presets(self.models.is_small(self.chosen(model)))[name].values())

    def suit_model(self, model: str | None, size: str) -> list[Any]:
        """Examples, a prompt to begin with and sizes that suit a model: sprites for a small one, photos for any other."""
        model = self.chosen(model)
        is_small = self.models.is_small(model)
        groups = [gr.HTML(visible=is_small is small) for small in (True, False)]
        prompt = gr.Textbox(placeholder=placeholder(is_small))
        offered = sizes(self.models.own_side(model))
        known = size in (choice for _, choice in offered)
        return [*groups, prompt, gr.Dropdown(choices=offered, value=size if known else OTHER_SIZE)]

    def load_example(
        self, number: str, examples: Sequence[tuple[str, list[str] | None]]
    ) -> tuple[str, list[str] | None]:
        """The prompt and the images of the example that was clicked."""
        if not (
            isinstance(number, str) and number.isdecimal() and len(number) < 3 and int(number) < len(examples)
        ):
            return gr.skip(), gr.skip()
        return examples[int(number)]

    def model_state(self) -> tuple[str, gr.Timer]:
        """Whether the model is loaded; and a timer that asks again as long as it is not."""
        models = self.models
        note = BUILTIN_NOTE if models.is_builtin(models.default) else ""
        html = render.model_state(models.state, models.problem, note)
        return html, gr.Timer(active=models.state in ("waiting", "loading"))


def _thumbnails(paths):
    return [render.thumbnail(path) for path in paths]


def _texts(given: Iterable[Any]) -> Iterator[str]:
    """The strings among some values, and among the values that they hold."""
    waiting = [*given]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
