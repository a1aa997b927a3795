"""LoRA files as the world writes them: each is loaded as what it means, or refused in one line with nothing left behind."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.loras import (
    DIFFUSERS_TEXT_ENCODER,
    RANK,
    differ,
    equal,
    make_lora,
    merge_by_hand,
    picture_of,
    to_kohya,
    with_prefix,
)

from kosmos_g_diffusers import KosmosGPipeline

peft = pytest.importorskip("peft")

PROMPT = "a hat"
SIDES = {"A": "down", "B": "up"}


@pytest.fixture(scope="module")
def shared(build_pipe):
    """A pipeline that every test leaves as it was."""
    return build_pipe()


@pytest.fixture(scope="module")
def layers(shared):
    return make_lora(shared.unet)


@pytest.fixture(scope="module")
def plain(shared, draw):
    return draw(shared, PROMPT)


@pytest.fixture(scope="module")
def styled(shared, draw, layers):
    """What is drawn with the weights of the LoRA merged by hand."""
    return picture_of(shared, draw, merge_by_hand(shared.unet, (layers, 1.0)), PROMPT)


def respelled(layers, spell):
    """Keys `MODULE.lora_A.weight` -> spell(MODULE, "A")."""
    return {
        spell(name.split(".lora_")[0], name.split(".lora_")[1][0]): value for name, value in layers.items()
    }


SPELLINGS = {
    "no prefix": lambda m, h: f"{m}.lora_{h}.weight",
    "adapter in the keys": lambda m, h: f"unet.{m}.lora_{h}.default.weight",
    "adapter with a dot": lambda m, h: f"unet.{m}.lora_{h}.style.v1.weight",
    "peft": lambda m, h: f"base_model.model.{m}.lora_{h}.weight",
    "peft and adapter": lambda m, h: f"base_model.model.{m}.lora_{h}.default.weight",
    "prefix and peft": lambda m, h: f"unet.base_model.model.{m}.lora_{h}.weight",
    "down and up": lambda m, h: f"unet.{m}.lora_{SIDES[h]}.weight",
    "linear layer": lambda m, h: f"unet.{m}.lora_linear_layer.{SIDES[h]}.weight",
    "processor": lambda m, h: f"unet.{m}.lora.{SIDES[h]}.weight".replace(".to_", ".processor.to_"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_loaded_as_what_it_means(shared, draw, layers, styled, plain, spelling):
    shared.load_lora_weights(respelled(layers, SPELLINGS[spelling]))
    given = draw(shared, PROMPT)
    shared.unload_lora_weights()
    assert equal(given, styled) and differ(given, plain)
    assert np.array_equal(draw(shared, PROMPT), plain)


def test_a_file_may_mix_spellings(shared, draw, layers, styled):
    first = dict(list(layers.items())[:6])
    rest = {name: value for name, value in layers.items() if name not in first}
    shared.load_lora_weights(to_kohya(first) | with_prefix(rest))
    given = draw(shared, PROMPT)
    shared.unload_lora_weights()
    assert equal(given, styled)


@pytest.mark.parametrize("spelling", ["kohya", "dots"])
def test_each_layer_has_the_alpha_of_its_own(shared, draw, layers, spelling):
    modules = sorted({name.split(".lora_")[0] for name in layers})
    alphas = {module: float(1 + number % 3) for number, module in enumerate(modules)}
    del alphas[modules[0]]  # without one the scale is 1
    scaled = {
        name: value * (alphas.get(name.split(".lora_")[0], RANK) / RANK if ".lora_B." in name else 1)
        for name, value in layers.items()
    }
    expected = picture_of(shared, draw, merge_by_hand(shared.unet, (scaled, 1.0)), PROMPT)
    if spelling == "kohya":
        given = {name: value for name, value in to_kohya(layers).items() if not name.endswith(".alpha")}
        named = {f"lora_unet_{module.replace('.', '_')}.alpha": alpha for module, alpha in alphas.items()}
    else:
        given, named = with_prefix(layers), {f"unet.{name}.alpha": alpha for name, alpha in alphas.items()}
    shared.load_lora_weights(given | {name: torch.tensor(alpha) for name, alpha in named.items()})
    image = draw(shared, PROMPT)
    shared.unload_lora_weights()
    assert equal(image, expected)


def test_folder_of_save_lora_adapter_keeps_its_scale(shared, draw, layers, tmp_path):
    unet = copy.deepcopy(shared.unet)
    unet.load_lora_adapter(layers, prefix=None, adapter_name="style")
    config = unet.peft_config["style"]
    config.lora_alpha, config.alpha_pattern = RANK // 2, {}
    unet.save_lora_adapter(tmp_path, adapter_name="style")
    expected = picture_of(shared, draw, merge_by_hand(shared.unet, (layers, 0.5)), PROMPT)
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        shared.load_lora_weights(source, weight_name="pytorch_lora_weights.safetensors")
        image = draw(shared, PROMPT)
        shared.unload_lora_weights()
        assert equal(image, expected)


def test_folder_of_peft_keeps_its_scale(shared, draw, layers, tmp_path):
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK // 2, target_modules=sorted({n.split(".lora_")[0] for n in layers})
    )
    config.save_pretrained(tmp_path)
    save_file(
        {f"base_model.model.{name}": value for name, value in layers.items()},
        tmp_path / "adapter_model.safetensors",
    )
    expected = picture_of(shared, draw, merge_by_hand(shared.unet, (layers, 0.5)), PROMPT)
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        shared.load_lora_weights(source, weight_name="adapter_model.safetensors")
        image = draw(shared, PROMPT)
        shared.unload_lora_weights()
        assert equal(image, expected)


def test_compiled_unet_takes_a_lora_and_gives_it_back(build_pipe, draw, layers, styled, plain):
    pipe = build_pipe()
    pipe.unet = compiled = torch.compile(pipe.unet)
    with torch.compiler.set_stance(
        "force_eager"
    ):  # the wrapping counts here, and tracing takes half a minute
        pipe.load_lora_weights(with_prefix(layers), adapter_name="style")
        assert equal(draw(pipe, PROMPT), styled)
        pipe.set_adapters(["style"], [0.0])
        assert equal(draw(pipe, PROMPT), plain)
        pipe.unload_lora_weights()
        assert np.array_equal(draw(pipe, PROMPT), plain)
    assert pipe.unet is compiled and not hasattr(compiled, "peft_config")


# The text encoder's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["fc1"], ["dense", "input_projection"]])
@pytest.mark.parametrize("with_settings", [False, True])
def test_lora_of_the_text_encoder_loads_again(
    build_pipe, draw, plain, layers, tmp_path, targets, with_settings
):
    pipe = build_pipe()
    alpha = 2 if with_settings else 4  # without settings the scale is 1
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    pipe.text_encoder.add_adapter(config)
    expected = pipe.encode_prompt(PROMPT)[0]
    settings = {"text_encoder_lora_adapter_metadata": config.to_dict()} if with_settings else {}
    KosmosGPipeline.save_lora_weights(
        tmp_path,
        text_encoder_lora_layers=peft.get_peft_model_state_dict(pipe.text_encoder, adapter_name="default"),
        **settings,
    )
    other = build_pipe()
    before = other.encode_prompt(PROMPT)[0]
    assert (expected - before).abs().max() > 1e-3
    other.load_lora_weights(tmp_path / "pytorch_lora_weights.safetensors", adapter_name="own")
    torch.testing.assert_close(other.encode_prompt(PROMPT)[0], expected, atol=1e-5, rtol=0)
    assert (other.encode_prompt(PROMPT, lora_scale=0.0)[0] - before).abs().max() < 1e-5
    other.unload_lora_weights()
    assert torch.equal(other.encode_prompt(PROMPT)[0], before)
    # with layers for the U-Net and for CLIP's encoder in one file
    both = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    if not with_settings:
        other.load_lora_weights(both | with_prefix(layers) | DIFFUSERS_TEXT_ENCODER, adapter_name="own")
        torch.testing.assert_close(other.encode_prompt(PROMPT)[0], expected, atol=1e-5, rtol=0)
        assert other.get_list_adapters() == {"unet": ["own"], "text_encoder": ["own"]}
        other.delete_adapters("own")
        assert np.array_equal(draw(other, PROMPT), plain)


# Saving ------------------------------------------------------------------------------------------------------------


def saved(pipe, folder, logged):
    """The saved pipeline, loaded again, and what was said while it was saved."""
    logged.clear()
    pipe.save_pretrained(folder)
    said = [record.getMessage() for record in logged.records if record.levelname == "WARNING"]
    loaded = KosmosGPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded, said


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loaded_lora_is_left_out_of_what_is_saved(
    build_pipe, draw, layers, plain, tmp_path, logged, compiled
):
    pipe = build_pipe()
    if compiled:
        pipe.unet = torch.compile(pipe.unet)
    pipe.load_lora_weights(with_prefix(layers), adapter_name="style")
    names = [name for name, _ in pipe.unet.named_modules()]
    loaded, said = saved(pipe, tmp_path, logged)
    assert (
        len(said) == 1 and "The LoRA style of the unet is not saved" in said[0] and "fuse_lora()" in said[0]
    )
    assert np.array_equal(draw(loaded, PROMPT), plain)
    assert [name for name, _ in pipe.unet.named_modules()] == names
    assert pipe.get_list_adapters() == {"unet": ["style"]}


def test_a_fused_lora_is_in_what_is_saved(build_pipe, draw, layers, styled, tmp_path, logged):
    pipe = build_pipe()
    pipe.load_lora_weights(with_prefix(layers), adapter_name="style")
    pipe.fuse_lora()
    loaded, said = saved(pipe, tmp_path / "fused", logged)
    assert not said
    assert equal(draw(loaded, PROMPT), styled) and np.array_equal(draw(loaded, PROMPT), draw(pipe, PROMPT))
    pipe.unload_lora_weights()
    loaded, said = saved(pipe, tmp_path / "unloaded", logged)
    assert not said and equal(draw(loaded, PROMPT), styled)


def test_of_two_loras_the_fused_one_is_in_what_is_saved(build_pipe, draw, layers, styled, tmp_path, logged):
    pipe = build_pipe()
    pipe.load_lora_weights(with_prefix(make_lora(pipe.unet, 1)), adapter_name="first")
    pipe.load_lora_weights(with_prefix(layers), adapter_name="second")
    pipe.fuse_lora(adapter_names=["second"])
    loaded, said = saved(pipe, tmp_path, logged)
    assert len(said) == 1 and "The LoRA first of the unet" in said[0]
    assert equal(draw(loaded, PROMPT), styled)


# What is refused -----------------------------------------------------------------------------------------------------


QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def without(layers, *parts):
    return {name: value for name, value in layers.items() if not all(part in name for part in parts)}


def replaced(layers, name, change):
    return layers | {name: change(layers[name])}


A, B = f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight"
KOHYA = f"lora_unet_{QUERY.replace('.', '_')}"


def filled(value):
    def fill(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return fill


# name -> (what is made of the layers with their prefix, what the message says)
REFUSED = {
    "half a pair": (lambda x: without(x, QUERY, "lora_B"), f"{QUERY} has no lora_B.weight"),
    "the other half": (lambda x: without(x, QUERY, "lora_A"), f"{QUERY} has no lora_A.weight"),
    "half a pair of kohya": (
        lambda x: without(to_kohya({k.removeprefix("unet."): v for k, v in x.items()}), KOHYA, "up"),
        f"{KOHYA} has no lora_up.weight",
    ),
    "a lone alpha of kohya": (
        lambda x: without(to_kohya({k.removeprefix("unet."): v for k, v in x.items()}), KOHYA, ".lora_"),
        f"{KOHYA} has no lora_down.weight",
    ),
    "a lone alpha": (
        lambda x: x | {"unet.mid_block.x.alpha": torch.tensor(1.0)},
        "mid_block.x.alpha is there without",
    ),
    "NaN": (lambda x: replaced(x, B, filled(torch.nan)), "attn1.to_q.lora_B.weight .* not finite"),
    "infinite": (lambda x: replaced(x, A, filled(-torch.inf)), "attn1.to_q.lora_A.weight .* not finite"),
    "infinite in float16": (lambda x: replaced(x, A, lambda v: filled(torch.inf)(v.half())), "not finite"),
    "alpha that is NaN": (
        lambda x: x | {f"unet.{QUERY}.alpha": torch.tensor(torch.nan)},
        "alpha is not a finite",
    ),
    "alpha of two": (lambda x: x | {f"unet.{QUERY}.alpha": torch.ones(2)}, "alpha is not a finite number"),
    "ranks that differ": (lambda x: replaced(x, A, lambda v: v[:2].clone()), "the ranks 2 and 4"),
    "integers": (lambda x: replaced(x, A, torch.Tensor.long), "torch.int64. Expected floating-point"),
    "no dimension": (lambda x: replaced(x, A, lambda v: v[0, 0].clone()), r"1 of \d+ layers .* \(\)"),
    "one dimension": (lambda x: replaced(x, B, lambda v: v[:, 0].clone()), r"1 of \d+ layers .* \(16,\)"),
    "too many dimensions": (
        lambda x: replaced(x, A, lambda v: v[..., None, None]),
        r"1 of \d+ .*\(4, 16, 1, 1\)",
    ),
    "empty": (lambda x: replaced(x, A, lambda v: v[:, :0].clone()), "none at all"),
    "a foreign layer": (
        lambda x: x | {k.replace("to_q", "to_z"): v for k, v in x.items() if QUERY in k},
        r"2 of \d+ layers of this LoRA do not fit .*to_z",
    ),
    "a foreign key": (
        lambda x: x | {"unet.conv_in.weight": torch.ones(2, 2)},
        "Not all of it is a LoRA: 1 of",
    ),
    "a whole model": (lambda x: {f"{k[:-14]}.weight": v for k, v in x.items()}, "It is not a LoRA"),
    "LoHa": (lambda x: {f"{KOHYA}.hada_w1_a": torch.ones(4, 4)} | x, "It is a LoHa"),
    "LoKr": (lambda x: {f"{KOHYA}.lokr_w1": torch.ones(4, 4)}, "It is a LoKr"),
    "LoKr without a prefix": (lambda x: {f"{QUERY}.lokr_w1": torch.ones(4, 4)}, "It is a LoKr"),
    "Tucker": (lambda x: x | {f"{KOHYA}.lora_mid.weight": torch.ones(4, 4, 3, 3)}, "Tucker"),
    "two adapters": (
        lambda x: {k.replace(".weight", f".{a}.weight"): v for a in "ab" for k, v in x.items()},
        "more than once of the adapters a, b",
    ),
    "twice": (lambda x: x | {f"unet.{QUERY}.lora.down.weight": x[A]}, "more than once"),
    "nothing": (lambda x: {}, "holds no tensors"),
}


def _left(pipe):
    models = (pipe.unet, pipe.text_encoder)
    return [getattr(model, "peft_config", None) for model in models], [
        name for name, _ in pipe.unet.named_modules()
    ]


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_and_leaves_nothing(
    shared, draw, layers, plain, tmp_path, case
):
    change, message = REFUSED[case]
    given, before = change(with_prefix(layers)), _left(shared)
    path = tmp_path / "style.safetensors"
    save_file({name: value.clone().contiguous() for name, value in given.items()}, path)
    for source in (given, path):
        with pytest.raises(ValueError, match=message) as caught:
            shared.load_lora_weights(copy.copy(source))
        text = str(caught.value)
        assert "\n" not in text and len(text) < 700
        assert sum(key in text for key in given) <= 3
        assert (str(path) in text) == (source is path)
        assert _left(shared) == before
    if case in ("half a pair", "a foreign layer", "NaN"):  # one of each place that refuses
        assert np.array_equal(draw(shared, PROMPT), plain)


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{}", b"PK\x03\x04 not a zip"]
)
@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_damaged_files_are_refused_by_name(shared, tmp_path, content, suffix):
    path = tmp_path / f"style.{suffix}"
    path.write_bytes(content)
    before = _left(shared)
    with pytest.raises(
        (OSError, ValueError), match=f"The LoRA '.*style.{suffix}' cannot be loaded: ."
    ) as caught:
        shared.load_lora_weights(path)
    assert "\n" not in str(caught.value) and _left(shared) == before


def test_pickle_with_something_else_than_tensors_is_refused(shared, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "style.pt")
    with pytest.raises(ValueError, match="style.pt.*holds 'state_dict' of the type dict"):
        shared.load_lora_weights(tmp_path / "style.pt")


@pytest.mark.parametrize("settings", ["[]", '{"unet.r": "x"}', '{"unet.nonsense": 1}', '{"unet.r": 8}', "{"])
def test_settings_for_peft_that_do_not_fit_are_refused(shared, draw, layers, plain, tmp_path, settings):
    path = tmp_path / "style.safetensors"
    save_file(with_prefix(layers), path, metadata={"lora_adapter_metadata": settings})
    before = _left(shared)
    with pytest.raises(ValueError, match="style.safetensors"):
        shared.load_lora_weights(path)
    assert _left(shared) == before
    assert np.array_equal(draw(shared, PROMPT), plain)


def test_a_refused_lora_leaves_the_one_that_is_loaded(build_pipe, draw, layers, styled):
    pipe = build_pipe()
    pipe.load_lora_weights(with_prefix(layers), adapter_name="first")
    before = draw(pipe, PROMPT)
    for case in ("half a pair", "a foreign layer"):
        with pytest.raises(ValueError):
            pipe.load_lora_weights(REFUSED[case][0](with_prefix(layers)), adapter_name="second")
    with pytest.raises(ValueError, match="first"):
        pipe.load_lora_weights(with_prefix(layers), adapter_name="first")
    assert pipe.get_list_adapters() == {"unet": ["first"]}
    assert np.array_equal(draw(pipe, PROMPT), before)


@pytest.mark.parametrize("name", ["style.v1", "", "keys"])
def test_adapter_name_that_torch_cannot_have_is_refused(shared, layers, name):
    before = _left(shared)
    with pytest.raises(ValueError, match=f"adapter_name={name!r}"):
        shared.load_lora_weights(with_prefix(layers), adapter_name=name)
    assert _left(shared) == before
