"""Reads the cross-attention of one call, and steers it.

A map says which image of the prompt draws which place: the U-Net's cross-attention says which state of the condition a place
reads, the AlignerNet's from which tokens that state comes, and the language model's slots of which image these are.

Letters of the shapes: B images that are drawn, K states of the condition (77), S what tokens are of (the images of a prompt, its
words, the null token), h x w places of a layer.

Hooks see the projections of queries and keys, whichever attention processor calls them: LoRA, IP-Adapter and slicing act as
ever, and nothing of the U-Net is replaced. They act in the thread of the call alone and are taken away when it ends.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from . import guidance
from .requests import MapRequest

COARSENESS = (
    2  # sides of the latents to sides of the maps, at least: finer layers draw edges and colours, not things
)
FIRST_STEP = 0.5  # of the steps; before it the places are still noise


class Observer:
    """What a call with `return_maps`, `binding` or `regions` shares with the hooks.

    Args:
        request: what was asked for.
        images_per_prompt: rows of a prompt in the U-Net's batch.
        pipeline: that is called.

    Raises:
        ValueError: the U-Net is compiled, or has no cross-attention.
    """

    request: MapRequest

    def __init__(self, request: MapRequest, images_per_prompt: int, pipeline: Any):
        self.request, self.images_per_prompt, self._pipeline = request, images_per_prompt, pipeline
        unet = pipeline.unet
        self._sources, self._counts, self._regions = None, None, None  # (B, K, S), (B,), (B, S, H, W)
        self._calls, self._queries, self._seen, self._maps, self._biases = 0, {}, {}, [], {}
        self._names = {}  # height of a map -> the last layer of it
        self._size, self._shift, self._is_moving, self._last_layer = None, None, False, None
        if any(map(_is_compiled, unet.modules())):
            raise ValueError(
                "The U-Net is compiled, and return_maps, binding and regions look into it. Give the pipeline the U-Net as it was "
                "before torch.compile: load it again, or keep it and compile a copy."
            )
        self._layers = {
            name: module
            for name, module in unet.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention
        }
        if not self._layers:
            raise ValueError(
                f"{type(unet).__name__} has no cross-attention, which return_maps, binding and regions read. Call without them."
            )
        # those that come last say best what is drawn where
        last = {name for name in self._layers if name.startswith("up_blocks")}
        self._read_layers = last or set(self._layers)

    @property
    def labels(self) -> list[list[str]]:
        """Of the maps of each image that is drawn."""
        return [row for row in self.request.labels for _ in range(self.images_per_prompt)]

    @torch.inference_mode(False)  # gradients go through what is made of it
    def read_condition(self, cross_attentions: tuple[torch.Tensor, ...], token_sources: torch.Tensor) -> None:
        """Take what the text encoder returns with `output_attentions`: from which tokens each state of a prompt comes."""
        # (prompts, K, tokens)
        weights = torch.stack([one.detach().clone() for one in cross_attentions]).mean((0, 2))
        token_sources = token_sources.clone()
        counts = [len(labels) - 2 for labels in self.request.labels]
        sources = weights.new_zeros(*weights.shape[:2], max(counts) + 2)
        for row, count in enumerate(counts):
            for source in range(count + 2):
                # -1 are the words, -2 the null token
                number = source if source < count else count - 1 - source
                sources[row, :, source] = weights[row][:, token_sources[row] == number].sum(-1)
        self._sources = sources.repeat_interleave(self.images_per_prompt, 0)
        self._counts = torch.tensor(counts, device=sources.device).repeat_interleave(self.images_per_prompt)
        self._regions = self._read_regions(sources)

    def _read_regions(self, sources):
        """(B, S, H, W), NaN for sources that are free; None if all of them are."""
        regions = [region for row in self.request.regions for region in row if region is not None]
        if not regions:
            return None
        read = sources.new_full((len(sources), sources.shape[-1], *regions[0].shape), torch.nan)
        for number, row in enumerate(self.request.regions):
            for source, region in enumerate(row):
                if region is not None:
                    read[number, source] = region.to(read)
        return read.repeat_interleave(self.images_per_prompt, 0)

    @property
    def maps(self) -> list[torch.Tensor]:
        """A (S, h, w) float32 tensor on the CPU for each image that is drawn, which sums to 1 over S."""
        first = min(int(FIRST_STEP * self._calls), self._calls - 1)
        maps = torch.stack(self._maps[first:]).mean(0).cpu()
        maps = [one[: len(labels)] for one, labels in zip(maps, self.labels, strict=True)]
        return [one / one.sum(0) for one in maps]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within it the U-Net is observed and steered, and the scheduler steps from where latents were moved to."""
        unet, scheduler, hooks = self._pipeline.unet, self._pipeline.scheduler, []
        step, own = scheduler.step, vars(scheduler).get("step")

        @functools.wraps(step)  # pipelines read from its signature what it takes
        def step_from_moved(model_output, timestep, sample, *arguments, **keywords):
            shift, self._shift = self._shift, None
            return step(
                model_output, timestep, sample if shift is None else sample + shift, *arguments, **keywords
            )

        try:
            if self.request.is_guided:
                scheduler.step = step_from_moved
            hooks.append(unet.register_forward_pre_hook(self._mine(self._before_call), with_kwargs=True))
            hooks.append(unet.register_forward_hook(self._mine(self._after_call)))
            for name, layer in self._layers.items():
                hooks += self._hook(name, layer)
            yield
        finally:
            vars(scheduler).pop("step", None)
            if own is not None:
                scheduler.step = own
            for hook in hooks:
                hook.remove()

    def _mine(self, hook):
        """A hook that acts in the thread of this call: another may draw with the same U-Net meanwhile."""
        thread = threading.get_ident()

        def act(*arguments):
            return hook(*arguments) if threading.get_ident() == thread else None

        return act

    def _hook(self, name, layer):
        """Hooks of one cross-attention layer; queries come before keys in every processor of diffusers."""
        # a layer whose projections were fused keeps both; the processor decides which of them is used
        fused = [layer.to_kv] if hasattr(layer, "to_kv") else []

        def keep_queries(module, inputs, output):
            self._queries[name] = output

        def read_keys(module, inputs, output):
            queries = self._queries.pop(name, None)
            if queries is not None:
                self._read(name, layer, queries, output.chunk(2, -1)[0] if module in fused else output)

        def steer(module, inputs, keywords):
            states = inputs[0] if inputs else keywords["hidden_states"]
            bias = self._bias(states.shape[1])
            if bias is None:
                return None
            # of the rows without a prompt: none
            mask = states.new_zeros(len(states), *bias.shape[1:])
            mask[self._rows(len(states))] = bias.to(mask)
            if keywords.get("attention_mask") is not None:
                mask = mask + keywords["attention_mask"]
            return inputs, {**keywords, "attention_mask": mask}

        return [
            layer.register_forward_pre_hook(self._mine(steer), with_kwargs=True),
            layer.to_q.register_forward_hook(self._mine(keep_queries)),
            *(keys.register_forward_hook(self._mine(read_keys)) for keys in (layer.to_k, *fused)),
        ]

    def _bias(self, length):
        """(B, h * w, K) to be added to the scores of a layer with so many places; None for nothing."""
        if length not in self._biases:
            self._biases[length] = self._make_bias(self._places(length))
        return self._biases[length]

    def _make_bias(self, size):
        parts = []
        if self.request.binding and self._maps:
            maps = torch.stack(self._maps[-guidance.RECENT :]).mean(0)
            parts.append(
                self.request.binding * guidance.separating_bias(self._sources, maps, self._counts, size)
            )
        if self._regions is not None and self._calls < guidance.PLACED_UNTIL * self._pipeline.num_timesteps:
            parts.append(guidance.placing_bias(self._sources, self._regions, size))
        return sum(parts) if parts else None

    def _rows(self, length):
        """Those of a batch that have a prompt: the second half under classifier-free guidance."""
        return slice(length - len(self._sources), length)

    def _before_call(self, unet, inputs, keywords):
        if self._is_moving:
            return None
        names = ("sample", "timestep", "encoder_hidden_states")
        keywords = {**dict(zip(names, inputs, strict=False)), **keywords}
        sample = keywords["sample"]
        self._size, self._seen, self._biases = tuple(sample.shape[-2:]), {}, {}
        self._queries.clear()
        bound = self.request.binding and self._calls in guidance.MOVES
        placed = self._regions is not None and self._calls in guidance.PLACED_MOVES
        if not (bound or placed):
            return None
        shift = self._move(unet, sample, keywords)
        self._seen, self._biases = {}, {}
        repeats = len(sample) // len(shift)
        moved = torch.cat(
            [sample[:, : shift.shape[1]] + shift.repeat(repeats, 1, 1, 1), sample[:, shift.shape[1] :]], 1
        )
        # what the scheduler gives to the U-Net may be scaled; what it steps from is not
        scaled = self._pipeline.scheduler.scale_model_input(torch.ones_like(shift), keywords["timestep"])
        self._shift = shift / scaled
        return (), {**keywords, "sample": moved}

    def _move(self, unet, sample, keywords):
        """A move (B, C, H, W) of what the U-Net is given, along the gradient of the loss of its maps, in its deviations."""
        rows, length = self._rows(len(sample)), len(sample)
        channels = unet.config.out_channels  # an inpainting U-Net is given more than latents
        with torch.inference_mode(False), torch.enable_grad():
            keywords = {name: _take_rows(value, rows, length) for name, value in keywords.items()}
            latents = keywords["sample"][:, :channels].clone().requires_grad_(True)
            keywords["sample"] = torch.cat([latents, keywords["sample"][:, channels:]], 1)
            self._is_moving = True
            try:
                unet(**keywords)
            except _Enough:  # the rest of the U-Net says nothing of the maps
                pass
            finally:
                self._is_moving = False
            (gradient,) = torch.autograd.grad(self._loss().sum(), latents)
        deviation = latents.detach().float().flatten(1).std(1)
        size = gradient.float().flatten(1).square().mean(1).sqrt()
        step = self.request.binding * guidance.STEP
        if self._regions is not None:
            step = max(step, guidance.PLACED_STEP)
        # a gradient that is not finite moves nothing
        factor = torch.where(size.isfinite(), step * deviation / size.clamp_min(1e-12), 0.0)
        return -(gradient.float().nan_to_num() * factor[:, None, None, None]).to(sample)

    def _loss(self):
        maps = torch.stack(self._seen[self._finest()]).mean(0)
        loss = self.request.binding * guidance.mixing_loss(maps, self._counts) * (self._counts > 1)
        if self._regions is not None:
            loss = loss + guidance.placing_loss(maps, self._regions)
        return loss

    def _read(self, name, layer, queries, keys):
        """Add a layer's map (B, S, h, w) to those of its resolution."""
        h, w = self._places(queries.shape[1])
        if name not in self._read_layers or (self._maps and h != self._maps[0].shape[-2]):
            return
        queries, keys = (
            one[self._rows(len(one))].unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for one in (queries, keys)
        )
        queries, keys = (
            (one if norm is None else norm(one)).float()
            for one, norm in ((queries, layer.norm_q), (keys, layer.norm_k))
        )
        scores = queries @ keys.transpose(-1, -2) * layer.scale
        bias = self._bias(queries.shape[2])
        if bias is not None:
            scores = scores + bias[:, None].to(scores)
        weights = scores.softmax(-1).mean(1)  # (B, h * w, K)
        sources = self._sources.to(weights)
        self._seen.setdefault(h, []).append((weights @ sources).transpose(1, 2).unflatten(-1, (h, w)))
        self._names[h] = name
        if self._is_moving and name == self._last_layer:
            raise _Enough

    def _places(self, length):
        """(h, w) of a layer with so many places, each of whose sides was halved as often."""
        h, w = self._size
        while h * w > length:
            h, w = (h + 1) // 2, (w + 1) // 2
        return h, w

    def _finest(self):
        """Height of the maps: of the finest layers that are coarse enough, or of the coarsest there are."""
        coarse = [h for h in self._seen if h * COARSENESS <= self._size[0]]
        return max(coarse) if coarse else min(self._seen)

    def _after_call(self, unet, inputs, output):
        """Keep the maps of this call, and soften its guidance."""
        if self._is_moving:
            return None
        finest = self._finest()
        self._maps.append(torch.stack(self._seen[finest]).mean(0))
        self._last_layer = self._names[finest]
        self._calls += 1
        noise_pred = output[0]
        if not self.request.binding or len(noise_pred) != 2 * len(self._sources):
            return None
        softened = guidance.soften(noise_pred, self._maps[-1], self._counts, self.request.binding)
        return (softened, *output[1:]) if isinstance(output, tuple) else type(output)(sample=softened)


class _Enough(Exception):
    """Ends a pass through the U-Net, all of whose maps are there."""


def _take_rows(value, rows, length):
    """A keyword of the U-Net's call, for some rows of its batch alone; cloned, since a gradient goes through it."""
    if isinstance(value, torch.Tensor):
        return value[rows].clone() if value.ndim and len(value) == length else value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_take_rows(one, rows, length) for one in value)
    if isinstance(value, dict):
        return {name: _take_rows(one, rows, length) for name, one in value.items()}
    return value


def _is_compiled(module):
    """Whether torch.compile has wrapped a module, or module.compile() its call: what hooks within do is not seen then."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
