"""HTML sheets of a run's images: self-contained but for the images, which they find beside them."""

import base64
import io
import os
import re
from html import escape
from pathlib import Path

import PIL.Image

from ..files import write_text
from ..processing_kosmos_g import open_image
from .images import image_path

LONGEST = 100  # images of a sheet; a longer one says how many are left out
THUMBNAIL = 224  # pixels, longest side of an input picture
SMALL = 128  # pixels, longest side of what is shown enlarged
CONTROL = ".shuffled."  # in the name of a metric that is the control of the one without it
STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222}
h1{font-size:1.4em}table{border-collapse:collapse}td,th{padding:4px 8px;text-align:left;vertical-align:top}
.images{display:flex;flex-wrap:wrap;gap:10px;margin:6px 0 22px}figure{margin:0;width:240px}
img{max-width:100%;image-rendering:auto;display:block;background:#eee}figcaption{font-size:12px;color:#555}
.inputs figure{width:160px}figure.small{width:170px}.small img{width:128px;image-rendering:pixelated}
.images b{flex:0 0 1.2em;color:#222}.pair{display:flex;flex-wrap:wrap;gap:0 30px}"""


def write_sheets(folder, manifest, scores):
    """A sheet for each unit, or for each row where a unit is a single image, and an index of them.

    Returns:
        Paths of the sheets from `folder`, in order.
    """
    folder = Path(folder)
    groups = group_tasks(manifest)
    paths = {name: f"sheets/{file_name(name)}.html" for name in groups}
    for name, tasks in groups.items():
        body = [f"<p><a href='index.html'>all sheets</a></p><h1>{escape(name)}</h1>"]
        shown = tasks[:LONGEST]
        if len(shown) < len(tasks):
            body.append(f"<p>The first {len(shown)} of {len(tasks)} images; the others are in images/.</p>")
        body.append(_images_by_row(folder, manifest, shown, scores))
        write_page(folder / paths[name], name, "\n".join(body))
    links = "".join(
        f"<li><a href='{Path(path).name}'>{escape(name)}</a></li>" for name, path in paths.items()
    )
    write_page(
        folder / "sheets" / "index.html",
        manifest.benchmark,
        f"<h1>{escape(manifest.benchmark)}</h1><ul>{links}</ul>",
    )
    return list(paths.values())


def group_tasks(manifest):
    """Name of a sheet -> its tasks."""
    by_row = len(manifest.units) == len(manifest.tasks)
    groups = {}
    for task in manifest.tasks:
        groups.setdefault(task.row if by_row else task.unit, []).append(task)
    return groups


def file_name(name):
    return re.sub(r"[^\w+.-]+", "-", name).strip("-.")[:80] or "sheet"


def write_page(path, title, body):
    write_text(
        path,
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>\n"
        f"{body}\n</html>\n",
    )


def _images_by_row(folder, manifest, tasks, scores):
    """The input pictures, once if all tasks have the same, and under each prompt its images."""
    parts = []
    shared = len({task.pictures for task in tasks}) == 1
    if shared:
        parts.append(show_inputs(manifest.data, tasks[0].pictures))
    for group in group_by_prompt(tasks):
        parts.append(f"<h3>{escape(group[0].prompt)}</h3>")
        if not shared:
            parts.append(show_inputs(manifest.data, group[0].pictures))
        parts.append(show_images(folder / "sheets", folder, group, scores))
    return "\n".join(parts)


def group_by_prompt(tasks):
    """Lists of tasks of one prompt with the same pictures."""
    groups = {}
    for task in tasks:
        groups.setdefault((task.prompt, task.pictures), []).append(task)
    return list(groups.values())


def show_images(page_folder, folder, tasks, scores, title=""):
    """A row of images of a run with their scores; the page finds them relative to itself."""
    figures = []
    for task in tasks:
        path = image_path(folder, task)
        source = Path(os.path.relpath(path, page_folder)).as_posix()
        lines = [
            f"{escape(name.removeprefix(f'{task.row}.'))} {value:.3f}"
            for name, value in scores[task.id].items()
            if CONTROL not in name
        ]
        with PIL.Image.open(path) as image:
            size = image.size
        figures.append(
            f"<figure{_style(size)}><img src='{escape(source)}' alt='{escape(task.id)}' loading='lazy'>"
            f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
        )
    title = f"<b>{escape(title)}</b>" if title else ""
    return f"<div class='images'>{title}{''.join(figures)}</div>"


def show_inputs(data, pictures):
    """A row of what a prompt shows, from the data folder."""
    figures = "".join(_thumbnail(Path(data) / path, path) for path in pictures)
    return f"<div class='images inputs'>{figures}</div>" if figures else ""


def _thumbnail(path, name):
    """A picture inside the page, which then needs no data folder."""
    picture = open_image(path, str(path))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "png" if max(picture.size) <= SMALL else "jpeg"
    file = io.BytesIO()
    picture.save(file, format=kind)
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f"<figure{_style(picture.size)}><img src='data:image/{kind};base64,{content}' alt=''>"
        f"<figcaption>{escape(name)}</figcaption></figure>"
    )


def _style(size):
    """Class of a picture of few pixels, which is shown larger."""
    return " class='small'" if max(size) <= SMALL else ""
