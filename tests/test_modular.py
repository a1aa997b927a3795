import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "diffusers.modular_pipelines", reason="Modular Diffusers may move: diffusers calls it experimental"
)

from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks  # noqa: E402

from kosmos_g_diffusers.modular import KosmosGTextEncoderStep  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs" / "modular.md"
SOURCES = Path(__file__).parents[1] / "src" / "kosmos_g_diffusers"


@pytest.fixture(scope="module")
def shared_pipe(build_pipe):
    return build_pipe()


@pytest.fixture(scope="module")
def documented(tmp_path_factory, shared_pipe, photos):
    """What the first example of docs/modular.md defines, run as it stands there."""
    folder = tmp_path_factory.mktemp("documented")
    shared_pipe.save_pretrained(folder / "kosmos-g")
    for name, photo in zip(("cat.jpg", "coffee.jpg"), photos, strict=False):
        photo.save(folder / name)
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return folder, examples


@pytest.fixture
def run_documented(documented, monkeypatch):
    folder, examples = documented

    def run(count):
        monkeypatch.chdir(folder)
        names = {}
        for example in examples[:count]:
            exec(compile(example, str(DOCS), "exec"), names)
        return names

    return run


def with_components(blocks, pipe):
    modular = blocks.init_pipeline()
    modular.update_components(**{name: pipe.components[name] for name in modular.component_names})
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
    state = with_components(KosmosGTextEncoderStep(), shared_pipe)(**inputs)
    guidance_scale = inputs.pop("guidance_scale", 7.5)
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


def test_modular_pipeline_gives_the_latents_of_the_pipeline(run_documented, shared_pipe, photos):
    names = run_documented(1)
    blocks = SequentialPipelineBlocks.from_blocks_dict(
        {"text_encoder": KosmosGTextEncoderStep(), "denoise": names["DenoiseStep"]()}
    )
    modular = with_components(blocks, shared_pipe)
    for prompt, images in (("<i> in the style of <i>", photos[:2]), (["<i>", "a hat"], [photos[2:3], []])):
        call = {
            "prompt": prompt,
            "images": images,
            "negative_prompt": "the furniture",
            "guidance_scale": 6.0,
            "num_inference_steps": 3,
        }
        latents = modular(**call, generator=torch.Generator().manual_seed(3), output="latents")
        expected = shared_pipe(
            **call, generator=torch.Generator().manual_seed(3), output_type="latent"
        ).images
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_documented_examples_run_and_say_what_is_true(run_documented, documented, shared_pipe, capsys):
    names = run_documented(2)
    expected = shared_pipe(
        "<i> in the style of <i>",
        images=[str(documented[0] / name) for name in ("cat.jpg", "coffee.jpg")],
        num_inference_steps=30,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    torch.testing.assert_close(names["latents"], expected, rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out == "torch.Size([2, 77, 32])\n"
    table = re.findall(r"^\| (`.*?`) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    listed = re.findall(r"`(\w+)`", " ".join(table))
    assert listed == KosmosGTextEncoderStep().input_names


def test_saved_block_loads_as_remote_code_and_saves_again(shared_pipe, photos, tmp_path):
    KosmosGTextEncoderStep().save_pretrained(tmp_path / "step")
    config = json.loads((tmp_path / "step" / "modular_config.json").read_text())
    assert config["auto_map"] == {"ModularPipelineBlocks": "modular.KosmosGTextEncoderStep"}
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModularPipelineBlocks.from_pretrained(str(tmp_path / "step"))
    step = ModularPipelineBlocks.from_pretrained(str(tmp_path / "step"), trust_remote_code=True)
    assert type(step).__module__.startswith("diffusers_modules.")
    step.save_pretrained(tmp_path / "again")
    files = {path.name: path.read_bytes() for path in (tmp_path / "step").glob("*.py")}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.py")}
    # the components may be this package's all the same
    prompt_embeds = with_components(step, shared_pipe)(
        prompt="<i>", images=photos[:1], output="prompt_embeds"
    )
    with torch.no_grad():
        assert torch.equal(prompt_embeds, shared_pipe.encode_prompt("<i>", images=photos[:1])[0])


ALONE = """
import sys
sys.modules["kosmos_g_diffusers"] = None  # not installed
from diffusers.modular_pipelines import ModularPipelineBlocks
step = ModularPipelineBlocks.from_pretrained("step", trust_remote_code=True)
modular = step.init_pipeline()
for name in ("text_encoder", "tokenizer"):
    spec = modular.get_component_spec(name)
    modular.update_components(**{name: spec.load(pretrained_model_name_or_path="kosmos-g", subfolder=name)})
import torch
torch.save(modular(prompt="<i> in a hat", images=["photo.png"], output="prompt_embeds"), "prompt_embeds.pt")
"""


def test_saved_block_needs_nothing_of_this_package(pipe, photos, tmp_path):
    KosmosGTextEncoderStep().save_pretrained(tmp_path / "step")
    pipe.to(torch.float64).save_pretrained(
        tmp_path / "kosmos-g"
    )  # float32 rounds otherwise in another process
    photos[0].save(tmp_path / "photo.png")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        expected, _ = pipe.encode_prompt("<i> in a hat", images=photos[:1])
    torch.testing.assert_close(torch.load(tmp_path / "prompt_embeds.pt"), expected, rtol=1e-5, atol=1e-9)


def test_no_other_module_imports_modular_diffusers():
    for path in SOURCES.rglob("*.py"):
        if path.name != "modular.py":
            assert not re.search(
                r"^\s*(from|import)\b.*\bmodular", path.read_text(encoding="utf-8"), re.MULTILINE
            ), path
