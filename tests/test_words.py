"""One word for one thing, and the field's: words that the code and the documents no longer use."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "src/kosmos_g_diffusers"
FILES = [
    path
    for folder in ("src", "docs", "examples", "benchmarks", "pipelines")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".toml", ".css", ".js", ".html", ".json", ".txt")
    and path.name not in ("tokenizer.json", "PROVENANCE.txt")
    and not any(part.endswith(".egg-info") for part in path.parts)
]
FILES += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "setup.cfg", "pyproject.toml")]

# retired word -> what takes its place
RETIRED = {
    r"knobs?": "setting",
    r"visitors?": "session, user",
    r"judge[sd]?": "scorer, score",
    r"mend(s|ed)?": "fix",
    r"(go|goes|going|went|gone) on with": "resume, continue, keep",
    r"goes on": "continues",
    r"handed back": "cancelled",
    r"given up": "cancelled",
    r"way back": "inverse projection",
    r"whole or not at all": "atomically",
    r"(?<!there )is no(?! (?:longer|more)\b)": "is not a",
    r"has not (a|the)": "does not have",
    r"pictures?": "image",
}

# What keeps its spelling: (word, files, what a line may say). Formats of saved files, names of the app's endpoints and of
# what they take, seeds, and the judges of other benchmarks, which are called so there.
EXCEPTIONS = (
    (r"judge[sd]?", r"(dreambench_plus|multibanana|omnicontext)\.py|docs/evaluation\.md", r".*"),
    # PNG settings
    (
        r"pictures?",
        rf"{PACKAGE}/(generation|commands|serving|app)/\w+\.py",
        r"control\.picture|\"picture\"|picture: InputImage",
    ),
    # evaluation manifests, runs and reports
    (
        r"pictures?",
        rf"{PACKAGE}/evaluation/.*|docs/sprites/report\.md",
        r"pictures=pictures,|\| counted .*|\.pictures|pictures[=:]|\"pictures|<picture-|\"no picture\"|task\[\"pictures\"\]|conditions and pictures\.|= pictures\b"
        r"|=pictures\b|\| counted .*|pictures=pictures,|^ +pictures = |image\|picture\|photo",
    ),
    (r"pictures?", r"examples/sprites/show_run\.py", r"(task|tasks\[0\])\.pictures"),
    # parameters, fields of errors and elements of the app
    (
        r"pictures?",
        rf"{PACKAGE}/(app|serving)/.*",
        r"[\"`]pictures[\"`]|word-pictures|\bpictures?=|\bpictures? (or|is)\b|picture, (strokes|field)"
        r"|\bpictures?: (str|Sequence)|kind, picture|^ +picture: path|pictures or|\(picture or",
    ),
    (r"pictures?", r"examples/app_client\.py", r"pictures="),
    # folders of the package
    (r"pictures?", rf"setup\.cfg|{PACKAGE}/app/examples\.py", r"static/pictures|\"static\" / \"pictures\""),
    # kinds of sources of training data, from whose names the random numbers derive; an array of a cached file
    (
        r"pictures?",
        rf"{PACKAGE}/sprites/source\.py|(examples|benchmarks)/.*\.py",
        r"\"((varied|asked) )?pictures\"|pictures=np",
    ),
    # the question of `kosmos-g data compose`, which its manifests record
    (r"pictures?", rf"{PACKAGE}/data/making/entities\.py", r"captions of pictures|cut out of the picture"),
)


def retired_words(path):
    """(number of the line, word, line) of each retired word in a file that is not an exception."""
    name = path.relative_to(ROOT).as_posix()
    allowed = [
        (word, said)
        for word, files, said in EXCEPTIONS
        if re.fullmatch(files, name) or re.search(files + "$", name)
    ]
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for word in RETIRED:
            rest = line
            for exception, said in allowed:
                if exception == word:
                    rest = re.sub(said, "", rest)
            if re.search(rf"\b(?:{word})(?!\w)", rest, re.IGNORECASE):
                yield number, word, line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_retired_words_are_gone(path):
    found = [
        f"line {number}: {RETIRED[word]!r} instead: {line.strip()[:120]}"
        for number, word, line in retired_words(path)
    ]
    assert not found
