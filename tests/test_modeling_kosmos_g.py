"""The text encoder against the official outputs, against transformers' own Kosmos-2, and its promises to stock pipelines."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Kosmos2Config, Kosmos2Model

from kosmos_g_diffusers import KosmosGTextEncoder, KosmosGTextEncoderConfig
from kosmos_g_diffusers.conversion.checkpoint import read_checkpoint

TOLERANCE = 5e-5  # the official code's own rounding in float32 is up to 1e-5 (fixtures/reference/README.md)


def close(given, expected, tolerance=TOLERANCE):
    assert given.shape == expected.shape
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def build_encoder(dropout=0.0, **changes):
    """A small encoder with weights under which every input counts: 60 ids, images of 28 px, 3 states an image."""
    config = {
        "text_config": {
            "vocab_size": 60,
            "embed_dim": 16,
            "layers": 2,
            "ffn_dim": 32,
            "attention_heads": 4,
            "max_position_embeddings": 64,
            "dropout": dropout,
            "attention_dropout": dropout,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        "latent_query_num": 3,
        "aligner_hidden_size": 8,
        "aligner_layers": 2,
        "aligner_attention_heads": 2,
        "aligner_ffn_dim": 16,
        "aligner_max_positions": 80,
        "num_queries": 5,
        "image_token_id": 57,
        "end_of_image_token_id": 58,
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        encoder = KosmosGTextEncoder(KosmosGTextEncoderConfig(**(config | changes)))
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder():
    """Shared: tests that change it build their own."""
    return build_encoder()


PAD = 1


def prompt_with_images(n_images=1, text=(0, 5, 6), behind=(7,)):
    """Ids and slot mask of text, then `n_images` pictures, then text, as `forward` takes them."""
    ids, mask = list(text), [False] * len(text)
    for _ in range(n_images):
        ids += [57] * 4 + [58]
        mask += [False, True, True, True, False]
    return torch.tensor([ids + list(behind)]), torch.tensor([mask + [False] * len(behind)])


def pictures(number, seed=0):
    return torch.randn(number, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


# Golden data -----------------------------------------------------------------------------------------------------


def test_condition_is_the_official_one(golden_encoder, golden_case):
    output = golden_encoder(**golden_case.inputs)
    close(output.last_hidden_state, golden_case.tensors["condition"])
    assert torch.equal(output[0], output.last_hidden_state)


def test_null_and_negative_conditions_are_the_official_ones(golden_encoder, golden_case):
    close(golden_encoder(golden_case.tensors["negative_ids"])[0], golden_case.tensors["null_condition"])


def test_every_part_agrees_with_the_official_one(golden_encoder, golden_case):
    tensors, image_embeds = golden_case.tensors, None
    if golden_case.image_order:
        seen = {}
        vision = golden_encoder.vision_model.model
        hooks = [
            vision.post_layernorm.register_forward_hook(lambda _, args, out: seen.update(normed=out)),
            golden_encoder.image_to_text_projection.register_forward_hook(
                lambda _, args, out: seen.update(vision=args[0])
            ),
        ]
        image_embeds = golden_encoder.get_image_features(golden_case.pixel_values)
        for hook in hooks:
            hook.remove()
        close(seen["normed"], tensors["vision_last_hidden_post_ln"])
        close(seen["vision"], tensors["vision_output"])
        close(image_embeds, tensors["connector_output"])
        close(golden_encoder(pixel_values=golden_case.pixel_values).image_embeds, tensors["connector_output"])
    states = golden_encoder.get_language_hidden_states(
        tensors["input_ids"], image_embeds, tensors["image_mask"]
    )
    close(states, tensors["decoder_hidden"])  # padded rows too: the loss of the alignment stage reads them
    close(golden_encoder.get_language_hidden_states(tensors["negative_ids"]), tensors["decoder_hidden_null"])
    mask = tensors["input_ids"].ne(PAD)
    encoded = {}
    hook = golden_encoder.aligner.encoder_layer_norm.register_forward_hook(
        lambda _, args, out: encoded.update(states=out)
    )
    queries = golden_encoder.aligner(states, mask)
    hook.remove()
    close(encoded["states"][mask], tensors["aligner_encoder_proj"][mask])
    close(golden_encoder.aligner.final_layer_norm(queries[-1]), tensors["condition"])


def test_language_layers_agree_with_the_official_ones(golden_encoder, load_case):
    case, layers, seen = load_case("two_images_suit"), golden_encoder.language_model.model.layers, []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for layer in layers
    ]
    golden_encoder(**case.inputs)
    for hook in hooks:
        hook.remove()
    close(seen[0][0], case.tensors["decoder_embed"])
    for index, (_, out) in enumerate(seen):
        close(out, case.tensors[f"decoder_layer{index}"])


@pytest.mark.parametrize(
    "name", ["single_image", "two_images_suit", "non_ascii", "negative_prompt", "padded_batch_of_3"]
)
def test_half_precision_pixels_give_the_official_condition(golden_encoder, load_case, name):
    case = load_case(name)
    inputs = case.inputs | {"pixel_values": case.pixel_values.half()}
    close(golden_encoder(**inputs)[0], case.tensors["condition_from_fp16_rounded_pixels"])


def test_final_stage_checkpoint_gives_the_official_condition(golden_encoder, load_case, reference):
    from kosmos_g_diffusers.conversion.keys import match_keys

    case = load_case("two_images_suit")
    expected = load_file(reference / "final_stage_fp16_checkpoint_case.safetensors")
    weights = read_checkpoint(reference / "tiny_final_stage_checkpoint_fp16.pt")
    weights = {
        key: value for key, value in weights.items() if not key.startswith(("diffusion_unet.", "vae."))
    }
    encoder = copy.deepcopy(golden_encoder)
    parts = {"text_encoder": encoder.state_dict(), "aligner_n": {}, "unet": {}, "vae": {}}
    names = match_keys(weights, parts)["text_encoder"]
    encoder.load_state_dict({ours: weights[official] for ours, official in names.items()}, strict=True)
    close(encoder(**case.inputs)[0], expected["condition"])
    close(encoder(case.tensors["negative_ids"])[0], expected["null_condition"])


def test_language_states_of_the_alignment_batch_are_the_official_ones(golden_encoder, reference):
    batch = load_file(reference / "align_loss.safetensors")
    assert batch["padding_mask"].any()
    close(golden_encoder.get_language_hidden_states(batch["input_ids"]), batch["decoder_hidden"])
    close(golden_encoder(batch["input_ids"])[0], batch["aligner_encoder_output"])


# The same function as transformers' ------------------------------------------------------------------------------


def kosmos2(encoder, attention="sdpa"):
    """transformers' Kosmos2Model with the weights of the encoder's language model, vision tower and connector."""
    config = Kosmos2Config(
        text_config=encoder.config.text_config.to_dict(),
        vision_config=encoder.config.vision_config.to_dict(),
        latent_query_num=encoder.config.latent_query_num,
    )
    config._attn_implementation = attention
    model = Kosmos2Model(config).eval()
    model.text_model.load_state_dict(encoder.language_model.state_dict())
    model.vision_model.load_state_dict(encoder.vision_model.state_dict())
    model.image_to_text_projection.load_state_dict(encoder.image_to_text_projection.state_dict())
    model.image_to_text_projection.x_attn.is_causal = (
        False  # early releases of transformers 5 have it True under SDPA
    )
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_are_those_of_kosmos2model(golden_encoder, golden_case, attention):
    model = kosmos2(golden_encoder, attention)
    ids, mask = golden_case.tensors["input_ids"], golden_case.tensors["image_mask"]
    if golden_case.image_order:
        theirs = model(
            pixel_values=golden_case.pixel_values,
            input_ids=ids,
            image_embeds_position_mask=mask,
            use_cache=False,
        )
        image_embeds = golden_encoder.get_image_features(golden_case.pixel_values)
        close(image_embeds, theirs.image_embeds, 1e-5)
        theirs = theirs.last_hidden_state
    else:  # Kosmos2Model itself refuses a prompt without pictures
        image_embeds, theirs = None, model.text_model(ids, use_cache=False).last_hidden_state
    close(golden_encoder.get_language_hidden_states(ids, image_embeds, mask), theirs, 2e-5)


def test_eager_attention_gives_the_same_condition(golden_encoder, load_case):
    case = load_case("padded_batch_of_3")
    eager = copy.deepcopy(golden_encoder)
    eager.set_attn_implementation("eager")
    assert eager.config.text_config._attn_implementation == "eager"
    close(eager(**case.inputs)[0], case.tensors["condition"])


# Half precision ----------------------------------------------------------------------------------------------------


def plain_condition(encoder, inputs, dtype):
    """The condition of one prompt, straightforwardly, in `dtype`: transformers' modules with eager attention."""
    model = kosmos2(encoder, "eager").to(dtype)
    aligner = copy.deepcopy(encoder.aligner).to(dtype)
    for layer in [*aligner.encoder_layers, *aligner.query_layers]:
        layer.self_attn.config._attn_implementation = "eager"
    ids, pixel_values = inputs["input_ids"], inputs["pixel_values"]
    if pixel_values is None:
        states = model.text_model(ids, use_cache=False).last_hidden_state
    else:
        states = model(
            pixel_values=pixel_values.to(dtype),
            input_ids=ids,
            image_embeds_position_mask=inputs["image_token_mask"],
            use_cache=False,
        ).last_hidden_state
    states = aligner.input_projection(states) + aligner.position_embedding(torch.arange(2, 2 + ids.shape[1]))
    for layer in aligner.encoder_layers:
        states = layer(states)
    states = aligner.encoder_layer_norm(states)
    queries = aligner.query_embeds[None]
    for layer in aligner.query_layers:
        queries = layer(queries, None, states)
    return aligner.final_layer_norm(queries)


