"""Animate what a photo shows, with diffusers' own AnimateDiff pipeline:

python examples/animate.py --tiny
python examples/animate.py --model ./kosmos-g
"""

import torch
from common import CAT, parse_arguments, save
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from PIL import Image

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
pipe = build_tiny_pipeline() if arguments.tiny else KosmosGPipeline.from_pretrained(arguments.model)
pipe.to(arguments.device, arguments.dtype)
pipe.add_image_word("<my-cat>", Image.open(CAT))  # a word that this stock pipeline understands as well

if arguments.tiny:
    adapter = MotionAdapter(
        block_out_channels=pipe.unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
    )
else:
    adapter = MotionAdapter.from_pretrained("guoyww/animatediff-motion-adapter-v1-5-2")
animate = AnimateDiffPipeline.from_pipe(
    pipe,
    motion_adapter=adapter,
    # the noise schedule that the motion adapter was trained with
    scheduler=DDIMScheduler.from_config(
        pipe.scheduler.config, beta_schedule="linear", timestep_spacing="linspace", clip_sample=False
    ),
    torch_dtype=pipe.dtype,
)
animate.to(arguments.device)

frames = animate(
    "<my-cat> running",
    num_frames=16,
    num_inference_steps=25,
    guidance_scale=6.0,
    generator=torch.Generator("cpu").manual_seed(0),
).frames[0]

save(frames, "animate.gif", arguments)
