"""Sprites as training data: a sample's images follow from its number and are drawn when it is read."""

from dataclasses import replace
from random import Random

from PIL import Image

from ..data import IMAGE_LENGTH, Sample
from ..processing_kosmos_g import CAPTION_PROMPT
from .variety import draw_varied_photo, type_scene, with_article
from .world import (
    BACKGROUNDS,
    PATTERNS,
    SIZES,
    Scene,
    Sprite,
    draw_colours_at_random,
    draw_scene_at_random,
    in_reading_order,
    is_held_out,
    make_rng,
    place_at_random,
    recolour,
    render,
    render_at,
)

GROUP = 1_000  # samples; each of them is a file of other sources
ANY_COLOURS = 0.5  # share of the varied images
# shares of captions that are whole and that leave parts out; the rest names shapes alone. Shapes are hardest to see, and said
# behind colour and pattern they are guessed from what triples there are: then none is right that is held out
CAPTIONS = {
    "captions": (0.7, 0.3),
    "pictures": (1.0, 0.0),
    "varied pictures": (0.3, 0.2),
    "asked pictures": (1.0, 0.0),
}
KINDS = (*CAPTIONS, "compositions", "edits")
# of the wide sources: shares of scenes of one, two, three, four sprites, and of those of one and two that stand anywhere
N_SPRITES = (0.26, 0.3, 0.22, 0.22)
ANYWHERE = 0.45
ORDERED = 0.7  # share of the wide scenes that words and images name in reading order, as people mostly do


