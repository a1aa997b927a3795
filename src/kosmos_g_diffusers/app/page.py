"""The page of `kosmos-g app`: where things stand, and what calls what. Actions do the work."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.networking import setup_tunnel
from starlette.routing import Mount

from ..control.table import CONTROLS
from ..generation.schedulers import SCHEDULERS
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
from .actions import Actions
from .blocks import Blocks
from .components import Files, Gallery, Image, Upload, board
from .examples import photo_examples, sprite_examples
from .form import CONTROL_FIELDS, CONTROL_SLOTS, NO_CONTROL, PRESETS, defaults
from .guard import SESSIONS, Guard

STYLE = (Path(__file__).parent / "static" / "page.css").read_text(encoding="utf-8")
INTRODUCTION = (
    "# Kosmos-G\nWrite a prompt with `<i>` where an image belongs, and drop the images, "
    f"up to {MAX_FILES}, in that order."
)
CONTROLS_HELP = "For `drawing` draw dark strokes; for `inpaint` paint over what is to be filled. Start and end are shares of the steps."
SPRITES_CONTROLS = (
    f"The small model has a ControlNet for `{SPRITES_CONTROL}` alone: edges of a sprite decide where it is drawn. With "
    "`kosmos-g app --model` there are all kinds of `kosmos-g control --list`. Start and end are shares of the steps."
)
QUICK: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "hidden",
    "queue": False,
}  # events of the page alone


class Page:
    """gr.Blocks of a Service. Fields are components by the name that the API has for them."""

    session: gr.State
    state: gr.HTML
    prompt: gr.Textbox
    prompt_line: gr.HTML
    references: Files
    run: gr.Button
    cancel: gr.Button
    presets: list[gr.Button]
    example_groups: list[gr.Row]
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
            gr.Markdown(INTRODUCTION)
            self.state = gr.HTML(elem_id="model-state")
            with gr.Row(elem_id="layout"):
                with gr.Column(scale=3, min_width=300):
                    self._build_prompt()
                    self._build_settings()
                    if controls:
                        self._build_controls()
                    self._build_words()
                with gr.Column(scale=2, min_width=300):
                    self._build_results()
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
        text = {"max_length": MAX_PROMPT, "placeholder": "<i> in the suit of <i>", "lines": 2}
        self.prompt = self._add("prompt", gr.Textbox("", label="Prompt", elem_id="prompt", **text))
        self.prompt_line = gr.HTML(elem_id="prompt-line")
        label = "Images, in the order of <i>"
        several = {"file_count": "multiple", "file_types": ["image"], "height": 170, "allow_reordering": True}
        self.references = self._add("pictures", Files(label=label, elem_id="pictures", **several))
        with gr.Row():
            self.run = gr.Button("Run", variant="primary", elem_id="run")
            self.cancel = gr.Button("Cancel", elem_id="cancel")
            size = {"size": "sm", "min_width": 90}
            self.presets = [gr.Button(name, elem_id=f"preset-{name}", **size) for name in PRESETS]
        self._add_message("run")
        self.example_groups, models = [], self.service.models
        for small, examples in ((True, sprite_examples()), (False, photo_examples())):
            with gr.Row(visible=models.is_small(models.default) is small) as group:
                for example in examples:
                    button = gr.Button(example.prompt, size="sm", min_width=200, elem_classes="kg-example")
                    files = [str(self.service.store.put_example(*image)) for image in example.images]
                    load = partial(lambda *values: values, example.prompt, files or None)
                    button.click(load, None, [self.prompt, self.references], **QUICK)
            self.example_groups.append(group)

    def _build_settings(self):
        models = self.service.models
        start = defaults(models.is_small(models.default))

        def row(*entries):
            with gr.Row():
                for name, kind, value, options in entries:
                    with gr.Column(min_width=130):
                        self._add(name, kind(value=value, elem_id=name, **options))

        with gr.Accordion("Settings", open=True, elem_id="settings"):
            self._add("negative_prompt", gr.Textbox("", label="Negative prompt", max_length=MAX_PROMPT))
            row(
                ("num_images", gr.Number, start["num_images"], {"label": "Images"}),
                ("steps", gr.Number, start["steps"], {"label": "Steps"}),
                ("guidance", gr.Number, start["guidance"], {"label": "Guidance", "step": 0.5}),
            )
            schedulers = {"label": "Scheduler", "choices": [OWN, *SCHEDULERS]}
            row(
                ("seed", gr.Number, 0, {"label": "Seed"}),
                ("surprise", gr.Checkbox, True, {"label": "Surprise me: draw a seed"}),
                ("scheduler", gr.Dropdown, start["scheduler"], schedulers),
            )
            row(
                ("width", gr.Number, 0, {"label": "Width (0: own)", "step": 8}),
                ("height", gr.Number, 0, {"label": "Height (0: own)", "step": 8}),
            )
            row(
                ("model", gr.Dropdown, models.default, {"label": "Model", "choices": list(models.models)}),
                ("unet", gr.Dropdown, OWN, {"label": "U-Net", "choices": list(models.unets)}),
            )
            low, high = LIMITS["lora_scale"]
            scale = {"label": "LoRA scale", "minimum": low, "maximum": high, "step": 0.05}
            row(
                ("lora", gr.Dropdown, NO_LORA, {"label": "LoRA", "choices": list(models.loras)}),
                ("lora_scale", gr.Slider, start["lora_scale"], scale),
            )
            with gr.Accordion("Where each image goes", open=False, elem_id="where"):
                low, high = LIMITS["binding"]
                weight = {"label": "Binding: a region for each image (0: off)", "minimum": low, "maximum": 3}
                row(
                    ("maps", gr.Checkbox, False, {"label": "Show where each image went"}),
                    ("binding", gr.Slider, start["binding"], {**weight, "step": 0.25}),
                )
                label = "Regions: left,top,right,bottom in shares for each image, or none"
                field = gr.Textbox("", label=label, placeholder="0,0,0.5,1 0.5,0,1,1", elem_id="regions")
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
            scale = slider("Strength", 2, 1.0)
            start = slider("Start, share of the steps", 1, 0.0)
            end = slider("End, share of the steps", 1, 1.0)
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
        look = {"object_fit": "contain", "format": "png", "interactive": False}
        look["buttons"] = ["download", "download_all", "fullscreen"]
        models = self.service.models
        # 64 pixels are enlarged to be seen: as they are, not blurred
        look["elem_classes"] = ["kg-sprites"] if models.is_builtin(models.default) else []
        with gr.Tabs():
            with gr.Tab("Images"):
                self.images = Gallery(label="Images", columns=2, height=520, elem_id="images", **look)
            with gr.Tab("Where each image went", visible=False, elem_id="maps-tab") as self.maps_tab:
                label = "For each image the places that come from each source"
                self.maps = Gallery(label=label, columns=1, height=520, elem_id="maps-shown", **look)
        self.settings = gr.JSON(label="Settings of the images", visible=False)
        self.details = gr.HTML(elem_id="details")
        self.use = gr.Button("Use the chosen image as input", size="sm", elem_id="use")
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
            self.prompt_line,
            trigger_mode="always_last",
            **QUICK,
        )
        for button in self.presets:
            outputs = [self.fields[name] for name in PRESETS[button.value]]
            button.click(partial(actions.preset, button.value), model, outputs, **QUICK)
        model.change(actions.example_groups, model, self.example_groups, **QUICK)
        self._connect_run(actions)
        self._connect_results(actions)
        self._connect_words(actions)

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
        used = self.use.click(actions.use_as_input, [self.session, self.references], self.references, **QUICK)
        used.failure(**failed, **QUICK)
        outputs = [*self.fields.values(), self.messages["restore"], self.words]
        restore = partial(actions.restore, names=list(self.fields))
        back = self.restored.upload(restore, [self.session, self.restored], outputs, **QUICK)
        back.failure(**failed, **QUICK)
        for end in (back.success, back.failure):
            end(lambda: None, None, self.restored, **QUICK)  # ready for the next

    def _connect_words(self, actions):
        model = {"model": self.fields["model"]}
        given = {**model, "name": self.word_name, "pictures": self.word_images}
        self._endpoint(self.word_add.click, "add_word", actions.add_word, given, self.words)
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
