"""The page of samples as training reads them: prompts with images in place, what is dropped, what is left out, counts."""

import base64
import io
import json
import re

import PIL.Image
import pytest
from support.stored_data import encode, make_image, write_files, write_tar

from kosmos_g_diffusers import KosmosGTokenizer, cli
from kosmos_g_diffusers.data import ShardWriter, build_source
from kosmos_g_diffusers.data.making.show import histogram, show


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def model(tmp_path):
    pieces = [(f"▁{word}", -2.0) for word in ("a", "dog", "make", "it", "snow", "garden", "on", "sofa")]
    pieces += [("▁", -5.0)] + [(chr(code), -6.0) for code in range(33, 127)]
    tokenizer = KosmosGTokenizer.from_vocabulary(
        pieces, image_size=28, latent_query_num=3, model_max_length=48
    )
    tokenizer.save_pretrained(tmp_path / "model" / "tokenizer")
    return tmp_path / "model"


def images_of(html):
    return [
        PIL.Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'base64,([^"]*)"', html)
    ]


def articles(path):
    return re.findall(r"<article>.*?</article>", path.read_text(), re.DOTALL)


def prompts(path):
    """Of each sample shown as training reads it: its prompt's text, with <i> for images and dropped words in brackets."""
    found = {}
    for article in articles(path):
        key = re.search(r"<small>([^<]*)</small>", article)[1]
        prompt = re.search(r'<div class="prompt"><small>prompt</small>(.*?)<small>', article, re.DOTALL)
        if prompt:
            text = re.sub(r"<img[^>]*>", " <i> ", prompt[1])
            found[key] = " ".join(re.sub(r"<s>([^<]*)</s>", r"[\1]", text).split())
    return found


def write_edits(folder, count=12):
    with ShardWriter(folder) as writer:
        for number in range(count):
            pair = (make_image(10 + number, (40, 30)), make_image(200, (40, 30)))
            writer.write_edit(f"k{number:02}", "make it snow", [pair], words="a garden")


def test_prompts_have_their_images_in_place_and_words_that_were_dropped(tmp_path, model):
    write_edits(tmp_path / "shards")
    path, summary = show(f"shards:{tmp_path}/shards", tmp_path / "a.html", model=model, resolution=16)
    shown = prompts(path)
    assert len(shown) == 12 and set(shown.values()) == {
        "a garden <i> make it snow",
        "[a garden] <i> make it snow",
    }
    # as training reads it, by the same seeds
    from kosmos_g_diffusers.data import InstructCollate, MixtureDataset
    from kosmos_g_diffusers.processing_kosmos_g import KosmosGProcessor

    processor = KosmosGProcessor(KosmosGTokenizer.from_pretrained(model / "tokenizer"))
    dataset = MixtureDataset(
        [build_source(f"shards:{tmp_path}/shards")], InstructCollate(processor, 16), batch_size=1
    )
    for step in range(12):
        batch = dataset[step]
        dropped = shown[batch["keys"][0]].startswith("[")
        article = articles(path)[step]
        assert f"{batch['input_ids'].shape[1]} tokens, 1 images" in article
        assert batch["input_ids"].shape[1] == (1 + 5 + 3) + (0 if dropped else 2)
        assert ("trained without its prompt" in article) == bool(batch["drop_condition"])
        read, drawn = images_of(article)[:2]
        assert (read.size, drawn.size) == ((28, 28), (16, 16))
        assert abs(drawn.getpixel((8, 8))[0] - 200) < 4
    assert "12 samples; 12 read, 0 of them left out" in summary
    assert (
        f"Prompts have 9 to 11 (median {9 if 'median 9' in summary else 11}) tokens" in summary
        or "median 10" in summary
    )


