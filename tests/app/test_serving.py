"""The parts of the app that need no page: queue, previews, fields, messages, files."""

import base64
import io
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from support.marks import DRAWN, term_of

from kosmos_g_diffusers import SPRITES
from kosmos_g_diffusers.app import html as render
from kosmos_g_diffusers.app.examples import RESULT, placeholder, result_uri, sprite_examples
from kosmos_g_diffusers.app.form import (
    LORAS,
    PRESETS,
    count_line,
    defaults,
    presets,
    read_values,
    restore_values,
    size_choice,
    sizes,
)
from kosmos_g_diffusers.control.controls import CONTROLS
from kosmos_g_diffusers.data.sample import decode_image
from kosmos_g_diffusers.generation.png import read_settings, write_png
from kosmos_g_diffusers.generation.settings import GenerationSettings, InputImage, LoraInput
from kosmos_g_diffusers.processing_kosmos_g import open_image
from kosmos_g_diffusers.serving.errors import FieldError, at, clean
from kosmos_g_diffusers.serving.job import Progress
from kosmos_g_diffusers.serving.models import Models
from kosmos_g_diffusers.serving.preview import LatentPreview
from kosmos_g_diffusers.serving.queue import QueueFull, Worker
from kosmos_g_diffusers.serving.session import MAX_HISTORY, Session
from kosmos_g_diffusers.serving.store import Store, check_image_file, open_image_file


@pytest.fixture
def worker():
    made = Worker(capacity=2)
    yield made
    made.close()


@pytest.fixture
def gate():
    """An event that jobs of a test wait for; open at the end, whatever happened."""
    event = threading.Event()
    yield event
    event.set()


def hold(started, gate):
    """A job that waits for the gate, and can be stopped while it does."""

    def job(ticket):
        started.set()
        while not gate.wait(0.01):
            ticket.check()
        return "made"

    return job


# Queue ---------------------------------------------------------------------------------------------------------------


def test_runs_come_in_order_and_know_their_place(worker, gate):
    order, started = [], threading.Event()
    first = worker.submit(hold(started, gate))
    started.wait()
    others = [worker.submit(lambda ticket, name=name: order.append(name)) for name in "ab"]
    assert [ticket.place for ticket in (first, *others)] == [0, 1, 2]
    with pytest.raises(QueueFull, match="2 runs are waiting"):
        worker.submit(print)
    gate.set()
    for ticket in others:
        ticket.ended.wait(10)
    assert order == ["a", "b"] and first.result == "made"
    assert [ticket.state for ticket in (first, *others)] == ["done"] * 3


def test_place_of_the_run_that_is_about_to_begin_is_not_taken_from_the_queue(worker):
    done = []
    for _ in range(2):  # before its first run, and after a run that has ended
        with worker._condition:  # the thread cannot look at the queue meanwhile
            tickets = [worker.submit(lambda ticket: done.append(ticket)) for _ in range(3)]
            with pytest.raises(
                QueueFull, match="2 runs are waiting"
            ):  # besides the one that is about to begin
                worker.submit(print)
        assert all(ticket.ended.wait(10) for ticket in tickets)
    assert len(done) == 6


def test_cancelled_run_leaves_the_queue_at_once_and_the_worker_soon(worker, gate):
    started = threading.Event()
    first = worker.submit(hold(started, gate))
    started.wait()
    second, third = worker.submit(print), worker.submit(lambda ticket: "third")
    second.cancel()
    assert second.state == "cancelled" and third.place == 1
    first.cancel()
    assert third.ended.wait(10) and third.result == "third"
    assert first.state == "cancelled" and first.error is None
    third.cancel()
    assert third.state == "done"


def test_failed_run_does_not_end_the_worker(worker):
    ticket = worker.submit(lambda ticket: 1 / 0)
    ticket.ended.wait(10)
    assert ticket.state == "failed" and isinstance(ticket.error, ZeroDivisionError)
    again = worker.submit(lambda ticket: 5)
    again.ended.wait(10)
    assert again.result == 5


