"""Models of diffusers and transformers, loaded so that every weight comes from the files and none is random."""

import math
import os
import re
import traceback
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from .files import first_line, read_json
from .quiet import brief_bars

Model = TypeVar("Model", bound=torch.nn.Module)

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of files with weights
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Names that files have and models do not: (pattern, what stands for it today or None, why it does no harm)
HARMLESS = (
    (
        r"(\.attentions\.\d+)\.query\.",
        r"\1.to_q.",
        "diffusers renames the VAE's attention of its releases before 0.15",
    ),
    (r"(\.attentions\.\d+)\.key\.", r"\1.to_k.", "the same"),
    (r"(\.attentions\.\d+)\.value\.", r"\1.to_v.", "the same"),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0.", "the same"),
    (r"\b(vision|text)_model\.", "", "CLIP's towers have a level less in transformers 5, which renames them"),
    (r"\bposition_ids$", None, "the numbers 0, 1, 2, ..., which transformers saved before 4.31"),
    (r"\bnum_batches_tracked$", None, "a counter of batch norms that only training reads"),
    (r"\.to_(qkv|kv)\.", None, "fuse_qkv_projections makes it of weights that are there as well"),
)


class IncompleteWeights(ValueError):
    """Weights that are missing or have another shape; `names` are those, sorted."""

    names: Sequence[str]

    def __init__(self, names: Sequence[str], file: str | Path | None = None):
        place = "" if file is None else f"{file}: "
        super().__init__(f"{place}{len(names)} weights are missing or have another shape, such as {names[0]}")
        self.names = names


def load_pretrained(
    model_class: type[Model],
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    whole: bool = True,
    **options: Any,
) -> Model:
    """`model_class.from_pretrained` that refuses weights which are not those of the model.

    Args:
        model_class: of diffusers or of transformers.
        source: folder or Hub id.
        dtype: torch dtype of the weights.
        whole: the files hold this model and nothing else. False for a part of a larger one, or one whose weights
            transformers renames: then it says what is missing, and nothing is foreign.
        options: of `from_pretrained`, such as `subfolder`.

    Returns:
        The model, on the CPU.

    Raises:
        IncompleteWeights: weights are missing or have another shape.
        OSError: the model cannot be found or fetched.
        ValueError: a file is damaged, or weights are foreign, integers or not finite.
    """
    _check_source(source)
    place = (source, options.get("subfolder"), options.get("variant"))
    try:
        with brief_bars():
            if issubclass(model_class, ModelMixin):
                model, missing = model_class.from_pretrained(source, dtype=dtype, **options), ()
            else:
                loading_info = {"output_loading_info": True, "dtype": dtype}
                model, info = model_class.from_pretrained(source, **loading_info, **options)
                missing = [*info["missing_keys"], *info.get("mismatched_keys", ())]
    except Exception as error:
        if options.get("quantization_config") is not None and not isinstance(error, (OSError, ValueError)):
            raise  # of the library that quantises, in its own words
        if isinstance(error, OSError) and not Path(source).exists():
            raise _not_fetched(source, error) from error
        folder = Path(source) / (options.get("subfolder") or "")
        raise _explained(error, weight_files(*place), folder, model_class) from error
    paths = weight_files(*place)
    if missing:
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in missing)
        raise IncompleteWeights(names, paths[0].parent if paths else source)
    check_weights(model, paths, whole)
    return model


def load_pipeline(load: Callable[..., Model], source: str | Path, **options: Any) -> Model:
    """`from_pretrained` of a pipeline, `load`, that refuses what `load_pretrained` refuses, in every part it reads.

    Raises:
        OSError, ValueError: the file or the part is named.
    """
    _check_source(source)
    folder = Path(source)
    index = folder / "model_index.json"
    if index.is_file():
        read_object(index, "Expected the folder of a pipeline: convert or download it again.")
    try:
        with brief_bars():
            loaded = load(source, **options)
    except Exception as error:
        if options.get("quantization_config") is not None and not isinstance(error, (OSError, ValueError)):
            raise  # of the library that quantises, in its own words
        if isinstance(error, OSError) and not folder.exists():
            raise _not_fetched(source, error) from error
        part, model_class = _part_of(error)
        if not part and index.is_file() and not isinstance(error, OSError):
            part = "model_index.json"
        named, place = f"{part} of {source}" if part else str(source), folder / (part or "")
        is_model = isinstance(model_class, type) and issubclass(model_class, torch.nn.Module)
        paths = weight_files(place, variant=options.get("variant")) if is_model else []
        prefix = f"{named} cannot be loaded: "
        raise _explained(error, paths, place, model_class if is_model else None, prefix) from error
    pipe = loaded[0] if isinstance(loaded, tuple) else loaded
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module) and name not in options:
            place = getattr(model.config, "_name_or_path", None) or folder / name
            check_weights(model, weight_files(place, variant=options.get("variant")))
    return loaded


