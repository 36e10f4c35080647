"""Division of a machine's GPUs among its rollout workers."""

from megatron_vrl.errors import ConfigError, counted


def gpu_groups(tensor: int, count: int, visible: str | None) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES of each worker of this machine; [""] without a GPU.

    tensor: `rollout.tensor`. count: GPUs that torch sees. visible: this process's
    CUDA_VISIBLE_DEVICES, whose entries may be indices or UUIDs. GPUs that are left over stay idle.

    Example: gpu_groups(2, 5, None) is ["0,1", "2,3"].
    """
    if count == 0:
        return [""]
    if count < tensor:
        raise ConfigError(
            f"rollout.tensor={tensor}, but torch sees {counted(count, 'GPU')} here: lower "
            "rollout.tensor, or widen CUDA_VISIBLE_DEVICES."
        )
    names = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    return [
        ",".join(names[first : first + tensor]) for first in range(0, count - tensor + 1, tensor)
    ]
