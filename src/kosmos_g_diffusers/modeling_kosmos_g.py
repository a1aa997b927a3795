"""The text encoder: vision tower -> resampler -> language model -> AlignerNet -> the states of SD 1.5's CLIP text encoder.

The multimodal language model is made of transformers' Kosmos-2 modules, which compute the same function as the
official code; the AlignerNet (sec. 2.2 of the Kosmos-G paper) is put together here from the same blocks.

Letters of the shapes: B prompts, L tokens, N images in the batch, Q latent queries an image (64), D width of the
language model (2048), S image size (224), A width of the condition (768), K its length (77).

This file is copied into saved model folders and stands alone: it needs torch and transformers only.
"""

import hashlib
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel  # noqa: F401  diffusers looks here for the base class that says how to load
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2TextConfig, Kosmos2VisionConfig
from transformers.models.kosmos2.modeling_kosmos2 import (
    Kosmos2ImageToTextProjection,
    Kosmos2PreTrainedModel,
    Kosmos2TextBlock,
    Kosmos2TextModel,
    Kosmos2VisionModel,
    KosmosTextAttention,
)
from transformers.utils import ModelOutput

if TYPE_CHECKING:
    from transformers import Kosmos2ForConditionalGeneration

# of a saved folder; raise it when an older package could no longer read a new folder rightly
FORMAT_VERSION = 1
# in `token_sources`, below the numbers of images
WORDS, NULL_TOKEN, PADDING = -1, -2, -3


class OfTextConfig:
    """An attribute of a configuration that is its `text_config`'s: read and set there, and written to no file twice."""

    name: str

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        return self if config is None else getattr(config.text_config, self.name)

    def __set__(self, config: Any, value: Any) -> None:
        setattr(config.text_config, self.name, value)


class KosmosGTextEncoderConfig(PreTrainedConfig):
    """Sizes of a `KosmosGTextEncoder`; the defaults are the released model's.

    Args:
        text_config: Kosmos2TextConfig of the language model, or a dict (vocab_size 64,007 unless it says otherwise).
        vision_config: Kosmos2VisionConfig (or a dict) of the vision tower.
        latent_query_num: Q, states an image takes in a prompt.
        aligner_hidden_size: A, the cross-attention width of the U-Net.
        aligner_layers: layers of each half of the AlignerNet.
        aligner_attention_heads, aligner_ffn_dim: of each of these layers.
        aligner_max_positions: rows of the AlignerNet's position table.
        num_queries: K, states of the condition.
        image_token_id, end_of_image_token_id: ids around an image in a prompt.
        image_words: [name, number of images] of each image word, in the order of their ids.
        format_version: of the folder this configuration was saved in.

    Raises:
        ValueError: `format_version` is one that this code does not know.
    """

    model_type = "kosmos_g_text_encoder"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "text_config": Kosmos2TextConfig,
        "vision_config": Kosmos2VisionConfig,
    }
    # names of CLIPTextConfig, for code that is written for it: of the states that the U-Net reads, and of the ids
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "aligner_hidden_size",
        "num_hidden_layers": "aligner_layers",
        "num_attention_heads": "aligner_attention_heads",
        "intermediate_size": "aligner_ffn_dim",
    }
    vocab_size: ClassVar[OfTextConfig] = OfTextConfig()
    max_position_embeddings: ClassVar[OfTextConfig] = OfTextConfig()
    bos_token_id: ClassVar[OfTextConfig] = OfTextConfig()
    eos_token_id: ClassVar[OfTextConfig] = OfTextConfig()
    pad_token_id: ClassVar[OfTextConfig] = OfTextConfig()

    def __init__(
        self,
        text_config: Kosmos2TextConfig | dict[str, Any] | None = None,
        vision_config: Kosmos2VisionConfig | dict[str, Any] | None = None,
        latent_query_num: int = 64,
        aligner_hidden_size: int = 768,
        aligner_layers: int = 12,
        aligner_attention_heads: int = 12,
        aligner_ffn_dim: int = 3072,
        aligner_max_positions: int = 32768,
        num_queries: int = 77,
        image_token_id: int = 64003,
        end_of_image_token_id: int = 64004,
        image_words: Iterable[tuple[str, int]] = (),
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"This Kosmos-G folder has format version {format_version!r}; this code reads version {FORMAT_VERSION}. "
                "Install the kosmos-g-diffusers release that wrote the folder, or convert the checkpoint again."
            )
        if text_config is None or isinstance(text_config, dict):
            # Kosmos-G's vocabulary is Kosmos-2's without the 1,030 grounding tokens
            text_config = Kosmos2TextConfig(**{"vocab_size": 64007, **(text_config or {})})
        self.text_config = text_config
        if vision_config is None or isinstance(vision_config, dict):
            vision_config = Kosmos2VisionConfig(**(vision_config or {}))
        self.vision_config = vision_config
        self.latent_query_num = latent_query_num
        self.aligner_hidden_size = aligner_hidden_size
        self.aligner_layers = aligner_layers
        self.aligner_attention_heads = aligner_attention_heads
        self.aligner_ffn_dim = aligner_ffn_dim
        self.aligner_max_positions = aligner_max_positions
        self.num_queries = num_queries
        self.image_token_id = image_token_id
        self.end_of_image_token_id = end_of_image_token_id
        self.image_words: list[list[Any]] = [list(word) for word in image_words]
        self.format_version = format_version
        super().__init__(**kwargs)