class SpriteSource:
    """Samples of the miniature world's training part, a `Source` of the package's `data`.

    Args:
        kind: what the samples are.
            "captions": words alone; a part of them leaves attributes or the background out.
            "pictures": an image, then the caption that says all of it: what stage 1 learns to say first.
            "varied pictures": an image, then a caption that may leave parts out or name shapes alone: what it learns to
            say next. Half of the images have any colours instead of the named ones, and a caption without colours: else
            shapes are learned anew in each of the eight colours, and not recognised in those in which they are held out.
            "asked pictures": an image, "An image of" and the caption that says all: how `kosmos-g caption` asks.
            "compositions": one or two sprites, images in place of their words (or behind them, with probability
            1 - entity_dropout), on a background; now and then one of two stays in words.
            "edits": an image, and a colour, pattern or size that the target has instead.
        size: samples. Their images are fixed, so that work on them can be kept; words are varied at every reading.
        entity_dropout: see "compositions".
        wide: scenes of up to four sprites, in any places, and reference images and words as other people make them (`variety`).
            Captions of images then go in reading order, and most other prompts do. "captions" are prompts as people type them, with the caption that
            says the same beside them.
    """

    kind: str
    size: int
    entity_dropout: float
    wide: bool
    name: str
    groups: list[int]

    def __init__(self, kind: str, size: int = 50_000, entity_dropout: float = 0.5, wide: bool = False):
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}. Expected one of {', '.join(KINDS)}.")
        self.kind, self.size, self.entity_dropout, self.wide = kind, size, entity_dropout, wide
        self.name = f"sprites:{'wide ' * wide}{kind}"
        self.groups = [GROUP] * (size // GROUP) + [size % GROUP] * (size % GROUP > 0)

    def __len__(self) -> int:
        return self.size

    def length(self, index: int) -> int:
        n_sprites = self._n_sprites(index)
        return n_sprites * (25 + IMAGE_LENGTH * (self.kind != "captions"))

    def read(self, index: int, rng: Random) -> Sample:
        key, fixed = f"{self.name}:{index}", make_rng(self.name, index, "pictures")
        if self.kind == "edits":
            return self._edit(key, fixed)
        scene = draw_scene_at_random(fixed, self._n_sprites(index))
        if self.wide and self.kind in ("varied pictures", "captions"):
            return self._read_wide(key, scene, fixed, rng)
        if self.kind == "varied pictures" and fixed.random() < ANY_COLOURS:
            image = render(scene, fixed, colours=draw_colours_at_random(scene, fixed))
            caption = leave_colours_out(scene, rng)
            return Sample(key, (image, caption), None, caption)
        places = place_at_random(scene, fixed, anywhere=self.wide and fixed.random() < ANYWHERE)
        image = render_at(scene, places)
        if self.wide and fixed.random() < ORDERED:
            scene, places = in_reading_order(scene, places)
        if self.kind in CAPTIONS:
            caption = self._caption(scene, rng)
            if self.kind == "captions":
                return Sample(key, (caption,), image, caption)
            if self.kind == "asked pictures":
                return Sample(key, (image, f"{CAPTION_PROMPT} {caption}"), None, caption)
            return Sample(key, (image, caption), None, caption)
        return Sample(key, self._compose(scene, fixed, rng), image, scene.caption)

    def _read_wide(self, key, scene, fixed, rng):
        places = place_at_random(scene, fixed, anywhere=fixed.random() < ANYWHERE)
        if self.kind == "captions":
            if fixed.random() < ORDERED:
                scene, places = in_reading_order(scene, places)
            typed, caption = type_scene(scene, rng)
            return Sample(key, (typed,), render_at(scene, places), caption)
        if len(scene.sprites) == 1 and fixed.random() < 0.75:
            (sprite,) = scene.sprites
            photo = draw_varied_photo(sprite, fixed)
            kept = [word for word in (sprite.size, sprite.colour, sprite.pattern) if rng.random() < 0.5]
            caption = with_article(" ".join([*kept, sprite.shape]))
            return Sample(key, (photo, caption), None, caption)
        scene, places = in_reading_order(scene, places)
        colours = draw_colours_at_random(scene, fixed) if fixed.random() < 0.3 else None
        caption = self._caption(scene, rng) if colours is None else leave_colours_out(scene, rng)
        return Sample(key, (render_at(scene, places, colours), caption), None, caption)

    def _n_sprites(self, index):
        if self.kind == "edits":
            return 1
        rng = make_rng(self.name, index)
        return rng.choices((1, 2, 3, 4), N_SPRITES)[0] if self.wide else 1 + rng.randrange(2)

    def _caption(self, scene, rng):
        whole, shortened = CAPTIONS[self.kind]
        chance = rng.random()
        if chance < whole:
            return scene.caption
        if chance < whole + shortened:
            return shorten(scene, rng)
        return " and ".join(f"a {sprite.shape}" for sprite in scene.sprites)

    def _compose(self, scene, fixed, rng):
        """Prompt in reading order: images for sprites, then the background."""
        photos = [
            draw_varied_photo(sprite, fixed)
            if self.wide and fixed.random() < 0.5
            else draw_photo(sprite, fixed)
            for sprite in scene.sprites
        ]
        prompt = []
        # each of the first numbers: that sprite has no image
        in_words = rng.randrange(3 * len(scene.sprites)) if len(scene.sprites) > 1 else None
        between = "," if self.wide and rng.random() < 0.3 else "and"
        for index, sprite in enumerate(scene.sprites):
            if index:
                prompt.append("and" if index == len(scene.sprites) - 1 else between)
            words = index == in_words
            if words or rng.random() >= self.entity_dropout:
                prompt.append(str(sprite))
            if not words:
                prompt.append(photos[index])
        prompt.append(f"on a {scene.background} background")
        return tuple(prompt)

    def _edit(self, key, fixed):
        """`<i>, red`: the same sprite on the same background with one attribute changed."""
        before = draw_scene_at_random(fixed, 1)
        (sprite,) = before.sprites
        attribute = fixed.choice(("colour", "colour", "colour", "pattern", "size"))
        if attribute == "colour":
            edited = recolour(sprite, fixed)
        elif attribute == "size":
            edited = replace(sprite, size=next(size for size in SIZES if size != sprite.size))
        else:
            others = [replace(sprite, pattern=name) for name in PATTERNS if name != sprite.pattern]
            edited = fixed.choice([other for other in others if not is_held_out(other)])
        after = Scene((edited,), before.background)
        prompt = (render(before, fixed), f", {getattr(edited, attribute)}")
        return Sample(key, prompt, render(after, fixed), after.caption)


def draw_photo(sprite: Sprite, rng: Random) -> Image.Image:
    """An image of one sprite alone, on a background of its own: what stands for `<i>` in a prompt."""
    return render(Scene((sprite,), rng.choice(list(BACKGROUNDS))), rng)


def leave_colours_out(scene: Scene, rng: Random) -> str:
    """A caption such as "a small striped star and a moon"."""
    parts = []
    for sprite in scene.sprites:
        kept = [name for name in (sprite.size, sprite.pattern) if rng.random() < 0.3]
        parts.append(" ".join(["a", *kept, sprite.shape]))
    return " and ".join(parts)


def shorten(scene: Scene, rng: Random) -> str:
    """A caption that leaves some attributes out, as people write: "a striped star on a mint background"."""
    parts = []
    for sprite in scene.sprites:
        names = [sprite.size, sprite.colour, sprite.pattern]
        kept = [name for name in names if rng.random() < 0.6]
        parts.append(with_article(" ".join([*kept, sprite.shape])))
    text = " and ".join(parts)
    return text if rng.random() < 0.3 else f"{text} on a {scene.background} background"
