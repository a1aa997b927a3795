"""Tokenizer and processor: official ids and pixels exactly, every form of prompt, every kind of picture, bad input."""

import functools
import http.server
import io
import json
import random
import sys
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from kosmos_g_diffusers import KosmosGProcessor, KosmosGTokenizer
from kosmos_g_diffusers.processing_kosmos_g import open_image

WORDS = ("a", "photo", "of", "in", "the", "suit", "dog", "cat", "hello", "world")


@pytest.fixture(scope="module")
def tokenizer():
    """A small vocabulary: ten words, the printable ASCII characters, 3 states an image, images of 28 px."""
    pieces = [(f"▁{word}", -2.0) for word in WORDS] + [("▁", -5.0)]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    return KosmosGTokenizer.from_vocabulary(pieces, image_size=28, latent_query_num=3, model_max_length=64)


@pytest.fixture
def own_tokenizer(tokenizer, tmp_path):
    """A copy of `tokenizer` that a test may change."""
    tokenizer.save_pretrained(tmp_path / "own")
    return KosmosGTokenizer.from_pretrained(tmp_path / "own")


@pytest.fixture(scope="module")
def processor(tokenizer):
    return KosmosGProcessor(tokenizer)


@pytest.fixture(scope="module")
def picture_file(tmp_path_factory, photos):
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    photos[0].save(path)
    return path


