"""The three training stages of the Kosmos-G paper as modules: what trains, and from a batch to the losses (sec. 2).

`stage(batch)` returns a dict of float32 scalars whose sum is minimised. A stage registers only what belongs to a
checkpoint, the encoder and AlignerNet N. Frozen models of another kind (`stage.unet`, `.vae`, `.target`) it merely holds, so
that optimisers, DDP and FSDP do not see them: move them with `move_frozen`.

Letters of the shapes: B samples, L tokens, N images of the whole batch, S their size, T tokens and W width of the vision
tower, Q states an image, D width of the language model, K states of the condition, A their width, P positions of the
target text encoder, H, W and h, w sizes of target images and of their latents, C channels, V size of the vocabulary. All
losses are computed and returned in float32.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
    from transformers import CLIPTextModel

    from ..modeling_aligner_n import AlignerNetN
    from ..modeling_kosmos_g import KosmosGTextEncoder

Batch = Mapping[str, Any]  # of tensors, see each stage's `forward`


class Stage(nn.Module):
    """What the stages share.

    Every step uses every trained weight, whatever the batch holds. So all processes of a distributed run call the same
    modules in the same order (DDP would complain, FSDP hang), and the optimiser treats all weights alike.

    Args:
        text_encoder: KosmosGTextEncoder, float32. All of it is frozen but what the stage trains.
        trained: modules of the encoder that train, besides the vision tower.
        train_vision: "none", "last" (the last block and the norm after it, as in the official stage 3) or "all".
        frozen: models by the names of the attributes that hold them, unregistered; `frozen_models` has them all.

    Raises:
        ValueError: `train_vision` is none of these.
    """

    text_encoder: "KosmosGTextEncoder"
    train_vision: str
    frozen_models: tuple[nn.Module, ...]

    def __init__(
        self,
        text_encoder: "KosmosGTextEncoder",
        trained: Sequence[nn.Module],
        train_vision: str,
        **frozen: nn.Module,
    ):
        super().__init__()
        vision = text_encoder.vision_model.model
        choices = {"none": [], "last": [vision.encoder.layers[-1], vision.post_layernorm], "all": [vision]}
        if train_vision not in choices:
            raise ValueError(f"train_vision is {train_vision!r}. Expected {', '.join(map(repr, choices))}.")
        text_encoder.requires_grad_(False)
        for module in (*trained, *choices[train_vision]):
            module.requires_grad_(True)
        self.text_encoder = text_encoder
        self.train_vision = train_vision
        self.frozen_models = tuple(model.requires_grad_(False).eval() for model in frozen.values())
        self.__dict__.update(frozen)  # past nn.Module, which would register them

    @property
    def _no_split_modules(self):
        """The layers that FSDP shards one by one; accelerate looks for their names here."""
        return self.text_encoder._no_split_modules

    def move_frozen(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the models that are held; half precision will do, as they do not change. Returns the stage."""
        for model in self.frozen_models:
            model.to(device=device, dtype=dtype)
        return self

    def gradient_checkpointing_enable(self) -> None:
        """Recompute layers in the backward pass instead of keeping what they computed (the U-Net's blocks, too)."""
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write `folder/text_encoder`, as `KosmosGTextEncoder.from_pretrained` reads it.

        Args:
            state_dict: weights to write instead of the stage's own, under the names of `self.state_dict()`: averaged
                ones, or what was gathered from shards.
        """
        weights = _weights_of("text_encoder", state_dict)
        self.text_encoder.save_pretrained(Path(folder) / "text_encoder", state_dict=weights)

    # Parts of the encoder's forward pass -------------------------------------------------------------------------

    def vision_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) pixels -> (N, T, W), the states that enter the last block of the vision tower.

        Unless train_vision is "all" these never change, so that a batch may bring them along as `vision_states`.
        """
        vision = self.text_encoder.vision_model.model
        states = vision.pre_layrnorm(vision.embeddings(pixel_values))
        for layer in vision.encoder.layers[:-1]:
            states = layer(states, None)
        return states

    def image_embeds(self, batch: Batch) -> torch.Tensor | None:
        """Images of a batch -> (N, Q, D), as `KosmosGTextEncoder.get_image_features`; None if there are none."""
        encoder, states = self.text_encoder, batch.get("vision_states")
        if states is not None:
            if self.train_vision == "all":
                raise ValueError(
                    "The batch holds vision_states, which were computed once, but train_vision='all' changes the blocks "
                    "they come from. Pass pixel_values (no cache of the vision tower), or train_vision='last'."
                )
            states = states.to(encoder.dtype)
        else:
            pixel_values = batch.get("pixel_values")
            if pixel_values is None:
                if not encoder.image_to_text_projection.latent_query.requires_grad:
                    return None
                # an image that no slot takes: its gradients are zero, and all weights are used
                size = encoder.config.vision_config.image_size
                pixel_values = torch.zeros(1, 3, size, size, device=batch["input_ids"].device)
            states = self.vision_states(pixel_values.to(encoder.dtype))
        vision = encoder.vision_model.model
        states = vision.encoder.layers[-1](states, None)
        states = F.normalize(vision.post_layernorm(states), dim=-1)
        return encoder.image_to_text_projection(states)[0]

    def _language_states(self, batch):
        """(B, L, D), the language model's states for the prompts of a batch."""
        encoder, input_ids = self.text_encoder, batch["input_ids"]
        config = encoder.config
        longest = min(config.text_config.max_position_embeddings, config.aligner_max_positions - 2)
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"A batch of prompts of {input_ids.shape[1]} tokens was given; the model reads at most {longest}. Leave "
                "out longer prompts, or train a model with more positions."
            )
        slots = batch.get("image_token_mask")
        slots = torch.zeros_like(input_ids, dtype=torch.bool) if slots is None else slots.bool()
        images = batch.get("vision_states", batch.get("pixel_values"))
        n_slots, n_images = int(slots.sum()), 0 if images is None else len(images)
        if n_slots != n_images * config.latent_query_num:
            raise ValueError(
                f"image_token_mask marks {n_slots} slots, but the batch holds {n_images} images of "
                f"{config.latent_query_num} states each. Make both with one call of KosmosGProcessor."
            )
        return encoder.get_language_hidden_states(input_ids, self.image_embeds(batch), slots)

    def _language_loss(self, language_states, batch):
        """(B, L, D) -> scalar; the head is the embedding."""
        embedding = self.text_encoder.get_input_embeddings().weight
        return language_loss(language_states, embedding, batch["labels"], batch.get("n_labels"))

    def _condition(self, language_states, attention_mask):
        """(B, L, D) and (B, L) -> (B, K, A), through AlignerNet M."""
        aligner = self.text_encoder.aligner
        mask = None if attention_mask.all() else attention_mask.bool()
        return aligner.final_layer_norm(aligner(language_states, mask)[-1])


