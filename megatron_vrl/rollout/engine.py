"""The rollout engine: one vLLM engine inside every trainer process, tensor-parallel size 1.

Engines of different ranks share nothing after the start: ranks may call `generate` and
`push_weights` at different times and different numbers of times. Only the constructor is
collective when torch.distributed is initialised: vLLM makes its (one-member) groups there.

Log-probs are those of the distribution that was sampled: after the ban of tokens that no answer
may hold, after temperature and top-p ("processed"). The trainer computes the same numbers if it
masks the logits of `banned_token_ids` and divides by the temperature; what then remains is
arithmetic. Without the mask its log-probs are lower by -log(1 - banned mass), at every token.

Left out: engines in processes of their own, tensor parallelism, quantised rollouts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vrl import config
from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import NamedTensors, torch_dtype, write_buckets
from megatron_vrl.rollout.checksums import live_checksums
from megatron_vrl.rollout.vllm_process import import_vllm, trainer_state_kept
from megatron_vrl.types import EncodedVideo, Prompt, Rollout

MIN_BATCHED_TOKENS = 2048
PIXEL_CACHE_GIB = 1.0  # processed pixels of recent videos, host memory


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    n: int  # answers per prompt
    temperature: float  # 0 is greedy, and asks for n == 1
    top_p: float
    max_tokens: int
    seed: int  # give every rank and every step its own

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise RolloutError(
                f"n={self.n} greedy answers would be equal; set n=1 or temperature>0."
            )
        if not 0 < self.top_p <= 1:
            raise RolloutError(f"top_p={self.top_p} keeps no token; choose a value in (0, 1].")


class ColocatedEngine:
    def __init__(
        self, hf_dir: str, cfg: config.Rollout, *, dtype: str, seed: int, max_model_len: int
    ) -> None:
        """Start from the directory's config and tokenizer; weights are zeros until the first
        `push_weights`. All ranks call this together.
        """
        if not (Path(hf_dir) / "config.json").is_file():
            raise RolloutError(f"{hf_dir} has no config.json; give a Hugging Face checkpoint.")
        self._vllm = import_vllm()
        self._dtype = torch_dtype(dtype)
        self._max_model_len = max_model_len
        self._on_gpu = self._vllm.platforms.current_platform.is_cuda()
        groups_exist = torch.distributed.is_initialized()
        # Under torchrun the rank comes from the launcher and the trainer's groups are used.
        several_ranks = groups_exist and torch.distributed.get_world_size() > 1
        executor = "external_launcher" if several_ranks else "uni"
        arguments = self._arguments(hf_dir, cfg, dtype, seed, max_model_len)
        with trainer_state_kept():
            try:
                self._llm = self._vllm.LLM(**arguments, distributed_executor_backend=executor)
            except (ValueError, OSError) as error:
                raise RolloutError(
                    f"vLLM refuses to start with kv_cache_mib={cfg.kv_cache_mib}, gpu_memory_share="
                    f"{cfg.gpu_memory_share}, max_model_len={max_model_len}: {_reason(error)}"
                ) from error
        # vLLM's clean-up at exit would destroy the trainer's process groups, or fail on groups that
        # the trainer has closed by then; all of them end with the process.
        self._llm.llm_engine.engine_core._finalizer.detach()
        self._tokenizer = self._llm.get_tokenizer()
        self._stop_token_ids = self._tokenizer.convert_tokens_to_ids(
            ["<|im_end|>", "<|endoftext|>"]
        )
        self.banned_token_ids = _banned(
            self._tokenizer, self._llm.model_config.get_vocab_size(), self._stop_token_ids
        )
        # vLLM compiles two helpers of its sampler even when told to be eager: 3 - 19 s on a CPU.
        self._stance = "default" if self._on_gpu else "force_eager"
        self._asleep = False
        self._version: int | None = None

    def _arguments(
        self, hf_dir: str, cfg: config.Rollout, dtype: str, seed: int, max_model_len: int
    ) -> dict[str, Any]:
        on_device: dict[str, Any] = {
            "enforce_eager": True,  # compiling pays off on a GPU only
            "kv_cache_memory_bytes": cfg.kv_cache_mib << 20,
            "block_size": 32,  # short prompts share more of their cache than with 128
        }
        if self._on_gpu:
            on_device = {
                "gpu_memory_utilization": cfg.gpu_memory_share,
                "enable_sleep_mode": True,
            }
        return on_device | {
            "model": hf_dir,
            "load_format": "zeros",
            "dtype": dtype,
            "seed": seed,
            "max_model_len": max_model_len,
            "max_num_seqs": cfg.max_sequences,
            "max_num_batched_tokens": max(max_model_len, MIN_BATCHED_TOKENS),
            "weight_transfer_config": {"backend": "shared_memory"},
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # the published one sets a repetition penalty
            "limit_mm_per_prompt": {"video": 1, "image": 0},
            "mm_processor_kwargs": {"do_resize": False, "cap_pixels_per_frame": False},
            "mm_processor_cache_gb": PIXEL_CACHE_GIB,
            "disable_log_stats": True,
        }

    def generate(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[list[Rollout]]:
        """`spec.n` answers per prompt, in order; equal weights, prompts and spec repeat them."""
        if self._version is None:
            raise RolloutError("The engine has no weights yet; call push_weights first.")
        for prompt in prompts:
            self._check_length(prompt, spec)
        with trainer_state_kept(spec.seed), torch.compiler.set_stance(self._stance):
            outputs = self._llm.generate(
                [_request(prompt) for prompt in prompts],
                self._sampling_params(spec),
                use_tqdm=False,
            )
        for prompt, output in zip(prompts, outputs, strict=True):
            _check_prompt_tokens(prompt, output.prompt_token_ids)
        return [[self._rollout(answer) for answer in output.outputs] for output in outputs]

    def push_weights(self, named_tensors: NamedTensors, version: int) -> None:
        """Replace all weights by tensors under their published names; stamp later rollouts.

        The tensors must be whole (not shards) and cover every parameter; any order, any
        floating type. Clears the prefix cache and the vision encoder cache, both of which hold
        results of the old weights; decoded and normalised pixels stay.
        """
        self._version = None  # a failed update leaves no usable weights
        with trainer_state_kept():
            self._llm.collective_rpc("start_weight_update")
            for bucket in write_buckets(named_tensors, self._dtype):
                self._llm.collective_rpc("update_weights", args=({"bucket": asdict(bucket)},))
            self._llm.collective_rpc("finish_weight_update")
            self._llm.reset_prefix_cache()
            self._llm.llm_engine.reset_encoder_cache()
        self._version = version

    def weights_checksum(self) -> dict[str, str]:
        """SHA-256 of every live weight by published name, see `checksums.tensor_checksums`."""
        dtype = self._dtype
        return self._llm.apply_model(lambda model: live_checksums(model, dtype))[0]

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

    def _check_length(self, prompt: Prompt, spec: SamplingSpec) -> None:
        needed = len(prompt.token_ids) + spec.max_tokens
        if needed > self._max_model_len:
            raise RolloutError(
                f"Sample {prompt.id}: {len(prompt.token_ids)} prompt tokens and up to "
                f"{spec.max_tokens} answer tokens do not fit the engine's {self._max_model_len}; "
                "lower data.max_prompt_tokens or the answer's length."
            )

    def _sampling_params(self, spec: SamplingSpec) -> Any:
        return self._vllm.SamplingParams(
            n=spec.n,
            temperature=spec.temperature,
            top_p=spec.top_p,
            max_tokens=spec.max_tokens,
            stop_token_ids=self._stop_token_ids,
            logit_bias=dict.fromkeys(self.banned_token_ids, float("-inf")),
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,  # once at the end, not at every step
        )

    def _rollout(self, answer: Any) -> Rollout:
        token_ids = np.array(answer.token_ids, dtype=np.int64)  # [R]
        logprobs = np.array(answer.logprobs.logprobs, dtype=np.float32)  # [R]
        if len(logprobs) != len(token_ids) or answer.finish_reason not in ("stop", "length"):
            raise RolloutError(
                f"vLLM returned {len(token_ids)} tokens with {len(logprobs)} log-probs, finished "
                f"by {answer.finish_reason!r}; check that vllm is the pinned version."
            )
        assert self._version is not None
        return Rollout(
            token_ids=token_ids,
            logprobs=logprobs,
            text=self._tokenizer.decode(answer.token_ids, skip_special_tokens=True),
            finish=answer.finish_reason,
            weight_version=self._version,
        )


def _reason(error: Exception) -> str:
    """The line that says what is wrong; pydantic puts a count of errors before it."""
    lines = str(error).strip().splitlines()
    line = lines[1] if "validation error" in lines[0] else lines[0]
    return line.partition(" [type=")[0].strip()


def _banned(tokenizer: Any, vocab_size: int, allowed: list[int]) -> tuple[int, ...]:
    """Special tokens except `allowed`, and rows of the vocabulary that stand for no token."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted((special | set(range(len(tokenizer), vocab_size))) - set(allowed)))