@pytest.fixture(scope="module")
def official(real_tokenizer, sentencepiece_file):
    """The official tokenizer as sentencepiece itself runs it."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(sentencepiece_file))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first.keys())


# The official tokenizer ------------------------------------------------------------------------------------------


def test_official_ids_of_single_strings(real_tokenizer, reference):
    for entry in json.loads((reference / "tokenization.json").read_text(encoding="utf-8")):
        assert ids(real_tokenizer, entry["text"]) == entry["ids"], entry["text"]


def test_official_ids_and_masks_of_golden_prompts(real_tokenizer, golden_case):
    features = KosmosGProcessor(real_tokenizer)(golden_case.prompts, golden_case.pictures)
    assert torch.equal(features["input_ids"], golden_case.tensors["input_ids"])
    assert torch.equal(features["image_token_mask"], golden_case.tensors["image_mask"])
    assert features["attention_mask"].sum(1).tolist() == golden_case.lengths
    assert ("pixel_values" in features) == bool(golden_case.image_order)


def test_official_ids_of_negative_prompts(real_tokenizer, golden_case):
    features = KosmosGProcessor(real_tokenizer)(golden_case.negative_prompt, marks_are_text=True)
    assert torch.equal(features["input_ids"], golden_case.tensors["negative_ids"])


def test_official_vocabulary_has_the_official_size_and_special_ids(real_tokenizer, reference):
    sizes = json.loads((reference / "config.json").read_text(encoding="utf-8"))
    assert len(real_tokenizer) == sizes["vocab_size"]
    names = ("bos_token_id", "pad_token_id", "eos_token_id", "unk_token_id")
    assert [getattr(real_tokenizer, name) for name in names] == [
        sizes[name] for name in ("bos", "pad", "eos", "unk")
    ]
    assert (real_tokenizer.image_token_id, real_tokenizer.end_of_image_token_id) == (
        sizes["boi"],
        sizes["eoi"],
    )
    specials = ["<mask>", "</doc>", "<image>", "</image>", "</chunk>", "</line>"]
    assert real_tokenizer.convert_tokens_to_ids(specials) == list(range(64001, 64007))
    assert (real_tokenizer.image_size, real_tokenizer.latent_query_num) == (
        sizes["image_size"],
        sizes["latent"],
    )


def test_ids_are_those_of_sentencepiece(real_tokenizer, official):
    rng = random.Random(0)
    words = [official.id_to_piece(rng.randrange(3, 64000)).replace("▁", " ") for _ in range(3000)]
    spaces = [" ", "  ", "\t", "\n", "\u3000", "\u200b", ""]
    for start in range(0, len(words), 10):
        text = "".join(word + rng.choice(spaces) for word in words[start : start + 10])
        # the dictionary is sentencepiece's, moved by one
        expected = [3 if number == 0 else number + 1 for number in official.encode(text)]
        assert ids(real_tokenizer, text) == expected, repr(text)


def strings_rich_in_ties(count, pieces, seed=0):
    """Runs of a letter, of a few letters, letters of small alphabets, pieces in any order."""
    rng = random.Random(seed)
    alphabets = ["!-=.a0", "ab", "01.", "ha", "lol", "*#-_=~", "etaoin "]
    for _ in range(count):
        kind = rng.randrange(4)
        if kind == 0:
            yield "".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 40)))
        elif kind == 1:
            yield "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789!.-,= ", k=rng.randint(1, 4))) * 7
        elif kind == 2:
            yield rng.choice("!-=.a0x_*#~?") * rng.randint(1, 60)
        else:
            yield "".join(rng.choices(pieces, k=rng.randint(1, 10)))


def assert_ids_of_sentencepiece(tokenizer, official, count):
    specials = [index for index in range(official.get_piece_size()) if official.is_control(index)]
    specials.append(official.unk_id())
    pieces = [
        official.id_to_piece(index) for index in range(official.get_piece_size()) if index not in specials
    ]
    texts = list(strings_rich_in_ties(count, [piece.replace("▁", " ") for piece in pieces]))
    shift = 4 - len(specials)
    expected = [
        [3 if number == official.unk_id() else number + shift for number in numbers]
        for numbers in official.encode(texts)
    ]
    assert [ids(tokenizer, text) for text in texts] == expected
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("count", [1500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_ties_are_broken_as_sentencepiece_breaks_them(real_tokenizer, official, count):
    assert_ids_of_sentencepiece(real_tokenizer, official, count)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """SentencePiece and ours of one small model, whose scores are often equal."""
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = random.Random(0)
    words = ["a photo of a dog in the snow", "banana", "!!!!", "hahaha", "0.0.0", "--", "lol", "etaoin"]
    sentences = (
        " ".join(rng.choices(words, k=4)) + chr(97 + index % 26) * rng.randint(1, 9) for index in range(400)
    )
    path = tmp_path_factory.mktemp("trained") / "small.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=file,
            vocab_size=120,
            model_type="unigram",
            minloglevel=2,
        )
    own = KosmosGTokenizer.from_sentencepiece(path, image_size=28, latent_query_num=3, model_max_length=64)
    return own, sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_ties_of_a_small_vocabulary_are_broken_as_sentencepiece_breaks_them(trained):
    assert_ids_of_sentencepiece(*trained, 2000)


def test_text_with_ties_is_padded_cut_and_read_with_image_words_as_other_text(trained, tmp_path):
    trained[0].save_pretrained(tmp_path)
    tokenizer = KosmosGTokenizer.from_pretrained(tmp_path)
    tokenizer.add_image_word("<my-dog>")
    word = tokenizer.convert_tokens_to_ids("<my-dog>")
    official = trained[1]
    tied = next(
        text
        for text in strings_rich_in_ties(2000, ["a"])
        if [token.value for token in tokenizer._tokenizer.model.tokenize(f"▁{text}")]
        != official.encode(text, out_type=str)
        and " " not in text
    )
    expected = [3 if number == 0 else number + 1 for number in official.encode(tied)]
    assert ids(tokenizer, f"{tied}<my-dog> {tied}") == [*expected, word, *expected]
    batch = tokenizer([tied, "a"], padding="max_length", max_length=60, truncation=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == [0, *expected] + [1] * (59 - len(expected))
    assert batch["attention_mask"].sum(1).tolist() == [1 + len(expected), 1 + len(ids(tokenizer, "a"))]
    cut = tokenizer(tied, max_length=5, truncation=True)["input_ids"]
    assert cut == [0, *expected][:5]


def test_literal_special_names_are_text_for_the_official_tokenizer(real_tokenizer, official):
    for name in (
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<mask>",
        "<image>",
        "</image>",
        "<i>",
        "</doc>",
        "＜s＞",
        "＜unk＞",
    ):
        for text in (name, f"a {name} b", f"x{name}{name}"):
            pieces = [official.piece_to_id(piece) for piece in official.encode(text, out_type=str)]
            expected = [3 if number == 0 else number + 1 for number in pieces]
            # "<s>" cannot come out of sentencepiece's text, but pieces that look like it can
            assert ids(real_tokenizer, text) == expected, text
            assert not set(ids(real_tokenizer, text)) & {0, 1, 2}


def test_saved_tokenizer_needs_no_sentencepiece(real_tokenizer, tmp_path, monkeypatch, reference):
    real_tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and not list(tmp_path.glob("*.model"))
    for name in ("sentencepiece", "google.protobuf", "google"):
        monkeypatch.setitem(sys.modules, name, None)
    loaded = KosmosGTokenizer.from_pretrained(tmp_path)
    for entry in json.loads((reference / "tokenization.json").read_text(encoding="utf-8")):
        assert ids(loaded, entry["text"]) == entry["ids"]
    with pytest.raises(ImportError, match=r"kosmos-g-diffusers\[convert\]"):
        KosmosGTokenizer.from_sentencepiece("sentencepiece.bpe.model")


@pytest.mark.parametrize(
    "content", [b"", b"not a model" * 50, b"\x0a\x05\x0a\x01a\x10\x00", bytes(range(256)) * 4]
)
def test_file_that_is_no_sentencepiece_model_is_refused(tmp_path, content):
    pytest.importorskip("sentencepiece")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model .*sentencepiece\.bpe\.model"):
        KosmosGTokenizer.from_sentencepiece(path)


def test_sentencepiece_model_of_another_kind_is_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentences = iter(["the quick brown fox jumps over the lazy dog"] * 20)
    with open(tmp_path / "bpe.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=file, vocab_size=40, model_type="bpe", minloglevel=2
        )
    with pytest.raises(ValueError, match="not a unigram model"):
        KosmosGTokenizer.from_sentencepiece(tmp_path / "bpe.model")


@pytest.mark.parametrize("name", ["nowhere.model", ""])
def test_missing_tokenizer_file_is_named(tmp_path, name):
    pytest.importorskip("sentencepiece")
    with pytest.raises(ValueError, match="no tokenizer file at"):
        KosmosGTokenizer.from_sentencepiece(tmp_path / name)


# Any tokenizer of ours ---------------------------------------------------------------------------------------------


def test_layout_of_the_vocabulary(tokenizer):
    assert [
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ] == [0, 1, 2, 3]
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.convert_tokens_to_ids("▁a") == 4
    assert tokenizer.convert_tokens_to_ids("<mask>") == len(tokenizer) - 6
    assert tokenizer.image_token_id == len(tokenizer) - 4
    assert tokenizer.end_of_image_token_id == len(tokenizer) - 3


@pytest.mark.parametrize(
    "text",
    ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "<image>", "</image>", "<i>", "<my-dog>", "＜s＞", "＜/s＞"],
)
def test_names_of_special_tokens_in_a_text_are_text(tokenizer, text):
    plain = text.replace("＜", "<").replace("＞", ">")
    spelled = tokenizer.convert_tokens_to_ids(["▁", *plain])
    assert ids(tokenizer, text) == spelled
    assert ids(tokenizer, f"dog {text} cat") == ids(tokenizer, "dog") + spelled + ids(tokenizer, "cat")


def test_white_space_is_collapsed_and_stripped(tokenizer):
    expected = ids(tokenizer, "hello world")
    for text in ("hello  world", " hello world ", "hello\nworld", "\thello \t world\n", "hello\u3000world"):
        assert ids(tokenizer, text) == expected
    for text in ("", " ", "\t", "\n \n"):
        assert ids(tokenizer, text) == []


def test_run_of_unknown_characters_is_one_unknown_token(tokenizer):
    space, unknown = tokenizer.convert_tokens_to_ids("▁"), tokenizer.unk_token_id
    assert ids(tokenizer, "雪中") == [space, unknown]
    assert ids(tokenizer, "雪中 a 雪") == [space, unknown, *ids(tokenizer, "a"), space, unknown]


def test_prompt_begins_with_bos_and_ends_with_nothing(tokenizer):
    assert tokenizer("a dog")["input_ids"] == [tokenizer.bos_token_id, *ids(tokenizer, "a dog")]
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def test_tokenizer_is_called_as_stock_pipelines_call_theirs(tokenizer):
    length = tokenizer.model_max_length
    inputs = tokenizer(
        ["a dog", ""], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    assert inputs.input_ids.shape == (2, length) and inputs.input_ids.dtype == torch.int64
    assert inputs.input_ids[0, :3].tolist() == tokenizer("a dog")["input_ids"]
    assert inputs.input_ids[0, 3:].eq(tokenizer.pad_token_id).all()
    assert inputs.attention_mask.sum(1).tolist() == [3, 1]
    longest = tokenizer(["a dog", ""], padding="longest", return_tensors="pt").input_ids
    assert longest.shape == (2, 3)
    assert tokenizer.batch_decode(longest, skip_special_tokens=True) == ["a dog", ""]
    assert tokenizer.tokenize("a dog") == ["▁a", "▁dog"]
    assert "<image>" in tokenizer.added_tokens_encoder


def test_truncation_warns_with_both_lengths(tokenizer, logged):
    text = "dog " * 20
    cut = tokenizer([text, "cat"], truncation=True, max_length=8)
    assert [len(row) for row in cut["input_ids"]] == [8, 2]
    assert len(logged.records) == 1
    assert "Text 0 is 21 tokens long and was cut to 8" in logged.records[0].getMessage()
    logged.clear()
    tokenizer(text, truncation=True, max_length=21)
    assert not logged.records


def test_saving_keeps_ids_sizes_and_image_words(own_tokenizer, tmp_path):
    own_tokenizer.add_image_word("<my-dog>")
    own_tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (
        KosmosGTokenizer.from_pretrained(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True),
    ):
        for text in ("a photo of <my-dog>, 雪", "<s> <image>  x", ""):
            assert ids(loaded, text) == ids(own_tokenizer, text)
        assert (loaded.image_size, loaded.latent_query_num, loaded.model_max_length) == (28, 3, 64)
        assert loaded.image_words == ["<my-dog>"]
        assert (loaded.image_token_id, len(loaded)) == (own_tokenizer.image_token_id, len(own_tokenizer))


# Image words of the tokenizer ----------------------------------------------------------------------------------


def test_image_word_is_one_token_behind_the_vocabulary(own_tokenizer):
    size = len(own_tokenizer)
    dog_in_hand = ids(own_tokenizer, "a dog") + [size] + ids(own_tokenizer, ", in the suit")
    own_tokenizer.add_image_word("<my-dog>")
    own_tokenizer.add_image_word("<cat>")
    assert own_tokenizer.image_words == ["<my-dog>", "<cat>"]
    assert ids(own_tokenizer, "a dog <my-dog>, in the suit") == dog_in_hand
    assert ids(own_tokenizer, "<my-dog><cat><my-dog>") == [size, size + 1, size]
    assert ids(own_tokenizer, "<my-dogs>") == ids(own_tokenizer, "<") + ids(own_tokenizer, "my-dogs>")[1:]


def test_removing_an_image_word_restores_the_tokenizer_and_closes_the_gap(own_tokenizer, tokenizer):
    size = len(own_tokenizer)
    texts = ["a <one> <two> <three> b", "<image> <s> dog", "", "<two>", "雪 ﬁ ①"]
    for word in ("<one>", "<two>", "<three>"):
        own_tokenizer.add_image_word(word)
    own_tokenizer.remove_image_word("<one>")
    assert own_tokenizer.image_words == ["<two>", "<three>"]
    assert ids(own_tokenizer, "<two><three>") == [size, size + 1]
    own_tokenizer.remove_image_word("<three>")
    own_tokenizer.remove_image_word("<two>")
    assert own_tokenizer.image_words == [] and len(own_tokenizer) == size
    for text in texts:
        assert own_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert own_tokenizer.added_tokens_encoder == tokenizer.added_tokens_encoder
    assert own_tokenizer.all_special_ids == tokenizer.all_special_ids
    own_tokenizer.add_image_word("<new>")
    assert ids(own_tokenizer, "<new>") == [size]


@pytest.mark.parametrize(
    "word",
    [
        "dog",
        "<Dog>",
        "<my dog>",
        "<>",
        "<1dog>",
        "<-dog>",
        "<dög>",
        "<i>",
        "<s>",
        "<unk>",
        "<image>",
        3,
        None,
        "<a>\n",
    ],
)
def test_ill_formed_image_word_is_refused(own_tokenizer, word):
    with pytest.raises(ValueError, match="cannot name an image word"):
        own_tokenizer.add_image_word(word)
    assert own_tokenizer.image_words == []


def test_duplicate_and_unknown_image_words_are_refused(own_tokenizer):
    own_tokenizer.add_image_word("<dog>")
    with pytest.raises(ValueError, match="'<dog>' already"):
        own_tokenizer.add_image_word("<dog>")
    with pytest.raises(ValueError, match="'<cat>' to remove. Known: <dog>"):
        own_tokenizer.remove_image_word("<cat>")


# Forms of prompts ------------------------------------------------------------------------------------------------


def test_layout_of_a_prompt_with_a_picture(processor, tokenizer, photos):
    features = processor("a dog<i> in the suit", images=[photos[0]])
    image, end, slots = tokenizer.image_token_id, tokenizer.end_of_image_token_id, tokenizer.latent_query_num
    picture = [image] * (1 + slots) + [end]
    # the text behind the picture is tokenised on its own: its outer spaces vanish and it gets its own "▁"
    expected = [0, *ids(tokenizer, "a dog"), *picture, *ids(tokenizer, "in the suit")]
    assert features["input_ids"].tolist() == [expected]
    assert features["attention_mask"].tolist() == [[1] * len(expected)]
    mask = [False] * 3 + [False] + [True] * slots + [False] + [False] * 3
    assert features["image_token_mask"].tolist() == [mask]
    assert features["image_token_mask"].dtype == torch.bool
    assert (
        features["pixel_values"].shape == (1, 3, 28, 28) and features["pixel_values"].dtype == torch.float32
    )


def test_all_forms_of_one_prompt_give_the_same_features(processor, photos, picture_file):
    dog, suit = photos[0], photos[1]
    expected = processor("<i> in the suit of <i>", images=[dog, suit])
    forms = [
        ([dog, "in the suit of", suit], None),
        ((dog, " in the suit of ", suit), None),
        ([[dog, "in the suit of", suit]], None),
        (["<i> in the suit of <i>"], [[dog, suit]]),
        ("<i> in the suit of <i>", (picture_file, suit)),
        ("<i> in the suit of <i>", [str(picture_file), suit]),
        (
            [
                {"type": "image", "image": dog},
                {"type": "text", "text": "in the suit of"},
                {"type": "image", "image": suit},
            ],
            None,
        ),
        (
            [
                [
                    {"type": "image", "path": str(picture_file)},
                    {"type": "text", "text": "in the suit of"},
                    suit,
                ]
            ],
            None,
        ),
        ([{"type": "text", "text": "<i> in the suit of <i>"}], [dog, suit]),
    ]
    for prompt, images in forms:
        same(processor(prompt, images=images), expected)


def test_single_picture_may_stand_without_a_list(processor, photos, picture_file):
    expected = processor("<i>", images=[photos[0]])
    same(processor("<i>", images=photos[0]), expected)
    same(processor("<i>", images=str(picture_file)), expected)
    same(processor([photos[0]]), expected)


def test_ragged_batch_is_padded_on_the_right_with_pictures_in_reading_order(processor, tokenizer, photos):
    prompts = ["<i> and <i>", "a dog", [photos[2], "in the suit"], ""]
    images = [[photos[0], photos[1]], [], None, ()]
    batch = processor(prompts, images=images)
    rows = [processor(prompt, images=image or None) for prompt, image in zip(prompts, images, strict=True)]
    for index, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        for name, fill in (
            ("input_ids", tokenizer.pad_token_id),
            ("attention_mask", 0),
            ("image_token_mask", False),
        ):
            assert torch.equal(batch[name][index, :length], row[name][0])
            assert batch[name][index, length:].eq(fill).all()
    assert torch.equal(batch["pixel_values"], torch.cat([rows[0]["pixel_values"], rows[2]["pixel_values"]]))


def test_list_of_strings_is_a_batch(processor):
    assert processor(["a dog", "a cat", "a"])["input_ids"].shape == (3, 3)
    assert processor(("a dog", "a cat"))["input_ids"].shape[0] == 2


def test_strings_of_a_reading_order_list_are_never_opened(
    processor, tokenizer, photos, picture_file, monkeypatch
):
    monkeypatch.chdir(picture_file.parent)  # a name alone is a path here, and short enough for a prompt
    features = processor([photos[0], picture_file.name])
    assert features["pixel_values"].shape[0] == 1
    text = ids(tokenizer, picture_file.name)
    assert features["input_ids"][0, -len(text) :].tolist() == text


def test_marks_can_be_read_as_text(processor, tokenizer):
    features = processor("a <i> b", marks_are_text=True)
    assert features["input_ids"].tolist() == [[0, *ids(tokenizer, "a <i> b")]]
    assert "pixel_values" not in features


def test_parsed_prompts_may_be_given_again(processor, photos):
    parsed = processor.parse(["<i> in a suit", "x"], [[photos[0]], []])
    same(processor(parsed), processor(["<i> in a suit", "x"], [[photos[0]], []]))


def test_processing_changes_no_argument(processor, photos):
    prompt = [{"type": "image", "image": photos[0]}, {"type": "text", "text": "x"}]
    batch, images = [prompt, "<i>"], [None, [photos[1]]]
    before = photos[0].tobytes()
    processor(batch, images=images)
    assert batch == [prompt, "<i>"] and images == [None, [photos[1]]] and len(prompt) == 2
    assert photos[0].tobytes() == before


def test_processor_is_saved_as_its_tokenizer(processor, photos, tmp_path):
    processor.save_pretrained(tmp_path)
    same(
        KosmosGProcessor.from_pretrained(tmp_path)("<i> dog", [photos[0]]), processor("<i> dog", [photos[0]])
    )


def test_processor_takes_sizes_of_the_model_over_the_tokenizers(tokenizer, photos):
    features = KosmosGProcessor(tokenizer, image_size=42, latent_query_num=2)("<i>", [photos[0]])
    assert features["pixel_values"].shape == (1, 3, 42, 42)
    assert features["image_token_mask"].sum() == 2


# Pictures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official_size(tokenizer):
    return KosmosGProcessor(tokenizer, image_size=224)


def test_official_pixels_exactly(official_size, reference):
    expected = load_file(reference / "pixel_values.safetensors")
    for name, pixels in expected.items():
        picture = PIL.Image.open(reference / "images" / f"{name}.png")
        assert torch.equal(torch.from_numpy(official_size.preprocess(picture)), pixels), name


def colour(picture):
    """The one colour of a picture once it is opened."""
    opened = open_image(picture, "The image")
    assert opened.mode == "RGB"
    colours = opened.getcolors()
    assert len(colours) == 1
    return colours[0][1]


def transparent_palette():
    picture = PIL.Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 200, 10, 10])
    picture.info["transparency"] = 1
    return picture


def palette_with_alpha(alpha):
    picture = PIL.Image.new("PA", (4, 4), (1, alpha))
    picture.putpalette([0, 0, 0, 200, 10, 10])
    return picture


def transparent_colour(mode, value):
    picture = PIL.Image.new(mode, (4, 4), value)
    picture.info["transparency"] = value
    return picture


WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    "picture, expected",
    {
        "1": (PIL.Image.new("1", (4, 4), 1), WHITE),
        "L": (PIL.Image.new("L", (4, 4), 77), (77, 77, 77)),
        "LA opaque": (PIL.Image.new("LA", (4, 4), (77, 255)), (77, 77, 77)),
        "LA transparent": (PIL.Image.new("LA", (4, 4), (77, 0)), WHITE),
        "La transparent": (PIL.Image.new("La", (4, 4), (0, 0)), WHITE),
        "P": (PIL.Image.new("P", (4, 4), 0), (0, 0, 0)),
        "P transparent": (transparent_palette(), WHITE),
        "PA opaque": (palette_with_alpha(255), (200, 10, 10)),
        "PA transparent": (palette_with_alpha(0), WHITE),
        "RGB": (PIL.Image.new("RGB", (4, 4), (1, 2, 3)), (1, 2, 3)),
        "RGB with a transparent colour": (transparent_colour("RGB", (1, 2, 3)), WHITE),
        "L with a transparent value": (transparent_colour("L", 5), WHITE),
        "RGBX": (PIL.Image.new("RGBX", (4, 4), (1, 2, 3, 0)), (1, 2, 3)),
        "RGBA opaque": (PIL.Image.new("RGBA", (4, 4), (1, 2, 3, 255)), (1, 2, 3)),
        "RGBA transparent": (PIL.Image.new("RGBA", (4, 4), (1, 2, 3, 0)), WHITE),
        "RGBA half": (PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 51)), (255, 204, 204)),
        "RGBa transparent": (PIL.Image.new("RGBa", (4, 4), (0, 0, 0, 0)), WHITE),
        "CMYK": (PIL.Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255)),
        "YCbCr": (PIL.Image.new("YCbCr", (4, 4), (77, 128, 128)), (77, 77, 77)),
        "HSV": (PIL.Image.new("HSV", (4, 4), (0, 255, 200)), (200, 0, 0)),
        "I;16": (PIL.Image.new("I;16", (4, 4), 257 * 77), (77, 77, 77)),
        "I;16B": (PIL.Image.fromarray(np.full((4, 4), 257 * 77, dtype=">u2")), (77, 77, 77)),
        "I": (PIL.Image.new("I", (4, 4), 65535), WHITE),
        "F": (PIL.Image.new("F", (4, 4), 0.2), (51, 51, 51)),
    }.values(),
    ids=lambda value: value.mode if isinstance(value, PIL.Image.Image) else "",
)
def test_every_mode_becomes_rgb_over_white(picture, expected):
    assert colour(picture) == expected


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_file_formats_open(processor, photos, tmp_path, fmt):
    path = tmp_path / "photo"
    photos[0].save(path, format=fmt)
    with PIL.Image.open(path) as opened:
        expected = processor("<i>", images=[opened.convert("RGB")])
    same(processor("<i>", images=[path]), expected)


def test_sixteen_bit_png_keeps_its_tones(tmp_path):
    path = tmp_path / "deep.png"
    PIL.Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)).save(path)
    tones = np.asarray(open_image(path, "The image"))[..., 0].ravel()
    assert np.abs(tones.astype(int) - np.linspace(0, 255, 64)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["path", "image"])
def test_picture_is_turned_upright_by_its_exif_orientation(tmp_path, photos, orientation, kind):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    photos[1].save(path, exif=exif)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation -> PIL.Image.Transpose
    upright = photos[1].transpose(turns[orientation]) if orientation in turns else photos[1]
    opened = open_image(path if kind == "path" else PIL.Image.open(path), "The image")
    assert opened.size == upright.size and opened.tobytes() == upright.tobytes()
    assert open_image(opened, "The image").tobytes() == upright.tobytes()  # not turned twice


def test_arrays_and_tensors_are_pictures(processor, photos):
    expected = processor("<i>", images=[photos[0]])
    array = np.asarray(photos[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for picture in (
        array,
        array.astype(np.int64),
        array.astype(np.float64) / 255,
        (array / 255).astype(np.float32),
        tensor,
        tensor.float() / 255,
        tensor.double().requires_grad_() / 255,
    ):
        same(processor("<i>", images=[picture]), expected)
        same(processor([picture]), expected)


def test_half_precision_arrays_and_tensors_are_pictures():
    half = np.full((4, 4, 3), 0.5, dtype=np.float16)
    for picture in (
        half,
        torch.full((3, 4, 4), 0.5, dtype=torch.bfloat16),
        torch.full((3, 4, 4), 0.5).half(),
    ):
        assert colour(picture) == (128, 128, 128)


@pytest.mark.parametrize("size", [(300, 2), (2, 300), (1, 1), (29, 28), (1, 40)])
def test_extreme_shapes_are_cropped_to_the_centre(processor, size):
    rng = np.random.default_rng(1)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    pixels = processor.preprocess(picture)
    assert pixels.shape == (3, 28, 28) and np.isfinite(pixels).all()


@pytest.fixture
def server(tmp_path):
    """A web server on this machine that serves `tmp_path`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)
    ) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_url_is_opened(processor, photos, server, tmp_path):
    photos[0].save(tmp_path / "photo.png")
    expected = processor("<i>", images=[photos[0]])
    same(processor("<i>", images=[f"{server}/photo.png"]), expected)
    same(processor([{"type": "image", "url": f"{server}/photo.png"}]), expected)


