"""Layouts of public data sets, each in one line: documents, compositions with boxes, images of two views, texts within lists."""

import json
import random

import PIL.Image
import pytest
from support.stored_data import encode, make_image, read, shade, shown, write_files, write_lines, write_tar

from kosmos_g_diffusers.data import BadSample, FilteredSample, build_source
from kosmos_g_diffusers.data.sample import IMAGE_LENGTH

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def save(folder, rows, **casts):
    table = datasets.Dataset.from_dict(rows)
    for column, feature in casts.items():
        table = table.cast_column(column, feature)
    table.save_to_disk(folder)
    return f"datasets:{folder}"


# Images of two views ------------------------------------------------------------------------------------------------


def two_views(left, right, border=2, side=8):
    whole = PIL.Image.new("RGB", (2 * (side + 2 * border), side + 2 * border), "white")
    whole.paste(make_image(left, (side, side)), (border, border))
    whole.paste(make_image(right, (side, side)), (side + 3 * border, border))
    return whole


@pytest.fixture
def subjects(tmp_path):
    """Columns of Subjects200K."""
    rows = {
        "image": [encode(two_views(10, 20)), encode(two_views(30, 40))],
        "quality_assessment": [
            {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5},
            {"compositeStructure": 5, "objectConsistency": 3, "imageQuality": 5},
        ],
        "description": [{"item": "cup", "description_0": "a cup", "description_1": "a cup on a desk"}] * 2,
    }
    return save(tmp_path / "subjects", rows, image=datasets.Image())


def test_of_an_image_of_two_views_one_is_shown_and_one_is_drawn(subjects):
    line = f"{subjects}?image=image&split_image=right&split_border=2&prompt=description.description_1"
    sample = read(line, 0)
    assert (shown(sample), shade(sample.target)) == ([10, "a cup on a desk"], 20)
    assert sample.prompt[0].size == sample.target.size == (8, 8)
    assert sample.target.getextrema() == ((20, 20), (0, 0), (0, 0))  # nothing of the border
    other = read(line.replace("right", "left").replace("description_1", "description_0"), 0)
    assert (shown(other), shade(other.target)) == ([20, "a cup"], 10)
    assert read(f"{subjects}?image=image&split_image=left&edit=description.item", 0).prompt[-1] == "cup"
    assert build_source(line).length(0) == len("a cup on a desk") + IMAGE_LENGTH
    with pytest.raises(BadSample, match="has an image of 24 x 12, too small for two views"):
        read(line.replace("border=2", "border=6"), 0)


def test_of_several_scores_the_smallest_counts(subjects):
    scores = ",".join(f"quality_assessment.{name}" for name in ("compositeStructure", "objectConsistency"))
    line = f"{subjects}?image=image&caption=description.item&score={scores}&min_score=5"
    assert read(line, 0).caption == "cup"
    with pytest.raises(FilteredSample, match="has the score 3, under 5"):
        read(line, 1)


# Boxes and crops ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scene():
    """A dog on the left, a sofa at the bottom right."""
    image = make_image(100, (20, 10))
    image.paste(make_image(50, (10, 10)), (0, 0))
    image.paste(make_image(70, (5, 5)), (15, 5))
    return encode(image)


CAPTION = "a dog next to a sofa"
# GRIT: first and last place in the caption, left, top, right, bottom as shares of the image, confidence
CHUNKS = [[0, 5, 0.0, 0.0, 0.5, 1.0, 0.9], [14, 20, 0.75, 0.5, 1.0, 1.0, 0.8]]


def test_boxes_of_words_are_cut_out_of_the_image(tmp_path, scene):
    grit = {"key": "0", "caption": CAPTION, "width": 20, "height": 10, "noun_chunks": CHUNKS, "ref_exps": []}
    shard = write_tar(
        tmp_path / "0.tar", {"0.jpg": scene, "0.json": json.dumps(grit).encode(), "0.txt": CAPTION.encode()}
    )
    line = f"shards:{shard}?image=jpg&caption=json.caption&boxes=json.noun_chunks"
    sample = read(line, 0, cache_dir=tmp_path / "cache", word_dropout=0)
    assert shown(sample) == ["a dog", 50, " next to a sofa", 70]
    assert [part.size for part in sample.prompt[1::2]] == [(10, 10), (5, 5)]
    assert shown(read(line, 0, cache_dir=tmp_path / "cache", word_dropout=1)) == [50, " next to ", 70]
    table = {"image": [scene], "caption": [CAPTION], "boxes": [CHUNKS]}
    rows = f"{save(tmp_path / 'table', table)}?image=image&boxes=boxes&caption=caption"
    assert (
        read(rows, 0, word_dropout=0).prompt[0] == "a dog"
        and build_source(rows).length(0) == 20 + 2 * IMAGE_LENGTH
    )


