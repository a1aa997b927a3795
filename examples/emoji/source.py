"""Emoji as training data: a sample's image follows from its number and is drawn when it is read."""

from functools import lru_cache

from kosmos_g_diffusers.data import IMAGE_LENGTH, Sample
from kosmos_g_diffusers.sprites.world import make_rng

from .views import GROUNDS, TURNS, article, say_looks, turn_hue, view

SIZE = 32  # of the images to draw
PHOTO_SIZE = 64  # of the images in a prompt
GROUP = 1_000
KINDS = ("captions", "pictures", "compositions")
# probability that a caption says the category for the name: looks alone must be enough to draw by
NAME_DROPOUT = 0.3


class EmojiSource:
    """Samples of the subjects given, a `Source` of the package's `data`.

    Args:
        kind: what the samples are.
            "captions": words and the image they describe.
            "pictures": an image, then its caption: what stage 1 learns to say.
            "compositions": an image of the subject on some ground, and words for another ground; the target has the
                subject there, at another place and size. Before the image stand the subject's words, unless they are
                dropped with probability `entity_dropout`.
        subjects: see packages.load_subjects.
        size: samples. Their images are fixed, so that work on them can be kept; words are varied at every reading.
        draws: False leaves the target of captions out, for whom words or kept latents are enough.
    """

    def __init__(self, kind, subjects, size=40_000, entity_dropout=0.5, draws=True):
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}. Expected one of {', '.join(KINDS)}.")
        self.kind, self.subjects, self.size = kind, subjects, size
        self.entity_dropout, self.draws = entity_dropout, draws
        self.name = f"emoji:{kind}"
        self.groups = [GROUP] * (size // GROUP) + [size % GROUP] * (size % GROUP > 0)
        # an image is turned and described more often than it is needed for the first time
        self._looks = lru_cache(maxsize=None)(self._draw_looks)

    def __len__(self):
        return self.size

    def length(self, index):
        return 40 + IMAGE_LENGTH * (self.kind != "captions")

    def read(self, index, rng):
        fixed = make_rng(self.name, index, "pictures")
        number = fixed.randrange(len(self.subjects))
        turn = 0 if fixed.random() < 0.5 else fixed.choice(TURNS[1:])
        ground = fixed.choice(list(GROUNDS))
        subject, (image, looks) = self.subjects[number], self._looks(number, turn)
        words = article(f"{looks} {subject.kind if rng.random() < NAME_DROPOUT else subject.name}")
        caption, key = f"{words} {GROUNDS[ground]}", f"{self.name}:{index}"
        if self.kind == "pictures":
            return Sample(key, (view(image, ground, PHOTO_SIZE, fixed), caption), None, caption)
        if self.kind == "captions":
            target = view(image, ground, SIZE, fixed) if self.draws else None
            return Sample(key, (caption,), target, caption)
        target = view(image, ground, SIZE, fixed)
        photo = draw_photo(image, fixed, other_than=ground)
        before = () if rng.random() < self.entity_dropout else (words,)
        return Sample(key, (*before, photo, GROUNDS[ground]), target, caption)

    def _draw_looks(self, number, turn):
        image = self.subjects[number].image
        image = turn_hue(image, turn) if turn else image
        return image, say_looks(image)


def draw_photo(image, rng, other_than):
    """What stands for `<i>` in a prompt: the subject on any ground but the one asked for."""
    ground = rng.choice([name for name in GROUNDS if name != other_than])
    return view(image, ground, PHOTO_SIZE, rng)
