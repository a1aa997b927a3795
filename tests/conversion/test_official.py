"""convert_checkpoint on the golden checkpoints, on damaged ones and on hostile ones."""

import argparse
import enum
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.training_runs import save_clip
from transformers import CLIPConfig, CLIPImageProcessor

from kosmos_g_diffusers import KosmosGPipeline, KosmosGTextEncoder, KosmosGTextEncoderConfig, KosmosGTokenizer
from kosmos_g_diffusers.conversion import folder as writing
from kosmos_g_diffusers.conversion import keys as checkpoint_keys
from kosmos_g_diffusers.conversion import official as conversion
from kosmos_g_diffusers.conversion.checkpoint import INERT_NAMES, STAND_INS, read_checkpoint
from kosmos_g_diffusers.conversion.initial_weights import build_fresh
from kosmos_g_diffusers.conversion.keys import IGNORED, KEY_MAP, match_keys
from kosmos_g_diffusers.conversion.official import convert_checkpoint
from kosmos_g_diffusers.conversion.target import load_target
from kosmos_g_diffusers.modeling_aligner_n import FILE, AlignerNetN
from kosmos_g_diffusers.modeling_kosmos_g import AlignerNet
from kosmos_g_diffusers.training import TrainConfig, build_run

REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"
ALIGN, FINAL = REFERENCE / "tiny_reference_checkpoint.pt", REFERENCE / "tiny_final_stage_checkpoint_fp16.pt"
BASE = REFERENCE / "tiny_stable_diffusion"
CASES = {case["name"]: case for case in json.loads((REFERENCE / "cases.json").read_text())}


