from pathlib import Path

import PIL.Image
import pytest

from kosmos_g_diffusers import SPRITES as PUBLIC
from kosmos_g_diffusers.sprites import HEART, SPRITES, STAR
from kosmos_g_diffusers.sprites.reader import read
from kosmos_g_diffusers.sprites.world import is_held_out

EXAMPLES = Path(__file__).parents[2] / "examples" / "images"


@pytest.mark.parametrize(
    "path, caption",
    [
        (STAR, "a large yellow striped star on a lavender background"),
        (HEART, "a large red dotted heart on a grey background"),
    ],
)
def test_images_that_ship_are_held_out_sprites_of_the_examples(path, caption):
    assert SPRITES == PUBLIC
    scene = read(PIL.Image.open(path))
    assert scene.caption == caption and is_held_out(scene.sprites[0])
    assert Path(path).read_bytes() == (EXAMPLES / Path(path).name).read_bytes()