class PretrainStage(Stage):
    """Stage 1, multimodal language modelling: the next token after words and images (sec. 2.1).

    Trains the language model (its head is its embedding), the resampler and, as far as `train_vision` says, the vision
    tower; the AlignerNet stays as it is. A model that starts from nothing needs train_vision="all".

    Args:
        text_encoder: KosmosGTextEncoder.
        train_vision: see `Stage`.
    """

    def __init__(self, text_encoder: "KosmosGTextEncoder", train_vision: str = "last"):
        trained = [text_encoder.language_model, text_encoder.image_to_text_projection]
        super().__init__(text_encoder, trained, train_vision)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Args:
            batch: dict with `input_ids` (B, L); `labels` (B, L), the token after each position, -100 where none is to
                be predicted; `image_token_mask` (B, L) and `pixel_values` (N, 3, S, S) or `vision_states` (N, T, W),
                if there are images; `n_labels`, what the sum is divided by instead of the number of labels (so that
                processes and accumulated batches with different numbers can give the mean of them all).

        Returns:
            dict of `language`, a scalar.
        """
        return {"language": self._language_loss(self._language_states(batch), batch)}


class AlignStage(Stage):
    """Stage 2, alignment: AlignerNet M's condition becomes what the decoder's own text encoder says (sec. 2.2).

    Trains AlignerNet M and N. The language model is frozen; its dropout works in training mode, as in the official code.
    Captions need no images; with FSDP a step's batches have some on all processes or on none.

    Args:
        text_encoder: KosmosGTextEncoder.
        aligner_n: AlignerNetN of the same sizes.
        target_text_encoder: CLIPTextModel of the Stable Diffusion that will draw. Its width and positions are the
            condition's.

    Raises:
        ValueError: the target has another width or number of states than the encoder.
    """

    aligner_n: "AlignerNetN"

    def __init__(
        self,
        text_encoder: "KosmosGTextEncoder",
        aligner_n: "AlignerNetN",
        target_text_encoder: "CLIPTextModel",
    ):
        config, target = text_encoder.config, target_text_encoder.config
        given = (config.num_queries, config.aligner_hidden_size)
        expected = (target.max_position_embeddings, target.hidden_size)
        if given != expected:
            raise ValueError(
                f"The AlignerNet gives {given[0]} states of width {given[1]} (num_queries, aligner_hidden_size); the "
                f"target text encoder has {expected[0]} of width {expected[1]}. Start from an encoder whose "
                "configuration has the target's figures: kosmos-g init with this Stable Diffusion as --base makes one."
            )
        super().__init__(text_encoder, [text_encoder.aligner], "none", target=target_text_encoder)
        self.aligner_n = aligner_n.requires_grad_(True)

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """As `Stage.save_pretrained`, and `folder/aligner_n` for `AlignerNetN.from_pretrained`."""
        super().save_pretrained(folder, state_dict)
        self.aligner_n.save_pretrained(Path(folder) / "aligner_n", _weights_of("aligner_n", state_dict))

    @torch.no_grad()
    def clip_embeds(
        self, clip_input_ids: torch.Tensor, clip_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, P) ids, and mask for targets that use one -> (B, P, A), the target's last states."""
        with _own_precision(clip_input_ids):
            return self.target(clip_input_ids, attention_mask=clip_attention_mask)[0].float()

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Args:
            batch: dict with `input_ids`, `attention_mask` (B, L) and images as for `PretrainStage`; `clip_input_ids`
                (B, P), padded to the full length, and `clip_attention_mask` if the target uses one, or `clip_embeds`
                (B, P, A), which were computed once.

        Returns:
            dict of `mse` and `rec`, scalars.
        """
        with torch.no_grad():
            language_states = self._language_states(batch)
        condition = self._condition(language_states, batch["attention_mask"])
        clip_embeds = batch.get("clip_embeds")
        if clip_embeds is None:
            clip_embeds = self.clip_embeds(batch["clip_input_ids"], batch.get("clip_attention_mask"))
        reconstruction = self.aligner_n(condition, language_states.shape[1])
        return align_losses(condition, clip_embeds, reconstruction, language_states)


class InstructStage(Stage):
    """Stage 3, instruction tuning: the frozen U-Net says how good the condition is (score distillation, sec. 2.3).

    Trains AlignerNet M, the language model with its embedding, the resampler and the end of the vision tower. That spoils
    what the language model says; batches of stage 1 among the others keep it (not in the paper).

    Args:
        text_encoder: KosmosGTextEncoder.
        unet, vae: of the Stable Diffusion that draws; frozen. Gradients go through the U-Net to the condition.
        scheduler: any of diffusers' whose configuration says how noise is added and what the U-Net predicts.
        train_vision: see `Stage`.
        words_weight: factor of the loss of stage 1's batches. Well-trained words have far larger gradients than
            images; unweighted, these are hardly learned next to them.

    Raises:
        ValueError: a U-Net that reads another condition or other latents, or predicts neither noise nor velocity.
    """

    noise_scheduler: DDPMScheduler
    words_weight: float

    def __init__(
        self,
        text_encoder: "KosmosGTextEncoder",
        unet: "UNet2DConditionModel",
        vae: "AutoencoderKL",
        scheduler: "SchedulerMixin",
        train_vision: str = "last",
        words_weight: float = 0.1,
    ):
        width, read = text_encoder.config.aligner_hidden_size, unet.config.cross_attention_dim
        if width != read:
            raise ValueError(
                f"The encoder's conditions have width {width} (aligner_hidden_size), the U-Net reads width {read} "
                "(cross_attention_dim). Pass the U-Net the encoder was aligned to, or align it to this one's text encoder."
            )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"The U-Net reads {unet.config.in_channels} channels, the VAE's latents have "
                f"{vae.config.latent_channels}. Pass a text-to-image U-Net; inpainting ones read more than latents."
            )
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"The scheduler's prediction_type is {scheduler.config.prediction_type!r}. Pass one of a U-Net that "
                "predicts 'epsilon' or 'v_prediction'."
            )
        trained = [text_encoder.aligner, text_encoder.language_model, text_encoder.image_to_text_projection]
        super().__init__(text_encoder, trained, train_vision, unet=unet, vae=vae)
        # the schedulers that draw add noise in ways of their own; this one knows the training's
        self.noise_scheduler = DDPMScheduler.from_config(scheduler.config)
        self.words_weight = words_weight

    def gradient_checkpointing_enable(self) -> None:
        super().gradient_checkpointing_enable()
        self.unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def latent_parameters(self, target_pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 8, h, w), mean and log-variance of the VAE's latents, float32."""
        with _own_precision(target_pixel_values):
            return self.vae.encode(target_pixel_values.to(self.vae.dtype)).latent_dist.parameters.float()

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Args:
            batch: dict with `input_ids`, `attention_mask` (B, L) and images as for `PretrainStage`;
                `target_pixel_values` (B, 3, H, W) in [-1, 1], or `latent_parameters` (B, 8, h, w), which were computed
                once; the random numbers of the step: `latent_noise` (B, 4, h, w) of the VAE's sample, `noise`
                (B, 4, h, w), `timesteps` (B,) int64, and `drop_condition` (B,) bool, True for samples that are drawn
                without their prompt. Or one of stage 1, see `PretrainStage`, with `attention_mask`.

        Returns:
            dict of `denoising`, a scalar; of stage 1's batches of `language`, times `words_weight`.
        """
        if "timesteps" not in batch:
            return self._words(batch)
        parameters = batch.get("latent_parameters")
        if parameters is None:
            parameters = self.latent_parameters(batch["target_pixel_values"])
        posterior = DiagonalGaussianDistribution(parameters.float())
        latents = (posterior.mean + posterior.std * batch["latent_noise"]) * self.vae.config.scaling_factor
        noise, timesteps, scheduler = batch["noise"], batch["timesteps"], self.noise_scheduler
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        condition = self._condition_or_null(batch)
        dtype = self.unet.dtype
        prediction = self.unet(noisy.to(dtype), timesteps, condition.to(dtype)).sample
        return {"denoising": denoising_loss(prediction, target)}

    def _words(self, batch):
        states = self._language_states(batch)
        loss = self._language_loss(states, batch)
        # the AlignerNet's gradients are zero, and all weights are used
        unused = 0.0 * self._condition(states[:1], batch["attention_mask"][:1]).float().sum()
        return {"language": self.words_weight * loss + unused}

    def _condition_or_null(self, batch):
        """(B, K, A): the condition of each prompt, that of `<s>` alone where `drop_condition` is set (kosmosg.py:315).

        One pass computes both, the null condition once and with gradient, and dropped prompts not at all.
        """
        drop = batch["drop_condition"]
        if not drop.any():
            return self._condition(self._language_states(batch), batch["attention_mask"])
        rows = _kept_rows(batch, ~drop, self.text_encoder.config)
        condition = self._condition(self._language_states(rows), rows["attention_mask"])
        return condition[torch.where(drop, len(condition) - 1, (~drop).cumsum(0) - 1)]


# Losses ----------------------------------------------------------------------------------------------------------


def language_loss(
    hidden_states: torch.Tensor,
    embedding: torch.Tensor,
    labels: torch.Tensor,
    n_labels: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Cross-entropy of the next token (stage 1, sec. 2.1 of the Kosmos-G paper).

    Only the states that predict something are multiplied with the vocabulary: logits of image slots and padding would
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


def align_losses(
    condition: torch.Tensor,
    clip_embeds: torch.Tensor,
    reconstruction: torch.Tensor,
    hidden_states: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Distance to CLIP's states, and error of the inverse projection (stage 2, sec. 2.2; unilm/models/aligner.py:56, :66).

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


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The U-Net's own loss (stage 3, sec. 2.3; diffusion.py:64-84 of the official code).

    Args:
        prediction, target: (B, C, H, W), the noise or the velocity.

    Returns:
        Scalar, the mean over samples of the mean over each (the official code adds the samples and divides by their
        number later).
    """
    return F.mse_loss(prediction.float(), target.float())


