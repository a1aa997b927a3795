"""Notes and progress bars of other libraries that say nothing to who uses this package.

A note is held back by its logger and its words, for the reason that stands above it; everything else of these
libraries comes through. KOSMOS_G_VERBOSITY=verbose, or `kosmos-g -v`, brings the notes and bars back.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

from .environment import verbose

# name of a logger -> what its notes say
HELD_BACK: dict[str, tuple[str, ...]] = {
    # torchao is installed, and transformers imports it with itself: its kernels for accelerators that are not here
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torchao.kernel.intmm": ("Detected no triton",),
    # the package does without torchvision, and no graph holds its functions
    "torch.onnx._internal.exporter._registration": ("torchvision is not installed. Skipping",),
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
    # bitsandbytes is installed, and accelerate and peft import it: a faster product for CPUs that is not here
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # diffusers imports image processors with its pipelines; only safety checkers use one, and on the CPU either serves
    "transformers.utils.import_utils": (
        "`CLIPImageProcessor` requires torchvision",
        "`SiglipImageProcessor` requires torchvision",
    ),
    # accelerate is an extra: without it loading takes a little longer, and works
    # the second: of a cast such as that of from_pipe, with an empty list of what it leaves out
    "diffusers.models.modeling_utils": (
        "Cannot initialize model with low cpu memory usage",
        "that should be kept in float32: []",
    ),
    # without a network a copy in the cache is taken, and where there is none the error says so
    "diffusers.pipelines.pipeline_utils": (
        "Cannot initialize model with low cpu memory usage",
        "Couldn't connect to the Hub",
    ),
    "huggingface_hub.utils._http": ("thrown while requesting", "Retrying in "),
}
# of peft, when a second LoRA is loaded next to the first, as was asked for
SECOND_LORA = "Already found a `peft_config` attribute in the model"
SHORT = 1.0  # seconds that need no bar


class _HoldBack(logging.Filter):
    def filter(self, record):
        with contextlib.suppress(
            ValueError
        ):  # of a wrong verbosity, which is said where it can be understood
            if verbose():
                return True
        return not any(words in record.getMessage() for words in HELD_BACK[record.name])


def hold_back_notes() -> None:
    """Hold the notes back, from now on in this process. Imports none of the libraries; a second time does nothing."""
    for name in HELD_BACK:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _HoldBack) for known in logger.filters):
            logger.addFilter(_HoldBack())


@contextlib.contextmanager
def brief_bars() -> Iterator[None]:
    """While models are loaded or saved: transformers' bars where that takes longer than SHORT, no bar of diffusers,
    and no warning of a second LoRA.
    """
    if verbose():
        yield
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    def later(factory, args, kwargs):
        return factory(*args, **{"delay": SHORT, **kwargs})

    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    hook = transformers_logging.set_tqdm_hook(later)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", SECOND_LORA)
            yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        if shown:
            diffusers_logging.enable_progress_bar()