def load_single_file(model_class: type[Model], path: str | Path, like: Any = None, **options: Any) -> Model:
    """`model_class.from_single_file` that refuses what `load_pretrained` refuses.

    Args:
        like: a model with the layers that are expected, with which the file is compared before it is read.
        options: of `from_single_file`.
    """
    try:
        if like is not None:
            _compare(like, _renamed(model_class, like, declared_weights([path])), path, whole=False)
        model = model_class.from_single_file(str(path), **options)
        if like is None:
            _compare(model, _renamed(model_class, model, declared_weights([path])), path, whole=False)
    except Exception as error:
        raise _explained(error, [path]) from error
    _check_finite(model, path)
    return model


def read_object(path: str | Path, expected: str) -> dict[str, Any]:
    """`files.read_json` for a file that must hold an object."""
    values = read_json(path, expected)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__} where a JSON object belongs. {expected}")
    return values


def empty_model(model_class: type[Model], folder: str | Path) -> Model:
    """A model as the config.json of its folder describes it, on the meta device.

    Raises:
        ValueError: it does not describe one; the message names the file.
    """
    path = Path(folder) / "config.json"
    values = read_object(path, "Download or make it again.")
    try:
        with torch.device("meta"):
            if issubclass(model_class, ModelMixin):
                return model_class.from_config(values)
            return model_class(model_class.config_class.from_pretrained(folder))
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise ValueError(
            f"{path} does not describe a {model_class.__name__} ({reason}). Download or make it again."
        ) from error


# What files say of their weights, without reading them -----------------------------------------------------------------


def weight_files(source: str | Path, subfolder: str | None = None, variant: str | None = None) -> list[Path]:
    """The files that a model was or will be loaded from, as diffusers and transformers choose them.

    Args:
        source: folder, or Hub id of what is in the cache.
        subfolder, variant: as for `from_pretrained`.

    Returns:
        List of paths; empty where no file of a known name is.
    """
    for kind in ("safetensors", "bin"):
        for mark in [f".{variant}", ""] if variant else [""]:
            for stem in STEMS:
                for index in (f"{stem}.{kind}.index{mark}.json", f"{stem}{mark}.{kind}.index.json"):
                    path = _file(source, subfolder, index)
                    if path is not None:
                        names = read_object(path, "Expected the index of a model's files.").get("weight_map")
                        return [path.with_name(name) for name in sorted(set(names.values()))]
                path = _file(source, subfolder, f"{stem}{mark}.{kind}")
                if path is not None:
                    return [path]
    return []


def _file(source, subfolder, name):
    """Path of a file of a folder or of a repository in the cache, or None."""
    name = f"{subfolder}/{name}" if subfolder else name
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    if str(source).count("/") != 1:
        return None
    found = try_to_load_from_cache(str(source), name)
    return Path(found) if isinstance(found, str) else None


def declared_weights(paths: Iterable[str | Path]) -> dict[str, torch.Tensor]:
    """{name: empty tensor on the meta device} of files with weights, from their headers.

    Raises:
        ValueError: a file is not one of weights, or damaged.
    """
    declared = {}
    for path in map(Path, paths):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        part = file.get_slice(name)
                        declared[name] = torch.empty(
                            part.get_shape(), dtype=_dtype(part.get_dtype()), device="meta"
                        )
            else:
                mapped = zipfile.is_zipfile(
                    path
                )  # torch's present format: nothing but names and shapes is read
                weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
                weights = weights.get("state_dict", weights)
                tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
                declared |= {name: value.to("meta") for name, value in tensors.items()}
        except Exception as error:  # damaged bytes make a reader raise nearly anything
            raise ValueError(
                f"{path} is damaged or not a file of weights ({first_line(error)}). Download or make it again."
            ) from error
    return declared


def _dtype(name):
    """safetensors' name of a dtype -> torch's; what it means is whether it counts as floating point."""
    if name.startswith("F8"):
        return torch.float8_e4m3fn
    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}.get(
        name, torch.int64
    )


def _renamed(model_class, model, declared):
    """Weights of a single file under the names of diffusers; those of other models in a whole checkpoint are left out."""
    if 2 * len(declared.keys() & model.state_dict().keys()) > len(declared):
        return declared
    name = next(
        name
        for name in (kind.__name__ for kind in model_class.__mro__)
        if name in SINGLE_FILE_LOADABLE_CLASSES
    )
    rename = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    try:
        return rename(config=dict(model.config), checkpoint=dict(declared))
    except KeyError as error:
        raise IncompleteWeights([str(error.args[0])]) from error


# Checks ------------------------------------------------------------------------------------------------------------------


