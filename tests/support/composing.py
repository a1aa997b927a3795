"""What the tests of composition share: pipelines from the components of another, and pictures to compare."""

import re

import numpy as np
import torch


def borrow(cls, pipe, **parts):
    """A pipeline of `cls` with the components of `pipe`, as docs/composition.md says to make one."""
    other = cls.from_pipe(pipe, dtype=pipe.dtype, **parts)
    other.set_progress_bar_config(disable=True)
    return other


def generate(pipe, prompt, **arguments):
    """Three steps from the same noise; the size is the pipeline's, or that of the pictures it is given."""
    settings = {
        "num_inference_steps": 3,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    }
    return np.asarray(pipe(prompt, **settings | arguments)[0])


def assert_all_differ(*images):
    for index, image in enumerate(images):
        assert np.isfinite(image).all() and image.shape == images[0].shape
        for other in images[:index]:
            difference = np.abs(image - other).max()
            assert difference > 1e-3


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def name_in_a_single_file(name, layers_per_block=1):
    """Name of a U-Net weight in the layout of the original Stable Diffusion, in which fine-tunes are shared."""
    module, _, kind = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    block, index, part, layer, rest = re.fullmatch(
        r"(down_blocks|mid_block|up_blocks)\.?(\d*)\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    layer = int(layer)
    if part == "resnets":
        head, _, tail = rest.partition(".")
        rest = f"{RESNET[head]}.{tail}"
    if block == "mid_block":
        return f"middle_block.{2 * layer if part == 'resnets' else 1}.{rest}"
    if block == "down_blocks":
        first = 1 + int(index) * (layers_per_block + 1)
        if part == "downsamplers":
            return f"input_blocks.{first + layers_per_block}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{first + layer}.{0 if part == 'resnets' else 1}.{rest}"
    first = int(index) * (layers_per_block + 1)
    if part == "upsamplers":
        # behind the last resnet of its block, and behind its attention if there is one
        return f"output_blocks.{first + layers_per_block}.1.{rest}"
    return f"output_blocks.{first + layer}.{0 if part == 'resnets' else 1}.{rest}"
