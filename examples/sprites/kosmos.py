"""Kosmos-G in small: a text encoder and tokenizer of the package's own classes, sized for sprites."""

import string

import torch
from base import MAX_WORDS, TEXT_WIDTH, WORDS

from kosmos_g_diffusers import KosmosGTextEncoder, KosmosGTextEncoderConfig, KosmosGTokenizer
from kosmos_g_diffusers.conversion.initial_weights import reset_weights
from kosmos_g_diffusers.sprites.source import SpriteSource
from kosmos_g_diffusers.sprites.world import IMAGE_SIZE

WIDTH = 192  # of the language model and the vision tower
QUERIES = 16  # states of a picture
MAX_TOKENS = 256


def build_tokenizer():
    """A piece a word of the captions, and every printable character for what else people type."""
    characters = ["▁", *string.digits, *string.ascii_letters, *string.punctuation]
    pieces = [(f"▁{word}", -2.0) for word in WORDS] + [(character, -9.0) for character in characters]
    return KosmosGTokenizer.from_vocabulary(
        pieces, image_size=IMAGE_SIZE, latent_query_num=QUERIES, model_max_length=MAX_TOKENS
    )


def build_text_encoder(tokenizer, seed=0):
    """An untrained encoder whose conditions have the length and width of the small CLIP's."""
    config = KosmosGTextEncoderConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "embed_dim": WIDTH,
            "layers": 4,
            "ffn_dim": 4 * WIDTH,
            "attention_heads": 4,
            "dropout": 0.0,  # so small a model cannot afford any
            "attention_dropout": 0.0,
        },
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
        },
        latent_query_num=QUERIES,
        aligner_hidden_size=TEXT_WIDTH,
        aligner_layers=3,
        aligner_attention_heads=4,
        aligner_ffn_dim=4 * TEXT_WIDTH,
        aligner_max_positions=2 + MAX_TOKENS,
        num_queries=MAX_WORDS,
        image_token_id=tokenizer.image_token_id,
        end_of_image_token_id=tokenizer.end_of_image_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the vision tower, which `reset_weights` leaves alone
        return reset_weights(KosmosGTextEncoder(config), seed)


def build_instruct_mixture():
    """Sources and weights of stage 3, as `MixtureDataset` takes them."""
    sources = [
        SpriteSource("compositions", entity_dropout=0.9),
        SpriteSource("edits"),
        SpriteSource("captions"),
    ]
    return {"sources": sources, "weights": [3, 3, 1]}
