import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.without_package import fake_hub
from torch import nn
from transformers import (
    BertConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Model,
    Kosmos2Processor,
    XLMRobertaTokenizer,
)

from kosmos_g_diffusers import KosmosGPipeline, KosmosGProcessor
from kosmos_g_diffusers.conversion.initial_weights import build_fresh, reset_weights
from kosmos_g_diffusers.conversion.kosmos2 import _tokenizer, initialize
from kosmos_g_diffusers.conversion.target import load_target
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN
from kosmos_g_diffusers.modeling_kosmos_g import AlignerNet
from kosmos_g_diffusers.training.stages import AlignStage, InstructStage, PretrainStage

SPECIAL = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
PIECES = [(f"▁{word}", -2.0) for word in "a dog cat red the in".split()]
PIECES += [(character, -6.0) for character in "▁abcdefghijklmnopqrstuvwxyz"]
SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48, "embed_dim": 24, "max_position_embeddings": 60}


def save_kosmos(folder, model_class=Kosmos2ForConditionalGeneration, pieces=PIECES, **changes):
    """A Kosmos-2 of tiny size, by transformers' own classes."""
    tokenizer = XLMRobertaTokenizer(vocab=[*SPECIAL, *pieces, ("<mask>", 0.0)])
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = Kosmos2Processor(images, tokenizer, num_patch_index_tokens=16)
    processor.save_pretrained(folder)
    config = Kosmos2Config(
        text_config={"vocab_size": len(tokenizer), **SIZES} | changes,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        latent_query_num=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    return folder


def save_stable_diffusion(folder, width=32, clip_width=None, prediction_type="epsilon"):
    """A Stable Diffusion of tiny size; both U-Net and text encoder of `width`."""
    clip_width = clip_width or width
    vocabulary = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(vocabulary)}, merges=[], model_max_length=20
    ).save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=clip_width,
                intermediate_size=3 * clip_width,
                num_hidden_layers=2,
                num_attention_heads=8,
                max_position_embeddings=20,
                bos_token_id=4,
                eos_token_id=5,
            )
        ).save_pretrained(folder / "text_encoder")
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=4,
            norm_num_groups=8,
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
        ).save_pretrained(folder / "vae")
    DDIMScheduler(prediction_type=prediction_type, clip_sample=False, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.fixture(scope="module")
def kosmos(tmp_path_factory):
    return save_kosmos(tmp_path_factory.mktemp("kosmos"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(kosmos, base, tmp_path_factory):
    """What `initialize` makes of the two."""
    return initialize(kosmos, base, tmp_path_factory.mktemp("fresh") / "new" / "folder", aligner_layers=2)


@pytest.fixture
def call(kosmos, base, tmp_path):
    def call(**changes):
        arguments = {"mllm": kosmos, "base": base, "output": tmp_path / "out", "aligner_layers": 1} | changes
        return initialize(**arguments)

    return call


# What the folder holds -------------------------------------------------------------------------------------------


def _transformers_states(kosmos, photo, text, **kwargs):
    """Ids, slots and last hidden states by transformers' own processor and model."""
    processor = Kosmos2Processor.from_pretrained(kosmos)
    model = Kosmos2Model.from_pretrained(kosmos, **kwargs).eval()
    # some releases of transformers let SDPA take this cross-attention for a causal one
    model.image_to_text_projection.x_attn.is_causal = False
    inputs = processor(images=photo, text=text, num_image_tokens=4, return_tensors="pt")
    with torch.no_grad():
        states = model(
            pixel_values=inputs["pixel_values"],
            input_ids=inputs["input_ids"],
            image_embeds_position_mask=inputs["image_embeds_position_mask"],
        ).last_hidden_state
    return inputs, states


@pytest.mark.parametrize("model_class", [Kosmos2ForConditionalGeneration, Kosmos2Model])
def test_hidden_states_are_those_of_transformers_kosmos_2(call, photos, tmp_path, model_class):
    mllm = save_kosmos(tmp_path / "kosmos", model_class)
    pipe = KosmosGPipeline.from_pretrained(call(mllm=mllm))
    text, photo = "the red cat sat in a hat", photos[3]
    expected_inputs, expected = _transformers_states(mllm, photo, text)
    inputs = KosmosGProcessor(pipe.tokenizer)([[photo, text]])
    slots = inputs["image_token_mask"]
    assert torch.equal(slots, expected_inputs["image_embeds_position_mask"].bool())
    assert torch.equal(inputs["input_ids"][~slots], expected_inputs["input_ids"][~slots])
    assert torch.allclose(inputs["pixel_values"], expected_inputs["pixel_values"], atol=1e-5)
    encoder = pipe.text_encoder.eval()
    with torch.no_grad():
        embeds = encoder.get_image_features(expected_inputs["pixel_values"])
        given = encoder.get_language_hidden_states(inputs["input_ids"], embeds, slots)
    assert (given - expected).abs().max() < 2e-5


def test_vocabulary_is_kosmos_2_s_without_the_grounding_tokens(kosmos, folder):
    pipe = KosmosGPipeline.from_pretrained(folder)
    theirs = Kosmos2Processor.from_pretrained(kosmos).tokenizer
    count = 4 + len(PIECES) + 6
    assert len(pipe.tokenizer) == pipe.text_encoder.config.text_config.vocab_size == count
    assert len(theirs) == count + 6 + 16  # grounding marks and locations
    names = (
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        "</doc>",
        "<image>",
        "</image>",
        "</chunk>",
        "</line>",
    )
    for name in (*names, "▁dog", "q"):
        assert pipe.tokenizer.convert_tokens_to_ids(name) == theirs.convert_tokens_to_ids(name), name
    weights = load_file(kosmos / "model.safetensors")["text_model.model.embed_tokens.weight"]
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, weights[:count])


def test_official_pieces_in_a_tokenizer_json_give_the_official_ids(
    sentencepiece_file, real_tokenizer, tmp_path
):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_file.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces[3:]]
    XLMRobertaTokenizer(
        vocab=[*SPECIAL, *pieces, ("<mask>", 0.0)],
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap,
    ).save_pretrained(tmp_path)
    tokenizer = _tokenizer(tmp_path, Kosmos2Config(), "kosmos-2")
    assert len(tokenizer) == 64007
    assert (tokenizer.image_token_id, tokenizer.end_of_image_token_id) == (64003, 64004)
    texts = ["a photo of a corgi", "Ｆｕｌｌ ｗｉｄｔｈ ﬁ ½", "<s> <image> naïve  café", "北京 𓀀𓀁 x", ""]
    assert tokenizer(texts)["input_ids"] == real_tokenizer(texts)["input_ids"]


def test_sizes_come_from_the_target_and_parts_from_the_base(folder, base):
    pipe = KosmosGPipeline.from_pretrained(folder)
    config = pipe.text_encoder.config
    assert (config.num_queries, config.aligner_hidden_size, config.aligner_layers) == (20, 32, 2)
    assert (config.aligner_attention_heads, config.aligner_ffn_dim) == (8, 96)
    for name in ("unet", "vae"):
        written = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        expected = load_file(base / name / "diffusion_pytorch_model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], expected[key]) for key in expected)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    target, tokenizer = load_target(folder)
    expected, expected_tokenizer = load_target(base)
    assert all(torch.equal(target.state_dict()[key], weight) for key, weight in expected.state_dict().items())
    assert tokenizer("a b")["input_ids"] == expected_tokenizer("a b")["input_ids"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "new AlignerNet, which has not been trained" in card


def test_folder_names_no_path_of_this_machine(folder, base):
    for path in (*folder.rglob("*.json"), *folder.rglob("*.md")):
        assert str(base.parent.parent) not in path.read_text(encoding="utf-8"), path


def test_same_seed_gives_the_same_weights(call, tmp_path):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    folders = [call(output=tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    assert torch.equal(torch.random.get_rng_state(), before)
    for path in ("text_encoder/model.safetensors", "aligner_n/aligner_n.safetensors"):
        first, same, other = ((folder / path).read_bytes() for folder in folders)
        assert first == same != other


def test_hub_download_leaves_out_what_training_alone_reads(folder, tmp_path):
    cache = tmp_path / "cache"
    with fake_hub(folder, cache):
        KosmosGPipeline.from_pretrained("someone/kosmos-g")
    weights = {path.parent.name for path in cache.rglob("*.safetensors")}
    assert weights == {"text_encoder", "unet", "vae", *weights & {"safety_checker"}}
    assert {"aligner_n", "clip_text_encoder"} <= {path.parent.name for path in folder.rglob("*.safetensors")}


def test_weights_are_written_in_the_dtype_asked_for(call):
    folder = call(dtype="bfloat16")
    for path in folder.glob("*/*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}, path


def test_folder_trains_a_step_of_each_stage_and_draws(folder, photos):
    pipe = KosmosGPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    encoder, generator = pipe.text_encoder, torch.Generator().manual_seed(0)
    batch = dict(KosmosGProcessor(pipe.tokenizer)([["a dog", photos[0]], ["the red cat"]]))
    batch["labels"] = batch["input_ids"].roll(-1, 1).where(~batch["image_token_mask"], -100)
    target, clip_tokenizer = load_target(folder)
    batch["clip_input_ids"] = clip_tokenizer(
        ["a b", "b"], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    batch["target_pixel_values"] = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    batch["latent_noise"], batch["noise"] = torch.randn(2, 2, 4, 8, 8, generator=generator)
    batch["timesteps"], batch["drop_condition"] = torch.tensor([10, 800]), torch.tensor([False, True])
    stages = {
        "pretrain": lambda: PretrainStage(encoder),
        "align": lambda: AlignStage(
            encoder, AlignerNetN.from_pretrained(folder / "aligner_n", encoder.config), target
        ),
        "instruct": lambda: InstructStage(encoder, pipe.unet, pipe.vae, pipe.scheduler),
    }
    for name, build in stages.items():
        stage = build().eval()  # no dropout: the losses before and after are to be compared
        trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        stage.zero_grad()  # of the stage before
        before = sum(stage(batch).values())
        before.backward()
        length = nn.utils.get_total_norm([parameter.grad for parameter in trained])
        torch.optim.SGD(trained, lr=0.01 / length.item()).step()
        assert sum(stage(batch).values()) < before, name
    image = pipe(
        "a <i>", images=[photos[0]], num_inference_steps=1, height=16, width=16, output_type="np"
    ).images
    assert image.shape == (1, 16, 16, 3)


# Fresh weights -----------------------------------------------------------------------------------------------------


def test_fresh_weights_are_torchscale_s(pipe):
    def largest(weight):
        return weight.abs().max().item()

    config = pipe.text_encoder.config
    aligner, width, depth = build_fresh(AlignerNet, config), config.aligner_hidden_size, 2
    # Xavier-uniform: the largest of many is near the bound
    aligner.requires_grad_(False)
    bound = (6 / (2 * width)) ** 0.5
    queries = math.log(3 * depth) ** 0.5
    encoder = (math.log(3 * depth) * math.log(2 * depth) / 3) ** 0.5
    for layers, scale in ((aligner.query_layers, queries), (aligner.encoder_layers, encoder)):
        attention, ffn = layers[1].self_attn, layers[1].ffn
        assert largest(attention.k_proj.weight) == pytest.approx(bound * 0.5**0.5, rel=0.02)
        assert largest(attention.v_proj.weight) == pytest.approx(bound * 0.5**0.5 * scale, rel=0.02)
        assert largest(attention.out_proj.weight) == pytest.approx(bound * scale, rel=0.02)
        assert largest(ffn.fc1.weight) == pytest.approx(width**-0.5 * scale, rel=0.02)
        assert not attention.out_proj.bias.any()
    for table in (aligner.query_embeds, aligner.position_embedding.weight):
        assert table.std().item() == pytest.approx(1, rel=0.05)


def test_fresh_model_tells_prompts_and_images_apart(pipe, photos):
    encoder = reset_weights(pipe.text_encoder, seed=3)
    inputs = KosmosGProcessor(pipe.tokenizer)([[photos[0]], [photos[1]], ["a hat"], ["a suit"]])
    with torch.no_grad():
        first, second, hat, suit = encoder(**inputs)[0]
    assert (hat - suit).std() > 0.1 and (first - second).std() > 0.001


# Mistakes ----------------------------------------------------------------------------------------------------------


def test_mllm_of_another_kind_is_refused(call, tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="'bert', expected 'kosmos-2'"):
        call(mllm=tmp_path / "bert")
    with pytest.raises(ValueError, match="no config.json"):
        call(mllm=tmp_path)
    with pytest.raises(ValueError, match="not a folder, and not on the Hub"):
        call(mllm="nobody/no-such-kosmos")
    assert not (tmp_path / "out").exists()


def _edit_json(path, change):
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def test_mllm_with_another_vocabulary_is_refused(call, kosmos, tmp_path):
    copy = shutil.copytree(kosmos, tmp_path / "copy")

    def move_image(values):
        for token in values["added_tokens"]:
            token["id"] += token["content"] in ("<image>", "</image>")

    _edit_json(copy / "tokenizer.json", move_image)
    with pytest.raises(ValueError, match="not laid out as Kosmos-2's.*<image> at"):
        call(mllm=copy)
    _edit_json(copy / "tokenizer.json", lambda values: values["model"].update(type="BPE"))
    with pytest.raises(ValueError, match="a BPE model"):
        call(mllm=copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="neither tokenizer.json nor sentencepiece"):
        call(mllm=copy)


def test_mllm_with_weights_missing_is_refused_and_leaves_nothing(call, kosmos, tmp_path):
    copy = shutil.copytree(kosmos, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["image_to_text_projection.dense.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights: image_to_text_projection.dense.weight"):
        call(mllm=copy)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_base_without_a_part_is_refused(call, base, tmp_path, part):
    copy = shutil.copytree(base, tmp_path / "copy")
    shutil.rmtree(copy / part)
    with pytest.raises(ValueError, match=f"(has no {part}/config.json|no text_encoder in)"):
        call(base=copy)


def test_base_whose_parts_do_not_fit_is_refused_with_both_figures(call, tmp_path):
    base = save_stable_diffusion(tmp_path / "base", width=32, clip_width=48)
    with pytest.raises(ValueError, match="width 32, its text encoder gives 48"):
        call(base=base)


def test_base_with_another_kind_of_text_encoder_is_refused(call, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    _edit_json(copy / "text_encoder" / "config.json", lambda values: values.update(model_type="t5"))
    with pytest.raises(ValueError, match="'t5'.*'clip_text_model'"):
        call(base=copy)


def test_target_with_weights_missing_is_refused(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if "fc1.weight" in name)]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights.*fc1.weight"):
        load_target(copy)


def test_output_that_exists_is_refused(call, tmp_path):
    (tmp_path / "out").mkdir()
    Path(tmp_path / "out" / "mine").write_text("text")
    with pytest.raises(ValueError, match="not empty"):
        call()


def test_number_of_layers_is_checked(call):
    with pytest.raises(ValueError, match="aligner_layers is 0"):
        call(aligner_layers=0)
