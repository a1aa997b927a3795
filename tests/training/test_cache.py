"""Caches of frozen work: the same losses, no frozen model run twice, and nothing used that is damaged or of other weights."""

import pickle
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel

from kosmos_g_diffusers import KosmosGProcessor, KosmosGTextEncoder
from kosmos_g_diffusers.data import (
    AlignCollate,
    InstructCollate,
    MixtureDataset,
    PretrainCollate,
    Sample,
)
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN
from kosmos_g_diffusers.training import cache as cache_module
from kosmos_g_diffusers.training.cache import FrozenCache
from kosmos_g_diffusers.training.cache_store import TensorStore, content_key
from kosmos_g_diffusers.training.stages import AlignStage, InstructStage, PretrainStage

WORKS = {
    "pretrain": {"vision_states"},
    "align": {"vision_states", "clip_embeds"},
    "instruct": {"vision_states", "latent_parameters"},
}


class Source:
    """Six samples: two images in the prompt, one, or none."""

    name, groups = "photos", [6]

    def __init__(self, photos):
        self.photos = photos

    def __len__(self):
        return 6

    def length(self, index):
        return index

    def read(self, index, rng):
        first, second = self.photos[index % 4], self.photos[(index + 1) % 4]
        prompt = [(first, "in the suit of", second), ("painting of", first), ("a furniture",)][index % 3]
        return Sample(f"photos:{index}", prompt, second, "a furniture in the style of painting"[: 11 + index])


class TargetTokenizer:
    model_max_length = 77

    def __call__(self, text, **kwargs):
        ids = [ord(letter) % 48 + 1 for letter in text]
        return {"input_ids": ids + [49] * (77 - len(ids))}


@pytest.fixture
def build_stage(build_pipe):
    """Function that builds a small stage by its name, always with the same weights."""

    def build(name, **kwargs):
        pipe = build_pipe()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            aligner_n = AlignerNetN(pipe.text_encoder.config)
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
            target = CLIPTextModel(
                CLIPTextConfig(vocab_size=50, num_hidden_layers=2, eos_token_id=49, **sizes)
            )
        if name == "pretrain":
            return PretrainStage(pipe.text_encoder, **kwargs).train()
        if name == "align":
            return AlignStage(pipe.text_encoder, aligner_n, target).train()
        return InstructStage(pipe.text_encoder, pipe.unet, pipe.vae, pipe.scheduler, **kwargs).train()

    return build


@pytest.fixture
def build_collate(pipe):
    processor = KosmosGProcessor(pipe.tokenizer)

    def build(name, condition_dropout=0.3):
        if name == "align":
            return AlignCollate(processor, TargetTokenizer())
        if name == "pretrain":
            return PretrainCollate(processor)
        return InstructCollate(processor, 32, vae_scale_factor=8, condition_dropout=condition_dropout)

    return build


@pytest.fixture
def read(photos):
    """Function from a collate to four batches of three samples, as the loop gives them to a stage: tensors alone."""

    def read(collate, workers=0):
        dataset = MixtureDataset([Source(photos)], collate, batch_size=3)
        batches = DataLoader(dataset, batch_size=None, sampler=range(4), num_workers=workers)
        for batch in batches:
            yield {name: value for name, value in batch.items() if torch.is_tensor(value)}

    return read


def make_cache(folder, stage, *args, **kwargs):
    return FrozenCache(folder, stage, *args, keep_free=0, **kwargs)


def frozen_models_must_not_run(stage):
    def ran(*args, **kwargs):
        raise AssertionError("a frozen model ran")

    return mock.patch.multiple(
        stage,
        **{
            name: ran
            for name in ("vision_states", "latent_parameters", "clip_embeds")
            if hasattr(stage, name)
        },
    )


def step(stage, batch):
    """Losses of a batch, and the gradients of their sum."""
    stage.zero_grad()
    torch.manual_seed(0)
    losses = stage(batch)
    sum(losses.values()).backward()
    gradients = {
        name: weight.grad.clone() for name, weight in stage.named_parameters() if weight.grad is not None
    }
    return {name: loss.detach() for name, loss in losses.items()}, gradients


