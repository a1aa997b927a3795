"""What starts without torch: the package, the parsers of the command line. Each check has a process of its own."""

import argparse
import json
import subprocess
import sys

import pytest

from kosmos_g_diffusers.cli import build_parser

HEAVY = (
    "torch diffusers transformers accelerate safetensors huggingface_hub numpy PIL jinja2 gradio peft".split()
)
# prints, last on stdout, which heavy packages a program has loaded
PROBE = f"""
import atexit, json, sys
atexit.register(lambda: print(json.dumps([name for name in {HEAVY} if name in sys.modules])))
"""


def start(program, *arguments):
    """Result of a program in a process of its own, and the heavy packages that it has loaded."""
    command = [sys.executable, "-c", PROBE + program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    return result, json.loads(result.stdout.splitlines()[-1])


def commands_of(parser, words=()):
    """Every command, and command of a command, as a tuple of words; the program itself is ()."""
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from commands_of(command, (*words, name))


COMMANDS = list(commands_of(build_parser()))


def test_every_command_is_looked_at():
    names = {" ".join(words) for words in COMMANDS}
    assert {"", "generate", "control", "train align", "evaluate dreambench", "data sheet"} <= names
    assert len(names) > 20


def test_help_of_every_command_and_a_mistyped_flag_load_nothing_heavy_and_say_nothing_else():
    # one process for all: what one of them loads stays loaded, and is found
    program = """
import contextlib, io
from kosmos_g_diffusers.cli import main
for words in json.loads(sys.argv[1]):
    for arguments in ([*words, "--help"], [*words, "--no-such-flag"]):
        shown = io.StringIO()
        try:
            with contextlib.redirect_stdout(shown):
                main(arguments)
        except SystemExit as stop:
            assert stop.code == (0 if arguments[-1] == "--help" else 2), arguments
        if arguments[-1] == "--help":
            assert shown.getvalue().startswith(" ".join(["usage: kosmos-g", *words])), arguments
"""
    result, loaded = start(program, json.dumps(COMMANDS))
    assert (result.returncode, loaded) == (0, []), result.stderr
    # of argparse alone: a usage, which may go on in lines that are indented, and an error
    said = [line for line in result.stderr.splitlines() if not line.startswith(" ")]
    assert len([line for line in said if ": error: " in line]) == len(COMMANDS)
    assert all(line.startswith(("usage: kosmos-g", "kosmos-g")) for line in said)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "align", "--help"]])
def test_command_that_only_tells_is_silent_on_stderr(arguments):
    program = "from kosmos_g_diffusers.cli import main; sys.exit(main(sys.argv[1:]))"
    result, loaded = start(program, *arguments)
    assert (result.returncode, result.stderr, loaded) == (0, "", [])


def test_training_settings_are_shown_without_torch():
    program = "from kosmos_g_diffusers.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = "train align --model m --data tsv:captions:d --output o --mixed-precision bf16 --show"
    result, loaded = start(program, *flags.split())
    assert (result.returncode, result.stderr, loaded) == (0, "", [])
    assert '"mixed_precision": "bf16"' in result.stdout


def test_import_is_enough_to_load_our_pipelines_and_stock_ones_with_our_components(tmp_path):
    program = """
import inspect, kosmos_g_diffusers
from concurrent.futures import ThreadPoolExecutor
inspect.getmodule(inspect)  # looks at all modules
assert not [name for name in HEAVY if name in sys.modules]
module = sys.modules["kosmos_g_diffusers.processing_kosmos_g"]
with ThreadPoolExecutor(4) as pool:  # none may find it half run
    assert all(pool.map(lambda number: module.KosmosGTokenizer, range(4)))
from diffusers import StableDiffusionPipeline
folder, made = sys.argv[1], sys.argv[2] == "make"
if made:
    pipe = kosmos_g_diffusers.KosmosGPipeline.from_pretrained(kosmos_g_diffusers.SPRITES)
    StableDiffusionPipeline(**pipe.components, requires_safety_checker=False).save_pretrained(folder)
else:
    from kosmos_g_diffusers.processing_kosmos_g import *
    assert "KosmosGProcessor" in dir() and "KosmosGTokenizer" in dir(kosmos_g_diffusers.processing_kosmos_g)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert type(pipe.text_encoder) is kosmos_g_diffusers.KosmosGTextEncoder
    assert type(sys.modules["kosmos_g_diffusers.modeling_kosmos_g"]) is type(sys)
"""
    for step in ("make", "load"):
        result, _ = start(program.replace("HEAVY", str(HEAVY)), str(tmp_path / "folder"), step)
        assert result.returncode == 0, result.stderr


def test_import_loads_nothing_heavy_and_names_and_modules_are_found_when_they_are_used():
    # each line but the first needs a module that nobody has imported before
    program = """
import pickle
import kosmos_g_diffusers as package
assert not [name for name in HEAVY if name in sys.modules]
assert package.SPRITES and package.__version__ and set(package.__all__) <= set(dir(package))
assert package.environment.default_dtype("cpu") == "float32"
assert package.training.TrainConfig.__module__ == "kosmos_g_diffusers.training.config"
assert not [name for name in HEAVY if name in sys.modules]
assert package.KosmosGTokenizer.__module__ == "kosmos_g_diffusers.processing_kosmos_g"
assert "transformers" in sys.modules and "kosmos_g_diffusers.pipeline_kosmos_g" not in sys.modules
assert package.control.controls.control_size
assert package.pipeline_kosmos_g.KosmosGPipeline
import kosmos_g_diffusers.data
assert kosmos_g_diffusers.data.tsv.TsvSource
from kosmos_g_diffusers import testing
assert testing.build_tiny_pipeline
from kosmos_g_diffusers.data import *
assert build_source
from kosmos_g_diffusers import *
assert KosmosGPipeline and SPRITES and convert_checkpoint is package.conversion.convert_checkpoint
assert pickle.loads(pickle.dumps(KosmosGPipeline)) is package.KosmosGPipeline
"""
    result, _ = start(program.replace("HEAVY", str(HEAVY)))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["", ".control", ".conversion", ".data", ".training"])
def test_wrong_name_is_an_ordinary_error(package):
    module = __import__("kosmos_g_diffusers" + package, fromlist=["*"])
    for name in ("KosmosGPipelin", "_private", "__wrapped__", "a.b", "models"):
        assert not hasattr(module, name)
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute '{name}'"):
            getattr(module, name)
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {module.__name__} import nothing")


@pytest.mark.parametrize("package", ["", ".control", ".conversion", ".data", ".training"])
def test_names_that_are_listed_are_there(package):
    module = __import__("kosmos_g_diffusers" + package, fromlist=["*"])
    assert set(module.__all__) <= set(dir(module))
    assert all(hasattr(module, name) for name in module.__all__)


def test_pipeline_is_loaded_by_a_process_that_has_imported_nothing_else():
    program = (
        "from kosmos_g_diffusers import SPRITES, KosmosGPipeline; KosmosGPipeline.from_pretrained(SPRITES)"
    )
    assert start(program)[0].returncode == 0
