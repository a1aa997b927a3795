"""Animate what a photo shows, with diffusers' own AnimateDiff pipeline:

    python examples/animate.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/animate.py --model ./kosmos-g
"""

import torch
from common import CAT, parse_arguments, save
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from PIL import Image

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
if arguments.tiny:
    pipe = build_tiny_pipeline()
else:
    pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe.to(arguments.device)
pipe.add_image_word("<my-cat>", Image.open(CAT))  # a word that this stock pipeline understands as well

if arguments.tiny:
    torch.manual_seed(0)  # of its random weights
    adapter = MotionAdapter(
        block_out_channels=pipe.unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
    )
else:
    adapter = MotionAdapter.from_pretrained(
        "guoyww/animatediff-motion-adapter-v1-5-2", torch_dtype=arguments.dtype
    )
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
    num_inference_steps=arguments.steps,
    guidance_scale=6.0,
    generator=torch.Generator("cpu").manual_seed(0),
).frames[0]

save(frames, "animate.gif", arguments)
