"""HTML sheets of a run's images: self-contained but for the images, which they find beside them."""

import base64
import io
import os
import re
from html import escape
from pathlib import Path

from ..processing_kosmos_g import open_image
from .engine import image_path
from .manifest import write_text

LONGEST = 100  # images of a sheet; a longer one says how many are left out
THUMBNAIL = 224  # pixels, longest side of an input picture
STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222}
h1{font-size:1.4em}table{border-collapse:collapse}td,th{padding:4px 8px;text-align:left;vertical-align:top}
.images{display:flex;flex-wrap:wrap;gap:10px;margin:6px 0 22px}figure{margin:0;width:240px}
img{max-width:100%;image-rendering:auto;display:block;background:#eee}figcaption{font-size:12px;color:#555}
.inputs figure{width:160px}.small img{width:128px;image-rendering:pixelated}.small figure{width:150px}"""


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
        parts.append(_inputs(manifest, tasks[0].pictures))
    rows = {}
    for task in tasks:
        rows.setdefault(task.prompt if shared else (task.prompt, task.pictures), []).append(task)
    for group in rows.values():
        parts.append(f"<h3>{escape(group[0].prompt)}</h3>")
        if not shared:
            parts.append(_inputs(manifest, group[0].pictures))
        figures = [figure(folder / "sheets", folder, task, scores[task.id]) for task in group]
        parts.append(f"<div class='images{is_small(manifest)}'>{''.join(figures)}</div>")
    return "\n".join(parts)


def is_small(manifest):
    """Style of pictures of few pixels, which are shown larger."""
    return " small" if (manifest.settings["height"] or 512) <= 128 else ""


def figure(page_folder, folder, task, scores, title=""):
    """An image of a run with its scores; the page finds it relative to itself."""
    source = Path(os.path.relpath(image_path(folder, task), page_folder)).as_posix()
    lines = [f"<b>{escape(title)}</b>"] if title else []
    lines += [f"{escape(name)} {value:.3f}" for name, value in scores.items()]
    return f"<figure><img src='{escape(source)}' alt='{escape(task.id)}' loading='lazy'><figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def _inputs(manifest, pictures):
    figures = "".join(
        f"<figure><img src='{_thumbnail(Path(manifest.data) / path)}' alt=''><figcaption>{escape(path)}</figcaption></figure>"
        for path in pictures
    )
    return f"<div class='images inputs'>{figures}</div>"


def _thumbnail(path):
    """A picture as a data address, so that the sheet needs no data folder."""
    picture = open_image(path, str(path))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, format="PNG" if max(picture.size) <= 64 else "JPEG")
    kind = "png" if max(picture.size) <= 64 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
