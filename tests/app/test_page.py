"""The page in a real browser: headless Chromium against the running app."""

import os
import shlex
import sys
from pathlib import Path

import PIL.Image
import pytest
from support.app import (
    PATIENCE,
    chromium,
    control_image_of,
    drop,
    run,
    saved,
    serving,
    slow_steps,
    slowness,
    table,
    unfold,
    visiting,
    wait_for,
)

from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.control.controls import control_image
from kosmos_g_diffusers.generation.png import read_settings, write_png
from kosmos_g_diffusers.generation.settings import GenerationSettings, InputImage

PHOTOS = Path(__file__).parents[2] / "examples" / "images"
CAT, COFFEE = PHOTOS / "cat.jpg", PHOTOS / "coffee.jpg"
PROMPT = "#prompt textarea"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    loras = tmp_path_factory.mktemp("loras")
    for name in "ab":
        (loras / f"{name}.safetensors").touch()
    with serving(tmp_path_factory.mktemp("app"), lora_folder=loras) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def page(app, browser):
    with visiting(browser, app) as opened:
        yield opened


def ask(page, prompt, *images, steps=2, **numbers):
    page.fill(PROMPT, prompt)
    if images:
        drop(page, "#pictures", *images)
    page.wait_for_selector(f"#prompt-line:has-text('{prompt.count('<i>')} <i>, {len(images)} image')")
    for name, value in {"steps": steps, **numbers}.items():
        page.fill(f"#{name} input", str(value))


def seed_of(page, seed):
    page.fill("#seed input", str(seed))


def choose(page, name, text):
    page.click(f"#{name} input")
    page.click(f"[role=option]:has-text('{text}')")


def shown_images(page):
    """Names of the thumbnails of the prompt's images, in their order."""
    return page.locator("#pictures .kg-tile img").evaluate_all("images => images.map(image => image.alt)")


def paint(page, canvas):
    """A stroke across the middle of a board."""
    wait_for(lambda: canvas.evaluate("canvas => canvas.style.backgroundImage.length > 10"))
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5, steps=4)
    page.mouse.up()


def test_two_images_and_a_prompt_give_images_and_their_settings(app, page, tmp_path):
    ask(page, "<i> beside <i>", CAT, COFFEE, num_images=2)
    assert page.locator("#prompt-line img").count() == 2
    seed_of(page, 5)
    run(page)
    assert page.locator("#images img").count() == 2
    shown = table(page)
    assert (shown["prompt"], shown["seed"], shown["steps"]) == ("<i> beside <i>", "5", "2")
    # what the browser gets is the file with its settings, not a copy in another format
    for index in range(2):
        path = tmp_path / f"{index}.png"
        path.write_bytes(saved(page, index))
        settings = read_settings(path)
        assert (settings.seed, settings.steps, len(settings.images)) == (5 + index, 2, 2)
    page.locator("#images button.thumbnail-item, #images .thumbnail-lg").nth(1).click()
    page.wait_for_selector("#details td:text-is('6')")
    with page.expect_download() as download:  # of the image that was chosen
        page.get_by_role("button", name="Download", exact=True).locator("visible=true").first.click()
    assert read_settings(download.value.path()).seed == 6


