"""The page of `kosmos-g app`: where things stand, and what calls what. Actions do the work."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.networking import setup_tunnel
from starlette.routing import Mount

from ..control.table import CONTROLS
from ..generation.schedulers import SCHEDULERS
from ..generation.settings import STRENGTH
from ..serving.access import Access, Gate
from ..serving.errors import clean
from ..serving.images import MAX_BYTES, MAX_FILES
from ..serving.limits import LIMITS, MAX_PROMPT
from ..serving.models import NO_LORA, OWN
from ..serving.passwords import Accounts, Logins
from ..serving.service import Service
from ..serving.session import Session
from ..serving.store import IMAGES, UPLOADS
from ..serving.tool import Tool
from ..serving.web import WebServer
from ..sprites.pretrained import SPRITES_CONTROL
from . import html as render
from .actions import Actions
from .blocks import Blocks
from .components import Files, Gallery, Image, Text, Upload, board, example_buttons, read_static, strip
from .examples import photo_examples, placeholder, result_uri, sprite_examples
from .form import (
    CONTROL_FIELDS,
    CONTROL_SLOTS,
    LORAS,
    NO_CONTROL,
    OWN_SIZE,
    PRESETS,
    defaults,
    sizes,
)
from .guard import SESSIONS, Guard

STYLE, SCRIPT = read_static("page.css"), read_static("page.js")
DOCUMENTATION = "https://pypi.org/project/kosmos-g-diffusers/"
DRAWN_BY_SPRITES = (
    "Drawn by the small model that ships, of sprites. Click an example, or write a prompt; then Run."
)
HIDE = "() => ({__type__: 'update', value: '', visible: false})"
# width and height of a choice of size, and whether their fields are shown
TAKE_SIZE = """(size, width, height) => {
    const sides = size.includes("x") ? size.split("x").map(Number) : size === "own" ? [0, 0] : [width, height]
    return [...sides, {__type__: "update", visible: size === "other"}]
}"""
TAKE_ORDER = """(paths, files) => {
    const known = new Map((files ?? []).map(file => [file.path, file]))
    const kept = (paths ?? []).map(path => known.get(path)).filter(Boolean)
    return [kept.length ? kept : null]
}"""
# the place of another LoRA is shown when the one before it is taken
SHOW_LORAS = """(...names) => names.slice(0, -1).map((name, place) => ({
    __type__: "update", visible: [name, names[place + 1]].some(each => each && each !== "none")
}))"""
CONTROLS_HELP = "For `drawing` draw dark strokes; for `inpaint` paint over what is to be filled. Start and end are shares of the steps."
SPRITES_CONTROLS = (
    f"The small model has a ControlNet for `{SPRITES_CONTROL}` alone: edges of a sprite decide where it is drawn. With "
    "`kosmos-g app --model` there are all kinds of `kosmos-g control --list`. Start and end are shares of the steps."
)
CHANGE_HELP = (
    "The strength says how much of it is drawn anew: little keeps it, 1 keeps none of it. What you paint on the image below is "
    "drawn anew, and the rest is kept, but for what the model's VAE loses."
)
# field of a message -> other fields by which its cause may go
CAUSES = {name: ["lora", "unet", "model"] for name in ("unet", "model", *(name for name, _ in LORAS))}
CAUSES |= {"width": ["height"], "height": ["width"], "regions": ["prompt", "binding"]}
# clients may give a field by its place: those that came later stand last
LATER = ("init_image", "mask", "strength", *(name for slot in LORAS[1:] for name in slot))
# where the theme's own colours are too close to each other to be read
COLOURS = {f"block_{what}_text_color": "*primary_700" for what in ("title", "label")}
COLOURS |= {"button_primary_background_fill": "*primary_600", "input_placeholder_color": "*neutral_500"}
COLOURS |= {"button_primary_background_fill_hover": "*primary_700", "body_text_color_subdued": "*neutral_600"}
COLOURS["background_fill_primary"] = "*neutral_50"  # the theme's own, which set() forgets
COLOURS |= {"link_text_color": "*primary_700", "link_text_color_dark": "*primary_300"}
COLOURS |= {"body_text_color_subdued_dark": "*neutral_300", "input_placeholder_color_dark": "*neutral_300"}
QUICK: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "hidden",
    "queue": False,
}  # events of the page alone


# by way of gradio's queue: its failures are told, and are no failed requests
FAILING = {**QUICK, "queue": True}


class Page:
    """gr.Blocks of a Service. Fields are components by the name that the API has for them."""

    session: gr.State
    state: gr.HTML
    size: gr.Dropdown
    other_size: gr.Row
    more_loras: list[gr.Row]
    strip: gr.HTML
    change: gr.Accordion
    change_it: gr.Button
    prompt: gr.Textbox
    prompt_line: gr.HTML
    references: Files
    run: gr.Button
    cancel: gr.Button
    presets: list[gr.Button]
    example_groups: list[gr.HTML]
    word_name: gr.Textbox
    word_images: Files
    word_add: gr.Button
    words: gr.Dropdown
    word_forget: gr.Button
    words_save: gr.Button
    words_load: Upload
    words_file: Files
    progress: gr.HTML
    images: Gallery
    maps: Gallery
    maps_tab: gr.Tab
    settings: gr.JSON
    details: gr.HTML
    use: gr.Button
    restored: Files
    history: Gallery

    service: Service
    blocks: Blocks
    fields: dict[str, Any]
    messages: dict[str, gr.HTML]
    previews: list[Any]
    actions: Actions

    def __init__(self, service: Service, controls: bool = False):
        self.service, self.fields, self.messages, self.previews = service, {}, {}, []
        title = {"title": "Kosmos-G", "analytics_enabled": False}
        with Blocks(**title) as self.blocks:
            self.session = gr.State(Session())
            gr.HTML(render.heading(DOCUMENTATION, MAX_FILES), elem_id="heading")
            self.state = gr.HTML(elem_id="model-state")
            with gr.Row(elem_id="layout"):
                with gr.Column(scale=3, min_width=300):
                    self._build_prompt()
                    self._build_change()
                    self._build_settings()
                    if controls:
                        self._build_controls()
                    self._build_words()
                with gr.Column(scale=2, min_width=300):
                    self._build_results()
            for name in LATER:
                self.fields[name] = self.fields.pop(name)
            self._connect()

    # Where things stand ------------------------------------------------------------------------------------------

    def _add(self, name, component):
        """A field, and the place of its message below it."""
        self.fields[name] = component
        self._add_message(name)
        return component

    def _add_message(self, name):
        self.messages[name] = gr.HTML(visible=False, elem_id=f"{name}-message")

    def _build_prompt(self):
        models = self.service.models
        is_small = models.is_small(models.default)
        text = {"max_length": MAX_PROMPT, "placeholder": placeholder(is_small), "lines": 2}
        self.prompt = self._add("prompt", Text("", label="Prompt", elem_id="prompt", **text))
        self.prompt_line = gr.HTML(elem_id="prompt-line")
        label = "Images, in the order of <i>"
        several = {"file_count": "multiple", "file_types": ["image"], "height": 130}
        with gr.Column(elem_id="pictures", elem_classes="kg-images"):
            self.references = self.fields["pictures"] = Files(label=label, **several)
            self.strip = strip("Images of the prompt, in their order")
        self._add_message("pictures")
        with gr.Row(elem_id="run-row"):
            self.run = gr.Button("Run", variant="primary", elem_id="run", min_width=90)
            self.cancel = gr.Button("Cancel", elem_id="cancel", min_width=90)
        self._add_message("run")
        self.example_groups = []
        with gr.Column(elem_id="examples"):
            for small, examples in ((True, sprite_examples()), (False, photo_examples())):
                html = render.examples((example.prompt, example.thumbnails()) for example in examples)
                self.example_groups.append(example_buttons(html, visible=is_small is small))

    def _build_change(self):
        with gr.Accordion("Change an image (img2img, inpaint)", open=False, elem_id="change") as self.change:
            gr.Markdown(CHANGE_HELP)
            upload = {"sources": ("upload", "clipboard"), "type": "filepath", "image_mode": None}
            label = "Image to change"
            size = {"height": 240, "buttons": ["download", "fullscreen"]}
            image = Image(label=label, elem_id="init_image", **upload, **size)
            self._add("init_image", image)
            self.fields["mask"] = board("What is drawn anew (mask)", elem_id="mask")
            low, high = LIMITS["strength"]
            label = "Strength (denoising strength)"
            strength = gr.Slider(low, high, value=STRENGTH, step=0.05, label=label, elem_id="strength")
            self._add("strength", strength)

    def _build_settings(self):
        models = self.service.models
        start = defaults(models.is_small(models.default))

        def row(*entries, visible=True):
            with gr.Row(visible=visible) as made:
                for name, kind, value, options in entries:
                    with gr.Column(min_width=130):
                        self._add(name, kind(value=value, elem_id=name, **options))
            return made

        with gr.Accordion("Settings", open=True, elem_id="settings"):
            with gr.Row(elem_id="presets"):
                small = {"size": "sm", "min_width": 90}
                self.presets = [gr.Button(name, elem_id=f"preset-{name}", **small) for name in PRESETS]
            self._add(
                "negative_prompt",
                Text("", label="Negative prompt", max_length=MAX_PROMPT, elem_id="negative_prompt"),
            )
            row(
                ("num_images", gr.Number, start["num_images"], {"label": "Images (batch count)"}),
                ("steps", gr.Number, start["steps"], {"label": "Steps"}),
                ("guidance", gr.Number, start["guidance"], {"label": "Guidance (CFG scale)", "step": 0.5}),
            )
            schedulers = {"label": "Scheduler (sampler)", "choices": [OWN, *SCHEDULERS]}
            seed = {"label": "Seed (empty or -1: random)"}
            row(
                ("seed", gr.Number, -1, seed),
                # what clients call it that were written before an empty seed meant that
                ("surprise", gr.Checkbox, False, {"label": "A new seed", "visible": "hidden"}),
                ("scheduler", gr.Dropdown, start["scheduler"], schedulers),
            )
            own = {"label": "Size", "choices": sizes(models.own_side(models.default))}
            self.size = gr.Dropdown(value=OWN_SIZE, elem_id="size", **own)
            self.other_size = row(
                ("width", gr.Number, 0, {"label": "Width", "step": 8}),
                ("height", gr.Number, 0, {"label": "Height", "step": 8}),
                visible=False,
            )
            row(
                (
                    "model",
                    gr.Dropdown,
                    models.default,
                    {"label": "Model (checkpoint)", "choices": list(models.models)},
                ),
                ("unet", gr.Dropdown, OWN, {"label": "U-Net", "choices": list(models.unets)}),
            )
            low, high = LIMITS["lora_scale"]
            scale = {"minimum": low, "maximum": high, "step": 0.05}
            self.more_loras = []
            for slot, (name, scale_name) in enumerate(LORAS, 1):
                which = "" if slot == 1 else f" {slot}"
                entries = (
                    (name, gr.Dropdown, NO_LORA, {"label": f"LoRA{which}", "choices": list(models.loras)}),
                    (scale_name, gr.Slider, 1.0, {"label": f"LoRA{which} scale (weight)", **scale}),
                )
                shown = row(*entries, visible=slot == 1)
                self.more_loras += [shown] if slot > 1 else []
            with gr.Accordion("Where each image goes", open=False, elem_id="where"):
                low, high = LIMITS["binding"]
                weight = {"label": "Binding: a region for each image (0: off)", "minimum": low, "maximum": 3}
                row(
                    ("maps", gr.Checkbox, False, {"label": "Show where each image went"}),
                    ("binding", gr.Slider, start["binding"], {**weight, "step": 0.25}),
                )
                label = "Regions: left,top,right,bottom in shares for each image, or none"
                field = Text("", label=label, placeholder="0,0,0.5,1 0.5,0,1,1", elem_id="regions")
                self._add("regions", field)

    def _build_controls(self):
        kinds = [(NO_CONTROL, NO_CONTROL)]
        models = self.service.models
        kinds += [(f"{kind}: {CONTROLS[kind].description}", kind) for kind in models.controls(models.default)]
        with gr.Accordion("Controls", open=False, elem_id="controls"):
            gr.Markdown(SPRITES_CONTROLS if models.is_builtin(models.default) else CONTROLS_HELP)
            self._add_message("controls")
            for slot in range(1, CONTROL_SLOTS + 1):
                with gr.Tab(f"Control {slot}"):
                    self._build_control(slot, kinds)

    def _build_control(self, slot, kinds):
        def slider(label, high, value):
            return gr.Slider(0, high, value=value, step=0.05, label=label, min_width=120)

        name = f"control_{slot}"
        kind = gr.Dropdown(kinds, value=NO_CONTROL, label="Kind", elem_id=f"{name}_kind")
        with gr.Row():
            upload = {"sources": ("upload", "clipboard"), "type": "filepath", "image_mode": None}
            size = {"height": 240, "min_width": 200, "buttons": ["download", "fullscreen"]}
            source = Image(label="Image", elem_id=f"{name}_picture", **upload, **size)
            shown = {"label": "Control image", "format": "png", "interactive": False}
            image = Image(elem_id=f"{name}_image", **shown, **size)
        with gr.Accordion("Draw, or paint on the image", open=False, elem_id=f"{name}_drawing"):
            strokes = board("Strokes", elem_id=f"{name}_strokes")
        ready = gr.Checkbox(False, label="The image is the control image already")
        with gr.Row():
            scale = slider("Strength (control weight)", 2, 1.0)
            start = slider("Start (share of the steps)", 1, 0.0)
            end = slider("End (share of the steps)", 1, 1.0)
        look = gr.Button("Show the control image", size="sm", elem_id=f"{name}_look")
        self._add_message(name)
        components = (kind, source, strokes, ready, scale, start, end)
        for field, component in zip(CONTROL_FIELDS, components, strict=True):
            self.fields[f"{name}_{field}"] = component
        self.previews.append((look, image))

    def _build_words(self):
        with gr.Accordion("Image words", open=False, elem_id="image-words"):
            gr.Markdown("Give images a name and use it in prompts: `<my-dog> in the snow`.")
            several = {"file_count": "multiple", "file_types": ["image"], "height": 170}
            with gr.Row():
                self.word_name = gr.Textbox("", label="Name", placeholder="my-dog", elem_id="word-name")
                self.word_images = Files(label="Its images", elem_id="word-pictures", **several)
            self.word_add = gr.Button("Make it a word", size="sm", elem_id="word-add")
            with gr.Row():
                self.words = gr.Dropdown([], label="Words of this session", elem_id="words")
                self.word_forget = gr.Button("Forget this word", size="sm")
            with gr.Row():
                self.words_save = gr.Button("Save all to a file", size="sm", elem_id="words-save")
                self.words_load = Upload("Load a file", size="sm", file_types=[".safetensors"])
            self.words_file = Files(label="Saved words", interactive=False)
            self._add_message("words")

    def _build_results(self):
        self.progress = gr.HTML(label="Progress", elem_id="progress")
        first, result = sprite_examples()[0], result_uri()
        if result is not None:
            html = render.first_example(first.prompt, first.thumbnails(), result, DRAWN_BY_SPRITES)
            gr.HTML(html, elem_id="first")
        look = {"object_fit": "contain", "format": "png", "interactive": False}
        look["buttons"] = ["download", "download_all", "fullscreen"]
        models = self.service.models
        # 64 pixels are enlarged to be seen: as they are, not blurred
        look["elem_classes"] = ["kg-sprites"] if models.is_builtin(models.default) else []
        with gr.Tabs(elem_id="results"):
            with gr.Tab("Images"):
                self.images = Gallery(label="Images", columns=2, height=520, elem_id="images", **look)
            with gr.Tab("Where each image went", visible=False, elem_id="maps-tab") as self.maps_tab:
                label = "For each image the places that come from each source"
                self.maps = Gallery(label=label, columns=1, height=520, elem_id="maps-shown", **look)
        self.settings = gr.JSON(label="Settings of the images", visible=False)
        self.details = gr.HTML(elem_id="details")
        with gr.Row(elem_id="use-row"):
            small = {"size": "sm", "min_width": 130}
            self.use = gr.Button("Use the chosen image as input", elem_id="use", **small)
            self.change_it = gr.Button("Change the chosen image", elem_id="change-it", **small)
        label = "Drop a PNG for its settings"
        self.restored = Files(label=label, file_types=[".png"], height=160, elem_id="restore")
        self._add_message("restore")
        with gr.Accordion("History of this session", open=False, elem_id="past"):
            look.update(columns=4, height=300, allow_preview=False, elem_id="history")
            self.history = Gallery(label="Images, the newest first", **look)

    # What calls what -----------------------------------------------------------------------------------------------

    def _connect(self):
        actions = self.actions = Actions(self.service, list(self.messages))
        timer, model = gr.Timer(1), self.fields["model"]
        gr.on([self.blocks.load, timer.tick], actions.model_state, None, [self.state, timer], **QUICK)
        gr.on(
            [self.blocks.load, *(part.change for part in (self.prompt, self.references, self.words, model))],
            actions.prompt_line,
            [self.session, self.prompt, self.references, model],
            [self.prompt_line, self.strip],
            trigger_mode="always_last",
            **QUICK,
        )
        for button in self.presets:
            outputs = [self.fields[name] for name in PRESETS[button.value]]
            button.click(partial(actions.preset, button.value), model, outputs, **QUICK)
        fields = [self.fields[name] for name in ("width", "height")]
        reset = {"fn": lambda: (OWN_SIZE, 0, 0), "outputs": [self.size, *fields]}
        model.input(**reset, **QUICK)
        suited = [*self.example_groups, self.prompt, self.size]
        model.change(actions.suit_model, [model, self.size], suited, **QUICK)
        self.size.input(
            None, [self.size, *fields], [*fields, self.other_size], js=TAKE_SIZE, api_visibility="private"
        )
        loras = [self.fields[name] for name, _ in LORAS]
        slots = [lora.change for lora in loras]
        gr.on(slots, None, loras, self.more_loras, js=SHOW_LORAS, api_visibility="private")
        order = [self.strip, self.references]
        self.strip.input(None, order, self.references, js=TAKE_ORDER, api_visibility="private")
        for group, examples in zip(self.example_groups, (sprite_examples(), photo_examples()), strict=True):
            put = self.service.store.put_example
            files = [[str(put(*image)) for image in example.images] or None for example in examples]
            load = [(example.prompt, paths) for example, paths in zip(examples, files, strict=True)]
            load = partial(actions.load_example, examples=load)
            group.click(load, group, [self.prompt, self.references], **QUICK)
        self._connect_messages()
        self._connect_run(actions)
        self._connect_results(actions)
        self._connect_words(actions)

    def _connect_messages(self):
        """A message goes when what may have been its cause is changed."""
        others = {
            "prompt": [self.references, self.words, self.fields["model"]],
            "pictures": [self.prompt],
            "init_image": [self.fields[name] for name in ("mask", "steps", "width", "height")],
            "strength": [self.fields["steps"]],
        }
        for name, causes in CAUSES.items():
            others[name] = [*others.get(name, ()), *(self.fields[cause] for cause in causes)]
        slots = {name: field for name, field in self.fields.items() if name.startswith("control_")}
        for slot in range(1, CONTROL_SLOTS + 1 if slots else 0):
            mine = f"control_{slot}"
            others[mine] = [field for name, field in slots.items() if name.startswith(mine)]
        others["controls"] = [*slots.values(), *(self.fields[name] for name in ("width", "height"))]
        others["run"] = [*self.fields.values()]
        for name, message in self.messages.items():
            causes = [self.fields[name]] if name in self.fields else []
            causes += others.get(name, ())
            events = [part.change for part in causes]
            if name == "words":  # a form that was emptied takes its message not away
                events = [self.word_name.input, self.word_images.upload, self.words_load.upload]
            elif name == "restore":
                events = [self.restored.upload]
            gr.on(events, None, None, message, js=HIDE, api_visibility="private")

    def _connect_run(self, actions):
        run = self._endpoint(
            self.run.click,
            "generate",
            actions.generating(self.fields),
            self.fields,
            [self.images, self.settings, self.progress],
            concurrency_limit=None,  # the service has a queue of its own, with places to tell
            trigger_mode="once",
        )
        run.success(
            actions.after_run, self.session, [self.history, self.details, self.maps, self.maps_tab], **QUICK
        )
        run.failure(actions.after_failure, self.session, [self.history, self.progress], **QUICK)
        self.cancel.click(actions.cancel, self.session, self.progress, api_name="cancel", queue=False)
        board = {"inputs": [self.session, self.fields["init_image"]], "outputs": self.fields["mask"]}
        self.fields["init_image"].change(actions.change_board, **board, **QUICK)
        for slot, (look, image) in enumerate(self.previews, 1):
            fields = {name: self.fields[name] for name in ("width", "height")}
            for name in ("kind", "picture", "strokes", "ready"):
                fields[name] = self.fields[f"control_{slot}_{name}"]
            source, strokes = fields["picture"], fields["strokes"]
            source.change(actions.board, source, strokes, **QUICK)
            handler = actions.previewing(slot)
            self._endpoint(look.click, f"preview_control_{slot}", handler, fields, image)

    def _connect_results(self, actions):
        self.images.select(actions.choose, self.session, self.details, **QUICK)
        self.history.select(actions.choose_from_history, self.session, self.details, **QUICK)
        failed = {"fn": actions.show_error, "inputs": self.session, "outputs": [*self.messages.values()]}
        inputs = [self.prompt, self.references]
        used = self.use.click(actions.use_as_input, [self.session, *inputs], inputs, **FAILING)
        used.failure(**failed, **QUICK)
        changed = [self.fields["init_image"], self.change]
        used = self.change_it.click(actions.change_it, self.session, changed, **FAILING)
        used.failure(**failed, **QUICK)
        outputs = [*self.fields.values(), self.messages["restore"], self.words]
        outputs += [self.size, self.other_size, self.change]
        restore = partial(actions.restore, names=list(self.fields))
        back = self.restored.upload(restore, [self.session, self.restored], outputs, **FAILING)
        back.failure(**failed, **QUICK)
        for end in (back.success, back.failure):
            end(lambda: None, None, self.restored, **QUICK)  # ready for the next

    def _connect_words(self, actions):
        model = {"model": self.fields["model"]}
        given = {**model, "name": self.word_name, "pictures": self.word_images}
        made = self._endpoint(self.word_add.click, "add_word", actions.add_word, given, self.words)
        shown = [self.word_name, self.word_images, self.messages["words"]]
        made.success(actions.after_word, [self.session, self.words], shown, **QUICK)
        self._endpoint(self.words_save.click, "save_words", actions.save_words, model, self.words_file)
        file = {**model, "file": self.words_load}
        self._endpoint(self.words_load.upload, "load_words", actions.load_words, file, self.words)
        inputs = [self.session, self.words]
        self.word_forget.click(actions.forget_word, inputs, self.words, api_name="forget_word")

    def _endpoint(self, event, name, function, inputs, outputs, **options):
        """An event that the API has too. A failure's message goes to its field; a new try takes old messages away."""
        messages = list(self.messages.values())
        event(self.actions.clear_messages, None, messages, **QUICK)
        inputs = {"session": self.session, **inputs}
        options = {"api_name": name, "show_progress": "hidden", "concurrency_id": name, **options}
        done = event(function, inputs_kwargs=inputs, outputs=outputs, **options)
        done.failure(self.actions.show_error, self.session, messages, **QUICK)
        return done


