"""Several sources mixed into batches. Everything about a batch follows from (seed, step), so resuming is one integer.

Letters: B samples a process, P processes, G = B * P samples of the global batch.
"""

import hashlib
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.data

from ..files import hash_bytes
from .lengths import Lengths
from .sample import BadSample, FilteredSample, Sample, Source


class Collate(Protocol):
    """What turns samples of one source into a batch, see collate.py."""

    def prepare(self, sample: Sample, generator: torch.Generator) -> dict[str, Any]: ...

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]: ...


FILTERED = "filtered: "  # causes that begin so do not count as bad data
SCHEDULE_BLOCK = 4096
MOST_ATTEMPTS = 100


class MixtureDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """`dataset[step]` is the batch of this process for micro-batch number `step`, 0, 1, ... without end.

    Read it with `DataLoader(dataset, batch_size=None, sampler=range(first, last), num_workers=n)`; the batches do not
    depend on the number of workers. P processes together read what one process reads with the batch P * B.

    A batch comes from one source, drawn by weight. It holds the next G positions of the source's endless shuffled
    order (epoch after epoch, every sample once in each), of which process p takes rows p * B to (p + 1) * B. With
    `bucket_window` W > 1, the G * W samples of W successive batches of a source are sorted by length and cut into
    batches, which come in a shuffled order: less padding, the same samples.

    A sample that raises BadSample is counted and replaced by another of its source, also drawn from the seed.

    Args:
        sources: see `Source`.
        collate: object with `prepare(sample, generator)` -> row, which may raise BadSample and draws the random numbers
            of training, and `__call__(rows)` -> dict of tensors. See collate.py. Or a list of them, one for each source.
        batch_size: samples of this process (B).
        weights: how often each source is drawn, in any unit; None draws all alike.
        seed: of the order, the mixing, and every random number of a sample.
        process_index, num_processes: which part of the global batch is ours.
        bucket_window: W above; 1 keeps the shuffled order.
        shuffle_window: see `EndlessOrder`.

    A batch has, besides the tensors of `collate`: `source` (its name), `keys` (of the samples), `skipped` (cause ->
    count of what had to be replaced) and `skipped_messages` (a pair of cause and text for each of them).

    Raises:
        ValueError: no sources, an empty one, weights or collates that do not fit them, sizes below 1.
    """

    sources: list[Source]
    collates: list[Collate]
    batch_size: int
    weights: np.ndarray
    seed: int
    process_index: int
    num_processes: int
    bucket_window: int
    orders: list["EndlessOrder"]

    def __init__(
        self,
        sources: Iterable[Source],
        collate: Collate | Sequence[Collate],
        *,
        batch_size: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        bucket_window: int = 1,
        shuffle_window: int = 65_536,
    ):
        self.sources = list(sources)
        self.collates = list(collate) if isinstance(collate, (list, tuple)) else [collate] * len(self.sources)
        self.batch_size, self.seed, self.bucket_window = batch_size, int(seed), bucket_window
        self.process_index, self.num_processes = process_index, num_processes
        self.weights = _check_weights(self.sources, weights)
        if len(self.collates) != len(self.sources):
            raise ValueError(
                f"{len(self.collates)} collates were given for {len(self.sources)} sources. Pass one for each, or one for all."
            )
        counts = {"batch_size": batch_size, "num_processes": num_processes}
        counts |= {"bucket_window": bucket_window, "shuffle_window": shuffle_window}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value} was given. It is a count: at least 1 is expected.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index={process_index} was given. Expected 0 to {num_processes - 1}.")
        self.orders = [
            EndlessOrder(source.groups, stream_seed(self.seed, "order", number), shuffle_window)
            for number, source in enumerate(self.sources)
        ]
        self._lengths = [Lengths(*pair) for pair in zip(self.sources, self.orders, strict=True)]
        self._schedule_blocks = Memo(self._draw_schedule, 4)
        # batches of each source before block b
        self._counts_before = [np.zeros(len(self.sources), dtype=np.int64)]
        self._bucket = Memo(self._sort_window, 2 * len(self.sources))

    def __getitem__(self, step: int) -> dict[str, Any]:
        source, batch = self.locate(step)
        first = self.process_index * self.batch_size
        positions = self._positions(source, batch)[first : first + self.batch_size]
        positions = positions.tolist() if isinstance(positions, np.ndarray) else positions
        skipped = []
        keys, rows = zip(*[self._prepare(source, position, skipped) for position in positions], strict=True)
        result = self.collates[source](list(rows))
        causes = [FILTERED * isinstance(error, FilteredSample) + error.cause for error in skipped]
        result["source"] = self.sources[source].name
        result["keys"] = list(keys)
        result["skipped"] = dict(Counter(causes))
        result["skipped_messages"] = list(zip(causes, [error.message for error in skipped], strict=True))
        return result

    def describe_sources(self) -> list[dict[str, Any]]:
        """What the order of the data depends on besides the seed: name, samples and a hash of the files' samples of each source."""
        return [
            {
                "name": source.name,
                "samples": len(source),
                "files": hash_bytes(np.asarray(source.groups, dtype=np.int64).tobytes())[:16],
            }
            for source in self.sources
        ]

    def locate(self, step: int) -> tuple[int, int]:
        """(number of the source that batch `step` comes from, how many batches came from it before)."""
        block, rest = divmod(step, SCHEDULE_BLOCK)
        while len(self._counts_before) <= block:  # 4096 steps at a time: a few milliseconds for a long run
            drawn = self._schedule_blocks(len(self._counts_before) - 1)
            counts = np.bincount(drawn, minlength=len(self.sources))
            self._counts_before.append(self._counts_before[-1] + counts)
        drawn = self._schedule_blocks(block)
        source = int(drawn[rest])
        return source, int(self._counts_before[block][source] + np.count_nonzero(drawn[:rest] == source))

    def positions(self, source: int, batch: int) -> Sequence[int]:
        """Positions in a source's endless order that its global batch number `batch` holds: G integers."""
        positions = self._positions(source, batch)
        return positions.tolist() if isinstance(positions, np.ndarray) else positions

    def _positions(self, source, batch):
        """As `positions`, an array or a range."""
        size = self.batch_size * self.num_processes
        if self.bucket_window == 1:
            return range(batch * size, (batch + 1) * size)
        window, rest = divmod(batch, self.bucket_window)
        return self._bucket(source, window)[rest]

    def _draw_schedule(self, block):
        rng = np.random.default_rng(stream_seed(self.seed, "schedule", block))
        return rng.choice(len(self.sources), size=SCHEDULE_BLOCK, p=self.weights)

    def _sort_window(self, source, window):
        """(W, G) positions: each row a batch of samples of like length."""
        size = self.batch_size * self.num_processes * self.bucket_window
        positions = np.arange(window * size, (window + 1) * size)
        lengths = self._lengths[source].take(self.orders[source].take(positions))
        if 0 <= lengths.min() and lengths.max() <= np.iinfo(np.uint16).max:
            lengths = lengths.astype(np.uint16)  # which numpy sorts in one pass
        batches = positions[np.argsort(lengths, kind="stable")].reshape(self.bucket_window, -1)
        return np.random.default_rng(stream_seed(self.seed, "buckets", source, window)).permutation(batches)

    def draw(self, source: int, position: int, attempt: int = 0) -> tuple[Sample, dict[str, Any]]:
        """The sample at a position of a source's order, or its replacement number `attempt`, and the row that is made of it.

        Raises:
            BadSample: it cannot be used.
        """
        # the seeds hold the position, not the index: a sample is varied anew in every epoch
        rng = random.Random(stream_seed(self.seed, "sample", source, position, attempt))
        chosen = self.sources[source]
        index = self.orders[source][position] if attempt == 0 else rng.randrange(len(chosen))
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "training", source, position))
        sample = chosen.read(index, rng)
        return sample, self.collates[source].prepare(sample, generator)

    def _prepare(self, number, position, skipped):
        """(key, row) of the sample at a position, or of the first of its replacements that can be used."""
        source, first_error = self.sources[number], None
        for attempt in count():
            try:
                sample, row = self.draw(number, position, attempt)
                return sample.key, row
            except BadSample as error:
                skipped.append(error)
                first_error = first_error or error
            if attempt + 1 == MOST_ATTEMPTS:
                raise ValueError(
                    f"{MOST_ATTEMPTS} samples in a row of source {source.name!r} ({len(source):,} samples) cannot be "
                    f"used; the first: {first_error}. Fix the data or take the source out of the mixture."
                )


