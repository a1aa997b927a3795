"""Blocks for Modular Diffusers: the prompt's step, saving with code, loading without this package."""

import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from packaging.version import Version

pytest.importorskip(
    "diffusers.modular_pipelines", reason="Modular Diffusers may move: diffusers calls it experimental"
)

from diffusers import ClassifierFreeGuidance  # noqa: E402
from diffusers.modular_pipelines import ModularPipelineBlocks  # noqa: E402

from kosmos_g_diffusers.modular import (  # noqa: E402
    KosmosGAutoBlocks,
    KosmosGModularPipeline,
    KosmosGTextEncoderStep,
)

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "kosmos_g_diffusers"
MODULAR = SOURCES / "modular"
EARLIER = Path(__file__).parent / "fixtures" / "earlier"


@pytest.fixture(scope="module")
def shared_pipe(build_pipe):
    return build_pipe()


def with_components(blocks, pipe, guidance_scale=7.5):
    modular = blocks.init_pipeline()
    parts = {name: pipe.components.get(name) for name in modular.component_names}
    modular.update_components(**{name: part for name, part in parts.items() if part is not None})
    modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
    return modular


@pytest.mark.parametrize(
    "inputs",
    [
        {"prompt": "a cat"},
        {"prompt": "<i> in <i>", "images": slice(0, 2)},
        {"prompt": ["a hat", "a suit"], "negative_prompt": ["the", "on"]},
        {"prompt": "a hat", "negative_prompt": "a <i>", "negative_images": slice(0, 1)},
        {"prompt": "a hat", "guidance_scale": 1.0},
        {"prompt": "a hat", "clip_skip": 1},
    ],
    ids=lambda inputs: "-".join(inputs),
)
def test_block_alone_gives_what_encode_prompt_gives(shared_pipe, photos, inputs):
    inputs = {name: photos[value] if isinstance(value, slice) else value for name, value in inputs.items()}
    guidance_scale = inputs.pop("guidance_scale", 7.5)
    state = with_components(KosmosGTextEncoderStep(), shared_pipe, guidance_scale)(**inputs)
    with torch.no_grad():
        expected = shared_pipe.encode_prompt(**inputs, do_classifier_free_guidance=guidance_scale > 1)
    assert torch.equal(state.get("prompt_embeds"), expected[0])
    if guidance_scale > 1:
        assert torch.equal(state.get("negative_prompt_embeds"), expected[1])
    else:
        assert state.get("negative_prompt_embeds") is None


def test_block_reads_reading_order_lists_and_image_words(pipe, photos):
    modular = with_components(KosmosGTextEncoderStep(), pipe.to(torch.float64))
    reference = modular(prompt="<i> in the style of <i>", images=photos[:2], output="prompt_embeds")
    assert torch.equal(
        modular(prompt=[photos[0], "in the style of", photos[1]], output="prompt_embeds"), reference
    )
    pipe.add_image_word("<cat>", photos[0])
    pipe.add_image_word("<cup>", photos[1])
    spelled = modular(prompt="<cat> in the style of <cup>", output="prompt_embeds")
    torch.testing.assert_close(spelled, reference, rtol=0, atol=1e-9)


def test_block_raises_the_errors_of_the_pipeline(shared_pipe, photos):
    modular = with_components(KosmosGTextEncoderStep(), shared_pipe)
    with pytest.raises(ValueError, match="'<i>'"):
        modular(prompt="<i> in <i>", images=photos[:1])
    with pytest.raises(ValueError, match="prompt"):
        modular(images=photos[:1])
    with pytest.raises(ValueError, match="NoneType"):
        KosmosGTextEncoderStep().init_pipeline()(prompt="a cat")


def test_block_changes_no_component_and_keeps_their_dtype(build_pipe, photos, snapshot):
    pipe = build_pipe()
    pipe.text_encoder.to(torch.bfloat16)
    before = snapshot(pipe.text_encoder)
    state = with_components(KosmosGTextEncoderStep(), pipe)(prompt="<i>", images=photos[:1])
    after = snapshot(pipe.text_encoder)
    assert state.get("prompt_embeds").dtype == state.get("negative_prompt_embeds").dtype == torch.bfloat16
    assert before["config"] == after["config"] and before["modules"] == after["modules"]
    assert before["dtypes"] == after["dtypes"]


# Saving and loading ------------------------------------------------------------------------------------------------


def code_of(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).glob("*.py")}