def serve(
    service: Service,
    controls: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    auth: tuple[str, str] | Mapping[str, str] | None = None,
    block: bool = True,
    allowed_hosts: Sequence[str] = (),
    mcp: bool = False,
) -> gr.Blocks:
    """Start the page of a service, and then the service itself: the page answers before anything is loaded.

    The current folder must be the service's output folder: files are named from there.

    Args:
        auth: (user, password), or {user: password or its hash}, or None.
        block: print the address, and wait for Ctrl-C.
        allowed_hosts: names that the app answers to, besides those of this machine and `host`.
        mcp: also be a tool of the Model Context Protocol.

    Returns:
        gr.Blocks, with its address as `local_url`.

    Raises:
        OSError: it cannot listen at the address.
    """
    # relative, so that no page learns where the server keeps its files
    os.environ["GRADIO_TEMP_DIR"] = UPLOADS
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # gradio goes through all of them after every event
    gr.set_static_paths([IMAGES])  # served from where they are; other files would be copied first
    accounts = None if auth is None else Accounts(auth if isinstance(auth, Mapping) else dict([auth]))
    page = Page(service, controls)
    blocks, tool = page.blocks, Tool(page.actions.draw_for_tool) if mcp else None
    application = _application(blocks, service, host, port, accounts, allowed_hosts, tool)
    try:
        blocks.server = server = WebServer(application, host, port, "127.0.0.1" if share else "")
    except OSError as error:
        raise OSError(
            f"The app cannot listen at {host}:{port}: another program does, or it is not an address of this machine. Pass "
            "another --port, or --host."
        ) from error
    server.start()
    blocks.local_url = server.url
    if share:
        _share(blocks)
    service.start()
    if block:
        print(f"Open {blocks.local_url} in a browser. Ctrl-C ends the app.", flush=True)
        if blocks.share_url:
            print(f"Anyone can reach {blocks.share_url}.", flush=True)
        blocks.block_thread()
    return blocks