def add_share(weights: Sequence[float], share: float, count: int) -> list[float]:
    """Weights with those of `count` more sources behind them, which together get `share` (0 to 1) of the batches."""
    return [*weights, *[share / (1 - share) * sum(weights) / count] * count]


def _check_weights(sources, weights):
    """The weights as probabilities."""
    if not sources:
        raise ValueError("No data was given. Pass at least one source of training data.")
    for source in sources:
        if len(source) == 0:
            raise ValueError(f"Source {source.name!r} holds no samples. Check its path, or leave it out.")
    weights = np.ones(len(sources)) if weights is None else np.asarray(weights, dtype=np.float64)
    names = ", ".join(source.name for source in sources)
    if weights.shape != (len(sources),):
        raise ValueError(
            f"{weights.size} weights were given for {len(sources)} sources ({names}). Pass one weight for each source."
        )
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError(
            f"The weights {weights.tolist()} of the sources {names} were given. "
            "Expected positive numbers; leave a source out instead of giving it the weight 0."
        )
    return weights / weights.sum()


# The endless shuffled order of one source, computed from a position alone: nothing has to be remembered to resume. ------


def stream_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that is well mixed even when the parts (ints and strings) differ by little."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Memo:
    """The last few results of a function of hashable arguments. Dropped when pickled, so that workers start small."""

    function: Callable[..., Any]
    size: int
    results: OrderedDict[Any, Any]

    def __init__(self, function: Callable[..., Any], size: int):
        self.function, self.size, self.results = function, size, OrderedDict()

    def __call__(self, *arguments: Hashable) -> Any:
        if arguments in self.results:
            self.results.move_to_end(arguments)
            return self.results[arguments]
        result = self.results[arguments] = self.function(*arguments)
        if len(self.results) > self.size:
            self.results.popitem(last=False)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "size": self.size, "results": OrderedDict()}


