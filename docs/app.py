"""Make what app.md shows, and the example that the page begins with: `make app-figures`.

Needs Chromium and playwright, as tests/app does. The small model that ships draws; so it is run again when another one ships.
"""

import io
import tempfile
from pathlib import Path

import PIL.Image
from support.app import chromium, saved, serving, visiting

from kosmos_g_diffusers.app.examples import RESULT

DOCS = Path(__file__).parent
SEED = 1  # of what the page begins with


def draw(page, example, **numbers):
    """Load an example by its place on the page, and draw it with the seed 1."""
    page.click(f".kg-example >> nth={example}")
    page.wait_for_selector("#prompt-line .kg-good")
    for name, value in {"seed": SEED, **numbers}.items():
        page.fill(f"#{name} input", str(value))
    page.click("#run")
    page.wait_for_selector("#progress:has-text('Done')")
    page.wait_for_selector("#details table")


def main():
    with tempfile.TemporaryDirectory() as folder, serving(folder, toy=False) as app, chromium() as browser:
        with visiting(browser, app) as page:
            draw(page, 0)
            RESULT.write_bytes(saved(page))
    with tempfile.TemporaryDirectory() as folder, serving(folder, toy=False) as app, chromium() as browser:
        for name, width, scheme in (
            ("1280", 1280, "light"),
            ("1280-dark", 1280, "dark"),
            ("400", 400, "light"),
        ):
            with visiting(browser, app) as page:
                page.emulate_media(color_scheme=scheme)
                page.set_viewport_size({"width": width, "height": 900})
                page.goto(app.url)
                page.wait_for_selector("text=Ready.")
                if name == "1280":
                    shoot(page, "first")
                draw(page, 1, num_images=4)
                shoot(page, name)


def shoot(page, name):
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # until what moves has come to rest
    image = PIL.Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    # a quarter of the size as it was: few colours are in it
    image.quantize(128).save(DOCS / f"app-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
