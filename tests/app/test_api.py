"""The app's endpoints through gradio_client: what they make, what they refuse and in which words."""

import base64
import inspect
import io
import os
import re
import runpy
import shlex
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from support.app import serving, slow_steps, wait_for
from support.marks import COMPOSITE, DRAWN, term_of

from kosmos_g_diffusers import KosmosGImg2ImgPipeline, KosmosGInpaintPipeline
from kosmos_g_diffusers.app.html import again_command
from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.commands.app import read_auth
from kosmos_g_diffusers.control.controls import CONTROLS, control_image
from kosmos_g_diffusers.generation import generate as generation
from kosmos_g_diffusers.generation.generate import generate_images
from kosmos_g_diffusers.generation.png import read_settings
from kosmos_g_diffusers.generation.schedulers import make_scheduler
from kosmos_g_diffusers.generation.settings import GenerationSettings, LoraInput
from kosmos_g_diffusers.provenance import UNMARKED
from kosmos_g_diffusers.sprites import pretrained
from kosmos_g_diffusers.testing import build_tiny_pipeline

gradio_client = pytest.importorskip("gradio_client", reason="pip install 'kosmos-g-diffusers[app]'")

PHOTOS = Path(__file__).parents[2] / "examples" / "images"
CAT, COFFEE = str(PHOTOS / "cat.jpg"), str(PHOTOS / "coffee.jpg")
STEPS = {"steps": 2, "surprise": False, "seed": 3}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder of LoRAs and one of U-Nets, good ones and others."""
    folder = tmp_path_factory.mktemp("given")
    pipe = build_tiny_pipeline()
    (folder / "loras").mkdir()
    (folder / "unets").mkdir()
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    generator = torch.Generator().manual_seed(0)
    good = {f"{layer}A.weight": (4, 16), f"{layer}B.weight": (16, 4)}
    good = {name: torch.randn(shape, generator=generator) for name, shape in good.items()}
    save_file(good, folder / "loras" / "good.safetensors")
    more = {name: torch.randn(value.shape, generator=generator) for name, value in good.items()}
    save_file(more, folder / "loras" / "more.safetensors")
    save_file({f"{layer}A.weight": torch.zeros(4, 999)}, folder / "loras" / "foreign.safetensors")
    (folder / "loras" / "damaged.safetensors").write_bytes(b"no tensors")
    pipe.unet.save_pretrained(folder / "unets" / "same")
    other = UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 8})
    other.save_pretrained(folder / "unets" / "narrow")
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.1)
    pipe.unet.save_pretrained(folder / "unets" / "tuned")
    return folder


@pytest.fixture(scope="module")
def app(tmp_path_factory, given):
    pytest.importorskip("peft", reason="LoRA needs peft")
    folders = {"lora_folder": given / "loras", "unet_folder": given / "unets"}
    with serving(tmp_path_factory.mktemp("api"), capacity=2, **folders) as running:
        yield running


@pytest.fixture
def connect(app, tmp_path):
    """Function that makes a client, which is a session of its own."""

    def connect(**options):
        folder = tmp_path / "downloads"
        return gradio_client.Client(
            app.url, verbose=False, analytics_enabled=False, download_files=folder, **options
        )

    return connect


@pytest.fixture
def client(connect):
    return connect()


def generate(client, prompt="a hat", images=(), **fields):
    """Paths of the images, their settings as the API tells them, and the last line of progress."""
    images = [gradio_client.handle_file(path) for path in images]
    images, settings, progress = client.predict(
        prompt=prompt, pictures=images, **{**STEPS, **fields}, api_name="/generate"
    )
    return [image["image"] for image in images], settings, progress


def fails(client, api_name="/generate", **fields):
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        client.predict(api_name=api_name, **fields)
    return str(caught.value)


def pixels(path):
    return PIL.Image.open(path).tobytes()


def test_images_are_those_that_the_library_makes_from_their_settings(client):
    fields = {"num_images": 2, "scheduler": "dpm", "guidance": 7.5}
    paths, settings, progress = generate(client, "<i> and <i>", [CAT, COFFEE], **fields)
    assert [entry["seed"] for entry in settings] == [3, 4]
    assert "Done: 2 images" in progress
    wanted = GenerationSettings(
        "<i> and <i>", images=read_settings(paths[0]).images, seed=3, num_images=2, steps=2, scheduler="dpm"
    )
    pipe = generation.load_model(pretrained.SPRITES, torch.float32)
    pipe.scheduler = make_scheduler("dpm", pipe.scheduler.config)
    for path, (image, _) in zip(paths, generate_images(pipe, wanted, [CAT, COFFEE]), strict=True):
        assert pixels(path) == image.tobytes()


def test_maps_lie_next_to_the_image_when_they_are_asked_for(app, client, monkeypatch):
    counted = []
    monkeypatch.setattr(app.service.store, "count_image", lambda path, _: counted.append(path.name))
    fields = {"binding": 1, "regions": "0,0,0.5,1 none", "maps": True}
    (path,), (settings,), _ = generate(client, "<i> and <i>", [CAT, COFFEE], **fields)
    assert (settings["binding"], settings["regions"]) == (1.0, ["0.0,0.0,0.5,1.0", "none"])
    kept = app.folder / "images" / Path(path).name
    assert PIL.Image.open(kept.with_stem(f"{kept.stem}_maps")).size == (5 * 192, 192 + 18)
    assert counted == [kept.name, f"{kept.stem}_maps.png"]  # on the disk
    plain = app.folder / "images" / Path(generate(client, "<i> and <i>", [CAT, COFFEE])[0][0]).name
    assert not plain.with_stem(f"{plain.stem}_maps").exists() and pixels(plain) != pixels(kept)
    assert "regions" in fails(client, prompt="a hat", regions="left")


def test_kept_image_is_made_again_by_the_command_line(app, client, tmp_path, monkeypatch):
    path = generate(client, "<i>", [CAT])[0][0]
    kept = app.folder / "images" / Path(path).name
    assert main(["generate", "--from", str(kept), "--output", str(tmp_path / "again.png")]) == 0
    assert pixels(tmp_path / "again.png") == pixels(path)


def test_kept_image_with_lora_and_words_is_made_again_where_its_lora_is(
    app, client, given, tmp_path, monkeypatch, capsys
):
    client.predict(name="cat", pictures=[gradio_client.handle_file(CAT)], api_name="/add_word")
    path = generate(client, "<cat>, red", lora="good.safetensors", lora_scale=0.5, unet="tuned")[0][0]
    kept = str(app.folder / "images" / Path(path).name)
    command = ["generate", "--from", kept, "--output", str(tmp_path / "again.png")]
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    assert main(command) == 2
    assert "names the U-Net 'tuned', which is not here" in capsys.readouterr().err
    (place / "tuned").symlink_to(given / "unets" / "tuned")
    assert main(command) == 2
    assert "names the LoRA 'good.safetensors', which is not here" in capsys.readouterr().err
    (place / "good.safetensors").symlink_to(given / "loras" / "good.safetensors")
    assert main(command) == 0  # the words are found from where the image is
    assert pixels(tmp_path / "again.png") == pixels(path)
    shown = again_command(read_settings(path), Path("images") / Path(path).name)  # from the output folder
    places = {
        ".../tuned": given / "unets" / "tuned",
        ".../good.safetensors": given / "loras" / "good.safetensors",
    }
    monkeypatch.chdir(app.folder)
    again = [str(places.get(word, word)) for word in shlex.split(shown)[1:-1]]
    assert main([*again, str(tmp_path / "shown.png")]) == 0
    assert pixels(tmp_path / "shown.png") == pixels(path)


def test_every_endpoint_is_documented(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    names = "generate cancel add_word save_words load_words forget_word".split()
    names += [f"preview_control_{slot}" for slot in (1, 2, 3)]
    assert {name.removeprefix("/") for name in endpoints} == set(names)
    assert all(len(endpoint["description"]) > 20 for endpoint in endpoints.values())
    parameters = [entry["parameter_name"] for entry in endpoints["/generate"]["parameters"]]
    assert parameters[:5] == ["prompt", "pictures", "negative_prompt", "num_images", "steps"]
    assert {"control_1_kind", "control_3_end", "lora", "unet"} <= set(parameters)
    assert all(entry["parameter_has_default"] for entry in endpoints["/generate"]["parameters"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": " "}, "prompt: Write what to draw"),
        ({"prompt": "<i> and <i>"}, "prompt: 2 <i>, 0 images: 2 images are missing"),
        ({"prompt": "a hat", "pictures": [CAT]}, "prompt: 0 <i>, 1 image: one <i> is missing"),
        ({"prompt": "a <my-dog>"}, "prompt: <my-dog> is not an image word. This session knows none yet"),
        ({"prompt": "a hat " * 1000}, "prompt: This text has 6000 characters"),
        ({"prompt": "a\0hat"}, "prompt: This text has a null character in it"),
        ({"prompt": "hat " * 290}, "prompt: "),
        ({"prompt": "<i>" * 11, "pictures": [CAT] * 11}, "pictures: A prompt may have 10 images, and 11"),
        ({"negative_prompt": "hat " * 290}, "negative_prompt: "),
        ({"steps": 0}, "steps: The number of steps is 0. Give a number from 1 to 250"),
        ({"steps": 2.5}, "steps: The number of steps is 2.5. Give a whole number"),
        ({"num_images": 9}, "num_images: The number of images is 9. Give a number from 1 to 8"),
        ({"guidance": -1}, "guidance: "),
        ({"seed": -2}, "seed: The seed is -2"),
        ({"width": 60, "height": 64}, "width: The width is 60 pixels. Take a multiple of 8: 56 or 64"),
        ({"height": 2048}, "height: The height is 2048"),
        ({"lora": "foreign.safetensors"}, "lora: 1 of 1 layers of this LoRA do not fit the U-Net"),
        (
            {"lora": "good.safetensors", "lora_3": "foreign.safetensors"},
            "lora: 1 of 1 layers of this LoRA do not fit",
        ),
        (
            {"lora": "good.safetensors", "lora_2": "good.safetensors"},
            "lora_2: The LoRA 'good.safetensors' is",
        ),
        ({"mask": "data:image/png;base64,AAAA"}, "init_image: This file is not an image"),
        ({"strength": 0.1, "init_image": CAT}, "run: "),
        ({"init_image": CAT, "width": 64, "height": 64}, "init_image: An image of 64 x 64 pixels was asked"),
        ({"lora": "damaged.safetensors"}, "lora: The LoRA 'damaged.safetensors' cannot be loaded"),
        ({"unet": "narrow"}, "unet: The U-Net 'narrow' reads states of width 8, the model gives 32"),
        ({"control_2_kind": "tile"}, "control_2: The control 'tile' needs an image"),
        ({"control_1_kind": "tile", "control_1_start": 0.5, "control_1_end": 0.5}, "control_1: "),
        ({"control_1_kind": "inpaint"}, "control_1: Paint over what is to be filled"),
        (
            {"control_1_kind": "tile", "control_1_strokes": "/etc/passwd,x"},
            "control_1: The strokes did not arrive",
        ),
    ],
)
def test_mistake_is_told_with_the_field_it_belongs_to(client, fields, message):
    fields = {"prompt": "a hat", **STEPS, **fields}
    if "pictures" in fields:
        fields["pictures"] = [gradio_client.handle_file(path) for path in fields["pictures"]]
    if "init_image" in fields:
        fields["init_image"] = gradio_client.handle_file(fields["init_image"])
    if "control_1_start" in fields:
        fields["control_1_picture"] = gradio_client.handle_file(CAT)
    told = fails(client, **fields)
    assert message in told
    assert os.sep + "tmp" not in told and "site-packages" not in told and "Traceback" not in told


def test_control_of_another_shape_than_the_image_is_told(client):
    control = {"control_1_kind": "tile", "control_1_picture": gradio_client.handle_file(CAT)}
    told = fails(client, prompt="a hat", width=64, height=64, **STEPS, **control)
    assert (
        "controls: An image of 64 x 64 pixels was asked for" in told
        and "has another shape: 96 x 64 fits" in told
    )


def test_bug_is_told_without_its_reason_and_its_reason_is_logged(app, client, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("secret of /home/me/file")

    monkeypatch.setattr("kosmos_g_diffusers.generation.generate.prompt_arguments", broken)
    told = fails(client, prompt="a hat", **STEPS)
    assert "Something went wrong on the server" in told and "secret" not in told
    number = told.rpartition("number ")[2].strip("'. ")
    assert any(number in record.getMessage() for record in caplog.records)
    monkeypatch.undo()
    assert len(generate(client)[0]) == 1


def test_lora_unet_and_scheduler_count_and_leave_no_trace(client):
    plain = pixels(generate(client)[0][0])
    made = {plain}
    for fields in (
        {"lora": "good.safetensors"},
        {"lora": "good.safetensors", "lora_scale": -2},
        {"unet": "tuned"},
        {"unet": "tuned", "lora": "good.safetensors"},
        {"scheduler": "euler-ancestral"},
        {"negative_prompt": "red"},
    ):
        paths, settings, _ = generate(client, **fields)
        made.add(pixels(paths[0]))
        assert pixels(generate(client)[0][0]) == plain
    assert len(made) == 7
    assert pixels(generate(client, unet="same")[0][0]) == plain
    recorded = read_settings(generate(client, unet="tuned", lora="good.safetensors", lora_scale=0.5)[0][0])
    assert (recorded.unet, recorded.lora, recorded.lora_scale) == ("tuned", "good.safetensors", 0.5)


def test_several_loras_act_together_each_with_its_scale(client, given):
    fields = {"lora": "good.safetensors", "lora_2": "more.safetensors", "lora_2_scale": -0.5}
    paths, (settings,), _ = generate(client, **fields)
    assert settings["LoRAs"] == ["good.safetensors, scale 1", "more.safetensors, scale -0.5"]
    pipe = generation.load_model(pretrained.SPRITES, torch.float32)
    loras = [LoraInput(str(given / "loras" / "good.safetensors"))]
    loras += [LoraInput(str(given / "loras" / "more.safetensors"), -0.5)]
    generation.add_loras(pipe, loras)
    wanted = GenerationSettings("a hat", seed=3, steps=2, guidance=5.0, scheduler="dpm")
    pipe.scheduler = make_scheduler("dpm", pipe.scheduler.config)
    ((image, _),) = generate_images(pipe, wanted, [])
    assert pixels(paths[0]) == image.tobytes()
    assert pixels(generate(client, **{**fields, "lora_2_scale": 0.5})[0][0]) != pixels(paths[0])
    assert len({pixels(generate(client, **some)[0][0]) for some in ({}, {"lora": "good.safetensors"})}) == 2


@pytest.mark.parametrize("masked", [False, True])
def test_image_is_changed_as_the_pipelines_do_and_made_again_by_the_command_line(
    app, client, tmp_path, masked
):
    mask, fields = PIL.Image.new("L", (96, 64)), {"strength": 0.6, "steps": 5}
    mask.paste(255, (0, 0, 48, 64))
    if masked:
        strokes = PIL.Image.new("RGBA", (96, 64))
        strokes.paste("black", mask=mask)
        file = io.BytesIO()
        strokes.save(file, format="PNG")
        fields["mask"] = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    image = PIL.Image.open(CAT).convert("RGB").resize((96, 64), PIL.Image.Resampling.LANCZOS)
    image.save(tmp_path / "cat.png")
    given = gradio_client.handle_file(str(tmp_path / "cat.png"))
    paths, (settings,), progress = generate(client, "<i>", [COFFEE], init_image=given, **fields)
    assert "strength 0.6" in settings["changed"] and "Done: 1 image" in progress
    assert term_of(paths[0]) == COMPOSITE
    pipe = generation.load_model(pretrained.SPRITES, torch.float32)
    pipe.scheduler = make_scheduler("dpm", pipe.scheduler.config)
    pipe = (KosmosGInpaintPipeline if masked else KosmosGImg2ImgPipeline).from_pipe(pipe)
    wanted = {"image": image, "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 5.0}
    wanted |= {"mask_image": mask, "height": 64, "width": 96} if masked else {}
    wanted["generator"] = torch.Generator().manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (expected,) = pipe("<i>", images=[COFFEE], **wanted).images
    difference = [abs(a - b) for a, b in zip(pixels(paths[0]), expected.tobytes(), strict=True)]
    assert max(difference) <= 1  # the coffee was encoded alone
    kept = app.folder / "images" / Path(paths[0]).name
    assert main(["generate", "--from", str(kept), "--output", str(tmp_path / "again.png")]) == 0
    assert pixels(tmp_path / "again.png") == pixels(paths[0])


def test_control_image_is_the_librarys_and_controls_add_up(client):
    cat = gradio_client.handle_file(CAT)
    shown = client.predict(kind="tile", picture=cat, api_name="/preview_control_1")
    assert pixels(shown) == control_image("tile", CAT, short_side=64).tobytes()
    one = {"control_1_kind": "tile", "control_1_picture": cat}
    two = {**one, "control_3_kind": "ip2p", "control_3_picture": cat, "control_3_scale": 0.5}
    made = [generate(client, width=96, height=64, **fields)[0][0] for fields in ({}, one, two)]
    assert len({pixels(path) for path in made}) == 3
    assert PIL.Image.open(made[2]).size == (96, 64)
    assert [term_of(path) for path in made] == [DRAWN, COMPOSITE, COMPOSITE]
    controls = read_settings(made[2]).controls
    assert [(control.name, control.scale) for control in controls] == [("tile", 1.0), ("ip2p", 0.5)]
    assert len(CONTROLS) == 17  # all of them are offered: the page reads the table


def test_canny_edges_are_shown(client):
    pytest.importorskip("cv2", reason="canny needs the extra control")
    cat = gradio_client.handle_file(CAT)
    try:
        expected = control_image("canny", CAT, short_side=64)
    except ImportError as error:
        pytest.skip(str(error))
    assert (
        pixels(client.predict(kind="canny", picture=cat, api_name="/preview_control_2")) == expected.tobytes()
    )


def test_image_word_means_its_image_in_its_session_and_in_a_file(connect, client):
    cat = [gradio_client.handle_file(CAT)]
    assert client.predict(name="My-Cat", pictures=cat, api_name="/add_word")["value"] == "<my-cat>"
    assert "already" in fails(client, "/add_word", name="my-cat", pictures=cat)
    assert "words: " in fails(client, "/add_word", name="<b>", pictures=[])
    assert "words: " in fails(client, "/add_word", name="2 cats!", pictures=cat)
    assert "words: Give the word a name" in fails(client, "/add_word", name=" ", pictures=cat)
    word = generate(client, "<my-cat> in the snow")[0][0]
    image = generate(client, "<i> in the snow", [CAT])[0][0]
    difference = [abs(a - b) for a, b in zip(pixels(word), pixels(image), strict=True)]
    assert max(difference) <= 1  # the image was encoded in another batch
    other = connect()
    assert "not an image word" in fails(other, prompt="<my-cat> in the snow", **STEPS)
    file = client.predict(api_name="/save_words")
    other.predict(file=gradio_client.handle_file(file), api_name="/load_words")
    assert pixels(generate(other, "<my-cat> in the snow")[0][0]) == pixels(word)
    other.predict(word="<my-cat>", api_name="/forget_word")
    assert "not an image word" in fails(other, prompt="<my-cat> in the snow", **STEPS)
    assert len(read_settings(word).image_words) == 1


def test_file_that_holds_no_words_is_refused(client, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    file = gradio_client.handle_file(str(tmp_path / "x.safetensors"))
    assert "words: This is not a file of image words" in fails(client, "/load_words", file=file)
    save_file({"<x>": torch.zeros(1)}, tmp_path / "y.safetensors")
    file = gradio_client.handle_file(str(tmp_path / "y.safetensors"))
    told = fails(client, "/load_words", file=file)
    assert "words: " in told and "format" in told and str(tmp_path) not in told


def test_images_that_are_returned_and_written_and_previews_are_marked(app, client):
    with slow_steps(app.service, 0.3):
        job = client.submit(prompt="a hat", **STEPS, api_name="/generate")
        ((image,), *_), told = job.result(), str(job.outputs())
    paths = image["image"], max((app.folder / "images").iterdir(), key=os.path.getmtime)
    previews = re.findall("data:image/jpeg;base64,([A-Za-z0-9+/=]+)", told)
    assert previews and {term_of(file) for file in (*paths, *map(base64.b64decode, previews))} == {DRAWN}


def test_app_leaves_marks_out_when_asked_to(app, client, monkeypatch):
    monkeypatch.setattr(app.service, "marker", UNMARKED)
    (path,), *_ = generate(client)
    assert term_of(path) is None and read_settings(path).prompt == "a hat"


def test_full_queue_is_told_and_cancel_works_in_it(app, connect):
    clients = [connect() for _ in range(4)]
    with slow_steps(app.service, 0.1):
        jobs = []
        for index, client in enumerate(clients[:3]):  # one runs, two wait: the capacity of this app
            jobs.append(client.submit(prompt="a hat", steps=250, api_name="/generate"))
            wait_for(lambda count=index: len(app.service.worker._waiting) == count)
            wait_for(lambda: app.service.worker._running is not None)
        assert "The queue is full: 2 runs are waiting" in fails(clients[3], prompt="a hat", **STEPS)
        wait_for(lambda: "place 2" in str(jobs[2].outputs()))
        clients[1].predict(api_name="/cancel")
        assert "Cancelled" in jobs[1].result()[2]
        wait_for(lambda: "place 1" in str(jobs[2].outputs()))
        for index in (2, 0):
            clients[index].predict(api_name="/cancel")
            assert "Cancelled" in jobs[index].result()[2]
    wait_for(lambda: app.service.worker._running is None)


def test_images_that_were_finished_before_a_cancel_are_kept(app, client):
    with slow_steps(app.service, 0.3) as steps:
        job = client.submit(prompt="a hat", steps=4, num_images=8, api_name="/generate")
        wait_for(lambda: len(steps) > 9)
        client.predict(api_name="/cancel")
        images, settings, progress = job.result()
    assert 2 <= len(images) == len(settings) < 8
    assert f"{len(images)} images were finished" in progress


def test_clients_at_once_get_their_own_images(connect):
    """As many as this app takes: one that runs and two that wait."""

    def draw(seed):
        paths, settings, _ = generate(connect(), f"hat {seed}", seed=seed)
        png = read_settings(paths[0])
        return png.seed, png.prompt, settings[0]["seed"]

    seeds = (11, 12, 13)
    with ThreadPoolExecutor(len(seeds)) as clients:
        assert list(clients.map(draw, seeds)) == [(seed, f"hat {seed}", seed) for seed in seeds]


def test_example_client_runs(app, tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[2] / "examples" / "app_client.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) < 80
    arguments = [str(example), app.url, "--steps", "2", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(example), run_name="__main__")
    written = sorted((tmp_path / "out").glob("*.png"))
    assert len(written) == 2 and all(read_settings(path).steps == 2 for path in written)
    assert all(str(path) in capsys.readouterr().out for path in written[:1])


def test_command_refuses_a_bad_password_and_says_where_gradio_comes_from(monkeypatch):
    assert read_auth("anna:a:b") == ("anna", "a:b")
    for text in ("anna", ":x", "anna:"):
        with pytest.raises(ValueError, match="USER:PASSWORD"):
            read_auth(text)
    assert inspect.getdoc(inspect.getmodule(read_auth)).startswith("Open Kosmos-G in a browser.")
