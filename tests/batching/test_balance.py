"""Load balancing: every item once, within the budget, no worse than first-fit, few moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from megatron_vrl.batching.balance import assign_ranks, into_micro_batches, partition

costs_ = st.lists(st.one_of(st.integers(0, 5), st.floats(0, 100)), max_size=12)
items = st.lists(st.tuples(st.integers(0, 30), st.floats(0, 100)), max_size=12)


def first_fit(sizes: list[int], budget: int) -> list[list[int]]:
    """First-fit-decreasing, as the books have it: the yardstick."""
    bins: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for members in bins:
            if sum(sizes[j] for j in members) + sizes[i] <= budget:
                members.append(i)
                break
        else:
            bins.append([i])
    return bins


def totals(bins: list[list[int]], costs: list[float]) -> list[float]:
    return [sum(costs[i] for i in members) for members in bins]


def spread(bins: list[list[int]], costs: list[float]) -> float:
    return max(totals(bins, costs)) - min(totals(bins, costs))


def once(bins: list[list[int]], count: int) -> bool:
    return sorted(i for members in bins for i in members) == list(range(count))


@given(costs_, st.integers(1, 5))
def test_partition_holds_every_item_once_within_grahams_bound(
    costs: list[float], shares: int
) -> None:
    dealt = partition(costs, shares)
    assert dealt == partition(list(costs), shares)
    assert len(dealt) == shares
    assert once(dealt, len(costs))
    assert all(members == sorted(members) for members in dealt)
    if costs:
        # the last item put on the heaviest share found it the lightest
        bound = sum(costs) / shares + max(costs)
        assert max(totals(dealt, costs)) <= bound * (1 + 1e-9)


def test_the_heaviest_items_get_a_bin_each() -> None:
    assert partition([5, 1, 4, 3, 3], 2) == [[0, 4], [1, 2, 3]]
    assert partition([1, 1], 3) == [[0], [1], []]


@given(items, st.integers(1, 40), st.integers(1, 6))
def test_micro_batches_keep_the_budget_and_are_no_less_even_than_first_fit(
    given_: list[tuple[int, float]], budget: int, least: int
) -> None:
    sizes, costs = [size for size, _ in given_], [cost for _, cost in given_]
    bins = into_micro_batches(sizes, costs, budget)
    finer = into_micro_batches(sizes, costs, budget, least)
    for found in (bins, finer):
        assert once(found, len(sizes))
        assert all(members == sorted(members) and members for members in found)
        assert all(len(m) == 1 or sum(sizes[i] for i in m) <= budget for m in found)
        assert totals(found, costs) == sorted(totals(found, costs), reverse=True)
    assert finer == into_micro_batches(sizes, costs, budget, least)
    yardstick = first_fit(sizes, budget)
    assert len(bins) == len(yardstick)
    assert len(finer) == max(len(bins), min(least, len(sizes)))
    if sizes:
        assert spread(bins, costs) <= spread(yardstick, costs) + 1e-9


def test_balance_where_first_fit_fills_up() -> None:
    sizes = [4, 4, 3, 3, 2]  # first fit: [4, 4, 2], [3, 3]
    assert into_micro_batches(sizes, sizes, budget=10) == [[0, 2, 4], [1, 3]]


def test_short_items_may_cost_the_most() -> None:
    sizes, costs = [8, 8, 1, 1], [1.0, 1.0, 9.0, 9.0]  # first fit puts both short ones together
    assert into_micro_batches(sizes, costs, budget=10) == [[0, 2], [1, 3]]


@given(st.integers(1, 4), st.data())
def test_few_groups_move(ranks: int, data: DataObject) -> None:
    costs = data.draw(costs_)
    homes = [data.draw(st.integers(0, ranks - 1)) for _ in costs]
    places = assign_ranks(costs, homes, ranks)
    assert places == assign_ranks(costs, homes, ranks)

    def heaviest(where: list[int]) -> float:
        return max(
            sum(c for c, p in zip(costs, where, strict=True) if p == r) for r in range(ranks)
        )

    dealt = max(totals(partition(costs, ranks), costs))
    assert heaviest(places) <= dealt * (1 + 1e-9)
    if heaviest(homes) <= dealt:
        assert places == homes
    assert assign_ranks(costs, places, ranks) == places  # and then they stay


@pytest.mark.parametrize(
    ("costs", "homes", "places"),
    [
        ([1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]),  # even already
        ([5, 5], [1, 0], [1, 0]),
        ([2, 2, 2, 2], [1, 1, 1, 0], [1, 1, 0, 0]),  # one must move, and one does
        ([9, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]),  # the heavy one stays
    ],
)
def test_moves(costs: list[int], homes: list[int], places: list[int]) -> None:
    assert assign_ranks(costs, homes, 2) == places