def test_close_ends_what_runs_and_what_waits(gate):
    worker, started = Worker(capacity=2), threading.Event()
    running = worker.submit(hold(started, gate))
    started.wait()
    waiting = worker.submit(print)
    worker.close()
    assert (running.state, waiting.state) == ("cancelled", "cancelled")
    with pytest.raises(QueueFull):
        worker.submit(print)


# Preview -------------------------------------------------------------------------------------------------------------


def test_preview_is_close_to_what_the_vae_decodes(pipe):
    preview = LatentPreview(pipe.vae)
    generator = torch.Generator().manual_seed(5)  # latents that the fit has not seen
    coarse = torch.randn(1, 4, 3, 4, generator=generator)
    latents = torch.nn.functional.interpolate(coarse, (12, 16), mode="bicubic")
    latents = latents / latents.std()
    seen = preview(latents)
    assert seen.size == (16, 12)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    wanted = torch.nn.functional.adaptive_avg_pool2d(decoded, (12, 16))[0].movedim(0, -1)
    got = torch.tensor(list(seen.tobytes())).reshape(12, 16, 3) / 127.5 - 1
    error, spread = (got - wanted).square().mean(), (wanted - wanted.mean((0, 1))).square().mean()
    assert error < 0.8 * spread  # these random weights are far from linear; a trained VAE is nearer


def test_preview_of_a_vae_that_is_linear_is_exact(pipe):
    factors = torch.tensor([[0.3, 0.0, 0.1], [0.0, 0.2, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.2]])

    class Linear:
        config, device, dtype = pipe.vae.config, "cpu", torch.float32

        def decode(self, latents):
            rgb = torch.einsum("bchw,cd->bdhw", latents * self.config.scaling_factor, factors) + 0.1
            return type("Output", (), {"sample": rgb.repeat_interleave(8, 2).repeat_interleave(8, 3)})

    preview = LatentPreview(Linear())
    assert torch.allclose(preview.factors, torch.cat([factors, torch.full((1, 3), 0.1)]), atol=1e-5)


# Fields --------------------------------------------------------------------------------------------------------------

WORDS = {
    "<my-dog>": InputImage("../inputs/w.safetensors", "1" * 64),
    "<other>": InputImage("../inputs/x.safetensors", "0" * 64),
}


@pytest.fixture
def ask(tmp_path):
    """Function from some values of the page, with the others as it starts, to settings; the session knows WORDS."""
    session, store = Session(), Store(tmp_path / "out")
    session.learn_words(WORDS, "sprites")

    def ask(prompt="a hat", **values):
        return read_values({**defaults(False), "prompt": prompt, **values}, session, Models(), store)

    return ask


@pytest.mark.parametrize(
    ("prompt", "images", "line", "complete"),
    [
        ("<i> and <i>", 1, "2 <i>, 1 image: one image is missing", False),
        ("<i> and <i>", 0, "2 <i>, 0 images: 2 images are missing", False),
        ("a hat", 2, "0 <i>, 2 images: 2 <i> are missing", False),
        ("<i>", 1, "1 <i>, 1 image", True),
        ("<i>" * 11, 11, "at most 10 are possible", False),
    ],
)
def test_line_says_what_the_prompt_needs(prompt, images, line, complete):
    text, is_complete = count_line(prompt, images)
    assert line in text and is_complete is complete


