"""Models of Stable Diffusion 1.5's family with few layers and random weights, in the files that ComfyUI loads.

Run by ComfyUI's Python in its folder: python comfyui_models.py ROOT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, ".")
import comfy.options  # noqa: E402

sys.argv, root = [*sys.argv[:1], "--cpu"], Path(sys.argv[1])
comfy.options.enable_args_parsing()

import comfy.cldm.cldm  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.utils  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

# of ComfyUI's U-Net: one layer at each of two levels, attention at the first
LEVELS = {
    **{"num_res_blocks": [1, 1], "channel_mult": [1, 1], "transformer_depth": [1, 0]},
    **{"transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1},
}


def randomize(module):
    """No zeros, which an untrained ControlNet ends in."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module


def save(tensors, *place):
    path = root.joinpath("models", *place)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def main():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(320, 320),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    randomize(unet).save_pretrained(root / "unet")
    names = comfy.utils.unet_to_diffusers(LEVELS)
    checkpoint = {f"model.diffusion_model.{names[name]}": value for name, value in unet.state_dict().items()}
    vae = randomize(
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    )
    checkpoint |= {f"first_stage_model.{name}": value.half() for name, value in vae.state_dict().items()}
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    for name, value in clip.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        checkpoint[f"cond_stage_model.transformer.{name}"] = value.half()
    save(checkpoint, "checkpoints", "v1-5-pruned-emaonly-fp16.safetensors")
    control = comfy.cldm.cldm.ControlNet(
        image_size=32,
        in_channels=4,
        hint_channels=3,
        model_channels=320,
        num_heads=8,
        context_dim=768,
        use_spatial_transformer=True,
        operations=comfy.ops.disable_weight_init,
        **{name: value for name, value in LEVELS.items() if name != "transformer_depth_output"},
    )
    save(
        {f"control_model.{name}": value for name, value in randomize(control).state_dict().items()},
        "controlnet",
        "control_v11p_sd15_canny_fp16.safetensors",
    )
    lora = {}
    for kind in ("to_k", "to_v"):
        module = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_{kind}"
        lora |= {
            f"{module}.lora_up.weight": torch.randn(320, 4),
            f"{module}.lora_down.weight": torch.randn(4, 768),
        }
        lora[f"{module}.alpha"] = torch.tensor(0.1)
    save(lora, "loras", "your_lora.safetensors")


main()
