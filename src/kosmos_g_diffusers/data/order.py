"""The endless shuffled order of one source, computed from a position alone: nothing has to be remembered to resume."""

import hashlib
from collections import OrderedDict

import numpy as np


def derive_seed(*parts):
    """A seed in [0, 2**63) that is well mixed even when the parts (ints and strings) differ by little."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Memo:
    """The last few results of a function of hashable arguments. Dropped when pickled, so that workers start small."""

    def __init__(self, function, size):
        self.function, self.size, self.results = function, size, OrderedDict()

    def __call__(self, *arguments):
        if arguments in self.results:
            self.results.move_to_end(arguments)
            return self.results[arguments]
        result = self.results[arguments] = self.function(*arguments)
        if len(self.results) > self.size:
            self.results.popitem(last=False)
        return result

    def __getstate__(self):
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

    def __init__(self, groups, seed, shuffle_window=65_536):
        self.seed, self.shuffle_window = seed, shuffle_window
        sizes = np.asarray(groups, dtype=np.int64)
        if sizes.max(initial=0) > shuffle_window:
            sizes = np.concatenate([_cut(size, shuffle_window) for size in sizes.tolist()])
        self.sizes = sizes
        self.starts = np.cumsum(sizes) - sizes
        self.total = int(sizes.sum())
        self._epoch = Memo(self._shuffle_groups, 2)
        self._window = Memo(self._shuffle_window, 4)

    def __getitem__(self, position):
        epoch, rest = divmod(position, self.total)
        _, before, windows = self._epoch(epoch)
        window = int(windows[np.searchsorted(before, rest, side="right") - 1])
        first = int(before[np.searchsorted(windows, window)])
        return int(self._window(epoch, window)[rest - first])

    def _shuffle_groups(self, epoch):
        """(groups in the epoch's order, samples before each, number of the window each belongs to)."""
        groups = np.random.default_rng(derive_seed(self.seed, "groups", epoch)).permutation(len(self.sizes))
        groups = groups[self.sizes[groups] > 0]
        sizes = self.sizes[groups]
        before = np.cumsum(sizes) - sizes
        return groups, before, before // self.shuffle_window

    def _shuffle_window(self, epoch, window):
        """The indices of one window of an epoch, shuffled."""
        groups, _, windows = self._epoch(epoch)
        members = groups[np.searchsorted(windows, window) : np.searchsorted(windows, window, side="right")]
        indices = np.concatenate(
            [np.arange(self.starts[group], self.starts[group] + self.sizes[group]) for group in members]
        )
        return np.random.default_rng(derive_seed(self.seed, "window", epoch, window)).permutation(indices)


def _cut(size, most):
    whole, rest = divmod(size, most)
    return np.array([most] * whole + [rest] * bool(rest), dtype=np.int64)