def test_url_without_a_picture_is_refused(processor, server, tmp_path):
    (tmp_path / "page.html").write_text("<html>no picture</html>")
    for address in (f"{server}/page.html", f"{server}/missing.png", "http://127.0.0.1:1/refused.png"):
        with pytest.raises(ValueError, match="Image 0 of prompt 0 cannot be read from") as error:
            processor("<i>", images=[address])
        assert address in str(error.value)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, images, index, marks, given",
    [
        ("<i> and <i>", 1, 0, 2, 1),
        ("no mark", 1, 0, 0, 1),
        ("<i>", 0, 0, 1, 0),
        ("<i>", None, 0, 1, 0),
        (["x", "<i>"], [[], []], 1, 1, 0),
        (["<i>", "x", "<i> <i>"], [1, 0, 1], 2, 2, 1),
    ],
)
def test_image_count_must_match_the_marks(processor, photos, prompts, images, index, marks, given):
    if isinstance(images, list):
        images = [photos[:count] if isinstance(count, int) else count for count in images]
    elif images is not None:
        images = photos[:images]
    with pytest.raises(
        ValueError, match=rf"Prompt {index} has {marks} '<i>' marks but {given} images were given"
    ):
        processor(prompts, images=images)


def test_pictures_in_the_list_and_beside_it_do_not_mix(processor, photos):
    for images in (None, [photos[0]]):
        with pytest.raises(
            ValueError, match="Prompt 0 holds 1 images in reading order and also 1 '<i>' marks"
        ):
            processor([photos[0], "and <i>"], images=images)