def check_weights(model: torch.nn.Module, paths: Iterable[str | Path], whole: bool = True) -> None:
    """Compare a model that was loaded with what its files hold.

    Args:
        paths: of `weight_files`. Nothing is compared without any.
        whole: the files hold this model and nothing else, under names that `HARMLESS` relates to its own.

    Raises:
        IncompleteWeights: weights are missing or have another shape.
        ValueError: weights are integers, foreign or not finite, or a file is damaged.
    """
    if paths and getattr(model, "hf_quantizer", None) is None:
        file = paths[0] if len(paths) == 1 else Path(paths[0]).parent
        _compare(model, declared_weights(paths), file, whole)
        _check_finite(model, file)


def _compare(model, declared, file, whole):
    expected = model.state_dict()
    given = {_present_name(name, expected): value for name, value in declared.items()}
    integers = [
        name
        for name, value in given.items()
        if name in expected and expected[name].is_floating_point() and not value.is_floating_point()
    ]
    if integers:
        raise ValueError(
            f"{file}: {len(integers)} weights are integers where the model has floating-point numbers, such as {integers[0]}. "
            "A quantised model says so in its config: was the file damaged?"
        )
    wrong = [name for name in given if name in expected and given[name].shape != expected[name].shape]
    if whole:
        tied = {
            expected[name].data_ptr() for name in given if name in expected and not expected[name].is_meta
        } - {0}
        wrong += [
            name
            for name in expected
            if name not in given and (expected[name].is_meta or expected[name].data_ptr() not in tied)
        ]
    elif isinstance(model, ModelMixin):
        wrong += [name for name in expected if name not in given]
    if wrong:
        raise IncompleteWeights(sorted(wrong), file)
    foreign = sorted(name for name in given if name is not None and name not in expected) if whole else []
    if foreign:
        raise ValueError(
            f"{file}: {len(foreign)} weights are not those of a {type(model).__name__}, such as {foreign[0]}. Was it saved "
            "with an adapter, or made for another model?"
        )


def _present_name(name, expected):
    """The name in the model of a weight of a file; None for one that is left out without harm."""
    if name in expected:
        return name
    for pattern, today, _ in HARMLESS:
        if re.search(pattern, name):
            other = None if today is None else re.sub(pattern, today, name, count=1)
            if other is None or other in expected:
                return other
    return name


def _check_finite(model, file):
    for name, parameter in model.named_parameters():
        if parameter.dtype in FLOATS and not parameter.is_meta and parameter.numel():
            # by the extremes: in one pass without a copy, 30 ms for a GB
            if not all(map(math.isfinite, (extreme.item() for extreme in torch.aminmax(parameter.detach())))):
                half = " Does it hold in float32?" if parameter.dtype == torch.float16 else ""
                raise ValueError(
                    f"{file}: {name} has values that are NaN or infinite in {parameter.dtype}.{half}"
                )


# Errors of the libraries -------------------------------------------------------------------------------------------------


def _part_of(error):
    """(name, class) of the pipeline's part that diffusers was loading, or (None, None)."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load_sub_model":
            return frame.f_locals.get("name"), frame.f_locals.get("class_obj")
    return None, None


def _check_source(source):
    """Raise OSError for what is neither a path that is there nor of the form of a Hub id: nothing need be asked for it."""
    if not os.path.exists(source) and not HUB_ID.fullmatch(
        str(source)
    ):  # unlike Path, of names too long as well
        raise OSError(
            f"There is no folder {str(source)[:100]!r}, and a Hub id has the form owner/name. Pass one of them that is there."
        )


def _not_fetched(source, error):
    return OSError(
        f"{str(source)!r} is not a folder here, and it was not found in the Hub or its cache ({type(error).__name__}). Check its "
        "name and the network, or pass a folder."
    )


def _explained(error, paths, folder=None, model_class=None, prefix=""):
    """The exception that says what in a model's files made a library raise `error`; an OSError stays one.

    Args:
        paths: files with weights.
        folder: the JSON files in it are looked at as well.
        model_class: of the model in that folder.
        prefix: of the message.
    """
    if isinstance(error, (ImportError, MemoryError, IncompleteWeights)) or "trust_remote_code" in str(error):
        return error
    try:
        for path in sorted(folder.glob("*.json")) if folder is not None else ():
            read_object(path, "Download or make it again.")
        declared = declared_weights(paths)
        if paths and folder is not None and model_class is not None:
            model = empty_model(model_class, folder)
            _compare(model, declared, paths[0] if len(paths) == 1 else folder, whole=False)
    except IncompleteWeights as found:
        return found
    except ValueError as found:
        return ValueError(f"{prefix}{found}")
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, (OSError, ValueError)):
        return (OSError if isinstance(error, OSError) else ValueError)(f"{prefix}{reason}")
    return ValueError(f"{prefix}what it holds is not as expected ({type(error).__name__}: {reason})")
