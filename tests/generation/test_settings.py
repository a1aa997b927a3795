import json
import struct
import zlib
from dataclasses import replace

import PIL.Image
import PIL.PngImagePlugin
import pytest

from kosmos_g_diffusers.environment import package_versions
from kosmos_g_diffusers.generation.grid import grid_of
from kosmos_g_diffusers.generation.png import PNG_KEY, output_paths, read_settings, write_png
from kosmos_g_diffusers.generation.settings import GenerationSettings, InputImage, LoraInput

SHA256 = "0123456789abcdef" * 4
SETTINGS = GenerationSettings(
    prompt="<i> im Schnee 雪, \x1b[2J",
    images=(InputImage("dog.png", SHA256),),
    negative_prompt="blurry",
    model="./kosmos-g",
    seed=2**62,
    guidance=6,
    scheduler="dpm",
    index=3,
    versions=package_versions(),
)
LORA = {"path": "a.safetensors", "scale": 0.5}
CONTROL = {"name": "canny", "picture": {"path": "a.png", "sha256": SHA256}}
CONTROL |= {"ready": True, "scale": 1.0, "start": 0.0, "end": 1.0}


@pytest.fixture
def image():
    return PIL.Image.new("RGB", (64, 64), "red")


def png_with(path, text, size=(8, 8)):
    chunk = PIL.PngImagePlugin.PngInfo()
    chunk.add_text(PNG_KEY, text)
    PIL.Image.new("RGB", size).save(path, pnginfo=chunk)
    return path


def record(**changes):
    values = {**json.loads(SETTINGS.to_json()), **changes}
    return json.dumps({name: value for name, value in values.items() if value != "absent"})