def test_saved_code_is_flat_and_differs_in_relative_imports_alone(tmp_path):
    KosmosGAutoBlocks().save_pretrained(tmp_path)
    expected = [*MODULAR.glob("[!_]*.py"), *SOURCES.glob("*_kosmos_g.py")]
    sources = {path.name: path.read_text(encoding="utf-8") for path in expected}
    assert code_of(tmp_path) == {
        name: re.sub(r"^from \.\.(?=\w)", "from .", text, flags=re.MULTILINE)
        for name, text in sources.items()
    }
    config = json.loads((tmp_path / "modular_config.json").read_text())
    assert config["auto_map"] == {"ModularPipelineBlocks": "modular_blocks.KosmosGAutoBlocks"}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lowest = dict(re.findall(r"^([\w-]+)(>=\S+)", setup["options"]["install_requires"], re.MULTILINE))
    assert config["requirements"] == {name: lowest[name] for name in ("diffusers", "transformers")}


@pytest.mark.parametrize(
    "name", ["KosmosGTextEncoderStep", "KosmosGDenoiseStep", "KosmosGAutoVaeEncoderStep"]
)
def test_saved_block_loads_as_remote_code_and_saves_again(name, tmp_path, no_remote_code_yet):
    module = next(path.stem for path in MODULAR.glob("*.py") if f"class {name}(" in path.read_text("utf-8"))
    block = getattr(importlib.import_module(f"kosmos_g_diffusers.modular.{module}"), name)
    block().save_pretrained(tmp_path / "step")
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModularPipelineBlocks.from_pretrained(str(tmp_path / "step"))
    step = ModularPipelineBlocks.from_pretrained(str(tmp_path / "step"), trust_remote_code=True)
    assert type(step).__name__ == name and type(step).__module__.startswith("diffusers_modules.")
    step.save_pretrained(tmp_path / "again")
    assert code_of(tmp_path / "again") == code_of(tmp_path / "step")
    assert type(step.init_pipeline()).__name__ == "KosmosGModularPipeline"


def test_saved_block_takes_the_components_of_this_package(shared_pipe, photos, tmp_path, no_remote_code_yet):
    KosmosGTextEncoderStep().save_pretrained(tmp_path)
    step = ModularPipelineBlocks.from_pretrained(str(tmp_path), trust_remote_code=True)
    modular = with_components(step, shared_pipe)
    prompt_embeds = modular(prompt="<i>", images=photos[:1], output="prompt_embeds")
    with torch.no_grad():
        assert torch.equal(prompt_embeds, shared_pipe.encode_prompt("<i>", images=photos[:1])[0])


@pytest.fixture
def no_remote_code_yet():
    """Code of folders lies under one name in a process, whichever folder it is of."""

    def forget():
        for name in [name for name in sys.modules if name.startswith("diffusers_modules.")]:
            del sys.modules[name]

    forget()
    yield
    forget()


def test_blocks_that_were_saved_before_load_as_before(tmp_path, no_remote_code_yet):
    """One file, modular.py, with guidance_scale as an input."""
    shutil.copytree(EARLIER / "step", tmp_path / "step")
    for path in (EARLIER / "model").rglob("*_kosmos_g.py"):
        shutil.copy(path, tmp_path / "step")
    step = ModularPipelineBlocks.from_pretrained(str(tmp_path / "step"), trust_remote_code=True)
    modular = step.init_pipeline()
    assert "guidance_scale" in step.input_names and not type(modular).__module__.startswith("kosmos")
    for name in ("text_encoder", "tokenizer"):
        spec = modular.get_component_spec(name)
        assert spec.type_hint.__module__.startswith("diffusers_modules.")
        part = spec.load(pretrained_model_name_or_path=str(EARLIER / "model"), subfolder=name)
        modular.update_components(**{name: part.float() if name == "text_encoder" else part})
    state = modular(prompt="<dog>", guidance_scale=1.0)
    assert state.get("prompt_embeds").shape == (1, 77, 32) and state.get("negative_prompt_embeds") is None


def run_alone(program, folder, *arguments):
    """Runs a program where this package cannot be imported."""
    program = f"import sys\nsys.modules['kosmos_g_diffusers'] = None  # not installed\n{program}"
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


ALONE = """
import os
import torch
from diffusers import ModularPipeline
from diffusers.commands.diffusers_cli import main
call = {"prompt": "<i> in a hat", "images": ["photo.png"], "num_inference_steps": 2, "output_type": "pt"}
saved = os.path.abspath("saved")  # as it was saved: diffusers before 0.42 trusts no other name of a folder
pipe = ModularPipeline.from_pretrained(saved, trust_remote_code=True)
pipe.load_components(trust_remote_code=True, dtype=torch.float64)
images = pipe(**call, generator=torch.Generator().manual_seed(0), output="images")
torch.save(images, "images.pt")
mask = torch.zeros(1, 1, 64, 64).index_fill(2, torch.arange(32), 1.0)
generator = torch.Generator().manual_seed(0)
images = pipe(**call, image="photo.png", mask_image=mask, generator=generator, output="images")
torch.save(images, "inpainted.pt")
ordinary = pipe.blocks.init_pipeline("ordinary")  # of the folder's code
ordinary.load_components(dtype=torch.float64)
images = ordinary(**call, generator=torch.Generator().manual_seed(0), output="images")
torch.save(images, "again.pt")
# diffusers' command packs the file of a folder that it runs by itself
os.chdir("packed")
sys.argv = ["diffusers-cli", "custom_blocks", "--block_module_name=modular_blocks.py"]
sys.argv.append("--block_class_name=KosmosGAutoBlocks")
main()
os.chdir("..")
assert type(ModularPipeline.from_pretrained("packed", trust_remote_code=True).blocks).__name__ == "KosmosGAutoBlocks"
"""


