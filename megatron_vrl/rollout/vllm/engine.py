"""One vLLM engine in this process.

As `VllmEngine` it lives in every trainer process, tensor-parallel size 1; a rollout worker
(server.py) holds one too, of any tensor-parallel size. Engines of different ranks share nothing
after the start: ranks may call `generate` and `push_weights` at different times and different
numbers of times. Only the constructor is collective when torch.distributed is initialised: vLLM
makes its (one-member) groups there.

Log-probs are those of the distribution that was sampled: after the ban of tokens that no answer
may hold, after temperature and top-p ("processed"). The trainer computes the same numbers if it
masks the logits of `banned_token_ids` and divides by the temperature; what then remains is
arithmetic. Without the mask its log-probs are lower by -log(1 - banned mass), at every token.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vrl import config
from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import Bucket, NamedTensors, torch_dtype
from megatron_vrl.rollout.checksums import live_checksums
from megatron_vrl.rollout.request import (
    InputCheck,
    Request,
    SamplingSpec,
    check_length,
    request_of,
    vllm_prompt,
)
from megatron_vrl.rollout.vllm.special_tokens import banned_token_ids, stop_token_ids
from megatron_vrl.rollout.vllm.startup import import_vllm, trainer_state_kept
from megatron_vrl.types import Prompt, Rollout

MIN_BATCHED_TOKENS = 2048
PIXEL_CACHE_GIB = 1.0  # processed pixels of recent videos, host memory


class VllmEngine:
    def __init__(
        self,
        hf_dir: str,
        cfg: config.Rollout,
        *,
        dtype: str,
        seed: int,
        max_model_len: int,
        tensor: int = 1,
    ) -> None:
        """Start from the directory's config and tokenizer; weights are zeros until the first
        update. All ranks call this together. `tensor`: processes that share the model; more than
        one is for a process without torchrun.
        """
        if not (Path(hf_dir) / "config.json").is_file():
            raise RolloutError(f"{hf_dir} has no config.json; give a Hugging Face checkpoint.")
        self._vllm = import_vllm()
        self.dtype = torch_dtype(dtype)
        self.max_model_len = max_model_len
        self._on_gpu = self._vllm.platforms.current_platform.is_cuda()
        groups_exist = torch.distributed.is_initialized()
        # Under torchrun the rank comes from the launcher and the trainer's groups are used.
        several_ranks = groups_exist and torch.distributed.get_world_size() > 1
        executor = "external_launcher" if several_ranks else "mp" if tensor > 1 else "uni"
        arguments = self._arguments(hf_dir, cfg, dtype, seed) | {"tensor_parallel_size": tensor}
        with trainer_state_kept():
            try:
                self._llm = self._vllm.LLM(**arguments, distributed_executor_backend=executor)
            except (ValueError, OSError) as error:
                raise RolloutError(
                    f"vLLM refuses to start with kv_cache_mib={cfg.kv_cache_mib}, "
                    f"gpu_memory_utilization={cfg.gpu_memory_utilization}, "
                    f"max_model_len={max_model_len}: {_reason(error)}"
                ) from error
        # vLLM's clean-up at exit would destroy the trainer's process groups, or fail on groups that
        # the trainer has closed by then; all of them end with the process.
        self._llm.llm_engine.engine_core._finalizer.detach()
        self._tokenizer = self._llm.get_tokenizer()
        self._stop_token_ids = stop_token_ids(self._tokenizer)
        vocab = self._llm.model_config.get_vocab_size()
        self.banned_token_ids = banned_token_ids(self._tokenizer, vocab)
        # vLLM compiles two helpers of its sampler even when told to be eager: 3 - 19 s on a CPU.
        self._stance = "default" if self._on_gpu else "force_eager"
        self._asleep = False
        self._inputs = InputCheck()
        self._under_way: dict[str, tuple[int, int]] = {}  # group -> seed, version at its start
        self._cache_name = ""  # of what is cached now
        self.version: int | None = None  # of the weights; None: none yet, or an update is under way

    def _arguments(self, hf_dir: str, cfg: config.Rollout, dtype: str, seed: int) -> dict[str, Any]:
        on_device: dict[str, Any] = {
            "enforce_eager": True,  # compiling pays off on a GPU only
            "kv_cache_memory_bytes": cfg.kv_cache_mib << 20,
            "block_size": 32,  # short prompts share more of their cache than with 128
            # A prompt in parts turns back its seed's generator, which torch cannot on a CPU.
            "enable_chunked_prefill": False,
        }
        if self._on_gpu:
            on_device = {
                "gpu_memory_utilization": cfg.gpu_memory_utilization,
                "enable_sleep_mode": True,
            }
        if cfg.quantization == "fp8":
            if not self._on_gpu:
                raise RolloutError(
                    "rollout.quantization=fp8 needs a GPU; rounded shows here what FP8 weights do."
                )
            on_device |= {
                "quantization": "fp8_per_channel",
                "quantization_config": {"ignore": ["visual.*"]},
            }
        return on_device | {
            "model": hf_dir,
            "load_format": "zeros",
            "dtype": dtype,
            "seed": seed,
            "max_model_len": self.max_model_len,
            "max_num_seqs": cfg.max_num_seqs,
            "max_num_batched_tokens": max(self.max_model_len, MIN_BATCHED_TOKENS),
            "weight_transfer_config": {"backend": "shared_memory"},
            "additional_config": {"cpu_prepack_weights": cfg.cpu_prepack_weights},
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # the published one sets a repetition penalty
            "limit_mm_per_prompt": {"video": 1, "image": 0},
            "mm_processor_kwargs": {"do_resize": False, "cap_pixels_per_frame": False},
            "mm_processor_cache_gb": PIXEL_CACHE_GIB,
            "enable_mm_embeds": True,  # a trainer may send what its own tower saw
            "disable_log_stats": True,
        }

    def generate(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[list[Rollout]]:
        """Return `spec.n` answers per prompt, in order.

        Equal weights, prompts and spec give equal tokens and log-probs, to the bit, whatever the
        engine answered before: each call starts with empty caches.
        """
        return self.answer(prompts, [spec.of_prompt(index) for index in range(len(prompts))])

    def answer(
        self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]
    ) -> list[list[Rollout]]:
        """The same with a spec for each prompt."""
        requests = [request_of(prompt) for prompt in prompts]
        for request, spec in zip(requests, specs, strict=True):
            check_length(request, spec, self.max_model_len)
        answers: dict[str, list[Rollout]] = {}
        keys = [str(index) for index in range(len(requests))]
        with trainer_state_kept():
            try:
                for key, request, spec in zip(keys, requests, specs, strict=True):
                    self.submit(key, request, spec)
                while len(answers) < len(keys):
                    answers |= self.step()
            finally:
                self.abort([key for key in keys if key not in answers])
        return [answers[key] for key in keys]

    def submit(self, key: str, request: Request, spec: SamplingSpec) -> None:
        """Queue a group under a key of its own; `spec` is of this prompt alone.

        An idle engine drops its caches first. A cached prefix changes which rows a kernel computes
        together, and some kernels round by that: a resumed run, whose caches are empty, would get
        other last bits. Raises RolloutError if the prompt cannot be answered, and then holds
        nothing of it.
        """
        if self.version is None:
            raise RolloutError("The engine has no weights yet; call push_weights first.")
        check_length(request, spec, self.max_model_len)
        if not self.busy:
            self._clear_caches()
        engine = self._llm.llm_engine
        (engine_input,) = engine.renderer.render_cmpl([vllm_prompt(request, self._cache_name)])
        try:
            self._inputs.check(request, engine_input)
        except RolloutError:
            engine.reset_mm_cache()  # it takes the video to have been sent, which it was not
            raise
        engine.add_request(key, engine_input, self._sampling_params(spec))
        self._under_way[key] = spec.seed, self.version

    @property
    def busy(self) -> bool:
        return bool(self._under_way)

    def step(self) -> dict[str, list[Rollout]]:
        """Compute one token for what is under way; the groups that are finished, by key."""
        with torch.compiler.set_stance(self._stance):
            outputs = self._llm.llm_engine.step()
        finished: dict[str, list[Rollout]] = {}
        for output in outputs:
            seed, version = self._under_way.pop(output.request_id)
            finished[output.request_id] = [self._rollout(a, seed, version) for a in output.outputs]
        return finished

    def abort(self, keys: Sequence[str]) -> None:
        """Drop groups that are under way; others are ignored."""
        known = [key for key in keys if key in self._under_way]
        if known:
            self._llm.llm_engine.abort_request(known)
        for key in known:
            del self._under_way[key]

    def push_weights(self, named_tensors: NamedTensors, version: int) -> None:
        """Replace all weights by tensors under their published names; stamp later rollouts.

        The tensors must be whole (not shards) and cover every parameter; any order, any
        floating type.
        """
        self.start_update()
        self.load(named_tensors)
        self.finish_update(version)

    def start_update(self) -> None:
        """Until `finish_update` the engine has no weights to generate with."""
        self.version = None  # a failed update leaves no usable weights
        with trainer_state_kept():
            self._llm.collective_rpc("start_weight_update")

    def load(self, weights: NamedTensors | Bucket) -> None:
        """Some of the weights: tensors of this process, or a bucket of another's memory.

        A layer's tensors come in one call; they may be reused afterwards.
        """
        update = {"bucket" if isinstance(weights, Bucket) else "tensors": weights}
        with trainer_state_kept():
            self._llm.collective_rpc("update_weights", args=(update,))

    def finish_update(self, version: int) -> None:
        """Raises RolloutError if a tensor was left out.

        Clears the prefix cache and the vision encoder cache, both of which hold results of the old
        weights; decoded and normalised pixels stay. Answers under way need both and go on with the
        new weights; then nothing is cleared, and what comes later has names of its own in them.
        """
        with trainer_state_kept():
            self._llm.collective_rpc("update_weights", args=({"complete": True},))
            self._llm.collective_rpc("finish_weight_update")
            if self.busy:
                self._cache_name = str(version)
            else:
                self._clear_caches()
            self._llm.llm_engine.set_weight_version(str(version))
        self.version = version

    def weights_checksum(self) -> dict[str, str]:
        """SHA-256 of every live weight by published name, see `checksums.tensor_checksums`."""
        return self._llm.apply_model(partial(live_checksums, dtype=self.dtype))[0]

    @property
    def device(self) -> torch.device:
        """Of its first process."""
        return torch.device("cuda", 0) if self._on_gpu else torch.device("cpu")

    def sleep(self) -> None:
        """Free the engine's GPU memory; weights wait in host memory. Does nothing on a CPU."""
        if self._on_gpu and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Take the memory back before the next push_weights or generate."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _clear_caches(self) -> None:
        """Empty the prefix cache and the vision encoder cache of an idle engine."""
        engine = self._llm.llm_engine
        if not engine.reset_prefix_cache():
            raise RolloutError(
                "vLLM kept its prefix cache although no request is under way: check that vllm is "
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
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,  # once at the end, not at every step
        )

    def _rollout(self, answer: Any, seed: int, version: int) -> Rollout:
        token_ids = np.array(answer.token_ids, dtype=np.int64)  # [R]
        logprobs = np.array(answer.logprobs.logprobs, dtype=np.float32)  # [R]
        if len(logprobs) != len(token_ids) or answer.finish_reason not in ("stop", "length"):
            raise RolloutError(
                f"vLLM returned {len(token_ids)} tokens with {len(logprobs)} log-probs, finished "
                f"by {answer.finish_reason!r}; check that vllm is the pinned version."
            )
        return Rollout(
            token_ids=token_ids,
            logprobs=logprobs,
            text=self._tokenizer.decode(answer.token_ids, skip_special_tokens=True),
            finish=answer.finish_reason,
            weight_version=version,
            newest_version=int(answer.weight_versions[-1].version),
            seed=seed + answer.index,  # as vLLM deals them out to the answers of a prompt
        )


def _reason(error: Exception) -> str:
    """The line that says what is wrong; pydantic puts a count of errors before it."""
    lines = str(error).strip().splitlines()
    line = lines[1] if "validation error" in lines[0] else lines[0]
    return line.partition(" [type=")[0].strip()
