"""Kosmos-G as a custom pipeline of diffusers, where this package is installed:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline="pipelines/kosmos_g.py", trust_remote_code=True
    )
    image = pipe("<i> in the suit of <i>", images=[dog, armour]).images[0]

diffusers runs this file and the code of the encoder and the tokenizer in the folder, so pass `trust_remote_code=True` for
folders that you trust. Where a folder brings the pipeline's code as well, as those of `save_pretrained` do, diffusers
prefers that code. `KosmosGPipeline.from_pretrained("path/or/repo")` needs no trust and takes all code from the package.
"""

from kosmos_g_diffusers import KosmosGPipeline  # diffusers takes the one pipeline class that it finds here

__all__ = ["KosmosGPipeline"]
