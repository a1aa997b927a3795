"""What the three stages minimise, as functions of tensors.

Letters of the shapes: B samples, L tokens (padding included), D width of the language model, V size of the vocabulary,
K states of the condition (77), A their width (768), C, H, W of latents. All losses are computed and returned in float32.
"""

from torch.nn import functional as F


def language_loss(hidden_states, embedding, labels, n_labels=None):
    """Cross-entropy of the next token (stage 1, sec. 2.1 of the Kosmos-G paper).

    Only the states that predict something are multiplied with the vocabulary: logits of picture slots and padding would
    be most of the memory.

    Args:
        hidden_states: (B, L, D), the language model's final states.
        embedding: (V, D), the token embedding, which is the language model's head as well.
        labels: (B, L) int64, the token that follows each position (already shifted); -100 where nothing is predicted.
        n_labels: number to divide the sum by; None takes the number of labels, so that the loss is their mean.

    Returns:
        Scalar; 0 when there is no label.
    """
    predicts = labels.ne(-100)
    logits = F.linear(hidden_states[predicts], embedding)
    total = F.cross_entropy(logits.float(), labels[predicts], reduction="sum")
    return total / (predicts.sum().clamp(min=1) if n_labels is None else n_labels)


def align_losses(condition, clip_embeds, reconstruction, hidden_states):
    """Distance to CLIP's states and of the way back (stage 2, sec. 2.2; unilm/models/aligner.py:56, :66).

    Args:
        condition: (B, K, A), of AlignerNet M.
        clip_embeds: (B, K, A), the target text encoder's last hidden states.
        reconstruction: (B, L, D), of AlignerNet N.
        hidden_states: (B, L, D), the language model's states. Padded columns count, as in the official code.

    Returns:
        dict of the scalars `mse` and `rec`, to be added.
    """
    # the official factor 77 / L: a long prompt has to go through as few states as a short one
    ratio = condition.shape[1] / hidden_states.shape[1]
    return {
        "mse": F.mse_loss(condition.float(), clip_embeds.float()),
        "rec": F.mse_loss(reconstruction.float(), hidden_states.float()) * ratio,
    }


def denoising_loss(prediction, target):
    """The U-Net's own loss (stage 3, sec. 2.3; diffusion.py:64-84 of the official code).

    Args:
        prediction, target: (B, C, H, W), the noise or the velocity.

    Returns:
        Scalar, the mean over samples of the mean over each (the official code adds the samples and divides by their
        number later).
    """
    return F.mse_loss(prediction.float(), target.float())