def tiny_config(**changes):
    sizes = json.loads((REFERENCE / "config.json").read_text())
    text = {
        "vocab_size": sizes["vocab_size"],
        "embed_dim": sizes["dec_dim"],
        "layers": sizes["dec_layers"],
        "attention_heads": sizes["dec_heads"],
        "ffn_dim": sizes["dec_ffn"],
    }
    vision = {
        "hidden_size": sizes["vis_width"],
        "num_hidden_layers": sizes["vis_layers"],
        "num_attention_heads": sizes["vis_width"] // sizes["vis_head_width"],
        "intermediate_size": int(sizes["vis_width"] * sizes["vis_mlp_ratio"]),
        "image_size": sizes["image_size"],
        "patch_size": sizes["patch"],
    }
    given = {
        "text_config": text,
        "vision_config": vision,
        "latent_query_num": sizes["latent"],
        "aligner_hidden_size": sizes["al_dim"],
        "aligner_layers": sizes["al_layers"],
        "aligner_attention_heads": sizes["al_heads"],
        "aligner_ffn_dim": sizes["al_ffn"],
        "aligner_max_positions": sizes["al_pos"],
        "num_queries": sizes["num_queries"],
    }
    return KosmosGTextEncoderConfig(**(given | changes))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A saved tokenizer with the official number of entries, whose pieces are made up."""
    pieces = [("▁", -1.0), ("▁red", -2.0)] + [(f"▁piece{i}", -9.0) for i in range(63995)]
    folder = tmp_path_factory.mktemp("tokenizer")
    KosmosGTokenizer.from_vocabulary(pieces).save_pretrained(folder)
    return folder


@pytest.fixture
def convert(tokenizer, tmp_path):
    """convert_checkpoint with arguments that fit the tiny checkpoints, to `tmp_path / "out"`."""

    def call(checkpoint=ALIGN, output=None, **changes):
        arguments = {"tokenizer": tokenizer, "base": BASE, "config": tiny_config()} | changes
        return convert_checkpoint(checkpoint, output or tmp_path / "out", **arguments)

    return call


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """The two golden checkpoints, converted with a base whose text encoder is garbage: nobody may read it."""
    place, config = tmp_path_factory.mktemp("converted"), tiny_config()
    base = shutil.copytree(BASE, place / "base")
    for path in (base / "text_encoder").iterdir():
        path.write_bytes(b"garbage")
    arguments = {"tokenizer": tokenizer, "base": base, "config": config}
    folders = {
        "align": convert_checkpoint(ALIGN, place / "align", **arguments),
        "final": convert_checkpoint(FINAL, place / "final", **arguments),
    }
    assert config.to_dict() == tiny_config().to_dict()  # arguments are not changed
    return folders


@pytest.fixture
def altered(tmp_path):
    """Save the alignment-stage weights after `change(weights)`; returns the path."""

    def save(change, **keywords):
        weights = read_checkpoint(ALIGN)
        change(weights)
        torch.save({"model": weights}, tmp_path / "altered.pt", **keywords)
        return tmp_path / "altered.pt"

    return save


def nothing_left(folder, *known):
    return sorted(path.name for path in folder.iterdir()) == sorted(known)


# The golden checkpoints ------------------------------------------------------------------------------------------


def encode(encoder, case):
    tensors = load_file(REFERENCE / CASES[case]["file"])
    pixels = load_file(REFERENCE / "pixel_values.safetensors")
    order = CASES[case]["image_order"]
    with torch.no_grad():
        return encoder(
            tensors["input_ids"],
            pixel_values=torch.stack([pixels[name] for name in order]) if order else None,
            image_token_mask=tensors["image_mask"].bool() if order else None,
        ).last_hidden_state


@pytest.mark.parametrize("case", CASES)
def test_converted_encoder_reproduces_the_golden_condition(folders, case):
    encoder = KosmosGTextEncoder.from_pretrained(folders["align"], subfolder="text_encoder").eval()
    expected = load_file(REFERENCE / CASES[case]["file"])["condition"]
    # float32 sums in another order: the reference itself is within 1e-5 of its float64 run
    torch.testing.assert_close(encode(encoder, case), expected, atol=5e-5, rtol=0)


def test_converted_fp16_checkpoint_reproduces_its_golden_condition(folders):
    encoder = KosmosGTextEncoder.from_pretrained(
        folders["final"], subfolder="text_encoder", dtype=torch.float32
    )
    case = json.loads((REFERENCE / "final_stage_fp16_checkpoint_case.json").read_text())[
        "same_inputs_as_case"
    ]
    expected = load_file(REFERENCE / "final_stage_fp16_checkpoint_case.safetensors")["condition"]
    torch.testing.assert_close(encode(encoder.eval(), case), expected, atol=5e-5, rtol=0)


def test_unet_and_vae_of_the_checkpoint_are_taken(convert, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    for weights in base.glob("*/*.safetensors"):
        weights.unlink()
    folder, given = convert(FINAL, base=base), read_checkpoint(FINAL)
    for name, prefix in (("unet", "diffusion_unet.unet."), ("vae", "vae.vae.")):
        written = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        expected = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], expected[key]) for key in expected)
        assert {value.dtype for value in written.values()} == {torch.float16}


def test_unet_and_vae_of_the_base_are_taken_when_the_checkpoint_has_none(folders):
    for name in ("unet", "vae"):
        written = load_file(folders["align"] / name / "diffusion_pytorch_model.safetensors")
        expected = load_file(BASE / name / "diffusion_pytorch_model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_aligner_n_is_kept_for_training(folders):
    given, written = read_checkpoint(ALIGN), load_file(folders["align"] / "aligner_n" / FILE)
    assert len(written) == sum(key.startswith("aligner.decoder") for key in given)
    for ours, official in (
        ("query_embeds", "aligner.decoder_query"),
        ("query_layers.1.encoder_attn.q_proj.weight", "aligner.decoder.layers.1.encoder_attn.q_proj.weight"),
        ("output_layers.0.ffn.fc1.bias", "aligner.decoder_proj.layers.0.ffn.fc1.bias"),
        ("output_projection.weight", "aligner.decoder_proj.output_projection.weight"),
    ):
        assert torch.equal(written[ours], given[official])
    assert not (folders["final"] / "aligner_n").exists()


def first_stage(weights):
    for key in [key for key in weights if key.startswith("aligner.")]:
        del weights[key]


def test_stage_1_gets_a_new_aligner_and_is_what_init_writes(convert, altered, folders, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    save_clip(base, width=tiny_config().aligner_hidden_size, positions=30)
    given = convert(altered(first_stage), seed=3, base=base)
    encoder = KosmosGTextEncoder.from_pretrained(given, subfolder="text_encoder")
    aligned = KosmosGTextEncoder.from_pretrained(folders["align"], subfolder="text_encoder").state_dict()
    state = encoder.state_dict()
    kept = {name for name in aligned if name in state and torch.equal(aligned[name], state[name])}
    others = {name for name in aligned if not name.startswith("aligner.")}
    assert others <= kept and "aligner.query_embeds" not in kept
    target, _ = load_target(given)
    sizes = (encoder.config.num_queries, encoder.config.aligner_hidden_size)
    assert sizes == (target.config.max_position_embeddings, target.config.hidden_size)
    # as init's: the same parts and the same random weights
    expected = build_fresh(AlignerNet, encoder.config, 3).state_dict()
    assert all(torch.equal(state[f"aligner.{name}"], tensor) for name, tensor in expected.items())
    expected = build_fresh(AlignerNetN, encoder.config, 4).state_dict()
    aligner_n = load_file(given / "aligner_n" / FILE)
    assert all(torch.equal(aligner_n[name], tensor) for name, tensor in expected.items())
    assert "of stage 1 and a new AlignerNet" in (given / "README.md").read_text()
    # the command, which train align can start from
    config = TrainConfig(
        model=str(given), data=("captions",), output=str(tmp_path / "run"), steps=1, warmup_steps=0
    )
    run = build_run("align", config, [CaptionSource()])
    assert not [note for note in run.notes if "AlignerNet" in note]


class CaptionSource:
    name, groups = "captions", (8,)

    def __len__(self):
        return 8


def test_stage_1_that_is_not_whole_is_refused(convert, altered, tmp_path):
    def lacks(weights):
        first_stage(weights)
        del weights["img_connector.latent_query"]

    with pytest.raises(ValueError, match="1 missing: img_connector.latent_query"):
        convert(altered(lacks))
    # a later stage whose AlignerNet is gone is none of stage 1
    weights = read_checkpoint(FINAL)
    first_stage(weights)
    torch.save({"model": weights}, tmp_path / "final.pt")
    with pytest.raises(ValueError, match=r"\d+ missing: aligner\."):
        convert(tmp_path / "final.pt")
    base = shutil.copytree(BASE, tmp_path / "base")
    shutil.rmtree(base / "text_encoder")
    with pytest.raises(ValueError, match="There is no text_encoder in"):
        convert(altered(first_stage), base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["align", "final"])
def test_converted_folder_draws(folders, stage):
    pipeline = KosmosGPipeline.from_pretrained(folders[stage], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline(
        "red", num_inference_steps=1, height=32, width=32, generator=generator, output_type="np"
    ).images
    assert image.shape == (1, 32, 32, 3)


def test_folder_names_no_path_of_this_machine(folders):
    for folder in folders.values():
        for path in [*folder.rglob("*.json"), folder / "README.md"]:
            assert str(folder.parent) not in path.read_text(encoding="utf-8"), path
    assert ALIGN.name in (folders["align"] / "README.md").read_text(encoding="utf-8")


def test_official_tokenizer_file_gives_the_official_ids(convert, sentencepiece_file):
    tokenizer = KosmosGTokenizer.from_pretrained(convert(tokenizer=sentencepiece_file), subfolder="tokenizer")
    assert [tokenizer(CASES["text_only"]["prompts"][0])["input_ids"]] == CASES["text_only"]["input_ids"]
    assert tokenizer.model_max_length == tiny_config().text_config.max_position_embeddings


@pytest.mark.parametrize("file_format", ["legacy", "safetensors"])
def test_other_file_formats_give_the_same_encoder(convert, altered, folders, tmp_path, file_format):
    checkpoint = altered(lambda weights: None, _use_new_zipfile_serialization=False)
    if file_format == "safetensors":
        tensors = {key: value.clone() for key, value in read_checkpoint(ALIGN).items()}
        save_file(tensors, tmp_path / "checkpoint.safetensors")
        checkpoint = tmp_path / "checkpoint.safetensors"
    name = "text_encoder/model.safetensors"
    assert (convert(checkpoint) / name).read_bytes() == (folders["align"] / name).read_bytes()


def test_one_model_is_in_memory_at_a_time(convert, monkeypatch):
    write, written = writing.write_model, []

    def watch(model, *args, **options):
        assert all(parameter.is_meta for parameter in model.parameters())
        write(model, *args, **options)
        assert all(parameter.is_meta for parameter in model.parameters())
        written.append(type(model).__name__)

    monkeypatch.setattr(writing, "write_model", watch)
    monkeypatch.setattr(conversion, "write_model", watch)
    convert()
    assert sorted(written) == ["AlignerNetN", "AutoencoderKL", "KosmosGTextEncoder", "UNet2DConditionModel"]


# Keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["align", "final"])
def test_keys_of_the_full_size_model_fit_without_leftover(stage):
    shapes = json.loads((REFERENCE / f"full_size_state_dict_keys_{stage}_stage.json").read_text())
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in shapes.items()}
        encoder = KosmosGTextEncoder(KosmosGTextEncoderConfig())
        aligner_n = AlignerNetN(encoder.config)
        blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        vae = AutoencoderKL(3, 3, *blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
        unet = UNet2DConditionModel(cross_attention_dim=768)
    modules = {"text_encoder": encoder, "aligner_n": aligner_n, "unet": unet, "vae": vae}
    expected = {name: module.state_dict() for name, module in modules.items()}
    plan = match_keys(weights, expected)
    assert set(plan) == {"text_encoder", *(("aligner_n",) if stage == "align" else ("unet", "vae"))}
    taken = [key for keys in plan.values() for key in keys.values()]
    assert len(taken) == len(set(taken))  # no key becomes two weights
    for name in plan:
        assert plan[name].keys() == expected[name].keys()
    left = set(weights) - set(taken)
    assert all(any(key.startswith(name.partition("{")[0]) for name in IGNORED) for key in left)


def test_no_official_key_is_both_taken_and_ignored():
    for names in KEY_MAP.values():
        for official in names:
            assert not any(re.match(checkpoint_keys._pattern(name), official) for name in IGNORED)


def test_unknown_checkpoint_key_is_named_in_error(convert, altered):
    def change(weights):
        weights["gpt_model.decoder.surprise"] = torch.ones(1)
        weights["aligner.encoder_query.more"] = torch.ones(1)

    with pytest.raises(
        ValueError, match=r"2 not known: gpt_model.decoder.surprise, aligner.encoder_query.more"
    ):
        convert(altered(change))


def test_missing_checkpoint_keys_are_named_in_error(convert, altered):
    def change(weights):
        for key in [key for key in weights if "decoder_proj.layers" in key]:
            del weights[key]

    with pytest.raises(
        ValueError, match=r"missing: aligner.decoder_proj.layers.0.*and \d+ more\. Pass config="
    ):
        convert(altered(change))


def test_wrong_size_is_named_with_both_shapes(convert):
    with pytest.raises(
        ValueError, match=r"1 of another shape: aligner.encoder_query \[77, 24\], expected \[7, 24\].*config="
    ):
        convert(config=tiny_config(num_queries=7))


def test_default_config_on_a_tiny_checkpoint_says_how_to_fix_it(convert, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    unet = json.loads((base / "unet" / "config.json").read_text()) | {"cross_attention_dim": 768}
    (base / "unet" / "config.json").write_text(json.dumps(unet))
    with pytest.raises(ValueError, match="missing: gpt_model.decoder.layers.3.*Pass config="):
        convert(base=base, config=None)


def test_weights_that_are_not_floats_are_refused(convert, altered):
    with pytest.raises(ValueError, match="1 not floating-point: aligner.encoder_query torch.int64"):
        convert(altered(lambda weights: weights.update({"aligner.encoder_query": torch.ones(77, 24).long()})))


def test_unused_attention_of_the_vision_tower_is_left_behind(convert, altered):
    name = "img_model.visual.transformer.resblocks.0.attn.in_proj_weight"

    def change(weights):
        weights[name] = torch.ones(3)
        del weights["gpt_model.decoder.output_projection.weight"]  # may be there, need not

    assert convert(altered(change)).is_dir()


def test_output_projection_must_be_the_embedding(convert, altered):
    def untie(weights):
        weights["gpt_model.decoder.output_projection.weight"] = (
            weights["gpt_model.decoder.output_projection.weight"] + 1
        )

    with pytest.raises(
        ValueError, match="output_projection.weight differs from gpt_model.decoder.embed_tokens.weight"
    ):
        convert(altered(untie))


# Arguments -------------------------------------------------------------------------------------------------------


def test_dtype_casts_every_weight(convert):
    folder = convert(dtype=torch.bfloat16)
    for name in ("text_encoder", "unet", "vae", "aligner_n"):
        for path in (folder / name).glob("*.safetensors"):
            assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}


def test_dtype_none_keeps_each_dtype(convert, altered):
    def change(weights):
        weights["aligner.encoder_query"] = weights["aligner.encoder_query"].half()

    written = load_file(convert(altered(change)) / "text_encoder" / "model.safetensors")
    assert written["aligner.query_embeds"].dtype == torch.float16
    assert written["aligner.input_projection.weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float8", "int64", torch.int32, 16])
def test_other_dtypes_are_refused(convert, dtype):
    with pytest.raises(ValueError, match="Pass one of float16, bfloat16, float32"):
        convert(dtype=dtype)


def test_config_of_another_kind_is_refused(convert):
    with pytest.raises(TypeError, match="config is a dict. Pass a KosmosGTextEncoderConfig"):
        convert(config={"num_queries": 77})
    with pytest.raises(ValueError, match="image words <my-dog>"):
        convert(config=tiny_config(image_words=[["<my-dog>", 1]]))


@pytest.fixture
def unread(monkeypatch):
    """Reading the checkpoint fails the test."""

    def fail(path):
        pytest.fail("the checkpoint was read before the cheap checks")

    monkeypatch.setattr(conversion, "read_checkpoint", fail)


def test_output_that_is_not_empty_is_refused_and_left_alone(convert, unread, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="out is a folder that is not empty. Pass a folder that does not exist"
    ):
        convert()
    with pytest.raises(ValueError, match="mine.txt is a file"):
        convert(output=folder / "mine.txt")
    with pytest.raises(ValueError, match="cannot be made: .*mine.txt is a file"):
        convert(output=folder / "mine.txt" / "a" / "b")
    assert nothing_left(folder, "mine.txt") and (folder / "mine.txt").read_text() == "mine"


def test_output_may_be_an_empty_folder_or_lie_in_new_ones(convert, tmp_path):
    (tmp_path / "out").mkdir()
    assert (convert() / "model_index.json").is_file()
    assert (convert(output=tmp_path / "a" / "b" / "c") / "model_index.json").is_file()
    assert nothing_left(tmp_path, "out", "a") and nothing_left(tmp_path / "a" / "b", "c")


def test_tokenizer_that_is_none_is_refused_first(convert, unread, tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "text.model").write_text("no model " * 20)
    with pytest.raises(ValueError, match="no tokenizer file at"):
        convert(tokenizer=tmp_path / "missing.model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        convert(tokenizer=tmp_path / "text.model")
    with pytest.raises(ValueError, match="holds no Kosmos-G tokenizer.*sentencepiece.bpe.model"):
        convert(tokenizer=tmp_path)


def test_tokenizer_of_another_model_is_refused_first(convert, unread, tmp_path):
    KosmosGTokenizer.from_vocabulary([("▁a", -1.0)], image_size=32).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match="does not fit config: entries 11, expected 64007.*image size 32, expected 224"
    ):
        convert(tokenizer=tmp_path / "other")


def test_base_that_is_none_is_refused_first(convert, unread, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(writing, "snapshot_download", offline)
    with pytest.raises(ValueError, match="nobody/nothing is not a folder.*no connection"):
        convert(base="nobody/nothing")
    with pytest.raises(
        ValueError, match="has no unet/config.json, vae/config.json, scheduler/.*from_single_file"
    ):
        convert(base=tmp_path)
    base = shutil.copytree(BASE, tmp_path / "base")
    (base / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "Popen"}')
    with pytest.raises(ValueError, match="scheduler is of the class 'Popen'"):
        convert(base=base)
    (base / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="scheduler_config.json is not JSON .*Download the base again"):
        convert(base=base)


@pytest.mark.parametrize(
    "file, content",
    [
        ("unet/config.json", "[]"),
        ("unet/config.json", "[" * 10_000),
        ("unet/config.json", {"block_out_channels": "wide"}),
        ("unet/config.json", {"block_out_channels": [-16, 32]}),
        ("unet/config.json", {"block_out_channels": [10**7, 10**7]}),
        ("vae/config.json", "3"),
        ("vae/config.json", {"block_out_channels": [10**7] * 4}),
        ("vae/config.json", {"latent_channels": "four"}),
        ("scheduler/scheduler_config.json", "[]"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}),
    ],
)
def test_settings_of_the_base_that_describe_no_model_are_refused(convert, tmp_path, file, content):
    base = shutil.copytree(BASE, tmp_path / "base")
    if isinstance(content, dict):
        content = json.dumps(json.loads((base / file).read_text()) | content)
    (base / file).write_text(content)
    with pytest.raises(ValueError, match=file.partition("/")[0]) as caught:
        convert(base=base)
    assert "\n" not in str(caught.value)
    assert nothing_left(tmp_path, "base")


@pytest.mark.parametrize(
    "error", [SafetensorError("Error while serializing: I/O error"), OSError(28, "No space left")]
)
def test_full_disk_is_one_line_and_leaves_nothing(convert, tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", full)
    with pytest.raises(OSError, match="^unet cannot be written to .*(I/O error|No space left)"):
        convert()
    assert nothing_left(tmp_path)


def test_base_of_another_width_is_refused_first(convert, unread):
    with pytest.raises(ValueError, match="conditions of width 24, config.aligner_hidden_size is 32"):
        convert(config=tiny_config(aligner_hidden_size=32))


def test_base_without_weights_is_refused_when_they_are_needed(convert, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    message = "weights of unet in the base .* cannot be used .*{}.*and the checkpoint has none"
    with pytest.raises(ValueError, match=message.format("1 are missing: conv_in.weight")):
        convert(base=base)
    path.unlink()
    with pytest.raises(ValueError, match=message.format("diffusion_pytorch_model")):
        convert(base=base)
    assert nothing_left(tmp_path, "base")


def test_base_may_be_a_hub_id(convert, monkeypatch, tmp_path):
    asked = {}

    def download(repo_id, allow_patterns):
        asked[repo_id] = allow_patterns
        skip = shutil.ignore_patterns("*.safetensors", "text_encoder")
        return shutil.copytree(BASE, tmp_path / "cache", ignore=skip)

    monkeypatch.setattr(writing, "snapshot_download", download)
    folder = convert(FINAL, base="someone/stable-diffusion")
    assert "unet/config.json" in asked["someone/stable-diffusion"]
    assert not any(
        pattern.startswith("text_encoder") or "safetensors" in pattern for pattern in asked.popitem()[1]
    )
    assert "someone/stable-diffusion" in (folder / "README.md").read_text()


def test_safety_checker_of_the_base_is_kept(convert, tmp_path, folders):
    base = shutil.copytree(BASE, tmp_path / "base")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = CLIPConfig(
        text_config=sizes, vision_config=sizes | {"image_size": 8, "patch_size": 4}, projection_dim=4
    )
    StableDiffusionSafetyChecker(settings).save_pretrained(base / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 8}).save_pretrained(base / "feature_extractor")
    folder = convert(base=base, dtype="float16")
    pipeline = KosmosGPipeline.from_pretrained(folder, dtype=torch.float16)
    assert isinstance(pipeline.safety_checker, StableDiffusionSafetyChecker)
    assert pipeline.feature_extractor.size["shortest_edge"] == 8
    assert pipeline.config.requires_safety_checker
    assert str(tmp_path) not in (folder / "safety_checker" / "config.json").read_text()
    written = load_file(folder / "safety_checker" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float16}
    without = json.loads((folders["align"] / "model_index.json").read_text())
    assert without["safety_checker"] == [None, None] and without["requires_safety_checker"] is False


# Interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "interruption"),
    [
        ("save_pretrained", KeyboardInterrupt),
        ("save_pretrained", OSError("No space left on device")),
        ("aligner_n", KeyboardInterrupt),
        ("check_written", KeyboardInterrupt),
        ("write_model_card", KeyboardInterrupt),
        ("replace", KeyboardInterrupt),
    ],
)
def test_interrupted_conversion_leaves_nothing(convert, tmp_path, monkeypatch, where, interruption):
    def stop(*args, **kwargs):
        raise interruption

    def save_half(self, folder, **kwargs):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        stop()

    if where == "save_pretrained":
        monkeypatch.setattr(KosmosGTextEncoder, "save_pretrained", save_half)
    elif where == "aligner_n":
        monkeypatch.setattr(AlignerNetN, "save_pretrained", save_half)
    elif where == "replace":
        monkeypatch.setattr(writing.os, "replace", stop)
    else:
        monkeypatch.setattr(writing, where, stop)
    with pytest.raises(KeyboardInterrupt if interruption is KeyboardInterrupt else OSError):
        convert(output=tmp_path / "new" / "out")
    assert nothing_left(tmp_path)


def test_faulty_writing_is_noticed(convert, tmp_path, monkeypatch):
    save = KosmosGTextEncoder.save_pretrained

    def save_wrongly(self, folder, **kwargs):
        save(self, folder, **kwargs)
        path = Path(folder) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")

    monkeypatch.setattr(KosmosGTextEncoder, "save_pretrained", save_wrongly)
    with pytest.raises(RuntimeError, match="in text_encoder was not written as it is"):
        convert()
    assert nothing_left(tmp_path)


# Damaged, foreign and hostile files ------------------------------------------------------------------------------


def test_missing_checkpoint_is_refused(convert, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint file at .*none.pt. Pass the path"):
        convert(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no checkpoint file at"):
        convert(tmp_path)


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "truncated legacy", "zip", "safetensors", "bad safetensors"]
)
def test_file_that_is_not_a_checkpoint_is_refused(altered, tmp_path, kind):
    path = tmp_path / "foreign.pt"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("Not a checkpoint.\n" * 20)
    elif kind == "truncated":
        path.write_bytes(ALIGN.read_bytes()[:-1000])
    elif kind == "truncated legacy":
        path.write_bytes(
            altered(lambda weights: None, _use_new_zipfile_serialization=False).read_bytes()[:-1000]
        )
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("folder/file.txt", "text")
    elif kind == "safetensors":
        save_file({"a": torch.ones(2)}, path)
    else:
        path = tmp_path / "foreign.safetensors"
        path.write_bytes(b"\xff" * 40)
    with pytest.raises(
        ValueError, match=r"bytes\) is not a checkpoint, or was cut short: .*download it again"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": 1, "cfg": 2}, r"holds \['cfg', 'weights'\] and no weights under 'model'"),
        ([1, 2], "holds list and no weights"),
        ({"model": {}}, "no weights under 'model'"),
        ({"model": [torch.ones(1)]}, "no weights under 'model'"),
        (
            {"model": {"a": torch.ones(1), "b": 3}},
            r"1 entries that are not dense tensors under a name: 'b' \(int\)",
        ),
        ({"model": {4: torch.ones(1)}}, r"4 \(Tensor\)"),
        ({"model": {"a": torch.empty(1, device="meta")}}, r"'a' \(Tensor\)"),
        ({"model": {"a": torch.eye(2).to_sparse()}}, r"'a' \(Tensor\)"),
        ({"model": {"a": argparse.Namespace()}}, r"'a' \(Namespace\)"),
    ],
)
def test_checkpoint_without_plain_weights_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "strange.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "strange.pt")


def test_running_out_of_memory_is_not_a_fault_of_the_checkpoint(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        read_checkpoint(ALIGN)


class Hostile:
    """An object whose pickle calls `function(*arguments)` when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_objects(file):
    return {
        "posix.system" if os.name == "posix" else "nt.system": Hostile(os.system, f"echo > {file}"),
        "builtins.exec": Hostile(exec, f"open({str(file)!r}, 'w').close()"),
        "builtins.eval": Hostile(eval, f"open({str(file)!r}, 'w').close()"),
        "builtins.getattr": Hostile(getattr, argparse.Namespace(), "__class__"),
        "io.open": Hostile(open, str(file), "w"),
        "subprocess.Popen": Hostile(subprocess.Popen, ["touch", str(file)]),
    }