def test_plain_run_is_the_same_function(golden_encoder, load_case):
    case = load_case("two_images_suit")  # or comparing with its rounding would say nothing
    close(plain_condition(golden_encoder, case.inputs, torch.float32), case.tensors["condition"])


def test_float16_condition_is_near_float32(golden_encoder, golden_case):
    half = copy.deepcopy(golden_encoder).half()
    condition = half(**golden_case.inputs)[0]
    assert condition.dtype == torch.float16 and condition.isfinite().all()
    close(condition.float(), golden_case.tensors["condition"], 3e-2)


def test_bfloat16_condition_is_no_worse_than_a_plain_run(golden_encoder, load_case):
    half, ours, plain = copy.deepcopy(golden_encoder).bfloat16(), [], []
    names = ("text_only", "single_image", "two_images_suit", "empty_prompt", "non_ascii", "negative_prompt")
    for case in map(load_case, names):
        expected = golden_encoder(**case.inputs)[0]
        condition = half(**case.inputs)[0]
        assert condition.dtype == torch.bfloat16 and condition.isfinite().all()
        ours.append(condition.float() - expected)
        plain.append(plain_condition(golden_encoder, case.inputs, torch.bfloat16).float() - expected)
    ours, plain = torch.cat(ours), torch.cat(plain)
    assert plain.abs().max() > 0
    assert ours.abs().max() <= 1.5 * plain.abs().max()
    assert ours.square().mean().sqrt() <= 1.5 * plain.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_never_nan(dtype):
    encoder = build_encoder().to(dtype)
    ids, mask = prompt_with_images(2)
    longer = nn.functional.pad(ids, (0, 7), value=PAD)
    slots = nn.functional.pad(mask, (0, 7))
    for scale in (0.0, 1.0, 1e4):
        output = encoder(longer, None, pictures(2) * scale, slots)
        assert output[0].dtype == dtype and output[0].isfinite().all()
    assert encoder(torch.tensor([[0]]))[0].isfinite().all()


