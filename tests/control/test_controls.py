import importlib
import importlib.util
import json
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import MultiControlNetModel, UNet2DConditionModel
from support.marks import COMPOSITE, DRAWN, term_of

from kosmos_g_diffusers import SPRITES, KosmosGControlNetImg2ImgPipeline, KosmosGControlNetPipeline
from kosmos_g_diffusers.cli import build_parser, main
from kosmos_g_diffusers.control import annotators
from kosmos_g_diffusers.control.controls import (
    control_image,
    control_preview,
    control_size,
    load_annotator,
    load_controlnet,
    open_control,
    save_control,
)
from kosmos_g_diffusers.control.table import ANNOTATORS, CONTROLS
from kosmos_g_diffusers.fields import check_value
from kosmos_g_diffusers.generation.png import read_settings, write_png
from kosmos_g_diffusers.generation.settings import ControlInput, GenerationSettings, InputImage
from kosmos_g_diffusers.pipeline_kosmos_g import KosmosGPromptMixin
from kosmos_g_diffusers.sprites.pretrained import sprites_controlnet
from kosmos_g_diffusers.testing import build_random_controlnet

PHOTOS = Path(__file__).parents[2] / "examples" / "images"
DETECTORS = [name for name, control in CONTROLS.items() if control.weights == ANNOTATORS]
# what runs with opencv and einops alone; NormalBae and OpenPose also need torchvision, scipy and scikit-image
LIGHT = [name for name in DETECTORS if name not in ("normal", "openpose")]


@pytest.fixture(scope="session")
def aux():
    """controlnet_aux is there, whole or without what only some annotators need."""
    if importlib.util.find_spec("controlnet_aux") is None:
        pytest.skip("controlnet_aux is not installed (extra `control`)")
    pytest.importorskip("cv2", reason="controlnet_aux needs opencv-python-headless")
    pytest.importorskip("einops", reason="controlnet_aux needs einops")


@pytest.fixture
def photo():
    """A photo of 451 x 300 pixels."""
    return PIL.Image.open(PHOTOS / "cat.jpg")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No file of the Hub is on this machine, and conftest.py has cut the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def weights(aux, tmp_path_factory):
    """Folder with the annotators' files, random weights in them."""
    folder = tmp_path_factory.mktemp("annotators")
    module = annotators.aux_module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # with others, MLSD may find no line
        torch.save(module("mlsd").MobileV2_MLSD_Large().state_dict(), folder / "mlsd_large_512_fp32.pth")
        torch.save(module("hed").ControlNetHED_Apache2().state_dict(), folder / "ControlNetHED.pth")
        torch.save({"state_dict": module("pidi.model").pidinet().state_dict()}, folder / "table5_pidinet.pth")
        for name in ("sk_model.pth", "sk_model2.pth"):
            torch.save(module("lineart").Generator(3, 1, 3).state_dict(), folder / name)
    return folder


# The table -------------------------------------------------------------------------------------------------------


def test_table_has_every_control_of_the_official_demo_and_of_controlnet_1_1():
    names = "canny depth hed softedge lineart lineart_anime mlsd normal openpose scribble segmentation shuffle ip2p"
    assert {*names.split(), "tile", "inpaint"} <= set(CONTROLS)
    for control in CONTROLS.values():
        assert control.controlnet.startswith("lllyasviel/control_v11")
        assert control.description and len(control.description) < 60
        for name, parameter in control.parameters.items():
            check_value(name, parameter.default, type(parameter.default), parameter.low, parameter.high)


def test_parameters_of_one_name_are_of_one_type():
    kinds = {}
    for control in CONTROLS.values():
        for name, parameter in control.parameters.items():
            assert kinds.setdefault(name, (type(parameter.default), parameter.help)) == (
                type(parameter.default),
                parameter.help,
            )


@pytest.mark.parametrize("call", [control_image, load_annotator, open_control])
def test_unknown_control_lists_the_known_ones(call):
    arguments = ("cany",) if call is load_annotator else ("cany", PIL.Image.new("RGB", (64, 64)))
    with pytest.raises(ValueError, match="There is no control 'cany'. Known: canny, depth, .*inpaint"):
        call(*arguments)


def test_unknown_parameter_and_wrong_values_are_refused_before_anything_is_loaded(photo, monkeypatch):
    monkeypatch.setattr("kosmos_g_diffusers.control.controls.load_annotator", None)
    with pytest.raises(ValueError, match="'canny' has no parameter threshold. It has: low, high"):
        control_image("canny", photo, threshold=3)
    with pytest.raises(ValueError, match="'tile' has no parameter low. It has: none"):
        control_image("tile", photo, low=3)
    with pytest.raises(
        ValueError, match="low of the control 'canny' is -1; expected a number from 0 to 2000"
    ):
        control_image("canny", photo, low=-1)
    with pytest.raises(ValueError, match="score of the control 'mlsd' is nan"):
        control_image("mlsd", photo, score=float("nan"))
    with pytest.raises(TypeError, match="low of the control 'canny' is of type float; expected int"):
        control_image("canny", photo, low=1.5)
    with pytest.raises(TypeError, match="coarse of the control 'lineart' is of type int; expected bool"):
        control_image("lineart", photo, coarse=1)