# The losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKS)
def test_losses_and_gradients_are_those_without_a_cache(build_stage, build_collate, read, tmp_path, name):
    expected = [step(build_stage(name), batch) for batch in read(build_collate(name))]
    for run in ("fills", "finds"):
        stage = build_stage(name)
        cache = make_cache(tmp_path, stage)
        given = [step(stage, batch) for batch in read(cache.attach(build_collate(name)))]
        cache.flush()
        for (losses, gradients), (expected_losses, expected_gradients) in zip(given, expected, strict=True):
            assert gradients.keys() == expected_gradients.keys()
            for key, loss in losses.items():
                assert abs(loss - expected_losses[key]) <= 1e-6 * abs(expected_losses[key]), (run, key)
            total = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
            for key, gradient in gradients.items():
                change = (gradient - expected_gradients[key]).norm()
                assert change <= 1e-4 * expected_gradients[key].norm() + 1e-6 * total, (run, key)
        used = {key for key in cache.stores if cache.found[key] or cache.computed[key]}
        assert used == (WORKS[name] - {"vision_states"} if name == "align" else WORKS[name])
        for key in used:
            assert cache.found[key] if run == "finds" else cache.computed[key]
        if run == "finds":
            assert not any(cache.computed.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_half_precision_changes_the_loss_by_rounding(build_stage, build_collate, read, tmp_path, precision):
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    stages = [build_stage("instruct").move_frozen(dtype=half) for _ in range(3)]
    expected, filling, finding = stages
    collates = [build_collate("instruct")]
    for stage in (filling, finding):
        cache = make_cache(tmp_path, stage, precision, dtype=torch.float16)
        collates.append(cache.attach(build_collate("instruct")))
        if stage is filling:
            fill = cache
    losses = []
    for stage, collate in zip(stages, collates, strict=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses.append(torch.stack([stage(batch)["denoising"] for batch in read(collate)]))
        fill.flush()
    # rounded when computed, so that it does not matter which it was; on some CPUs the last bit depends on the memory's layout
    assert torch.allclose(losses[1], losses[2], rtol=2e-7, atol=0)
    # bf16 rounds to 2**-9, float16 to 2**-12; the loss is a mean of thousands of them
    assert torch.allclose(losses[0], losses[1], rtol=1e-3 if precision == "bf16" else 1e-4)
    assert precision == "bf16" or not torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("name", WORKS)
def test_frozen_models_do_not_run_twice(build_stage, build_collate, read, tmp_path, name):
    stage = build_stage(name)
    cache = make_cache(tmp_path, stage)
    for batch in read(cache.attach(build_collate(name))):
        stage(batch)
    cache.flush()
    again = build_stage(name)
    with frozen_models_must_not_run(again):
        # a batch without images would send one of zeros through the tower, to keep the trained weights in use
        for batch in read(make_cache(tmp_path, again).attach(build_collate(name, 0.0)), workers=2):
            again(batch)


def test_a_batch_of_found_and_missing_is_put_together(build_stage, build_collate, photos, tmp_path):
    stage, inner = build_stage("instruct"), build_collate("instruct")
    cache = make_cache(tmp_path, stage)
    collate, source = cache.attach(inner), Source(photos)
    rows = [
        inner.prepare(source.read(index, None), torch.Generator().manual_seed(index)) for index in range(6)
    ]
    cache.complete(collate(rows[3:5]))
    cache.flush()
    given = collate(rows)
    assert 0 < len(given["latent_parameters.missing"]) < 6 and 0 < len(given["vision_states.missing"]) < 6
    given, expected = cache.complete(given), inner(rows)
    assert torch.allclose(
        given["latent_parameters"], stage.latent_parameters(expected["target_pixel_values"]), atol=1e-6
    )
    assert torch.allclose(given["vision_states"], stage.vision_states(expected["pixel_values"]), atol=1e-6)
    unchanged = set(expected) - {"target_pixel_values", "pixel_values"}
    assert set(given) == unchanged | {"latent_parameters", "vision_states"}
    assert all(torch.equal(given[name], expected[name]) for name in unchanged)


def test_a_batch_that_was_not_completed_is_refused(build_stage, build_collate, read, tmp_path):
    """Rows that were not found hold anything: no stage may take them for states."""
    filling = build_stage("instruct")
    cache = make_cache(tmp_path, filling)
    for batch in read(cache.attach(build_collate("instruct"))):
        filling(batch)
    cache.flush()
    collate = make_cache(tmp_path, build_stage("instruct")).attach(build_collate("instruct"))
    with pytest.raises((KeyError, ValueError)):
        build_stage("instruct")(next(iter(read(collate))))


def test_the_loop_fills_and_finds(build_stage, build_collate, photos, tmp_path):
    pytest.importorskip("tqdm")
    import json

    from kosmos_g_diffusers.training.config import TrainConfig
    from kosmos_g_diffusers.training.loop import train

    losses = []
    for run in ("plain", "fills", "finds"):
        stage, collate, cache = build_stage("instruct"), build_collate("instruct"), None
        if run != "plain":
            cache = make_cache(tmp_path / "cache", stage)
            collate = cache.attach(collate)
        config = TrainConfig(
            output=str(tmp_path / run), steps=4, batch_size=3, workers=1, log_every=1, lr=1e-3
        )
        dataset = MixtureDataset([Source(photos)], collate, batch_size=3)
        train(config, stage, dataset, save_model=lambda *args: None, progress_bar=False)
        if cache:
            cache.flush()
        lines = (tmp_path / run / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["denoising"] for line in lines])
    assert not any(cache.computed.values()) and "latent_parameters 12 found and 0 computed" in cache.summary()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


# What is kept, and for which weights ---------------------------------------------------------------------------------


def _folders(cache):
    return {name: store.folder.name for name, store in cache.stores.items()}


def test_other_weights_precision_or_dtype_look_elsewhere(build_stage, tmp_path):
    stage = build_stage("instruct")
    plain = _folders(make_cache(tmp_path, stage))
    assert _folders(make_cache(tmp_path, build_stage("instruct"))) == plain
    for other in (make_cache(tmp_path, stage, "bf16"), make_cache(tmp_path, stage, dtype=torch.float16)):
        assert not set(_folders(other).values()) & set(plain.values())
    vision = stage.text_encoder.vision_model.model
    for name, weight, changes in (
        ("vision_states", vision.encoder.layers[-1].mlp.fc1.weight, False),  # it trains
        ("latent_parameters", stage.vae.decoder.conv_in.weight, False),
        ("vision_states", vision.encoder.layers[0].mlp.fc1.weight, True),
        ("vision_states", vision.embeddings.class_embedding, True),
        ("latent_parameters", stage.vae.encoder.conv_in.weight, True),
        ("latent_parameters", stage.vae.quant_conv.bias, True),
    ):
        before = weight.detach().clone()
        weight.data.view(-1)[0] += 1e-3
        assert (_folders(make_cache(tmp_path, stage))[name] != plain[name]) == changes
        weight.data.copy_(before)


def test_a_saved_model_finds_what_the_original_kept(build_stage, pipe, tmp_path):
    before = _folders(make_cache(tmp_path, build_stage("instruct")))
    pipe.save_pretrained(tmp_path / "pipe")
    encoder = KosmosGTextEncoder.from_pretrained(tmp_path / "pipe" / "text_encoder", dtype=torch.float32)
    vae = type(pipe.vae).from_pretrained(tmp_path / "pipe" / "vae")
    stage = InstructStage(encoder, pipe.unet, vae, pipe.scheduler)
    assert _folders(make_cache(tmp_path, stage)) == before


def test_what_trains_is_not_kept(build_stage, tmp_path):
    assert set(make_cache(tmp_path, build_stage("instruct", train_vision="all")).stores) == {
        "latent_parameters"
    }
    with pytest.raises(ValueError, match="PretrainStage.*train_vision='all' it has none"):
        make_cache(tmp_path, build_stage("pretrain", train_vision="all"))
    with pytest.raises(ValueError, match="clip_embeds of InstructStage.*vision_states, latent_parameters"):
        make_cache(tmp_path, build_stage("instruct"), only=["clip_embeds"])
    stage = build_stage("instruct")
    for parameter in stage.text_encoder.vision_model.model.encoder.layers[0].parameters():
        parameter.requires_grad_(True)  # as adapters there would
    assert set(make_cache(tmp_path, stage).stores) == {"latent_parameters"}


def test_vision_states_are_not_kept_where_processes_gather_weights(
    build_stage, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert set(make_cache(tmp_path, build_stage("instruct")).stores) == {"latent_parameters"}
    assert "FSDP" in caplog.text


def test_the_collate_travels_to_other_processes(build_stage, build_collate, read, tmp_path):
    stage = build_stage("instruct")
    cache = make_cache(tmp_path, stage)
    collate = cache.attach(build_collate("instruct"))
    for batch in read(collate):
        cache.complete(batch)
    pickled = pickle.dumps(collate)
    assert len(pickled) < 100_000  # no model in it, nor what is about to be written
    cache.flush()
    names = next(iter(read(pickle.loads(pickled)))).keys()
    assert "latent_parameters.found" in names and "latent_parameters.missing" not in names


# The shards ----------------------------------------------------------------------------------------------------------


def _store(folder, **kwargs):
    return TensorStore(folder, torch.float16, keep_free=0, **kwargs)


def _entries(n=5, seed=0):
    values = torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(seed)).half()
    return [content_key(value) for value in values], values


def test_entries_are_found_by_other_stores_when_their_shard_is_written(tmp_path):
    keys, values = _entries()
    writer, reader = _store(tmp_path / "new", shard_entries=2), _store(tmp_path / "new")
    assert reader.read(keys) == (None, [0, 1, 2, 3, 4])
    for key, value in zip(keys, values, strict=True):
        writer.add([key], value[None])
    assert torch.equal(writer.read(keys)[0], values)
    found, missing = reader.read(keys)  # the fifth is lost if the writer is killed now
    assert missing == [4] and torch.equal(found[:4], values[:4])
    writer.flush()
    assert torch.equal(reader.read(keys)[0], values) and len(list((tmp_path / "new").iterdir())) == 3


def test_two_writers_share_a_folder(tmp_path):
    keys, values = _entries()
    for first in (0, 2):  # the third entry is computed by both
        store = _store(tmp_path)
        store.add(keys[first : first + 3], values[first : first + 3])
        store.flush()
    found, missing = _store(tmp_path).read(keys)
    assert not missing and torch.equal(found, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_come_back_bit_for_bit(tmp_path, dtype):
    values = torch.randn(4, 7).to(dtype)
    store = TensorStore(tmp_path, dtype, keep_free=0)
    store.add([bytes([number] * 16) for number in range(4)], values)
    store.flush()
    order = [2, 0, 3, 1, 1]
    found, _ = TensorStore(tmp_path, dtype).read([bytes([number] * 16) for number in order])
    assert found.dtype == dtype and torch.equal(found, values[order])


@pytest.mark.parametrize("damage", ["value", "key", "cut", "header", "empty"])
def test_a_damaged_shard_is_reported_and_never_used(tmp_path, caplog, damage):
    keys, values = _entries()
    for part in (slice(0, 3), slice(3, 5)):
        store = _store(tmp_path)
        store.add(keys[part], values[part])
        store.flush()
    (path,) = [
        path
        for path in tmp_path.iterdir()
        if path.stat().st_size == max(p.stat().st_size for p in tmp_path.iterdir())
    ]
    data = bytearray(path.read_bytes())
    where = {"value": data.find(values[1].numpy().tobytes()), "key": data.find(keys[1]), "header": 3}.get(
        damage
    )
    if where is None:
        del data[len(data) // 2 if damage == "cut" else 0 :]
    else:
        data[where] ^= 1
    path.write_bytes(data)
    reader = _store(tmp_path)
    found, missing = reader.read(keys)
    if damage == "key":  # its entry is not met; the others are sound
        assert missing == [1]
        return
    assert 1 in missing and torch.equal(found[3:], values[3:])
    assert path.name in caplog.text and "damaged" in caplog.text
    reader.add([keys[1]], values[1:2])
    reader.flush()
    again = _store(tmp_path)
    found, missing = again.read(keys)
    assert missing == [0, 2] and torch.equal(found[[1, 3, 4]], values[[1, 3, 4]])
    assert path.with_suffix(".damaged").exists() and not path.exists()


def test_a_damaged_entry_is_computed_again_in_training(build_stage, build_collate, read, tmp_path, caplog):
    losses = []
    for _ in range(2):
        stage = build_stage("instruct")
        cache = make_cache(tmp_path, stage, only=["latent_parameters"])
        losses.append(
            torch.stack(
                [
                    stage(batch)["denoising"].detach()
                    for batch in read(cache.attach(build_collate("instruct")))
                ]
            )
        )
        cache.flush()
        for path in tmp_path.rglob("*.safetensors"):
            data = bytearray(path.read_bytes())
            for place in range(len(data) // 2, len(data) // 2 + 200):
                data[place] ^= 0x40
            path.write_bytes(data)
    assert "damaged" in caplog.text and cache.computed["latent_parameters"] > 0
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)


def test_a_shard_that_vanishes_is_computed_again(tmp_path):
    keys, values = _entries()
    writer, reader = _store(tmp_path), _store(tmp_path)
    writer.add(keys, values)
    writer.flush()
    assert reader.read(keys)[1] == []
    for path in tmp_path.iterdir():
        path.unlink()  # someone wanted the room
    assert reader.read(keys) == (None, [0, 1, 2, 3, 4])


def test_a_full_disk_ends_the_keeping_and_not_the_training(tmp_path, caplog):
    keys, values = _entries()
    store = TensorStore(tmp_path, torch.float16, keep_free=2**60)
    for _ in range(2):
        store.add(keys, values)
        store.flush()
    assert store.read(keys) == (None, [0, 1, 2, 3, 4]) and not list(tmp_path.iterdir())
    assert caplog.text.count("no longer kept") == 1 and "GiB are free" in caplog.text
    store = _store(tmp_path)
    store.add(keys, values)
    with mock.patch("os.replace", side_effect=OSError(28, "No space left on device")):
        store.flush()
    assert not list(tmp_path.iterdir()) and "No space left" in caplog.text


def test_what_float16_cannot_hold_is_not_kept(tmp_path):
    keys, values = _entries()
    values = values.float()
    values[1, 0, 0], values[2, 0, 0] = 70_000.0, float("nan")
    store = _store(tmp_path)
    store.add(keys, values)
    assert store.read(keys)[1] == [1, 2]


def test_keys_follow_from_values_shape_and_dtype():
    tensor = torch.arange(6, dtype=torch.int32)
    others = (tensor.reshape(2, 3), tensor.long(), tensor.view(torch.float32), tensor.flip(0), tensor[:5])
    assert len({content_key(tensor), *map(content_key, others)}) == 6
    assert content_key(tensor.reshape(3, 2).T) == content_key(tensor.reshape(3, 2).T.contiguous())
    assert content_key(tensor, tensor) != content_key(tensor)


def test_shards_of_killed_writers_are_cleared_away(tmp_path, monkeypatch):
    (tmp_path / "0.safetensors.abc.part").write_bytes(b"half a shard")
    keys, values = _entries()
    # seconds; the second time, the fragment goes and a shard comes
    for abandoned, left in ((3600, 2), (-1, 2)):
        monkeypatch.setattr("kosmos_g_diffusers.training.cache_store.ABANDONED", abandoned)
        store = _store(tmp_path)
        store.add(keys, values)
        store.flush()
        assert len(list(tmp_path.iterdir())) == left
    assert not list(tmp_path.glob("*.part"))


def test_format_version_changes_the_folder(build_stage, tmp_path, monkeypatch):
    before = _folders(make_cache(tmp_path, build_stage("align")))
    monkeypatch.setattr(cache_module, "FORMAT_VERSION", 2)
    after = _folders(make_cache(tmp_path, build_stage("align")))
    assert not set(before.values()) & set(after.values())