@pytest.mark.parametrize("prompts", [[], ()])
def test_empty_batch_is_refused(processor, prompts):
    with pytest.raises(ValueError, match="empty list"):
        processor(prompts)


@pytest.mark.parametrize(
    "prompts, images, message",
    [
        (None, None, "prompt of type NoneType"),
        (3, None, "prompt of type int"),
        ({"type": "text", "text": "x"}, None, "prompt of type dict"),
        (["x", []], None, "Prompt 1 is of type list and empty"),
        (["x", ["y"], 3], None, "Prompt 2 is of type int"),
        (["x", 3], None, "Image 0 of prompt 0 is of type int"),
        ("<i>", 3, "images of prompt 0 is of type int"),
        ("<i>", [[0]], "images of prompt 0 holds a list"),
        (["<i>", "x"], ["a.png", "b.png"], "list of lists for a batch of 2 prompts"),
        (["<i>", "x"], "a.png", "list of lists for a batch of 2 prompts"),
        ("<i>", [{1, 2}], "Image 0 of prompt 0 is of type set"),
        (["x", "<i>"], [[], [None]], "Image 0 of prompt 1 is of type NoneType"),
    ],
)
def test_values_of_another_type_are_named(processor, prompts, images, message):
    with pytest.raises(TypeError, match=message):
        processor(prompts, images=images)


