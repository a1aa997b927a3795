"""Images to be changed, control images and masks, in whatever form people have them, mean what a plain RGB or L image means."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from kosmos_g_diffusers import (
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
)
from kosmos_g_diffusers.processing_kosmos_g import open_image

AS_IT_IS = {"height": None, "width": None}


def change(pipe, *args, **kwargs):
    """What an image-to-image pipeline, which takes no size, makes of an image, as an array."""
    settings = {"strength": 0.5, "num_inference_steps": 2, "output_type": "np"}
    return pipe(*args, **kwargs, **settings, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def parts(build_pipe, build_controlnet):
    pipe = build_pipe()
    return pipe, build_controlnet(pipe.unet)


@pytest.fixture(scope="module")
def build(parts):
    pipe, controlnet = parts

    def build(cls):
        return cls.from_pipe(pipe, **({"controlnet": controlnet} if "ControlNet" in cls.__name__ else {}))

    return build


@pytest.fixture(scope="module")
def picture(photos):
    return photos[2].resize((16, 16))


@pytest.fixture(scope="module")
def mask():
    mask = PIL.Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    return mask


def with_alpha(picture):
    alpha = PIL.Image.linear_gradient("L").resize(picture.size)
    picture = picture.convert("RGB")
    picture.putalpha(alpha)
    return picture


def file(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def turned(picture):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return PIL.Image.open(io.BytesIO(file(picture, exif=exif.tobytes())))


def sixteen_bits(picture):
    return PIL.Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


PICTURES = {
    "RGBA": with_alpha,
    "LA": lambda picture: with_alpha(picture).convert("LA"),
    "CMYK": lambda picture: picture.convert("CMYK"),
    "L": lambda picture: picture.convert("L"),
    "P": lambda picture: picture.convert("P", palette=PIL.Image.Palette.ADAPTIVE, colors=8),
    "1": lambda picture: picture.convert("1"),
    "I;16": sixteen_bits,
    "turned by EXIF": turned,
    "bytes": file,
    "uint8 array": np.asarray,
    "uint8 RGBA array": lambda picture: np.asarray(with_alpha(picture)),
    "uint8 L array": lambda picture: np.asarray(picture.convert("L")),
}


def image_of(given):
    """The RGB image that is meant, by Pillow."""
    return open_image(PIL.Image.fromarray(given) if isinstance(given, np.ndarray) else given, "It")


@pytest.mark.parametrize("kind", PICTURES)
def test_image_to_be_changed_means_its_picture(build, picture, kind):
    given = PICTURES[kind](picture)
    pipe = build(KosmosGImg2ImgPipeline)
    meant = change(pipe, "a hat", image=image_of(given))
    assert (change(pipe, "a hat", image=given) == meant).all()
    assert (change(pipe, "a hat", image=[given]) == meant).all()


@pytest.mark.parametrize(
    "cls",
    [
        KosmosGInpaintPipeline,
        KosmosGControlNetImg2ImgPipeline,
        KosmosGControlNetInpaintPipeline,
        KosmosGControlNetPipeline,
    ],
)
@pytest.mark.parametrize("kind", ["RGBA", "CMYK", "uint8 L array", "bytes"])
def test_every_image_of_every_pipeline_means_its_picture(build, draw, picture, mask, cls, kind):
    pipe, given = build(cls), PICTURES[kind](picture)
    names = (
        ["image"]
        if cls in (KosmosGInpaintPipeline, KosmosGControlNetPipeline)
        else ["image", "control_image"]
    )
    masks = {"mask_image": mask} if "Inpaint" in cls.__name__ else {}
    meant = draw(pipe, "a hat", **dict.fromkeys(names, image_of(given)), **masks)
    assert (draw(pipe, "a hat", **dict.fromkeys(names, given), **masks) == meant).all()


def test_path_and_url_are_images_to_be_changed_and_masks(build, draw, picture, mask, tmp_path):
    picture.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    pipe = build(KosmosGInpaintPipeline)
    meant = draw(pipe, "a hat", image=picture, mask_image=mask)
    paths = {"image": str(tmp_path / "photo.png"), "mask_image": tmp_path / "mask.png"}
    assert (draw(pipe, "a hat", **paths) == meant).all()
    with pytest.raises(ValueError, match="mask_image= cannot be read from"):
        draw(pipe, "a hat", image=picture, mask_image=tmp_path / "missing.png")


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_array_of_several_images_is_pictures_whatever_their_channels(build, picture, channels):
    modes = {1: "L", 2: "LA", 4: "RGBA"}
    images = [with_alpha(one).convert(modes[channels]) for one in (picture, picture.rotate(90))]
    array = np.stack([np.asarray(image).reshape(16, 16, channels) for image in images])
    pipe = build(KosmosGImg2ImgPipeline)
    meant = change(pipe, ["a hat", "a dog"], image=[open_image(image, "It") for image in images])
    for given in (array, array / 255):
        drawn = change(pipe, ["a hat", "a dog"], image=given)
        assert np.abs(drawn - meant).max() < 1e-4


def test_integer_and_grey_tensors_are_pictures(build, picture):
    tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    pipe = build(KosmosGImg2ImgPipeline)
    meant = change(pipe, "a hat", image=picture)
    assert np.abs(change(pipe, "a hat", image=tensor) - meant).max() < 1e-4
    grey = torch.from_numpy(np.asarray(picture.convert("L")).copy())
    meant = change(pipe, "a hat", image=picture.convert("L"))
    for given in (grey, grey[None], grey[None, None], grey / 255):
        assert np.abs(change(pipe, "a hat", image=given) - meant).max() < 1e-4


# Latents -------------------------------------------------------------------------------------------------------------


def test_tensor_with_the_channels_of_the_vae_is_latents(build):
    pipe = build(KosmosGImg2ImgPipeline)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    side = 4 * pipe.vae_scale_factor
    drawn = change(pipe, "a hat", image=latents)
    assert drawn.shape == (1, side, side, 3)
    embeds, negative = pipe.encode_prompt("a hat")
    stock = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    expected = change(stock, prompt_embeds=embeds, negative_prompt_embeds=negative, image=latents)
    assert (drawn == expected).all()


def test_latents_are_compared_with_the_control_image_in_pixels(build, draw, no_model_runs):
    pipe = build(KosmosGControlNetImg2ImgPipeline)
    side = 8 * pipe.vae_scale_factor
    control = PIL.Image.new("RGB", (side, side), "red")
    for latents in (torch.zeros(1, 4, 8, 8), torch.zeros(4, 8, 8), [torch.zeros(4, 8, 8)]):
        drawn = draw(pipe, "a hat", image=latents, control_image=control, strength=0.5, **AS_IT_IS)
        assert drawn.shape == (1, side, side, 3)
    for size in (AS_IT_IS, {"height": side, "width": side}):
        latents = torch.zeros(1, 4, side, side)
        wrong = side * pipe.vae_scale_factor
        with no_model_runs(pipe), pytest.raises(ValueError, match=f"to be changed of {wrong} x {wrong}"):
            draw(pipe, "a hat", image=latents, control_image=control, strength=0.5, **size)


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_array_to_be_changed_is_compared_with_the_control_image(build, no_model_runs, kind):
    pipe = build(KosmosGControlNetImg2ImgPipeline)
    image = np.zeros((1, 32, 64, 3)) if kind == "np" else torch.zeros(1, 3, 32, 64)
    with no_model_runs(pipe), pytest.raises(ValueError, match="64 x 64 .* to be changed of 64 x 32"):
        pipe("a hat", image=image, control_image=PIL.Image.new("RGB", (64, 64)))


# Masks ---------------------------------------------------------------------------------------------------------------


def on_transparent(mask):
    image = PIL.Image.new("RGBA", mask.size, (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), mask=mask)
    return image


MASKS = {
    "1": lambda mask: mask.convert("1"),
    "RGBA": lambda mask: mask.convert("RGBA"),
    "P": lambda mask: mask.convert("P"),
    "white on transparent": on_transparent,
    "0 and 1": lambda mask: PIL.Image.fromarray(np.asarray(mask) // 255),
    "bool array": lambda mask: np.asarray(mask) > 0,
    "array of 0 and 1": lambda mask: np.asarray(mask) // 255,
    "array of 0 and 255": np.asarray,
    "float array": lambda mask: np.asarray(mask) / 255,
    "array of several": lambda mask: np.asarray(mask)[None],
    "array (1, H, W, 1)": lambda mask: np.asarray(mask)[None, ..., None],
    "bool tensor": lambda mask: torch.from_numpy(np.asarray(mask) > 0),
    "uint8 tensor": lambda mask: torch.from_numpy(np.asarray(mask).copy())[None],
    "float tensor": lambda mask: torch.from_numpy(np.asarray(mask) / 255)[None, None].float(),
}


@pytest.mark.parametrize("kind", MASKS)
def test_mask_in_any_form_fills_the_same_pixels(build, draw, picture, mask, kind):
    pipe = build(KosmosGInpaintPipeline)
    meant = draw(pipe, "a hat", image=picture, mask_image=mask)
    assert (draw(pipe, "a hat", image=picture, mask_image=MASKS[kind](mask)) == meant).all()


def test_picture_and_mask_are_turned_alike(build, draw, picture, mask):
    pipe = build(KosmosGInpaintPipeline)
    meant = draw(pipe, "a hat", image=image_of(turned(picture)), mask_image=mask.rotate(-90))
    given = draw(pipe, "a hat", image=turned(picture), mask_image=turned(mask))
    assert (given == meant).all()


EMPTY = {
    "L": PIL.Image.new("L", (16, 16)),
    "transparent": PIL.Image.new("RGBA", (16, 16)),
    "bool array": np.zeros((16, 16), bool),
}


@pytest.mark.parametrize("cls", [KosmosGInpaintPipeline, KosmosGControlNetInpaintPipeline])
@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_mask_that_marks_nothing_is_refused_before_a_model_runs(
    build, draw, no_model_runs, picture, cls, empty
):
    pipe = build(cls)
    control = {"control_image": picture} if "ControlNet" in cls.__name__ else {}
    for crop in ({}, {"padding_mask_crop": 4, "output_type": "pil"}):
        with no_model_runs(pipe), pytest.raises(ValueError, match="mask_image= marks nothing"):
            draw(pipe, "a hat", image=picture, mask_image=empty, **control, **crop)


# diffusers' own tests fill nothing, with tensors
@pytest.mark.parametrize(
    "dark", [PIL.Image.new("L", (16, 16), 4), torch.zeros(1, 1, 16, 16)], ids=["PIL", "tensor"]
)
def test_dark_mask_fills_nothing_and_that_is_said(build, draw, picture, logged, dark):
    pipe = build(KosmosGInpaintPipeline)
    draw(pipe, "a hat", image=picture, mask_image=dark)
    assert "mask_image= is dark all over" in logged.text


def test_mask_crop_takes_what_it_could_not_read(build, draw, picture, mask):
    pipe, settings = build(KosmosGInpaintPipeline), {"padding_mask_crop": 2, "output_type": "pil"}
    (meant,) = draw(pipe, "a hat", image=picture, mask_image=mask, **settings)
    given = {"image": file(picture), "mask_image": np.asarray(mask) > 0}
    (drawn,) = draw(pipe, "a hat", **given, **settings)
    assert drawn.tobytes() == meant.tobytes()


def test_call_with_conditions_and_no_tokenizer_reads_images_too(build, picture):
    pipe = build(KosmosGImg2ImgPipeline)
    embeds, negative = pipe.encode_prompt("a hat")
    conditions = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    meant = change(pipe, image=picture.convert("L"), **conditions)
    alone = KosmosGImg2ImgPipeline(**{**pipe.components, "tokenizer": None, "text_encoder": None})
    alone.set_progress_bar_config(disable=True)
    assert (change(alone, image=picture.convert("L"), **conditions) == meant).all()
