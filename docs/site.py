"""Hook of mkdocs: documents outside docs/ that a page links to join the site, and links between the two are rewritten.

The site's README.md is the repository's. A linked file that is not a document, such as a program, is copied as it is.
"""

import os
import re
from pathlib import Path
from urllib.parse import urldefrag

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FIRST = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
)  # pages that mkdocs.yml names
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


def on_files(files, config):
    found = [ROOT / name for name in FIRST] + [
        Path(file.abs_src_path) for file in files.documentation_pages()
    ]
    for path in found:  # grows: a document may link to another
        if place_of(path) not in files.src_uris:
            files.append(File.generated(config, place_of(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            found += [target for target in targets_of(path) if target not in found]
    return files


def on_page_markdown(markdown, page, config, files):
    path = ROOT / page.file.src_uri if (ROOT / page.file.src_uri).is_file() else DOCS / page.file.src_uri

    def rewrite(link):
        place, anchor = urldefrag(link[0])
        target = (path.parent / place).resolve()
        if not place or ":" in place or place_of(target) not in files.src_uris:
            return link[0]
        place = os.path.relpath(place_of(target), Path(page.file.src_uri).parent)
        return f"{place}#{anchor}" if anchor else place

    parts = CODE.split(markdown)  # prose and code in turns
    return "".join(part if number % 2 else LINK.sub(rewrite, part) for number, part in enumerate(parts))


def place_of(path):
    """Where a file of the repository lies in the site: docs/ is its top."""
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def targets_of(path):
    """Files of the repository that a document links to."""
    for link in LINK.findall(CODE.sub("", path.read_text(encoding="utf-8"))):
        target = (path.parent / urldefrag(link)[0]).resolve()
        if ":" not in link and target.is_file() and target.is_relative_to(ROOT):
            yield target