@pytest.mark.parametrize(
    "boxes", [[[0.0, 0.0, 0.5, 1.0], [0.75, 0.5, 1.0, 1.0]], [[0, 0, 10, 10], [15, 5, 20, 10]]]
)
def test_entities_have_boxes_of_shares_or_pixels(tmp_path, scene, boxes):
    table = {"image": [scene], "caption": [CAPTION], "things": [["dog", "sofa"]], "boxes": [boxes]}
    line = f"{save(tmp_path / 'table', table)}?image=image&entities=things&boxes=boxes&caption=caption"
    assert shown(read(line, 0, word_dropout=0)) == ["a dog", 50, " next to a sofa", 70]


def test_entities_may_have_images_of_their_own(tmp_path, scene):
    table = {"image": [scene] * 2, "caption": [CAPTION] * 2, "things": [["dog", "sofa"]] * 2}
    table["crops"] = [[encode(1), encode(2)], [encode(1)]]
    line = f"{save(tmp_path / 'table', table)}?image=image&entities=things&images=crops&caption=caption"
    assert shown(read(line, 0, word_dropout=0)) == ["a dog", 1, " next to a sofa", 2]
    with pytest.raises(BadSample, match="has 2 entities and 1 images of them"):
        read(line, 1)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([[0, 5, 0.5, 0.0, 0.5, 1.0, 0.9]], "an empty box for its entity 0"),
        ([[0, 5, 0.5, 0.0]], "boxes that are not rows of first and last place"),
        ("left", "boxes that are not rows"),
    ],
)
def test_boxes_that_cannot_be_used_cost_their_sample(tmp_path, scene, chunks, message):
    record = json.dumps({"caption": CAPTION, "noun_chunks": chunks}).encode()
    shard = write_tar(tmp_path / "0.tar", {"0.jpg": scene, "0.json": record})
    with pytest.raises(BadSample, match=message):
        read(
            f"shards:{shard}?image=jpg&caption=json.caption&boxes=json.noun_chunks",
            0,
            cache_dir=tmp_path / "cache",
        )


# Documents ------------------------------------------------------------------------------------------------------------


def test_documents_have_images_where_their_texts_have_none(tmp_path):
    """Columns of OBELICS, with images in place of their URLs."""
    rows = {
        "images": [[encode(1), None, encode(2)], ["https://host/a.png", None, None]],
        "texts": [[None, "a dog", None], [None, "b", "c"]],
        "metadata": ["[]", "[]"],
    }
    rows["images"][1] = [None, None, None]
    line = f"{save(tmp_path / 'table', rows)}?texts=texts&images=images"
    sample = read(line, 0)
    assert (shown(sample), sample.target, sample.caption) == ([1, "a dog", 2], None, None)
    assert shown(read(line, 1)) == ["b", "c"]
    assert build_source(line).length(0) == 5 + 2 * IMAGE_LENGTH


def test_documents_have_images_in_front_of_the_texts_that_they_match(tmp_path):
    """Lines of MMC4, next to a folder of the images."""
    write_files(tmp_path, {f"{number}.png": encode(number) for number in (1, 2)})
    images = [
        {"image_name": "2.png", "matched_text_index": 1},
        {"image_name": "1.png", "matched_text_index": 0},
    ]
    rows = [
        {"url": "x", "text_list": ["a dog", "a cat"], "image_info": images, "similarity_matrix": [[0.1, 0.2]]}
    ]
    rows.append({**rows[0], "image_info": [{"image_name": "1.png", "matched_text_index": 7}]})
    where = write_lines(tmp_path / "docs.jsonl", rows)
    line = f"datasets:json?data_files={where}&texts=text_list&images=image_info.image_name"
    line += "&places=image_info.matched_text_index"
    assert shown(read(line, 0)) == [1, "a dog", 2, "a cat"]
    assert build_source(line).length(0) == 10 + 2 * IMAGE_LENGTH
    with pytest.raises(BadSample, match="places of images that do not fit"):
        read(line, 1)


def test_documents_of_lists_that_do_not_fit_are_bad(tmp_path):
    line = f"{save(tmp_path / 'table', {'images': [[encode(1)]], 'texts': [['a', 'b']]})}?texts=texts&images=images"
    with pytest.raises(BadSample, match="a document of 2 texts and 1 images, without places"):
        read(line, 0)