def test_number_of_image_lists_must_be_that_of_prompts(processor, photos):
    with pytest.raises(ValueError, match="1 lists of images were given for 2 prompts"):
        processor(["<i>", "x"], images=[[photos[0]]])


def test_chat_means_its_content(processor, photos):
    content = [{"type": "text", "text": "a cat"}, {"type": "image", "image": photos[0]}, "in the snow"]
    expected = processor(content)
    for chat in (
        [{"role": "user", "content": content}],
        [{"role": "user", "content": content[:1]}, {"role": "user", "content": content[1:]}],
        [{"role": "user", "content": "a cat"}, {"role": "user", "content": tuple(content[1:])}],
    ):
        same(processor(chat), expected)
    marks = processor([{"role": "user", "content": "a cat <i>in the snow"}], images=[photos[0]])
    same(marks, expected)
    one, other = [{"role": "user", "content": content}], [{"role": "user", "content": "a hat"}]
    same(processor([one, other]), processor([content, [{"type": "text", "text": "a hat"}]]))


@pytest.mark.parametrize(
    ("message", "error", "said"),
    [
        ({"role": "assistant", "content": "a hat"}, ValueError, "message of the role 'assistant'"),
        ({"role": "system", "content": "a hat"}, ValueError, "message of the role 'system'"),
        ({"role": "user"}, TypeError, "content is of type NoneType"),
        ({"role": "user", "content": {"type": "text"}}, TypeError, "content is of type dict"),
        ({"role": "user", "content": [{"type": "video"}]}, ValueError, "content part of type 'video'"),
    ],
)
def test_chat_that_is_not_a_prompt_is_refused(processor, message, error, said):
    with pytest.raises(error, match=f"Negative prompt 0 holds a .*{said}"):
        processor([{"role": "user", "content": "a"}, message], name="negative prompt")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "x"},
        {"type": "text"},
        {"type": "text", "text": 3},
        {"type": "image"},
        {"type": "image", "image": "a.png", "url": "b.png"},
    ],
)
def test_unreadable_chat_content_is_named(processor, part):
    with pytest.raises(ValueError, match=r"Prompt 1 holds a content part of type .* Expected"):
        processor(["x", [part]])