def test_picture_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="The image of the control 'tile' cannot be read from .*nowhere.png"):
        control_image("tile", tmp_path / "nowhere.png")
    with pytest.raises(TypeError, match="The image of the control 'tile' is of type int"):
        control_image("tile", 3)


# Size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "wanted", "size"),
    [
        ((451, 300), {}, (296, 448)),
        ((512, 768), {}, (768, 512)),
        ((451, 300), {"short_side": 512}, (512, 768)),
        ((300, 451), {"short_side": 64}, (96, 64)),
        ((451, 300), {"height": 64}, (64, 96)),
        ((451, 300), {"width": 64}, (40, 64)),
        ((451, 300), {"height": 296, "width": 448}, (296, 448)),
        ((8, 9), {}, (8, 8)),
    ],
)
def test_size_is_that_of_the_picture_rounded_to_multiples_of_8(picture, wanted, size):
    assert control_size(PIL.Image.new("RGB", picture), **wanted) == size
    image = control_image("tile", PIL.Image.new("RGB", picture), **wanted)
    assert (image.height, image.width) == size


@pytest.mark.parametrize(
    ("picture", "wanted", "message"),
    [
        (
            (451, 300),
            {"height": 64, "width": 64},
            "64 x 64 pixels .* 451 x 300, has another shape: 96 x 64 fits",
        ),
        ((100, 100), {"height": 64, "width": 72}, "72 x 64 pixels"),
        ((451, 300), {"height": 60}, "side of 60 pixels was asked for; expected a multiple of 8"),
        ((451, 300), {"short_side": 0}, "side of 0 pixels"),
        ((7, 64), {}, "7 x 64 pixels makes no control image"),
        ((4000, 400), {"short_side": 512}, "at most 8 times the shorter"),
    ],
)
def test_size_of_another_shape_is_refused(picture, wanted, message):
    with pytest.raises(ValueError, match=message):
        control_size(PIL.Image.new("RGB", picture), **wanted)


# Annotators that need no download --------------------------------------------------------------------------------


def test_canny_finds_the_edges_that_opencv_finds(aux, photo):
    import cv2

    for size in ((448, 256), (440, 296)):  # multiples of 64, which no detector bends, and others
        picture = photo.resize(size)
        found = np.asarray(control_image("canny", picture, low=60, high=180))
        expected = cv2.Canny(np.asarray(picture), 60, 180)
        inside = slice(0, -8)  # the mirrored margin may begin or end an edge near the right and lower border
        assert found.shape == (*expected.shape, 3)
        assert np.mean(found[inside, inside, 0] != expected[inside, inside]) < 0.005
        assert set(np.unique(found)) == {0, 255}


def test_canny_parameters_change_the_edges(aux, photo):
    few, many = (np.asarray(control_image("canny", photo, high=high)).mean() for high in (600, 100))
    assert 0 < few < many


def test_controls_keep_shapes_where_they_are(aux):
    picture = PIL.Image.new("RGB", (200, 120), "white")
    picture.paste("black", (60, 40, 64, 80))  # an upright bar
    for name in ("canny", "lineart_standard", "drawing"):
        rows, columns = np.nonzero(np.asarray(control_image(name, picture).convert("L")) > 127)
        assert abs(rows.mean() - 59.5) < 2 and abs(columns.mean() - 61.5) < 2, name


def test_shuffle_keeps_colours_follows_its_seed_and_leaves_numpy_alone(aux, photo):
    before = np.random.get_state()[1].copy()
    first, again, other = (
        np.asarray(control_image("shuffle", photo, seed=seed)).astype(float) for seed in (1, 1, 2)
    )
    assert np.array_equal(np.random.get_state()[1], before)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.abs(first - np.asarray(photo.resize((448, 296)))).mean() > 10
    assert first.max() <= np.asarray(photo).max()


def test_drawing_of_any_kind_becomes_white_strokes_on_black():
    canvas = np.full((64, 96, 3), 255, dtype=np.uint8)
    canvas[20:24, 10:80] = (40, 0, 60)
    image = control_image("drawing", canvas)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image) == 255, canvas < 127)
    assert control_image("drawing", torch.from_numpy(canvas).permute(2, 0, 1)).tobytes() == image.tobytes()
    assert control_image("drawing", PIL.Image.fromarray(canvas)).tobytes() == image.tobytes()


def test_nothing_found_is_said(logged):
    control_image("drawing", PIL.Image.new("RGB", (64, 64), "white"))
    assert "'drawing' found nothing" in logged.text


@pytest.mark.parametrize("name", ["tile", "ip2p"])
def test_picture_itself_is_a_control(photo, name):
    assert load_annotator(name) is None
    assert (
        control_image(name, photo.crop((0, 0, 448, 296))).tobytes() == photo.crop((0, 0, 448, 296)).tobytes()
    )