# Padding and masks -------------------------------------------------------------------------------------------------


def test_condition_ignores_padding(encoder):
    ids = torch.tensor([[0, 5, 6, 7]])
    expected = encoder(ids)[0]
    padded = nn.functional.pad(ids, (0, 60), value=PAD)
    close(encoder(padded)[0], expected, 0)  # the same computation: columns of padding are cut off
    close(encoder(padded, attention_mask=padded.ne(PAD))[0], expected, 0)
    close(encoder(padded, attention_mask=padded.ne(PAD).long())[0], expected, 0)
    batch = torch.cat([padded, nn.functional.pad(torch.arange(30, 50)[None], (0, 44), value=PAD)])
    close(encoder(batch)[0][:1], expected, 1e-5)
    close(encoder(batch)[0][1:], encoder(torch.arange(30, 50)[None])[0], 1e-5)


def test_embedding_of_the_padding_token_is_never_read(encoder):
    changed = copy.deepcopy(encoder)
    changed.get_input_embeddings().weight[PAD] = 9.0
    ids = torch.tensor([[0, 5, 6, 7], [0, 8, PAD, PAD]])
    close(changed(ids)[0], encoder(ids)[0], 0)


def test_columns_that_are_padding_everywhere_cost_nothing(encoder):
    lengths = []
    hook = encoder.language_model.model.layers[0].register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    encoder(nn.functional.pad(torch.tensor([[0, 5, 6], [0, 5, PAD]]), (0, 50), value=PAD))
    hook.remove()
    assert lengths == [3]