def test_only_torch_tensors_are_returned(processor):
    with pytest.raises(ValueError, match="return_tensors='np'"):
        processor("x", return_tensors="np")


def test_prompt_longer_than_the_model_reads_is_refused_with_both_lengths(processor, photos):
    with pytest.raises(ValueError, match=r"Prompt 1 is 65 tokens long .*at most 64"):
        processor(["x", "dog " * 64])
    with pytest.raises(ValueError, match=r"Prompt 0 is 66 tokens long \(13 images take 5 each\).*at most 64"):
        processor("<i>" * 13, images=[photos[0]] * 13)
    assert processor("dog " * 63)["input_ids"].shape == (1, 64)


def test_unknown_image_word_is_refused(own_tokenizer):
    own_tokenizer.add_image_word("<cat>")
    processor = KosmosGProcessor(own_tokenizer)
    with pytest.raises(
        ValueError, match="Prompt 1 uses <my-dog>, which names no image word. Known words: <cat>"
    ):
        processor(["a <cat>", "a <my-dog> and a <cat>"])
    for text in ("<s> <unk> <image> <pad> <mask>", "a < b > c", "<Dog> <my dog> </b> <1>"):
        assert processor(text)["input_ids"].shape[0] == 1


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
def test_picture_without_pixels_is_refused(processor, size):
    picture = PIL.Image.new("RGB", size)
    with pytest.raises(ValueError, match=rf"Image 1 of prompt 0 is {size[0]} x {size[1]} pixels"):
        processor("<i> <i>", images=[PIL.Image.new("RGB", (4, 4)), picture])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 4, 4),
        np.full((4, 4, 3), 1.5),
        np.full((4, 4, 3), -0.1),
        np.full((4, 4, 3), np.nan),
        np.full((4, 4, 3), 256),
        torch.full((3, 4, 4), -1),
    ],
)
def test_array_of_another_shape_or_range_is_refused(processor, array):
    with pytest.raises(ValueError, match="Image 0 of prompt 1 is an array of .* Expected"):
        processor(["x", "<i>"], images=[[], [array]])


