"""The same samples of sprites, written in each form of their kind, give the same batches in the same order, and so the same loss."""

import base64
import json

import pytest
import torch
from support.stored_data import encode, write_files, write_lines, write_tar

from kosmos_g_diffusers import KosmosGProcessor, KosmosGTokenizer
from kosmos_g_diffusers.data import InstructCollate, MixtureDataset, build_source
from kosmos_g_diffusers.data.making import ImportSettings, import_data
from kosmos_g_diffusers.sprites.world import Scene, draw_sprite_at_random, make_rng, render

datasets = pytest.importorskip("datasets")
COUNT, STEPS = 12, 7


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def sprites():
    """(bytes of a PNG before, after, words) of each sample."""
    found = []
    for number in range(COUNT):
        rng = make_rng("forms", number)
        images = [encode(render(Scene((draw_sprite_at_random(rng),), "white"), rng)) for _ in range(3)]
        found.append((*images, f"a star number {number}"))
    return found


@pytest.fixture(scope="module")
def collate():
    pieces = [(f"▁{word}", -2.0) for word in ("a", "star", "number", "make", "it")]
    pieces += [("▁", -5.0)] + [(chr(code), -6.0) for code in range(33, 127)]
    tokenizer = KosmosGTokenizer.from_vocabulary(
        pieces, image_size=28, latent_query_num=3, model_max_length=64
    )
    return InstructCollate(KosmosGProcessor(tokenizer), 64)


def batches(line, collate, cache_dir):
    dataset = MixtureDataset([build_source(line, cache_dir=cache_dir)], collate, batch_size=4, seed=1)
    return [dataset[step] for step in range(STEPS)]


