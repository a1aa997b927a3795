"""What is checked of a node's inputs before anything runs, without the libraries that run it."""

from ..processing_kosmos_g import IMAGE_MARK

AUTO = "auto"  # the dtype that suits the device


def count_problem(text: str, n_images: int, marks_are_text: bool = False) -> str | None:
    """What is wrong with the numbers of marks and connected images, or None."""
    n_marks = 0 if marks_are_text and not n_images else text.count(IMAGE_MARK)
    if n_marks == n_images:
        return None
    return (
        f"The text has {n_marks} {IMAGE_MARK} marks, and {n_images} images are connected. Write one {IMAGE_MARK} for each "
        "image, in the order of the inputs."
    )


def read_weights(weights: str, number: int) -> list[float]:
    """Numbers with commas between them. Raises ValueError unless there are `number`."""
    try:
        values = [float(part) for part in weights.split(",")]
    except ValueError:
        values = []
    if len(values) != number:
        raise ValueError(
            f"The weights {weights[:100]!r} were given for {number} conditionings. Write one number for each, with commas "
            "between them."
        )
    return values
