"""The three models that make compositions, of toy size with random weights, saved as released ones are."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

WORDS = "a dog cat sofa hat tree on the red and in of with , . : caption none".split()
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} : {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


def save_models(folder, seed=0):
    """Save a BLIP-2, a Llama with a chat template, and a CLIPSeg; returns their folders, by the names of the settings."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        savers = {
            "model_caption": save_captioner,
            "model_entities": save_language_model,
            "model_segment": save_clipseg,
        }
        return {name: save(folder / name) for name, save in savers.items()}


def build_tokenizer(**options):
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        **{"model_max_length": 77} | options,
    )


def save_captioner(folder):
    tokenizer = build_tokenizer()
    text_config = {
        "model_type": "opt",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision_config = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    qformer_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 16,
    }
    config = Blip2Config(
        vision_config=vision_config,
        qformer_config=qformer_config,
        text_config=text_config,
        num_query_tokens=4,
        image_token_index=4,
    )
    model = Blip2ForConditionalGeneration(config)
    enlarge(model)
    model.save_pretrained(folder)
    image_processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    Blip2Processor(image_processor, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return str(folder)


def save_language_model(folder, chat_template=CHAT_TEMPLATE):
    tokenizer = build_tokenizer(chat_template=chat_template, model_max_length=1024)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    enlarge(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_clipseg(folder):
    tokenizer = build_tokenizer()
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision_config = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
    }
    config = CLIPSegConfig(
        text_config=text_config,
        vision_config=vision_config,
        projection_dim=16,
        reduce_dim=16,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    model = CLIPSegForImageSegmentation(config)
    enlarge(model)
    model.save_pretrained(folder)
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    CLIPSegProcessor(image_processor, tokenizer).save_pretrained(folder)
    return str(folder)


def enlarge(model):
    """Weights that differ enough for another image or word to give another answer."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.5)