def test_sixteen_and_thirty_two_bit_pictures_out_of_range_are_refused(processor):
    for picture in (
        PIL.Image.new("I", (4, 4), 70000),
        PIL.Image.new("I", (4, 4), -1),
        PIL.Image.new("F", (4, 4), 2.0),
    ):
        with pytest.raises(ValueError, match="Image 0 of prompt 0"):
            processor("<i>", images=[picture])


def test_path_that_does_not_exist_is_named(processor, tmp_path):
    for path in (
        tmp_path / "missing.png",
        str(tmp_path / "missing.png"),
        tmp_path,
        "no/such/picture.png",
        "\0",
    ):
        with pytest.raises(ValueError, match="Image 0 of prompt 0 cannot be read from"):
            processor("<i>", images=[path])


def test_running_out_of_memory_is_no_fault_of_the_picture(processor, photos, tmp_path, monkeypatch):
    photos[0].save(tmp_path / "photo.png")

    def fail(self):
        raise MemoryError

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", fail)
    for picture in (tmp_path / "photo.png", PIL.Image.open(tmp_path / "photo.png")):
        with pytest.raises(MemoryError):
            processor("<i>", images=[picture])


def damaged(photos):
    """(kind, bytes) of broken files of several formats: cut short, overwritten, and none at all."""
    rng = random.Random(0)
    yield "empty", b""
    yield "text", b"not a picture at all" * 20
    for fmt in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "ICNS", "JPEG2000", "AVIF"):
        buffer = io.BytesIO()
        try:
            photos[0].save(buffer, format=fmt)
        except (KeyError, OSError):  # a Pillow built without it
            continue
        content = buffer.getvalue()
        for _ in range(15):
            yield f"{fmt} cut", content[: rng.randrange(len(content))]
            flipped = bytearray(content)
            for _ in range(8):
                flipped[rng.randrange(len(flipped))] = rng.randrange(256)
            yield f"{fmt} overwritten", bytes(flipped)


