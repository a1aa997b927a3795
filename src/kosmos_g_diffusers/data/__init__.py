"""Training data: sources, their mixture, and the tensors of each stage. docs/data.md describes the formats."""

from typing import TYPE_CHECKING

from ..environment import lazy_names

if TYPE_CHECKING:
    from .collate import AlignCollate, InstructCollate, PretrainCollate, preprocess_target
    from .hub_datasets import HubDatasetSource
    from .mixture import MixtureDataset, add_share
    from .sample import IMAGE_LENGTH, BadSample, FilteredSample, Sample, Source
    from .shard_writer import ShardWriter, write_shard_index
    from .shards import ShardSource
    from .skips import SkipCounter, TooManyBadSamples
    from .sources import build_source
    from .tsv import TsvSource

__all__ = [
    "IMAGE_LENGTH",
    "AlignCollate",
    "BadSample",
    "FilteredSample",
    "HubDatasetSource",
    "InstructCollate",
    "MixtureDataset",
    "PretrainCollate",
    "Sample",
    "ShardSource",
    "ShardWriter",
    "SkipCounter",
    "Source",
    "TooManyBadSamples",
    "TsvSource",
    "add_share",
    "build_source",
    "preprocess_target",
    "write_shard_index",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".collate": "AlignCollate InstructCollate PretrainCollate preprocess_target",
        ".hub_datasets": "HubDatasetSource",
        ".mixture": "MixtureDataset add_share",
        ".sample": "IMAGE_LENGTH BadSample FilteredSample Sample Source",
        ".shard_writer": "ShardWriter write_shard_index",
        ".shards": "ShardSource",
        ".skips": "SkipCounter TooManyBadSamples",
        ".sources": "build_source",
        ".tsv": "TsvSource",
    },
)
