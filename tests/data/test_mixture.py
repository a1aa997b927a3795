"""The mixture: order, mixing, buckets, processes, workers, replacement. All of it by property, on sources of numbers."""

import pickle
import random
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from kosmos_g_diffusers.data import BadSample, FilteredSample, MixtureDataset, Sample, add_share
from kosmos_g_diffusers.data.mixture import EndlessOrder


class Numbers:
    """A source whose sample i is the text "i"; its random number is the caption."""

    def __init__(self, groups, name="numbers", bad=(), filtered=()):
        self.groups, self.name, self.bad, self.filtered = groups, name, set(bad), set(filtered)

    def __len__(self):
        return sum(self.groups)

    def length(self, index):
        return index * 7 % 11

    def read(self, index, rng):
        if index in self.bad:
            raise BadSample("image", f"{self.name}:{index} is broken")
        if index in self.filtered:
            raise FilteredSample("small", f"{self.name}:{index} is small")
        return Sample(f"{self.name}:{index}", (str(index),), caption=str(rng.random()))


class Collate:
    """Rows of (index, random number of the source, random number of the training)."""

    def prepare(self, sample, generator):
        return int(sample.prompt[0]), float(sample.caption), torch.rand((), generator=generator).item()

    def __call__(self, rows):
        return {"rows": torch.tensor(rows, dtype=torch.float64)}


def mixture(sources, collate=None, **options):
    return MixtureDataset(sources, collate or Collate(), **({"batch_size": 4, "seed": 3} | options))


def rows(dataset, steps):
    return torch.cat([dataset[step]["rows"] for step in steps])


@pytest.mark.parametrize("groups", [[24], [5, 1, 0, 7, 11], [1] * 24, [3] * 8])
@pytest.mark.parametrize("shuffle_window", [1, 4, 9, 1000])
def test_every_sample_comes_exactly_once_in_an_epoch(groups, shuffle_window):
    order = EndlessOrder(groups, seed=0, shuffle_window=shuffle_window)
    for epoch in range(3):
        indices = [order[position] for position in range(24 * epoch, 24 * (epoch + 1))]
        assert sorted(indices) == list(range(24))


def test_epochs_seeds_and_nothing_else_change_the_order():
    first = [EndlessOrder([50, 50], 0)[position] for position in range(200)]
    again = EndlessOrder([50, 50], 0)
    assert [again[position] for position in reversed(range(200))] == first[::-1]
    assert first[:100] != first[100:]
    assert first != [EndlessOrder([50, 50], 1)[position] for position in range(200)]