def test_inpaint_marks_the_holes_and_a_file_of_it_gives_them_back(photo, tmp_path):
    mask = PIL.Image.new("L", photo.size)
    mask.paste(255, (100, 50, 200, 150))
    control = control_image("inpaint", photo, mask=mask, short_side=64)
    assert control.shape == (1, 3, 64, 96) and control.dtype == torch.float32
    holes = (control == -1).all(dim=1)[0]
    assert holes[20, 30] and not holes[5, 5] and 0.07 < holes.float().mean() < 0.08
    assert control[:, :, ~holes].min() >= 0
    control_preview(control).save(tmp_path / "holes.png")
    assert torch.equal(open_control("inpaint", tmp_path / "holes.png"), control)
    assert control_preview(photo) is photo


def test_inpaint_needs_a_mask_of_the_size_of_the_picture_and_others_take_none(photo, tmp_path):
    with pytest.raises(ValueError, match="'inpaint' needs a mask"):
        control_image("inpaint", photo)
    with pytest.raises(ValueError, match="is 8 x 8 pixels, its image 451 x 300"):
        control_image("inpaint", photo, mask=PIL.Image.new("L", (8, 8)))
    with pytest.raises(ValueError, match="'tile' takes no mask"):
        control_image("tile", photo, mask=photo)
    photo.resize((64, 64)).save(tmp_path / "opaque.png")
    with pytest.raises(ValueError, match="has no transparent pixels"):
        open_control("inpaint", tmp_path / "opaque.png")


MARKED = np.zeros((16, 24), dtype=bool)
MARKED[4:12, 8:20] = True


def on_transparent(colour):
    image = PIL.Image.new("RGBA", (24, 16), (255, 255, 255, 0))
    image.paste((*colour, 255), mask=PIL.Image.fromarray(MARKED))
    return image


@pytest.mark.parametrize(
    "mask",
    [
        PIL.Image.fromarray(MARKED),
        PIL.Image.fromarray(MARKED.astype(np.uint8)),
        on_transparent((255, 255, 255)),
        on_transparent((0, 0, 0)),
        MARKED,
        MARKED.astype(np.uint8),
        torch.from_numpy(MARKED)[None],
    ],
    ids=[
        "1",
        "0 and 1",
        "white on transparent",
        "black on transparent",
        "bool",
        "uint8 of 0 and 1",
        "tensor",
    ],
)
def test_mask_of_inpaint_is_read_as_it_is_meant(photo, mask):
    control = control_image("inpaint", photo.resize((24, 16)), mask=mask)
    assert ((control == -1).all(dim=1)[0].numpy() == MARKED).all()


@pytest.mark.parametrize(
    "mask", [PIL.Image.new("L", (24, 16)), PIL.Image.new("L", (24, 16), 100), PIL.Image.new("RGBA", (24, 16))]
)
def test_mask_without_a_hole_makes_no_control_image(photo, mask):
    with pytest.raises(ValueError, match="mask of the control 'inpaint' (has no hole|marks nothing)"):
        control_image("inpaint", photo.resize((24, 16)), mask=mask)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_holes_and_picture_are_turned_alike_by_exif(photo, tmp_path, orientation):
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation -> PIL.Image.Transpose
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    photo, mask = photo.resize((24, 16)), PIL.Image.fromarray(MARKED)
    turned = [
        image.transpose(turns[orientation]) if orientation in turns else image for image in (photo, mask)
    ]
    upright = control_image("inpaint", turned[0], mask=turned[1])
    for name, image in (("photo", photo), ("mask", mask)):
        image.save(tmp_path / f"{name}.png", exif=exif)
    made = control_image("inpaint", tmp_path / "photo.png", mask=tmp_path / "mask.png")
    assert torch.equal(made, upright)
    control_preview(control_image("inpaint", photo, mask=mask)).save(tmp_path / "holes.png", exif=exif)
    assert torch.equal(open_control("inpaint", tmp_path / "holes.png"), upright)


# Annotators with weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hed", "softedge", "lineart", "mlsd", "scribble"])
def test_detector_runs_on_weights_of_a_folder(weights, photo, name):
    annotator = load_annotator(name, weights)
    first, other = (
        control_image(name, picture, annotator=annotator, resolution=64, short_side=64)
        for picture in (photo, photo.rotate(180))
    )
    assert first.size == other.size == (96, 64) and first.mode == "RGB"
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("name", DETECTORS)
def test_table_says_what_a_detector_is_called_with(name, photo, monkeypatch):
    calls = []

    class Recorder:
        @classmethod
        def from_pretrained(cls, weights):
            calls.append(weights)
            return cls()

        def to(self, device):
            calls.append(device)
            return self

        def __call__(self, array, **arguments):
            calls.append((array.shape, arguments))
            return PIL.Image.fromarray(255 - array)

    control = CONTROLS[name]
    module, class_name = control.annotator.split(".")
    modules = {module: types.SimpleNamespace(**{class_name: Recorder})}
    monkeypatch.setattr(annotators, "aux_module", modules.__getitem__)
    image = control_image(name, photo, device="meta", resolution=100)
    assert calls[:2] == ["lllyasviel/Annotators", "meta"]
    shape, arguments = calls[2]
    assert shape == (128, 192, 3)  # 150 x 100 and a margin
    assert (arguments.pop("detect_resolution"), arguments.pop("image_resolution")) == (128, 128)
    knobs = {
        knob.keyword or key: knob.default for key, knob in control.parameters.items() if key != "resolution"
    }
    assert arguments == {**knobs, **control.arguments}
    assert image.size == (448, 296)
    # and what comes back is where it was in the picture
    expected = PIL.Image.eval(photo.resize((448, 296)), lambda value: 255 - value)
    assert np.abs(np.asarray(image).astype(float) - np.asarray(expected)).mean() < 8


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_of_the_table_take_its_keywords(aux, name):
    import inspect

    control = CONTROLS[name]
    module, class_name = control.annotator.split(".")
    if name not in LIGHT:
        for package in ("torchvision", "scipy", "skimage"):
            pytest.importorskip(package, reason=f"{class_name} needs {package}")
    parameters = inspect.signature(getattr(annotators.aux_module(module), class_name).__call__).parameters
    knobs = {knob.keyword or key for key, knob in control.parameters.items()} - {"resolution"}
    assert knobs | set(control.arguments) | set(annotators.SIZES) <= set(parameters)


