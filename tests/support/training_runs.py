"""A stage, a source and a run of toy size for the tests of training."""

import json
import multiprocessing
import os
import random
import socket
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kosmos_g_diffusers.conversion.initial_weights import build_fresh
from kosmos_g_diffusers.conversion.target import MODEL_FOLDER, TOKENIZER_FOLDER
from kosmos_g_diffusers.data import BadSample, MixtureDataset, Sample, ShardWriter
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN
from kosmos_g_diffusers.testing import build_tiny_pipeline
from kosmos_g_diffusers.training import TrainConfig, checkpoints, run_stage

SETTINGS = {
    "steps": 8,
    "batch_size": 4,
    "lr": 0.01,
    "warmup_steps": 2,
    "workers": 0,
    "log_every": 1,
    "save_every": 3,
    "bucket_window": 1,
}


class ToySource:
    """Numbers as captions; those in `bad` cannot be read."""

    def __init__(self, size=50, bad=(), pause=0.0):
        self.name, self.groups, self.bad, self.pause = "toy", [size], set(bad), pause

    def __len__(self):
        return self.groups[0]

    def length(self, index):
        return 1

    def read(self, index, rng):
        time.sleep(self.pause)
        if index in self.bad:
            raise BadSample("row", f"toy:{index} is bad")
        return Sample(f"toy:{index}", (str(index),), None, str(index))


class StuckSource(ToySource):
    """A source that hangs after some samples, as one on a file system that has gone does."""

    def __init__(self, samples, folder):
        super().__init__()
        self.samples, self.read_samples, self.folder = samples, 0, folder

    def read(self, index, rng):
        self.read_samples += 1
        if self.read_samples > self.samples:
            (self.folder / "stuck").touch()
            time.sleep(600)
        return super().read(index, rng)


class ToyCollate:
    """(B, 6) inputs that follow from the caption and (B, 2) noise of the step."""

    def prepare(self, sample, generator):
        number = int(sample.caption)
        inputs = torch.randn(6, generator=torch.Generator().manual_seed(number))
        return {"inputs": inputs, "noise": torch.randn(2, generator=generator)}

    def __call__(self, rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class ToyStage(nn.Module):
    """Two layers with dropout that learn sums of their input; the first is frozen, as most of a real model is.

    Args:
        dropout: probability; with it a run depends on the random state.
        nan_at: number of the forward pass whose loss is NaN.
    """

    def __init__(self, dropout=0.2, nan_at=None, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.frozen = nn.Linear(6, 8).requires_grad_(False)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.dropout, self.nan_at, self.scale, self.passes = nn.Dropout(dropout), nan_at, scale, 0

    def move_frozen(self, device=None, dtype=None):
        return self

    def gradient_checkpointing_enable(self):
        pass

    def forward(self, batch):
        self.passes += 1
        states = self.dropout(torch.tanh(self.hidden(self.frozen(batch["inputs"]))))
        target = batch["inputs"][:, :2] + 0.1 * batch["noise"]
        loss = self.scale * (self.head(states).float() - target).square().mean()
        if self.passes == self.nan_at:
            loss = loss * float("nan")
        return {"square": loss, "size": 1e-3 * states.float().square().mean()}

    def save_pretrained(self, folder, state_dict=None):
        state_dict = self.state_dict() if state_dict is None else state_dict
        save_file(
            {name: tensor.contiguous() for name, tensor in state_dict.items()}, folder / "toy.safetensors"
        )


def settings(output, **changes):
    return TrainConfig(output=str(output), **{**SETTINGS, **changes})


def dataset(config, process_index=0, num_processes=1, source=None):
    return MixtureDataset(
        [source or ToySource()],
        ToyCollate(),
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=process_index,
        num_processes=num_processes,
        bucket_window=config.bucket_window,
    )


def weights(checkpoint):
    """Everything that a checkpoint of the toy holds in tensors: weights, optimizer, schedule, random states."""
    state = dict(load_file(checkpoint / "toy.safetensors"))
    state |= {
        f"trained.{name}": t
        for name, t in load_file(checkpoint / "training_state/trained.safetensors").items()
    }
    optimizer = torch.load(checkpoint / "training_state/optimizer.bin", weights_only=True)
    for number, moments in optimizer["state"].items():
        state |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
    return state


def random_numbers():
    """The next number of each of the three generators that training may draw from."""
    return torch.rand(()).item(), random.random(), np.random.rand()


# A model folder and data of toy size ------------------------------------------------------------------------------


def save_clip(folder, width=32, positions=77, names=("text_encoder", "tokenizer")):
    """A CLIP text encoder and its tokenizer, by transformers' own classes."""
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(vocabulary)}, merges=[], model_max_length=positions
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=positions,
                bos_token_id=len(vocabulary) - 2,
                eos_token_id=len(vocabulary) - 1,
            )
        )
    model.save_pretrained(folder / names[0])
    tokenizer.save_pretrained(folder / names[1])


def save_model(folder):
    """A pipeline folder as `kosmos-g init` writes it, of the package's tiny pipeline."""
    pipe = build_tiny_pipeline()
    pipe.save_pretrained(folder)
    build_fresh(AlignerNetN, pipe.text_encoder.config, 1).save_pretrained(folder / "aligner_n")
    save_clip(folder, names=(MODEL_FOLDER, TOKENIZER_FOLDER))
    return folder


def save_data(folder, size=60):
    """WebDataset shards of captions, edits and compositions, 32 px images of plain colours."""
    rng = np.random.default_rng(0)
    words = ("red", "green", "blue", "a hat", "the suit of painting")

    def image():
        return PIL.Image.new("RGB", (32, 32), tuple(int(value) for value in rng.integers(0, 256, 3)))

    with ShardWriter(folder, samples_per_shard=20) as writer:
        for number in range(size):
            key, caption = f"{number:04d}", f"{words[number % 5]} {words[number % 3]}"
            if number % 3 == 0:
                writer.write_caption(key, caption, image())
            elif number % 3 == 1:
                pair = (image(), image())
                writer.write_edit(key, "made of furniture", [pair], words=caption, caption=caption)
            else:
                entity = (words[number % 5], image(), image())
                writer.write_composition(key, caption, image(), [entity])
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    """accelerate keeps the precision of the first run of a process; and a busy disk is slow to sync."""
    monkeypatch.setattr(checkpoints, "_sync", lambda path: None)
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_config(model, data, tmp_path, monkeypatch):
    """Function that makes the settings of a short run of a stage into `tmp_path / output`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(stage, output="run", **changes):
        values = {
            "model": str(model),
            "data": [f"shards:{data}"],
            "output": str(tmp_path / output),
            "steps": 3,
            "batch_size": 3,
            "warmup_steps": 1,
            "workers": 0,
            "log_every": 1,
        }
        return TrainConfig.from_dict({**values, **changes}, stage)

    return make


def train_stage(config, **kwargs):
    return run_stage(config.stage, config, progress_bar=False, **kwargs)


def trained_weights(checkpoint):
    return load_file(checkpoint / "training_state" / "trained.safetensors")


def read_log(output):
    return [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]


# Processes -------------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")  # children have torch loaded: a start costs nothing


def run_processes(function, *arguments, environment=(), timeout=300):
    """Call a function in two processes that form a gloo group; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        FORK.Process(target=_in_group, args=(index, port, dict(environment), function, arguments))
        for index in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout)
        child.kill()
    return [child.exitcode for child in children]


def _in_group(index, port, environment, function, arguments):
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    } | environment
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    function(*arguments)
    PartialState().destroy_process_group()