def test_page_says_what_is_missing_and_a_run_says_it_by_the_prompt(page):
    page.fill(PROMPT, "<i> in the style of <i>")
    drop(page, "#pictures", CAT)
    page.wait_for_selector("#prompt-line:has-text('2 <i>, 1 image: one image is missing')")
    assert page.locator("#prompt-line .kg-hole").count() == 1
    page.click("#run")
    page.wait_for_selector("#prompt-message:has-text('one image is missing')")
    page.set_input_files("#pictures input[type=file]", COFFEE)  # the button above the thumbnails
    page.wait_for_selector("#prompt-line:has-text('2 <i>, 2 images')")
    page.wait_for_selector("#prompt-message", state="hidden")  # the cause of the old error is gone
    page.fill("#steps input", "1")
    run(page)
    assert not page.locator("#prompt-message").is_visible()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", "0", "The number of steps is 0. Give a number from 1 to 250."),
        ("width", "60", "The width is 60 pixels. Take a multiple of 8: 56 or 64."),
        ("num_images", "1.5", "Give a whole number"),
        ("guidance", "99", "Give a number from 0 to 30"),
    ],
)
def test_bad_number_is_told_by_its_field_until_it_is_another(page, field, value, message):
    page.fill(PROMPT, "a hat")
    if field == "width":
        choose(page, "size", "another size")
    page.fill(f"#{field} input", value)
    page.click("#run")
    page.wait_for_selector(f"#{field}-message:has-text('{message}')")
    page.fill("#steps input" if field != "steps" else "#guidance input", "4")
    assert page.locator(f"#{field}-message").is_visible()  # that was not its cause
    page.fill(f"#{field} input", "8")
    page.wait_for_selector(f"#{field}-message", state="hidden")


def choose_control(page, kind):
    unfold(page, "#controls >> text=Controls")
    page.click("#control_1_kind input")
    page.click(f"[role=option]:has-text('{kind}:')")


def test_control_image_is_shown_before_a_run(page):
    choose_control(page, "tile")  # the image itself, in the size of the image to be made
    page.set_input_files("#control_1_picture input[type=file]", CAT)
    page.wait_for_selector("#control_1_picture img")
    assert control_image_of(page).tobytes() == control_image("tile", CAT, short_side=64).tobytes()
    ask(page, "a hat")
    run(page)
    assert table(page)["controls"] == "tile, strength 1, from 0 to 1"