def test_equal_rows_are_computed_once(encoder):
    batches, encoder = [], copy.deepcopy(encoder).double()
    hook = encoder.aligner.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    rows = torch.tensor([[0, 5, 6], [0, PAD, PAD], [0, 5, 6], [0, PAD, PAD], [0, 7, PAD]])
    output = encoder(rows, output_hidden_states=True)
    hook.remove()
    assert batches == [3]
    for index, row in enumerate(rows):
        alone = encoder(row[None], output_hidden_states=True)
        close(output[0][index], alone[0][0], 1e-9)
        for states, expected in zip(output.hidden_states, alone.hidden_states, strict=True):
            close(states[index], expected[0], 1e-9)


def test_language_states_are_the_same_under_any_attention_mask(encoder):
    seen = []
    hook = encoder.language_model.model.layer_norm.register_forward_hook(
        lambda _, args, out: seen.append(out)
    )
    ids = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 10]])
    conditions = [
        encoder(ids, attention_mask=torch.tensor(mask))[0]
        for mask in ([[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 0, 1, 1], [1, 1, 1, 1]])
    ]
    hook.remove()
    kept = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=bool)
    assert torch.equal(seen[0][kept], seen[1][kept]) and torch.equal(seen[0], seen[2])
    assert (conditions[0][1] - conditions[1][1]).abs().max() > 1e-3  # the AlignerNet does see it
    assert (conditions[0][0] - conditions[2][0]).abs().max() > 1e-3


def test_language_model_is_causal_and_the_aligner_is_not(encoder):
    ids, changed = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 5, 6, 9]])
    states = [encoder.get_language_hidden_states(row) for row in (ids, changed)]
    close(states[0][:, :3], states[1][:, :3], 0)
    assert (states[0][:, 3] - states[1][:, 3]).abs().max() > 1e-2
    assert (encoder(ids)[0] - encoder(changed)[0])[0].abs().amax(
        -1
    ).min() > 1e-4  # every query sees the last token


def test_pictures_of_a_batch_go_to_their_prompts_in_reading_order(encoder):
    pixels = pictures(3)
    two, one, none = (
        prompt_with_images(2),
        prompt_with_images(1),
        (torch.tensor([[0, 5, 6]]), torch.zeros(1, 3, dtype=bool)),
    )
    length = two[0].shape[1]
    rows = [(nn.functional.pad(i, (0, length - i.shape[1]), value=PAD), nn.functional.pad(m, (0, length - m.shape[1]))) for i, m in (one, none, two)]  # fmt: skip
    batch = encoder(torch.cat([i for i, _ in rows]), None, pixels, torch.cat([m for _, m in rows]))
    close(batch[0][:1], encoder(one[0], None, pixels[:1], one[1])[0], 1e-5)
    close(batch[0][1:2], encoder(none[0])[0], 1e-5)
    close(batch[0][2:], encoder(two[0], None, pixels[1:], two[1])[0], 1e-5)
    swapped = encoder(two[0], None, pixels[[2, 1]], two[1])[0]
    assert (swapped - batch[0][2:]).abs().max() > 1e-2
    close(batch.image_embeds, encoder.get_image_features(pixels), 0)


# What stock pipelines reach for ------------------------------------------------------------------------------------


def test_outputs_are_those_of_a_clip_text_model_to_a_stock_pipeline(encoder):
    ids = torch.tensor([[0, 5, 6]])
    output = encoder(ids, attention_mask=None, output_hidden_states=True)
    layers = encoder.config.aligner_layers
    assert len(output.hidden_states) == layers + 1
    last, norm = output[-1], encoder.text_model.final_layer_norm
    assert last is output.hidden_states
    close(norm(last[-1]), output[0], 0)
    assert torch.equal(last[0][0], encoder.aligner.query_embeds)
    plain = encoder(ids)
    assert plain.hidden_states is None and torch.equal(plain[0], output[0])
    as_tuple = encoder(ids, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output[0])
    assert encoder.dtype == torch.float32 and encoder.device.type == "cpu"


