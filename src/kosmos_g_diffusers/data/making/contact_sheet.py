"""A page on which a person can look at what shards hold: texts, images, and each thing next to its cut-out."""

import base64
import io
import json
from pathlib import Path

import jinja2
import numpy as np

from ...files import check_output_file, written_atomically
from ..recipes import interleave
from ..sample import BadSample
from ..shard_files import ShardFiles
from ..shards import IMAGE_ENDINGS, Members

SHEET_NAME = "contact-sheet.html"
THUMBNAIL = 160  # pixels of the longer side
QUALITY = 80

# everything is in the page, and nothing that a text in it says is loaded or run
PAGE: jinja2.Template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 14px/1.4 sans-serif; margin: 2em; background: #eee; color: #111 }
article { background: #fff; padding: 1em; margin: 0 0 1em; overflow: auto }
figure { display: inline-block; margin: 0 .8em .4em 0; vertical-align: top; text-align: center }
img { display: block; border: 1px solid #aaa; background: #fff }
figcaption, small { color: #666; font-size: 12px }
mark { background: #fd6 }
pre { white-space: pre-wrap }
</style>
<h1>{{ title }}</h1>
{% if manifest %}<pre>{{ manifest }}</pre>{% endif %}
{% for sample in samples %}
<article><small>{{ sample.key }}</small>{{ sample.problem }}
{% for name, parts in (sample.texts or {}).items() %}
<div><small>{{ name }}</small>
{% for plain, marked in parts %}{{ plain }}{% if marked %}<mark>{{ marked }}</mark>{% endif %}{% endfor %}</div>
{% endfor %}
{% for figure in sample.figures -%}
<figure>{% if figure.data %}<img src="data:image/jpeg;base64,{{ figure.data }}" alt="">{% endif %}{{ figure.problem }}
<figcaption>{{ figure.label }}{% if figure.size %}<br>{{ figure.size }}{% endif %}</figcaption></figure>
{%- endfor %}
<div><small>{{ sample.note }}</small></div></article>
{% endfor %}
</html>
""")


def write_contact_sheet(where: str | Path, path: str | Path, samples: int = 100) -> Path:
    """Write an HTML page that shows samples of shards, spread evenly over them. It needs no other file.

    Args:
        where: as `ShardFiles` takes it: a folder of shards, a shard, a pattern, a URL.
        path: the page to write.
        samples: how many at most.

    Raises:
        ValueError: there are no shards, or no samples in them; the page cannot be written.
    """
    path = check_output_file(path)
    files = ShardFiles(where)
    counts = files.count()
    total = sum(counts)
    if not total or samples < 1:
        raise ValueError(f"{samples} of the {total} samples at {where} were asked for. Ask for at least one.")
    ends = np.cumsum(counts)
    chosen = np.unique(np.linspace(0, total - 1, min(samples, total)).round().astype(int))
    shown = []
    for shard in range(len(files)):
        first = int(ends[shard]) - counts[shard]
        places = [int(number) - first for number in chosen if first <= number < ends[shard]]
        if places:
            shown += _describe_shard(files, shard, places)
    manifest = Path(where) / "manifest.json"
    page = PAGE.render(
        title=f"{len(shown)} of {total:,} samples",
        manifest=manifest.read_text(encoding="utf-8") if manifest.is_file() else None,
        samples=shown,
    )
    with written_atomically(path) as file:
        file.write(page.encode("utf-8", errors="replace"))
    return path


def _describe_shard(files, shard, places):
    """What the page shows of samples, as dicts of texts; what is left out of them shows nothing."""
    try:
        samples = files.index(shard)
    except BadSample as problem:
        return [{"problem": problem}]
    return [_describe(Members(files, shard, samples[place])) for place in places if place < len(samples)]


def _describe(members):
    try:
        record = members.record()
    except BadSample as problem:
        return {"key": members.key, "problem": problem}
    entities = record.get("entities")
    entities = [name for name in entities if isinstance(name, str)] if isinstance(entities, list) else []
    texts = {name: record[name] for name in ("caption", "input", "edit") if isinstance(record.get(name), str)}
    if "prompt" in record:
        texts["prompt"] = json.dumps(record["prompt"])[:1000]
    return {
        "key": members.key,
        "texts": {name: _mark(text, entities if name == "caption" else []) for name, text in texts.items()},
        "figures": [_describe_image(members, name, entities) for name in _image_names(members)],
        "note": json.dumps(record.get("note"), ensure_ascii=False)[:500],
    }


def _mark(caption, entities):
    """The caption as pairs: text, then an entity where training finds one."""
    pairs, parts = [], interleave(caption, entities)
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        if isinstance(part, str):
            name = "" if isinstance(following, str) else entities[following].lower()
            start = part.lower().rfind(name) if name else len(part)
            pairs.append((part[:start], part[start:]))
    return pairs


def _image_names(members):
    """Names of the images: the one to draw first, then "0", "0.cutout", "1", ..."""
    parts = (member.rpartition(".") for member in members.sample.members)
    names = {name for name, _, ending in parts if ending in IMAGE_ENDINGS}
    return sorted(names, key=lambda name: (name not in ("", "target"), len(name.partition(".")[0]), name))


def _describe_image(members, name, entities):
    number, _, rest = name.partition(".")
    label = name or "target"
    if number.isdigit() and int(number) < len(entities):
        label = f"{entities[int(number)]}{' (' + rest + ')' if rest else ''}"
    try:
        image = members.image(name)
    except BadSample as problem:
        return {"label": label, "problem": problem.message}
    size = f"{image.width} x {image.height}"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return {"label": label, "size": size, "data": base64.b64encode(buffer.getvalue()).decode()}