def test_few_groups_are_in_use_at_a_time():
    groups = [10] * 100
    order = EndlessOrder(groups, seed=0, shuffle_window=30)
    for window in range(0, 1000, 30):
        used = {order[position] // 10 for position in range(window, min(window + 30, 1000))}
        assert len(used) <= 3
    assert [order[position] for position in range(30)] != sorted(order[position] for position in range(30))


@pytest.mark.parametrize("bucket_window", [1, 3])
def test_a_step_follows_from_its_number_alone(bucket_window):
    sources = [Numbers([10, 6]), Numbers([9])]
    in_turn = mixture(sources, bucket_window=bucket_window)
    batches = [in_turn[step] for step in range(60)]
    for step in (59, 0, 31):
        alone = mixture(sources, bucket_window=bucket_window)[step]
        assert torch.equal(alone["rows"], batches[step]["rows"])
        assert alone["keys"] == batches[step]["keys"]


def test_the_seed_decides_everything():
    sources = [Numbers([100]), Numbers([100])]
    assert torch.equal(rows(mixture(sources), range(20)), rows(mixture(sources), range(20)))
    assert not torch.equal(rows(mixture(sources), range(20)), rows(mixture(sources, seed=4), range(20)))


@pytest.mark.parametrize("bucket_window", [1, 5])
def test_two_processes_read_what_one_reads_with_the_doubled_batch(bucket_window):
    sources = [Numbers([10, 6], bad=[3]), Numbers([9])]
    options = {"bucket_window": bucket_window, "weights": [1, 2]}
    one = mixture(sources, batch_size=6, **options)
    two = [mixture(sources, batch_size=3, process_index=i, num_processes=2, **options) for i in range(2)]
    for step in range(40):
        both = torch.cat([process[step]["rows"] for process in two])
        assert torch.equal(both, one[step]["rows"])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(workers):
    dataset = mixture([Numbers([10, 6], bad=[1]), Numbers([9])], bucket_window=2)
    loader = DataLoader(dataset, batch_size=None, sampler=range(5, 25), num_workers=workers)
    read = list(loader)
    assert torch.equal(torch.cat([batch["rows"] for batch in read]), rows(dataset, range(5, 25)))
    assert [batch["keys"] for batch in read] == [dataset[step]["keys"] for step in range(5, 25)]
    assert sum(batch["skipped"].get("image", 0) for batch in read) > 0


def test_a_mixture_is_pickled_without_what_it_remembers():
    dataset = mixture([Numbers([100_000])], bucket_window=2)
    size = len(pickle.dumps(dataset))
    expected = rows(dataset, range(4))
    assert len(pickle.dumps(dataset)) < size + 1000
    assert torch.equal(rows(pickle.loads(pickle.dumps(dataset)), range(4)), expected)


def test_buckets_keep_the_samples_of_their_window_and_bring_like_lengths_together():
    source = Numbers([60])
    plain, bucketed = mixture([source], batch_size=5), mixture([source], batch_size=5, bucket_window=4)
    for first in range(0, 40, 4):
        steps = range(first, first + 4)
        same, sorted_ = rows(plain, steps), rows(bucketed, steps)
        # the same samples with the same random numbers, in other batches
        assert sorted(same.tolist()) == sorted(sorted_.tolist())
    spread = {
        dataset: sum(
            max(lengths) - min(lengths)
            for step in range(40)
            for lengths in [[source.length(int(index)) for index in dataset[step]["rows"][:, 0]]]
        )
        for dataset in (plain, bucketed)
    }
    assert spread[bucketed] < 0.6 * spread[plain]


def test_the_batches_of_a_bucket_window_do_not_come_by_length():
    source = Numbers([1000])
    dataset = mixture([source], bucket_window=8)
    lengths = [source.length(int(dataset[step]["rows"][0, 0])) for step in range(8)]
    assert lengths != sorted(lengths)


def test_sources_are_drawn_by_weight_and_one_a_batch():
    sources = [Numbers([50], "a"), Numbers([50], "b"), Numbers([50], "c")]
    dataset = mixture(sources, weights=[1, 2, 2])
    batches = [dataset[step] for step in range(500)]
    for batch in batches:
        assert {key.partition(":")[0] for key in batch["keys"]} == {batch["source"]}
    drawn = Counter(batch["source"] for batch in batches)
    assert drawn["a"] == pytest.approx(100, abs=30)
    assert drawn["b"] == pytest.approx(200, abs=40)


def test_further_sources_get_their_share_and_leave_the_others_theirs():
    assert add_share([3, 3, 1], 0.5, 1) == [3, 3, 1, 7]
    weights = add_share([2.0, 6.0], 0.2, 2)
    assert [weight / sum(weights) for weight in weights] == pytest.approx([0.2, 0.6, 0.1, 0.1])


def test_each_source_may_have_a_collate_of_its_own():
    class Doubling(Collate):
        def prepare(self, sample, generator):
            index, *numbers = super().prepare(sample, generator)
            return 2 * index + 1000, *numbers

    sources = [Numbers([50], "a"), Numbers([50], "b")]
    plain, own = mixture(sources), mixture(sources, [Collate(), Doubling()])
    for step in range(20):
        indices, given = plain[step]["rows"][:, 0], own[step]["rows"][:, 0]
        assert torch.equal(given, indices if plain[step]["source"] == "a" else 2 * indices + 1000)


def test_mixing_takes_no_sample_of_a_source_away():
    sources = [Numbers([30], "a"), Numbers([42], "b")]
    dataset = mixture(sources, batch_size=6)
    keys = {"a": [], "b": []}
    for step in range(60):
        batch = dataset[step]
        keys[batch["source"]] += batch["keys"]
    assert len(set(keys["a"][:30])) == 30
    assert len(set(keys["b"][:42])) == 42


def test_steps_far_away_are_found_from_the_schedule():
    sources = [Numbers([5]), Numbers([5])]
    source, before = mixture(sources).locate(10_000)
    in_turn = mixture(sources)
    assert before == sum(in_turn.locate(step)[0] == source for step in range(10_000))


def test_a_second_epoch_varies_its_samples():
    dataset = mixture([Numbers([4])])
    first, second = dataset[0]["rows"], dataset[1]["rows"]
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist())
    assert not set(first[:, 1].tolist()) & set(second[:, 1].tolist())
    assert not set(first[:, 2].tolist()) & set(second[:, 2].tolist())