@dataclass
class KosmosGTextEncoderOutput(ModelOutput):
    """What `KosmosGTextEncoder` returns; members that do not apply are None.

    Attributes:
        last_hidden_state: (B, K, A), the condition: `prompt_embeds` of a Stable Diffusion 1.5 pipeline.
        image_embeds: (N, Q, D), states of the images.
        cross_attentions: for each query layer of the AlignerNet (B, heads, K, L'), float32: from which tokens each state of the
            condition reads. L' are the tokens with image words spelled out.
        token_sources: (B, L') int64, what each token is of: 0, 1, ... for the images in reading order (an image word is one,
            however many images it has), WORDS, NULL_TOKEN for the `<s>` that begins a prompt, PADDING.
        hidden_states: (B, K, A) for the AlignerNet's queries and after each of its query layers, without the final
            norm. Last in the order, where diffusers' `clip_skip` looks for it.
    """

    last_hidden_state: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    token_sources: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class AlignerNet(nn.Module):
    """Maps the language model's states into the space of CLIP's text encoder (AlignerNet M, sec. 2.2).

    Encoder layers see the whole prompt in both directions; `num_queries` learned queries then read them through layers
    of self-attention, cross-attention and feed-forward network. All layers are pre-norm with sub-layer norms.
    """

    input_projection: nn.Linear
    position_embedding: nn.Embedding
    encoder_layers: nn.ModuleList
    encoder_layer_norm: nn.LayerNorm
    query_embeds: nn.Parameter
    query_layers: nn.ModuleList
    final_layer_norm: nn.LayerNorm

    def __init__(self, config: KosmosGTextEncoderConfig):
        super().__init__()
        block_config = Kosmos2TextConfig(
            embed_dim=config.aligner_hidden_size,
            layers=config.aligner_layers,
            attention_heads=config.aligner_attention_heads,
            ffn_dim=config.aligner_ffn_dim,
            layer_norm_eps=config.text_config.layer_norm_eps,
            dropout=0.0,
            attention_dropout=0.0,
        )
        block_config._attn_implementation = "sdpa"  # takes the masks below; every build of torch has it
        query_block_config = Kosmos2TextConfig(**{**block_config.to_dict(), "add_cross_attention": True})
        query_block_config._attn_implementation = "sdpa"
        width, eps = config.aligner_hidden_size, config.text_config.layer_norm_eps
        self.input_projection = nn.Linear(config.text_config.embed_dim, width)
        # torchscale counts positions from 2 on, whatever the padding: the first two rows are never read
        self.position_embedding = nn.Embedding(config.aligner_max_positions, width)
        layers = range(config.aligner_layers)
        self.encoder_layers = nn.ModuleList(Kosmos2TextBlock(block_config) for _ in layers)
        self.encoder_layer_norm = nn.LayerNorm(width, eps=eps)
        self.query_embeds = nn.Parameter(torch.randn(config.num_queries, width))
        self.query_layers = nn.ModuleList(Kosmos2TextBlock(query_block_config) for _ in layers)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)
        for module in self.modules():
            if isinstance(module, KosmosTextAttention):
                module.is_causal = False

    def forward(
        self, language_hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """(B, L, D) states and (B, L) bool mask, False at padding, or None -> tuple of aligner_layers + 1 (B, K, A).

        The last of them goes through `final_layer_norm` to become the condition.
        """
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :]  # keys, the same for every head and query
        positions = torch.arange(2, 2 + language_hidden_states.shape[1], device=language_hidden_states.device)
        states = self.input_projection(language_hidden_states) + self.position_embedding(positions)
        for layer in self.encoder_layers:
            states = layer(states, attention_mask)
        states = self.encoder_layer_norm(states)
        # len() would make it a constant of a graph
        queries = self.query_embeds.expand(states.shape[0], -1, -1)
        hidden_states = (queries,)
        for layer in self.query_layers:
            queries = layer(queries, None, states, encoder_attention_mask=attention_mask)
            hidden_states += (queries,)
        return hidden_states

    @contextmanager
    def record_cross_attention(self) -> Iterator[list[torch.Tensor]]:
        """Within it a forward of this thread appends (B, heads, K, L) of each query layer, float32, to the list that is given.

        The blocks keep no attention weights: queries and keys are projected once more here.
        """
        weights, thread = [], threading.get_ident()

        def record(attention, _, inputs):
            if threading.get_ident() != thread:
                return
            states, tokens, mask = (
                inputs[name] for name in ("hidden_states", "encoder_hidden_states", "attention_mask")
            )
            queries, keys = attention.q_proj(states), attention.k_proj(tokens)
            queries, keys = (
                one.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2).float() for one in (queries, keys)
            )
            scores = queries @ keys.transpose(-1, -2) * attention.scaling
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            weights.append(scores.softmax(-1))

        hooks = [
            layer.encoder_attn.register_forward_pre_hook(record, with_kwargs=True)
            for layer in self.query_layers
        ]
        try:
            yield weights
        finally:
            for hook in hooks:
                hook.remove()


