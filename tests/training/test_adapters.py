import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from kosmos_g_diffusers import KosmosGPipeline, KosmosGProcessor
from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.training import adapters
from kosmos_g_diffusers.training.adapters import (
    CONFIG,
    WEIGHTS,
    add_adapter,
    load_adapter,
    merge_adapter,
    push_adapter,
    remove_adapter,
    save_adapter,
)
from kosmos_g_diffusers.training.config import TrainConfig
from kosmos_g_diffusers.training.model_folder import merge_into_folder
from kosmos_g_diffusers.training.stages import InstructStage

peft = pytest.importorskip("peft", minversion="0.18")


def encode(pipe, photos):
    with torch.no_grad():
        return pipe.encode_prompt(
            [[photos[0], "in the suit of", photos[1]]], do_classifier_free_guidance=False
        )[0]


def encode_exactly(pipe, photos):
    """In double precision: what rounding does differs from CPU to CPU, and on some from call to call."""
    pipe.to(torch.float64)
    condition = encode(pipe, photos)
    pipe.to(torch.float32)
    return condition


def assert_same(given, expected):
    torch.testing.assert_close(given, expected, atol=1e-9, rtol=0)


@pytest.fixture
def adapter(build_pipe, tmp_path):
    """Folder of an adapter that changes much."""
    encoder = build_pipe().text_encoder
    add_adapter(encoder, 4)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    save_adapter(encoder, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_loaded_adapter_acts_and_leaves_the_weights(pipe, photos, adapter):
    before, weights = encode(pipe, photos), copy.deepcopy(pipe.text_encoder.state_dict())
    load_adapter(pipe, adapter)
    assert (encode(pipe, photos) - before).abs().max() > 0.1
    state = pipe.text_encoder.state_dict()
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        name = name if name in state else f"{layer}.base_layer.{kind}"
        assert torch.equal(state[name], tensor), name
    assert not any(parameter.requires_grad for parameter in pipe.text_encoder.parameters())


def test_removed_adapter_leaves_exactly_what_was(pipe, photos, adapter, snapshot):
    before, was = encode_exactly(pipe, photos), snapshot(pipe.text_encoder)
    load_adapter(pipe, adapter)
    remove_adapter(pipe)
    assert_same(encode_exactly(pipe, photos), before)
    now = snapshot(pipe.text_encoder)
    assert now["modules"] == was["modules"] and now["config"] == was["config"]
    assert now["weights"].keys() == was["weights"].keys()
    assert all(torch.equal(now["weights"][name], tensor) for name, tensor in was["weights"].items())


def test_merged_equals_unmerged_and_can_be_saved(pipe, photos, adapter, tmp_path):
    load_adapter(pipe, adapter)
    unmerged = encode_exactly(pipe, photos)
    merge_adapter(pipe)
    merged = encode_exactly(pipe, photos)
    torch.testing.assert_close(merged, unmerged, atol=2e-5, rtol=0)  # the sum of the weights was rounded
    pipe.save_pretrained(tmp_path / "merged")
    loaded = KosmosGPipeline.from_pretrained(tmp_path / "merged")
    assert_same(encode_exactly(loaded, photos), merged)


def test_adapter_has_the_mode_of_other_files(adapter):
    (adapter / "another").touch()
    assert len({path.stat().st_mode for path in adapter.iterdir()}) == 1


def test_peft_reads_the_folder_itself(pipe, build_pipe, photos, adapter):
    load_adapter(pipe, adapter)
    other = build_pipe()
    other.text_encoder = peft.PeftModel.from_pretrained(other.text_encoder, adapter).base_model.model
    assert_same(encode_exactly(other, photos), encode_exactly(pipe, photos))


def test_fresh_adapter_changes_nothing_and_trains_linear_layers_alone(pipe, photos):
    encoder = pipe.text_encoder
    before, state = encode_exactly(pipe, photos), torch.get_rng_state()
    linear = {
        name
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(("language_model", "aligner"))
    }
    add_adapter(encoder, 4)
    assert_same(encode_exactly(pipe, photos), before)
    assert torch.equal(torch.get_rng_state(), state)
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{half}.default.weight" for name in linear for half in "AB"}


# Which model it belongs to -----------------------------------------------------------------------------------------------


def test_adapter_is_refused_on_another_model_of_the_same_shape(pipe, adapter, photos, tmp_path, capsys):
    before = encode(pipe, photos)
    with torch.no_grad():
        pipe.text_encoder.aligner.final_layer_norm.bias[0] += 1e-6
    with pytest.raises(
        ValueError, match=r"was trained on a model without a name \(weights [0-9a-f]{12}\), and this"
    ):
        load_adapter(pipe, adapter)
    assert not hasattr(pipe.text_encoder, "peft_config")
    torch.testing.assert_close(encode(pipe, photos), before)
    pipe.save_pretrained(tmp_path / "other")
    flags = [
        "--adapter",
        str(adapter),
        "--model",
        str(tmp_path / "other"),
        "--output",
        str(tmp_path / "merged"),
    ]
    assert main(["train", "merge", *flags]) == 2
    assert "Pass the model it was trained on." in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_is_known_again_in_another_dtype_and_with_image_words(pipe, adapter, photos, dtype):
    pipe.add_image_word("<my-dog>", photos[0])
    pipe.to(dtype)
    load_adapter(pipe, adapter)
    remove_adapter(pipe)
    pipe.to(torch.float32)  # rounded
    load_adapter(pipe, adapter)
    remove_adapter(pipe)
    pipe.to(dtype)
    with torch.no_grad():
        pipe.text_encoder.aligner.query_embeds[0, 0] *= 1.1
    with pytest.raises(ValueError, match="this model has other weights"):
        load_adapter(pipe, adapter)


def test_adapter_of_an_earlier_version_loads_with_a_note(pipe, adapter, photos, caplog):
    (adapter / "base.json").unlink()
    before = encode(pipe, photos)
    load_adapter(pipe, adapter)
    assert "does not say which model it was trained on" in caplog.text
    assert (encode(pipe, photos) - before).abs().max() > 0.1


@pytest.mark.parametrize("content", ["", "[]", '{"sha256": 3}'])
def test_damaged_record_of_the_model_is_refused(pipe, adapter, content):
    (adapter / "base.json").write_text(content)
    with pytest.raises(ValueError, match=r"base\.json .*Get the adapter again"):
        load_adapter(pipe, adapter)


def test_quantised_model_cannot_be_told(pipe, adapter, caplog):
    codes = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    pipe.text_encoder.aligner.register_parameter("codes", codes)
    load_adapter(pipe, adapter)
    assert "whether the adapter in" in caplog.text


def test_adapter_is_pushed_with_its_card_and_taken_from_the_hub(
    build_pipe, pipe, photos, tmp_path, monkeypatch
):
    encoder, uploads = build_pipe().text_encoder, []
    add_adapter(encoder, 4, base_name="someone/kosmos-g")
    save_adapter(encoder, tmp_path / "run" / "adapter")

    class Hub:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, commit_message, create_pr, allow_patterns):
            uploads.append(repo_id)
            (tmp_path / "hub").mkdir()
            for name in allow_patterns:
                shutil.copyfile(folder_path / name, tmp_path / "hub" / name)
            return "https://hub/commit"

    monkeypatch.setattr(adapters, "HfApi", Hub)
    url = push_adapter(tmp_path / "run", "me/mine", private=True, token="secret")
    assert (url, uploads) == ("https://hub/commit", ["me/mine"])
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.base_model == "someone/kosmos-g" and card.data.library_name == "peft"
    assert str(tmp_path) not in card.content and "LoRA of rank 4" in card.text
    assert "someone/kosmos-g" in (tmp_path / "hub" / CONFIG).read_text()
    monkeypatch.setattr(
        "kosmos_g_diffusers.conversion.folder.snapshot_download", lambda *_, **__: tmp_path / "hub"
    )
    load_adapter(pipe, "me/mine")
    assert pipe.text_encoder.adapter_base["name"] == "someone/kosmos-g"


