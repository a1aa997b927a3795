"""Prompts as people type them, not as captions of the miniature world say them."""

from dataclasses import dataclass
from random import Random

from .world import draw_scene_at_random

KINDS = {
    "capitals": "A LARGE RED STRIPED STAR ON A MINT BACKGROUND",
    "title case": "A Large Red Striped Star On A Mint Background",
    "sentence": "A large red striped star on a mint background.",
    "a photo of": "a photo of a large red striped star on a mint background",
    "quality words": "a large red striped star on a mint background, masterpiece, best quality, 8k",
    "attributes left out": "a red star",
    "shape alone": "star",
    "two shapes": "a red star and a blue ring",
    "one typo": "a large red stirped star on a mint background",
    "other order": "star, red, large, striped, mint background",
}
OPENINGS = ("a photo of", "a drawing of", "a painting of", "an image of", "draw")
QUALITY = (
    "masterpiece, best quality, 8k",
    "highly detailed",
    "4k, sharp focus",
    "best quality, trending on artstation",
)


@dataclass(frozen=True)
class Typed:
    """A prompt, and what it names: sprites of (shape, colour, pattern, size) and a background, None where it does not say."""

    kind: str
    prompt: str
    sprites: tuple[tuple[str | None, ...], ...]
    background: str | None


def type_at_random(kind: str, rng: Random) -> Typed:
    """A `Typed` prompt of a kind, of held-out sprites; rng is a random.Random."""
    scene = draw_scene_at_random(rng, 2 if kind == "two shapes" else 1, held_out=True)
    sprites, background, prompt = scene.sprites, scene.background, scene.caption
    named = ("shape", "colour", "pattern", "size")
    if kind in ("attributes left out", "shape alone", "two shapes"):
        named = ("shape",) if kind == "shape alone" else ("shape", "colour")
        opening = rng.choice(("", "a ")) if kind == "shape alone" else "a "
        words = [" ".join(getattr(sprite, name) for name in reversed(named)) for sprite in sprites]
        # "an": as English has it
        prompt = " and ".join(_with_article(part) if opening else part for part in words)
        background = None
    elif kind == "capitals":
        prompt = prompt.upper()
    elif kind == "title case":
        prompt = prompt.title()
    elif kind == "sentence":
        prompt = f"{prompt.capitalize()}."
    elif kind == "a photo of":
        prompt = f"{rng.choice(OPENINGS)} {prompt}"
    elif kind == "quality words":
        prompt = f"{prompt}, {rng.choice(QUALITY)}"
    elif kind == "one typo":
        prompt = _mistype(prompt, rng)
    elif kind == "other order":
        (sprite,) = sprites
        words = [sprite.colour, sprite.size, sprite.pattern]
        rng.shuffle(words)
        attributes, shape = words, sprite.shape
        prompt = rng.choice(
            (
                f"{shape}, {', '.join(attributes)}, {background} background",
                f"{background} background, {' '.join(attributes)} {shape}",
                f"on a {background} background a {shape}, {' and '.join(attributes)}",
            )
        )
    sprites = tuple(
        tuple(
            getattr(sprite, name) if name in named else None
            for name in ("shape", "colour", "pattern", "size")
        )
        for sprite in sprites
    )
    return Typed(kind, prompt, sprites, background)


def _with_article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _mistype(prompt, rng):
    """One word of four letters or more with a letter left out, doubled, or changed over with the next."""
    words = prompt.split()
    number = rng.choice([number for number, word in enumerate(words) if len(word) > 3])
    word, mistyped = words[number], words[number]
    while mistyped == word:
        place = rng.randrange(1, len(word) - 1)
        letters = rng.choice(("", 2 * word[place], word[place + 1] + word[place]))
        mistyped = (
            word[:place]
            + letters
            + word[place + (2 if len(letters) == 2 and letters[0] != letters[1] else 1) :]
        )
    words[number] = mistyped
    return " ".join(words)
