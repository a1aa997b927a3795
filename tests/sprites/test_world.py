"""The miniature world and its reader: what is drawn is read again, also from soft, noisy and compressed images."""

import io
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kosmos_g_diffusers.sprites.reader import read
from kosmos_g_diffusers.sprites.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_TRIPLES,
    IMAGE_SIZE,
    INK,
    PATTERNS,
    SHAPES,
    SIZES,
    TRAINING_TRIPLES,
    Scene,
    Sprite,
    _erode,
    draw_scene_at_random,
    draw_sprite_at_random,
    is_held_out,
    make_rng,
    recolour,
    render,
)

TRIPLES = [*TRAINING_TRIPLES, *HELD_OUT_TRIPLES]


def _distance(pixels, colour):
    return np.linalg.norm(np.asarray(pixels, dtype=float) - colour, axis=-1)


# The world --------------------------------------------------------------------------------------------------------


def test_a_fifth_of_the_triples_is_held_out():
    assert sorted(TRIPLES) == sorted(product(SHAPES, COLOURS, PATTERNS))
    assert 0.18 < len(HELD_OUT_TRIPLES) / len(TRIPLES) < 0.22


@pytest.mark.parametrize("part", [TRAINING_TRIPLES, HELD_OUT_TRIPLES])
def test_every_attribute_is_in_both_parts(part):
    assert [set(values) for values in zip(*part, strict=True)] == [set(SHAPES), set(COLOURS), set(PATTERNS)]


@pytest.mark.parametrize("first, second", [(0, 1), (0, 2), (1, 2)])
def test_training_shows_every_pair_of_attributes(first, second):
    values = SHAPES, tuple(COLOURS), PATTERNS
    pairs = {(triple[first], triple[second]) for triple in TRAINING_TRIPLES}
    assert pairs == set(product(values[first], values[second]))


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_at_random_keep_to_their_part_and_show_all_of_it(held_out):
    scenes = [draw_scene_at_random(make_rng("scenes", i), held_out=held_out) for i in range(2000)]
    sprites = [sprite for scene in scenes for sprite in scene.sprites]
    assert {sprite.triple for sprite in sprites} == set(HELD_OUT_TRIPLES if held_out else TRAINING_TRIPLES)
    assert {sprite.size for sprite in sprites} == set(SIZES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {len(scene.sprites) for scene in scenes} == {1, 2}


def test_two_sprites_of_a_scene_differ_in_shape_or_colour():
    for i in range(500):
        one, other = draw_scene_at_random(make_rng("two", i), 2).sprites
        assert (one.shape, one.colour) != (other.shape, other.colour)


def test_caption_says_all():
    star, ring = Sprite("star", "red", "striped", "large"), Sprite("ring", "blue", "plain", "small")
    assert Scene((star,), "mint").caption == "a large red striped star on a mint background"
    assert (
        Scene((star, ring), "grey").caption
        == "a large red striped star and a small blue plain ring on a grey background"
    )
    assert len({str(Sprite(*triple, size)) for triple in TRIPLES for size in SIZES}) == 512


def test_same_rng_same_image_and_another_rng_another():
    scene = draw_scene_at_random(random.Random(0))
    first, again, other = (render(scene, make_rng("place", i)) for i in (0, 0, 1))
    assert first.size == (IMAGE_SIZE, IMAGE_SIZE) and first.mode == "RGB"
    assert first == again and first != other


@pytest.mark.parametrize("reach", [1, 8, 40])
def test_borders_are_eroded_as_pil_does(reach):
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 29), dtype=np.uint8))
    assert _erode(mask, reach).tobytes() == mask.filter(ImageFilter.MinFilter(2 * reach + 1)).tobytes()


def test_two_sprites_keep_to_their_halves():
    half = IMAGE_SIZE // 2
    for i in range(100):
        rng = make_rng("halves", i)
        left, right = (replace(draw_sprite_at_random(rng), colour=colour) for colour in ("red", "blue"))
        pixels = np.asarray(render(Scene((left, right), "white"), rng))
        assert (_distance(pixels[:, half:], COLOURS["red"]) > 30).all()
        assert (_distance(pixels[:, :half], COLOURS["blue"]) > 30).all()


def test_recolouring_changes_the_colour_alone_and_keeps_the_part():
    alone = 0
    for triple in TRIPLES:
        sprite = Sprite(*triple, "small")
        others = {replace(sprite, colour=colour) for colour in COLOURS} - {sprite}
        allowed = {other for other in others if is_held_out(other) == is_held_out(sprite)}
        if allowed:
            assert {recolour(sprite, make_rng(triple, i)) for i in range(8)} <= allowed
        else:
            alone += 1
            with pytest.raises(ValueError, match=f"no other held-out colour for {sprite}"):
                recolour(sprite, make_rng(triple))
    assert 0 < alone < len(HELD_OUT_TRIPLES) / 2


def test_no_colour_of_a_sprite_is_near_a_background_or_another_colour():
    for background in BACKGROUNDS.values():
        assert (_distance([*COLOURS.values(), INK], background) > 80).all()
    for one, other in combinations([*COLOURS.values(), INK], 2):
        assert _distance(one, other) > 80


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("size", SIZES)
def test_ink_and_colour_of_every_sprite_are_to_be_seen(background, size):
    for shape, pattern in product(SHAPES, PATTERNS):
        pixels = render(
            Scene((Sprite(shape, "purple", pattern, size),), background), make_rng(shape, pattern)
        )
        ink, colour = ((_distance(pixels, what) < 60).sum() for what in (INK, COLOURS["purple"]))
        assert colour > 15
        assert ink == 0 if pattern == "plain" else ink > 15


