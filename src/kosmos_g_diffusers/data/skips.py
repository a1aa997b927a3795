"""Keeps account of the samples that could not be used, and stops the run when they are too many."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .mixture import FILTERED

if TYPE_CHECKING:
    from accelerate import Accelerator

EXAMPLES = 3  # messages kept for each cause
LEAST_SEEN = 100  # samples before the share of bad ones means anything
FIRST, MOST_LEFT_OUT = (
    1000,
    0.1,
)  # samples after which a run says so if more of them than this share were left out


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
    kept: set[str]

    def __init__(self, limit: float = 0.01):
        if not 0 <= limit <= 1:
            raise ValueError(f"A limit of {limit} was given. Expected a share of bad samples, 0 to 1.")
        self.limit = limit
        self.seen, self.counts, self.examples = 0, Counter(), {}
        self.kept = set()  # keys of the first samples that were used

    @property
    def bad(self) -> int:
        return sum(number for cause, number in self.counts.items() if not cause.startswith(FILTERED))

    @property
    def left_out(self) -> int:
        return sum(self.counts.values())

    @property
    def read(self) -> int:
        """Samples that were looked at: those used, and all that were left out."""
        return self.seen - self.bad + self.left_out

    def add(
        self,
        used: int,
        skipped: Mapping[str, int],
        messages: Iterable[tuple[str, str]],
        keys: Iterable[str] = (),
    ) -> str | None:
        """Count what batches of `MixtureDataset` had to replace.

        Args:
            used: samples that went into batches.
            skipped: cause -> number of samples that were replaced.
            messages: (cause, text) pairs, any number of them.
            keys: of the samples used.

        Returns:
            A warning, once: when the first thousand samples are read, if more than a tenth of them were left out.

        Raises:
            TooManyBadSamples: the limit is passed.
        """
        bad, begins = self.bad, self.read < FIRST
        if begins:
            self.kept.update(keys)
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
        if begins and self.read >= FIRST and self.left_out > MOST_LEFT_OUT * self.read:
            return self._warning()
        return None

    def _warning(self):
        cause, number = self.counts.most_common(1)[0]
        example = self.examples.get(cause, ["(no example)"])[0]
        different = f"{len(self.kept):,} different ones" if self.kept else "others"
        return (
            f"Warning: {self.left_out:,} of the first {self.read:,} samples were left out and replaced by others; what trains is "
            f"{self.read - self.left_out:,} samples, {different}. {number:,} times {cause}, such as {example}. docs/data.md says "
            "what each cause means, and which setting decides it."
        )

    def summary(self) -> str:
        """A line for each cause, the most frequent first, with examples; one line when nothing was skipped."""
        if not self.counts:
            return f"All {self.seen:,} samples read could be used."
        lines = [f"{self.left_out:,} of {self.read:,} samples read could not be used and were replaced:"]
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
        self._forget()

    def note(self, batch: Mapping[str, Any]) -> None:
        """Note what `batch` (of `MixtureDataset`) had to replace."""
        self._used += len(batch["keys"])
        if self.counter.read < FIRST:
            self._keys |= set(batch["keys"])
        self._skipped.update(batch["skipped"])
        self._messages += batch["skipped_messages"]

    def count(self) -> list[str]:
        """Add what was noted to the counter, on all processes alike; returns its warnings. Raises TooManyBadSamples."""
        noted = [(self._used, self._skipped, self._messages, self._keys)]
        self._forget()
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            noted = gather_object(noted)
        warnings = [self.counter.add(*one) for one in noted]
        return [warning for warning in warnings if warning]

    def _forget(self):
        self._used, self._skipped, self._messages, self._keys = 0, Counter(), [], set()