def test_what_is_left_out_is_counted_with_its_causes(tmp_path, model):
    files = {}
    for number in range(20):
        files |= {
            f"{number:02}.png": encode(make_image(number, (20 + number, 20))),
            f"{number:02}.txt": "a dog",
        }
    files |= {"03.txt": " ", "04.png": b"no image", "05.txt": "dog " * 60, "06.txt": "a dog on a sofa"}
    folder = write_files(tmp_path / "images", files)
    path, summary = show(f"folder:{folder}", tmp_path / "a.html", model=model, resolution=16)
    assert "20 samples; 20 read, 3 of them left out." in summary
    for cause in ("caption: 1, such as", "image: 1, such as", "filtered: length: 1, such as"):
        assert cause in summary
    assert "Shorter sides are 20 to 20" in summary and "Images in a prompt: 0: 17." in summary
    page = path.read_text()
    assert (
        page.count("left out: ") == 3
        and page.count("<svg") == 3
        and summary.splitlines()[0] in page.replace("&#39;", "'")
    )


def test_without_a_model_tokens_are_estimated_and_nothing_is_too_long(tmp_path):
    folder = write_files(tmp_path / "images", {"a.png": encode(1), "a.txt": "dog " * 100})
    path, summary = show(f"folder:{folder}", tmp_path / "a.html")
    assert "Prompts have 100 to 100 (median 100) tokens (of 4 characters)" in summary
    assert "about 100 tokens, 0 images" in path.read_text()


def test_stages_read_other_parts(tmp_path, model):
    folder = write_files(tmp_path / "images", {"a.png": encode(1), "a.txt": "a dog"})
    path, _ = show(f"folder:{folder}", tmp_path / "a.html", model=model, stage="pretrain")
    assert list(prompts(path).values()) == ["<i> a dog"] and "to draw" not in path.read_text()


def test_every_form_is_shown_with_what_is_stored(tmp_path):
    record = {"caption": "a dog on a sofa", "noun_chunks": [[0, 5, 0, 0, 0.5, 1, 0.9]]}
    shard = write_tar(
        tmp_path / "0.tar", {"0.jpg": encode(make_image(9, (20, 20))), "0.json": json.dumps(record).encode()}
    )
    line = f"shards:{shard}?image=jpg&caption=json.caption&boxes=json.noun_chunks"
    path, _ = show(line, tmp_path / "a.html", samples=1)
    text = prompts(path)["test_every_form_is_shown_with_0/0.tar:0"]
    assert text in ("a dog <i> on a sofa", "[a dog] <i> on a sofa")
    assert "<mark>a dog</mark> on a sofa" in path.read_text()


def test_texts_of_strangers_stay_texts(tmp_path):
    evil = "<script>alert(1)</script><img src=http://x>"
    folder = write_files(
        tmp_path / "images", {"a.png": encode(1), "a.txt": evil, "b.png": evil, "b.txt": "x"}
    )
    page = show(f"folder:{folder}", tmp_path / "a.html")[0].read_text()
    assert "<script" not in page and "<img src=http" not in page and "default-src 'none'" in page


def test_the_command_prints_the_counts_and_sheet_is_its_alias(tmp_path, capsys):
    write_edits(tmp_path / "shards", 3)
    page = str(tmp_path / "a.html")
    assert cli.main(["data", "show", f"shards:{tmp_path}/shards", "--output", page, "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == page and "3 samples; 3 read, 0 of them left out." in out
    assert len(articles(tmp_path / "a.html")) == 2
    assert cli.main(["data", "sheet", str(tmp_path / "shards"), "--output", page]) == 0
    assert capsys.readouterr().out.strip() == page and len(articles(tmp_path / "a.html")) == 3
    assert cli.main(["data", "show", "folder:/nowhere", "--output", page]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_histograms_count_every_value():
    plot = histogram("x", [1, 1, 2, 5])
    assert [bar["label"] for bar in plot.bars][:2] == ["1 to 2: 2", "2 to 3: 1"]
    assert sum(int(bar["label"].rpartition(": ")[2]) for bar in plot.bars) == 4
    assert max(bar["height"] for bar in plot.bars) == plot.bars[0]["height"]
    assert len(histogram("x", [7.0]).bars) == 1
