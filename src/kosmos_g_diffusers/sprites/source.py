"""Sprites as training data: a sample's pictures follow from its number and are drawn when it is read."""

from dataclasses import replace

from ..training.data import IMAGE_LENGTH, Sample
from .world import (
    BACKGROUNDS,
    PATTERNS,
    SIZES,
    Scene,
    draw_scene_at_random,
    is_held_out,
    make_rng,
    recolour,
    render,
)

GROUP = 1_000  # samples; each of them is a file of other sources
KINDS = ("captions", "pictures", "compositions", "edits")


class SpriteSource:
    """Samples of the miniature world's training part, a `Source` of training.data.

    Args:
        kind: what the samples are.
            "captions": words alone; a part of them leaves attributes or the background out.
            "pictures": a picture, then the caption that says all of it: what stage 1 learns to say.
            "compositions": one or two sprites, pictures in place of their words (or behind them, with probability
            1 - entity_dropout), on a background; now and then one of two stays in words.
            "edits": a picture, and a colour, pattern or size that the target has instead.
        size: samples. Their pictures are fixed, so that work on them can be kept; words are varied at every reading.
        entity_dropout: see "compositions".
    """

    def __init__(self, kind, size=50_000, entity_dropout=0.5):
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}. Expected one of {', '.join(KINDS)}.")
        self.kind, self.size, self.entity_dropout = kind, size, entity_dropout
        self.name = f"sprites:{kind}"
        self.groups = [GROUP] * (size // GROUP) + [size % GROUP] * (size % GROUP > 0)

    def __len__(self):
        return self.size

    def length(self, index):
        n_sprites = self._n_sprites(index)
        return n_sprites * (25 + IMAGE_LENGTH * (self.kind != "captions"))

    def read(self, index, rng):
        key, fixed = f"{self.name}:{index}", make_rng(self.name, index, "pictures")
        if self.kind == "edits":
            return self._edit(key, fixed)
        scene = draw_scene_at_random(fixed, self._n_sprites(index))
        picture = render(scene, fixed)
        if self.kind == "pictures":
            return Sample(key, (picture, scene.caption), None, scene.caption)
        if self.kind == "captions":
            caption = shorten(scene, rng) if rng.random() < 0.3 else scene.caption
            return Sample(key, (caption,), picture, caption)
        return Sample(key, self._compose(scene, fixed, rng), picture, scene.caption)

    def _n_sprites(self, index):
        return 1 if self.kind == "edits" else 1 + make_rng(self.name, index).randrange(2)

    def _compose(self, scene, fixed, rng):
        """Prompt in reading order: pictures for sprites, then the background."""
        photos = [draw_photo(sprite, fixed) for sprite in scene.sprites]
        prompt = []
        in_words = (
            rng.randrange(6) if len(scene.sprites) == 2 else None
        )  # 0 and 1: that sprite has no picture
        for index, sprite in enumerate(scene.sprites):
            if index:
                prompt.append("and")
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


def draw_photo(sprite, rng):
    """A picture of one sprite alone, on a background of its own: what stands for `<i>` in a prompt."""
    return render(Scene((sprite,), rng.choice(list(BACKGROUNDS))), rng)


def shorten(scene, rng):
    """A caption that leaves some attributes out, as people write: "a striped star on a mint background"."""
    parts = []
    for sprite in scene.sprites:
        names = [sprite.size, sprite.colour, sprite.pattern]
        kept = [name for name in names if rng.random() < 0.6]
        words = " ".join([*kept, sprite.shape])
        parts.append(("an " if words[0] in "aeiou" else "a ") + words)
    text = " and ".join(parts)
    return text if rng.random() < 0.3 else f"{text} on a {scene.background} background"