def test_settings_survive_the_png(tmp_path, image):
    write_png(image, tmp_path / "a.png", SETTINGS)
    assert read_settings(tmp_path / "a.png") == SETTINGS
    assert PIL.Image.open(tmp_path / "a.png").tobytes() == image.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_several_loras_survive_the_png(tmp_path, image):
    settings = replace(SETTINGS, loras=(LoraInput("a.safetensors", 0.5), LoraInput("b.safetensors", -1)))
    write_png(image, tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings
    assert settings.all_loras == settings.loras
    assert replace(SETTINGS, lora="a", lora_scale=2).all_loras == (LoraInput("a", 2),)


def test_binding_and_regions_survive_the_png_and_are_written_only_where_they_say_something(tmp_path, image):
    settings = replace(SETTINGS, binding=1.5, regions=((0.0, 0.1, 0.5, 1.0),))
    write_png(image, tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings and settings.is_guided
    assert not {"binding", "regions"} & set(json.loads(SETTINGS.to_json())) and not SETTINGS.is_guided
    free = replace(SETTINGS, regions=(None,))
    assert GenerationSettings.from_json(free.to_json()) == free and not free.is_guided


@pytest.mark.parametrize(
    "changes",
    [
        {"binding": -1},
        {"binding": 11},
        {"binding": True},
        {"binding": "1"},
        {"regions": {}},
        {"regions": "0,0,1,1"},
        {"regions": ["0,0,1,1"]},
        {"regions": [[0, 0, 1]]},
        {"regions": [[0, 0, 0, 1]]},
        {"regions": [[0, 0, 2, 1]]},
        {"regions": [[0, 0, None, 1]]},
        {"regions": [[0, 0, 1, 1], [0, 0, 1, 1]]},
    ],
)
def test_binding_and_regions_of_a_strange_png_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="cannot be used"):
        read_settings(png_with(tmp_path / "a.png", record(**changes)))


def test_settings_of_an_older_release_take_defaults_for_what_it_did_not_know(tmp_path):
    settings = read_settings(png_with(tmp_path / "a.png", '{"format": 1, "prompt": "a hat"}'))
    assert settings == GenerationSettings("a hat")


def test_png_is_not_overwritten_unless_asked(tmp_path, image):
    (tmp_path / "a.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="a.png"):
        write_png(image, tmp_path / "a.png", SETTINGS)
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    write_png(image, tmp_path / "a.png", SETTINGS, overwrite=True)
    assert read_settings(tmp_path / "a.png") == SETTINGS


@pytest.mark.parametrize(
    "failing", ["PIL.Image.Image.save", "os.fsync"]
)  # while it is encoded, while it is written
def test_png_is_written_whole_or_not_at_all(tmp_path, image, monkeypatch, failing):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(failing, fail)
    (tmp_path / "a.png").write_bytes(b"mine")
    with pytest.raises(OSError, match="disk full"):
        write_png(image, tmp_path / "a.png", SETTINGS, overwrite=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 50_000, "not JSON"),
        ("[]", "a JSON list"),
        ("{}", "format None"),
        (record(format=2), "format 2; this package reads 1"),
        (record(format=True), "format True; this package reads 1"),
        (record(format=1.0), "format 1.0; this package reads 1"),
        (record(model=""), "model is ''; expected a path or Hub id"),
        (record(unet=" "), "unet is ' '"),
        (record(lora=""), "lora is ''"),
        (record(images=[{"path": "", "sha256": SHA256}]), "path of an input image is ''"),
        (record(controls=[{**CONTROL, "controlnet": ""}]), "controlnet is ''"),
        (record(loras=[LORA]), "loras holds two LoRAs or more"),
        (record(loras=[LORA, LORA], lora="c"), "and then lora none"),
        (record(loras=[LORA, {"path": "b", "scale": 11}]), "lora_scale is 11"),
        (record(loras=[LORA, {"path": "b", "scale": True}]), "lora_scale is of type bool"),
        (record(loras=[LORA, {"path": ""}]), "path and scale"),
        (record(loras=[LORA, {"path": "", "scale": 1}]), "path of a LoRA is ''"),
        (record(loras=[LORA, {"path": "//server/b", "scale": 1}]), "another machine"),
        (record(loras={"a": 1}), "list of objects"),
        (record(prompt="absent"), "no prompt"),
        (record(prompt=None), "prompt is of type NoneType"),
        (record(prompt="<i> and <i>"), "2 '<i>' marks but 1 images"),
        (record(prompt="<i>" + "a" * 100_001), "100004 characters"),
        (record(callback="os.system"), "unknown names: 'callback'"),
        (record(seed=True), "seed is of type bool"),
        (record(seed=-1), "seed is -1"),
        (record(steps="30"), "steps is of type str"),
        (record(steps=10**9), "steps is 1000000000"),
        (record(num_images=0), "num_images is 0"),
        (record(guidance=float("nan")), "guidance is nan"),
        (record(guidance=float("inf")), "guidance is inf"),
        (record(height=100_000), "height is 100000"),
        (record(width=100), "multiple of 8"),
        (record(scheduler="__class__"), "scheduler is '__class__'"),
        (record(dtype="save"), "dtype is 'save'"),
        (record(device="cpu; rm"), "device is 'cpu; rm'"),
        (record(model=["a"]), "model is of type list"),
        (record(model="//server/share"), "another machine"),
        (record(images=[{"path": "\\\\server\\a.png", "sha256": SHA256}]), "another machine"),
        (record(images="dog.png"), "list of objects"),
        (record(images=[{"path": "dog.png"}]), "path and sha256"),
        (record(images=[{"path": "dog.png", "sha256": SHA256.upper()}]), "SHA-256"),
        (record(images=[{"path": 3, "sha256": SHA256}]), "path of an input image"),
        (record(images=[{"path": "a\0b", "sha256": SHA256}]), "null character"),
        (record(versions={"torch": 2}), "versions"),
        (record(versions={str(number): "1" for number in range(101)}), "versions"),
    ],
)
def test_settings_that_are_not_settings_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_settings(png_with(tmp_path / "a.png", text))
    assert "a.png" in str(error.value)


