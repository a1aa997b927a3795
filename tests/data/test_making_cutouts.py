"""Cutting a thing out by its map: threshold, the largest piece, the square around it, white elsewhere."""

import numpy as np
import PIL.Image
import pytest

from kosmos_g_diffusers.data.making import cut_out

SIDE = 64


def make_image(side=SIDE):
    """Every pixel says where it is, and none is white."""
    rows, columns = np.mgrid[:side, :side]
    return PIL.Image.fromarray(np.stack([rows, columns, np.full_like(rows, 100)], -1).astype(np.uint8))


def logits(*boxes, side=SIDE, inside=10.0):
    """Map that is `inside` in boxes (top, left, bottom, right) and far below 0 elsewhere."""
    values = np.full((side, side), -10.0, np.float32)
    for top, left, bottom, right in boxes:
        values[top:bottom, left:right] = inside
    return values


def corner(image):
    """Where the pixel at the top left came from."""
    return tuple(int(value) for value in np.asarray(image)[0, 0, :2])


def test_square_around_the_thing_with_and_without_what_is_around():
    whole, cutout, area = cut_out(make_image(), logits((20, 10, 40, 18)))

    assert whole.size == cutout.size == (20, 20)
    assert corner(whole) == (20, 4)  # centre 14, half of 20 to the left
    assert area == pytest.approx(20 * 8 / SIDE**2)
    whole, cutout = np.asarray(whole), np.asarray(cutout)
    np.testing.assert_array_equal(cutout[:, 6:14], whole[:, 6:14])
    assert (cutout[:, :6] == 255).all()
    assert (cutout[:, 14:] == 255).all()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 30, 4), (0, 0)),
        ((30, 60, 60, 64), (30, 34)),
        ((60, 20, 64, 50), (34, 20)),
        ((0, 0, 4, 64), (0, 0)),
        ((60, 0, 64, 64), (0, 0)),
    ],
)
def test_square_is_moved_into_the_image(box, expected):
    whole, _, _ = cut_out(make_image(), logits(box))

    side = max(box[2] - box[0], box[3] - box[1])
    assert whole.size == (side, side)
    assert corner(whole) == expected


def test_largest_of_several_pieces_is_kept_and_the_others_are_white():
    # one of the smaller pieces is inside the square of the largest, one touches it at a corner
    boxes = [(10, 10, 40, 14), (20, 20, 26, 24), (40, 14, 44, 18), (50, 50, 54, 54)]

    whole, cutout, area = cut_out(make_image(), logits(*boxes))

    assert whole.size == (30, 30)
    assert area == pytest.approx(30 * 4 / SIDE**2)
    coloured = (np.asarray(cutout) != 255).any(-1)
    assert coloured.sum() == 30 * 4


def test_piece_is_the_largest_by_its_own_pixels_not_by_its_box():
    thin = [(row, row, row + 1, row + 2) for row in range(2, 30)]  # a diagonal, large in its box

    whole, _, _ = cut_out(make_image(), logits((40, 40, 52, 52), *thin))

    assert whole.size == (12, 12)
    assert corner(whole) == (40, 40)


def test_mask_grows_by_a_hundredth_of_the_image():
    small, large = (cut_out(make_image(side), logits((20, 20, 40, 40), side=side))[0] for side in (100, 250))

    assert small.size == (20, 20)
    assert large.size == (21, 21)  # 250 // 100 is 2: one pixel more


def test_threshold_is_a_probability():
    half = logits((20, 20, 40, 40), inside=0.0)  # probability 0.5

    assert cut_out(make_image(), half, threshold=0.49)[0].size == (20, 20)
    assert cut_out(make_image(), half, threshold=0.51) is None


def test_thing_smaller_than_the_least_area_is_none():
    box = logits((20, 20, 30, 30))

    assert cut_out(make_image(), box, min_area=100 / SIDE**2) is not None
    assert cut_out(make_image(), box, min_area=101 / SIDE**2) is None
    assert cut_out(make_image(), logits(), min_area=0) is None


def test_map_of_another_size_is_brought_to_the_images():
    whole, _, area = cut_out(make_image(), logits((8, 8, 24, 24), side=32))

    assert whole.size[0] == pytest.approx(32, abs=2)
    assert area == pytest.approx(0.25, abs=0.04)


def test_thing_that_fills_the_image_is_the_image():
    whole, cutout, area = cut_out(make_image(), logits((0, 0, SIDE, SIDE)))

    assert area == 1
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(make_image()))
    np.testing.assert_array_equal(np.asarray(cutout), np.asarray(make_image()))


def test_image_is_left_as_it_was():
    image = make_image()

    cut_out(image, logits((20, 20, 40, 40)))

    np.testing.assert_array_equal(np.asarray(image), np.asarray(make_image()))
