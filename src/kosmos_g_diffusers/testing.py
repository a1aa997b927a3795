"""Models of random weights, for tests: a Kosmos-G pipeline of toy size, a ControlNet for any U-Net."""

import string

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel

from .modeling_kosmos_g import KosmosGTextEncoder, KosmosGTextEncoderConfig
from .pipeline_kosmos_g import KosmosGPipeline
from .processing_kosmos_g import KosmosGTokenizer

WORDS = "a an and as by eating furniture hat in is made of on painting style suit the wearing with".split()
WIDTH = 32


def build_tiny_pipeline(seed: int = 0) -> KosmosGPipeline:
    """Build a `KosmosGPipeline` that reads 32 px images and draws 64 px images, in float32 on the CPU.

    Args:
        seed: of the weights. The same seed gives the same weights; torch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
        return _build()


def _build():
    tokenizer = _build_tokenizer()
    text_config = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "embed_dim": WIDTH,
        "layers": 2,
        "ffn_dim": 2 * WIDTH,
        "attention_heads": 4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    vision_config = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": tokenizer.image_size,
        "patch_size": 8,
    }
    config = KosmosGTextEncoderConfig(
        text_config=text_config,
        vision_config=vision_config,
        latent_query_num=tokenizer.latent_query_num,
        aligner_hidden_size=WIDTH,
        aligner_layers=2,
        aligner_attention_heads=4,
        aligner_ffn_dim=2 * WIDTH,
        aligner_max_positions=2 + tokenizer.model_max_length,  # the first two rows are never read
        image_token_id=tokenizer.image_token_id,
        end_of_image_token_id=tokenizer.end_of_image_token_id,
    )
    text_encoder = KosmosGTextEncoder(config).eval()
    for module in text_encoder.modules():
        if isinstance(module, torch.nn.Linear):
            # with Kosmos-2's initialisation, made for training, the condition of so shallow a model is the same for
            # every prompt, to five digits
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    # the noise schedule of Stable Diffusion 1.5
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return KosmosGPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _build_tokenizer():
    """Every printable ASCII character is a piece, and a few words are, so that prompts stay short."""
    characters = ["▁", *string.digits, *string.ascii_letters, *string.punctuation]
    pieces = [(f"▁{word}", -2.0) for word in WORDS] + [(character, -6.0) for character in characters]
    return KosmosGTokenizer.from_vocabulary(pieces, image_size=32, latent_query_num=4, model_max_length=256)


def build_random_controlnet(
    unet: UNet2DConditionModel, seed: int = 0, vae_scale_factor: int = 8
) -> ControlNetModel:
    """A ControlNet of random weights for a U-Net, to try things with; torch's random state is left as it was.

    Args:
        vae_scale_factor: pixels of a control image to a side of a latent, 4 or 8.
    """
    widths = (16, 32, 96, 256)[: vae_scale_factor.bit_length()]  # the control image is halved between them
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths).eval()
        with torch.no_grad():
            for parameter in controlnet.parameters():
                if not parameter.any():  # an untrained ControlNet adds nothing: its last layers are zeros
                    parameter.normal_(std=0.5)
    return controlnet
