import PIL.Image
import torch

from kosmos_g_diffusers.testing import build_tiny_pipeline


def weights(pipe):
    return torch.cat(
        [value.flatten() for part in (pipe.text_encoder, pipe.unet, pipe.vae) for value in part.parameters()]
    )


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(3)
    first = weights(build_tiny_pipeline())
    torch.manual_seed(4)
    assert torch.equal(first, weights(build_tiny_pipeline()))
    assert not torch.equal(first, weights(build_tiny_pipeline(seed=1)))


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    build_tiny_pipeline()
    assert torch.equal(before, torch.get_rng_state())


def test_every_ascii_text_has_tokens():
    tokenizer = build_tiny_pipeline().tokenizer
    text = "".join(map(chr, range(32, 127)))
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert len(tokenizer("in the style of")["input_ids"]) == 5


@torch.no_grad()
def test_condition_depends_on_words_and_pictures():
    pipe = build_tiny_pipeline()
    pictures = [PIL.Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    prompts = [pipe.encode_prompt("<i> in a hat", images=[picture])[0] for picture in pictures]
    prompts += [pipe.encode_prompt(text)[0] for text in ("a hat", "a suit")]
    for i in range(4):
        for j in range(i):
            assert (prompts[i] - prompts[j]).std() > 0.01
