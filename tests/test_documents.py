"""README.md and docs/: code blocks do what they say, links lead somewhere, versions agree.

The line before a code block may be a mark in an HTML comment. `run`, the default: it runs as printed, with the small model
that ships, in a folder of its own that the blocks of a page share, in which `examples` is the repository's. `check`: it
needs weights, a GPU or the network, so its flags are parsed, its names and keywords looked up. `text`: neither.
"""

import ast
import builtins
import configparser
import inspect
import re
import runpy
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from kosmos_g_diffusers import __version__
from kosmos_g_diffusers.cli import build_parser, main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "examples/**/*.md", ".github/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
MARKS = ("run", "check", "text")
LANGUAGES = ("python", "bash")  # of blocks that run or are checked
# commands of other programs, of which nothing is checked
FOREIGN = ("cd", "cp", "docker", "export", "git", "npm", "tar", "source", "python3", "lmms-eval", "uvx")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


setup = configparser.ConfigParser()
setup.read(ROOT / "setup.cfg", encoding="utf-8")


# Code blocks --------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    mark: str
    language: str
    text: str
    place: str  # file and line, for messages


def read_blocks(path):
    blocks, mark, fence, language, place = [], "run", None, "", ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if fence is not None:
            if line.strip() == "```":
                blocks.append(Block(mark, language, "\n".join(fence), place))
                mark, fence = "run", None
            else:
                fence.append(line)
        elif line.startswith("```"):
            language, fence, place = line[3:].strip() or "bash", [], f"{name_of(path)}:{number}"
        elif found := re.fullmatch(r"<!-- (\w+) -->", line.strip()):
            mark = found[1]
        elif line.strip():
            mark = "run"
    return blocks


BLOCKS = {path: read_blocks(path) for path in PAGES}


def commands(block):
    """The words of each command of a bash block, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = (shlex.split(line, comments=True) for line in lines)
    return [command for command in words if command]


def pages_with(mark):
    pages = [path for path in PAGES if any(block.mark == mark for block in BLOCKS[path])]
    return pytest.mark.parametrize("path", pages, ids=name_of)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_code_block_has_a_mark_and_a_language_that_can_be_tested(path):
    for block in BLOCKS[path]:
        assert block.mark in MARKS, block.place
        assert block.mark == "text" or block.language in LANGUAGES, f"{block.place}: {block.language!r}"
    # a block that is indented instead of fenced would not be found
    prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\n\n {4}(?! *[-*\d])", prose)


def test_readme_is_short_and_most_of_its_blocks_run():
    marks = [block.mark for block in BLOCKS[README]]
    assert marks.count("run") > marks.count("check")
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 110


@pages_with("run")
def test_blocks_run_as_printed(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names = {}
    for block in BLOCKS[path]:
        if block.mark == "run" and block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
        elif block.mark == "run":
            for command in commands(block):
                run_command(command, block.place, monkeypatch)
    sys.modules.pop("common", None)


def run_command(command, place, monkeypatch):
    program, *arguments = command
    if program == "kosmos-g":
        try:
            code = main(arguments)
        except SystemExit as stopped:  # --help
            code = stopped.code
        assert not code, f"{place}: {shlex.join(command)}"
    elif program == "python":
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")
    elif program == "cp":
        *sources, target = arguments
        for source in sources:
            shutil.copy(source, target)
    else:
        raise AssertionError(f"{place}: {program} cannot be run here; mark the block `check`")


@pages_with("check")
def test_names_and_flags_of_blocks_that_cannot_run_here_are_there(path):
    names = Names(path)
    for block in BLOCKS[path]:
        if block.language == "python" and block.mark != "text":
            names.check(block)
        elif block.mark == "check":
            for command in commands(block):
                check_command(command, block.place)


def check_command(command, place):
    said = f"{place}: {shlex.join(command)}"
    command = [re.sub(r"\$\w+", "0", word) for word in command]
    while re.fullmatch(r"[A-Z_]+=.*", command[0]):
        command = command[1:]
    program, *arguments = command
    program = program.rpartition("/")[2]
    if "kosmos_g_diffusers" in arguments:  # python -m, accelerate launch -m
        program, arguments = "kosmos-g", arguments[arguments.index("kosmos_g_diffusers") + 1 :]
    if program == "eval":
        check_command(shlex.split(arguments[0].removeprefix("$(").removesuffix(")")), place)
    elif program == "kosmos-g":
        try:
            build_parser().parse_args(arguments)
        except SystemExit as stopped:
            assert not stopped.code, said
    elif program == "pip":
        extras = {
            name
            for text in re.findall(r"(?:kosmos-g-diffusers|^\.)\[([\w,]+)\]", " ".join(arguments))
            for name in text.split(",")
        }
        assert extras <= set(setup["options.extras_require"]), said
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments), said
    elif program == "python" and arguments[0] in ("-m", "-c"):
        if arguments[0] == "-m":
            assert (
                arguments[1] in ("pytest", "venv")
                or (ROOT / (arguments[1].replace(".", "/") + ".py")).is_file()
            ), said
    elif program in ("python", "pytest"):
        paths = [ROOT / word for word in arguments if word.endswith(".py")]
        assert all(path.is_file() for path in paths), said
        if program == "python":
            texts = "".join(path.read_text(encoding="utf-8") for path in paths[0].parent.rglob("*.py"))
            flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            assert all(f'"{flag}"' in texts for flag in flags), said
    else:
        assert program in FOREIGN, said


class Instance(NamedTuple):
    """What a name stands for if it is an object of a class."""

    type: type


class Names:
    """What the names of a page's Python blocks stand for, as far as can be told without running them."""

    def __init__(self, path):
        self.known = {}

    def check(self, block):
        tree = ast.parse(block.text, block.place)
        self.place, self.bound = block.place, set(self.known) | set(dir(builtins))
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.bound.add(node.id)
            elif isinstance(node, ast.arg):
                self.bound.add(node.arg)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.bound.add(node.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self.bind(alias, import_module(alias.name if alias.asname else alias.name.split(".")[0]))
                    import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{block.place}: {node.module} has no {alias.name}"
                    self.bind(alias, getattr(module, alias.name))
        for node in tree.body:
            self.visit(node)
        self.known.update({name: self.known.get(name) for name in self.bound - set(dir(builtins))})

    def bind(self, alias, value):
        name = alias.asname or alias.name.split(".")[0]
        self.known[name] = value
        self.bound.add(name)

    def visit(self, node):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr):
                self.visit(child)
            else:
                self.value(child)
        if isinstance(node, ast.Assign):
            value = self.value(node.value)
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.known[target.id] = value

    def value(self, node):
        """A module, class, function or Instance that an expression is, or None; checks all that it holds."""
        if isinstance(node, ast.Name):
            assert node.id in self.bound, f"{self.place}: nothing says what {node.id} is"
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.attribute(self.value(node.value), node.attr)
        if isinstance(node, ast.Call):
            return self.call(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.expr, ast.comprehension, ast.keyword)):
                self.value(child)
        return None

    def attribute(self, owner, name):
        if isinstance(owner, Instance):  # what its __init__ sets cannot be told
            return getattr(owner.type, name, None)
        if owner is None or isinstance(owner, (str, int)):
            return None
        assert hasattr(owner, name), f"{self.place}: {owner} has no {name}"
        return getattr(owner, name)

    def call(self, node):
        function = self.value(node.func)
        arguments = [self.value(argument) for argument in node.args]
        for keyword in node.keywords:
            self.value(keyword.value)
        owner = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else None
        if isinstance(owner, Instance):
            if function is None:  # a method that is not there would be a mistake of the page
                assert not inspect.isclass(owner.type) or self.is_set(owner, node.func.attr), (
                    f"{self.place}: {owner.type.__name__} has no {node.func.attr}"
                )
                return None
            arguments = [owner, *arguments] if inspect.isfunction(function) else arguments
        target = function
        if isinstance(function, Instance):
            target, arguments = (
                inspect.getattr_static(function.type, "__call__", None),
                [function, *arguments],
            )
        if callable(target) and not any(isinstance(argument, ast.Starred) for argument in node.args):
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            try:
                inspect.signature(target).bind_partial(*arguments, **keywords)
            except TypeError as error:
                raise AssertionError(f"{self.place}: {ast.unparse(node)[:80]}: {error}") from None
            except ValueError:  # built in: no signature
                pass
        if inspect.isclass(function):
            return Instance(function)
        if isinstance(node.func, ast.Attribute) and (
            node.func.attr.startswith("from_") or node.func.attr == "to"
        ):
            return Instance(owner) if inspect.isclass(owner) else owner
        return None

    def is_set(self, owner, name):
        parameters = inspect.signature(owner.type.__init__).parameters
        return name in parameters or hasattr(owner.type, "__getattr__")