# Texts within lists and files -----------------------------------------------------------------------------------------


def test_a_turn_of_a_conversation_is_a_caption(tmp_path):
    """Lines of LLaVA's pretraining set: a JSON list with paths and turns."""
    write_files(tmp_path / "images", {"00/1.png": encode(1)})
    turns = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": "a dog"}]
    rows = [
        {"id": "1", "image": "00/1.png", "conversations": turns},
        {"id": "2", "image": "00/1.png", "conversations": turns[:1]},
    ]
    (tmp_path / "images" / "chat.json").write_text(json.dumps(rows))
    line = f"datasets:json?data_files={tmp_path}/images/chat.json&image=image&caption=conversations.1.value"
    sample = read(line, 0)
    assert (sample.caption, shade(sample.target)) == ("a dog", 1)
    with pytest.raises(BadSample, match="a caption of type NoneType"):
        read(line, 1)


def test_shards_of_caption_files_and_folders_of_json_are_read(tmp_path):
    shard = write_tar(tmp_path / "0.tar", {"0.png": encode(1), "0.caption": b"a dog"})
    assert read(f"shards:{shard}", 0, cache_dir=tmp_path / "cache").caption == "a dog"
    folder = write_files(
        tmp_path / "folder", {"a.png": encode(1), "a.json": json.dumps({"tags": ["x", "y"], "q": 3})}
    )
    assert read(f"folder:{folder}?image=.png&caption=.json.tags.1", 0).caption == "y"
    with pytest.raises(FilteredSample, match="has the score 3, under 4"):
        read(f"folder:{folder}?image=.png&caption=.json.tags.1&score=.json.q&min_score=4", 0)
    with pytest.raises(BadSample, match="a.png has no text in its a.json"):
        read(f"folder:{folder}?image=.png&caption=.json.text", 0)


@pytest.mark.parametrize(
    ("uses", "message"),
    [
        ("image=a&caption=b&split_image=middle", "split_image=middle. Expected one of left, right"),
        ("image=a&caption=b&split_image=left", "split_image cuts image in two"),
        ("image=a&source=b&edit=c&split_image=left", "leave source out"),
        ("image=a&caption=b&images=c", "images are those of a prompt"),
        ("image=a&entities=b&caption=c", "boxes or entities with images or boxes"),
        ("texts=a&images=b&image=c", "A document has texts, images and perhaps places"),
        ("image=a&caption=b&places=c", "places are those of the images of a document"),
        ("image=a&source=b&edit=c&prompt=d&images=e", "Only one of edit, prompt and texts"),
        ("image=a&caption=b&split_border=x", "split_border=x. Expected a number"),
        ("image=a&caption=b&score=c", "Pass both, or none"),
    ],
)
def test_uses_that_do_not_go_together_are_refused(uses, message, tmp_path):
    for line in (f"shards:{tmp_path}/a.tar?{uses}", save(tmp_path / "t", {"text": ["a"]}) + f"?{uses}"):
        with pytest.raises(ValueError, match=message):
            build_source(line)


def test_values_that_are_not_text_are_a_bad_row(tmp_path):
    content = {"0.0.source.png": encode(1), "0.0.target.png": encode(2)}
    for number, (extra, message) in enumerate(
        [
            ({"caption": 7}, "a caption of type int"),
            ({"input": ["a", 1]}, None),
            ({"input": {}}, "an input of type dict"),
        ]
    ):
        members = content | {"0.json": json.dumps({"edit": "make it snow", **extra}).encode()}
        line = f"shards:{write_tar(tmp_path / f'{number}.tar', members)}"
        if message is None:
            assert read(line, 0, cache_dir=tmp_path / "cache", word_dropout=0).prompt[0] == "a"
        else:
            with pytest.raises(BadSample, match=message):
                read(line, 0, cache_dir=tmp_path / "cache", word_dropout=0)


def test_lists_of_texts_and_prompts_in_shards_are_drawn_from(tmp_path):
    prompts = [["a", {"image": "0"}], [{"image": "0"}, "b"]]
    members = {
        "0.json": json.dumps({"prompts": prompts, "caption": ["c", "d"]}).encode(),
        "0.0.png": encode(9),
    }
    source = build_source(f"shards:{write_tar(tmp_path / '0.tar', members)}", cache_dir=tmp_path / "cache")
    samples = [source.read(0, random.Random(seed)) for seed in range(40)]
    assert {tuple(shown(sample)) for sample in samples} == {("a", 9), (9, "b")}
    assert {sample.caption for sample in samples} == {"c", "d"}