def loss(batch):
    """Of a model that reads everything that a stage reads."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1000, 8, generator=generator)
    states = table[batch["input_ids"]].sum(dim=1)
    if "pixel_values" in batch:
        states = states + batch["pixel_values"].mean()
    target = (
        batch["target_pixel_values"].mean(dim=(1, 2, 3))
        + batch["noise"].mean(dim=(1, 2, 3)) * batch["timesteps"]
    )
    return (states.mean(dim=1) - target).square().mean()


def assert_same_batches(lines, collate, tmp_path):
    expected, *others = (batches(line, collate, tmp_path / "user-cache") for line in lines)
    assert not any(batch["skipped"] for batch in expected)
    for line, found in zip(lines[1:], others, strict=True):
        for step in range(STEPS):
            for name, value in expected[step].items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(found[step][name], value), (line, step, name)
            assert loss(found[step]).item() == loss(expected[step]).item()


def imported(line, tmp_path):
    import_data(tmp_path / "imported", ImportSettings(source=line), workers=0, sheet_samples=0)
    return f"shards:{tmp_path}/imported"


def tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        "\t".join(base64.b64encode(cell).decode() if isinstance(cell, bytes) else cell for cell in row)
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def members(name_parts):
    """Members of a shard of (key, {ending: bytes}) pairs."""
    return [(f"{key}.{name}", data) for key, parts in name_parts for name, data in parts.items()]


def table(folder, rows, kind):
    dataset = datasets.Dataset.from_list(rows)
    if kind == "streamed":
        folder.mkdir()
        dataset.to_parquet(folder / "0.parquet")
        return f"datasets:parquet?data_files={folder}/*.parquet&streaming=true"
    dataset.save_to_disk(folder)
    return f"datasets:{folder}?"


def test_captions(sprites, collate, tmp_path):
    keys = [f"{number:03}" for number in range(COUNT)]
    rows = [{"picture": image, "about": words} for image, _, _, words in sprites]
    today = f"tsv:captions:{tsv(tmp_path / 'a.tsv', [('x', words, image) for image, _, _, words in sprites])}"
    ours = [
        (key, {"target.png": image, "json": json.dumps({"caption": words}).encode()})
        for key, (image, _, _, words) in zip(keys, sprites, strict=True)
    ]
    theirs = [
        (key, {"photo.png": image, "json": json.dumps({"m": {"c": words}}).encode()})
        for key, (image, _, _, words) in zip(keys, sprites, strict=True)
    ]
    files = {f"{key}.png": image for key, (image, *_) in zip(keys, sprites, strict=True)} | {
        f"{key}.txt": row[3] for key, row in zip(keys, sprites, strict=True)
    }
    write_files(tmp_path / "images", files)
    turns = [
        {"id": key, "image": f"images/{key}.png", "conversations": [{"value": "?"}, {"value": row[3]}]}
        for key, row in zip(keys, sprites, strict=True)
    ]
    lines = [
        today,
        f"shards:{write_tar(tmp_path / 'ours.tar', members(ours))}",
        f"shards:{write_tar(tmp_path / 'theirs.tar', members(theirs))}?image=photo.png&caption=json.m.c",
        f"folder:{tmp_path}/images",
        table(tmp_path / "table", rows, "saved") + "image=picture&caption=about",
        table(tmp_path / "streamed", rows, "streamed") + "&image=picture&caption=about",
        f"datasets:json?data_files={write_lines(tmp_path / 'chat.jsonl', turns)}&image=image&caption=conversations.1.value",
        imported(today, tmp_path),
    ]
    assert_same_batches(lines, collate, tmp_path)


def test_edits(sprites, collate, tmp_path):
    keys = [f"{number:03}" for number in range(COUNT)]
    today = f"tsv:edits:{tsv(tmp_path / 'a.tsv', [(words, 'make it ' + words[-1], before, after) for before, after, _, words in sprites])}"
    rows = [
        {"before": before, "after": after, "in": words, "do": ["make it " + words[-1]]}
        for before, after, _, words in sprites
    ]
    ours, theirs, files = [], [], {}
    for key, row in zip(keys, rows, strict=True):
        texts = {"edit": row["do"][0], "input": row["in"]}
        ours.append(
            (
                key,
                {
                    "json": json.dumps(texts).encode(),
                    "0.source.png": row["before"],
                    "0.target.png": row["after"],
                },
            )
        )
        theirs.append(
            (
                key,
                {
                    "a.png": row["before"],
                    "b.png": row["after"],
                    "do.txt": row["do"][0].encode(),
                    "in.txt": row["in"].encode(),
                },
            )
        )
        files |= {
            f"{key}_a.png": row["before"],
            f"{key}_b.png": row["after"],
            f"{key}.txt": row["do"][0],
            f"{key}.in": row["in"],
        }
    write_files(tmp_path / "images", files)
    uses = "source=before&image=after&input=in&edit=do&caption="
    lines = [
        today,
        f"shards:{write_tar(tmp_path / 'ours.tar', members(ours))}",
        f"shards:{write_tar(tmp_path / 'theirs.tar', members(theirs))}?source=a.png&image=b.png&edit=do.txt&input=in.txt",
        f"folder:{tmp_path}/images?source=_a.png&image=_b.png&edit=.txt&input=.in",
        table(tmp_path / "table", rows, "saved") + uses,
        table(tmp_path / "streamed", rows, "streamed") + "&" + uses,
        imported(table(tmp_path / "again", rows, "saved") + uses, tmp_path),
    ]
    assert_same_batches(lines, collate, tmp_path)


def test_compositions(sprites, collate, tmp_path):
    """Entities with images of their own, in the official TSV, in shards and in a table."""
    keys = [f"{number:03}" for number in range(COUNT)]
    today = f"tsv:compositions:{tsv(tmp_path / 'a.tsv', [(words, 'star,number', image, one, one, two, two) for image, one, two, words in sprites])}"
    rows = [
        {"image": image, "text": words, "things": ["star", "number"], "crops": [one, two]}
        for image, one, two, words in sprites
    ]
    ours = []
    for key, row in zip(keys, rows, strict=True):
        texts = json.dumps({"caption": row["text"], "entities": row["things"]}).encode()
        ours.append(
            (
                key,
                {
                    "json": texts,
                    "target.png": row["image"],
                    "0.png": row["crops"][0],
                    "1.png": row["crops"][1],
                },
            )
        )
    uses = "image=image&caption=text&entities=things&images=crops"
    lines = [
        today,
        f"shards:{write_tar(tmp_path / 'ours.tar', members(ours))}",
        table(tmp_path / "table", rows, "saved") + uses,
        imported(today, tmp_path),
    ]
    assert_same_batches(lines, collate, tmp_path)


def test_prompts(sprites, collate, tmp_path):
    """Today's form is that of our shards; others have marks, lists, or one image of two views."""
    keys = [f"{number:03}" for number in range(COUNT)]
    ours, theirs, rows, files = [], [], [], {}
    for key, (target, one, two, words) in zip(keys, sprites, strict=True):
        parts = [words, {"image": "1"}, " make it ", {"image": "0"}]
        ours.append(
            (
                key,
                {
                    "json": json.dumps({"prompt": parts}).encode(),
                    "0.png": one,
                    "1.png": two,
                    "target.png": target,
                },
            )
        )
        marked = f"{words}<img><|image_2|></img> make it <img><|image_1|></img>"
        theirs.append(
            (key, {"one.png": one, "two.png": two, "out.png": target, "words.txt": marked.encode()})
        )
        rows.append({"instruction": marked, "input_images": [one, two], "output_image": target})
        files |= {f"{key}.1.png": one, f"{key}.2.png": two, f"{key}.out.png": target}
    write_files(tmp_path, files)
    x2i = [
        {**row, "input_images": [f"{key}.1.png", f"{key}.2.png"], "output_image": f"{key}.out.png"}
        for key, row in zip(keys, rows, strict=True)
    ]
    uses = "prompt=instruction&images=input_images&image=output_image"
    line = f"datasets:json?data_files={write_lines(tmp_path / 'x2i.jsonl', x2i)}&{uses}"
    lines = [
        f"shards:{write_tar(tmp_path / 'ours.tar', members(ours))}",
        f"shards:{write_tar(tmp_path / 'theirs.tar', members(theirs))}?prompt=words.txt&images=one.png,two.png&image=out.png",
        table(tmp_path / "table", rows, "saved") + uses,
        line,
        imported(line, tmp_path),
    ]
    assert_same_batches(lines, collate, tmp_path)
