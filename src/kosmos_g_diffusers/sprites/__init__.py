"""The small model that ships, its miniature world, and two images of that world to try it with."""

from .pretrained import HEART, SPRITES, STAR

__all__ = ["HEART", "SPRITES", "STAR"]
