"""Answer over HTTP, in the form of OpenAI's chat completions, so that existing clients can ask.

  uhd-jax serve --checkpoint=runs/quickstart
  uhd-jax serve --checkpoint=runs/quickstart --demo      # and a page to try it in a browser

It listens on this machine only unless --host says otherwise. All programs are compiled before it listens. An API key is
asked for where the variable UHD_JAX_API_KEY or --api-key-file gives one. SIGTERM lets running requests end.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from uhd_jax.cli.common import UsageError, number, positive
from uhd_jax.config import MODES, MeshConfig, RunConfig

CONFIG = "none"
KEY_VARIABLE = "UHD_JAX_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax serve`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the folder of a training run or of a model")
    parser.add_argument("--name", metavar="NAME", help="of the model, for clients (default: the folder's)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="0: a free one (default: %(default)s)")
    parser.add_argument("--api-key-file", metavar="F", help=f"holds the API key; else {KEY_VARIABLE} may")
    parser.add_argument("--demo", action="store_true", help="also serve a page to try the model")
    parser.add_argument("--modes", type=_modes, metavar="M,M", help="what requests may ask for (default: the model's)")

    shapes = parser.add_argument_group("room")
    shapes.add_argument(
        "--rows", type=positive, default=8, metavar="N", help="answers at a time (default: %(default)s)"
    )
    shapes.add_argument(
        "--max-length",
        type=positive,
        default=4096,
        metavar="N",
        help="tokens of prompt and answer (%(default)s)",
    )
    shapes.add_argument(
        "--cache-mib", type=positive, default=256, metavar="N", help="of visual tokens to keep (%(default)s)"
    )

    shapes.add_argument(
        "--mesh", type=_mesh, metavar="AXIS=N,..", help="devices to spread over, as data=2,tensor=4 (default: one)"
    )

    limits = parser.add_argument_group("limits")
    for flag, default, text in (
        ("--max-waiting", 256, "requests that wait for a place"),
        ("--max-new-tokens", 2048, "tokens of an answer"),
        ("--max-images", 16, "images of a request"),
        ("--max-views", 64, "views of a request"),
        ("--max-pixels", 50_000_000, "pixels of a request's images"),
        ("--max-body-mib", 32, "size of a request"),
    ):
        limits.add_argument(flag, type=positive, default=default, metavar="N", help=f"{text} (%(default)s)")
    limits.add_argument(
        "--seconds",
        type=number,
        default=300.0,
        metavar="X",
        help="from request to end of answer (%(default)s)",
    )
    limits.add_argument(
        "--drain-seconds",
        type=number,
        default=30.0,
        metavar="X",
        help="for answers after SIGTERM (%(default)s)",
    )
    limits.add_argument(
        "--allow-host", action="append", default=[], type=_host, metavar="HOST[:PORT]",
        help="images are fetched from this host by http and https; may be repeated (default: data URLs only)",
    )  # fmt: skip


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Loads the model, compiles, serves."""
    try:
        from uhd_jax.serving.app import Server
        from uhd_jax.serving.server import LOOPBACK, run
        from uhd_jax.serving.settings import Settings
    except ModuleNotFoundError as error:
        raise UsageError(f"needs the package {error.name}: pip install 'uhd-jax[serve]'") from None
    import uhd_jax

    key = _key(arguments.api_key_file)
    local = arguments.host in ("127.0.0.1", "::1", "localhost")
    if not local and not key:
        print(f"warning: anybody who reaches {arguments.host} may ask; set {KEY_VARIABLE}", file=sys.stderr)
    assistant = uhd_jax.load(arguments.checkpoint, max_length=arguments.max_length)
    engine = _engine(assistant, arguments)
    settings = Settings(
        name=arguments.name or Path(arguments.checkpoint).resolve().name,
        api_key=key,
        max_body_bytes=arguments.max_body_mib * 2**20,
        max_images=arguments.max_images,
        max_pixels=arguments.max_pixels,
        max_views=arguments.max_views,
        max_new_tokens=arguments.max_new_tokens,
        seconds=arguments.seconds,
        drain_seconds=arguments.drain_seconds,
        fetch_hosts=tuple(arguments.allow_host),
        demo=arguments.demo,
        hosts=LOOPBACK if local else (),
    )
    print(f"compiling for {engine.shapes}", file=sys.stderr, flush=True)
    engine.start()
    run(Server(engine, settings), arguments.host, arguments.port, _ready(settings.name, arguments.demo))


def _engine(assistant, arguments: argparse.Namespace):
    import jax

    from uhd_jax.generation.engine import Engine
    from uhd_jax.generation.shapes import serving_shapes
    from uhd_jax.sharding.mesh import make_mesh
    from uhd_jax.sharding.rules import param_shardings

    mesh, params, shards = None, assistant.params, 1
    if arguments.mesh is not None:
        mesh = make_mesh(arguments.mesh)
        params = assistant.params = jax.device_put(params, param_shardings(params, mesh))
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return Engine(
        assistant,
        serving_shapes(assistant.config, arguments.rows, arguments.max_length, shards),
        max_waiting=arguments.max_waiting,
        modes=arguments.modes,
        cache_bytes=arguments.cache_mib * 2**20,
        params=params,
        mesh=mesh,
    )


def _ready(name: str, demo: bool):
    def say(url: str) -> None:
        page = f", page at {url}/" if demo else ""
        print(f"serving {name} at {url}/v1{page}", flush=True)

    return say


def _key(file: str | None) -> str:
    if not file:
        return os.environ.get(KEY_VARIABLE, "")
    key = Path(file).read_text(encoding="utf-8").strip()
    if not key:
        raise UsageError(f"--api-key-file: {file} is empty")
    return key


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def _mesh(text: str) -> MeshConfig:
    sizes = dict(part.partition("=")[::2] for part in text.split(","))
    if not set(sizes) <= {"data", "fsdp", "tensor"} or not all(size.isdecimal() for size in sizes.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not sizes of data, fsdp and tensor, as in data=2,tensor=4")
    return MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | {axis: int(size) for axis, size in sizes.items()})


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    if not set(modes) <= set(MODES):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(MODES)}")
    return modes


def _host(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*(:[0-9]{1,5})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host's name in small letters, with or without a port")
    return text
