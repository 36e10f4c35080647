"""The cells of a scaling study, run one after another, and the files that the study writes."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vrl.errors import ConfigError, UserError, counted
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.observe.progress import log_written
from megatron_vrl.planner.hardware import Gpu, find_gpu
from scaling.grid import Study, cells, ideal_bubble
from scaling.launch import Nodes, check_cell, launch, load, model_path
from scaling.predict import fitted_mfu, predicted, update_parts
from scaling.tables import plot_measured, plot_simulated, table, with_efficiency

Row = dict[str, Any]


def nodes_of(arguments: argparse.Namespace, study: Study) -> Nodes:
    """Return the nodes of the command line. Raise ConfigError for values that cannot work."""
    import torch

    address, colon, port = arguments.rdzv_endpoint.rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigError(f"--rdzv-endpoint {arguments.rdzv_endpoint} is not HOST:PORT.")
    if not 0 <= arguments.node_rank < arguments.nnodes:
        raise ConfigError(
            f"--node-rank {arguments.node_rank} of --nnodes {arguments.nnodes}: count from 0."
        )
    gpus = torch.cuda.device_count()
    most = max(layout.ranks for layout in study.grid.layouts)
    each = arguments.nproc or gpus or -(-most // arguments.nnodes)
    if gpus and each > gpus:
        raise ConfigError(f"--nproc {each}, but this node has {gpus} GPUs: give as many at most.")
    return Nodes(
        count=arguments.nnodes,
        rank=arguments.node_rank,
        per_node=each,
        address=address,
        port=int(port),
        units=gpus or len(os.sched_getaffinity(0)),
    )


def run_study(study: Study, out: Path, nodes: Nodes, retry: bool) -> None:
    """Run the cells that have no row yet; node 0 writes the rows, tables and plots to `out`."""
    simulated_gpu = find_gpu(study.simulate.gpu) if study.simulate.configs else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and a cell's ranks with it
    out.mkdir(parents=True, exist_ok=True)
    sizes = study.grid.sizes
    paths = {size: model_path(size, given, out, nodes) for size, given in sizes.items()}
    archs = {size: read_architecture(path) for size, path in paths.items()}
    before = _finished_rows(out / "study.jsonl")
    machine = _machine(study, out, nodes)
    rows = []
    for number, cell in enumerate(cells(study), start=1):
        spec = cell.spec(study) | {"units": nodes.units, "per_node": nodes.per_node}
        row = before.get(cell.name)
        if row is None or row["spec"] != spec or ("failed" in row and retry):
            row = {"cell": cell.name, "mode": cell.mode, "size": cell.size, "spec": spec}
            row |= {"ranks": cell.layout.ranks, "prompts": cell.prompts, "simulated": False}
            try:
                check_cell(cell, study, archs[cell.size], nodes)
                used = nodes.of(cell.layout.ranks)
                row |= {"units": used * nodes.units, "nodes": used, "load": load()}
                asked = spec | {"path": str(paths[cell.size])}
                limit = study.rounds.timeout_s
                measurements = launch(asked, cell.layout.ranks, number, nodes, limit)
                row |= (measurements or {}) | {"ideal_bubble": ideal_bubble(cell)}
            except UserError as error:
                row["failed"] = str(error)
            if nodes.rank == 0:
                with (out / "study.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
        outcome = row.get("failed") or (
            f"{row['seconds']:.3f} s" if "seconds" in row else "no part"
        )
        print(f"scaling: {cell.name}: {row['ranks']} ranks: {outcome}", flush=True)
        rows.append(row)
    if nodes.rank == 0:
        _write_results(study, out, archs, rows, machine, simulated_gpu)


def _machine(study: Study, out: Path, nodes: Nodes) -> Gpu | None:
    """Return the measured machine on node 0, None elsewhere.

    It is measured once for a folder, by as many ranks as have a core or GPU each.
    """
    path = out / "machine.json"
    if not path.exists():
        most = max(layout.ranks for layout in study.grid.layouts)
        each = min(nodes.per_node, nodes.units, most)
        used = min(nodes.count, -(-most // each))
        spec = {"machine": study.work.dtype}
        measurements = launch(spec, used * each, 0, nodes, study.rounds.timeout_s)
        if nodes.rank == 0:
            path.write_text(json.dumps(measurements, indent=1) + "\n")
    return find_gpu(str(path)) if nodes.rank == 0 else None


def _finished_rows(path: Path) -> dict[str, Row]:
    """Return the newest row of each cell. Raise ConfigError for a file of other content."""
    rows: dict[str, Row] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[row["cell"]] = {"spec": row["spec"]} | row
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # else a study that was killed while it wrote
                raise ConfigError(
                    f"{path}:{number} is no row of a study: give another --out, or remove it."
                ) from None
    return rows


def _write_results(
    study: Study,
    out: Path,
    archs: dict[str, Architecture],
    rows: list[Row],
    gpu: Gpu | None,
    simulated_gpu: Gpu | None,
) -> None:
    assert gpu is not None
    mfus = _fitted(study, archs, rows, gpu)
    compared = with_efficiency([_planned(study, archs, row, gpu, mfus) for row in rows])
    simulated = list(_simulations(study, archs, gpu, simulated_gpu, mfus))
    lines = [json.dumps(row) for row in simulated]
    (out / "simulated.jsonl").write_text("\n".join([*lines, ""]))
    (out / "planned.jsonl").write_text("\n".join([*(json.dumps(row) for row in compared), ""]))
    text = table(compared, simulated, json.loads((out / "machine.json").read_text()))
    (out / "table.md").write_text(text)
    plot_measured(compared, out / "measured.png")
    plot_simulated(simulated, out / "simulated.png")
    failed = sum("failed" in row for row in rows)
    done = counted(len(rows) - failed, "cell")
    print(f"scaling: {done}, {failed} failed; see table.md", flush=True)
    log_written(out)


def _fitted(
    study: Study, archs: dict[str, Architecture], rows: list[Row], gpu: Gpu
) -> dict[str, float]:
    """Return size -> MFU of the fastest round of its one-rank cells."""
    one = {row["cell"]: row["min_s"] for row in rows if "seconds" in row and row["ranks"] == 1}
    mfus: dict[str, float] = {}
    for cell in cells(study):
        if cell.name in one:
            mfu = fitted_mfu(cell, study.work, archs[cell.size], gpu, one[cell.name])
            mfus[cell.size] = max(mfu, mfus.get(cell.size, 0.0))
    return mfus


def _planned(
    study: Study, archs: dict[str, Architecture], row: Row, gpu: Gpu, mfus: dict[str, float]
) -> Row:
    if "seconds" not in row:
        return row
    from megatron_vrl.planner.speed import DEFAULT_MFU

    cell = next(cell for cell in cells(study) if cell.name == row["cell"])
    mfu = mfus.get(cell.size, DEFAULT_MFU)
    parts = update_parts(cell, study.work, archs[cell.size], gpu, mfu)
    planned = predicted(parts, row["ranks"], row["units"])
    planned |= {"mfu": mfu, "fitted": row["ranks"] == 1}
    return row | {"planned": planned}


def _simulations(
    study: Study,
    archs: dict[str, Architecture],
    gpu: Gpu,
    simulated_gpu: Gpu | None,
    mfus: dict[str, float],
) -> Iterator[Row]:
    from scaling.simulate import simulated_configs, simulated_sizes

    yield from simulated_sizes(study, archs, gpu, mfus)
    if simulated_gpu is None:
        return
    mfu, source = study.simulate.mfu, study.simulate.source
    if not mfu:
        if study.simulate.size not in mfus:
            raise ConfigError(
                f"simulate.size={study.simulate.size} has no finished cell of one rank: run one, "
                "or give simulate.mfu with its source."
            )
        mfu, source = mfus[study.simulate.size], "measured: one-rank cell of this study"
    speeds = "measured" if simulated_gpu.flops else "data sheet at the planner's shares"
    pieces = {"peak and links": speeds, "mfu": source}
    yield from simulated_configs(study, simulated_gpu, mfu, pieces)