class EndlessOrder:
    """Position -> index: epoch after epoch, in each of them every sample once.

    In an epoch the groups (files, shards) are permuted; then neighbours are joined to windows of about
    `shuffle_window` samples, and each window is permuted. So only a few files are in use at a time, and a set of
    billions of samples needs no permutation of billions. A source smaller than the window is shuffled as a whole.

    Args:
        groups: samples in each file, in order. Groups larger than the window are cut, so that memory stays bounded.
        seed: two seeds give two orders.
        shuffle_window: samples; a window holds fewer than twice as many.
    """

    seed: int
    shuffle_window: int
    sizes: np.ndarray
    starts: np.ndarray
    total: int

    def __init__(self, groups: Sequence[int], seed: int, shuffle_window: int = 65_536):
        self.seed, self.shuffle_window = seed, shuffle_window
        sizes = np.asarray(groups, dtype=np.int64)
        if sizes.max(initial=0) > shuffle_window:
            sizes = np.concatenate([_cut(size, shuffle_window) for size in sizes.tolist()])
        self.sizes = sizes
        self.starts = np.cumsum(sizes) - sizes
        self.total = int(sizes.sum())
        self._epoch = Memo(self._shuffle_groups, 2)
        self._window = Memo(self._shuffle_window, 4)

    def __getitem__(self, position: int) -> int:
        epoch, rest = divmod(position, self.total)
        _, before, windows = self._epoch(epoch)
        window = int(windows[np.searchsorted(before, rest, side="right") - 1])
        first = int(before[np.searchsorted(windows, window)])
        return int(self._window(epoch, window)[rest - first])

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The indices at many positions, int64."""
        epochs, rests = np.divmod(positions, self.total)
        found = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            _, before, windows = self._epoch(epoch)
            of_epoch = np.flatnonzero(epochs == epoch)
            of_window = windows[np.searchsorted(before, rests[of_epoch], side="right") - 1]
            for window in np.unique(of_window).tolist():
                chosen = of_epoch[of_window == window]
                first = int(before[np.searchsorted(windows, window)])
                found[chosen] = self._window(epoch, window)[rests[chosen] - first]
        return found

    def _shuffle_groups(self, epoch):
        """(groups in the epoch's order, samples before each, number of the window each belongs to)."""
        groups = np.random.default_rng(stream_seed(self.seed, "groups", epoch)).permutation(len(self.sizes))
        groups = groups[self.sizes[groups] > 0]
        sizes = self.sizes[groups]
        before = np.cumsum(sizes) - sizes
        return groups, before, before // self.shuffle_window

    def _shuffle_window(self, epoch, window):
        """The indices of one window of an epoch, shuffled."""
        groups, _, windows = self._epoch(epoch)
        members = groups[np.searchsorted(windows, window) : np.searchsorted(windows, window, side="right")]
        starts, sizes = self.starts[members], self.sizes[members]
        indices = np.concatenate([start + np.arange(size) for start, size in zip(starts, sizes, strict=True)])
        return np.random.default_rng(stream_seed(self.seed, "window", epoch, window)).permutation(indices)


def _cut(size, most):
    whole, rest = divmod(size, most)
    return np.array([most] * whole + [rest] * bool(rest), dtype=np.int64)
