"""Serve rollouts to trainers that run with rollout.placement=workers.

    mvrl worker --config FILE [--host H] [--port P] [section.key=value ...]

launch/rollout_worker.sh takes the same arguments, starts a worker for each `rollout.tensor` GPUs of
the machine, and starts a worker again when it dies. The config is the trainer's own. The worker
listens on loopback by default. To listen on another address it needs a token in
MEGATRON_VRL_ROLLOUT_TOKEN, which it then asks of every client. With `rollout.discovery_dir` it
announces its address in that directory. A worker has no weights until the first weight sync of a
trainer.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_vrl.errors import ConfigError
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program
from megatron_vrl.process.parent_death import end_with_parent

if TYPE_CHECKING:
    from megatron_vrl.config import RunConfig

GRACE_S = 2  # for responses in flight when the worker is asked to stop


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, the trainer's own")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (0: a free one)")
    parser.add_argument(
        "--gpu-groups",
        action="store_true",
        help="print CUDA_VISIBLE_DEVICES of each worker of this machine, one a line, and end",
    )
    parser.add_overrides()
    return parser


def main() -> None:
    arguments = make_parser().parse_intermixed_args()
    end_with_parent()
    from megatron_vrl.config import load_config
    from megatron_vrl.rollout.workers.discovery import TOKEN_VARIABLE

    cfg = load_config(arguments.config, arguments.overrides)
    if arguments.gpu_groups:
        _print_gpu_groups(cfg.rollout.tensor)
        return
    token = os.environ.get(TOKEN_VARIABLE, "")
    _check_token(arguments.host, token)
    with _listening(arguments.host, arguments.port) as listener:
        _serve(cfg, listener, token)


def _print_gpu_groups(tensor: int) -> None:
    import torch

    from megatron_vrl.rollout.workers.gpu_groups import gpu_groups

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    print("\n".join(gpu_groups(tensor, torch.cuda.device_count(), visible)))


def _check_token(host: str, token: str) -> None:
    """Raise ConfigError if the address is open to other machines and there is no token."""
    from megatron_vrl.rollout.workers.discovery import TOKEN_VARIABLE

    if not token and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} is open to other machines: set {TOKEN_VARIABLE} for the worker and the "
            "trainer, or listen on 127.0.0.1."
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: {error.strerror}; choose another."
        ) from None
    with listener:
        yield listener


def _serve(cfg: "RunConfig", listener: socket.socket, token: str) -> None:
    from megatron_vrl.observe.silence_logs import silence_libraries

    silence_libraries()
    import uvicorn

    from megatron_vrl.checkpoint.layout import hf_dir_of
    from megatron_vrl.models.architecture import read_architecture
    from megatron_vrl.models.vocabulary import check_tokenizer_files
    from megatron_vrl.rollout.backends import start_engine
    from megatron_vrl.rollout.workers.discovery import announce
    from megatron_vrl.rollout.workers.protocol import IDLE_S
    from megatron_vrl.rollout.workers.server import make_app
    from megatron_vrl.rollout.workers.worker_info import served_model

    hf_dir = hf_dir_of(cfg.model.checkpoint)
    check_tokenizer_files(hf_dir, read_architecture(hf_dir))
    engine = start_engine(cfg, hf_dir, cfg.rollout.tensor)
    app = make_app(engine, served_model(cfg, hf_dir, engine.banned_token_ids), token)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=GRACE_S,
            timeout_keep_alive=2 * IDLE_S,
        )
    )
    address = _address(listener)
    with announce(cfg.rollout.discovery_dir, address):
        print(f"worker: serving on {address}", flush=True)
        server.run(sockets=[listener])
    os._exit(0)  # vLLM's own shutdown waits for process groups that no other process has joined


def _address(listener: socket.socket) -> str:
    """Return the address that clients connect to."""
    host, port = listener.getsockname()[:2]
    everywhere = ipaddress.ip_address(host).is_unspecified
    return f"{socket.gethostname() if everywhere else host}:{port}"


if __name__ == "__main__":
    run_program(main)