class ImageToTextProjection(Kosmos2ImageToTextProjection):
    """transformers' resampler, without a copy of the query projection's weights for each image of a call."""

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, P, V) -> (N, Q, D), and None."""
        states = self.dense(features)
        # torch multiplies what is merely expanded one by one, each with its own copy of the weights
        queries = self.latent_query.expand(states.shape[0], -1, -1).contiguous()
        return self.x_attn(queries, torch.cat([states, queries], dim=1))


class ImageWord(nn.Module):
    """Frozen states of an image word, (n, Q, D) for its n images; called, so that the hooks of offloading fetch them."""

    states: nn.Parameter

    def __init__(self, states: torch.Tensor):
        super().__init__()
        self.states = nn.Parameter(states, requires_grad=False)

    def forward(self) -> torch.Tensor:
        return self.states.detach()  # loading makes every parameter trainable


class KosmosGTextEncoder(Kosmos2PreTrainedModel):
    """Kosmos-G's prompt encoder, to be used wherever Stable Diffusion 1.5 expects a CLIPTextModel.

    `from_pretrained` gives a model that is ready to draw. `KosmosGTextEncoder(config)` is in training mode, as every new
    module of torch, and its language model drops out states (dropout 0.1), where CLIPTextModel has nothing to drop:
    call `.eval()` before drawing with it.
    """

    language_model: Kosmos2TextModel
    vision_model: Kosmos2VisionModel
    image_to_text_projection: ImageToTextProjection
    aligner: AlignerNet
    image_words: nn.ModuleList

    config_class: type[KosmosGTextEncoderConfig] = KosmosGTextEncoderConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Kosmos2VisionEncoderLayer", "Kosmos2TextBlock", "ImageToTextProjection"]

    def __init__(self, config: KosmosGTextEncoderConfig):
        super().__init__(config)
        self.language_model = Kosmos2TextModel(config.text_config)
        self.vision_model = Kosmos2VisionModel(config.vision_config)
        self.image_to_text_projection = ImageToTextProjection(config)
        self.aligner = AlignerNet(config)
        self.image_words = nn.ModuleList(
            ImageWord(torch.empty(n_images, config.latent_query_num, config.text_config.embed_dim))
            for _, n_images in config.image_words
        )
        for layer in self.language_model.model.layers:
            # the official decoder drops no attention weights, not even in training (FlashAttention branch)
            layer.self_attn.dropout = 0.0
        # some releases of transformers let SDPA take this cross-attention for a causal one
        self.image_to_text_projection.x_attn.is_causal = False
        self._compiled_encode = None
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> "KosmosGTextEncoder":
        """As transformers', in the dtype of the file unless `dtype` says otherwise; ValueError if weights are missing.

        transformers would fill them with random numbers. A pipeline loaded without a dtype asks for None. diffusers then
        loads the U-Net in float32, and so does this.
        """
        if "dtype" in kwargs and kwargs["dtype"] is None:
            kwargs["dtype"] = torch.float32
        source = pretrained_model_name_or_path
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing and not output_loading_info:  # who asks for it looks at it
            raise ValueError(
                f"The text encoder {source} lacks {len(missing)} weights, such as {missing[0]}. Download or convert it again."
            )
        if getattr(model, "hf_quantizer", None) is not None:
            _settle_rounded(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As transformers', which knows adapters of `add_adapter`. ValueError for layers that peft itself has wrapped.

        Their names are no format: a folder with them would load with random weights.
        """
        wrapped = any(".base_layer." in name for name, _ in self.named_parameters())
        if wrapped and not self._hf_peft_config_loaded:
            raise ValueError(
                "The text encoder has an adapter, and neither part can be saved like this. Call merge_adapter to save it "
                "with the weights, remove_adapter to save it without, or save_adapter to save it alone."
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        # safetensors makes files that only their owner reads; others have the mode that the umask asks for
        if other := next(Path(save_directory).glob("*.json"), None):
            for path in Path(save_directory).glob("*.safetensors"):
                shutil.copymode(other, path)

    # diffusers asks for the names of its arguments
    save_pretrained.__wrapped__ = Kosmos2PreTrainedModel.save_pretrained

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AlignerNet):
            nn.init.normal_(module.query_embeds)
        elif isinstance(module, ImageWord):
            nn.init.zeros_(module.states)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.model.embed_tokens = value

    @property
    def text_model(self) -> AlignerNet:
        """Where diffusers' `clip_skip` looks for `final_layer_norm`."""
        return self.aligner

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor | BaseModelOutputWithPooling | tuple[Any, ...]:
        """Images -> their states in the language model's input space (sec. 2.1).

        Args:
            pixel_values: (N, 3, S, S), normalised with CLIP's mean and deviation.
            output_hidden_states, return_dict: with either of them the result is what transformers' models return here.

        Returns:
            (N, Q, D) in the model's dtype. With `return_dict` or `output_hidden_states`: BaseModelOutputWithPooling (a tuple
            for return_dict=False) of the vision tower's states (N, P, V), the states (N, Q, D) as `pooler_output`, and on
            demand the tower's hidden states. Attention weights are not computed: `output_attentions` does not apply.
        """
        unknown = sorted(set(kwargs) - {"output_hidden_states", "return_dict"})
        if unknown:
            raise TypeError(
                f"get_image_features was given {unknown[0]!r}. It takes output_hidden_states and return_dict."
            )
        keep = kwargs.get("output_hidden_states")
        keep = self.config.output_hidden_states if kwargs and keep is None else keep
        vision = self.vision_model.model
        # one layout in memory for all, which rounding may depend on
        states = vision.pre_layrnorm(vision.embeddings(pixel_values.contiguous()))
        hidden_states = [states]
        for layer in vision.encoder.layers:
            states = layer(states, None)
            if keep:
                hidden_states.append(states)
        # unlike CLIP: the norm on every token, then unit length (unilm/models/vl/clip.py:60, :125)
        states = nn.functional.normalize(vision.post_layernorm(states), dim=-1)
        image_embeds = self.image_to_text_projection(states)[0]
        if not kwargs:
            return image_embeds
        hidden_states = tuple(hidden_states) if keep else None
        output = BaseModelOutputWithPooling(states, image_embeds, hidden_states)
        return output.to_tuple() if kwargs.get("return_dict") is False else output

    def get_language_hidden_states(
        self,
        input_ids: torch.Tensor,
        image_embeds: torch.Tensor | None = None,
        image_token_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The language model's final states, after its last norm.

        Causal only: a padding mask would change the states at padded columns, which the alignment loss reads.

        Args:
            input_ids: (B, L); image slots may hold any id but the padding id.
            image_embeds: (N, Q, D) or (N * Q, D), or None.
            image_token_mask: (B, L) bool, True where a row of `image_embeds` belongs, in reading order.

        Returns:
            (B, L, D).
        """
        text = self.language_model.model
        embeds = text.embed_tokens(input_ids)
        if image_embeds is not None:
            # as masked_scatter, of any number of images in one graph: row 0 stands where no image is
            rows = image_embeds.reshape(-1, embeds.shape[-1]).to(embeds.dtype)
            rows = nn.functional.pad(rows, (0, 0, 1, 0))
            row = image_token_mask.flatten().cumsum(0).view(input_ids.shape) * image_token_mask
            embeds = torch.where(image_token_mask[..., None], rows[row], embeds)
        # fairseq's positions: counted over real tokens from padding id + 1, padding itself at the padding id (zeros)
        is_token = input_ids.ne(self.config.text_config.pad_token_id)
        positions = (is_token.cumsum(1) * is_token).long() + self.config.text_config.pad_token_id
        # the scale applies to image states as well
        states = embeds * text.embed_scale + text.embed_positions(input_ids=input_ids, position_ids=positions)
        # once: Kosmos2TextTransformer.forward would do it twice
        states = nn.functional.dropout(states, p=text.dropout, training=self.training)
        mask = None  # SDPA is told to be causal and needs none
        if self.config.text_config._attn_implementation != "sdpa":
            shape, lowest = (1, 1, states.shape[1], states.shape[1]), torch.finfo(states.dtype).min
            mask = states.new_full(shape, lowest).triu(1)
        for layer in text.layers:
            states = layer(states, mask)
        return text.layer_norm(states)

    def to_causal_lm(self) -> "Kosmos2ForConditionalGeneration":
        """The multimodal language model alone, which answers in words (sec. 2.1): transformers' own class for it.

        Its language model, vision tower and projection are those of this encoder, not copies: what changes here changes
        there. The head is tied to the embeddings, as in training. It takes the ids and pixels of `KosmosGProcessor`, with
        `image_token_mask` as `image_embeds_position_mask`; image words it does not know.

        Returns:
            Kosmos2ForConditionalGeneration. In training mode it drops out embeddings twice, where Kosmos-G does once.
        """
        from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

        config = self.config
        with torch.device("meta"):  # every weight is replaced below
            model = Kosmos2ForConditionalGeneration(
                Kosmos2Config(
                    text_config=config.text_config,
                    vision_config=config.vision_config,
                    latent_query_num=config.latent_query_num,
                )
            )
        model.text_model.model = self.language_model.model
        model.text_model.lm_head.weight = self.get_input_embeddings().weight
        model.vision_model = self.vision_model
        model.image_to_text_projection = self.image_to_text_projection
        return model.train(self.training)

    def get_condition(
        self,
        input_ids: torch.Tensor,
        image_embeds: torch.Tensor | None = None,
        image_token_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What `forward` computes of a whole batch, one graph: no checks, nothing that depends on values.

        `torch.export` and `torch.compile(fullgraph=True)` take it, and `get_image_features` for the images, for any number of
        prompts, tokens (2 or more where the length is to vary) and images.

        Args:
            input_ids: (B, L) int64, without image words.
            image_embeds: (N, Q, D) or (N * Q, D), or None.
            image_token_mask: (B, L) bool, True at the N * Q slots of these images; None without `image_embeds`.
            attention_mask: (B, L) bool, False at padding; None where no row has any.
            output_hidden_states: also return the states of the AlignerNet's queries.

        Returns:
            (B, K, A), the condition; with `output_hidden_states` also a tuple of aligner_layers + 1 (B, K, A).
        """
        states = self.get_language_hidden_states(input_ids, image_embeds, image_token_mask)
        hidden_states = self.aligner(states, attention_mask)
        condition = self.aligner.final_layer_norm(hidden_states[-1])
        return (condition, hidden_states) if output_hidden_states else condition

    def compile(self, **kwargs: Any) -> None:
        """Compile `get_condition` with torch.compile; padding is still trimmed and input checked in eager mode."""
        self._compiled_encode = torch.compile(self.get_condition, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_token_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        image_embeds: torch.Tensor | None = None,
    ) -> KosmosGTextEncoderOutput | tuple[Any, ...]:
        """Encode prompts.

        Args:
            input_ids: (B, L) int64, padded on the right. Ids from the vocabulary's size on are image words and are
                spelled out here. None with `pixel_values` computes the image states alone.
            attention_mask: (B, L), 0 at padding; None takes it from the padding id. The language model is causal and
                does not see it; the AlignerNet does.
            pixel_values: (N, 3, S, S), the images of the whole batch in reading order.
            image_token_mask: (B, L) bool, True at the N * Q slots of these images.
            output_hidden_states: also return the states of the AlignerNet's queries; None takes the configuration's.
            return_dict: False returns a tuple; None takes the configuration's.
            output_attentions: also return `cross_attentions` and `token_sources`; an encoder that is compiled runs in eager
                mode then. None is False.
            image_embeds: (N, Q, D), the states of these images, in the place of `pixel_values` (see `VisionCache`).

        Returns:
            KosmosGTextEncoderOutput. Columns that are padding in every row cost nothing, equal rows are computed once.

        Within `torch.compile` or `torch.export` it is one graph, unless there are image words: every column and row is computed,
        and what is wrong with ids or masks is a RuntimeError when the graph runs.

        Raises:
            ValueError: no input, shapes or counts that do not match, an id that no image word has, a prompt longer
                than the model's positions, a row of padding alone.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        if pixel_values is not None:
            self._check_pixel_values(pixel_values)
        if image_embeds is not None:
            self._check_image_embeds(image_embeds, pixel_values)
        if input_ids is None:
            if pixel_values is None:
                raise ValueError("Neither input_ids nor pixel_values were given. Pass at least one of them.")
            output = KosmosGTextEncoderOutput(image_embeds=self.get_image_features(pixel_values))
            return output if return_dict else output.to_tuple()
        # a stock pipeline gives a negative prompt in the same way as a prompt
        images = pixel_values if image_embeds is None else image_embeds
        arrange = self._arrange
        if torch.compiler.is_compiling() and not self.config.image_words and not output_attentions:
            arrange = self._arrange_in_graph
        batch = arrange(input_ids, attention_mask, images, image_token_mask, "input")
        if pixel_values is not None:
            image_embeds = self.get_image_features(pixel_values)
        slots = batch.gather_image_embeds(image_embeds, self.image_words)
        arguments = (batch.input_ids, slots, batch.image_token_mask, batch.attention_mask)
        attentions = None
        if output_attentions:
            with self.aligner.record_cross_attention() as attentions:
                condition, hidden_states = self.get_condition(*arguments, True)
        elif self._compiled_encode is None:
            condition, hidden_states = self.get_condition(*arguments, True)
        else:
            condition, hidden_states = self._compiled_encode(*self._for_compilation(*arguments), True)
        if batch.row_of_prompt is not None:
            condition = condition[batch.row_of_prompt]
            hidden_states = tuple(states[batch.row_of_prompt] for states in hidden_states)
            attentions = attentions and [weights[batch.row_of_prompt] for weights in attentions]
        output = KosmosGTextEncoderOutput(
            last_hidden_state=condition,
            image_embeds=image_embeds,
            cross_attentions=tuple(attentions) if output_attentions else None,
            token_sources=torch.tensor(batch.token_sources, device=condition.device)
            if output_attentions
            else None,
            hidden_states=hidden_states if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()

    def _for_compilation(self, input_ids, slots, image_token_mask, attention_mask):
        """Give the compiler one kind of input for all lengths: a mask always, two columns at least, lengths dynamic."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        missing = max(0, 2 - input_ids.shape[1])  # a length of 1 would be compiled as a constant
        if missing:
            input_ids = nn.functional.pad(input_ids, (0, missing), value=self.config.text_config.pad_token_id)
            attention_mask = nn.functional.pad(attention_mask, (0, missing), value=False)
        tensors = [input_ids, attention_mask]
        if slots is not None:
            slots = slots.flatten(0, 1)  # (N * Q, D): a single image would be compiled as a constant, too
            torch._dynamo.maybe_mark_dynamic(slots, 0)
            tensors.append(image_token_mask)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return input_ids, slots, image_token_mask, attention_mask

    def check_prompts(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_token_mask: torch.Tensor | None = None,
        name: str = "prompt",
    ) -> None:
        """Raise what `forward` would raise for this input, without running the model; errors call a prompt `name`."""
        if pixel_values is not None:
            self._check_pixel_values(pixel_values)
        self._arrange(input_ids, attention_mask, pixel_values, image_token_mask, name)

    def _check_pixel_values(self, pixel_values):
        size = self.config.vision_config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} were given. Expected (images, 3, {size}, {size}), "
                "as KosmosGProcessor makes them."
            )

    def _check_image_embeds(self, image_embeds, pixel_values):
        expected = (self.config.latent_query_num, self.config.text_config.embed_dim)
        if pixel_values is not None:
            raise ValueError("Both pixel_values and image_embeds were given. Pass one of them.")
        if image_embeds.ndim != 3 or tuple(image_embeds.shape[1:]) != expected:
            raise ValueError(
                f"image_embeds of shape {tuple(image_embeds.shape)} were given. Expected (images, {expected[0]}, "
                f"{expected[1]}), as get_image_features returns them."
            )

    def _check_shapes(self, input_ids, attention_mask, image_token_mask):
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            shape = tuple(input_ids.shape)
            raise ValueError(f"input_ids of shape {shape} were given. Expected (prompts, tokens).")
        for kind, mask in (("attention_mask", attention_mask), ("image_token_mask", image_token_mask)):
            if mask is not None and mask.shape != input_ids.shape:
                raise ValueError(
                    f"{kind} of shape {tuple(mask.shape)} was given for input_ids of shape {tuple(input_ids.shape)}. "
                    "Pass both of the same shape."
                )

    def _arrange_in_graph(self, input_ids, attention_mask, images, image_token_mask, name):
        """As `_arrange` without a look at values on the host: nothing is dropped, and the graph itself checks them."""
        self._check_shapes(input_ids, attention_mask, image_token_mask)
        text, n_images = self.config.text_config, 0 if images is None else images.shape[0]
        mask = input_ids.ne(text.pad_token_id) if attention_mask is None else attention_mask.bool()
        slots = torch.zeros_like(mask) if image_token_mask is None else image_token_mask.bool()
        n_slots = n_images * self.config.latent_query_num
        wrong = {
            f"a token id from the vocabulary's size on, {text.vocab_size}": (
                input_ids >= text.vocab_size
            ).any(),
            "</s>, which ends no prompt of Kosmos-G": input_ids.eq(text.eos_token_id).any(),
            "a row of padding alone": ~mask.any(1).all(),
            "other slots than there are images for": slots.sum() != n_slots,
        }
        for words, is_so in wrong.items():
            torch._assert_async(~is_so, f"The {name} has {words}.")
        return _Batch(input_ids, mask, None if images is None else slots, None, [], [])

    def _arrange(self, input_ids, attention_mask, images, image_token_mask, name):
        """Check the input, spell image words out, drop padding columns and repeated rows (one copy to the host)."""
        self._check_shapes(input_ids, attention_mask, image_token_mask)
        config = self.config
        if attention_mask is None:
            attention_mask = input_ids.ne(config.text_config.pad_token_id)
        masks = [mask.bool() for mask in (attention_mask, image_token_mask) if mask is not None]
        ids, mask, *slots = torch.stack([input_ids, *(mask.to(input_ids) for mask in masks)]).tolist()
        slots = slots[0] if slots else [[0] * len(row) for row in ids]
        n_slots = sum(map(sum, slots))
        n_images = 0 if images is None else len(images)
        if n_slots != n_images * config.latent_query_num:
            raise ValueError(
                f"image_token_mask marks {n_slots} slots, but {n_images} images of {config.latent_query_num} states each "
                "were given in pixel_values. Make all of them with one call of KosmosGProcessor."
            )
        prompts = [_PromptRow.trim(*row) for row in zip(ids, mask, slots, strict=True)]
        token_sources = [prompt.token_sources(config) for prompt in prompts]
        for index, prompt in enumerate(prompts):
            where = f"{name} {index}".capitalize()
            prompt.spell_out_image_words(config, where)
            length, longest = len(prompt.ids), config.text_config.max_position_embeddings
            if length > longest:
                raise ValueError(
                    f"{where} is {length} tokens long (image words and images included); the model reads at most "
                    f"{longest}. Shorten it: nothing is cut silently."
                )
            if config.text_config.eos_token_id in prompt.ids:
                raise ValueError(
                    f"{where} holds </s>, which ends CLIP's prompts and none of Kosmos-G's: tools that weight words for CLIP, such "
                    "as compel, write it. Take pipe.blend([(prompt, weight), ...]) in their place."
                )
            if not any(prompt.mask):
                raise ValueError(f"{where} is padding alone. Pass at least the token that begins a prompt.")
        row_of_prompt = None
        if not self.training and not n_slots:  # dropout makes equal rows differ, images are not compared
            rows = {}
            row_of_prompt = [rows.setdefault(prompt.key, len(rows)) for prompt in prompts]
            if len(rows) == len(prompts):
                row_of_prompt = None
            else:
                prompts = [prompts[row_of_prompt.index(row)] for row in range(len(rows))]
        return _Batch.build(prompts, row_of_prompt, token_sources, config, input_ids.device)

    # Image words -----------------------------------------------------------------------------------------------

    def add_image_word(self, word: str, image_embeds: torch.Tensor) -> None:
        """Keep the states of `word`, whose id is the next one behind the vocabulary and the words before it.

        Args:
            word: its name, as the tokenizer has it.
            image_embeds: (n, Q, D), the states of its n images, as `forward(pixel_values=...)` returns them.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        self.add_image_words({word: image_embeds})

    @torch.no_grad()
    # or words would be tensors of that mode for ever, which nothing may change
    @torch.inference_mode(False)
    def add_image_words(self, image_embeds: Mapping[str, torch.Tensor]) -> None:
        """As `add_image_word` for many, name -> (n, Q, D), in this order: all of them, or none when one is refused."""
        # weights that are offloaded layer by layer have no device of their own
        device, dtype = (None if self.device.type == "meta" else self.device), self.dtype
        parts = [ImageWord(self._check_states(*entry, device, dtype)) for entry in image_embeds.items()]
        self.image_words.extend(parts)
        entries = [[word, len(part.states)] for word, part in zip(image_embeds, parts, strict=True)]
        self.config.image_words = [*self.config.image_words, *entries]

    def _check_states(self, word, image_embeds, device, dtype):
        expected = (self.config.latent_query_num, self.config.text_config.embed_dim)
        if image_embeds.ndim != 3 or not len(image_embeds) or tuple(image_embeds.shape[1:]) != expected:
            raise ValueError(
                f"The states of {word} have the shape {tuple(image_embeds.shape)}. Expected (images, {expected[0]}, "
                f"{expected[1]}): were they made by a model of another size?"
            )
        states = image_embeds.detach().to(image_embeds.device if device is None else device, dtype).clone()
        if not image_embeds.is_floating_point() or not states.isfinite().all():
            raise ValueError(
                f"The states of {word} are {image_embeds.dtype} and not all finite in {dtype}. Expected finite "
                "floating-point numbers: was the file damaged, or made by a model with larger values?"
            )
        return states

    def remove_image_word(self, word: str) -> None:
        """Forget the states of `word`; the words behind it move up by one id. Raises ValueError if there is none."""
        names = [name for name, _ in self.config.image_words]
        if word not in names:
            known = ", ".join(names) or "none"
            raise ValueError(f"There is no image word {word!r} to remove. Known: {known}.")
        kept = [part for name, part in zip(names, self.image_words, strict=True) if name != word]
        self.image_words = nn.ModuleList(kept)
        self.config.image_words = [entry for entry in self.config.image_words if entry[0] != word]


def _settle_rounded(model):
    """Make a model with rounded weights, just loaded, one that runs in its dtype and can be saved, whatever it was saved in."""
    # transformers casts some of what is not rounded and leaves some, even within a layer
    dtype = model.config.dtype
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and dtype is not None:
            parameter.data = parameter.data.to(dtype)
    # saving would turn back each step of loading, and reading rounded weights is none that can be
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [step for step in conversions if _can_be_reversed(step)]


def _can_be_reversed(conversion):
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True


class VisionCache:
    """States of images that were encoded before, for the pipelines that hold it: `pipe.vision_cache = VisionCache(2**26)`.

    An image is known by its pixels, as the vision tower reads them, and by what its states depend on: all weights of the
    tower and of the projection behind it, their adapters, dtype and device. Weights are compared by value, once a call, so
    that a change in place, an adapter or a cast is noticed, and moving them to save memory loses nothing. The images of a
    call that are not known are encoded together, as without a cache.

    Nothing is kept in training mode, where gradients are wanted (call under `torch.no_grad()`), or of weights that cannot be
    read. Several threads and pipelines may share one cache; a copy of it is empty.

    Args:
        max_bytes: that states may take on the host, (Q, D) numbers each: 256 KiB an image of the released size in float16.
            The one that was not needed for the longest time goes first.

    Attributes:
        hits, misses: images that were known, and that were not, since it was made.

    Raises:
        ValueError: `max_bytes` is not a whole number from 0 on.
    """

    def __init__(self, max_bytes: int):
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(
                f"max_bytes={max_bytes!r} was given. Expected a whole number of bytes from 0 on."
            )
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._bytes = 0
        self._states: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return type(self), (self.max_bytes,)

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        """What the states that are kept take."""
        return self._bytes

    def clear(self) -> None:
        """Forget all states."""
        with self._lock:
            self._states.clear()
            self._bytes = 0

    def encode(
        self,
        text_encoder: KosmosGTextEncoder,
        pixel_values: torch.Tensor,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """States of images, encoded now where they are not known.

        Args:
            text_encoder: KosmosGTextEncoder.
            pixel_values: (N, 3, S, S), as `forward` takes them.
            device: where the encoder is called and the states are wanted; None takes that of `pixel_values`.

        Returns:
            (N, Q, D) in the encoder's dtype.
        """
        device = pixel_values.device if device is None else torch.device(device)
        weights = _fingerprint(text_encoder, device)
        if weights is None:
            return text_encoder(pixel_values=pixel_values.to(device)).image_embeds
        keys = [hashlib.sha256(weights + _bytes_of(image)).digest() for image in pixel_values]
        with self._lock:
            found = {key: self._states[key] for key in keys if key in self._states}
            for key in found:
                self._states.move_to_end(key)
            self.hits += sum(key in found for key in keys)
            self.misses += sum(key not in found for key in keys)
        missing = {key: index for index, key in enumerate(keys) if key not in found}
        if missing:
            pixels = pixel_values[list(missing.values())].to(device)
            # through forward, so that the hooks of offloading fire
            encoded = dict(zip(missing, text_encoder(pixel_values=pixels).image_embeds, strict=True))
            if _fingerprint(text_encoder, device) == weights:  # or another thread changed them meanwhile
                self._keep(encoded)
            found |= encoded
        return torch.stack([found[key].to(device) for key in keys])

    # or the states would be tensors of that mode for ever, which autograd may not save
    @torch.inference_mode(False)
    def _keep(self, encoded):
        with self._lock:
            for key, states in encoded.items():
                states = states.detach().to("cpu", copy=True)
                if key in self._states or states.nbytes > self.max_bytes:
                    continue
                self._states[key] = states
                self._bytes += states.nbytes
                while self._bytes > self.max_bytes:
                    self._bytes -= self._states.popitem(last=False)[1].nbytes


# of peft's layers: what decides, next to the weights, what they compute
_ADAPTER_STATE = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
# of numbers of 8 bytes, so many that lie so far apart are added up before their place counts: both odd, so that rows, columns or
# signs that change places do not cancel out
_ADDED, _APART = 63, 17


def _bytes_of(image):
    """What tells one image (3, S, S) from another."""
    return repr((image.dtype, tuple(image.shape))).encode() + bytes(
        image.detach().cpu().contiguous().view(torch.uint8).numpy()
    )


def _fingerprint(encoder, device):
    """Bytes for all that the states of images depend on but the images; None where they may not be kept.

    Every weight is read. torch counts changes of a tensor, but not those through `.data`, as peft makes when it merges.
    """
    told = [
        str(device),
        encoder.config.vision_config._attn_implementation,
        torch.get_float32_matmul_precision(),
    ]
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        told.append(torch.get_autocast_dtype(device.type))
    sums = {}  # device -> vectors
    for part in (encoder.vision_model, encoder.image_to_text_projection):
        for name, module in part.named_modules():
            if module.training:
                return None
            told.append(
                (name, type(module).__name__, *(getattr(module, key, None) for key in _ADAPTER_STATE))
            )
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for key, tensor in tensors:
                if torch.is_grad_enabled() and tensor.requires_grad:
                    return None
                for plain in _plain_tensors(module, key, tensor):
                    if plain is None:
                        return None
                    told.append((key, plain.dtype, tuple(plain.shape)))
                    sums.setdefault(plain.device, []).append(_block_sums(plain))
    totals = []
    for vectors in sums.values():
        values = torch.cat(vectors)
        # as splitmix64 does, so that changes at several places do not cancel out
        values ^= torch.arange(1, len(values) + 1, device=values.device) * -7046029254386353131
        values = (values ^ (values >> 30)) * -4658895280553007687
        totals.append((values ^ (values >> 27)).sum())
    return hashlib.sha256(repr((told, [total.item() for total in totals])).encode()).digest()


def _plain_tensors(module, key, tensor) -> Iterator[torch.Tensor | None]:
    """The tensors of plain numbers that a weight consists of; None for one that is not here to be read."""
    if hasattr(tensor, "__tensor_flatten__"):  # quantised
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(module, key, getattr(tensor, inner))
        return
    if tensor.is_meta:  # offloaded layer by layer: accelerate keeps it with the hook that fetches it
        hook = getattr(module, "_hf_hook", None)
        maps = [getattr(one, "weights_map", None) for one in getattr(hook, "hooks", [hook])]
        tensor = next((weights[key] for weights in maps if weights is not None), None)
    yield tensor
    # of bitsandbytes, which has scales beside the weights
    state = getattr(tensor, "quant_state", None)
    scales = [getattr(place, "SCB", None) for place in (tensor, getattr(module, "state", None))]
    scales += [getattr(place, "absmax", None) for place in (state, getattr(state, "state2", None))]
    yield from filter(torch.is_tensor, [*scales, getattr(state, "offset", None)])


def _block_sums(tensor):
    """Sums of a tensor's bytes, read as int64, `_ADDED` of them each; exact, whatever their order."""
    words = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if words.numel() % 8 or words.data_ptr() % 8:
        words = nn.functional.pad(words, (0, -words.numel() % 8)).clone()
    words = words.view(torch.int64)
    whole = words.numel() // (_ADDED * _APART) * _ADDED * _APART
    return torch.cat([words[:whole].view(-1, _ADDED, _APART).sum(1).flatten(), words[whole:]])


