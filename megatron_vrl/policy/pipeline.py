"""Messages between pipeline stages, whose shapes every stage knows from the micro-batches.

All stages of a replica hold the same micro-batches. Megatron's communicator exchanges the shape of
each message before the message, and waits for the GPU each time. The communicator here takes the
shapes from the packing, so a message is one transfer and the host does not wait. The interleaved
schedule has messages of one shape (`policy/micro_batches.py`) and needs neither.

Source: `P2PCommunicator` and `forward_backward_pipelining_without_interleaving` of megatron.core,
alike in 0.16.1 and 0.19.2.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.parallel.mesh import Mesh

Shape = list[int]


class KnownShapes(P2PCommunicator):
    """Communicator for one pass over micro-batches whose hidden states have `shapes`.

    The schedule 1F1B runs forward passes in the order of the micro-batches, and backward passes
    too. Therefore the k-th message from the previous stage, and from the next, has shape k.
    """

    def __init__(
        self, group: dist.ProcessGroup, config: ModelParallelConfig, shapes: Sequence[Shape]
    ) -> None:
        super().__init__(pp_group=group, config=config)
        self._from_previous, self._from_next = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[Shape, Shape]:
        """Return the shapes of the next messages, without communication. Override of Megatron's."""
        nothing = [0, 0, 0]
        return (
            next(self._from_previous) if recv_prev else nothing,
            next(self._from_next) if recv_next else nothing,
        )


def communication(
    mesh: Mesh, config: Any, batches: Sequence[MicroBatch]
) -> dict[str, P2PCommunicator | ProcessGroupCollection]:
    """Return the arguments of Megatron's schedule that make stages send known shapes.

    Returns {} for one stage and for the interleaved schedule. `config`: TransformerConfig.
    """
    if mesh.pipeline.size == 1 or mesh.interleaved:
        return {}
    split = mesh.tensor.size if config.sequence_parallel else 1
    shapes = [[len(batch.rows) // split, 1, config.hidden_size] for batch in batches]
    return {
        "p2p_communicator": KnownShapes(mesh.pipeline.group, config, shapes),
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
    }
