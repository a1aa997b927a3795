"""Saved folders: they carry their own code, load with and without this package, and never run code without trust."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file
from support import without_package
from support.without_package import assert_same, fake_hub, results
from transformers import CLIPConfig, CLIPImageProcessor

import kosmos_g_diffusers
from kosmos_g_diffusers import (
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGPipeline,
    KosmosGTextEncoder,
    KosmosGTextEncoderConfig,
    KosmosGTokenizer,
)

ROOT = Path(__file__).parents[1]
SOURCE = Path(kosmos_g_diffusers.__file__).parent
OURS = (
    KosmosGPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
)
CODE = {
    "pipeline_kosmos_g.py": "pipeline_kosmos_g.py",
    "text_encoder/modeling_kosmos_g.py": "modeling_kosmos_g.py",
    "tokenizer/processing_kosmos_g.py": "processing_kosmos_g.py",
    # for the Auto classes of transformers with a subfolder, and for custom_pipeline
    "modeling_kosmos_g.py": "modeling_kosmos_g.py",
    "processing_kosmos_g.py": "processing_kosmos_g.py",
}


@pytest.fixture(scope="module")
def original(build_pipe, photos):
    """The pipeline that is saved: with image words, each of one and of two pictures."""
    pipe = build_pipe()
    pipe.add_image_word("<dog>", photos[0])
    pipe.add_image_word("<pair>", photos[1:3])
    return pipe


@pytest.fixture(scope="module")
def expected(original):
    return results(original)


@pytest.fixture(scope="module")
def folders(original, expected, build_pipe, build_controlnet, photos, tmp_path_factory):
    """Folder with saved pipelines, `saved`, `half` (variant fp16) and `controlnet`, and the expected results."""
    folder = tmp_path_factory.mktemp("folders")
    original.save_pretrained(folder / "saved")
    np.savez(folder / "expected.npz", **expected)
    half = build_pipe()
    half.add_image_word("<dog>", photos[0])
    half.to(torch.float16).save_pretrained(folder / "half", variant="fp16")
    controlnet = build_controlnet(original.unet)
    KosmosGControlNetPipeline.from_pipe(original, controlnet=controlnet).save_pretrained(
        folder / "controlnet"
    )
    return folder


@pytest.fixture(scope="module")
def saved(folders):
    return folders / "saved"


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the saved folder that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def put_bombs(folder):
    """Replace the code that a folder carries by code that must not run."""
    for name in CODE:
        (folder / name).write_text("raise SystemExit('code of the folder was run')\n")


def edit_json(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


# Without the package -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(folders, tmp_path_factory):
    """Outcomes of the steps of without_package.py, run where this package cannot be imported."""
    work = tmp_path_factory.mktemp("work")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HOME": str(work / "home"),
    }
    run = subprocess.run(
        [sys.executable, "-I", without_package.__file__, str(folders), str(work)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (work / "outcomes.json").is_file(), run.stdout + run.stderr
    return json.loads((work / "outcomes.json").read_text())


@pytest.mark.parametrize("step", without_package.STEPS)
def test_without_the_package(outcomes, step):
    assert outcomes[step] == "ok", outcomes[step]


# What is in a folder -----------------------------------------------------------------------------------------------


def test_folder_carries_the_code_of_the_package(saved):
    for name, source in CODE.items():
        assert (saved / name).read_bytes() == (SOURCE / source).read_bytes()
    scripts = {str(path.relative_to(saved)) for path in saved.rglob("*.py")}
    assert scripts == {*CODE, "pipeline.py"}
    assert "library_name: diffusers" in (saved / "README.md").read_text(encoding="utf-8")


def test_model_index_names_what_the_folder_carries(saved, folders):
    index = json.loads((saved / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == ["pipeline_kosmos_g", "KosmosGPipeline"]
    assert index["text_encoder"] == ["modeling_kosmos_g", "KosmosGTextEncoder"]
    assert index["tokenizer"] == ["processing_kosmos_g", "KosmosGTokenizer"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False
    control = json.loads((folders / "controlnet" / "model_index.json").read_text(encoding="utf-8"))
    assert control["_class_name"] == ["pipeline_kosmos_g", "KosmosGControlNetPipeline"]
    assert control["controlnet"] == ["diffusers", "ControlNetModel"]


def test_code_files_of_a_folder_stand_alone():
    for source in CODE.values():
        text = (SOURCE / source).read_text(encoding="utf-8")
        assert "kosmos_g_diffusers" not in [line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))]  # fmt: skip
        assert "from ." not in text


def test_no_pickle_is_ever_written(folders):
    for path in folders.rglob("*"):
        if path.is_file() and path.name != "expected.npz":
            assert path.suffix in (".json", ".py", ".safetensors", ".md", ".jinja"), path
            assert not path.read_bytes().startswith((b"\x80", b"PK")), path


@pytest.mark.parametrize("cls", [KosmosGPipeline, KosmosGControlNetPipeline])
def test_pickle_files_are_refused_before_anything_is_written(original, build_controlnet, tmp_path, cls):
    extra = {"controlnet": build_controlnet(original.unet)} if cls is KosmosGControlNetPipeline else {}
    pipe = cls.from_pipe(original, **extra)
    with pytest.raises(ValueError, match="safe_serialization=False asks for pickle files"):
        pipe.save_pretrained(tmp_path / "folder", safe_serialization=False)
    with pytest.raises(ValueError, match="safe_serialization=False"):
        pipe.save_pretrained(tmp_path / "folder", False)
    assert not list(tmp_path.iterdir())


def test_saving_changes_nothing_of_the_pipeline(original, expected, folders):
    assert_same(original, expected)


def test_saving_again_over_a_folder_replaces_it(copied, pipe):
    pipe.save_pretrained(copied)
    loaded = KosmosGPipeline.from_pretrained(copied)
    assert loaded.image_words == []
    assert torch.equal(loaded.encode_prompt("a hat")[0], pipe.encode_prompt("a hat")[0])


def test_class_derived_from_ours_is_saved_as_ours(original, tmp_path):
    class Mine(KosmosGPipeline):
        pass

    Mine.from_pipe(original).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == ["pipeline_kosmos_g", "KosmosGPipeline"]
    assert type(Mine.from_pretrained(tmp_path)) is Mine


# With the package --------------------------------------------------------------------------------------------------


def assert_of_the_package(pipe, cls):
    assert type(pipe) is cls
    assert type(pipe.text_encoder) is KosmosGTextEncoder and type(pipe.tokenizer) is KosmosGTokenizer


def test_our_class_loads_without_running_the_folders_code(copied, expected):
    put_bombs(copied)
    pipe = KosmosGPipeline.from_pretrained(copied)
    assert_of_the_package(pipe, KosmosGPipeline)
    assert pipe.image_words == ["<dog>", "<pair>"]
    assert_same(pipe, expected)
    pipe.save_pretrained(copied)  # and mends it
    for name, source in CODE.items():
        assert (copied / name).read_bytes() == (SOURCE / source).read_bytes()


def test_loading_and_saving_warn_of_nothing(saved, folders, tmp_path, logged):
    KosmosGPipeline.from_pretrained(saved).save_pretrained(tmp_path)
    KosmosGControlNetPipeline.from_pretrained(folders / "controlnet")
    assert not logged.records


def test_trust_makes_no_difference_to_our_class(copied, expected):
    put_bombs(copied)
    pipe = KosmosGPipeline.from_pretrained(copied, trust_remote_code=True)
    assert_of_the_package(pipe, KosmosGPipeline)
    assert_same(pipe, expected)


def test_foreign_code_in_a_folder_does_not_run_without_trust(copied):
    index = json.loads((copied / "model_index.json").read_text(encoding="utf-8"))
    (copied / "unet" / "evil.py").write_text("raise SystemExit('code of the folder was run')\n")
    edit_json(copied / "model_index.json", unet=["evil", "Evil"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        KosmosGPipeline.from_pretrained(copied)
    edit_json(copied / "model_index.json", unet=index["unet"])
    # a module of the same name as ours, which is looked for in the component's folder first
    (copied / "text_encoder" / "kosmos_g_diffusers.modeling_kosmos_g.py").write_text(
        "raise SystemExit('run')\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        KosmosGPipeline.from_pretrained(copied)


@pytest.mark.parametrize("cls", OURS)
def test_each_class_loads_the_folder_of_another(copied, folders, build_controlnet, original, cls):
    put_bombs(copied)
    parts = {"controlnet": build_controlnet(original.unet)} if "ControlNet" in cls.__name__ else {}
    pipe = cls.from_pretrained(copied, **parts)
    assert_of_the_package(pipe, cls)
    if parts:
        assert pipe.controlnet is parts["controlnet"]
        kept = cls.from_pretrained(folders / "controlnet")
        assert_of_the_package(kept, cls)
        for name, weight in parts["controlnet"].state_dict().items():
            assert torch.equal(kept.controlnet.state_dict()[name], weight)


def test_folder_with_a_controlnet_serves_plain_text_to_image(folders, expected):
    assert_same(KosmosGPipeline.from_pretrained(folders / "controlnet"), expected)


def test_custom_pipeline_file_loads_a_folder(copied, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    arguments = {"custom_pipeline": "pipelines/kosmos_g.py", "trust_remote_code": True}
    # diffusers prefers the pipeline's code that a folder brings
    own = DiffusionPipeline.from_pretrained(copied, **arguments)
    assert type(own).__name__ == "KosmosGPipeline"
    assert_same(own, expected)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(copied, custom_pipeline="pipelines/kosmos_g.py")
    edit_json(copied / "model_index.json", _class_name="StableDiffusionPipeline")
    given = DiffusionPipeline.from_pretrained(copied, **arguments)
    assert type(given) is KosmosGPipeline
    assert_same(given, expected)
    given.save_pretrained(tmp_path / "again")
    assert_same(KosmosGPipeline.from_pretrained(tmp_path / "again"), expected)


def test_remote_and_installed_classes_live_side_by_side(saved, expected):
    remote = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    assert type(remote) is not KosmosGPipeline and type(remote).__name__ == "KosmosGPipeline"
    again = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    installed = KosmosGPipeline.from_pipe(remote)
    assert_same(installed, expected)
    for pipe in (remote, again, KosmosGPipeline.from_pretrained(saved)):
        assert_same(pipe, expected)


def test_pipeline_of_an_older_process_saves_after_its_code_was_loaded_again(saved, expected, tmp_path):
    first = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)  # diffusers executes the module anew
    first.save_pretrained(tmp_path)
    assert_same(KosmosGPipeline.from_pretrained(tmp_path), expected)


# Options of loading ------------------------------------------------------------------------------------------------


def test_variant_is_written_and_read(folders):
    half = folders / "half"
    weights = sorted(str(path.relative_to(half)) for path in half.rglob("*.safetensors"))
    assert weights == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    pipe = KosmosGPipeline.from_pretrained(half, variant="fp16", dtype=torch.float16)
    assert {pipe.text_encoder.dtype, pipe.unet.dtype, pipe.vae.dtype} == {torch.float16}
    tensors = load_file(half / weights[0])
    state = pipe.text_encoder.state_dict()
    assert state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in state)
    assert pipe.image_words == ["<dog>"]
    assert pipe.text_encoder.image_words[0].states.dtype == torch.float16
    with pytest.raises((ValueError, OSError)):
        KosmosGPipeline.from_pretrained(half, variant="int3")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_load(original, expected, tmp_path, variant):
    original.save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    for component in ("text_encoder", "unet", "vae"):
        assert len(list((tmp_path / component).glob("*.safetensors"))) > 1
        assert len(list((tmp_path / component).glob("*.index*.json"))) == 1
    pipe = KosmosGPipeline.from_pretrained(tmp_path, variant=variant)
    for component in ("text_encoder", "unet", "vae"):
        state = getattr(original, component).state_dict()
        given = getattr(pipe, component).state_dict()
        assert state.keys() == given.keys() and all(torch.equal(state[name], given[name]) for name in state)
    assert_same(pipe, expected, 1e-5)  # kernels choose by how weights lie in memory


def test_dtype_of_loading_is_every_components(saved, expected):
    pipe = KosmosGPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert {pipe.text_encoder.dtype, pipe.unet.dtype, pipe.vae.dtype} == {torch.bfloat16}
    assert {word.states.dtype for word in pipe.text_encoder.image_words} == {torch.bfloat16}
    condition = pipe.encode_prompt("<dog> <pair>")[0].detach().float().numpy()
    assert np.sqrt(np.square(condition[0] - expected["condition"][1]).mean()) < 0.15


def test_loading_without_a_dtype_gives_float32_throughout(folders):
    pipe = KosmosGPipeline.from_pretrained(folders / "half", variant="fp16")
    assert {pipe.text_encoder.dtype, pipe.unet.dtype, pipe.vae.dtype} == {torch.float32}
    alone = KosmosGTextEncoder.from_pretrained(folders / "half" / "text_encoder", variant="fp16")
    assert alone.dtype == torch.float16  # transformers' own default is the file's


def test_components_of_the_caller_are_taken(saved, expected, original):
    unet = UNet2DConditionModel.from_pretrained(saved / "unet")
    vae = AutoencoderKL.from_pretrained(saved / "vae")
    parts = {"unet": unet, "vae": vae, "text_encoder": original.text_encoder, "tokenizer": original.tokenizer}
    for names in (("unet",), ("vae", "unet"), ("text_encoder", "tokenizer"), tuple(parts)):
        given = {name: parts[name] for name in names}
        pipe = KosmosGPipeline.from_pretrained(saved, **given)
        assert all(getattr(pipe, name) is part for name, part in given.items())
        assert_same(pipe, expected)


def test_text_encoder_alone_loads_without_the_rest(saved, expected, logged):
    parts = dict.fromkeys(("unet", "vae", "scheduler", "feature_extractor", "safety_checker"))
    pipe = KosmosGPipeline.from_pretrained(saved, **parts)
    with torch.no_grad():
        condition, _ = pipe.encode_prompt("<dog> <pair>")
    assert np.abs(condition[0].numpy() - expected["condition"][1]).max() < 1e-4


def test_device_map_loads_on_the_cpu(saved, expected):
    # on accelerators this is untested
    pytest.importorskip("accelerate")
    from diffusers.pipelines.pipeline_utils import SUPPORTED_DEVICE_MAP

    device_map = "cpu" if "cpu" in SUPPORTED_DEVICE_MAP else "balanced"
    assert_same(KosmosGPipeline.from_pretrained(saved, device_map=device_map), expected)


def test_low_memory_loading_makes_no_difference(saved, expected):
    assert_same(KosmosGPipeline.from_pretrained(saved, low_cpu_mem_usage=False), expected)


def test_encoder_alone_survives_saving(original, tmp_path):
    original.text_encoder.save_pretrained(tmp_path)
    loaded = KosmosGTextEncoder.from_pretrained(tmp_path)
    assert not loaded.training and loaded.config.image_words == [["<dog>", 1], ["<pair>", 2]]
    state, given = original.text_encoder.state_dict(), loaded.state_dict()
    assert state.keys() == given.keys() and all(torch.equal(state[name], given[name]) for name in state)
    loaded.train()(torch.tensor([[0, loaded.config.text_config.vocab_size]]))[0].sum().backward()
    assert all(word.states.grad is None for word in loaded.image_words)
    assert all(parameter.grad is not None for parameter in loaded.aligner.query_layers.parameters())


def test_text_encoder_that_lacks_weights_is_refused(original, tmp_path):
    from safetensors.torch import save_file

    original.text_encoder.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("aligner.query_embeds", "image_words.1.states"):
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{tmp_path} lacks 2 weights, such as aligner.query_embeds"):
        KosmosGTextEncoder.from_pretrained(tmp_path)


# Format ------------------------------------------------------------------------------------------------------------


def test_unknown_format_version_is_refused_with_both_versions(copied):
    config = copied / "text_encoder" / "config.json"
    assert json.loads(config.read_text(encoding="utf-8"))["format_version"] == 1
    edit_json(config, format_version=7)
    for load in (
        lambda: KosmosGPipeline.from_pretrained(copied),
        lambda: KosmosGTextEncoder.from_pretrained(copied / "text_encoder"),
        lambda: KosmosGTextEncoderConfig.from_pretrained(copied / "text_encoder"),
        lambda: DiffusionPipeline.from_pretrained(copied, trust_remote_code=True),
    ):
        with pytest.raises(ValueError, match="format version 7; this code reads version 1"):
            load()


def test_words_that_were_removed_are_not_saved(pipe, photos, tmp_path):
    for index, word in enumerate(("<one>", "<two>", "<three>")):
        pipe.add_image_word(word, photos[index])
    pipe.remove_image_word("<two>")
    pipe.save_pretrained(tmp_path)
    loaded = KosmosGPipeline.from_pretrained(tmp_path)
    assert loaded.image_words == ["<one>", "<three>"]
    for word in loaded.image_words:
        assert torch.equal(loaded.encode_prompt(f"{word} x")[0], pipe.encode_prompt(f"{word} x")[0])
    loaded.remove_image_word("<one>")
    loaded.add_image_word("<four>", photos[3])
    loaded.save_pretrained(tmp_path)
    again = KosmosGPipeline.from_pretrained(tmp_path)
    assert again.image_words == ["<three>", "<four>"]
    assert torch.equal(again.encode_prompt("<four> x")[0], loaded.encode_prompt("<four> x")[0])


def test_safety_checker_is_kept(pipe, tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 99},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    pipe.register_modules(
        safety_checker=StableDiffusionSafetyChecker(config),
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    )
    pipe.register_to_config(requires_safety_checker=True)
    pipe.save_pretrained(tmp_path)
    loaded = KosmosGPipeline.from_pretrained(tmp_path)
    assert type(loaded.safety_checker) is StableDiffusionSafetyChecker
    loaded.set_progress_bar_config(disable=True)
    flags = loaded("a hat", num_inference_steps=1, height=16, width=16).nsfw_content_detected
    assert len(flags) == 1


# The Hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [KosmosGPipeline, KosmosGControlNetPipeline])
def test_our_class_loads_a_hub_repository_without_running_its_code(folders, expected, tmp_path, cls):
    name = "controlnet" if cls is KosmosGControlNetPipeline else "saved"
    repository = Path(shutil.copytree(folders / name, tmp_path / "repository"))
    put_bombs(repository)
    with fake_hub(repository, tmp_path / "cache"):
        pipe = cls.from_pretrained("someone/kosmos-g")
    assert_of_the_package(pipe, cls)
    assert_same(pipe if cls is KosmosGPipeline else KosmosGPipeline.from_pipe(pipe), expected)


def test_hub_download_takes_only_what_is_needed(folders, tmp_path):
    repository = Path(shutil.copytree(folders / "saved", tmp_path / "repository"))
    extra = {
        "extra/notes.md",
        "text_encoder/notes.txt",
        "unet/diffusion_pytorch_model.bin",
        "code.py",
        "vae/code.py",
    }
    for name in extra:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"not needed")
    with fake_hub(repository, tmp_path / "cache"):
        KosmosGPipeline.from_pretrained("someone/kosmos-g")
    taken = {
        str(path.relative_to(tmp_path / "cache"))
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file()
    }
    assert {"text_encoder/modeling_kosmos_g.py", "tokenizer/tokenizer.json", "unet/config.json"} <= taken
    assert not taken & extra


def test_variant_and_parts_of_the_caller_are_not_downloaded_twice(folders, original, tmp_path):
    with fake_hub(folders / "half", tmp_path / "cache"):
        pipe = KosmosGPipeline.from_pretrained("someone/kosmos-g", variant="fp16", unet=original.unet)
    assert pipe.unet is original.unet
    assert not (tmp_path / "cache" / "unet").exists()
    assert (tmp_path / "cache" / "text_encoder" / "model.fp16.safetensors").is_file()


def test_push_uploads_the_whole_folder(original, saved, monkeypatch):
    from kosmos_g_diffusers import pipeline_kosmos_g

    uploads = []

    def create_repo(repo_id, **keywords):
        return type("Repo", (), {"repo_id": repo_id})

    def upload(self, folder, repo_id, **keywords):
        uploads.append(
            (repo_id, {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}, keywords)
        )

    monkeypatch.setattr(pipeline_kosmos_g, "create_repo", create_repo)
    monkeypatch.setattr(KosmosGPipeline, "_upload_folder", upload)
    original.push_to_hub("someone/kosmos-g", commit_message="first")
    ((repo_id, files, keywords),) = uploads
    assert repo_id == "someone/kosmos-g" and keywords["commit_message"] == "first"
    assert files == {str(path.relative_to(saved)) for path in saved.rglob("*")}


def test_saving_can_push(original, tmp_path, monkeypatch):
    from kosmos_g_diffusers import pipeline_kosmos_g

    uploads = []
    repo = type("Repo", (), {"repo_id": "someone/kosmos-g"})
    monkeypatch.setattr(pipeline_kosmos_g, "create_repo", lambda repo_id, **keywords: repo)
    monkeypatch.setattr(
        KosmosGPipeline, "_upload_folder", lambda self, folder, *a, **k: uploads.append(folder)
    )
    original.save_pretrained(
        tmp_path / "kosmos-g", push_to_hub=True, repo_id="someone/kosmos-g", private=True
    )
    assert (
        list(map(Path, uploads)) == [tmp_path / "kosmos-g"]
        and (tmp_path / "kosmos-g" / "README.md").is_file()
    )