# Of a batch ------------------------------------------------------------------------------------------------------


def _kept_rows(batch, keep, config):
    """The prompts where `keep` (B,) is set, with their images, and behind them the null prompt."""
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"].bool()
    null = torch.full_like(input_ids[:1], config.text_config.pad_token_id)
    null[:, 0] = config.text_config.bos_token_id
    rows = {
        "input_ids": torch.cat([input_ids[keep], null]),
        "attention_mask": torch.cat([attention_mask[keep], torch.zeros_like(attention_mask[:1])]),
    }
    rows["attention_mask"][-1, 0] = True
    slots = batch.get("image_token_mask")
    if slots is not None:
        rows["image_token_mask"] = torch.cat([slots[keep], torch.zeros_like(slots[:1])])
        images_of_row = slots.sum(1) // config.latent_query_num
        keep_image = keep.repeat_interleave(images_of_row)
        for name in ("pixel_values", "vision_states"):
            if name in batch and keep_image.any():
                rows[name] = batch[name][keep_image]
    length = int(rows["attention_mask"].sum(1).max())  # the longest prompt may have been dropped
    return {name: tensor[:, :length] if tensor.ndim == 2 else tensor for name, tensor in rows.items()}


def _own_precision(tensor):
    """Context in which a frozen model computes in the dtype of its weights, whatever the training's mixed precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _weights_of(part, state_dict):
    names = [name for name in state_dict or () if name.startswith(f"{part}.")]
    return state_dict and {name.removeprefix(f"{part}."): state_dict[name] for name in names}
