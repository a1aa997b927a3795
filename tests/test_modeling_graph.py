"""The text encoder as one graph: torch.compile without a break, torch.export for every batch, errors that the graph keeps."""

import pytest
import torch
from torch.export import Dim, export

from kosmos_g_diffusers import KosmosGTextEncoder


@pytest.fixture
def pipe(build_pipe):
    """A small pipeline whose encoder has one layer of each kind: what the compiler takes grows with their number."""
    pipe = build_pipe()
    text, vision = pipe.text_encoder.language_model.model, pipe.text_encoder.vision_model.model
    for part, name in ((text, "layers"), (vision.encoder, "layers")):
        setattr(part, name, getattr(part, name)[:1])
    aligner = pipe.text_encoder.aligner
    aligner.encoder_layers, aligner.query_layers = aligner.encoder_layers[:1], aligner.query_layers[:1]
    return pipe


@pytest.fixture
def encoder(pipe):
    return pipe.text_encoder


@pytest.fixture(scope="module")
def batch(build_pipe, photos):
    """Function from the number of pictures of each prompt to what `forward` takes; each prompt has a length of its own."""
    processor = build_pipe().get_processor()

    def batch(*counts):
        prompts = ["a hat " * index + "<i> " * n for index, n in enumerate(counts)]
        return dict(processor(prompts, [photos[:n] for n in counts]))

    return batch


@pytest.fixture(autouse=True)
def forget_compiled():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def as_tensors(encoder, inputs):
    """What `get_condition` takes, in its order."""
    states = torch.zeros(0, encoder.config.latent_query_num, encoder.config.text_config.embed_dim)
    if "pixel_values" in inputs:
        states = encoder.get_image_features(inputs["pixel_values"])
    return inputs["input_ids"], states, inputs["image_token_mask"], inputs["attention_mask"].bool()


def close(given, expected):
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


def test_no_graph_breaks(encoder, batch):
    inputs = batch(2, 1)
    explain = torch._dynamo.explain
    for function, arguments in (
        (encoder.get_image_features, (inputs["pixel_values"],)),
        (encoder.get_condition, as_tensors(encoder, inputs)),
    ):
        assert explain(function)(*arguments).graph_break_count == 0
    explained = explain(encoder)(**inputs)
    assert (explained.graph_break_count, explained.graph_count) == (0, 1)


def test_compiled_as_a_whole_it_gives_the_same_and_its_graph_finds_wrong_input(encoder, batch):
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend="eager")
    for counts in ((2, 1), (1, 0, 4)):
        close(compiled(**batch(*counts))[0], encoder(**batch(*counts))[0])
    for name, place, value, words in (
        ("input_ids", (0, 3), 500, "a token id from the vocabulary's size on"),
        ("input_ids", (0, 3), 2, "</s>, which ends no prompt"),
        ("attention_mask", 0, 0, "a row of padding alone"),
        ("image_token_mask", (0, 2), False, "other slots than there are images for"),
    ):
        inputs = batch(2, 1)
        inputs[name] = inputs[name].clone()
        inputs[name][place] = value
        with pytest.raises(ValueError):
            encoder(**inputs)
        with pytest.raises(RuntimeError, match=words):
            compiled(**inputs)


def test_compiled_as_a_whole_it_draws(pipe, draw, photos):
    expected = draw(pipe, "<i> in a hat", images=photos[:1])
    pipe.text_encoder = torch.compile(pipe.text_encoder, fullgraph=True, backend="eager")
    assert abs(draw(pipe, "<i> in a hat", images=photos[:1]) - expected).max() < 1e-4


def test_compiled_with_image_words_it_reads_them_and_names_the_prompt_of_an_error(pipe, photos):
    pipe.add_image_word("<dog>", photos[0])
    ids = pipe.tokenizer(["<dog> in a hat"], return_tensors="pt")["input_ids"]
    compiled = torch.compile(pipe.text_encoder, backend="eager")
    close(compiled(ids)[0], pipe.text_encoder(ids)[0])
    with pytest.raises(ValueError, match="Input 0 holds the token id"):
        compiled(ids.where(ids < len(pipe.tokenizer) - 1, len(pipe.tokenizer)))


def test_the_whole_encoder_is_exported(encoder, batch):
    rows = {0: Dim("prompts"), 1: Dim("tokens", min=2, max=256)}
    shapes = dict.fromkeys(("input_ids", "attention_mask", "image_token_mask"), rows)
    program = export(
        encoder, (), kwargs=batch(2, 1), dynamic_shapes={**shapes, "pixel_values": {0: Dim("images")}}
    ).module()
    for counts in ((1,), (4, 0, 3)):
        output = program(**batch(*counts))
        close(output.last_hidden_state, encoder(**batch(*counts))[0])
    inputs = batch(1)
    inputs["input_ids"][0, 0] = 2
    with pytest.raises(RuntimeError, match="</s>, which ends no prompt"):
        program(**inputs)


def test_states_go_to_their_slots_as_with_masked_scatter(encoder):
    assert isinstance(encoder, KosmosGTextEncoder)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 9, generator=generator) < 0.4
    ids = torch.randint(4, 20, mask.shape, generator=generator)
    states = torch.randn(int(mask.sum()), encoder.config.text_config.embed_dim, generator=generator)
    seen = []
    layer = encoder.language_model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    encoder.get_language_hidden_states(ids, states, mask)
    encoder.get_language_hidden_states(ids)
    hook.remove()
    text = encoder.language_model.model
    embeds = text.embed_tokens(ids)
    expected = embeds.masked_scatter(mask[..., None], states) * text.embed_scale
    assert torch.equal(seen[0] - seen[1] == 0, expected == embeds * text.embed_scale)
    torch.testing.assert_close(seen[0] - seen[1], expected - embeds * text.embed_scale, atol=1e-4, rtol=0)
