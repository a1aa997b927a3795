"""What several test files of evaluation share: commands called in this process, small data, scorers of tiny size."""

import argparse
import io
import os
import re
import signal
import traceback

import numpy as np
import PIL.Image
import PIL.ImageChops
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

from kosmos_g_diffusers.commands import compare, evaluate
from kosmos_g_diffusers.evaluation.benchmarks import dreambench

NUMBER, DIGEST = re.compile(r"(-?\d+\.\d+)"), re.compile(r"[0-9a-f]{64}")
SUBJECTS = ("backpack", "can", "cat")
MINIATURE = ["--subjects", ",".join(SUBJECTS), "--prompts", "0,20", "--device", "cpu", "--steps", "2"]


def call(command, *arguments):
    """Run `kosmos-g COMMAND` in this process; its errors are raised."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


def run_evaluate(*arguments):
    call(evaluate, *arguments)


def run_compare(*arguments):
    call(compare, *arguments)


def draw_image(seed, size=40):
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(colours).resize((size, size), PIL.Image.Resampling.BICUBIC)


def make_dreambench(folder):
    """A data folder like DreamBench's: three subjects of three images each."""
    for number, subject in enumerate(SUBJECTS):
        (folder / subject).mkdir(parents=True)
        for name in ("00.jpg", "01.jpg", dreambench.SUBJECTS[subject].image):
            draw_image(10 * number + int(name[:2])).save(folder / subject / name)
    return folder


def save_scorers(folder):
    """DINO and CLIP of tiny size with random weights; returns the flags that name them."""
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    seen = {"image_size": 32, "patch_size": 8}
    text = {
        "vocab_size": len(vocabulary),
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        ViTModel(ViTConfig(**sizes, **seen)).save_pretrained(folder / "dino")
        config = CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **seen}, projection_dim=16)
        CLIPModel(config).save_pretrained(folder / "clip")
    pieces = {piece: number for number, piece in enumerate(vocabulary)}
    CLIPTokenizer(vocab=pieces, merges=[], model_max_length=77).save_pretrained(folder / "clip")
    return ["--scorer", f"dino={folder / 'dino'}", "--scorer", f"clip={folder / 'clip'}"]


def files_of(folder, *parts):
    """Path from `folder` -> bytes of all files below some of its parts."""
    found = {}
    for part in parts:
        path = folder / part
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


def assert_same_files(found, expected):
    """Results of `files_of` that were made in two processes.

    On some CPUs a product depends on where in memory its factors lie: a level of a pixel and the last digits of a score may
    differ there. Names, texts and everything else may not.
    """
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        if found[name] == content:
            continue
        if name.endswith(".png"):
            first, second = (PIL.Image.open(io.BytesIO(data)) for data in (found[name], content))
            assert first.info == second.info, name
            difference = PIL.ImageChops.difference(first, second)
            assert max(high for _, high in difference.getextrema()) <= (1 if "images/" in name else 255), name
        else:
            first, second = (
                NUMBER.split(DIGEST.sub("digest", data.decode())) for data in (found[name], content)
            )
            assert first[::2] == second[::2], name
            assert [float(n) for n in first[1::2]] == pytest.approx(
                [float(n) for n in second[1::2]], abs=2e-3
            ), name


def run_in_child(function):
    """Call `function` in a copy of this process; returns the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()  # the test that expected a signal fails, and says why
        finally:
            os._exit(0)  # nothing of the test runner's may run here
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at_call(module, name, number):
    """Make a function of `module` end the process, as a kill would, when it is called for the number-th time."""
    original, calls = getattr(module, name), []

    def call_or_die(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, call_or_die)
