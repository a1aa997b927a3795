"""Keeps account of the samples that could not be used, and stops the run when they are too many."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .mixture import FILTERED

if TYPE_CHECKING:
    from accelerate import Accelerator

EXAMPLES = 3  # messages kept for each cause
LEAST_SEEN = 100  # samples before the share of bad ones means anything


class TooManyBadSamples(RuntimeError):
    """The share of bad samples passed the limit."""


class SkipCounter:
    """Counts bad and filtered samples by cause. The loop calls `add` and logs `summary()` at the end.

    Args:
        limit: largest share of the samples read that may be bad; 1 never stops. Filtered samples do not count.

    `state_dict` and `load_state_dict` carry the counts over a resume.
    """

    limit: float
    seen: int
    counts: Counter[str]
    examples: dict[str, list[str]]

    def __init__(self, limit: float = 0.01):
        if not 0 <= limit <= 1:
            raise ValueError(f"A limit of {limit} was given. Expected a share of bad samples, 0 to 1.")
        self.limit = limit
        self.seen, self.counts, self.examples = 0, Counter(), {}

    @property
    def bad(self) -> int:
        return sum(number for cause, number in self.counts.items() if not cause.startswith(FILTERED))

    def add(self, used: int, skipped: Mapping[str, int], messages: Iterable[tuple[str, str]]) -> None:
        """Count what batches of `MixtureDataset` had to replace.

        Args:
            used: samples that went into batches.
            skipped: cause -> number of samples that were replaced.
            messages: (cause, text) pairs, any number of them.

        Raises:
            TooManyBadSamples: the limit is passed.
        """
        bad = self.bad
        self.counts.update(skipped)
        self.seen += used + self.bad - bad
        for cause, message in messages:
            examples = self.examples.setdefault(cause, [])
            if len(examples) < EXAMPLES and message not in examples:
                examples.append(message)
        if self.seen >= LEAST_SEEN and self.bad > self.limit * self.seen:
            raise TooManyBadSamples(
                f"{self.bad:,} of {self.seen:,} samples ({self.bad / self.seen:.2%}) could not be used, more than the "
                f"limit of {self.limit:.2%}.\n{self.summary()}\nFix the data, or raise the limit if this is expected."
            )

    def summary(self) -> str:
        """A line for each cause, the most frequent first, with examples; one line when nothing was skipped."""
        if not self.counts:
            return f"All {self.seen:,} samples read could be used."
        lines = [f"{self.bad:,} of {self.seen:,} samples read could not be used and were replaced:"]
        for cause, number in self.counts.most_common():
            examples = "; ".join(self.examples.get(cause, ["(no example)"]))
            lines.append(f"  {cause}: {number:,}, such as {examples}")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "counts": dict(self.counts), "examples": dict(self.examples)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.counts = state["seen"], Counter(state["counts"])
        self.examples = {cause: list(messages) for cause, messages in state["examples"].items()}


class GatheredSkips:
    """A SkipCounter of all processes of a run, which tell each other what they noted now and then.

    Args:
        limit: of the counter.
        accelerator: accelerate.Accelerator.
    """

    counter: SkipCounter
    accelerator: "Accelerator"

    def __init__(self, limit: float, accelerator: "Accelerator"):
        self.counter, self.accelerator = SkipCounter(limit), accelerator
        self._used, self._skipped, self._messages = 0, Counter(), []

    def note(self, batch: Mapping[str, Any]) -> None:
        """Note what `batch` (of `MixtureDataset`) had to replace."""
        self._used += len(batch["keys"])
        self._skipped.update(batch["skipped"])
        self._messages += batch["skipped_messages"]

    def count(self) -> None:
        """Add what was noted to the counter, on all processes alike. Raises TooManyBadSamples."""
        noted = [(self._used, self._skipped, self._messages)]
        self._used, self._skipped, self._messages = 0, Counter(), []
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            noted = gather_object(noted)
        for used, skipped, messages in noted:
            self.counter.add(used, skipped, messages)
