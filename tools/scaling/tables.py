"""Rows -> efficiencies, table.md and plots."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def with_efficiency(rows: Sequence[Row]) -> list[Row]:
    """Each finished cell with its efficiency: prompts a second and unit (core or GPU) that is there
    for its ranks, over those of the cell of its size with the fewest ranks, the faster if several.

    By the fastest round of each, the one that other work on the machine disturbed least. Ranks
    that share a core are no slower for it by their own fault, so a unit counts once.
    """
    done = [row for row in rows if "seconds" in row]
    bases: dict[str, Row] = {}
    for row in sorted(done, key=lambda row: (row["ranks"], -_speed(row))):
        bases.setdefault(row["size"], row)
    compared = []
    for row in rows:
        if "seconds" in row:
            base = bases[row["size"]]
            row = {**row, "efficiency": _speed(row) / _speed(base), "base": base["cell"]}
        compared.append(row)
    return compared


def _speed(row: Mapping[str, Any]) -> float:
    return row["prompts"] / row["min_s"] / min(row["ranks"], row["units"])  # type: ignore[no-any-return]


def table(rows: Sequence[Row], simulated: Sequence[Row], machine: Mapping[str, Any]) -> str:
    return "\n".join([*_measured(rows, machine), "", *_simulated(simulated), ""])


def _measured(rows: Sequence[Row], machine: Mapping[str, Any]) -> Iterable[str]:
    flops = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {d}" for d, rate in machine["flops"].items())
    yield (
        f"Measured on {machine['name']}: a rank's matrix product {flops}, all-reduce "
        f"{machine['link'] / 1e9:.2f} GB/s, latency {machine['latency'] * 1e6:.0f} us."
    )
    yield ""
    yield (
        "| cell | ranks | units | load before | prompts | tokens | micro-batches | "
        "update s (fastest) | planned s | efficiency | messages % | planned | stage waits % | "
        "planned | (p-1)/(vm+p-1) % | loss |"
    )
    yield "|-" * 16 + "|"
    for row in rows:
        if "failed" in row:
            yield f"| {row['cell']} | {row['ranks']} | failed: {row['failed']} |" + " |" * 13
            continue
        planned = row["planned"]
        shared = f" ({row['ranks'] / row['units']:g} ranks each)" * (row["ranks"] > row["units"])
        fitted = " (fitted)" if planned["fitted"] else ""
        yield (
            f"| {row['cell']} | {row['ranks']} | {row['units']}{shared} | {row['load']:.1f} | "
            f"{row['prompts']} | {row['tokens']:,} | {row['micro_batches']} | "
            f"{row['seconds']:.3f} ({row['min_s']:.3f}) | {planned['seconds']:.3f}{fitted} | "
            f"{row['efficiency']:.2f} | {_percent(row['communication'])} | "
            f"{_percent(planned['communication'])} | {_percent(row['idle'])} | "
            f"{_percent(planned['idle'])} | {_percent(row['ideal_bubble'])} | {row['loss']:.5f} |"
        )


def _simulated(rows: Sequence[Row]) -> Iterable[str]:
    if not rows:
        return
    yield "**Simulated, not run:** the planner's arithmetic over the pieces named in each part."
    for key in dict.fromkeys((row["of"], row["gpu"]) for row in rows):
        part = [row for row in rows if (row["of"], row["gpu"]) == key]
        pieces = "; ".join(f"{name}: {source}" for name, source in part[0]["pieces"].items())
        yield ""
        yield f"Simulated: {key[0]} on {key[1]}, mfu {part[0]['mfu']:.3f}. {pieces}."
        yield ""
        yield (
            "| simulated | GPUs | prompts | micro-batches | update s | efficiency | messages % | "
            "stage waits % |"
        )
        yield "|-" * 8 + "|"
        for row in part:
            if "refused" in row:
                yield f"| {row['mode']} | {row['gpus']} | refused: {row['refused']} |" + " |" * 5
                continue
            yield (
                f"| {row['mode']} | {row['gpus']} | {row['prompts']:,} | {row['micro_batches']} | "
                f"{row['seconds']:.4g} | {row['efficiency']:.2f} | "
                f"{_percent(row['communication'])} | {_percent(row['idle'])} |"
            )


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def plot_measured(rows: Sequence[Row], path: Path) -> None:
    """Plot step time, efficiency and time fractions of finished cells, in the table's order."""
    from matplotlib.figure import Figure

    done = [row for row in rows if "seconds" in row]
    if not done:
        return
    figure = Figure(figsize=(11, 1.5 + 0.32 * len(done)), layout="constrained")
    times, efficiency, shares = figure.subplots(1, 3, sharey=True)
    at = list(range(len(done)))
    measured = [r["min_s"] for r in done]
    times.barh([y - 0.2 for y in at], measured, 0.4, label="measured, fastest round")
    planned = [r["planned"]["seconds"] for r in done]
    times.barh([y + 0.2 for y in at], planned, 0.4, label="planned")
    times.set_xlabel("seconds of an update")
    efficiency.barh(at, [r["efficiency"] for r in done], 0.5)
    efficiency.axvline(1.0, color="black", lw=0.8)
    efficiency.set_xlabel("efficiency of a core or GPU")
    for shift, name in ((-0.2, "measured"), (0.2, "planned")):
        of = [r if name == "measured" else r["planned"] for r in done]
        messages = [100 * r["communication"] for r in of]
        idle = [100 * r["idle"] for r in of]
        hatch = None if name == "measured" else "//"
        ys = [y + shift for y in at]
        shares.barh(ys, messages, 0.4, color="C2", hatch=hatch, label=f"messages, {name}")
        shares.barh(ys, idle, 0.4, messages, color="C3", hatch=hatch, label=f"stage waits, {name}")
    shares.plot([100 * r["ideal_bubble"] for r in done], at, "k|", ms=9, label="(p-1)/(vm+p-1)")
    shares.set_xlabel("% of an update")
    times.set_yticks(at, [r["cell"] for r in done])
    times.invert_yaxis()
    for axes in (times, shares):
        axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.savefig(path, dpi=110)


def plot_simulated(rows: Sequence[Row], path: Path) -> None:
    """Plot efficiency and seconds over the number of GPUs."""
    from matplotlib.figure import Figure

    done = [row for row in rows if "seconds" in row]
    if not done:
        return
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 3)
    for number, (of, mode) in enumerate(dict.fromkeys((r["of"], r["mode"]) for r in done)):
        part = [r for r in done if (r["of"], r["mode"]) == (of, mode)]
        gpus = [r["gpus"] for r in part]
        style = {"color": f"C{number // 2}", "ls": "-" if mode == "strong" else "--", "marker": "."}
        panels[0].plot(gpus, [r["seconds"] for r in part], label=f"{of}, {mode}", **style)
        panels[1].plot(gpus, [r["efficiency"] for r in part], **style)
        shares = [100 * (r["communication"] + r["idle"]) for r in part]
        panels[2].plot(gpus, shares, **style)
    for axes, what in zip(
        panels, ("seconds of an update", "efficiency", "messages and stage waits, %"), strict=True
    ):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("GPUs, simulated")
        axes.set_ylabel(what)
    panels[0].set_yscale("log")
    figure.legend(fontsize=7, ncols=4, loc="outside lower center")
    figure.suptitle("Simulated, not run")
    figure.savefig(path, dpi=110)
