"""One vLLM engine in this process.

A trainer rank holds an engine of tensor-parallel size 1 (`rollout.placement: colocated`). A rollout
worker (`workers/server.py`) holds one of any size. Engines of different ranks share nothing after
the start: ranks may call `generate` and `push_weights` at different times and different numbers of
times. Only the constructor is collective when torch.distributed is initialised, since vLLM makes
its (one-member) groups there.

Log-probs are those of the sampling distribution: after banned tokens, temperature and top-p
("processed"). The trainer computes the same log-probs when it masks the logits of
`banned_token_ids` and divides by the temperature. Without the mask the trainer's log-probs are
lower by -log(1 - banned mass) at every token.

Life of a request (`submit`, `step`, `abort`):

    WAITING   submit: vLLM has queued the prompt; the weight version is noted
    RUNNING   step: the prompt is computed, then one token per sequence and step. On a GPU vLLM
              schedules asynchronously: a step returns what the step before it has computed
    FINISHED  step returns all `spec.n` rollouts of the request, and the engine forgets it
    ABORTED   abort: the engine forgets it, and returns nothing

Example: submit("a", request, spec with n=2) at version 7, then 40 calls of `step`, with a weight
sync to version 8 after the 30th. `step` returns {"a": [rollout, rollout]}, each with
weight_version=7 and newest_version=8.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vrl import config
from megatron_vrl.errors import RolloutError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.rollout.buckets import NamedTensors, WeightBucket, torch_dtype
from megatron_vrl.rollout.interfaces import Checksums
from megatron_vrl.rollout.request import (
    InputCheck,
    RolloutRequest,
    SamplingSpec,
    check_length,
    make_request,
    vllm_prompt,
)
from megatron_vrl.rollout.vllm.arguments import engine_arguments
from megatron_vrl.rollout.vllm.compat import keep_process_groups, scheduler_is_asynchronous
from megatron_vrl.rollout.vllm.live_checksums import live_checksums
from megatron_vrl.rollout.vllm.special_tokens import banned_token_ids, stop_token_ids
from megatron_vrl.rollout.vllm.startup import import_vllm, preserve_trainer_state, register_model
from megatron_vrl.types import Prompt, Rollout


class VllmEngine:
    """InferenceEngine on vLLM's synchronous LLM class."""

    def __init__(
        self,
        hf_dir: str,
        cfg: config.RolloutConfig,
        *,
        dtype: str,
        seed: int,
        max_model_len: int,
        tensor: int = 1,
    ) -> None:
        """Start the engine. All ranks call it together.

        hf_dir: Hugging Face checkpoint; config and tokenizer are read. The weights are zeros until
            the first weight sync.
        max_model_len: tokens of prompt and response together.
        tensor: processes that share the model. More than one needs a process without torchrun.
        """
        if not (Path(hf_dir) / "config.json").is_file():
            raise RolloutError(f"{hf_dir} has no config.json; give a Hugging Face checkpoint.")
        self._family = family_of(read_architecture(hf_dir))
        self._vllm = import_vllm()
        register_model(self._vllm, self._family.engine)
        self.dtype = torch_dtype(dtype)
        self.max_model_len = max_model_len
        self.in_process = tensor == 1
        self._on_gpu = self._vllm.platforms.current_platform.is_cuda()
        groups_exist = torch.distributed.is_initialized()
        # Under torchrun the launcher sets the rank, and vLLM uses the trainer's groups.
        several_ranks = groups_exist and torch.distributed.get_world_size() > 1
        executor = "external_launcher" if several_ranks else "mp" if tensor > 1 else "uni"
        arguments = engine_arguments(
            hf_dir,
            cfg,
            self._family.engine,
            self._family.pixels,
            dtype=dtype,
            seed=seed,
            max_model_len=max_model_len,
            tensor=tensor,
            on_gpu=self._on_gpu,
        )
        with preserve_trainer_state():
            try:
                self._llm = self._vllm.LLM(**arguments, distributed_executor_backend=executor)
            except (ValueError, OSError) as error:
                raise RolloutError(
                    f"vLLM refuses to start with kv_cache_mib={cfg.kv_cache_mib}, "
                    f"gpu_memory_utilization={cfg.gpu_memory_utilization}, "
                    f"max_model_len={max_model_len}: {_reason(error)}"
                ) from error
        keep_process_groups(self._llm)
        self._tokenizer = self._llm.get_tokenizer()
        self._stop_token_ids = stop_token_ids(self._tokenizer, self._family.prompt)
        vocab = self._llm.model_config.get_vocab_size()
        self.banned_token_ids = banned_token_ids(self._tokenizer, self._family.prompt, vocab)
        # vLLM compiles two helpers of its sampler even in eager mode: 3 to 19 s on a CPU.
        self._stance = "default" if self._on_gpu else "force_eager"
        self._asleep = False
        self._inputs = InputCheck(self._family.engine)
        self._in_flight: dict[str, tuple[int, int]] = {}  # key -> seed, version at submission
        self._drained: dict[str, list[Rollout]] = {}  # finished requests for the next `step`
        self._cache_name = ""  # salt of cache entries; other salts share nothing
        self.version: int | None = None  # of the weights; None before and during a sync

    def generate(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[list[Rollout]]:
        """Return `spec.n` rollouts per prompt, in order.

        Equal weights, prompts and spec give equal tokens and log-probs to the bit, since each call
        starts with empty caches.
        """
        return self.generate_each(
            prompts, [spec.for_prompt(index) for index in range(len(prompts))]
        )

    def generate_each(
        self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]
    ) -> list[list[Rollout]]:
        """Return `specs[i].n` rollouts of prompt i, in order, as `generate` does."""
        requests = [make_request(prompt) for prompt in prompts]
        for request, spec in zip(requests, specs, strict=True):
            check_length(request, spec, self.max_model_len)
        finished: dict[str, list[Rollout]] = {}
        keys = [str(index) for index in range(len(requests))]
        with preserve_trainer_state():
            try:
                for key, request, spec in zip(keys, requests, specs, strict=True):
                    self.submit(key, request, spec)
                while len(finished) < len(keys):
                    finished |= self.step()
            finally:
                self.abort([key for key in keys if key not in finished])
        return [finished[key] for key in keys]

    def submit(self, key: str, request: RolloutRequest, spec: SamplingSpec) -> None:
        """Queue a request under a unique key.

        spec: of this prompt alone, see `SamplingSpec.for_prompt`.

        An idle engine drops its caches first. A cached prefix changes which rows a kernel computes
        together, and some kernels round by the number of rows. A resumed run, whose caches are
        empty, would otherwise get other last bits.

        Raises RolloutError if the prompt cannot be answered; the engine then keeps nothing of it.
        """
        if self.version is None:
            raise RolloutError("The engine has no weights yet: sync weights first.")
        check_length(request, spec, self.max_model_len)
        if not self.busy:
            self._clear_caches()
        engine = self._llm.llm_engine
        prompt = vllm_prompt(request, self._family.engine, self._cache_name)
        (engine_input,) = engine.renderer.render_cmpl([prompt])
        try:
            self._inputs.check(request, engine_input)
        except RolloutError:
            engine.reset_mm_cache()  # vLLM believes that the engine holds the visuals
            raise
        engine.add_request(key, engine_input, self._sampling_params(spec))
        self._in_flight[key] = spec.seed, self.version

    @property
    def busy(self) -> bool:
        """True while `step` has requests to compute or to return."""
        return bool(self._in_flight or self._drained)

    def step(self) -> dict[str, list[Rollout]]:
        """Compute one token per running sequence and return the finished requests by key."""
        finished, self._drained = self._drained, {}
        return finished | self._decode() if self._in_flight else finished

    def _decode(self) -> dict[str, list[Rollout]]:
        with torch.compiler.set_stance(self._stance):
            outputs = self._llm.llm_engine.step()
        finished: dict[str, list[Rollout]] = {}
        for output in outputs:
            seed, version = self._in_flight.pop(output.request_id)
            finished[output.request_id] = [self._rollout(c, seed, version) for c in output.outputs]
        return finished

    def abort(self, keys: Sequence[str]) -> None:
        """Drop requests in flight. Unknown keys are ignored."""
        for key in keys:
            self._drained.pop(key, None)
        known = [key for key in keys if key in self._in_flight]
        if known:
            self._llm.llm_engine.abort_request(known)
        for key in known:
            del self._in_flight[key]

    def push_weights(self, named_tensors: NamedTensors, version: int) -> None:
        """Replace all weights and stamp later rollouts with `version`.

        named_tensors: HF names and whole tensors (no shards) that cover every parameter, in any
            order and any floating dtype.
        """
        self.start_update()
        self.load(named_tensors)
        self.finish_update(version)

    def start_update(self) -> None:
        """Invalidate the weights. The engine generates nothing until `finish_update`.

        A sleeping engine takes memory for its weights, and `finish_update` takes the rest.
        """
        self._drain()
        self.version = None  # stays None if the update fails
        with preserve_trainer_state():
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("start_weight_update")

    def _drain(self) -> None:
        """Finish the batch that asynchronous scheduling has in flight.

        vLLM stamps a token with the version that is set when the token comes out of its queue, and
        documents that versions change only while generation is paused.
        """
        if not (self._in_flight and scheduler_is_asynchronous(self._llm)):
            return
        self._llm.sleep(level=0, mode="keep")  # schedule nothing new
        self._drained |= self._decode()
        self._llm.wake_up(tags=["scheduling"])

    def load(self, weights: NamedTensors | WeightBucket) -> None:
        """Load some of the weights; whole modules come in one call.

        weights: tensors of this process (only if `in_process`), or a bucket in the memory of
            another process. Their memory may be reused after the call.
        """
        update = {"bucket" if isinstance(weights, WeightBucket) else "tensors": weights}
        with preserve_trainer_state():
            self._llm.collective_rpc("update_weights", args=(update,))

    def finish_update(self, version: int) -> None:
        """Make the new weights usable. Raises RolloutError if a tensor was left out.

        An idle engine clears the prefix cache and the vision encoder cache, which hold results of
        the old weights. With requests in flight both caches stay, since these requests read them
        and go on with the new weights; later requests use another cache salt. Decoded and
        normalised pixels stay cached in both cases, until the engine sleeps.
        """
        with preserve_trainer_state():
            self._llm.collective_rpc("update_weights", args=({"complete": True},))
            self._llm.collective_rpc("finish_weight_update")
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            if self.busy:
                self._cache_name = str(version)
            else:
                self._clear_caches()
            self._llm.llm_engine.set_weight_version(str(version))
        self.version = version

    def weights_checksum(self) -> Checksums:
        """Return SHA-256 of every live weight by HF name, see `checksums.tensor_checksums`."""
        checksums = partial(live_checksums, dtype=self.dtype, family=self._family.name)
        return self._llm.apply_model(checksums)[0]

    @property
    def device(self) -> torch.device:
        """Device of the engine's first process."""
        return torch.device("cuda", 0) if self._on_gpu else torch.device("cpu")

    def sleep(self) -> None:
        """Free the GPU memory of weights, KV cache and pixels. No effect on a CPU.

        The weights are not kept (vLLM's sleep level 2): the next weight sync brings new ones, and
        takes the memory back. Until then `version` is None.
        """
        if self._on_gpu and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep, self.version = True, None

    def _clear_caches(self) -> None:
        """Empty the prefix cache and the vision encoder cache of an idle engine."""
        engine = self._llm.llm_engine
        if not engine.reset_prefix_cache():
            raise RolloutError(
                "vLLM kept its prefix cache although no request is in flight: check that vllm is "
                "the pinned version."
            )
        engine.reset_encoder_cache()

    def _sampling_params(self, spec: SamplingSpec) -> Any:
        return self._vllm.SamplingParams(
            n=spec.n,
            temperature=spec.temperature,
            top_p=spec.top_p,
            max_tokens=spec.max_tokens,
            seed=spec.seed,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            stop_token_ids=self._stop_token_ids,
            logit_bias=dict.fromkeys(self.banned_token_ids, float("-inf")),
            logprobs=0,  # only of the sampled token
            flat_logprobs=True,
            detokenize=False,  # once at the end, not at every step
        )

    def _rollout(self, completion: Any, seed: int, version: int) -> Rollout:
        token_ids = np.array(completion.token_ids, dtype=np.int64)  # [R]
        logprobs = np.array(completion.logprobs.logprobs, dtype=np.float32)  # [R]
        if len(logprobs) != len(token_ids) or completion.finish_reason not in ("stop", "length"):
            raise RolloutError(
                f"vLLM returned {len(token_ids)} tokens with {len(logprobs)} log-probs, finished "
                f"by {completion.finish_reason!r}; check that vllm is the pinned version."
            )
        return Rollout(
            token_ids=token_ids,
            logprobs=logprobs,
            text=self._tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            finish=completion.finish_reason,
            weight_version=version,
            newest_version=int(completion.weight_versions[-1].version),
            seed=seed + completion.index,  # vLLM's seed of the index-th completion
        )


def _reason(error: Exception) -> str:
    """Return the line of a vLLM error that names the cause; pydantic puts a count before it."""
    lines = str(error).strip().splitlines()
    line = lines[1] if "validation error" in lines[0] else lines[0]
    return line.partition(" [type=")[0].strip()
