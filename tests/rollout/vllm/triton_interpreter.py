"""pytest plugin: vLLM's GPU model runner ("V2") on a CPU, its kernels in Triton's interpreter.

vLLM takes this runner wherever Triton is. `CPUModelRunner` of vllm/v1/worker/cpu is the same class
with another warm-up. vLLM asks for a CPU compiler in Triton, which Triton's releases do not have;
the interpreter needs none, so an entry of that name is enough.
"""

import os
from typing import Any

import pytest

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


class Driver:
    @staticmethod
    def is_active() -> bool:
        return True


def pytest_configure(config: pytest.Config) -> None:
    import triton.backends

    backends = triton.backends
    backends.backends["cpu"] = backends.Backend(compiler=None, driver=Driver)
    from megatron_vrl.rollout.vllm.engine import VllmEngine

    made = VllmEngine.__init__

    def checked(self: VllmEngine, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        core = self._llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        names = {f"{kind.__module__}.{kind.__name__}" for kind in type(runner).__mro__}
        assert "vllm.v1.worker.gpu.model_runner.GPUModelRunner" in names

    VllmEngine.__init__ = checked  # type: ignore[method-assign]