def test_saved_pipeline_needs_nothing_of_this_package(pipe, photos, tmp_path):
    pipe.to(torch.float64)  # float32 rounds otherwise in another process
    pipe.save_pretrained(tmp_path / "ordinary")
    modular = with_components(KosmosGAutoBlocks(), pipe)
    modular.save_pretrained(tmp_path / "saved")
    KosmosGAutoBlocks().save_pretrained(tmp_path / "packed")
    (tmp_path / "packed" / "modular_config.json").unlink()
    photos[3].resize((64, 64)).save(tmp_path / "photo.png")
    run_alone(ALONE, tmp_path)
    call = {"prompt": "<i> in a hat", "images": [str(tmp_path / "photo.png")]}
    call |= {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    for name in ("images", "again"):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), expected, rtol=0, atol=1e-9)
    mask = torch.zeros(1, 1, 64, 64).index_fill(2, torch.arange(32), 1.0)
    generator = torch.Generator().manual_seed(0)
    image = {"image": str(tmp_path / "photo.png"), "mask_image": mask}
    expected = modular(**call, **image, generator=generator, output="images")
    torch.testing.assert_close(torch.load(tmp_path / "inpainted.pt"), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_ordinary_and_modular_folders_load(pipe, photos, tmp_path, trust_remote_code, no_remote_code_yet):
    pipe.save_pretrained(tmp_path / "ordinary")
    from_ordinary = KosmosGModularPipeline.from_pretrained(tmp_path / "ordinary", trust_remote_code)
    from_ordinary.load_components(dtype=torch.float64)
    assert from_ordinary.vae.dtype == from_ordinary.text_encoder.dtype == torch.float64
    assert type(from_ordinary.scheduler) is type(pipe.scheduler)
    from_ordinary.save_pretrained(tmp_path / "modular")
    index = json.loads((tmp_path / "modular" / "modular_model_index.json").read_text())
    assert index["_class_name"] == "ModularPipeline"  # of which diffusers has no other for these blocks
    place = tmp_path / "modular"
    if Version(diffusers.__version__) >= Version("0.42"):  # which finds what lies next to a folder's index
        place = shutil.move(place, tmp_path / "moved")
    loaded = KosmosGModularPipeline.from_pretrained(place, trust_remote_code)
    loaded.load_components(dtype=torch.float64)
    assert loaded.text_encoder.dtype == torch.float64
    call = {"prompt": "<i>", "images": photos[:1], "num_inference_steps": 1, "output_type": "pt"}
    drawn = [
        each(**call, generator=torch.Generator().manual_seed(0), output="images")
        for each in (from_ordinary, loaded)
    ]
    assert torch.equal(*drawn)


def test_blocks_that_were_changed_are_saved_as_their_class_with_a_warning(tmp_path, logged):
    blocks = KosmosGAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    blocks.save_pretrained(tmp_path)
    assert "without what was put in or taken out" in logged.text
    logged.clear()
    KosmosGAutoBlocks().save_pretrained(tmp_path)
    assert "put in" not in logged.text


def test_no_other_module_imports_modular_diffusers():
    for path in SOURCES.rglob("*.py"):
        if MODULAR not in path.parents:
            assert not re.search(
                r"^\s*(from|import)\b.*\bmodular", path.read_text(encoding="utf-8"), re.MULTILINE
            ), path


def test_folder_is_short():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULAR.glob("*.py")) <= 700


def test_page_tells_the_inputs_and_shows_a_workflow_of_ten_lines():
    page = (ROOT / "docs" / "modular.md").read_text(encoding="utf-8")
    table = re.search(r"^\| input of the prompt's step \|.*?\n\n", page, re.MULTILINE | re.DOTALL)[0]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == KosmosGTextEncoderStep().input_names
    first = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len([line for line in first.splitlines() if line]) <= 10


def test_older_diffusers_is_an_error_of_this_folder_alone(monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", "0.39.1")
    for name in [name for name in sys.modules if name.startswith("kosmos_g_diffusers.modular")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs diffusers 0\.40\.0 or newer; 0\.39\.1 .*pip install -U"):
        importlib.import_module("kosmos_g_diffusers.modular")
    importlib.reload(importlib.import_module("kosmos_g_diffusers"))