def save_image_processor(name, side, folder):
    module, _, class_name = name.rpartition(".")
    try:
        module = importlib.import_module(f"transformers.models.{module}")
        getattr(module, class_name)(size={"height": side, "width": side}).save_pretrained(folder)
    except ImportError:
        pytest.skip("the image processors of this transformers need torchvision")


def test_depth_is_that_of_the_transformers_model(tmp_path, photo):
    from transformers import DPTConfig, DPTForDepthEstimation

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = DPTConfig(
        **sizes,
        image_size=32,
        patch_size=16,
        is_hybrid=False,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    torch.manual_seed(0)
    DPTForDepthEstimation(config).save_pretrained(tmp_path)
    save_image_processor("dpt.image_processing_pil_dpt.DPTImageProcessorPil", 32, tmp_path)
    image = control_image("depth", photo, weights=tmp_path)
    assert image.size == (448, 296) and image.mode == "RGB"
    assert image.getextrema()[0] == (0, 255)


def test_segmentation_has_the_colours_of_ade20k(aux, tmp_path, photo):
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextConfig(
        hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=8, auxiliary_channels=4, auxiliary_in_channels=8, num_labels=150
    )
    torch.manual_seed(0)
    UperNetForSemanticSegmentation(config).save_pretrained(tmp_path)
    save_image_processor("segformer.image_processing_pil_segformer.SegformerImageProcessorPil", 64, tmp_path)
    image = control_image("segmentation", photo, weights=tmp_path)
    assert image.size == (448, 296)
    palette = {tuple(colour) for colour in annotators.aux_module("util").ade_palette()}
    assert {colour for _, colour in image.getcolors(1000)} <= palette


@pytest.mark.parametrize("name", [*LIGHT, "depth", "segmentation"])
def test_weights_that_cannot_be_fetched_are_named_with_the_command_that_fetches_them(aux, empty_cache, name):
    with pytest.raises(ValueError) as caught:
        load_annotator(name)
    control = CONTROLS[name]
    message = str(caught.value)
    assert f"weights of the control {name!r} cannot be loaded from {control.weights!r}" in message
    assert message.endswith(
        " ".join(["run where there is a network: hf download", control.weights, *control.files])
    )


def test_broken_or_missing_file_of_weights_is_named(aux, tmp_path):
    with pytest.raises(ValueError, match=f"'mlsd' cannot be loaded from '{tmp_path}'.*No such file"):
        load_annotator("mlsd", tmp_path)
    (tmp_path / "mlsd_large_512_fp32.pth").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=f"'mlsd' cannot be loaded from '{tmp_path}'"):
        load_annotator("mlsd", tmp_path)
    torch.save({"other": torch.zeros(1)}, tmp_path / "mlsd_large_512_fp32.pth")
    with pytest.raises(ValueError, match=f"'mlsd' cannot be loaded from '{tmp_path}'"):
        load_annotator("mlsd", tmp_path)
    with pytest.raises(ValueError, match="'canny' reads no weights"):
        load_annotator("canny", tmp_path)


# The extra -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_import(monkeypatch):
    """Nothing of controlnet_aux has been imported yet, and nothing is when the test ends."""
    package = f"{annotators.__package__}._controlnet_aux"
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]


def test_missing_extra_names_its_install_command(fresh_import, monkeypatch, photo):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'kosmos-g-diffusers\[control\]'"):
        control_image("canny", photo)
    control_image("tile", photo)


def test_missing_dependency_of_one_annotator_leaves_the_others(aux, fresh_import, monkeypatch, photo):
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ImportError, match=r"controlnet_aux.hed cannot be imported .*einops.*\[control\]"):
        load_annotator("hed")
    control_image("canny", photo)