def test_training_changes_the_adapter_alone(pipe, photos):
    encoder = pipe.text_encoder
    stage = InstructStage(encoder, pipe.unet, pipe.vae, pipe.scheduler, "none")
    add_adapter(encoder, 2)
    before = copy.deepcopy(encoder.state_dict())
    batch = dict(KosmosGProcessor(pipe.tokenizer)([[photos[0], "in the suit"], "a hat"]))
    generator = torch.Generator().manual_seed(0)
    batch["target_pixel_values"] = torch.rand(2, 3, 64, 64, generator=generator)
    batch["latent_noise"], batch["noise"] = torch.randn(2, 2, 4, 8, 8, generator=generator)
    batch["timesteps"], batch["drop_condition"] = torch.tensor([5, 700]), torch.tensor([False, True])
    optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(stage(batch).values()).backward()
        assert all(p.grad is not None for p in stage.parameters() if p.requires_grad)
        optimizer.step()
    for name, tensor in encoder.state_dict().items():
        # in the first step the matrices behind these zeros get no gradient, in the second they do
        assert torch.equal(tensor, before[name]) == (".lora_" not in name), name


def test_half_precision_of_frozen_layers_changes_nothing_under_autocast(build_pipe, photos):
    conditions = []
    for dtype in (None, torch.bfloat16):
        pipe = build_pipe()
        add_adapter(pipe.text_encoder, 4, dtype)
        for name, parameter in pipe.text_encoder.named_parameters():
            assert parameter.dtype == torch.float32 or "base_layer" in name or "lora" not in name
            if ".lora_B" in name:
                parameter.data.fill_(0.05)
        with torch.autocast("cpu", torch.bfloat16):
            conditions.append(encode(pipe, photos))
    torch.testing.assert_close(*conditions, atol=0, rtol=0)


