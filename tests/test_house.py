"""The house as CONTRIBUTING.md draws it: which room imports which, counted from the syntax trees.

Room: a package of src/kosmos_g_diffusers, or a module at its top level. Arrow: one room imports another, at module level or
inside a function (TYPE_CHECKING does not count). Floor: length of the longest chain of arrows down from a room.
"""

import ast
import re
from functools import cache
from pathlib import Path

PACKAGE = "kosmos_g_diffusers"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE
FILES = sorted(SOURCE.rglob("*.py"))
# from the ground up; rooms of one step may use each other as long as there is no circle
ORDER = (
    ("files", "environment", "fields", "quiet"),
    ("loading", "provenance", "quantization"),
    ("processing_kosmos_g",),
    ("modeling_kosmos_g",),
    ("modeling_aligner_n",),
    ("pipeline_kosmos_g",),
    ("maps", "model_card", "modular", "testing"),
    ("conversion", "captioning", "control"),
    ("export",),
    ("generation",),
    ("data",),
    ("training", "evaluation", "sprites"),
    ("serving", "comfyui"),
    ("app", "serve"),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
)
# of other libraries: their protocols, which a class must have under these names, and what torch documents so
FOREIGN_PRIVATE = {
    "_SubParsersAction",
    "_actions",
    "_assert_async",
    "_attn_implementation",
    "_compat_pickle",
    "_dynamo",
    "_execution_device",
    "_gradient_checkpointing_func",
    "_no_split_modules",
    "_orig_mod",
    "_upload_folder",
}


def room_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_of(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join([PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {module_of(path): path for path in FILES}


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path):
    """(module, name or None) of everything of this package that a file imports."""
    hidden = {
        id(inside)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inside in ast.walk(node)
    }
    module = module_of(path).split(".")
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(tree_of(path)):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
                )
            if base.split(".")[0] == PACKAGE:
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield (inner, None) if inner in MODULES else (base, alias.name)


def arrows():
    """Room -> rooms that it imports."""
    found = {room_of(path): set() for path in FILES}
    for path in FILES:
        for module, _ in imports_of(path):
            found[room_of(path)].add(room_of(MODULES[module]))
    return {room: targets - {room} for room, targets in found.items()}


def test_every_room_has_its_step():
    assert {room_of(path) for path in FILES} == {room for step in ORDER for room in step}


def test_no_room_imports_one_above_it():
    step_of = {room: number for number, step in enumerate(ORDER) for room in step}
    wrong = [
        f"{room} imports {target}"
        for room, targets in arrows().items()
        for target in targets
        if step_of[target] > step_of[room]
    ]
    assert not wrong


def floor_of(name, graph, above=()):
    assert name not in above, f"circle: {' -> '.join([*above, name])}"
    return 1 + max((floor_of(target, graph, (*above, name)) for target in graph[name]), default=0)


def test_rooms_floors_arrows_and_lines_are_few():
    graph = arrows()
    # above the redrawn house: a room each for marks of images, for what other libraries print, for maps, for ComfyUI, for graphs
    # for other programs, for the service and for weights in few bits (with the plan of memory); data of every form and encoding, public data sets with their table and page, images
    # of other models, the modular pipeline in diffusers' pattern (a file a step), what an app on a network promises (a module for
    # each kind of attack, by files of images too), runs that are not lost (signals to one process of many included), and rehearsed
    # before they cost anything; weights in few bits that are saved and resumed like others
    assert len(graph) <= 32
    assert max(floor_of(room, graph) for room in graph) <= 10
    assert sum(map(len, graph.values())) <= 133
    assert sum(path.parent == SOURCE for path in FILES) <= 17
    assert len(FILES) <= 200
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) < 38_380


def test_modules_import_each_other_in_one_direction():
    graph = {
        module: {target for target, _ in imports_of(path)} - {module} for module, path in MODULES.items()
    }
    # a package's __init__ gathers what its modules have
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            graph[module] = set()
    for module in graph:
        floor_of(module, graph)


def test_no_private_name_crosses_a_module():
    wrong = []
    for path in FILES:
        tree = tree_of(path)
        wrong += [
            f"{module_of(path)} imports {module}.{name}"
            for module, name in imports_of(path)
            if name is not None and re.match("_[a-z]", name)
        ]
        own = {node.name for node in ast.walk(tree) if hasattr(node, "name") and isinstance(node.name, str)}
        own |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
                of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "__class__")
                of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
                if not (of_self or of_super or node.attr in own or node.attr in FOREIGN_PRIVATE):
                    wrong.append(f"{module_of(path)}:{node.lineno} reaches {ast.unparse(node)}")
    assert not wrong