def test_values_become_settings_of_the_command_line(ask, tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    values = {"negative_prompt": "red", "steps": 7, "seed": 4, "scheduler": "dpm", "width": 64, "height": 64}
    settings = ask("<i>, <my-dog>", pictures=[tmp_path / "mine.png"], surprise=False, **values)
    kept = InputImage.from_file(tmp_path / "mine.png").sha256
    same = GenerationSettings(
        "<i>, <my-dog>",
        images=(InputImage(f"../inputs/{kept}.png", kept),),
        image_words=(WORDS["<my-dog>"],),
        versions=settings.versions,
        **values,
    )
    assert settings == same == GenerationSettings.from_json(settings.to_json())


def test_binding_and_regions_of_the_page_are_those_of_the_settings(ask, tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    given = {"pictures": [tmp_path / "mine.png"], "binding": 1, "regions": " none;0,0,0.25,1 "}
    settings = ask("<my-dog> and <i>", **given)
    assert (settings.binding, settings.regions) == (1.0, (None, (0.0, 0.0, 0.25, 1.0)))
    described = render.described(settings)
    assert described["binding"] == 1.0 and described["regions"] == ["none", "0.0,0.0,0.25,1.0"]
    assert not {"binding", "regions"} & set(render.described(ask()))
    for field, value, message in (
        ("binding", -1, "from 0 to 10"),
        ("binding", float("nan"), "from 0 to 10"),
        ("regions", "left none", "left,top,right,bottom"),
        ("regions", "0,0,0,1 none", "x0 < x1"),
    ):
        with pytest.raises(FieldError, match=message) as caught:
            ask("<my-dog> and <i>", **{**given, field: value})
        assert caught.value.field == field
    with pytest.raises(FieldError, match="3 regions were given"):
        ask("<my-dog> and <i>", **{**given, "regions": "none none none"})


def test_surprise_draws_a_seed_for_each_run(ask):
    assert len({ask(seed=4, surprise=True).seed for _ in range(4)}) == 4


@pytest.mark.parametrize("is_small", [True, False])
def test_presets_and_what_the_page_starts_with_are_within_the_limits(ask, is_small):
    assert presets(is_small).keys() == PRESETS.keys()
    for values in (*presets(is_small).values(), defaults(is_small)):
        assert ask(**values).steps == values["steps"]


@pytest.mark.parametrize(
    ("field", "value"), [("model", "x"), ("unet", "../x"), ("lora", "/x"), ("scheduler", "x")]
)
def test_only_what_is_offered_can_be_chosen(ask, field, value):
    with pytest.raises(FieldError, match="not offered") as caught:
        ask(**{field: value})
    assert caught.value.field == field


# Messages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read '/home/me/a b/x.png' now", "cannot read '(a file of the server) b/x.png' now"),
        ("no C:\\models\\x.bin", "no (a file of the server)"),
        ("see file:///srv/data/x", "see (a file of the server)"),
        ("Pass --image-size or --model.", "Pass image size or model."),
        (
            "the ControlNet 'lllyasviel/control_v11p' is absent",
            "the ControlNet 'lllyasviel/control_v11p' is absent",
        ),
        ("shares from 0 to 1, 1/2 of them", "shares from 0 to 1, 1/2 of them"),
    ],
)
def test_paths_are_taken_out_of_messages(text, shown):
    assert clean(text) == shown


def test_bug_is_logged_under_the_number_that_is_told(caplog):
    with pytest.raises(FieldError) as caught, at("run"):
        raise KeyError("/home/me/secret")
    assert "secret" not in caught.value.message
    number = caught.value.message.rstrip(".").rpartition(" ")[2]
    assert number in caplog.text and "secret" in caplog.text


def test_html_holds_every_text_as_text():
    evil = "<script>alert(1)</script>\"'"
    progress = Progress(evil, preview=None)
    ticket = type("Ticket", (), {"state": "running", "progress": progress})
    for html in (
        render.prompt_line(evil, []),
        render.message(evil),
        render.model_state("failed", evil, evil),
        render.run_state(ticket),
        render.settings_table(
            GenerationSettings(evil, negative_prompt=evil, model=evil, lora=evil, unet=evil), Path(evil)
        ),
    ):
        assert "<script" not in html and "&lt;script&gt;" in html


# Files ---------------------------------------------------------------------------------------------------------------


def test_store_keeps_an_image_by_its_contents(tmp_path):
    image = PIL.Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / "mine.png")
    store = Store(tmp_path / "out")
    kept = store.keep_upload(tmp_path / "mine.png", "pictures")
    assert kept == store.keep_upload(tmp_path / "mine.png", "pictures")
    assert store.find(kept).read_bytes() == (tmp_path / "mine.png").read_bytes()
    path = store.new_image_path()
    write_png(image, path, GenerationSettings("<i>", images=(kept,)))
    assert kept.find(path.parent).samefile(store.find(kept))  # as `kosmos-g generate --from` looks for it
    assert store.find(InputImage("/etc/passwd", "f" * 64)) is None
    assert len(list((tmp_path / "out" / "inputs").iterdir())) == 1