def _application(blocks, service, host, port, accounts, allowed_hosts, tool):
    """gradio's application of a page behind what guards it: gradio's own server would stand before its guards."""
    # the service has queues of its own, with places to tell; gradio's hands everything on at once
    places = 4 * service.worker.capacity + 64
    blocks.max_threads = places
    blocks.state_session_capacity = 2 * SESSIONS
    blocks.queue(max_size=places, default_concurrency_limit=None, api_open=False)
    no_documents = dict.fromkeys(("docs_url", "redoc_url", "openapi_url"))
    # no font is fetched: these are names of what the browser has
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(**COLOURS)
    lifespan = None if tool is None else lambda application: tool.running()
    outer = gr.mount_gradio_app(
        FastAPI(lifespan=lifespan, **no_documents),
        blocks,
        "/",
        server_name=host,
        server_port=port,
        app_kwargs=no_documents,
        auth=None
        if accounts is None
        else _no_one,  # so that gradio shows its form; the guard takes what it sends
        theme=theme,
        css=STYLE,
        js=f"() => {{{SCRIPT}}}",
        show_error=False,
        max_file_size=MAX_BYTES,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    blocks.app = blocks.server_app = next(route.app for route in outer.routes if isinstance(route, Mount))
    blocks.has_launched = True  # from then on gradio takes files from the upload folder alone
    blocks.share_url = None
    logins = None if accounts is None else Logins(accounts)
    guard = Guard(outer, blocks, service.store, logins, tool)
    return Gate(guard, Access(host, allowed_hosts, lambda: blocks.share_url))


def _no_one(user, password):
    return False


def _share(blocks):
    """Give the page a public address through gradio's servers. Raises OSError where that is not possible."""
    try:
        blocks.share_url = setup_tunnel(
            blocks.server_name, blocks.server_port, blocks.share_token, None, None
        )
    except Exception as error:  # noqa: BLE001  whatever gradio's tunnel needs
        blocks.close(verbose=False)
        raise OSError(
            f"No public address could be opened ({clean(error)}). --share needs gradio's servers; without it the app "
            "works on this machine."
        ) from error