def test_encoder_is_a_transformers_model_with_a_config_of_its_own():
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    assert issubclass(KosmosGTextEncoder, PreTrainedModel) and not issubclass(KosmosGTextEncoder, ModelMixin)
    assert not hasattr(KosmosGTextEncoderConfig(), "use_attention_mask")


# Training ------------------------------------------------------------------------------------------------------


def test_training_drops_embeddings_once_and_no_attention_of_the_decoder(monkeypatch):
    encoder = build_encoder(dropout=0.25).train()
    dropped, attended = [], []
    dropout, attention = nn.functional.dropout, nn.functional.scaled_dot_product_attention

    def count_dropout(states, p=0.5, training=True, inplace=False):
        if training and p:
            dropped.append(tuple(states.shape))
        return dropout(states, p, training, inplace)

    def count_attention(query, key, value, *args, dropout_p=0.0, **kwargs):
        attended.append((query.shape[2], key.shape[2], dropout_p))
        return attention(query, key, value, *args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(nn.functional, "dropout", count_dropout)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count_attention)
    ids, mask = prompt_with_images(1)
    encoder(ids, None, pictures(1), mask)
    length, layers, patches = ids.shape[1], 2, 5
    # embeddings, and in each layer of the language model the attention's and the feed-forward network's output
    assert dropped == [(1, length, 16)] * (1 + 2 * layers)
    connector = (3, patches + 3, 0.25)
    vision, language = [(patches, patches, 0.0)] * layers, [(length, length, 0.0)] * layers
    aligner = [(length, length, 0.0)] * layers + [(5, 5, 0.0), (5, length, 0.0)] * layers
    assert attended == [*vision, connector, *language, *aligner]


def test_training_does_not_merge_equal_rows():
    encoder = build_encoder(dropout=0.25).train()
    condition = encoder(torch.tensor([[0, 5, 6], [0, 5, 6]]))[0]
    assert (condition[0] - condition[1]).abs().max() > 1e-3


def gradients(encoder, checkpointing):
    """Condition, gradient of each parameter and how often a layer ran, in training mode with fixed dropout."""
    encoder, runs = copy.deepcopy(encoder).train(), []
    if checkpointing:
        encoder.gradient_checkpointing_enable()
    for part in (encoder.vision_model.model.encoder, encoder.language_model.model):
        part.layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    for layers in (encoder.aligner.encoder_layers, encoder.aligner.query_layers):
        layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    ids, mask = prompt_with_images(2)
    ids, mask = nn.functional.pad(ids, (0, 3), value=PAD), nn.functional.pad(mask, (0, 3))
    ids, mask = torch.cat([ids[:, :-3], ids[:, 3:]]), torch.cat([mask[:, :-3], mask[:, 3:]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        condition = encoder(ids, None, pictures(4), mask)[0]
        (condition * torch.linspace(-1, 1, condition.numel()).view_as(condition)).sum().backward()
    return condition, {name: parameter.grad for name, parameter in encoder.named_parameters()}, len(runs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_gives_equal_gradients():
    encoder = build_encoder(dropout=0.1)
    condition, expected, runs = gradients(encoder, checkpointing=False)
    again, given, runs_with_recomputation = gradients(encoder, checkpointing=True)
    assert (runs, runs_with_recomputation) == (
        4,
        8,
    )  # both towers and both halves of the AlignerNet are recomputed
    close(again, condition, 1e-6)
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0 or name.endswith("k_proj.bias"), (
            name
        )  # a softmax is blind to the latter
        close(given[name], gradient, 1e-5 * max(1, gradient.abs().max().item()))


def test_gradient_reaches_only_what_is_trained(encoder):
    encoder = build_encoder()
    encoder.add_image_word("<dog>", encoder(pixel_values=pictures(1)).image_embeds)
    encoder(torch.tensor([[0, 60, 5]]))[0].sum().backward()
    assert all(not part.states.requires_grad and part.states.grad is None for part in encoder.image_words)
    assert encoder.aligner.query_embeds.grad is not None


# Compilation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "pictures", "words"])
def test_compiled_encoder_has_no_break_and_recompiles_at_most_once(kind):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    encoder, frames = build_encoder(), CompileCounter()
    if kind == "words":
        encoder.add_image_word("<one>", encoder.get_image_features(pictures(1)))
        encoder.add_image_word("<three>", encoder.get_image_features(pictures(3, seed=1)))
    calls = []
    for number in (1, 2, 5, 3, 10):
        if kind == "text":
            ids = torch.arange(20, 20 + number)[None]
            calls += [{"input_ids": ids}, {"input_ids": nn.functional.pad(ids, (0, 10), value=PAD)}]
        elif kind == "pictures":
            ids, mask = prompt_with_images(number)
            calls.append({"input_ids": ids, "pixel_values": pictures(number), "image_token_mask": mask})
        else:
            calls.append({"input_ids": torch.tensor([[0, *range(5, 5 + number), 60 + number % 2]])})
    expected = [encoder(**call)[0] for call in calls]
    encoder.compile(fullgraph=True, backend=frames)
    for call, condition in zip(calls, expected, strict=True):
        close(encoder(**call)[0], condition, 1e-5)
    assert 1 <= frames.frame_count <= 2
    with pytest.raises(ValueError):  # the checks run in eager mode as before
        encoder(torch.tensor([[0, 99]]))
    torch._dynamo.reset()


# Image words of the encoder ----------------------------------------------------------------------------------------


def test_image_word_is_spelled_out_as_its_pictures(encoder):
    own = build_encoder()
    pixels = pictures(3)
    embeds = own(pixel_values=pixels).image_embeds
    own.add_image_word("<two>", embeds[:2])
    own.add_image_word("<one>", embeds[2:])
    ids, mask = prompt_with_images(2)
    close(own(torch.tensor([[0, 5, 6, 60, 7]]))[0], encoder(ids, None, pixels[:2], mask)[0], 1e-5)
    ids, mask = prompt_with_images(3)
    close(own(torch.tensor([[0, 5, 6, 60, 61, 7]]))[0], encoder(ids, None, pixels, mask)[0], 1e-5)
    # a picture and words beside each other
    mixed = torch.tensor([[0, 5, 6, 57, 57, 57, 57, 58, 60, 7]])
    slots = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0, 0, 0]], dtype=bool)
    close(own(mixed, None, pixels[2:], slots)[0], encoder(ids, None, pixels[[2, 0, 1]], mask)[0], 1e-5)


