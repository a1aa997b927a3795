"""Models of diffusers and transformers, loaded so that every weight comes from the files and none is random."""

import torch
from diffusers import ModelMixin
from diffusers.pipelines import pipeline_utils

# diffusers renamed the keyword; older releases know only the second
DTYPE_KEYWORD = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"


class IncompleteWeights(ValueError):
    """Weights that are missing or have another shape; `names` are those, sorted."""

    def __init__(self, names):
        super().__init__(f"{len(names)} weights are missing or have another shape, such as {names[0]}")
        self.names = names


def load_pretrained(model_class, source, *, dtype=torch.float32, **options):
    """`model_class.from_pretrained` that refuses what the library would fill with random numbers.

    Args:
        model_class: of diffusers or of transformers.
        source: folder or Hub id.
        dtype: torch dtype of the weights.
        options: of `from_pretrained`, such as `subfolder`.

    Returns:
        The model, on the CPU.

    Raises:
        IncompleteWeights: weights are missing or have another shape.
        OSError: the model cannot be found or fetched.
    """
    keyword = DTYPE_KEYWORD if issubclass(model_class, ModelMixin) else "dtype"
    model, info = model_class.from_pretrained(source, output_loading_info=True, **{keyword: dtype}, **options)
    keys = [*info["missing_keys"], *info.get("mismatched_keys", ())]
    names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
    if names:
        raise IncompleteWeights(names)
    return model