def test_damaged_image_is_told(tmp_path):
    PIL.Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    assert check_image_file(tmp_path / "cut.png") == "PNG"
    with pytest.raises(FieldError, match="damaged"):
        open_image_file(tmp_path / "cut.png", "pictures")


def deep(width, height):
    return PIL.Image.fromarray(np.linspace(0, 65535, width * height, dtype=np.uint16).reshape(height, width))


def half_transparent():
    image = PIL.Image.linear_gradient("L").resize((8, 8)).convert("RGB")
    image.putalpha(PIL.Image.linear_gradient("L").resize((8, 8)).rotate(90))
    return image


def with_a_transparent_colour():
    image = PIL.Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.info["transparency"] = 1
    return image


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "image, fmt, options",
    [
        (deep(8, 8), "PNG", {}),
        (deep(8, 8), "TIFF", {}),
        (half_transparent(), "PNG", {}),
        (half_transparent().convert("LA"), "PNG", {}),
        (with_a_transparent_colour(), "PNG", {}),
        (PIL.Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", {}),
        (PIL.Image.linear_gradient("L"), "JPEG", {"exif": b"Exif\0\0not a TIFF file"}),
        (
            PIL.Image.linear_gradient("L"),
            "PNG",
            {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"},
        ),
    ],
    ids=["16 bit PNG", "16 bit TIFF", "RGBA", "LA", "P", "CMYK", "damaged EXIF", "EXIF cut short"],
)
def test_file_has_the_same_pixels_in_the_app_in_training_and_in_a_prompt(tmp_path, image, fmt, options):
    path = tmp_path / "picture"
    image.save(path, format=fmt, **options)
    expected = open_image(path, "It")
    for opened in (open_image_file(path, "pictures"), decode_image(path.read_bytes(), "0")):
        assert opened.mode == "RGB" and opened.size == expected.size
        assert opened.tobytes() == expected.tobytes()
    assert len(set(expected.convert("L").tobytes())) > 1 or image.mode in ("P", "CMYK")  # not white


def test_folders_give_the_names_that_are_offered(tmp_path):
    for name in ("a.safetensors", "b.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "unet").mkdir()
    models = Models((), tmp_path, tmp_path)
    assert list(models.loras) == ["none", "a.safetensors", "b.safetensors"]
    assert list(models.unets) == ["the model's own", "unet"]
    with pytest.raises(ValueError, match="no model in"):
        Models([tmp_path])
    with pytest.raises(ValueError, match="There is no folder"):
        Models((), tmp_path / "missing")


def test_model_of_a_folder_draws_what_its_pipeline_draws(tmp_path, pipe, draw):
    pipe.save_pretrained(tmp_path / "mine")
    models = Models([tmp_path / "mine"])
    assert models.is_small("mine") and not models.is_builtin("mine")
    prepared = models.prepare(GenerationSettings("a hat"))
    prepared.set_progress_bar_config(disable=True)
    assert (draw(prepared, "a hat") == draw(pipe, "a hat")).all()
    assert models.state == "ready"


def test_models_share_one_cache_of_images_that_come_again(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "one")
    pipe.save_pretrained(tmp_path / "two")
    models = Models([tmp_path / "one", tmp_path / "two"], device="cpu")
    image, kept = PIL.Image.new("RGB", (24, 24), "red"), []
    for name in ("one", "two"):
        models.load(name)
        with torch.no_grad():
            models.pipe.encode_prompt("a <i>", images=[image])
        kept.append(models.pipe.vision_cache)
    assert kept[0] is kept[1]
    assert (kept[0].hits, kept[0].misses) == (1, 1)  # the weights of both folders are the same


def test_small_model_is_small_from_a_folder_too_and_has_canny_alone_where_none_is_given():
    assert Models().controls("sprites") == ("canny",)
    models = Models([SPRITES])  # its VAE halves twice, not three times
    assert models.is_small("model") and not models.is_builtin("model")
    assert models.controls("model") == tuple(CONTROLS)


def test_model_that_cannot_be_loaded_is_told_without_its_place(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    models = Models([tmp_path / "mine"])
    with pytest.raises(FieldError) as caught:
        models.load("mine")
    assert caught.value.field == "model" and models.state == "failed"
    assert str(tmp_path) not in models.problem


def test_history_has_an_end():
    session = Session()
    session.remember(range(MAX_HISTORY + 5))
    session.remember(["newest"])
    assert session.history[:2] == ["newest", MAX_HISTORY + 4] and len(session.history) == MAX_HISTORY


def test_image_of_several_loras_brings_back_those_that_are_offered(tmp_path):
    (tmp_path / "loras").mkdir()
    for name in "bcdef":
        (tmp_path / "loras" / f"{name}.safetensors").touch()
    models = Models(lora_folder=tmp_path / "loras")
    loras = (
        LoraInput("a.safetensors"),
        LoraInput("c.safetensors", 0.5),
        LoraInput("b.safetensors", -1.0),
    )
    write_png(PIL.Image.new("RGB", (8, 8)), tmp_path / "a.png", GenerationSettings("a hat", loras=loras))
    values, notes = restore_values(tmp_path / "a.png", Session(), models, Store(tmp_path), False)
    chosen = [(values[name], values[scale]) for name, scale in LORAS]
    assert chosen == [("c.safetensors", 0.5), ("b.safetensors", -1.0), ("none", 1.0), ("none", 1.0)]
    assert "Its LoRA is not offered here." in notes
    many = tuple(LoraInput(f"{name}.safetensors") for name in "bcdef")
    write_png(PIL.Image.new("RGB", (8, 8)), tmp_path / "b.png", GenerationSettings("a hat", loras=many))
    values, notes = restore_values(tmp_path / "b.png", Session(), models, Store(tmp_path), False)
    assert [values[name] for name, _ in LORAS] == [f"{name}.safetensors" for name in "bcde"]
    assert "It was made with 5 LoRAs; the first 4 are here." in notes


def test_loras_of_the_page_are_those_of_the_settings(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").touch()
    models, store = Models(lora_folder=tmp_path), Store(tmp_path / "out")

    def ask(**values):
        return read_values({**defaults(False), "prompt": "a hat", **values}, Session(), models, store)

    one = ask(lora_3="b.safetensors", lora_3_scale=0.5)
    assert (one.lora, one.lora_scale, one.loras) == ("b.safetensors", 0.5, ())
    both = ask(lora="b.safetensors", lora_2="a.safetensors", lora_2_scale=-0.5)
    assert both.loras == (LoraInput("b.safetensors"), LoraInput("a.safetensors", -0.5))
    assert render.described(both)["LoRAs"] == ["b.safetensors, scale 1", "a.safetensors, scale -0.5"]
    assert ".../b.safetensors --lora .../a.safetensors" in render.again_command(both, Path("images/x.png"))
    for values, field, message in (
        ({"lora": "a.safetensors", "lora_4": "a.safetensors"}, "lora_4", "chosen twice"),
        ({"lora_2": "../x"}, "lora_2", "not offered"),
        ({"lora_2": "a.safetensors", "lora_2_scale": 3}, "lora_2_scale", "from -2 to 2"),
    ):
        with pytest.raises(FieldError, match=message) as caught:
            ask(**values)
        assert caught.value.field == field


# An image to change --------------------------------------------------------------------------------------------------


def strokes_uri(size, box):
    """What the board of the page sends: black in a box, elsewhere transparent."""
    strokes = PIL.Image.new("RGBA", size)
    strokes.paste("black", box)
    file = io.BytesIO()
    strokes.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_image_to_change_and_its_mask_are_kept_and_come_back(ask, tmp_path):
    PIL.Image.new("RGB", (64, 48), "red").save(tmp_path / "mine.png")
    strokes = strokes_uri((128, 96), (0, 0, 64, 96))
    settings = ask(init_image=str(tmp_path / "mine.png"), mask=strokes, strength=0.5, steps=10)
    assert settings.strength == 0.5 and settings.is_composite
    store = Store(tmp_path / "out")
    mask = PIL.Image.open(store.find(settings.mask))
    assert (mask.mode, mask.size) == ("L", (128, 96))
    assert (mask.getpixel((32, 50)), mask.getpixel((96, 50))) == (255, 0)  # white is drawn anew
    assert store.find(settings.init_image).read_bytes() == (tmp_path / "mine.png").read_bytes()
    assert render.described(settings)["changed"] == "a part of an image, strength 0.5"
    path = store.new_image_path()
    write_png(PIL.Image.new("RGB", (8, 8)), path, settings)
    assert settings.init_image.find(path.parent).is_file()  # as `kosmos-g generate --from` looks for it
    values, notes = restore_values(path, Session(), Models(), store, False)
    assert not notes and values["strength"] == 0.5
    assert Path(values["init_image"]).read_bytes() == (tmp_path / "mine.png").read_bytes()
    again = ask(init_image=values["init_image"], mask=values["mask"], strength=0.5, steps=10)
    assert (again.init_image, again.mask) == (settings.init_image, settings.mask)


def test_mistake_in_a_change_is_told_by_its_field(ask, tmp_path):
    PIL.Image.new("RGB", (64, 48), "red").save(tmp_path / "mine.png")
    image, strokes = str(tmp_path / "mine.png"), strokes_uri((64, 48), (0, 0, 9, 9))
    for values, field, message in (
        ({"mask": strokes}, "init_image", "without an image"),
        ({"init_image": image, "strength": 1.5}, "strength", "from 0 to 1"),
        ({"init_image": image, "strength": 0.1, "steps": 3}, "run", "leaves no step"),
        ({"init_image": image, "mask": "/etc/passwd,x"}, "init_image", "did not arrive"),
        ({"init_image": str(tmp_path / "gone.png")}, "init_image", "no longer on the server"),
    ):
        with pytest.raises(FieldError, match=message) as caught:
            ask(**values)
        assert caught.value.field == field
    # strokes that mark nothing are none, and neither is a strength without an image
    assert ask(init_image=image, mask=strokes_uri((64, 48), (0, 0, 0, 0))).mask is None
    assert ask(strength=0.5).init_image is None


def test_example_that_the_page_begins_with_is_the_first_and_was_drawn_by_the_small_model():
    settings = read_settings(RESULT)
    assert settings.prompt == sprite_examples()[0].prompt == placeholder(True)
    assert (settings.model, len(settings.images), term_of(RESULT)) == (None, 1, DRAWN)
    assert not Path(settings.images[0].path).is_absolute()
    html = render.first_example(settings.prompt, sprite_examples()[0].thumbnails(), result_uri(), "")
    assert html.count("<img") == 2 and "<i>" not in html


# Sizes, seeds, progress ----------------------------------------------------------------------------------------------


def test_sizes_begin_with_the_models_own_and_are_those_that_it_can_draw():
    for side in (64, 512):
        (label, first), *others, (_, last) = sizes(side)
        assert (first, last) == ("own", "other") and label.startswith(f"{side} x {side}")
        for _, choice in others:
            width, height = map(int, choice.split("x"))
            assert min(width, height) == side and not width % 8 and not height % 8
            assert size_choice(width, height, side) == choice
        assert size_choice(0, 0, side) == size_choice(None, None, side) == "own"
        assert size_choice(8, 1024, side) == "other"
    assert [choice for _, choice in sizes(None)] == ["own", "other"]
    assert Models().own_side("sprites") == 64


@pytest.mark.parametrize("seed", [None, -1])
def test_empty_seed_or_minus_one_draws_one(ask, seed):
    assert len({ask(seed=seed, surprise=False).seed for _ in range(4)}) == 4


def test_bar_counts_all_images_of_a_run_from_0_to_100():
    def bar(state, **progress):
        ticket = SimpleNamespace(state=state, progress=Progress("drawing", **progress), place=0)
        return int(re.search(r'<progress value="(\d+)" max="100"', render.run_state(ticket))[1])

    told = [bar("running", steps=0)]
    for step in range(25):
        images = (Path("x"),) * (step // 12)
        told.append(bar("running", step=step, steps=24, num_images=2, images=images))
    told.append(bar("done", images=(Path("x"),) * 2))
    assert told[0] == 0 and told[-1] == 100 and told == sorted(told)
    assert 45 <= told[13] <= 55  # the first of two images is done