def test_prompts_that_differ_in_their_image_word_alone_differ(encoder):
    own = build_encoder()
    for seed, word in enumerate(("<dog>", "<cat>")):
        own.add_image_word(word, own(pixel_values=pictures(1, seed)).image_embeds)
    rows = torch.tensor([[0, 60, 5], [0, 61, 5], [0, 60, 5]])
    batch = own(rows)[0]
    for index, row in enumerate(rows):
        close(batch[index], own(row[None])[0][0], 1e-5)
    assert (batch[0] - batch[1]).abs().max() > 1e-2


def test_image_words_may_follow_padding_rules(encoder):
    own = build_encoder()
    own.add_image_word("<dog>", own(pixel_values=pictures(1)).image_embeds)
    expected = own(torch.tensor([[0, 60, 5]]))[0]
    close(own(torch.tensor([[0, 60, 5, PAD, PAD, PAD]]))[0], expected, 0)
    close(own(torch.tensor([[0, 60, 5], [0, 7, PAD]]))[0][:1], expected, 1e-5)


def test_states_of_an_image_word_are_copied_and_frozen():
    own = build_encoder()
    embeds = own(pixel_values=pictures(1)).image_embeds
    own.add_image_word("<dog>", embeds)
    before = own(torch.tensor([[0, 60]]))[0]
    embeds.zero_()
    close(own(torch.tensor([[0, 60]]))[0], before, 0)
    assert [name for name in own.state_dict() if name.startswith("image_words")] == ["image_words.0.states"]
    assert own.half().image_words[0]().dtype == torch.float16


@pytest.mark.parametrize(
    "states, message",
    [
        (torch.zeros(1, 3, 17), r"shape \(1, 3, 17\). Expected \(images, 3, 16\)"),
        (torch.zeros(1, 4, 16), r"shape \(1, 4, 16\)"),
        (torch.zeros(0, 3, 16), r"shape \(0, 3, 16\)"),
        (torch.zeros(3, 16), r"shape \(3, 16\)"),
        (torch.full((1, 3, 16), torch.nan), "not all finite"),
        (torch.full((1, 3, 16), torch.inf), "not all finite"),
        (torch.zeros(1, 3, 16, dtype=torch.int64), "torch.int64"),
    ],
)
def test_states_that_do_not_fit_are_refused(states, message):
    own = build_encoder()
    with pytest.raises(ValueError, match=f"The states of <dog> .*{message}|{message}"):
        own.add_image_word("<dog>", states)
    assert len(own.image_words) == 0 and own.config.image_words == []


