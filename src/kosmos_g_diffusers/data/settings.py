"""Settings of the data that `kosmos-g data` makes, apart from what makes it: the command line reads them without torch."""

from dataclasses import dataclass

from ..fields import check, check_value, setting

# timbrooks/instructpix2pix-clip-filtered; what HubDatasetSource calls them -> there
COLUMNS = {
    "input": "original_prompt",
    "source": "original_image",
    "edit": "edit_prompt",
    "image": "edited_image",
    "caption": "edited_prompt",
}
CUTTING_SIDE = 1024  # pixels; larger images are shrunk to it before things are cut out of them


@dataclass(frozen=True)
class ComposeSettings:
    """All that decides what is made of an image. Kept in the manifest; a resumed run needs the same.

    Raises:
        TypeError, ValueError: a value of another type, or out of its range.
    """

    # as in the official preparation, but for the language model: mosaicml/mpt-7b-instruct there has no chat template
    model_caption: str = setting(
        "Salesforce/blip2-opt-2.7b", "BLIP-2 or BLIP, folder or Hub id", metavar="MODEL"
    )
    model_entities: str = setting(
        "Qwen/Qwen2.5-7B-Instruct", "language model with a chat template, folder or Hub id", metavar="MODEL"
    )
    model_segment: str = setting("CIDAS/clipseg-rd64-refined", "CLIPSeg, folder or Hub id", metavar="MODEL")
    threshold: float = setting(0.3, "probability above which a pixel belongs to a thing", low=0, high=1)
    # in the official preparation any share
    min_area: float = setting(0.005, "share of the image that a thing has to cover", low=0, high=1)
    # training reads no more than 64
    max_entities: int = setting(8, "things cut out of an image", low=1, high=64)
    size: int = setting(512, "pixels: sides of the image to draw, most of cut-outs", low=8, high=CUTTING_SIDE)
    min_side: int = setting(256, "pixels; smaller images are skipped", low=1, high=100_000)
    caption_tokens: int = setting(32, "most tokens of a caption", low=1, high=1000)
    entity_tokens: int = setting(64, "most tokens of the language model's answer", low=1, high=10_000)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class EditSettings:
    """What is read and how it is stored. Kept in the manifest; a resumed run needs the same.

    Raises:
        ValueError: not one of folder and dataset, a column missing, or a size out of its range.
    """

    folder: str | None = None  # in the original layout, see `EditFolder`
    dataset: str | None = None  # Hub id or folder of a `datasets` data set
    split: str = "train"
    revision: str | None = None
    columns: tuple[tuple[str, str], ...] = tuple(
        COLUMNS.items()
    )  # (use, column) pairs of the data set, see COLUMNS
    # pixels of the shorter side, to which larger images are shrunk; as in the official preparation
    size: int = 512

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.dataset is None):
            given = "neither" if self.folder is None else "both"
            raise ValueError(f"Of folder and dataset, {given} was given. Pass the one that holds the edits.")
        missing = [use for use in ("edit", "source", "image") if not dict(self.columns).get(use)]
        if missing:
            raise ValueError(f"No column was given for {', '.join(missing)}. Needed: edit, source and image.")
        check_value("size", self.size, int, low=8, high=8192)


@dataclass(frozen=True)
class ImportSettings:
    """What is imported, and what is left out. Kept in the manifest; a resumed run needs the same.

    Raises:
        TypeError, ValueError: a value of another type, or out of its range.
    """

    source: str  # a name of the table of public sets, or a line
    limit: int | None = None  # samples of the source that are looked at, from its beginning
    min_side: int = 0  # pixels; images to draw with a smaller side are left out
    min_score: float | None = None
    samples_per_shard: int = 1000

    def __post_init__(self) -> None:
        check_value("min_side", self.min_side, int, low=0, high=100_000)
        check_value("samples_per_shard", self.samples_per_shard, int, low=1, high=1_000_000)
        if self.limit is not None:
            check_value("limit", self.limit, int, low=1, high=10**12)