def test_nothing_that_controlnet_aux_says_at_import_reaches_the_user(aux, fresh_import, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for module in (
            "canny",
            "hed",
            "lineart",
            "lineart_anime",
            "lineart_standard",
            "mlsd",
            "pidi",
            "shuffle",
        ):
            annotators.aux_module(module)
        for module, needs in (
            ("open_pose", ("torchvision", "scipy", "skimage")),
            ("normalbae", ("torchvision",)),
        ):
            if all(importlib.util.find_spec(package) for package in needs):
                annotators.aux_module(module)
    assert [str(warning.message) for warning in caught] == []
    assert capfd.readouterr() == ("", "")
    assert "controlnet_aux" not in sys.modules


# ControlNets and pipelines ---------------------------------------------------------------------------------------


@pytest.fixture
def control_pipe(pipe):
    return KosmosGControlNetPipeline.from_pipe(pipe, controlnet=build_random_controlnet(pipe.unet))


@pytest.fixture
def stripes():
    """Two control images of 64 x 64 pixels."""
    upright = np.zeros((64, 64, 3), dtype=np.uint8)
    upright[:, ::8] = 255
    return PIL.Image.fromarray(upright), PIL.Image.fromarray(upright.transpose(1, 0, 2).copy())


def test_image_follows_control_image_and_prompt(control_pipe, draw, photos, stripes):
    def drawn(picture, control, **kwargs):
        return draw(control_pipe, "<i> a hat", images=[picture], image=control, height=64, width=64, **kwargs)

    image = drawn(photos[0], stripes[0])
    assert np.array_equal(drawn(photos[0], stripes[0]), image)
    assert not np.allclose(drawn(photos[0], stripes[1]), image, atol=1e-3)
    assert not np.allclose(drawn(photos[1], stripes[0]), image, atol=1e-3)
    assert not np.allclose(drawn(photos[0], stripes[0], controlnet_conditioning_scale=0.1), image, atol=1e-3)


def test_inpaint_control_reaches_the_controlnet_with_its_holes(control_pipe, draw, photos, monkeypatch):
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    control = control_image("inpaint", photos[3].resize((64, 64)), mask=mask)
    seen = []
    forward = control_pipe.controlnet.forward

    def record(*args, controlnet_cond, **kwargs):
        seen.append(controlnet_cond)
        return forward(*args, controlnet_cond=controlnet_cond, **kwargs)

    monkeypatch.setattr(control_pipe.controlnet, "forward", record)
    draw(control_pipe, "a hat", image=control, height=64, width=64)
    assert torch.equal(seen[0][:1], control)


def test_random_controlnet_comes_from_its_seed_and_leaves_torch_alone(pipe):
    before = torch.random.get_rng_state()
    first, again, other = (build_random_controlnet(pipe.unet, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    zero = "controlnet_mid_block.weight"
    assert first[zero].any() and not torch.equal(first[zero], other[zero])


def test_controlnet_of_a_folder_is_loaded_in_the_dtype_asked_for(pipe, tmp_path):
    controlnet = build_random_controlnet(pipe.unet)
    controlnet.save_pretrained(tmp_path)
    loaded = load_controlnet(tmp_path, torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert torch.equal(loaded.conv_in.weight, controlnet.conv_in.weight.bfloat16())


def test_controlnet_that_cannot_be_loaded_is_named(empty_cache, tmp_path):
    with pytest.raises(ValueError, match="hf download lllyasviel/control_v11p_sd15_canny$"):
        load_controlnet("canny")
    with pytest.raises(ValueError, match="The ControlNet 'someone/else' cannot be loaded"):
        load_controlnet("someone/else")
    with pytest.raises(ValueError, match=f"The ControlNet '{tmp_path}' cannot be loaded"):
        load_controlnet(tmp_path)
    with pytest.raises(
        ValueError, match="'cany' is not a folder, a Hub id or a control. Known controls: canny,"
    ):
        load_controlnet("cany")


# The commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_unet():
    """The U-Net of the small model that ships."""
    return UNet2DConditionModel.from_pretrained(SPRITES, subfolder="unet", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch, small_unet):
    """A working folder with the two example photos, and with two drawings of 64 x 64 pixels.

    The small model has a ControlNet of random weights for every control; the one that ships is for canny alone.
    """

    def load(source, dtype):
        if source not in CONTROLS:
            return load_controlnet(source, dtype)
        return build_random_controlnet(small_unet, sum(map(ord, source)), 4)

    monkeypatch.setattr("kosmos_g_diffusers.sprites.pretrained.sprites_controlnet", lambda name: name)
    monkeypatch.setattr("kosmos_g_diffusers.generation.generate.load_controlnet", load)
    for name in ("cat.jpg", "coffee.jpg"):
        (tmp_path / name).write_bytes((PHOTOS / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    for name, box in (("a.png", (10, 10, 50, 20)), ("b.png", (40, 5, 60, 60))):
        drawing = PIL.Image.new("RGB", (64, 64), "white")
        drawing.paste("black", box)
        drawing.save(name)
    return tmp_path


def generate(*arguments):
    return main(["generate", *arguments])


def pixels(path):
    return PIL.Image.open(path).tobytes()


def fails(capsys, *arguments):
    """Run `kosmos-g` and return its one line of error."""
    capsys.readouterr()
    assert main([*arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "kosmos-g: error:" in line]
    assert len(lines) == 1
    return lines[0]


A_HAT = ("a hat", "--seed", "1", "--steps", "2")


def test_control_command_writes_what_the_library_makes(folder, aux, capsys):
    assert main(["control", "canny", "cat.jpg", "-o", "edges.png", "--low", "50", "--high", "150"]) == 0
    assert capsys.readouterr().out == "edges.png\n"
    assert pixels("edges.png") == control_image("canny", "cat.jpg", low=50, high=150).tobytes()
    assert "edges.png would be overwritten. Pass --force" in fails(
        capsys, "control", "canny", "cat.jpg", "-o", "edges.png"
    )
    assert main(["control", "canny", "cat.jpg", "-o", "edges.png", "--short-side", "64", "--force"]) == 0
    assert PIL.Image.open("edges.png").size == (96, 64)


def test_control_image_is_saved_over_another_only_when_asked(tmp_path):
    path, first, second = (
        tmp_path / "edges.png",
        *(PIL.Image.new("RGB", (8, 8), name) for name in ("red", "blue")),
    )
    save_control(first, path)
    with pytest.raises(FileExistsError, match="edges.png is there already"):
        save_control(second, path)
    assert pixels(path) == first.tobytes()
    save_control(second, path, overwrite=True)
    assert pixels(path) == second.tobytes() and [found.name for found in tmp_path.iterdir()] == ["edges.png"]


def test_control_command_prints_the_table(capsys):
    assert main(["control", "--list"]) == 0
    table = capsys.readouterr().out
    for name, control in CONTROLS.items():
        assert f"\n{name} " in f"\n{table}" and control.controlnet in table and control.description in table


def test_every_parameter_of_the_table_has_a_flag():
    for control in CONTROLS.values():
        for name, parameter in control.parameters.items():
            value = [] if isinstance(parameter.default, bool) else [str(parameter.default)]
            arguments = build_parser().parse_args(["control", "canny", "x.png", f"--{name}", *value])
            given = getattr(arguments, name)
            assert type(given) is type(parameter.default)
            assert given == (parameter.default or given)


def test_control_command_explains_mistakes(folder, capsys):
    assert "kosmos-g control canny photo.png" in fails(capsys, "control")
    assert "There is no control 'cany'. Known: canny" in fails(capsys, "control", "cany", "cat.jpg")
    assert "cannot be read from 'no.jpg'" in fails(capsys, "control", "tile", "no.jpg")
    assert "'tile' has no parameter low" in fails(capsys, "control", "tile", "cat.jpg", "--low", "3")
    assert "does not end in .png" in fails(capsys, "control", "tile", "cat.jpg", "-o", "x.jpg")
    assert "'inpaint' needs a mask" in fails(capsys, "control", "inpaint", "cat.jpg")
    assert not Path("control.png").exists()


def test_generation_under_a_control_is_recorded_and_made_again_from_its_png(folder, capsys):
    for name in ("a", "b"):
        assert generate(*A_HAT, "--control", f"drawing:{name}.png", "--output", f"{name}_out.png") == 0
    assert pixels("a_out.png") != pixels("b_out.png")
    settings = read_settings("a_out.png")
    assert settings.controls == (ControlInput("drawing", InputImage.from_file("a.png")),)
    assert (settings.height, settings.width) == (64, 64)
    assert generate("--from", "a_out.png", "--output", "again.png") == 0
    assert pixels("again.png") == pixels("a_out.png")
    flags = ["--control-scale", "0.3", "--control-start", "0.1", "--control-end", "0.9"]
    assert generate("--from", "a_out.png", "--output", "weak.png", *flags) == 0
    assert pixels("weak.png") != pixels("a_out.png")
    weak = read_settings("weak.png").controls[0]
    assert (weak.scale, weak.start, weak.end) == (0.3, 0.1, 0.9)
    capsys.readouterr()
    assert generate("--from", "weak.png", "--show") == 0
    assert json.loads(capsys.readouterr().out)["controls"][0]["picture"]["path"] == "a.png"


def test_control_image_that_is_ready_gives_the_same_image(folder):
    generate(*A_HAT, "--control", "drawing:a.png")
    main(["control", "drawing", "a.png", "-o", "ready.png"])
    generate(*A_HAT, "--control", "drawing:@ready.png", "--output", "same.png")
    assert pixels("same.png") == pixels("out.png")
    assert read_settings("same.png").controls[0].ready
    assert term_of("same.png") == DRAWN and term_of("ready.png") is None


def test_several_controls_act_together_each_with_its_own_strength(folder):
    two = ["--control", "drawing:a.png", "--control", "tile:b.png"]
    assert generate(*A_HAT, *two, "--control-scale", "1", "--control-scale", "0.4") == 0
    assert (
        generate(*A_HAT, *two, "--control-scale", "0.4", "--control-scale", "1", "--output", "b_out.png") == 0
    )
    assert pixels("out.png") != pixels("b_out.png")
    assert [control.scale for control in read_settings("out.png").controls] == [1.0, 0.4]
    assert term_of("out.png") == COMPOSITE  # tile shows the image itself
    assert generate("--from", "out.png", "--output", "again.png") == 0
    assert pixels("again.png") == pixels("out.png")


def test_controlnet_of_a_folder_is_used_and_recorded(folder, small_unet):
    build_random_controlnet(small_unet, 5, vae_scale_factor=4).save_pretrained("net")
    generate(*A_HAT, "--control", "drawing:a.png")
    assert generate(*A_HAT, "--control", "drawing:a.png", "--controlnet", "net", "--output", "net.png") == 0
    assert pixels("net.png") != pixels("out.png")
    assert read_settings("net.png").controls[0].controlnet == "net"
    assert generate("--from", "net.png", "--output", "again.png") == 0
    assert pixels("again.png") == pixels("net.png")


def test_controlnet_that_ships_is_for_canny_alone(small_unet):
    controlnet = load_controlnet(sprites_controlnet("canny"), torch.float16)
    assert controlnet.dtype == torch.float16
    assert controlnet.config.cross_attention_dim == small_unet.config.cross_attention_dim
    with pytest.raises(ValueError, match="for canny alone, and 'depth' was asked for"):
        sprites_controlnet("depth")


def test_image_has_the_shape_of_the_picture_and_the_size_of_the_model_or_of_the_control_image(folder):
    generate(*A_HAT, "--control", "tile:cat.jpg")
    assert PIL.Image.open("out.png").size == (96, 64)
    generate(*A_HAT, "--control", "tile:cat.jpg", "--height", "32", "--output", "b_out.png")
    assert PIL.Image.open("b_out.png").size == (48, 32)
    PIL.Image.open("cat.jpg").resize((72, 48)).save("ready.png")
    two = ["--control", "tile:cat.jpg", "--control", "tile:@ready.png"]
    generate(*A_HAT, *two, "--output", "c_out.png")
    assert PIL.Image.open("c_out.png").size == (72, 48)


def test_mistakes_with_controls_are_explained(folder, capsys):
    def error(*arguments):
        return fails(capsys, "generate", *A_HAT, *arguments)

    drawing = ("--control", "drawing:a.png")
    assert "'drawing' is not of the form KIND:FILE" in error("--control", "drawing")
    assert "There is no control 'cany'. Known: canny" in error("--control", "cany:a.png")
    assert "There is no file at 'no.png'" in error("--control", "drawing:no.png")
    assert "2 --control-scale and 1 --control" in error(
        *drawing, "--control-scale", "1", "--control-scale", "1"
    )
    assert "1 --control-end and 0 --control" in error("--control-end", "1")
    assert "start is 0.5 and control end 0.5" in error(
        *drawing, "--control-start", "0.5", "--control-end", "0.5"
    )
    assert "scale is nan" in error(*drawing, "--control-scale", "nan")
    assert "needs a mask. Make its control image with kosmos-g control" in error("--control", "inpaint:a.png")
    assert "451 x 300 pixels; expected multiples of 8" in error("--control", "tile:@cat.jpg")
    assert "has another shape: 96 x 64 fits" in error("--control", "tile:cat.jpg", "--control", "tile:@a.png")
    PIL.Image.open("a.png").resize((32, 32)).save("small.png")
    assert "(32, 32), and an image of (64, 64)" in error(
        "--control", "tile:@a.png", "--control", "tile:@small.png"
    )
    assert "'nowhere' is not a folder, a Hub id or a control" in error(*drawing, "--controlnet", "nowhere")
    assert not Path("out.png").exists()


def test_changed_control_picture_is_named(folder, capsys):
    generate(*A_HAT, "--control", "drawing:a.png")
    Path("a.png").write_bytes(Path("b.png").read_bytes())
    assert "'a.png' has changed since. Pass --control anew." in fails(capsys, "generate", "--from", "out.png")


def test_nothing_is_downloaded_because_a_png_names_it(folder, capsys):
    control = ControlInput("drawing", InputImage.from_file("a.png"), controlnet="someone/else")
    write_png(PIL.Image.new("RGB", (8, 8)), "theirs.png", GenerationSettings("a hat", controls=(control,)))
    message = fails(capsys, "generate", "--from", "theirs.png")
    assert (
        "The PNG names the ControlNet 'someone/else', which is not here. Pass it with --controlnet."
        in message
    )
    for place in ({"controlnet": "//server/x"}, {"picture": replace(control.picture, path="\\\\server\\x")}):
        settings = GenerationSettings("a hat", controls=(replace(control, **place),))
        write_png(PIL.Image.new("RGB", (8, 8)), "theirs.png", settings, overwrite=True)
        assert "is a path on another machine" in fails(capsys, "generate", "--from", "theirs.png")


def test_controls_of_settings_are_checked(folder):
    picture = InputImage.from_file("a.png")
    settings = GenerationSettings(
        "a hat", controls=(ControlInput("drawing", picture, True, "net", 0.5, 0.1, 0.9),)
    )
    assert GenerationSettings.from_json(settings.to_json()) == settings
    record = json.loads(settings.to_json())
    for change in (
        {"name": "cany"},
        {"scale": "1"},
        {"scale": -1},
        {"ready": 1},
        {"start": 0.9},
        {"picture": {"path": "a.png"}},
        {"picture": None},
        {"extra": 1},
    ):
        record["controls"] = [{**json.loads(settings.to_json())["controls"][0], **change}]
        with pytest.raises((TypeError, ValueError)):
            GenerationSettings.from_json(json.dumps(record))
    for controls in ("drawing", [3], [{}]):
        with pytest.raises((TypeError, ValueError)):
            GenerationSettings.from_json(json.dumps({**record, "controls": controls}))
    with pytest.raises(TypeError, match="something other than ControlInput"):
        GenerationSettings("a hat", controls=("drawing:a.png",))


# ---------------------------------------------------------------------------------------------------------------------
# PROPOSED PATCH of KosmosGPromptMixin: `check_controls`. These tests are skipped until pipeline_kosmos_g.py has it; move
# them to test_pipeline_kosmos_g.py with it, if that reads better.
# ---------------------------------------------------------------------------------------------------------------------

needs_patch = pytest.mark.skipif(
    not hasattr(KosmosGPromptMixin, "check_controls"),
    reason="proposed check of control images is not in yet",
)


def _blank(width, height, kind="pil"):
    image = PIL.Image.new("RGB", (width, height))
    if kind == "pil":
        return image
    array = np.zeros((height, width, 3), dtype=np.float32)
    return array if kind == "np" else torch.from_numpy(array).permute(2, 0, 1)


@needs_patch
@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
@pytest.mark.parametrize(
    ("sizes", "arguments", "message"),
    [
        ([(60, 64)], {}, "60 x 64 pixels was given. Expected multiples of 8: 56 x 64"),
        ([(32, 64)], {"height": 64, "width": 64}, "32 x 64 .* height and width of 64 x 64"),
        ([(64, 32), (64, 64)], {"prompt": ["a", "b"]}, "64 x 32 .* another of 64 x 64"),
        ([(64, 64)] * 3, {"prompt": ["a", "b"]}, "3 control images were given for 2 prompts"),
        ([(64, 64)] * 2, {}, "2 control images were given for 1 prompts"),
    ],
)
def test_control_image_of_another_size_or_count_is_refused(
    control_pipe, no_model_runs, kind, sizes, arguments, message
):
    images = [_blank(*size, kind) for size in sizes]
    with no_model_runs(control_pipe), pytest.raises(ValueError, match=message):
        control_pipe(**{"prompt": "a hat", "image": images[0] if len(images) == 1 else images, **arguments})


@needs_patch
@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        ([(64, 64)], {}, "1 control images were given for 2 ControlNets"),
        ([(64, 64)] * 3, {}, "3 control images were given for 2 ControlNets"),
        (
            [[(64, 64)] * 3, [(64, 64)] * 3],
            {"prompt": ["a", "b"]},
            "3 control images were given for 2 ControlNets",
        ),
        ([[(64, 64)] * 2] * 3, {"prompt": ["a", "b"]}, "3 control images were given for 2 prompts"),
        ([(64, 64), (32, 64)], {}, "64 x 64 .* another of 32 x 64"),
        (
            [(64, 64)] * 2,
            {"controlnet_conditioning_scale": [1.0]},
            "1 controlnet_conditioning_scale .* 2 ControlNets",
        ),
    ],
)
def test_control_images_that_do_not_fit_several_controlnets_are_refused(
    pipe, no_model_runs, images, arguments, message
):
    nets = [build_random_controlnet(pipe.unet, seed) for seed in (0, 1)]
    several = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=MultiControlNetModel(nets))
    images = [[_blank(*size) for size in row] if isinstance(row, list) else _blank(*row) for row in images]
    with no_model_runs(several), pytest.raises(ValueError, match=message):
        several(**{"prompt": "a hat", "image": images, **arguments})


@needs_patch
def test_control_image_of_another_size_than_the_image_to_be_changed_is_refused(pipe, no_model_runs):
    changing = KosmosGControlNetImg2ImgPipeline.from_pipe(pipe, controlnet=build_random_controlnet(pipe.unet))
    with (
        no_model_runs(changing),
        pytest.raises(ValueError, match="64 x 64 .* image to be changed of 64 x 32"),
    ):
        changing("a hat", image=_blank(64, 35), control_image=_blank(64, 64))


@needs_patch
def test_control_images_that_fit_are_accepted_in_every_form(pipe, control_pipe, draw):
    settings = {"height": None, "width": None}
    for kind in ("pil", "np", "pt"):  # diffusers takes a single array or tensor in a list alone
        assert draw(control_pipe, "a hat", image=[_blank(64, 32, kind)], **settings).shape[1:3] == (32, 64)
    assert draw(control_pipe, ["a", "b"], [_blank(64, 32)] * 2, **settings).shape == (2, 32, 64, 3)
    batch = torch.zeros(2, 3, 32, 64)
    assert draw(control_pipe, ["a", "b"], image=batch, **settings).shape == (2, 32, 64, 3)
    nets = [build_random_controlnet(pipe.unet, seed) for seed in (0, 1)]
    several = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=MultiControlNetModel(nets))
    rows = [[_blank(64, 32), _blank(64, 32)]] * 2
    assert draw(several, ["a", "b"], image=rows, **settings).shape == (2, 32, 64, 3)
    changing = KosmosGControlNetImg2ImgPipeline.from_pipe(pipe, controlnet=build_random_controlnet(pipe.unet))
    images = {"image": _blank(70, 35), "control_image": _blank(64, 32)}
    assert draw(changing, "a hat", **images, strength=1.0, **settings).shape == (1, 32, 64, 3)