def test_bad_samples_are_replaced_and_counted():
    dataset = mixture([Numbers([20], bad=range(0, 20, 2), filtered=[1, 3])])
    batches = [dataset[step] for step in range(25)]
    read = Counter(int(index) for batch in batches for index in batch["rows"][:, 0])
    assert set(read) <= set(range(5, 20, 2))
    counts = Counter()
    for batch in batches:
        counts.update(batch["skipped"])
        assert len(batch["skipped_messages"]) == sum(batch["skipped"].values())
        assert len(batch["keys"]) == 4
    assert counts["image"] >= 50 and counts["filtered: small"] >= 10
    assert ("image", "numbers:0 is broken") in [
        tuple(pair) for batch in batches for pair in batch["skipped_messages"]
    ]


def test_replacing_one_sample_leaves_the_others_as_they_were():
    clean, damaged = mixture([Numbers([40])]), mixture([Numbers([40], bad=[7])])
    differing = sum(
        one.tolist() != other.tolist()
        for step in range(10)
        for one, other in zip(clean[step]["rows"], damaged[step]["rows"], strict=True)
    )
    assert differing == 1


def test_a_source_without_a_usable_sample_is_named():
    dataset = mixture([Numbers([5], "ruins", bad=range(5))])
    with pytest.raises(ValueError, match="100 samples in a row of source 'ruins' .* is broken"):
        dataset[0]


@pytest.mark.parametrize(
    "sources, options, message",
    [
        ([], {}, "No data was given"),
        ([Numbers([0], "void")], {}, "'void' holds no samples"),
        ([Numbers([3])], {"weights": [1, 2]}, "2 weights were given for 1 sources"),
        ([Numbers([3]), Numbers([3])], {"weights": [1, 0]}, "Expected positive numbers"),
        ([Numbers([3])], {"collate": [Collate(), Collate()]}, "2 collates were given for 1 sources"),
        ([Numbers([3])], {"weights": [float("nan")]}, "Expected positive numbers"),
        ([Numbers([3])], {"batch_size": 0}, "batch_size=0"),
        ([Numbers([3])], {"bucket_window": 0}, "bucket_window=0"),
        ([Numbers([3])], {"process_index": 2, "num_processes": 2}, "Expected 0 to 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(sources, options, message):
    with pytest.raises(ValueError, match=message):
        mixture(sources, **options)


def test_the_random_numbers_of_a_sample_are_those_of_its_position():
    """Not of its batch: with another batch size the same samples get the same numbers."""
    sources = [Numbers([24])]
    small, large = mixture(sources, batch_size=2), mixture(sources, batch_size=8)
    assert torch.equal(rows(small, range(12)), rows(large, range(3)))


def test_the_state_of_python_s_and_torch_s_generators_is_left_alone():
    random.seed(0)
    torch.manual_seed(0)
    states = random.getstate(), torch.get_rng_state()
    rows(mixture([Numbers([10], bad=[1])]), range(5))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
