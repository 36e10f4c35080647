"""Pipeline messages: shapes from the packing, batched on a GPU and without a wait of the host.

`tests/models/test_layouts.py` counts the messages of real stages.
"""

import pytest
import torch

from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.vision_language_model import language_config
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.policy.pipeline import KnownShapes, communication
from tests.planner.measured import SMALL
from tests.tiny import GROUPS, micro_batches


def test_each_direction_goes_through_the_micro_batches_in_order() -> None:
    mesh = init_mesh(Parallel(), seed=1)
    shapes = [[5, 1, 8], [7, 1, 8]]
    config = language_config(SMALL, Model(checkpoint=""), Parallel())
    ends = KnownShapes(mesh.pipeline.group, config, shapes)
    received = [
        ends._communicate_shapes(None, None, recv_prev=previous, recv_next=following)
        for previous, following in ((True, False), (False, True), (True, True))
    ]
    nothing = [0, 0, 0]
    assert received == [(shapes[0], nothing), (nothing, shapes[0]), (shapes[1], shapes[1])]
    assert communication(mesh, config, micro_batches(GROUPS, mesh)) == {}  # one stage
    close_mesh()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_messages_are_batched_on_a_gpu(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    model = Model(checkpoint="", gradient_accumulation_fusion="none")
    config = language_config(SMALL, model, Parallel(pipeline=2))
    assert (config.batch_p2p_comm, config.batch_p2p_sync) == (on_gpu, False)
