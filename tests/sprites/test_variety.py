"""Training beyond the world's own: up to four sprites in any places, drawings and words as other people make them."""

import math
import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kosmos_g_diffusers import KosmosGTokenizer
from kosmos_g_diffusers.sprites import variety
from kosmos_g_diffusers.sprites.reader import find_sprites
from kosmos_g_diffusers.sprites.reader import read as read_image
from kosmos_g_diffusers.sprites.source import SpriteSource
from kosmos_g_diffusers.sprites.variety import MOST_WORDS, draw_varied_photo, type_scene
from kosmos_g_diffusers.sprites.world import (
    BACKGROUNDS,
    COLOURS,
    GAP_ACROSS,
    GAP_DOWN,
    IMAGE_SIZE,
    PATTERNS,
    SHAPES,
    SIZES,
    TRAINING_TRIPLES,
    Scene,
    Sprite,
    draw_scene_at_random,
    draw_sprite_at_random,
    make_rng,
    place_at_random,
    render,
)

SPRITE = re.compile("({}) ({}) ({}) ({})".format(*map("|".join, (SIZES, COLOURS, PATTERNS, SHAPES))))


def read(kind, index, seed=0):
    return SpriteSource(kind, 500, wide=True).read(index, random.Random(seed))


@pytest.mark.parametrize("n_sprites", [1, 2, 3, 4])
def test_sprites_in_any_places_keep_apart_and_within_the_image(n_sprites):
    for number in range(60):
        rng = make_rng("places", n_sprites, number)
        scene = draw_scene_at_random(rng, n_sprites)
        assert len({sprite.triple[:2] for sprite in scene.sprites}) == n_sprites
        places = place_at_random(scene, rng, anywhere=True)
        if sum(sprite.size == "large" for sprite in scene.sprites) > 1:
            continue  # they stand next to each other
        for index, (x, y, radius) in enumerate(places):
            assert radius <= min(x, y, IMAGE_SIZE - x, IMAGE_SIZE - y)
            for u, v, other in places[:index]:
                apart = radius + other
                assert abs(x - u) >= apart + GAP_ACROSS or abs(y - v) >= apart + GAP_DOWN


@pytest.mark.parametrize("n_sprites", [3, 4])
def test_scenes_of_three_and_four_are_read_again(n_sprites):
    rng, right = make_rng("several", n_sprites), 0
    for _ in range(50):
        scene = draw_scene_at_random(rng, n_sprites)
        found = read_image(render(scene, rng))
        right += sorted(s.triple for s in found.sprites) == sorted(s.triple for s in scene.sprites)
        assert found.background == scene.background
        assert len(scene.caption.split()) <= MOST_WORDS
        assert [s[1:] for s in SPRITE.findall(scene.caption)] == [
            (s.colour, s.pattern, s.shape) for s in scene.sprites
        ]
    assert right >= 48


def test_drawings_have_the_nearest_colour_and_are_in_the_image():
    for number in range(80):
        rng = make_rng("varied", number)
        sprite = draw_sprite_at_random(rng)
        pixels = np.asarray(draw_varied_photo(sprite, rng), dtype=float)
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        ground = np.median(border, axis=0)
        covered = np.linalg.norm(pixels - ground, axis=-1) > 40
        assert covered.any()
        if sprite.pattern == "plain" and covered.sum() > 60:
            colourful = pixels[covered & (pixels.max(-1) > 60)]  # no ink of a thin line
            far = colourful[np.linalg.norm(colourful - ground, axis=-1) > 90]
            if len(far) > 30:
                median = np.median(far, axis=0)
                nearest = sorted(COLOURS, key=lambda name: math.dist(COLOURS[name], median))
                assert sprite.colour in nearest[:2]


def test_typed_prompts_say_what_their_captions_say():
    kinds = set()
    for number in range(400):
        rng = make_rng("typed", number)
        scene = draw_scene_at_random(rng, 1 + number % 4)
        typed, caption = type_scene(scene, rng)
        words = caption.split()
        assert len(words) <= MOST_WORDS
        assert [word for word in words if word in SHAPES] == [sprite.shape for sprite in scene.sprites]
        assert {word for word in words if word in COLOURS} <= {sprite.colour for sprite in scene.sprites}
        named = {*SHAPES, *COLOURS, *PATTERNS, *SIZES, *BACKGROUNDS}
        missing = {word for word in words if word in named} - set(re.findall(r"\w+", typed))
        assert len(missing) <= 1  # one typing error at most
        kinds.add((typed == caption, bool(missing), "," in typed))
    assert len(kinds) >= 5


@pytest.mark.parametrize("kind", ["captions", "varied pictures", "compositions"])
def test_wide_samples_show_and_name_nothing_held_out(kind):
    for index in range(150):
        sample = read(kind, index)
        texts = [part for part in sample.prompt if isinstance(part, str)] + [sample.caption]
        for text in texts:
            for _, colour, pattern, shape in SPRITE.findall(text):
                assert (shape, colour, pattern) in TRAINING_TRIPLES


def shapes_in_reading_order(image):
    """Shapes of an image's sprites by the places of their pixels; None where two places are about as far along."""
    found = []
    for sprite, cover in find_sprites(image):
        y, x = (places.mean() for places in np.nonzero(cover > 0.5))
        found.append((x + y / 2, sprite.shape))
    found.sort()
    if any(second[0] - first[0] < 4 for first, second in pairwise(found)):
        return None
    return [shape for _, shape in found]


def test_wide_samples_have_one_to_four_sprites_mostly_named_in_reading_order():
    numbers, in_order = set(), {"varied pictures": [], "captions": []}
    for index in range(120):
        sample = read("compositions", index)
        images = sum(isinstance(part, Image.Image) for part in sample.prompt)
        numbers.add((len(read_image(sample.target).sprites), images))
        for kind, seen in in_order.items():
            sample = read(kind, index)
            image = sample.target or sample.prompt[0]
            named = re.findall("|".join(SHAPES), sample.caption)
            if len(named) > 2 and (shapes := shapes_in_reading_order(image)):
                seen.append(named == shapes)
    assert {number for number, _ in numbers} >= {1, 2, 3, 4} <= {images for _, images in numbers}
    assert all(in_order["varied pictures"])
    assert 0.55 < np.mean(in_order["captions"]) < 0.95 and len(in_order["captions"]) > 20


def test_images_of_wide_samples_follow_from_the_number_alone():
    for index in range(10):
        first, second = (read("captions", index, seed) for seed in (0, 1))
        assert np.array_equal(first.target, second.target)


def test_what_measures_is_not_what_trains():
    text = Path(variety.__file__).read_text(encoding="utf-8")
    assert "import drawings" not in text and "import typed_words" not in text


def test_small_model_reads_capitals_as_small_letters():
    pieces = [
        ("▁red", -2.0),
        ("▁Star", -2.0),
        *((f"{letter}", -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyzS"),
    ]
    plain, folded = (KosmosGTokenizer.from_vocabulary(pieces, lowercase=fold) for fold in (False, True))
    assert folded("A RED StaR").input_ids == plain("a red star").input_ids
    assert plain("RED").input_ids != plain("red").input_ids


def test_sprites_that_have_no_room_are_refused():
    scene = Scene(
        tuple(Sprite("star", colour, "plain", "large") for colour in ("red", "blue", "green")), "mint"
    )
    with pytest.raises(ValueError, match="no room for 3 sprites .* let one at most be large"):
        render(scene, random.Random(0))