# The folder that an adapter becomes part of -----------------------------------------------------------------------


@pytest.fixture
def base(build_pipe, tmp_path):
    """Folder of the model that the adapter was trained on, as training finds it."""
    pipe = build_pipe()
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "training_state").mkdir()
    return tmp_path / "base"


def test_merged_folder_draws_what_model_and_adapter_draw(base, adapter, pipe, photos, tmp_path, capsys):
    command = ["train", "merge", "--adapter", str(adapter), "--model", str(base)]
    assert main([*command, "--output", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out.split()[-1] == str(tmp_path / "merged")
    load_adapter(pipe, adapter)
    merged = KosmosGPipeline.from_pretrained(tmp_path / "merged")
    expected = encode_exactly(pipe, photos)
    torch.testing.assert_close(encode_exactly(merged, photos), expected, atol=2e-5, rtol=0)
    images = []
    for one in (pipe, merged):
        one.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        drawn = one("<i>", images=[photos[0]], num_inference_steps=2, generator=seed, output_type="np")
        images.append(torch.from_numpy(drawn.images))
    torch.testing.assert_close(*images, atol=1e-3, rtol=0)
    # everything else is the model's
    kept = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    written = {path.relative_to(tmp_path / "merged") for path in (tmp_path / "merged").rglob("*")}
    assert kept <= written and Path("training_state") not in written
    for name in ("unet", "vae"):
        name = Path(name) / "diffusion_pytorch_model.safetensors"
        assert (base / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert not any(
        str(tmp_path) in path.read_text("utf-8")
        for path in (tmp_path / "merged").rglob("*")
        if path.suffix in (".json", ".md")
    )


def test_card_of_a_merged_folder_says_what_was_merged_and_stays(base, adapter, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-00000002").mkdir(parents=True)
    adapter.rename(run / "checkpoint-00000002" / "adapter")
    TrainConfig(stage="instruct", model="secret/place", lora_rank=4, output=str(run)).save(
        run / "config.json"
    )
    merged = merge_into_folder(base, run / "checkpoint-00000002", tmp_path / "merged")
    card = (merged / "README.md").read_text("utf-8")
    assert "An adapter (LoRA of rank 4) is merged into the text encoder" in card and "that of base." in card
    assert "`kosmos-g train instruct`" in card and '"lora_rank": 4' in card and "secret" not in card
    KosmosGPipeline.from_pretrained(merged).save_pretrained(merged)
    assert (merged / "README.md").read_text("utf-8") == card


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merged_folder_keeps_the_dtype_of_the_model(base, adapter, build_pipe, tmp_path, dtype):
    build_pipe().to(dtype).save_pretrained(tmp_path / "half")
    merged = merge_into_folder(tmp_path / "half", adapter, tmp_path / "merged")
    weights = load_file(merged / "text_encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}


def test_merging_what_does_not_fit_writes_nothing(base, adapter, tmp_path, capsys):
    def error(**changes):
        given = {"adapter": adapter, "model": base, "output": tmp_path / "merged", **changes}
        flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        assert main(["train", "merge", *flags]) == 2
        assert not (tmp_path / "merged").exists()
        return capsys.readouterr().err

    assert "There is no adapter_config.json in" in error(adapter=base)
    assert "holds an adapter, not a model" in error(model=adapter.parent)
    assert "a folder that is not empty" in error(output=base)
    weights = load_file(adapter / WEIGHTS)
    name = next(name for name in weights if "lora_B" in name)
    save_file({key: value for key, value in weights.items() if key != name}, adapter / WEIGHTS)
    assert "1 are missing and 0 are not its own, such as" in error()
    save_file({**weights, name: weights[name] * torch.nan}, adapter / WEIGHTS)
    assert "holds values that are not finite" in error()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_refused_adapter_leaves_the_encoder_as_it_was(pipe, adapter, photos):
    before, names = encode(pipe, photos), list(pipe.text_encoder.state_dict())
    weights = load_file(adapter / WEIGHTS)
    save_file(dict(list(weights.items())[1:]), adapter / WEIGHTS)
    with pytest.raises(ValueError, match="1 are missing"):
        load_adapter(pipe, adapter)
    assert list(pipe.text_encoder.state_dict()) == names and torch.equal(encode(pipe, photos), before)


# Mistakes --------------------------------------------------------------------------------------------------------


def test_encoder_with_an_adapter_is_not_saved(pipe, adapter, tmp_path):
    load_adapter(pipe, adapter)
    with pytest.raises(ValueError, match="Call merge_adapter to save it with the weights, remove_adapter"):
        pipe.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(pipe, adapter)


def test_adapter_of_transformers_own_method_is_left_out_of_a_saved_pipeline(pipe, tmp_path, logged):
    expected = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    pipe.save_pretrained(tmp_path)
    assert "The LoRA default of the text_encoder is not saved" in logged.text
    saved = {path.name for path in (tmp_path / "text_encoder").iterdir()}
    assert "model.safetensors" in saved and not {CONFIG, WEIGHTS} & saved
    loaded = type(pipe).from_pretrained(tmp_path).text_encoder.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    # by itself it is saved as transformers saves it
    pipe.text_encoder.save_pretrained(tmp_path / "adapter")
    assert {CONFIG, WEIGHTS} <= {path.name for path in (tmp_path / "adapter").iterdir()}


def test_encoder_without_an_adapter(pipe, tmp_path):
    for function in (merge_adapter, remove_adapter):
        with pytest.raises(ValueError, match="has no adapter. Put one on with load_adapter"):
            function(pipe)
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter(pipe.text_encoder, tmp_path)
    with pytest.raises(TypeError, match="UNet2DConditionModel was given. Expected a pipeline"):
        load_adapter(pipe.unet, tmp_path)


def test_folder_without_an_adapter(pipe, adapter):
    with pytest.raises(ValueError, match=f"There is no {CONFIG} in "):
        load_adapter(pipe, adapter.parent / "nowhere")
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"There is no {WEIGHTS} in "):
        load_adapter(pipe, adapter)


def test_adapter_of_another_model(pipe, adapter):
    weights = load_file(adapter / WEIGHTS)
    name = next(iter(weights))
    weights[name] = torch.zeros(4, 48)
    save_file(weights, adapter / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"1 of \d+ weights .* such as .*\(4, 48\). Pass the model it was trained on"
    ):
        load_adapter(pipe, adapter)
    remaining = [name for name, _ in pipe.text_encoder.named_parameters() if "lora" in name]
    assert not remaining
