"""What the tests of composition share: pipelines from the components of another, and pictures to compare."""

import re

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


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


def write_ip_adapter(folder, unet):
    """Folder of an IP-Adapter with random weights, laid out as h94/IP-Adapter on the Hub."""
    torch.manual_seed(0)
    width, n_tokens = unet.config.cross_attention_dim, 4
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    )
    encoder.save_pretrained(folder / "models" / "image_encoder")
    weights = {
        "image_proj.proj.weight": torch.randn(n_tokens * width, 16) / 4,
        "image_proj.proj.bias": torch.zeros(n_tokens * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(names):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for part in ("k", "v"):
            shape = attention.get_submodule(f"to_{part}").weight.shape
            weights[f"ip_adapter.{2 * index + 1}.to_{part}_ip.weight"] = torch.randn(shape) / 4
    save_file(weights, folder / "models" / "ip-adapter_sd15.safetensors")
    return {
        "pretrained_model_name_or_path_or_dict": str(folder),
        "subfolder": "models",
        "weight_name": "ip-adapter_sd15.safetensors",
    }