def test_file_that_is_no_png_of_ours_is_refused(tmp_path, image):
    image.save(tmp_path / "photo.jpg")
    image.save(tmp_path / "plain.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:20])
    (tmp_path / "empty.png").touch()
    for name in ("photo.jpg", "plain.png", "cut.png", "empty.png", "missing.png", "."):
        with pytest.raises(ValueError, match="Pass a PNG that kosmos-g wrote"):
            read_settings(tmp_path / name)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_decompression_bombs_are_refused(tmp_path):
    start = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    text = chunk(b"zTXt", PNG_KEY.encode() + b"\0\0" + zlib.compress(b"[" * 2**24))
    pixels = chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    (tmp_path / "pixels.png").write_bytes(start + chunk(b"IHDR", header) + pixels)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    (tmp_path / "text.png").write_bytes(start + chunk(b"IHDR", header) + text + pixels)
    for name in ("pixels.png", "text.png"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read as PNG"):
            read_settings(tmp_path / name)


def test_input_image_is_found_from_here_or_beside_the_png(tmp_path, image, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    image.save("dog.png")
    picture = InputImage.from_file("dog.png")
    assert picture.find("run").samefile(tmp_path / "dog.png")
    (tmp_path / "dog.png").rename(tmp_path / "run" / "dog.png")
    assert picture.find("run").samefile(tmp_path / "run" / "dog.png")
    (tmp_path / "run" / "dog.png").write_bytes(b"another")
    with pytest.raises(ValueError, match="'dog.png' has changed since. Pass --image"):
        picture.find("run")
    (tmp_path / "run" / "dog.png").unlink()
    with pytest.raises(ValueError, match="'dog.png' is not there. Pass --image"):
        picture.find("run")


def test_output_paths_of_one_and_of_several_images(tmp_path):
    assert [path.name for path in output_paths(tmp_path / "a.png", 1)] == ["a.png"]
    assert [path.name for path in output_paths("a.b.png", 2)] == ["a.b_0.png", "a.b_1.png", "a.b.png"]
    with pytest.raises(ValueError, match="does not end in .png"):
        output_paths("a.jpg", 1)


@pytest.mark.parametrize(("count", "size"), [(1, (8, 16)), (2, (16, 16)), (3, (16, 32)), (5, (24, 32))])
def test_grid_holds_every_image_in_reading_order(count, size):
    images = [PIL.Image.new("RGB", (8, 16), (number, 0, 0)) for number in range(count)]
    grid = grid_of(images)
    assert grid.size == size
    places = [(x, y) for y in range(0, size[1], 16) for x in range(0, size[0], 8)]
    assert [grid.getpixel(place)[0] for place in places[:count]] == list(range(count))
    assert all(grid.getpixel(place) == (255, 255, 255) for place in places[count:])


def test_what_is_changed_is_written_only_where_something_is():
    assert not {"init_image", "mask", "strength"} & set(json.loads(SETTINGS.to_json()))
    changed = replace(SETTINGS, init_image=InputImage("a.png", SHA256), mask=InputImage("b.png", SHA256))
    assert changed.strength == 1.0 and replace(changed, mask=None, strength=None).strength == 0.8
    assert GenerationSettings.from_json(changed.to_json()) == changed
    assert [file.path for file in changed.files] == ["dog.png", "a.png", "b.png"]
    assert changed.is_composite and not SETTINGS.is_composite


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mask": InputImage("a.png", SHA256)}, "without an image to change"),
        ({"strength": 0.5}, "without an image to change"),
        ({"init_image": InputImage("a.png", SHA256), "strength": 0.001}, "leaves no step to draw"),
        ({"init_image": InputImage("a.png", SHA256), "strength": 1.5}, "from 0 to 1"),
        ({"init_image": InputImage("a.png", SHA256), "binding": 1.0}, "draw whole images"),
        ({"init_image": "a.png"}, "expected .*InputImage"),
    ],
)
def test_changes_that_cannot_be_drawn_are_refused(change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        replace(SETTINGS, **change)