def test_a_page_that_is_wrong_is_found(tmp_path):
    page = ROOT / "docs" / "page.md"
    for text, message in (
        ("from kosmos_g_diffusers import KosmosPipeline", "has no KosmosPipeline"),
        ("dog.save('x.png')", "nothing says what dog is"),
        (
            "from kosmos_g_diffusers import SPRITES, KosmosGPipeline\nKosmosGPipeline.from_folder(SPRITES)",
            "has no from_folder",
        ),
        (
            "from kosmos_g_diffusers import KosmosGPipeline\npipe = KosmosGPipeline.from_pretrained('x')\npipe.add_image_word('<a>', 'x', power=2)",
            "power",
        ),
        (
            "from kosmos_g_diffusers import convert_checkpoint\nconvert_checkpoint('a', 'b', tokeniser='c')",
            "tokeniser",
        ),
    ):
        with pytest.raises(AssertionError, match=message):
            Names(page).check(Block("check", "python", text, "page.md:1"))
    for command in (
        "kosmos-g generate x --stepz 3",
        "pip install 'kosmos-g-diffusers[trian]'",
        "make nothing",
        "python examples/nothing.py",
        "python examples/demo.py --nothing",
        "unheard-of",
    ):
        with pytest.raises(AssertionError):
            check_command(shlex.split(command), "page.md:1")


# Links --------------------------------------------------------------------------------------------------------------


def prose(path):
    """The text of a document without its code."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", "", code[0]), text)


def anchors(path):
    """The names of a document's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.*?) *$", prose(path), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_within_the_repository_lead_somewhere(path):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


def nav_pages(entries):
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from nav_pages(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_sites_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(nav_pages(site["nav"]))
    assert len(set(listed)) == len(listed)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES if path != README}
    assert pages <= set(listed)
    assert all((ROOT / "docs" / page).is_file() or (ROOT / page).is_file() for page in listed)


# Versions -----------------------------------------------------------------------------------------------------------


def test_version_and_date_of_citation_changelog_and_package_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == setup["metadata"]["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[([\w.]+)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    assert sections[1] == (citation["version"], str(citation["date-released"]))
    kinds = re.findall(r"^### (.*)$", changelog, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