def _request(prompt: Prompt) -> dict[str, Any]:
    return {
        "prompt_token_ids": list(prompt.engine_token_ids),
        "multi_modal_data": {"video": [(v.frames, _metadata(v)) for v in _videos(prompt)]},
    }


def _videos(prompt: Prompt) -> list[EncodedVideo]:
    """Raises RolloutError for a still picture: vLLM would encode it by rules of its own."""
    videos = [visual for visual in prompt.visuals if isinstance(visual, EncodedVideo)]
    if len(videos) < len(prompt.visuals):
        raise RolloutError(f"Sample {prompt.id} has an image; rollouts take videos only.")
    return videos


def _metadata(video: EncodedVideo) -> dict[str, Any]:
    """Metadata under which the processor takes all frames as they are.

    It derives the seconds per grid step as 2 / fps, so fps is stated from that side, and keeps it
    in 32 bits: positions agree with a trainer that uses float(np.float32(seconds_per_grid)).
    """
    num_frames = len(video.frames)
    fps = 2.0 / video.seconds_per_grid
    return {
        "total_num_frames": num_frames,
        "fps": fps,
        "duration": num_frames / fps,
        "frames_indices": list(range(num_frames)),
        "video_backend": "megatron_vrl",
        "do_sample_frames": False,
    }


def _check_prompt_tokens(prompt: Prompt, used: list[int]) -> None:
    if used != prompt.token_ids.tolist():
        grids = [visual.grid_thw for visual in prompt.visuals]
        raise RolloutError(
            f"Sample {prompt.id}: vLLM read {len(used)} prompt tokens, the trainer "
            f"{len(prompt.token_ids)}, or others; the grids are {grids}."
        )