@pytest.mark.filterwarnings("ignore")
def test_damaged_file_opens_or_is_refused_with_a_value_error(photos, tmp_path):
    path, refused = tmp_path / "photo", set()
    for kind, content in damaged(photos):
        path.write_bytes(content)
        try:
            open_image(path, "Image 3 of prompt 2")
        except ValueError as error:
            assert str(error).startswith("Image 3 of prompt 2"), kind
            refused.add(kind)
        try:
            opened = PIL.Image.open(io.BytesIO(content))
        except Exception:  # what Pillow itself cannot open, nobody can hand over
            continue
        try:
            open_image(opened, "Image 3 of prompt 2")
        except ValueError as error:
            assert str(error).startswith("Image 3 of prompt 2"), kind
    assert {"empty", "text", "PNG cut", "JPEG cut"} <= refused


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [89_999, 1000])  # Pillow itself warns of the first and refuses the second
def test_decompression_bomb_is_refused(processor, tmp_path, monkeypatch, limit):
    path = tmp_path / "bomb.png"
    PIL.Image.new("L", (300, 300)).save(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="Image 0 of prompt 0 .*decompression bomb"):
        processor("<i>", images=[path])
    with pytest.raises(ValueError, match=rf"300 x 300 = 90,000 pixels, more than the {limit:,}"):
        processor("<i>", images=[PIL.Image.new("L", (300, 300))])


def test_picture_that_would_be_resized_to_a_bomb_is_refused(processor, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100_000)
    picture = PIL.Image.new("RGB", (1, 20_000))
    with pytest.raises(ValueError, match=r"1 x 20000 pixels, resized, has 28 x 560000 = 15,680,000 pixels"):
        processor("<i>", images=[picture])


def test_lifted_limit_on_pixels_is_respected(processor, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    assert processor.preprocess(PIL.Image.new("RGB", (1, 100))).shape == (3, 28, 28)
