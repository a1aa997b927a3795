import copy
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, Kosmos2Config, Kosmos2ForConditionalGeneration

from kosmos_g_diffusers import KosmosGProcessor, KosmosGTextEncoder
from kosmos_g_diffusers.conversion.checkpoint import read_checkpoint
from kosmos_g_diffusers.conversion.keys import match_keys
from kosmos_g_diffusers.modeling_aligner_n import FILE, AlignerNetN
from kosmos_g_diffusers.training.stages import AlignStage, InstructStage, PretrainStage


def _clip(width=32, positions=77, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=50,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=positions,
                eos_token_id=49,
                **kwargs,
            )
        )


def _aligner_n(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return AlignerNetN(config)


@pytest.fixture
def build_stage(build_pipe):
    """Function that builds a small stage by its name, always with the same weights."""

    def build(name, pipe=None, **kwargs):
        pipe = pipe or build_pipe()
        if name == "pretrain":
            return PretrainStage(pipe.text_encoder, **kwargs).train()
        if name == "align":
            stage = AlignStage(pipe.text_encoder, _aligner_n(pipe.text_encoder.config), _clip())
        else:
            stage = InstructStage(pipe.text_encoder, pipe.unet, pipe.vae, pipe.scheduler, **kwargs)
        return stage.train()

    return build


@pytest.fixture
def batch(pipe, photos):
    """A batch that every stage reads: three prompts of different lengths, two of them with images."""
    prompts = [[photos[0], "in the suit of", photos[1]], "a furniture", ["painting of", photos[2]]]
    batch = dict(KosmosGProcessor(pipe.tokenizer)(prompts))
    generator = torch.Generator().manual_seed(0)
    is_text = batch["attention_mask"].bool() & ~batch["image_token_mask"]
    labels = batch["input_ids"].roll(-1, 1)
    batch["labels"] = labels.where(is_text & is_text.roll(-1, 1), -100)
    batch["labels"][:, -1] = -100
    batch["clip_input_ids"] = torch.randint(1, 50, (3, 77), generator=generator)
    batch["target_pixel_values"] = torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1
    batch["latent_noise"], batch["noise"] = torch.randn(2, 3, 4, 4, 4, generator=generator)
    batch["timesteps"] = torch.tensor([3, 500, 900])
    batch["drop_condition"] = torch.zeros(3, dtype=torch.bool)
    return batch


def _without_images(batch):
    rows = {name: value[1:2] for name, value in batch.items() if name != "pixel_values"}
    rows["input_ids"] = torch.where(rows["image_token_mask"], 1, rows["input_ids"])
    return rows


def _gradients(stage, batch):
    stage.zero_grad()
    torch.manual_seed(5)
    losses = stage(batch)
    sum(losses.values()).backward()
    return losses, {name: parameter.grad for name, parameter in stage.named_parameters()}


# Golden data -----------------------------------------------------------------------------------------------------


def _golden_target(folder):
    target = CLIPTextModel(CLIPTextConfig.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    if not any(name in target.state_dict() for name in weights):  # transformers 5.4 still names them so
        weights = {f"text_model.{name}": weight for name, weight in weights.items()}
    target.load_state_dict(weights)
    return target


@pytest.fixture(scope="module")
def official(golden_encoder, reference):
    """The encoder (a copy) and AlignerNet N with the golden weights; `names`: a stage's name -> official name."""
    encoder = copy.deepcopy(golden_encoder)
    aligner_n = AlignerNetN(encoder.config)
    weights = read_checkpoint(reference / "tiny_reference_checkpoint.pt")
    parts = {"text_encoder": encoder.state_dict(), "aligner_n": aligner_n.state_dict(), "unet": {}, "vae": {}}
    plan = match_keys(weights, parts)
    aligner_n.load_state_dict({ours: weights[key] for ours, key in plan["aligner_n"].items()}, strict=True)
    names = {f"{part}.{ours}": key for part, keys in plan.items() for ours, key in keys.items()}
    folder = reference / "tiny_stable_diffusion"
    return SimpleNamespace(
        encoder=encoder,
        aligner_n=aligner_n,
        names=names,
        target=_golden_target(folder / "text_encoder"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        scheduler=PNDMScheduler.from_pretrained(folder / "scheduler"),
        trained=json.loads((reference / "trainable_parameters.json").read_text(encoding="utf-8")),
    )


@pytest.fixture(scope="module")
def golden_align(reference):
    figures = json.loads((reference / "align_loss.json").read_text(encoding="utf-8"))
    tensors = load_file(reference / "align_loss.safetensors")
    batch = {"input_ids": tensors["input_ids"], "attention_mask": ~tensors["padding_mask"]}
    return SimpleNamespace(figures=figures, tensors=tensors, batch=batch)


def _official_trained(stage, names):
    return {names[name] for name, parameter in stage.named_parameters() if parameter.requires_grad}


def test_align_stage_gives_the_official_losses_and_gradients(official, golden_align):
    stage = AlignStage(official.encoder, official.aligner_n, official.target).eval()
    losses, gradients = _gradients(
        stage, {**golden_align.batch, "clip_input_ids": golden_align.tensors["clip_input_ids"]}
    )
    expected = golden_align.figures["with_clip_text_model_output_as_target"]
    assert abs(losses["mse"] - expected["mse_loss"]) < 1e-5
    assert abs(losses["rec"] - expected["rec_loss"]) < 1e-5
    norms = golden_align.figures["gradient_norms_of_mse_plus_rec"]
    given = {official.names[name]: grad.norm() for name, grad in gradients.items() if grad is not None}
    assert set(given) == set(norms)
    for name, norm in given.items():
        if not name.endswith("k_proj.bias"):  # zero, but for rounding: it shifts all scores of a query alike
            assert norm == pytest.approx(norms[name], rel=1e-4), name


def test_align_stage_gives_the_official_losses_for_given_clip_embeds(official, golden_align):
    stage = AlignStage(official.encoder, official.aligner_n, official.target).eval()
    losses = stage({**golden_align.batch, "clip_embeds": golden_align.tensors["random_target"]})
    expected = golden_align.figures["with_random_target"]
    assert abs(losses["mse"] - expected["mse_loss"]) < 1e-5
    assert abs(losses["rec"] - expected["rec_loss"]) < 1e-5


def test_aligner_n_gives_the_official_reconstruction(official, golden_align):
    with torch.no_grad():
        given = official.aligner_n(golden_align.tensors["aligner_encoder_output"], 14)
    assert (given - golden_align.tensors["reconstruction"]).abs().max() < 2e-5


def test_stages_train_what_the_official_stages_train(official):
    align = AlignStage(official.encoder, official.aligner_n, official.target)
    assert _official_trained(align, official.names) == set(official.trained["align_stage"])
    instruct = InstructStage(official.encoder, official.unet, official.vae, official.scheduler)
    assert _official_trained(instruct, official.names) == set(official.trained["final_stage"])


def test_instruct_stage_gives_the_official_loss(official, reference):
    stage = InstructStage(official.encoder, official.unet, official.vae, official.scheduler).eval()
    tensors = load_file(reference / "diffusion.safetensors")
    expected = json.loads((reference / "diffusion.json").read_text(encoding="utf-8"))["train"]
    mean = tensors["train_latents"] / official.vae.config.scaling_factor
    drop = torch.tensor(expected["dropped"])
    batch = {
        "input_ids": torch.zeros(4, 1, dtype=torch.int64),
        "attention_mask": torch.ones(4, 1, dtype=torch.bool),
        "latent_parameters": torch.cat([mean, torch.zeros_like(mean)], 1),
        "latent_noise": torch.zeros_like(mean),
        "noise": tensors["train_noise"],
        "timesteps": tensors["train_timesteps"],
        "drop_condition": drop,
    }
    # the golden conditions are random numbers, not those of a prompt
    conditions = torch.cat([tensors["train_condition"][~drop], tensors["train_null_condition"]])
    with mock.patch.object(stage, "_condition", return_value=conditions):
        loss = stage(batch)["denoising"]
    # the official code adds the samples' losses and divides by their number later
    assert abs(loss - expected["diff_loss"] / 4) < 1e-5


# What trains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrain", "align", "instruct"])
@pytest.mark.parametrize("images", [True, False])
def test_every_trained_weight_gets_a_gradient_and_no_other(build_stage, batch, name, images):
    stage = build_stage(name)
    _, gradients = _gradients(stage, batch if images else _without_images(batch))
    trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    assert {name for name, grad in gradients.items() if grad is not None} == trained
    parts = {".".join(name.split(".")[:2]) for name in trained}
    vision = {"text_encoder.vision_model", "text_encoder.image_to_text_projection"}
    assert {part for part in parts if not part.startswith("aligner_n")} == {
        "pretrain": {"text_encoder.language_model", *vision},
        "align": {"text_encoder.aligner"},
        "instruct": {"text_encoder.language_model", "text_encoder.aligner", *vision},
    }[name]


@pytest.mark.parametrize("name", ["pretrain", "instruct"])
def test_train_vision_chooses_what_of_the_tower_trains(build_stage, batch, name):
    def trained(choice):
        _, gradients = _gradients(build_stage(name, train_vision=choice), batch)
        prefix = "text_encoder.vision_model.model."
        return {
            name.removeprefix(prefix)
            for name, grad in gradients.items()
            if prefix in name and grad is not None
        }

    assert trained("none") == set()
    last = trained("last")
    assert last and all(name.startswith(("encoder.layers.1.", "post_layernorm.")) for name in last)
    assert {"embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.weight"} | last < trained("all")


def test_unknown_choice_of_vision_training_is_refused(pipe):
    with pytest.raises(ValueError, match="'some'.*'none', 'last', 'all'"):
        PretrainStage(pipe.text_encoder, train_vision="some")


def test_text_leaves_the_image_weights_gradients_zero(build_stage, batch):
    _, gradients = _gradients(build_stage("instruct"), _without_images(batch))
    assert not gradients["text_encoder.image_to_text_projection.dense.weight"].any()
    assert gradients["text_encoder.aligner.query_embeds"].any()


@pytest.mark.parametrize("name", ["align", "instruct"])
def test_frozen_models_are_no_part_of_the_stage(build_stage, pipe, batch, name):
    stage = build_stage(name, pipe)
    names = {name.split(".")[0] for name in stage.state_dict()}
    assert names == ({"text_encoder", "aligner_n"} if name == "align" else {"text_encoder"})
    _gradients(stage, batch)
    for model in stage.frozen_models:
        assert not model.training
        assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    stage.move_frozen(dtype=torch.bfloat16)
    assert all(model.dtype == torch.bfloat16 for model in stage.frozen_models)
    losses = stage(batch)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert stage.text_encoder.dtype == torch.float32


# Losses ------------------------------------------------------------------------------------------------------------


def test_pretraining_loss_is_that_of_transformers_kosmos_2(build_stage, pipe, batch):
    stage = build_stage("pretrain", pipe).eval()
    encoder = pipe.text_encoder
    kosmos = Kosmos2ForConditionalGeneration(
        Kosmos2Config(
            text_config=encoder.config.text_config.to_dict(),
            vision_config=encoder.config.vision_config.to_dict(),
            latent_query_num=encoder.config.latent_query_num,
        )
    ).eval()
    weights = {name.replace("language_model.", "text_model."): w for name, w in encoder.state_dict().items()}
    missing, _ = kosmos.load_state_dict(weights, strict=False)
    assert missing == ["text_model.lm_head.weight"]
    kosmos.tie_weights()
    # some releases of transformers let SDPA take this cross-attention for a causal one
    kosmos.image_to_text_projection.x_attn.is_causal = False
    logits = kosmos(
        pixel_values=batch["pixel_values"],
        input_ids=batch["input_ids"],
        image_embeds_position_mask=batch["image_token_mask"],
    ).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    assert torch.allclose(stage(batch)["language"], expected, atol=1e-5)


def test_words_among_the_instructions_are_learned_as_in_stage_1(build_stage, batch):
    names = ("input_ids", "attention_mask", "labels", "image_token_mask", "pixel_values")
    words = {name: batch[name] for name in names}
    alone, expected = _gradients(build_stage("pretrain").eval(), words)
    among, gradients = _gradients(build_stage("instruct", words_weight=0.25).eval(), words)
    assert list(among) == ["language"]
    torch.testing.assert_close(among["language"], 0.25 * alone["language"])
    for name, grad in gradients.items():
        if name.startswith("text_encoder.aligner."):
            assert not grad.any()  # zero, and there: all weights are used
        elif grad is not None:
            torch.testing.assert_close(grad, 0.25 * expected[name])


def test_instruct_loss_is_that_of_a_pipeline_s_parts(build_stage, pipe, batch):
    stage = build_stage("instruct", pipe).eval()
    batch["drop_condition"] = torch.tensor([True, False, False])
    encoder, vae = pipe.text_encoder, pipe.vae
    inputs = {
        name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_token_mask")
    }
    null = encoder(torch.tensor([[0]]))[0]
    condition = torch.where(batch["drop_condition"][:, None, None], null, encoder(**inputs)[0])
    posterior = vae.encode(batch["target_pixel_values"]).latent_dist
    latents = (posterior.mean + posterior.std * batch["latent_noise"]) * vae.config.scaling_factor
    noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(
        latents, batch["noise"], batch["timesteps"]
    )
    prediction = pipe.unet(noisy, batch["timesteps"], condition).sample
    assert torch.allclose(stage(batch)["denoising"], F.mse_loss(prediction, batch["noise"]), atol=1e-5)


@pytest.mark.parametrize("drop", [(1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 0)])
def test_dropped_samples_get_the_null_condition_with_gradient(build_stage, pipe, batch, drop):
    stage = build_stage("instruct", pipe).double()  # rounding is far from any difference that counts
    batch["pixel_values"] = batch["pixel_values"].double()
    batch["drop_condition"] = torch.tensor(drop, dtype=torch.bool)
    given = stage._condition_or_null(batch)
    null = stage._condition(
        stage._language_states({"input_ids": torch.tensor([[0]])}), torch.ones(1, 1, dtype=torch.bool)
    )
    whole = stage._condition(stage._language_states(batch), batch["attention_mask"])
    expected = torch.where(batch["drop_condition"][:, None, None], null, whole)
    assert torch.allclose(given, expected, rtol=0, atol=1e-9)
    weight = pipe.text_encoder.get_input_embeddings().weight
    weights = torch.linspace(-1, 1, given.numel()).view_as(given)
    gradients = [
        torch.autograd.grad((c * weights).sum(), weight, retain_graph=True)[0] for c in (given, expected)
    ]
    assert torch.allclose(*gradients, rtol=0, atol=1e-9)
    assert gradients[0][0].any()  # of <s>


def test_velocity_is_learned_where_the_scheduler_says_so(pipe, batch):
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    stage = InstructStage(pipe.text_encoder, pipe.unet, pipe.vae, scheduler).eval()
    batch["latent_parameters"] = stage.latent_parameters(batch["target_pixel_values"])
    mean, log_variance = batch["latent_parameters"].chunk(2, 1)
    latents = (mean + (log_variance / 2).exp() * batch["latent_noise"]) * pipe.vae.config.scaling_factor
    alpha = scheduler.alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * batch["noise"]
    velocity = alpha.sqrt() * batch["noise"] - (1 - alpha).sqrt() * latents
    condition = stage._condition_or_null(batch)
    expected = F.mse_loss(pipe.unet(noisy, batch["timesteps"], condition).sample, velocity)
    assert torch.allclose(stage(batch)["denoising"], expected, atol=1e-5)


def test_target_may_be_the_text_encoder_of_stable_diffusion_2(pipe, batch):
    config = copy.deepcopy(pipe.text_encoder.config)
    config.aligner_hidden_size, config.num_queries = 48, 20
    target = _clip(48, 20, hidden_act="gelu", projection_dim=16)
    stage = AlignStage(KosmosGTextEncoder(config), AlignerNetN(config), target)
    batch["clip_input_ids"] = batch["clip_input_ids"][:, :20]
    losses, _ = _gradients(stage.eval(), batch)
    clip_embeds = target(batch["clip_input_ids"]).last_hidden_state
    inputs = {
        name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_token_mask")
    }
    assert torch.allclose(losses["mse"], F.mse_loss(stage.text_encoder(**inputs)[0], clip_embeds), atol=1e-5)


def test_learning_reduces_the_losses(build_stage, batch):
    for name in ("pretrain", "align", "instruct"):
        stage = build_stage(name)
        optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(8):
            loss = sum(stage(batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.01, name


# Dropout, memory, caches -------------------------------------------------------------------------------------------


def test_dropout_is_where_the_official_code_has_it(build_pipe, build_stage, batch):
    pipe = build_pipe()
    config = copy.deepcopy(pipe.text_encoder.config)
    config.text_config.dropout = config.text_config.attention_dropout = 0.1
    pipe.text_encoder = KosmosGTextEncoder(config)
    stage = build_stage("instruct", pipe)
    dropout, attention = F.dropout, F.scaled_dot_product_attention
    elements, attentions = [], []

    def count_dropout(states, p=0.5, training=True, inplace=False):
        if training and p:
            elements.append(p)
        return dropout(states, p, training, inplace)

    def count_attention(*args, **kwargs):
        attentions.append(kwargs.get("dropout_p", 0.0))
        return attention(*args, **kwargs)

    with mock.patch.object(F, "dropout", count_dropout):
        with mock.patch.object(F, "scaled_dot_product_attention", count_attention):
            stage._condition_or_null(batch)
            # the embedding once; in each of 2 layers behind the attention and behind the feed-forward network
            assert elements == [0.1] * (1 + 2 * 2)
            # resampler; none in 2 + 2 layers of vision tower and language model, nor in 2 + 2 * 2 of the AlignerNet
            assert sorted(attentions) == [0.0] * 10 + [0.1]
            elements.clear()
            attentions.clear()
            stage.eval()._condition_or_null(batch)
            assert not elements and not any(attentions)


def test_frozen_language_model_drops_out_while_it_is_aligned(build_pipe, build_stage, batch):
    pipe = build_pipe()
    pipe.text_encoder.language_model.model.dropout = 0.1
    stage = build_stage("align", pipe)
    assert stage(batch)["rec"] != stage(batch)["rec"]
    stage.eval()
    assert stage(batch)["rec"] == stage(batch)["rec"]


@pytest.mark.parametrize("name", ["pretrain", "align", "instruct"])
def test_gradient_checkpointing_changes_neither_losses_nor_gradients(build_pipe, build_stage, batch, name):
    pipe = build_pipe()
    config = copy.deepcopy(pipe.text_encoder.config)
    config.text_config.dropout = config.text_config.attention_dropout = 0.1
    encoder = KosmosGTextEncoder(config)
    encoder.load_state_dict(pipe.text_encoder.state_dict())
    pipe.text_encoder = encoder
    batch["drop_condition"][0] = True
    stage = build_stage(name, pipe)
    kept, saved = [], {}
    for enable in (False, True):
        if enable:
            stage.gradient_checkpointing_enable()
        bytes_kept = 0

        def pack(tensor):
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            saved[enable] = _gradients(stage, batch)
        kept.append(bytes_kept)
    assert kept[1] < 0.8 * kept[0]
    assert pipe.unet.is_gradient_checkpointing == (name == "instruct")
    for loss in saved[False][0]:
        assert torch.equal(saved[True][0][loss], saved[False][0][loss])
    for parameter, gradient in saved[False][1].items():
        if gradient is not None:
            assert torch.allclose(saved[True][1][parameter], gradient, atol=1e-7), parameter


def test_caches_do_not_change_the_loss(build_stage, batch):
    stage = build_stage("instruct")
    batch["drop_condition"][1] = True
    expected = _gradients(stage, batch)
    cached = {
        name: value for name, value in batch.items() if name not in ("pixel_values", "target_pixel_values")
    }
    with torch.no_grad():
        cached["vision_states"] = stage.vision_states(batch["pixel_values"])
    cached["latent_parameters"] = stage.latent_parameters(batch["target_pixel_values"])
    given = _gradients(stage, cached)
    assert torch.equal(given[0]["denoising"], expected[0]["denoising"])
    for name, gradient in expected[1].items():
        assert gradient is None or torch.equal(given[1][name], gradient), name
    align = build_stage("align").eval()
    embeds = {**batch, "clip_embeds": align.clip_embeds(batch["clip_input_ids"])}
    del embeds["clip_input_ids"]
    assert torch.equal(align(embeds)["mse"], align(batch)["mse"])


def test_images_of_a_stage_are_those_of_the_encoder(build_stage, batch):
    stage = build_stage("pretrain").eval()
    expected = stage.text_encoder.get_image_features(batch["pixel_values"])
    assert torch.equal(stage.image_embeds(batch), expected)


def test_cached_vision_states_are_refused_when_the_tower_trains(build_stage, batch):
    stage = build_stage("instruct", train_vision="all")
    batch["vision_states"] = stage.vision_states(batch.pop("pixel_values")).detach()
    with pytest.raises(ValueError, match="train_vision='last'"):
        stage(batch)


@pytest.mark.parametrize("name", ["pretrain", "align", "instruct"])
def test_mixed_precision_gives_losses_in_float32_near_those_of_float32(build_stage, batch, name):
    stage = build_stage(name)
    expected = stage(batch)
    with torch.autocast("cpu", torch.bfloat16):
        given = stage(batch)
    for loss, value in given.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, expected[loss], rtol=0.05), loss


# Saving and errors -------------------------------------------------------------------------------------------------


def test_saved_stage_is_what_from_pretrained_reads(build_stage, tmp_path):
    stage = build_stage("align")
    stage.save_pretrained(tmp_path / "own")
    averaged = {name: weight * 0.5 for name, weight in stage.state_dict().items()}
    stage.save_pretrained(tmp_path / "averaged", averaged)
    for folder, factor in (("own", 1.0), ("averaged", 0.5)):
        encoder = KosmosGTextEncoder.from_pretrained(tmp_path / folder / "text_encoder")
        for name, weight in stage.text_encoder.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], weight * factor), name
        aligner_n = AlignerNetN.from_pretrained(tmp_path / folder / "aligner_n", encoder.config)
        for name, weight in stage.aligner_n.state_dict().items():
            assert torch.equal(aligner_n.state_dict()[name], weight * factor), name


def test_aligner_n_of_a_converted_checkpoint_loads(official, tmp_path):
    weights = official.aligner_n.state_dict()
    official.aligner_n.save_pretrained(
        tmp_path / "aligner_n", {name: tensor.half() for name, tensor in weights.items()}
    )
    aligner_n = AlignerNetN.from_pretrained(tmp_path / "aligner_n", official.encoder.config)
    for name, tensor in aligner_n.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, weights[name].half().float()), name


def test_aligner_n_of_version_0_1_0_loads(pipe, tmp_path):
    model = AlignerNetN(pipe.text_encoder.config)
    model.save_pretrained(tmp_path)
    (tmp_path / FILE).rename(tmp_path / "model.safetensors")
    loaded = AlignerNetN.from_pretrained(tmp_path, pipe.text_encoder.config)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_aligner_n_of_other_sizes_or_none_is_named(pipe, golden_encoder, tmp_path):
    with pytest.raises(ValueError, match="no AlignerNet N at .*aligner_n.safetensors"):
        AlignerNetN.from_pretrained(tmp_path, pipe.text_encoder.config)
    AlignerNetN(pipe.text_encoder.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="query_embeds"):
        AlignerNetN.from_pretrained(tmp_path, golden_encoder.config)


@pytest.mark.parametrize(("width", "positions"), [(48, 77), (32, 20)])
def test_target_of_another_size_is_refused_with_both_figures(pipe, width, positions):
    encoder = pipe.text_encoder
    with pytest.raises(ValueError, match=f"77 states of width 32.*{positions} of width {width}"):
        AlignStage(encoder, AlignerNetN(encoder.config), _clip(width, positions))


def test_diffusion_models_that_do_not_fit_are_refused(pipe, golden_components):
    parts = {
        "text_encoder": pipe.text_encoder,
        "unet": pipe.unet,
        "vae": pipe.vae,
        "scheduler": pipe.scheduler,
    }
    with pytest.raises(ValueError, match=r"width 32.*width 24"):
        InstructStage(**{**parts, "unet": golden_components["unet"]})
    unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    with pytest.raises(ValueError, match="9 channels.*have 4"):
        InstructStage(**{**parts, "unet": unet})
    scheduler = DDPMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="'sample'"):
        InstructStage(**{**parts, "scheduler": scheduler})


def test_batches_that_do_not_fit_are_refused(build_stage, batch):
    stage = build_stage("pretrain")
    with pytest.raises(ValueError, match="12 slots, but the batch holds 2 images"):
        stage({**batch, "pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(ValueError, match="300 tokens.*at most 256"):
        stage({"input_ids": torch.zeros(1, 300, dtype=torch.int64), "labels": torch.zeros(1, 300)})
