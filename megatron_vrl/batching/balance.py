"""Even work: which data rank trains which group, and which groups share a micro-batch.

Costs are numbers of one unit, not negative (`models/qwen2_5_vl/flops.py` has FLOPs); sizes are
tokens, of which a micro-batch holds a budget. Everything is by the longest-processing-time rule
(Graham 1969: the heaviest first, each to the lightest bin), whose heaviest bin is at most a third
above the best. It is deterministic: ranks that know the same numbers come to the same answer
without a word. Left out: splitting one item, and an exact optimum.
"""

from collections import Counter
from collections.abc import Sequence

Bins = list[list[int]]  # indices of items, ascending in each bin


def partition(costs: Sequence[float], shares: int) -> Bins:
    """All items in `shares` shares of nearly equal cost; with fewer items some are empty."""
    dealt = _dealt(costs, costs, shares, sizes=[0] * len(costs), budget=0)
    assert dealt is not None
    return dealt


def into_micro_batches(
    sizes: Sequence[int], costs: Sequence[float], budget: int, at_least: int = 1
) -> Bins:
    """Bins of at most `budget` tokens with nearly equal costs, the most expensive first.

    As many as first-fit-decreasing needs, and at least `at_least` if there are so many items. An
    item longer than the budget is alone.
    """
    if not sizes:
        return []
    packed = _first_fit(sizes, budget)
    count = max(len(packed), min(at_least, len(sizes)))
    while len(packed) < count:
        _halve_heaviest(packed, costs)
    # The heaviest first balances best; the longest first finds room where that does not.
    tries = [_dealt(order, costs, count, sizes, budget) for order in (costs, sizes)]
    best = min((bins for bins in (*tries, packed) if bins), key=lambda bins: _spread(bins, costs))
    return sorted(best, key=lambda members: (-_sum(costs, members), members))


def destinations(costs: Sequence[float], homes: Sequence[int], ranks: int) -> list[int]:
    """The rank of each item after dealing; `homes` says where each is now.

    Few items move: none unless the heaviest rank gets lighter; a share goes where most of its
    cost is already; of items of equal cost those stay that may.
    """
    shares = partition(costs, ranks)
    now: Bins = [[i for i, home in enumerate(homes) if home == rank] for rank in range(ranks)]
    heaviest_now, heaviest = (max(_sum(costs, members) for members in b) for b in (now, shares))
    if heaviest_now <= heaviest * (1 + 1e-9):  # the order of a sum is not a gain
        return list(homes)
    places = [0] * len(costs)
    for share, rank in zip(shares, _seats(shares, costs, homes), strict=True):
        for item in share:
            places[item] = rank
    return _swapped_home(places, costs, homes)


def _dealt(
    order: Sequence[float],
    costs: Sequence[float],
    count: int,
    sizes: Sequence[int],
    budget: int,
) -> Bins | None:
    """Items by descending `order`, each to the cheapest bin with room; None if one finds none.

    Items longer than the budget come first: each needs an empty bin.
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
    """First-fit-decreasing bins."""
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


def _halve_heaviest(bins: Bins, costs: Sequence[float]) -> None:
    """Split the most expensive bin of several items in two."""
    several = [b for b, members in enumerate(bins) if len(members) > 1]
    heaviest = max(several, key=lambda b: (_sum(costs, bins[b]), -b))
    members = bins.pop(heaviest)
    halves = partition([costs[item] for item in members], 2)
    bins += [[members[place] for place in half] for half in halves]


def _seats(shares: Bins, costs: Sequence[float], homes: Sequence[int]) -> list[int]:
    """A rank for each share: pairs are matched by the cost already there, the most first."""
    there = [[0.0] * len(shares) for _ in shares]  # [share][rank]
    for share, members in enumerate(shares):
        for item in members:
            there[share][homes[item]] += costs[item]
    every = range(len(shares))
    pairs = sorted(((s, r) for s in every for r in every), key=lambda p: -there[p[0]][p[1]])
    seats: dict[int, int] = {}
    taken: set[int] = set()
    for share, rank in pairs:
        if share not in seats and rank not in taken:
            seats[share] = rank
            taken.add(rank)
    return [seats[share] for share in every]


def _swapped_home(places: Sequence[int], costs: Sequence[float], homes: Sequence[int]) -> list[int]:
    """The same number of items of each cost on each rank, with as many at home as can be."""
    swapped = list(places)
    alike: dict[float, list[int]] = {}
    for item, cost in enumerate(costs):
        alike.setdefault(cost, []).append(item)
    for members in alike.values():
        free = Counter(places[item] for item in members)
        movers = []
        for item in members:
            if free[homes[item]]:
                free[homes[item]] -= 1
                swapped[item] = homes[item]
            else:
                movers.append(item)
        for item, rank in zip(movers, sorted(free.elements()), strict=True):
            swapped[item] = rank
    return swapped


def _sum(costs: Sequence[float], members: Sequence[int]) -> float:
    return sum(costs[item] for item in members)


def _spread(bins: Bins, costs: Sequence[float]) -> float:
    totals = [_sum(costs, members) for members in bins]
    return max(totals) - min(totals)
