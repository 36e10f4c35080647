"""Load balancing: assignment of groups to data ranks and to micro-batches by cost.

Costs are non-negative numbers in any one unit, for example FLOPs of `models/flops.py`.
Sizes are tokens; a micro-batch has a budget of tokens. All functions use longest-processing-time
scheduling (Graham 1969): items by descending cost, each to the lightest bin. Its heaviest bin is at
most a third heavier than the optimum. The result is deterministic, so ranks with equal inputs agree
without communication. Items are never split, and the optimum is not searched.
"""

from collections import Counter
from collections.abc import Sequence

Bins = list[list[int]]  # indices of items, ascending in each bin
"""Item indices of each bin, ascending."""


def partition(costs: Sequence[float], num_bins: int) -> Bins:
    """Return all items in `num_bins` bins of nearly equal cost. Bins are empty if there are too few
    items."""
    bins = _greedy_partition(costs, costs, num_bins, sizes=[0] * len(costs), budget=0)
    assert bins is not None
    return bins


def into_micro_batches(
    sizes: Sequence[int], costs: Sequence[float], budget: int, at_least: int = 1
) -> Bins:
    """Return bins of at most `budget` tokens with nearly equal costs, the most expensive first.

    The number of bins is that of first-fit-decreasing, and at least `at_least` if there are so many
    items. An item longer than the budget is alone in its bin.
    """
    if not sizes:
        return []
    packed = _first_fit(sizes, budget)
    count = max(len(packed), min(at_least, len(sizes)))
    while len(packed) < count:
        _split_heaviest(packed, costs)
    # The order by cost gives more even bins; the order by size can succeed where that one fails.
    tries = [_greedy_partition(order, costs, count, sizes, budget) for order in (costs, sizes)]
    best = min((bins for bins in (*tries, packed) if bins), key=lambda bins: _spread(bins, costs))
    return sorted(best, key=lambda members: (-_sum(costs, members), members))


def assign_ranks(costs: Sequence[float], current_ranks: Sequence[int], num_ranks: int) -> list[int]:
    """Return the rank of each item after balancing; `current_ranks` holds the rank of each item
    now.

    Items move only if the heaviest rank becomes lighter. A bin goes to the rank that already holds
    most of its cost. Of items with equal cost, as many as possible stay.
    """
    bins = partition(costs, num_ranks)
    now: Bins = [
        [i for i, current in enumerate(current_ranks) if current == rank]
        for rank in range(num_ranks)
    ]
    heaviest_now, heaviest = (max(_sum(costs, members) for members in b) for b in (now, bins))
    if heaviest_now <= heaviest * (1 + 1e-9):  # ignore rounding of the sums
        return list(current_ranks)
    ranks = [0] * len(costs)
    for bin_, rank in zip(bins, _match_ranks(bins, costs, current_ranks), strict=True):
        for item in bin_:
            ranks[item] = rank
    return _keep_equal_costs(ranks, costs, current_ranks)


def _greedy_partition(
    order: Sequence[float],
    costs: Sequence[float],
    count: int,
    sizes: Sequence[int],
    budget: int,
) -> Bins | None:
    """Assign items by descending `order` to the cheapest bin with room.

    Return None if an item finds no room. Items longer than the budget come first, since each needs
    an empty bin.
    """
    bins: Bins = [[] for _ in range(count)]
    spent, load = [0.0] * count, [0] * count
    for item in sorted(range(len(costs)), key=lambda i: (sizes[i] <= budget, -order[i], i)):
        room = [b for b in range(count) if not bins[b] or load[b] + sizes[item] <= budget]
        if not room:
            return None
        chosen = min(room, key=lambda b: (spent[b], len(bins[b]), b))
        bins[chosen].append(item)
        spent[chosen] += costs[item]
        load[chosen] += sizes[item]
    return [sorted(members) for members in bins]


def _first_fit(sizes: Sequence[int], budget: int) -> Bins:
    """Return first-fit-decreasing bins."""
    bins: Bins = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fit = next((b for b, left in enumerate(room) if sizes[item] <= left), None)
        if fit is None:
            bins.append([])
            room.append(budget)
            fit = len(bins) - 1
        bins[fit].append(item)
        room[fit] -= sizes[item]
    return [sorted(members) for members in bins]


def _split_heaviest(bins: Bins, costs: Sequence[float]) -> None:
    """Split the most expensive bin with several items in two, in place."""
    several = [b for b, members in enumerate(bins) if len(members) > 1]
    heaviest = max(several, key=lambda b: (_sum(costs, bins[b]), -b))
    members = bins.pop(heaviest)
    halves = partition([costs[item] for item in members], 2)
    bins += [[members[index] for index in half] for half in halves]


def _match_ranks(bins: Bins, costs: Sequence[float], current_ranks: Sequence[int]) -> list[int]:
    """Return a rank for each bin: greedy matching by the cost that the rank already holds of the
    bin."""
    there = [[0.0] * len(bins) for _ in bins]  # [bin][rank]: cost already there
    for bin_, members in enumerate(bins):
        for item in members:
            there[bin_][current_ranks[item]] += costs[item]
    every = range(len(bins))
    pairs = sorted(((s, r) for s in every for r in every), key=lambda p: -there[p[0]][p[1]])
    rank_of: dict[int, int] = {}
    taken: set[int] = set()
    for bin_, rank in pairs:
        if bin_ not in rank_of and rank not in taken:
            rank_of[bin_] = rank
            taken.add(rank)
    return [rank_of[bin_] for bin_ in every]


def _keep_equal_costs(
    ranks: Sequence[int], costs: Sequence[float], current_ranks: Sequence[int]
) -> list[int]:
    """Return `ranks` with items of equal cost swapped so that as many as possible stay where they
    are."""
    assigned = list(ranks)
    alike: dict[float, list[int]] = {}
    for item, cost in enumerate(costs):
        alike.setdefault(cost, []).append(item)
    for members in alike.values():
        free = Counter(ranks[item] for item in members)
        movers = []
        for item in members:
            if free[current_ranks[item]]:
                free[current_ranks[item]] -= 1
                assigned[item] = current_ranks[item]
            else:
                movers.append(item)
        for item, rank in zip(movers, sorted(free.elements()), strict=True):
            assigned[item] = rank
    return assigned


def _sum(costs: Sequence[float], members: Sequence[int]) -> float:
    """Return the total cost of the items `members`."""
    return sum(costs[item] for item in members)


def _spread(bins: Bins, costs: Sequence[float]) -> float:
    """Return the difference between the heaviest and the lightest bin."""
    totals = [_sum(costs, members) for members in bins]
    return max(totals) - min(totals)