@pytest.mark.parametrize("keywords", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
@pytest.mark.parametrize("place", ["cfg", "model"])
def test_nothing_of_a_hostile_checkpoint_runs(tmp_path, place, keywords):
    file = tmp_path / "it ran"
    for name, thing in hostile_objects(file).items():
        content = {"model": {"a": torch.ones(1)}, "cfg": None}
        content[place] = {"thing": thing}
        torch.save(content, tmp_path / "hostile.pt", **keywords)
        with pytest.raises(ValueError, match=rf"was refused, nothing in it was run: it names {name}\b"):
            read_checkpoint(tmp_path / "hostile.pt")
        assert not file.exists()
    # the files would do harm: plain pickle runs what they name
    pickle.loads(pickle.dumps(Hostile(exec, f"open({str(file)!r}, 'w').close()")))
    assert file.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_of_a_plain_hostile_pickle_runs(tmp_path, protocol):
    file = tmp_path / "it ran"
    for name, thing in hostile_objects(file).items():
        (tmp_path / "hostile.pt").write_bytes(pickle.dumps({"model": thing}, protocol=protocol))
        with pytest.raises(ValueError, match=rf"was refused, nothing in it was run: it names .*{name}\b"):
            read_checkpoint(tmp_path / "hostile.pt")
        assert not file.exists()


def test_allow_list_builds_nothing_but_stand_ins():
    package = read_checkpoint.__module__
    for stand_in in STAND_INS:
        code = stand_in if not isinstance(stand_in, type) else stand_in.__new__
        # the code is ours, only the name is another's
        assert sys.modules[package].__dict__ is code.__globals__
    assert sum(map(len, INERT_NAMES.values())) + 1 == len(STAND_INS)
    assert isinstance(STAND_INS[0](1, 2), STAND_INS[0]) and STAND_INS[-1](dict) == {}


def test_allow_list_of_the_process_is_neither_used_nor_changed(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "cfg": Hostile(bytes.fromhex, "00")}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([getattr, Hostile]):
        before = set(torch.serialization.get_safe_globals())
        with pytest.raises(ValueError, match="it names builtins.getattr"):
            read_checkpoint(tmp_path / "a.pt")
        read_checkpoint(ALIGN)
        assert set(torch.serialization.get_safe_globals()) == before


# What fairseq writes ---------------------------------------------------------------------------------------------


def test_namespace_of_fairseq_loads(tmp_path):
    settings = argparse.Namespace(arch="kosmosg_xl", nested=argparse.Namespace(lr=[1e-3]))
    torch.save({"model": {"a": torch.ones(1)}, "args": settings}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").keys() == {"a"}


@pytest.mark.parametrize("omegaconf_is_there", [True, False])
def test_omegaconf_settings_load_with_and_without_omegaconf(tmp_path, monkeypatch, omegaconf_is_there):
    omegaconf = pytest.importorskip("omegaconf")
    settings = {
        "common": {
            "seed": 1,
            "fp16": True,
            "lr": [0.001],
            "name": "a",
            "none": None,
            "missing": "???",
            "x": "${common.seed}",
        },
        "path": Path("data"),
        "bytes": b"abc",
        3: [[1, {"deep": 2.5}]],
    }
    plain = omegaconf.OmegaConf.create(settings)
    omegaconf.OmegaConf.set_struct(plain, True)
    assert plain.common.x == 1  # resolved: omegaconf may cache
    typed = omegaconf.DictConfig({"a": 1}, element_type=int)
    types = {
        "a": (dict[str, int], {"b": 1}),
        "c": (list[float], [0.5]),
        "d": (int | None, None),
        "e": (str, "x"),
    }
    fields = [
        (name, kind, field(default_factory=lambda value=value: value))
        for name, (kind, value) in types.items()
    ]
    structured = omegaconf.OmegaConf.structured(dataclass(make_dataclass("Settings", fields)))
    content = {
        "model": {"a": torch.ones(1)},
        "cfg": plain,
        "typed": typed,
        "nodes": [structured._get_node(name) for name in types],
    }
    for node in content["nodes"]:
        node._set_parent(None)
    torch.save(content, tmp_path / "a.pt")
    if not omegaconf_is_there:
        for name in [name for name in sys.modules if name.split(".")[0] == "omegaconf"]:
            monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert read_checkpoint(tmp_path / "a.pt").keys() == {"a"}


@pytest.mark.parametrize("kind", ["dataclass", "enum"])
def test_settings_of_foreign_classes_are_refused_by_name(tmp_path, kind):
    omegaconf = pytest.importorskip("omegaconf")
    if kind == "enum":
        foreign = enum.Enum("Foreign", ["A"], module=__name__)
        settings = omegaconf.OmegaConf.create({"choice": foreign.A})
    else:
        foreign = make_dataclass("Foreign", [("a", int, 1)], namespace={"__module__": __name__})
        settings = omegaconf.OmegaConf.structured(foreign)
    globals()["Foreign"] = foreign
    torch.save({"model": {"a": torch.ones(1)}, "cfg": settings}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"it names {__name__}\.Foreign"):
        read_checkpoint(tmp_path / "a.pt")