@dataclass
class _PromptRow:
    """One prompt on the host: ids, mask of real tokens, slots of images, and where each image comes from, in order."""

    ids: list
    mask: list
    slots: list
    # per image: None for the next one of pixel_values, else (index of the image word, its image)
    sources: list

    @classmethod
    def trim(cls, ids, mask, slots):
        columns = enumerate(zip(mask, slots, strict=True), 1)
        length = max((number for number, column in columns if any(column)), default=1)
        return cls(ids[:length], mask[:length], slots[:length], [])

    @property
    def key(self):
        return (*self.ids, *self.mask, *self.sources)  # two image words are spelled with the same ids

    def token_sources(self, config):
        """What each token is of, see KosmosGTextEncoderOutput; to be called before image words are spelled out."""
        sources, number = [], -1
        for token, real, slot in zip(self.ids, self.mask, self.slots, strict=True):
            word = token - config.text_config.vocab_size
            if 0 <= word < len(config.image_words):
                number += 1
                sources += [number] * (config.image_words[word][1] * (config.latent_query_num + 2))
                continue
            number += token == config.image_token_id and not slot
            if slot or token in (config.image_token_id, config.end_of_image_token_id):
                sources.append(number)
            elif not real:
                sources.append(PADDING)
            else:
                is_null = not sources and token == config.text_config.bos_token_id
                sources.append(NULL_TOKEN if is_null else WORDS)
        return sources

    def spell_out_image_words(self, config, where):
        """Replace each image word by `<image>`, Q slots and `</image>` for each of its images; `where` begins an error."""
        vocabulary, q = config.text_config.vocab_size, config.latent_query_num
        if max(self.ids) < vocabulary:
            self.sources = [None] * (sum(self.slots) // q)
            return
        ids, mask, slots, seen = [], [], [], 0
        for token, real, slot in zip(self.ids, self.mask, self.slots, strict=True):
            word = token - vocabulary
            if word < 0:
                ids.append(token)
                mask.append(real)
                slots.append(slot)
                if slot and seen % q == 0:
                    self.sources.append(None)
                seen += slot
                continue
            if word >= len(config.image_words):
                raise ValueError(
                    f"{where} holds the token id {token}; the vocabulary has {vocabulary} ids and "
                    f"{len(config.image_words)} image words behind them. Add the word with add_image_word on a pipeline "
                    "that holds both this encoder and the tokenizer."
                )
            for image in range(config.image_words[word][1]):
                ids += [config.image_token_id] * (1 + q) + [config.end_of_image_token_id]
                mask += [real] * (q + 2)
                slots += [0] + [1] * q + [0]
                self.sources.append((word, image))
        self.ids, self.mask, self.slots = ids, mask, slots


@dataclass
class _Batch:
    """What `get_condition` takes, on the device, and how its rows map back to the prompts."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None  # None when no row has padding
    image_token_mask: torch.Tensor | None
    row_of_prompt: torch.Tensor | None
    sources: list
    token_sources: list  # of each prompt, those that are computed once as well

    @classmethod
    def build(cls, prompts, row_of_prompt, token_sources, config, device):
        length = max(len(prompt.ids) for prompt in prompts)

        def stack(name, fill, dtype):
            rows = [getattr(prompt, name) + [fill] * (length - len(prompt.ids)) for prompt in prompts]
            return torch.tensor(rows, dtype=dtype, device=device)

        sources = [source for prompt in prompts for source in prompt.sources]
        padded = any(len(prompt.ids) < length or not all(prompt.mask) for prompt in prompts)
        return cls(
            input_ids=stack("ids", config.text_config.pad_token_id, torch.int64),
            attention_mask=stack("mask", 0, torch.bool) if padded else None,
            image_token_mask=stack("slots", 0, torch.bool) if sources else None,
            row_of_prompt=None if row_of_prompt is None else torch.tensor(row_of_prompt, device=device),
            sources=sources,
            token_sources=[row + [PADDING] * (length - len(row)) for row in token_sources],
        )

    def gather_image_embeds(self, image_embeds, image_words):
        """(N, Q, D) states of images and words in reading order, or None."""
        if not any(self.sources):
            return image_embeds
        given = iter(image_embeds if image_embeds is not None else ())
        device = self.input_ids.device
        words = {word: image_words[word]().to(device) for word, _ in filter(None, self.sources)}
        states = [next(given) if place is None else words[place[0]][place[1]] for place in self.sources]
        return torch.stack(states)


# save_pretrained puts a copy of this file into the folder
KosmosGTextEncoderConfig.register_for_auto_class()
KosmosGTextEncoder.register_for_auto_class("AutoModel")
