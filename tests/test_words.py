"""One word for one thing, and the field's: words that the code and the documents no longer use."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("src", "docs", "examples", "benchmarks", "pipelines")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".toml", ".css", ".js", ".html", ".txt")
]
FILES += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "setup.cfg", "pyproject.toml")]

# retired word -> what takes its place
RETIRED = {
    r"knobs?": "setting",
    r"visitors?": "session, user",
    r"judge[sd]?": "scorer, score",
    r"mend(s|ed|ing)?": "fix",
    r"(go|goes|going|went|gone) on with": "resume, continue, keep",
    r"(goes|went) on": "continues",
    r"handed back": "cancelled",
    r"given up": "cancelled",
    r"way back": "inverse projection",
    r"whole or not at all": "atomically",
    r"(?<!there )is no (?!longer\b|more\b)": "is not a",
    r"has not (a|an|the)": "does not have",
    r"pictures?": "image",
}

# what keeps its spelling, as a regular expression of the whole line: formats of saved files, the app's endpoints, seeds
EXCEPTIONS = {
    # the GPT judge of DreamBench++ is called so there
    r"judge": r"(?i)DreamBench(\+\+|-plus)|judge|GPT",
}