def test_image_words_work_while_weights_are_offloaded():
    accelerate = pytest.importorskip("accelerate")
    pixels, own, offloaded = pictures(2), build_encoder(), build_encoder()
    rows = torch.tensor([[0, 60, 5, 61], [0, 61, PAD, PAD]])
    own.add_image_word("<one>", own(pixel_values=pixels[:1]).image_embeds)
    offloaded.add_image_word("<one>", own.image_words[0]())
    own.add_image_word("<two>", own(pixel_values=pixels[1:]).image_embeds)
    accelerate.cpu_offload(
        offloaded, torch.device("cpu")
    )  # what enable_sequential_cpu_offload does to each model
    assert offloaded.device.type == "meta"
    close(offloaded(torch.tensor([[0, 60]]))[0], own(torch.tensor([[0, 60]]))[0], 0)
    offloaded.add_image_word("<two>", offloaded(pixel_values=pixels[1:]).image_embeds)
    close(offloaded(rows)[0], own(rows)[0], 0)
    offloaded.remove_image_word("<one>")
    close(offloaded(torch.tensor([[0, 60]]))[0], own(torch.tensor([[0, 61]]))[0], 0)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def idle_encoder():
    """An encoder none of whose parts may run."""

    def ran(*args, **kwargs):
        raise AssertionError("the model ran")

    encoder = build_encoder()
    for part in (encoder.get_input_embeddings(), encoder.vision_model.model.embeddings, encoder.aligner):
        part.forward = ran
    return encoder


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "Neither input_ids nor pixel_values"),
        ({"input_ids": torch.tensor([0, 5])}, r"input_ids of shape \(2,\)"),
        ({"input_ids": torch.zeros(0, 3, dtype=int)}, r"input_ids of shape \(0, 3\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=int)}, r"input_ids of shape \(2, 0\)"),
        (
            {"input_ids": torch.tensor([[0, 5]]), "attention_mask": torch.ones(1, 3)},
            r"attention_mask of shape \(1, 3\) was given for input_ids of shape \(1, 2\)",
        ),
        (
            {"input_ids": torch.tensor([[0, 5]]), "image_token_mask": torch.ones(2, 2)},
            r"image_token_mask of shape \(2, 2\)",
        ),
        ({"input_ids": torch.tensor([[0, 5]]), "pixel_values": pictures(1)}, "marks 0 slots, but 1 images of 3 states"),
        (
            {"input_ids": torch.tensor([[0, 5]]), "image_token_mask": torch.tensor([[False, True]])},
            "marks 1 slots, but 0 images",
        ),
        (
            {"input_ids": prompt_with_images(1)[0], "image_token_mask": prompt_with_images(1)[1], "pixel_values": pictures(2)},
            "marks 3 slots, but 2 images",
        ),
        ({"pixel_values": torch.zeros(1, 3, 28, 27)}, r"pixel_values of shape \(1, 3, 28, 27\).*\(images, 3, 28, 28\)"),
        ({"pixel_values": torch.zeros(3, 28, 28)}, r"pixel_values of shape \(3, 28, 28\)"),
        ({"input_ids": torch.tensor([[0, 5], [0, 60]])}, "1 holds the token id 60; the vocabulary has 60 ids and 0"),
        ({"input_ids": torch.tensor([[0, 5], [PAD, PAD]])}, "1 is padding alone"),
        ({"input_ids": torch.full((1, 65), 5)}, "0 is 65 tokens long .*at most 64"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_the_model_runs(idle_encoder, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        idle_encoder(**inputs)
    assert "Prompt" not in str(error.value)  # stock pipelines give negative prompts in the same way
    if "input_ids" in inputs:
        with pytest.raises(ValueError, match=message):
            idle_encoder.check_prompts(**inputs)


def test_prompt_that_image_words_make_too_long_is_refused_with_both_lengths(idle_encoder):
    idle_encoder.add_image_word("<ten>", torch.zeros(10, 3, 16))
    with pytest.raises(ValueError, match=r"Input 1 is 101 tokens long \(image words .*at most 64"):
        idle_encoder(torch.tensor([[0, 60, PAD], [0, 60, 60]]))


# Configuration -----------------------------------------------------------------------------------------------------


def test_default_configuration_is_the_released_size():
    config = KosmosGTextEncoderConfig()
    text, vision = config.text_config, config.vision_config
    assert (text.vocab_size, text.embed_dim, text.layers, text.attention_heads, text.ffn_dim) == (
        64007,
        2048,
        24,
        32,
        8192,
    )
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (
        1024,
        24,
        224,
        14,
    )
    assert (text.max_position_embeddings, vision.hidden_act, text.activation_function) == (
        2048,
        "quick_gelu",
        "gelu",
    )
    assert (
        config.latent_query_num,
        config.num_queries,
        config.aligner_hidden_size,
        config.aligner_layers,
    ) == (64, 77, 768, 12)


@pytest.mark.parametrize("stage", ["align", "final"])
def test_full_size_model_has_the_official_number_of_weights(reference, stage):
    with torch.device("meta"):
        encoder = KosmosGTextEncoder(KosmosGTextEncoderConfig())
    keys = json.loads(
        (reference / f"full_size_state_dict_keys_{stage}_stage.json").read_text(encoding="utf-8")
    )
    foreign = ("aligner.decoder", "aligner.clip_encoder", "diffusion_unet.", "vae.")
    unread = ("output_projection.weight", "_float_tensor", "self_attn_sope.scale")
    official = [
        shape for key, shape in keys.items()
        if not key.startswith(foreign) and not (key.startswith("gpt_model") and key.endswith(unread))
    ]  # fmt: skip
    official = [shape[0] if shape and isinstance(shape[0], list) else shape for shape in official]
    ours = [list(tensor.shape) for tensor in encoder.state_dict().values()]
    assert sorted(ours) == sorted(official)


def test_configuration_survives_saving(tmp_path):
    config = build_encoder(image_words=[["<dog>", 2]]).config
    config.save_pretrained(tmp_path)
    loaded = KosmosGTextEncoderConfig.from_pretrained(tmp_path)
    assert loaded.image_words == [["<dog>", 2]] and loaded.text_config.embed_dim == 16
    given, expected = loaded.to_dict(), config.to_dict()
    for fields in (given, expected):
        for name in ("auto_map", "transformers_version", "_name_or_path"):
            fields.pop(name, None)
    assert given == expected


def test_unknown_format_version_is_refused_with_both_versions():
    with pytest.raises(ValueError, match="format version 2; this code reads version 1"):
        KosmosGTextEncoderConfig(format_version=2)


# Names that code written for CLIPTextModel reads -----------------------------------------------------------------


def test_configuration_answers_to_the_names_of_cliptextconfig(tmp_path):
    config = build_encoder().config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (8, 2, 2)
    assert config.intermediate_size == 16
    text = config.text_config
    assert (config.vocab_size, config.max_position_embeddings) == (60, 64)
    assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == [0, 2, 1]
    assert config.get_text_config() is text
    config.vocab_size = 61
    assert text.vocab_size == 61
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert not {"hidden_size", "num_hidden_layers", "vocab_size", "pad_token_id", "eos_token_id"} & set(
        written
    )
    assert KosmosGTextEncoderConfig.from_pretrained(tmp_path).vocab_size == 61


def test_outputs_follow_the_configuration_as_transformers_models_do(encoder):
    own = copy.deepcopy(encoder)
    own.config.output_hidden_states = True
    ids = torch.tensor([[0, 5, 6]])
    assert len(own(ids).hidden_states) == 3 and own(ids, output_hidden_states=False).hidden_states is None
    own.config.return_dict = False
    assert isinstance(own(ids), tuple)


def test_gradient_reaches_retained_hidden_states(encoder):
    output = encoder(torch.tensor([[0, 5, 6], [0, 7, 8]]), output_hidden_states=True)
    for states in output.hidden_states:
        states.retain_grad()
    output[0].flatten()[0].backward()
    assert all(states.grad is not None for states in output.hidden_states)


def test_image_features_follow_transformers_conventions_when_asked(encoder):
    pixels = pictures(2)
    plain = encoder.get_image_features(pixels)
    output = encoder.get_image_features(pixels, output_hidden_states=True, return_dict=True)
    assert torch.equal(output.pooler_output, plain) and output.last_hidden_state.shape == (2, 5, 16)
    assert len(output.hidden_states) == 3  # the embeddings, and each layer
    as_tuple = encoder.get_image_features(pixels, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], plain) and len(as_tuple) == 2
    with pytest.raises(TypeError, match="output_attentions"):
        encoder.get_image_features(pixels, output_attentions=True)
