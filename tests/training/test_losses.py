import pytest
import torch
from torch.nn import functional as F

from kosmos_g_diffusers.training.stages import align_losses, denoising_loss, language_loss


def _normal(*shape, seed=0, **kwargs):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


@pytest.fixture
def predicted():
    """Hidden states, embedding and labels of two sequences; the first begins with an image and the second is padded."""
    labels = torch.tensor([[-100, -100, 4, 0], [3, 2, -100, -100]])
    return _normal(2, 4, 8), _normal(5, 8, seed=1), labels


def test_language_loss_is_the_mean_cross_entropy_of_what_has_a_label(predicted):
    states, embedding, labels = predicted
    logits = states @ embedding.T
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(language_loss(states, embedding, labels), expected, atol=1e-6)


def test_language_losses_of_halves_add_up_to_that_of_the_whole(predicted):
    states, embedding, labels = predicted
    labels[1, 1] = -100  # the halves have 2 labels and 1
    whole = language_loss(states, embedding, labels)
    halves = [language_loss(states[i : i + 1], embedding, labels[i : i + 1], n_labels=3) for i in range(2)]
    assert torch.allclose(sum(halves), whole, atol=1e-6)


def test_language_loss_without_labels_is_zero_and_has_a_gradient(predicted):
    states, embedding, labels = predicted
    loss = language_loss(states.requires_grad_(), embedding, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and not states.grad.any()


def test_align_losses_count_padded_columns_and_weigh_by_states_over_tokens():
    condition, clip_embeds = _normal(2, 6, 4), _normal(2, 6, 4, seed=1)
    reconstruction, states = _normal(2, 3, 8, seed=2), _normal(2, 3, 8, seed=3)
    losses = align_losses(condition, clip_embeds, reconstruction, states)
    assert torch.allclose(losses["mse"], (condition - clip_embeds).square().sum() / (2 * 6 * 4))
    assert torch.allclose(losses["rec"], (reconstruction - states).square().sum() / (2 * 3 * 8) * 6 / 3)


def test_losses_of_half_precision_are_computed_in_float32():
    half = {"dtype": torch.bfloat16}
    a, b = _normal(2, 6, 4, **half), _normal(2, 6, 4, seed=1, **half)
    expected = (a.float() - b.float()).square().mean()
    assert torch.equal(denoising_loss(a, b), expected)
    assert torch.equal(align_losses(a, b, a, b)["mse"], expected)
    labels = torch.zeros(2, 6, dtype=torch.int64)
    assert language_loss(a, b[0], labels).dtype == torch.float32


def test_denoising_loss_is_the_mean_over_samples():
    prediction, target = _normal(3, 4, 2, 2), _normal(3, 4, 2, 2, seed=1)
    each = (prediction - target).square().flatten(1).mean(1)
    assert torch.allclose(denoising_loss(prediction, target), each.sum() / 3)