# The reader -------------------------------------------------------------------------------------------------------


def _blur(image, rng):
    return image.filter(ImageFilter.GaussianBlur(0.7))


def _add_noise(image, rng):
    noisy = np.asarray(image) + rng.normal(0, 10, (IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def _compress(image, rng):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return Image.open(file)


def _tint(image, rng):
    tinted = np.asarray(image) * rng.uniform(0.95, 1.05) + rng.uniform(-10, 10, 3)
    return Image.fromarray(tinted.round().clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def scenes():
    """Scenes of both parts with their images."""
    rngs = [make_rng("read", i) for i in range(160)]
    scenes = [draw_scene_at_random(rng, held_out=bool(i % 2)) for i, rng in enumerate(rngs)]
    return [(scene, render(scene, rng)) for scene, rng in zip(scenes, rngs, strict=True)]


@pytest.mark.parametrize(
    "worsen",
    [
        lambda image, rng: image,
        _blur,
        _add_noise,
        lambda image, rng: _add_noise(_blur(image, rng), rng),
        _compress,
        _tint,
    ],
    ids=["clean", "blurred", "noisy", "blurred and noisy", "compressed", "tinted"],
)
def test_reader_reads_what_was_drawn(scenes, worsen):
    rng = np.random.default_rng(0)
    right, total = Counter(), Counter()
    for scene, image in scenes:
        found = read(worsen(image, rng))
        total.update(["count", "background"])
        right["count"] += len(found.sprites) == len(scene.sprites)
        right["background"] += found.background == scene.background
        for index, sprite in enumerate(scene.sprites):
            guess = found.sprites[index] if index < len(found.sprites) else None
            for attribute in ("shape", "colour", "pattern", "size"):
                total[attribute] += 1
                right[attribute] += getattr(guess, attribute, None) == getattr(sprite, attribute)
    assert {name: right[name] / total[name] for name in total if right[name] < 0.99 * total[name]} == {}


def test_recolouring_changes_the_colour_read_alone():
    for i in range(40):
        rng = make_rng("recolour", i)
        scene = draw_scene_at_random(rng)
        first, *rest = scene.sprites
        recoloured = Scene((recolour(first, rng), *rest), scene.background)
        before, after = (read(render(each, make_rng("place", i))) for each in (scene, recoloured))
        assert before == scene
        assert after == Scene(
            (replace(before.sprites[0], colour=recoloured.sprites[0].colour), *before.sprites[1:]),
            before.background,
        )


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_empty_image_has_no_sprites(background):
    empty = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[background])
    for image in (empty, _add_noise(empty, np.random.default_rng(0))):
        assert read(image) == Scene((), background)


def test_sprite_is_read_anywhere():
    for i in range(40):
        rng = make_rng("anywhere", i)
        scene = draw_scene_at_random(rng, 1)
        pixels = np.asarray(render(scene, rng))
        rows, columns = np.nonzero((pixels != pixels[0, 0]).any(-1))
        shift = [rng.randint(-taken.min(), IMAGE_SIZE - 1 - taken.max()) for taken in (rows, columns)]
        assert read(np.roll(pixels, shift, axis=(0, 1))) == scene


def test_sprites_that_touch_are_told_apart():
    class TowardsEachOther(random.Random):
        """Both as large as can be, the left one to the right and the right one to the left."""

        draws = 0

        def uniform(self, low, high):
            self.draws += 1
            return low if self.draws == 5 else high  # radius, x, y of the left, then radius, x

    for i in range(40):
        scene = draw_scene_at_random(make_rng("touch", i), 2)
        assert read(_blur(render(scene, TowardsEachOther()), None)) == scene


def test_more_than_two_sprites_are_all_found():
    scenes = [
        Scene((Sprite("circle", colour, "plain", "small"),), "white") for colour in ("red", "green", "blue")
    ]
    pixels = [np.asarray(render(scene, make_rng("three"))) for scene in scenes]
    rows, columns = np.nonzero((pixels[0] < 250).any(-1))
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    together = np.full_like(pixels[0], 250)
    for image, (top, left) in zip(pixels, ((2, 2), (2, 40), (38, 21)), strict=True):
        cut = image[rows.min() : rows.min() + side, columns.min() : columns.min() + side]
        together[top : top + side, left : left + side] = cut
    assert [sprite.colour for sprite in read(together).sprites] == ["red", "blue", "green"]


@pytest.mark.filterwarnings("error")
def test_reader_guesses_at_any_image():
    rng = np.random.default_rng(0)
    for side in (1, 2, 5, 9, 64):
        for _ in range(20):
            image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            assert read(image.resize((IMAGE_SIZE, IMAGE_SIZE))).background in BACKGROUNDS


def test_image_and_array_are_read_alike(scenes):
    scene, image = scenes[0]
    assert read(image) == read(np.asarray(image)) == read(image.convert("RGBA")) == scene


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (128, 128)),
        np.zeros((3, 64, 64), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 3), np.float32),
    ],
    ids=["another size", "channels first", "grey", "not bytes"],
)
def test_image_of_another_size_or_kind_is_refused(image):
    with pytest.raises(ValueError, match="Expected a PIL image of 64 x 64 pixels or a uint8 array"):
        read(image)
