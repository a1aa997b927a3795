"""A line of text -> a source of training data, for configs and the command line."""

from pathlib import Path
from urllib.parse import parse_qsl

from .folders import FolderSource
from .hub_datasets import HubDatasetSource
from .recipes import BACKGROUND, WORD_DROPOUT
from .sample import Source
from .shards import ShardSource
from .tsv import LAYOUTS, TsvSource
from .uses import USES, parse_uses

FORMS = """Known forms:
  tsv:captions:PATH       LAION rows; PATH is a train.json, its folder, a .tsv file or a pattern
  tsv:edits:PATH          InstructPix2Pix rows
  tsv:compositions:PATH   rows of captions with tags and cut-outs
  shards:PATH_OR_URL      WebDataset shards: part-{000..099}.tar, *.tar, a folder, a shards.json, or a URL
                          with ?image=SUFFIX&caption=SUFFIX, ... members of other names, or json.FIELD
  folder:PATH             images with .txt or .caption files next to them; ?image=SUFFIX&source=SUFFIX&edit=SUFFIX, ...
  datasets:NAME?image=COLUMN&caption=COLUMN   Hugging Face datasets, from the Hub or a folder; also split=, config=,
                          revision=, data_dir=, data_files=, root=, streaming=true
Uses: image=, caption=; of edits edit=, source=, input=; of prompts prompt=, images=, marks=omnigen|none; of documents texts=,
images=, places=; of compositions boxes= or entities=; split_image=left|right, split_border=; score=&min_score=N.
docs/data.md describes them."""
DATASET_OPTIONS = (*"split config revision data_dir data_files root streaming cache_gib".split(), *USES)


def build_source(
    spec: str,
    *,
    word_dropout: float = WORD_DROPOUT,
    background: float = BACKGROUND,
    min_side: int = 0,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
) -> Source:
    """The source that a line such as "tsv:captions:/data/laion/json/train.json" describes.

    Args:
        spec: one of `FORMS`.
        word_dropout: probability that the words next to the images of a prompt are left out.
        background: probability that the image of an entity has its background.
        min_side: captioned images of TSV rows with a smaller side are left out; the official stage 3 takes 384.
        cache_dir: folder for what is kept between runs; None takes kosmos-g in the user's cache folder.
        cache_bytes: most that fetched shards may take there; None for no limit.

    Raises:
        ValueError: an unknown form, with the known ones; no data found; files missing; wrong columns.
    """
    form, _, rest = spec.partition(":")
    common = {"word_dropout": word_dropout, "background": background, "cache_dir": cache_dir}
    if form == "tsv":
        kind, _, where = rest.partition(":")
        if kind in LAYOUTS and where:
            return TsvSource(kind, where, name=spec, min_side=min_side, **common)
    if form == "shards" and rest:
        where, uses = _split_uses(spec, rest)
        return ShardSource(where, name=spec.partition("?")[0], cache_bytes=cache_bytes, uses=uses, **common)
    if form == "folder" and rest:
        where, uses = _split_uses(spec, rest)
        return FolderSource(where, name=spec, uses=uses, **common)
    if form == "datasets" and rest:
        name, _, query = rest.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        if "token" in options:
            raise ValueError(
                f"{spec.partition('token=')[0]}... has a token, and lines are stored with runs. Set HF_TOKEN instead, or log in with hf auth login."
            )
        unknown = sorted(set(options) - set(DATASET_OPTIONS))
        if unknown:
            raise ValueError(
                f"{spec!r} has the unknown options {', '.join(unknown)}. Known: {', '.join(DATASET_OPTIONS)}."
            )
        if name:
            chances = {"word_dropout": word_dropout, "background": background}
            return HubDatasetSource.load(name, cache_dir=cache_dir, **chances, **options)
    raise ValueError(f"{spec!r} is not a source of training data.\n{FORMS}")


def _split_uses(spec, rest):
    """(path or URL, Uses or None) of what follows a form; the rest of a URL's query stays its own."""
    where, _, query = rest.partition("?")
    uses = {use: name for use, name in parse_qsl(query, keep_blank_values=True) if use in USES}
    if not uses:
        return rest, None
    own = "&".join(part for part in query.split("&") if part.partition("=")[0] not in USES)
    if not {"caption", "edit", "prompt", "texts"} & {use for use, name in uses.items() if name}:
        raise ValueError(
            f"{spec!r} names no text. Pass caption=, edit= or prompt= with the ending of its file."
        )
    return f"{where}?{own}" if own else where, parse_uses(repr(spec), uses)
