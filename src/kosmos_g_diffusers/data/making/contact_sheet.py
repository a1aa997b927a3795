"""A page on which a person can look at what shards hold: texts, pictures, and each thing beside its cut-out."""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np

from ...files import written_atomically
from ..recipes import interleave
from ..sample import BadSample
from ..shard_files import ShardFiles
from ..shards import PICTURE_ENDINGS, Members

SHEET_NAME = "contact-sheet.html"
THUMBNAIL = 160  # pixels of the longer side
QUALITY = 80

STYLE = """
body { font: 14px/1.4 sans-serif; margin: 2em; background: #eee; color: #111 }
article { background: #fff; padding: 1em; margin: 0 0 1em; overflow: auto }
figure { display: inline-block; margin: 0 .8em .4em 0; vertical-align: top; text-align: center }
img { display: block; border: 1px solid #aaa; background: #fff }
figcaption, small { color: #666; font-size: 12px }
mark { background: #fd6 }
pre { white-space: pre-wrap }
"""
# everything is in the page, and nothing that a text in it says is loaded or run
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_contact_sheet(where, path, samples=100):
    """Write an HTML page that shows samples of shards, spread evenly over them. It needs no other file.

    Args:
        where: as `ShardFiles` takes it: a folder of shards, a shard, a pattern, a URL.
        path: the page to write.
        samples: how many at most.

    Raises:
        ValueError: there are no shards, or no samples in them.
    """
    files = ShardFiles(where)
    counts = files.count()
    total = sum(counts)
    if not total or samples < 1:
        raise ValueError(
            f"{samples} of the {total} samples at {where} were asked for. Expected at least one."
        )
    ends = np.cumsum(counts)
    chosen = np.unique(np.linspace(0, total - 1, min(samples, total)).round().astype(int))
    articles = []
    for shard in range(len(files)):
        first = int(ends[shard]) - counts[shard]
        places = [int(number) - first for number in chosen if first <= number < ends[shard]]
        if places:
            articles += _show_shard(files, shard, places)
    manifest = Path(where) / "manifest.json"
    about = f"<pre>{html.escape(manifest.read_text(encoding='utf-8'))}</pre>" if manifest.is_file() else ""
    title = f"{len(articles)} of {total:,} samples"
    page = (
        f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>{title}</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style>'
        f"<h1>{title}</h1>{about}{''.join(articles)}</html>\n"
    )
    with written_atomically(path) as file:
        file.write(page.encode("utf-8", errors="replace"))
    return Path(path)


def _show_shard(files, shard, places):
    try:
        samples = files.index(shard)
        return [_show(Members(files, shard, samples[place])) for place in places if place < len(samples)]
    except BadSample as problem:
        return [f"<article>{html.escape(str(problem))}</article>"]


def _show(members):
    try:
        record = members.record()
        texts = {
            name: record[name] for name in ("caption", "input", "edit") if isinstance(record.get(name), str)
        }
        entities = record.get("entities")
        entities = [name for name in entities if isinstance(name, str)] if isinstance(entities, list) else []
        lines = [
            f"<div><small>{name}</small> {_mark(text, entities) if name == 'caption' else html.escape(text)}</div>"
            for name, text in texts.items()
        ]
        if "prompt" in record:
            lines.append(
                f"<div><small>prompt</small> {html.escape(json.dumps(record['prompt'])[:1000])}</div>"
            )
        figures = [_figure(members, name, entities) for name in _picture_names(members)]
        note = f"<small>{html.escape(json.dumps(record.get('note'), ensure_ascii=False)[:500])}</small>"
        body = f"{''.join(lines)}{''.join(figures)}<div>{note}</div>"
    except BadSample as problem:
        body = html.escape(str(problem))
    return f"<article><small>{html.escape(members.key)}</small>{body}</article>"


def _mark(caption, entities):
    """The caption with its entities marked, as training finds them."""
    parts = interleave(caption, entities)
    shown = []
    for place, part in enumerate(parts):
        if not isinstance(part, str):
            continue
        name = (
            entities[parts[place + 1]]
            if place + 1 < len(parts) and not isinstance(parts[place + 1], str)
            else ""
        )
        start = part.lower().rfind(name.lower()) if name else len(part)
        shown.append(html.escape(part[:start]))
        if name:
            shown.append(f"<mark>{html.escape(part[start:])}</mark>")
    return "".join(shown)


def _picture_names(members):
    """Names of the pictures: the one to draw first, then "0", "0.cutout", "1", ..."""
    names = {
        name.rpartition(".")[0]
        for name in members.sample.members
        if name.rpartition(".")[2] in PICTURE_ENDINGS
    }
    return sorted(names, key=lambda name: (name not in ("", "target"), len(name.partition(".")[0]), name))


def _figure(members, name, entities):
    number, _, rest = name.partition(".")
    label = name or "target"
    if number.isdigit() and int(number) < len(entities):
        label = f"{entities[int(number)]}{' (' + rest + ')' if rest else ''}"
    try:
        picture = members.picture(name) if name else members.target()
    except BadSample as problem:
        return f"<figure>{html.escape(problem.message)}<figcaption>{html.escape(label)}</figcaption></figure>"
    size = f"{picture.width} x {picture.height}"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = f"<figcaption>{html.escape(label)}<br>{size}</figcaption>"
    return f'<figure><img src="data:image/jpeg;base64,{data}" alt="">{caption}</figure>'
