"""gradio's components with what this page needs of them: no path of the server goes out, no address is fetched."""

import os
from pathlib import Path
from typing import Any

import gradio as gr

STATIC = Path(__file__).parent / "static"
BOARD = """<div class="kg-board"><canvas role="img" aria-label="{}: a board to paint on"></canvas>
<label>Brush <input type="range" min="1" max="40" value="8"></label><button type="button">Clear</button></div>"""


class Derived:
    """Mixed into a component of gradio, whose frontend knows its own alone: this is the one that the class derives from."""

    def get_block_name(self) -> str:
        own = next(base for base in type(self).__mro__ if base.__module__.startswith("gradio."))
        return own.__name__.lower()


class OwnFiles(Derived):
    """Mixed into a component: its files are named from the output folder, where the server runs, and stay where they are.

    gradio itself would copy what it is given, and begin an empty file for every file of every call.
    """

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        return self.move_resource_to_block_cache(url_or_file_path)

    def move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        if url_or_file_path is None:
            return None
        if "://" in str(url_or_file_path):
            raise gr.Error("Upload the image; addresses are not opened here.", print_exception=False)
        return os.path.relpath(url_or_file_path)

    def preprocess(self, payload: Any) -> list[str] | str | None:
        """Paths of the files that a call names: a list where there may be several."""
        if payload is None:
            return None
        files = [getattr(file, "path", file) for file in getattr(payload, "root", [payload])]
        if getattr(self, "file_count", "single") == "multiple":
            return files
        return files[0] if files else None


class Text(Derived, gr.Textbox):
    """gradio would draw chat content, or whatever else is sent, as what Python prints of it."""

    def preprocess(self, payload: Any) -> str | None:
        if payload is not None and not isinstance(payload, str):
            message = f"{self.elem_id}: This is not a text. Images come as uploads, one for each <i>."
            raise gr.Error(message, visible=False, print_exception=False)
        return payload


class Files(OwnFiles, gr.File):
    pass


class Upload(OwnFiles, gr.UploadButton):
    pass


class Image(OwnFiles, gr.Image):
    pass


class Gallery(OwnFiles, gr.Gallery):
    pass


def read_static(name: str) -> str:
    """The text of a file of static/."""
    return (STATIC / name).read_text(encoding="utf-8")


def strip(label: str, **options: Any) -> gr.HTML:
    """Thumbnails to be dragged into order: gr.HTML whose property `images` is a list of {path, name, source}, the source a
    data: URI or None; its event `input` tells the paths in their new order, as its value.

    gr.File lets its files be dragged, but shows their names alone; gr.Gallery shows them, but has another value.
    """
    template = f'<ul class="kg-tiles" aria-label="{label}"></ul>'
    script = read_static("strip.js")
    return gr.HTML(
        None, label=label, html_template=template, js_on_load=script, images=[], padding=False, **options
    )


def example_buttons(html: str, **options: Any) -> gr.HTML:
    """Buttons with an attribute `data-example`: gr.HTML whose event `click` tells the attribute of one, as its value."""
    script = read_static("examples.js")
    return gr.HTML("", html_template=html, js_on_load=script, **options)


def board(label: str, **options: Any) -> gr.HTML:
    """An image to paint on: gr.HTML whose property `image` is a data: URI, and its value the strokes, likewise.

    gr.ImageEditor draws with WebGL, which browsers without a graphics card do not have, and keeps every drawing that was
    ever begun in the server's memory.
    """
    script = read_static("board.js")
    return gr.HTML("", label=label, html_template=BOARD.format(label), js_on_load=script, image="", **options)
