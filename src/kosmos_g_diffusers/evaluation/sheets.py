"""HTML sheets of a run's images: self-contained but for the images, which they find by relative paths."""

import base64
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2  # torch requires it: it is always there
import PIL.Image

from ..files import write_text
from ..processing_kosmos_g import open_image
from ..provenance import UNMARKED, Marker
from .images import image_path
from .manifest import Manifest, Task

LONGEST = 100  # images of a sheet; a longer one says how many are left out
THUMBNAIL = 224  # pixels, longest side of an input image
SMALL = 128  # pixels, longest side of what is shown enlarged
CONTROL = ".shuffled."  # in the name of a metric that is the control of the one without it
PAGE: jinja2.Template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string("""\
<!doctype html><html lang='en'><meta charset='utf-8'><title>{{ title }}</title><style>
body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222}
h1{font-size:1.4em}table{border-collapse:collapse}td,th{padding:4px 8px;text-align:left;vertical-align:top}
.images{display:flex;flex-wrap:wrap;gap:10px;margin:6px 0 22px}figure{margin:0;width:240px}
img{max-width:100%;image-rendering:auto;display:block;background:#eee}figcaption{font-size:12px;color:#555}
.inputs figure{width:160px}figure.small{width:170px}.small img{width:128px;image-rendering:pixelated}
.images b{flex:0 0 1.2em;color:#222}.pair{display:flex;flex-wrap:wrap;gap:0 30px}
</style>
{% macro show(figures) %}{% for figure in figures %}
<figure{% if figure.small %} class='small'{% endif %}><img src='{{ figure.source }}' alt='{{ figure.alt }}' loading='lazy'>
<figcaption>{% for line in figure.lines %}{{ line }}<br>{% endfor %}</figcaption></figure>
{% endfor %}{% endmacro %}
{% if index %}<p><a href='{{ index }}'>all sheets</a></p>{% endif %}
<h1>{{ title }}</h1>
{% for line in notes %}<p>{{ line }}</p>{% endfor %}
{% if links %}<ul>{% for name, path in links %}<li><a href='{{ path }}'>{{ name }}</a></li>{% endfor %}</ul>{% endif %}
{% for part in parts %}
{% if part.prompt %}<h3>{{ part.prompt }}</h3>{% endif %}
{% if part.inputs %}<div class='images inputs'>{{ show(part.inputs) }}</div>{% endif %}
{% if part.rows %}<div class='pair'>
{% for title, figures in part.rows %}
<div class='images'>{% if title %}<b>{{ title }}</b>{% endif %}{{ show(figures) }}</div>
{% endfor %}
</div>{% endif %}

{% endfor %}
</html>
""")


def write_sheets(
    folder: str | Path, manifest: Manifest, scores: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """A sheet for each unit, or for each row where a unit is a single image, and an index of them.

    Returns:
        Paths of the sheets from `folder`, in order.
    """
    sheets = Path(folder) / "sheets"
    links = []
    for name, tasks in group_tasks(manifest).items():
        notes, shown = [], tasks[:LONGEST]
        if len(shown) < len(tasks):
            notes.append(f"The first {len(shown)} of {len(tasks)} images; the others are in images/.")
        shared = len({task.pictures for task in shown}) == 1
        parts = [{"inputs": input_figures(manifest.data, shown[0].pictures)}] if shared else []
        for group in group_by_prompt(shown):
            inputs = [] if shared else input_figures(manifest.data, group[0].pictures)
            row = ("", image_figures(sheets, folder, group, scores))
            parts.append({"prompt": group[0].prompt, "inputs": inputs, "rows": [row]})
        path = f"{file_name(name)}.html"
        links.append((name, path))
        write_page(sheets / path, title=name, index="index.html", notes=notes, parts=parts)
    write_page(sheets / "index.html", title=manifest.benchmark, links=links)
    return [f"sheets/{path}" for _, path in links]


def write_page(path: str | Path, **content: Any) -> None:
    """Write a page of title, index, notes, links (name, path) and parts, which have prompt, inputs and rows (title, figures)."""
    write_text(path, PAGE.render(content) + "\n")


def group_tasks(manifest: Manifest) -> dict[str, list[Task]]:
    """Name of a sheet -> its tasks."""
    by_row = len(manifest.units) == len(manifest.tasks)
    groups = {}
    for task in manifest.tasks:
        groups.setdefault(task.row if by_row else task.unit, []).append(task)
    return groups


def group_by_prompt(tasks: Iterable[Task]) -> list[list[Task]]:
    """Lists of tasks of one prompt with the same input images."""
    groups = {}
    for task in tasks:
        groups.setdefault((task.prompt, task.pictures), []).append(task)
    return list(groups.values())


def file_name(name: str) -> str:
    return re.sub(r"[^\w+.-]+", "-", name).strip("-.")[:80] or "sheet"


def image_figures(
    page_folder: Path, folder: Path, tasks: Iterable[Task], scores: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Images of a run with their scores; the page finds them relative to itself."""
    figures = []
    for task in tasks:
        path = image_path(folder, task)
        shown = {name: value for name, value in scores[task.id].items() if CONTROL not in name}
        lines = [f"{name.removeprefix(f'{task.row}.')} {value:.3f}" for name, value in shown.items()]
        source = Path(os.path.relpath(path, page_folder)).as_posix()
        with PIL.Image.open(path) as image:
            figures.append({"source": source, "alt": task.id, "lines": lines, "small": _is_small(image)})
    return figures


def input_figures(data: str | Path | None, paths: Iterable[str]) -> list[dict[str, Any]]:
    """What a prompt shows, inside the page, which then needs no data folder."""
    figures = []
    for path in paths:
        image = open_image(Path(data) / path, str(Path(data) / path))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        source = as_data_url(image, "png" if _is_small(image) else "jpeg")
        figures.append({"source": source, "lines": [path], "small": _is_small(image)})
    return figures


def as_data_url(image: PIL.Image.Image, kind: str, marker: Marker = UNMARKED) -> str:
    """A PIL image as text, encoded as "png" or "jpeg", with a `provenance.Marker` if a model drew it."""
    content = marker.encode(image, kind.upper())
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _is_small(image):
    """Whether it has so few pixels that it is shown larger."""
    return max(image.size) <= SMALL