def test_strokes_on_the_board_are_the_mask_and_the_drawing(page):
    choose_control(page, "inpaint")
    page.set_input_files("#control_1_picture input[type=file]", CAT)
    page.click("#control_1_look")
    page.wait_for_selector("#control_1-message:has-text('Paint over what is to be filled')")
    unfold(page, "text=Draw, or paint")
    paint(page, page.locator("#control_1_strokes canvas"))
    holes = control_image_of(page).convert("RGBA").getchannel("A")
    assert holes.getpixel((holes.width // 2, holes.height // 2)) == 0
    assert holes.getpixel((5, 5)) == 255
    assert 0.001 < sum(value == 0 for value in holes.tobytes()) / len(holes.tobytes()) < 0.1


def test_cancel_frees_the_worker_within_a_step(app, page, monkeypatch):
    with slow_steps(app.service, 0.2) as steps:
        cancel, seen = app.service.cancel, []

        def cancelled(session):
            result = cancel(session)
            seen.append(len(steps))
            return result

        monkeypatch.setattr(app.service, "cancel", cancelled)
        ask(page, "a hat", steps=200)
        page.click("#run")
        page.wait_for_selector("#progress .kg-preview")
        assert "left." in page.inner_text("#progress")
        page.click("#cancel")
        wait_for(lambda: seen and app.service.worker._running is None)
        assert len(steps) - seen[0] <= 1 and len(steps) < 100
        page.wait_for_selector("#progress:has-text('Cancelled at step')")
    page.fill("#steps input", "1")
    run(page)
    assert page.locator("#images img").count() == 1


def test_png_brings_its_settings_back(app, page, tmp_path):
    ask(page, "<i> and <i>", COFFEE, CAT, guidance=3)
    seed_of(page, 77)
    run(page)
    (tmp_path / "mine.png").write_bytes(saved(page))
    page.goto(app.url)
    page.wait_for_selector("text=Ready.")
    drop(page, "#restore", tmp_path / "mine.png")
    page.wait_for_selector("#restore-message:has-text('settings are back')")
    page.wait_for_selector("#prompt-line:has-text('2 <i>, 2 images')")
    assert page.input_value(PROMPT) == "<i> and <i>"
    assert [page.input_value(f"#{name} input") for name in ("seed", "steps", "guidance")] == ["77", "2", "3"]
    first = saved_pixels(tmp_path / "mine.png")
    run(page)
    (tmp_path / "again.png").write_bytes(saved(page))
    assert saved_pixels(tmp_path / "again.png") == first


def saved_pixels(path):
    return PIL.Image.open(path).tobytes()


def test_command_that_the_page_shows_makes_the_image_again(app, page, tmp_path):
    ask(page, "<i>, red", CAT, guidance=4)
    run(page)
    command = shlex.split(table(page)["again"])
    assert command[:3] == ["kosmos-g", "generate", "--from"] and command[-2:] == ["--output", "again.png"]
    (tmp_path / "mine.png").write_bytes(saved(page))
    assert main([*command[1:-1], str(tmp_path / "again.png")]) == 0  # in the output folder, as the tests are
    assert saved_pixels(tmp_path / "again.png") == saved_pixels(tmp_path / "mine.png")


def test_png_from_elsewhere_is_refused_by_its_field(page, tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    drop(page, "#restore", tmp_path / "plain.png")
    page.wait_for_selector("#restore-message:has-text('carries no settings')")
    settings = GenerationSettings("a hat", model="strange/model", lora="x.safetensors")
    write_png(PIL.Image.new("RGB", (8, 8)), tmp_path / "strange.png", settings)
    drop(page, "#restore", tmp_path / "strange.png")
    page.wait_for_selector("#restore-message:has-text('Its model is not offered here. Its LoRA is not')")
    assert page.input_value(PROMPT) == "a hat"


def test_prompt_is_text_wherever_it_is_shown(page):
    prompt = "x <img src=x onerror=alert(1)> <script >alert(2)</script > ${alert(3)} {{value}} &lt;b&gt;"
    page.fill(PROMPT, prompt)
    page.wait_for_selector("#prompt-line:has-text('onerror')")
    assert prompt in page.inner_text("#prompt-line")
    page.fill("#steps input", "1")
    run(page)  # a dialogue would fail the test
    assert table(page)["prompt"] == prompt
    assert page.locator("#prompt-line script, #details script, #details img").count() == 0


def test_image_becomes_input_and_stays_in_the_history(page):
    ask(page, "a hat", steps=1)
    run(page)
    page.click("#use")
    page.wait_for_selector("#prompt-line:has-text('1 <i>, 1 image')")
    assert page.input_value(PROMPT) == "a hat <i>"
    page.fill(PROMPT, "<i> in the snow")
    page.wait_for_selector("#prompt-line:has-text('1 <i>, 1 image')")
    run(page)
    page.wait_for_selector("#details td:text-is('<i> in the snow')")
    unfold(page, "text=History of this session")
    wait_for(lambda: page.locator("#history img").count() == 2)


def test_image_becomes_a_word_of_this_session_alone(app, page, browser):
    unfold(page, "text=Image words")
    drop(page, "#word-pictures", CAT)
    page.wait_for_selector("#word-pictures .file-preview :text('cat')")
    page.fill("#word-name textarea, #word-name input", "my-cat")
    page.click("#word-add")
    page.wait_for_selector("#words-message:has-text('<my-cat> is an image word now')")
    assert page.locator("#words-message img").count() == 1
    wait_for(lambda: page.input_value("#word-name textarea, #word-name input") == "")
    page.wait_for_selector("#word-pictures .file-preview", state="detached")
    page.wait_for_selector("#prompt-line [data-word='<my-cat>'] img")
    page.focus(PROMPT)
    page.keyboard.type("two <m")
    page.wait_for_selector("#kg-offer [role=option]:has-text('<my-cat>') img")
    page.keyboard.press("Enter")
    assert page.input_value(PROMPT) == "two <my-cat>"
    ask(page, "<my-cat> in the snow", steps=1)
    assert page.locator("#prompt-line .kg-prompt img").count() == 1
    run(page)
    page.click("#words-save")
    page.wait_for_selector("text=.safetensors")
    other = browser.new_page()
    other.goto(app.url)
    other.wait_for_selector("text=Ready.")
    other.fill(PROMPT, "<my-cat> in the snow")
    other.click("#run")
    other.wait_for_selector("#prompt-message:has-text('<my-cat> is not an image word')")
    other.close()


def test_example_loads_with_one_click_and_draws(page):
    page.wait_for_selector("#first img[alt='what was drawn of this prompt']")  # one with its result, at first
    assert not page.locator("#images").is_visible()
    assert page.locator(".kg-example >> nth=1").locator("img").count() == 2
    page.click(".kg-example >> nth=1")
    page.wait_for_selector("#prompt-line:has-text('2 <i>, 2 images')")
    page.fill("#steps input", "1")
    run(page)
    assert page.locator("#images").is_visible() and not page.locator("#first").is_visible()


def test_thumbnails_are_put_in_order_by_hand_and_by_keys(page, tmp_path):
    ask(page, "<i> and <i>", CAT, COFFEE, steps=1)
    wait_for(lambda: shown_images(page) == ["cat.jpg", "coffee.jpg"])
    page.drag_and_drop("#pictures .kg-tile >> nth=0", "#pictures .kg-tile >> nth=1")
    page.wait_for_function(
        "() => document.querySelectorAll('#prompt-line .kg-thumbnail')[0].src == "
        "document.querySelectorAll('#pictures .kg-tile img')[0].src"
    )
    assert shown_images(page) == ["coffee.jpg", "cat.jpg"]
    run(page)
    (tmp_path / "a.png").write_bytes(saved(page))
    kept = [image.sha256 for image in read_settings(tmp_path / "a.png").images]
    assert kept == [InputImage.from_file(path).sha256 for path in (COFFEE, CAT)]
    page.locator("#pictures .kg-tile").nth(1).press("ArrowLeft")
    wait_for(lambda: shown_images(page) == ["cat.jpg", "coffee.jpg"])
    page.locator("#pictures .kg-tile").nth(0).press("Delete")
    page.wait_for_selector("#prompt-line:has-text('2 <i>, 1 image')")
    assert shown_images(page) == ["coffee.jpg"]
    drop(page, "#pictures", CAT, onto=".kg-tiles")
    wait_for(lambda: shown_images(page) == ["coffee.jpg", "cat.jpg"])
    for left in (1, 0):
        page.click("#pictures .kg-remove >> nth=0")
        page.wait_for_selector(f"#prompt-line:has-text('2 <i>, {left} image')")


def test_size_is_one_choice_and_places_for_loras_come_one_by_one(page):
    page.fill(PROMPT, "a hat")
    page.fill("#steps input", "1")
    assert page.input_value("#size input") == "64 x 64, the model's own"
    assert not page.locator("#width").is_visible()
    choose(page, "size", "96 x 64")
    run(page)
    assert (table(page)["width"], table(page)["height"]) == ("96", "64")
    assert not page.locator("#lora_2").is_visible()
    choose(page, "lora", "b.safetensors")
    page.wait_for_selector("#lora_2_scale input >> nth=0")
    assert not page.locator("#lora_3").is_visible()


def test_keys_run_and_cancel(app, page):
    page.fill(PROMPT, "a hat")
    page.keyboard.press("Escape")  # nothing runs
    with slow_steps(app.service, 0.2):
        page.fill("#steps input", "200")
        page.press("#steps input", "Control+Enter")
        page.wait_for_selector("#progress .kg-preview")
        assert page.locator("#progress progress").get_attribute("max") == "100"
        page.keyboard.press("Escape")
        page.wait_for_selector("#progress:has-text('Cancelled at step')")


def test_image_is_changed_where_it_was_painted_on_and_comes_back_with_its_mask(app, page, tmp_path):
    page.fill(PROMPT, "a hat")
    page.fill("#steps input", "4")
    unfold(page, "#change >> text=Change an image")
    page.set_input_files("#init_image input[type=file]", CAT)
    page.wait_for_selector("#init_image img")
    paint(page, page.locator("#mask canvas"))
    run(page)
    assert table(page)["changed"] == "a part of an image, strength 0.8"
    (tmp_path / "mine.png").write_bytes(saved(page))
    assert read_settings(tmp_path / "mine.png").init_image.sha256 == InputImage.from_file(CAT).sha256
    command = shlex.split(table(page)["again"])
    assert main([*command[1:-1], str(tmp_path / "again.png")]) == 0
    assert saved_pixels(tmp_path / "again.png") == saved_pixels(tmp_path / "mine.png")
    page.goto(app.url)
    page.wait_for_selector("text=Ready.")
    drop(page, "#restore", tmp_path / "mine.png")
    page.wait_for_selector("#restore-message:has-text('settings are back')")
    painted = (
        "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean)"
    )
    wait_for(lambda: page.locator("#mask canvas").evaluate(painted))
    run(page)
    (tmp_path / "restored.png").write_bytes(saved(page))
    assert saved_pixels(tmp_path / "restored.png") == saved_pixels(tmp_path / "mine.png")


def test_on_a_phone_the_images_follow_the_run_button(page):
    page.set_viewport_size({"width": 400, "height": 800})
    page.fill(PROMPT, "a hat")
    page.fill("#steps input", "1")
    run(page)
    button, bar, images, examples = (
        page.locator(name).bounding_box() for name in ("#run", "#progress", "#images", "#examples")
    )
    assert button["y"] < bar["y"] < images["y"] < examples["y"]
    # between the button and the images there is the bar alone
    assert images["y"] - button["y"] - button["height"] - bar["height"] < 120
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_axe_finds_no_serious_fault_in_any_theme_and_width(page):
    """By axe-core, as its Python wheel carries it."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    )

    def serious():
        page.wait_for_timeout(500)  # colours that are on their way from one to another
        found = axe.Axe().run(page).response["violations"]
        return [
            (fault["id"], fault["nodes"][0]["html"])
            for fault in found
            if fault["impact"] in ("serious", "critical")
        ]

    assert not serious()
    page.click(".kg-example >> nth=1")
    page.wait_for_selector("#prompt-line:has-text('2 <i>, 2 images')")
    page.fill("#steps input", "1")
    run(page)
    for title in ("#change >> text=Change an image", "#controls >> text=Controls", "text=Image words"):
        unfold(page, title)
    for title in ("text=Where each image goes", "text=History of this session"):
        unfold(page, title)
    assert not serious()
    page.click("#theme button")
    page.wait_for_selector("body.dark")
    page.set_viewport_size({"width": 400, "height": 800})
    assert not serious()
    page.reload()
    page.wait_for_selector("body.dark")  # it is remembered


def test_page_asks_no_one_else_and_tells_no_path(app, browser, tmp_path):
    asked, bodies = [], []
    fresh = browser.new_context()
    page = fresh.new_page()
    page.set_default_timeout(1000 * PATIENCE * slowness())
    page.on("request", lambda request: asked.append(request.url))
    page.on("response", lambda response: bodies.append(response))
    page.goto(app.url)
    page.wait_for_selector("text=Ready.")
    ask(page, "<i>", CAT, steps=1)
    run(page)
    page.click("#use")
    page.wait_for_selector("#prompt-line:has-text('2 <i>, 2 images')")
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {app.url.split("/")[2]}
    told = page.content()
    for response in bodies:
        if "/heartbeat/" in response.url:  # a stream that stays open
            continue
        if "text" in response.headers.get("content-type", "") or "json" in response.headers.get(
            "content-type", ""
        ):
            try:
                told += response.text()
            except Exception:  # noqa: BLE001  a stream that is still open
                continue
    assert "images/" in told and "uploads/" in told
    for secret in (
        str(app.folder),
        os.path.expanduser("~") + "/",
        sys.prefix,
        "site-packages",
        str(Path(__file__).parents[2]),
    ):
        assert secret not in told
    fresh.close()
