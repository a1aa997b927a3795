"""A page on which a person can look at what shards hold: texts, images, and each thing next to its cut-out."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import PIL.Image

from ...files import check_output_file, written_atomically
from ..recipes import interleave
from ..sample import BadSample
from ..shards import ShardSource

SHEET_NAME = "contact-sheet.html"
THUMBNAIL = 160  # pixels of the longer side
QUALITY = 80
MOST_TEXT = 1000  # characters of a list of texts or a note

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
svg { background: #fff; margin: 0 1em 1em 0 }
svg text { font: 11px sans-serif; fill: #111 }
s { color: #a33 }
.prompt img { display: inline-block; vertical-align: middle; margin: 2px }
</style>
<h1>{{ title }}</h1>
{% if manifest %}<pre>{{ manifest }}</pre>{% endif %}
{% for plot in plots %}
<svg width="{{ plot.width }}" height="{{ plot.height }}" role="img" aria-label="{{ plot.title }}"><text x="4" y="14">{{ plot.title }}</text>
{% for bar in plot.bars %}<rect x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar.height }}" fill="{{ bar.fill }}"><title>{{ bar.label }}</title></rect>
{% endfor %}
{% for mark in plot.marks %}<text x="{{ mark.x }}" y="{{ mark.y }}" text-anchor="{{ mark.anchor }}">{{ mark.text }}</text>
{% endfor %}
</svg>
{% endfor %}
{% for sample in samples %}
<article><small>{{ sample.key }}</small>{{ sample.problem }}
{% if sample.trained %}
<div class="prompt"><small>prompt</small>
{% for part in sample.trained.prompt %}{% if part.data %}<img src="data:image/jpeg;base64,{{ part.data }}" alt="">{% elif part.dropped %}<s>{{ part.text }}</s>{% else %}{{ part.text }}{% endif %}
{% endfor %}
<small>{{ sample.trained.length }}</small></div>
{% if sample.trained.target %}<figure><img src="data:image/jpeg;base64,{{ sample.trained.target.data }}" alt=""><figcaption>to draw<br>{{ sample.trained.target.size }}</figcaption></figure>{% endif %}
{% if sample.trained.caption %}<div><small>caption</small> {{ sample.trained.caption }}</div>{% endif %}
<div><small>as it is stored</small></div>
{% endif %}
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
    source = ShardSource(where)
    total = len(source)
    if samples < 1:
        raise ValueError(f"{samples} of the {total} samples at {where} were asked for. Ask for at least one.")
    chosen = np.unique(np.linspace(0, total - 1, min(samples, total)).round().astype(int))
    shown = [describe_stored(source, int(index)) for index in chosen]
    manifest = Path(where) / "manifest.json"
    text = manifest.read_text(encoding="utf-8") if manifest.is_file() else None
    return write_page(path, f"{len(shown)} of {total:,} samples", shown, text)


def write_page(
    path: str | Path, title: str, samples: list[dict[str, Any]], text: str | None = None, plots: Any = ()
) -> Path:
    """Write the page of samples.

    Args:
        samples: as `describe_stored` describes them, with `trained` besides: what training reads of them.
        text: shown above them.
        plots: `Plot`s, shown above them.
    """
    page = PAGE.render(title=title, manifest=text, samples=samples, plots=plots)
    with written_atomically(path) as file:
        file.write(page.encode("utf-8", errors="replace"))
    return Path(path)


def describe_stored(source: Any, index: int) -> dict[str, Any]:
    """What the page shows of a sample of a source as it is stored: texts, images, note, or what is wrong."""
    try:
        record = source.record(index)
    except BadSample as problem:
        return {"key": f"{source.name}:{index}", "problem": problem}
    content, entities = record.content, record.content.get("entities")
    entities = [name for name in entities if isinstance(name, str)] if isinstance(entities, list) else []
    texts = {
        name: content[name] for name in ("caption", "input", "edit") if isinstance(content.get(name), str)
    }
    for name in ("caption", "edit", "input", "prompt", "prompts", "boxes"):
        if name in content and name not in texts:
            texts[name] = json.dumps(content[name], ensure_ascii=False)[:MOST_TEXT]
    return {
        "key": record.key,
        "texts": {name: _mark(text, entities if name == "caption" else []) for name, text in texts.items()},
        "figures": [_describe_image(record, name, entities) for name in record.images],
        "note": json.dumps(content.get("note"), ensure_ascii=False)[:MOST_TEXT],
    }


def _mark(caption, entities):
    """The caption as pairs: text, then an entity where training finds one."""
    pairs, parts = [], interleave(caption, entities) or [caption]
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        if isinstance(part, str):
            name = "" if isinstance(following, str) else entities[following].lower()
            start = part.lower().rfind(name) if name else len(part)
            pairs.append((part[:start], part[start:]))
    return pairs


def _describe_image(record, name, entities):
    number, _, rest = name.partition(".")
    label = name or "target"
    if number.isdigit() and int(number) < len(entities):
        label = f"{entities[int(number)]}{' (' + rest + ')' if rest else ''}"
    try:
        return figure(record.image(name), label)
    except BadSample as problem:
        return {"label": label, "problem": problem.message}


def figure(image: PIL.Image.Image, label: str) -> dict[str, str]:
    """What the page shows of an image."""
    size = f"{image.width} x {image.height}"
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return {"label": label, "size": size, "data": base64.b64encode(buffer.getvalue()).decode()}
