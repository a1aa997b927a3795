"""Which files hold the rows: the official train.json manifests, folders, patterns, single files."""

import glob
import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

MOST_MANIFEST_BYTES = 64 * 1024**2


def find_tsv_files(where):
    """The TSV files that `where` names, in the order of the manifest or of their names.

    Args:
        where: a train.json manifest, a folder that holds one (in `json/`, as the official ones do, or directly) or else
            .tsv files, a pattern such as /data/part-*.tsv, or a .tsv file.

    A manifest is a list of `{"source": [file, ...], ...}`. The official loaders look for the files in the folder above
    `json/` (captions) or in its `data/` (edits, compositions); both are tried here, and the manifest's own folder.

    Raises:
        ValueError: nothing is found, the manifest is no such list, or files that it names are missing (all are named).
    """
    path = Path(where).expanduser()
    if path.is_dir():
        manifests = [path / "json" / "train.json", path / "train.json"]
        manifest = next((candidate for candidate in manifests if candidate.is_file()), None)
        if manifest is not None:
            return read_manifest(manifest)
        files = sorted(path.glob("*.tsv")) or sorted(path.glob("data/*.tsv"))
        looked_for = "json/train.json, train.json, *.tsv and data/*.tsv were looked for in this folder"
    elif path.is_file():
        return read_manifest(path) if path.suffix == ".json" else [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        looked_for = "there is no such file, folder or pattern with a match"
    if not files:
        raise ValueError(
            f"No data found at {where}: {looked_for}. Pass a train.json manifest, its folder, a .tsv file or a pattern."
        )
    return files


def read_manifest(path):
    """The existing files that a train.json names, in its order. Raises ValueError as `find_tsv_files` does."""
    entries = load_json_file(path)
    expected = 'Expected a list of {"source": ["0000.tsv", ...]}, as in the official train.json.'
    if not isinstance(entries, list) or not entries:
        given = f"a {type(entries).__name__}" if not isinstance(entries, list) else "an empty list"
        raise ValueError(f"The manifest {path} holds {given}. {expected}")
    names = []
    for number, entry in enumerate(entries):
        source = entry.get("source") if isinstance(entry, dict) else None
        if not isinstance(source, list) or not all(isinstance(name, str) for name in source):
            raise ValueError(
                f"Entry {number} of the manifest {path} has no list of file names under 'source'. {expected}"
            )
        names += source
    if len({entry.get("weight", 1) for entry in entries}) > 1:
        logger.warning(
            "The entries of %s have different weights, which are not used: every row comes once in an epoch. To weight "
            "parts, make a manifest of each and mix them as sources of their own.",
            path,
        )
    folder = Path(path).resolve().parent
    root = folder.parent if folder.name == "json" else folder
    found = [
        next((base / name for base in (root, root / "data", folder) if (base / name).is_file()), None)
        for name in names
    ]
    missing = [name for name, file in zip(names, found, strict=True) if file is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} files that {path} names are missing: {', '.join(missing)}. They were "
            f"looked for in {root} and {root / 'data'}. Put them there, or take them out of the manifest."
        )
    if not found:
        raise ValueError(f"No data found: the manifest {path} names no files. {expected}")
    return found


def load_json_file(path):
    """A JSON file of bounded size. Raises ValueError with its path."""
    size = Path(path).stat().st_size
    if size > MOST_MANIFEST_BYTES:
        raise ValueError(f"{path} is {size:,} bytes large; a manifest may have {MOST_MANIFEST_BYTES:,}.")
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Expected a manifest.") from error
