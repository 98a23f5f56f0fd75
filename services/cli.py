"""`sdxs serve`."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from sdxs import registry
from sdxs.client import Client
from sdxs.errors import AlreadyExists, NotFound
from services.settings import ServingSettings

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Name, name@pointer, sha256:digest, folder or s3:// bundle.")] = "emoji",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the gateway, in place of SDXS_GATEWAY_ADDRESS's.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="One process, no Ray.")] = False,
    fused_controlnet: Annotated[
        bool, typer.Option("--fused-controlnet", help="ControlNets inside the U-Net's replica, not one of their own.")
    ] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the Ray Serve config file and end.")] = False,
) -> None:
    """Serve a model over gRPC until Ctrl-C or SIGTERM.

    The gateway, text encoder, U-Net, decoder, job worker and, for a model that has any, ControlNets run as Ray Serve deployments
    on this machine; --local puts them into one process. Redis and S3 servers are started too, unless SDXS_REDIS_URL and
    SDXS_STORE_URL name some.

    \b
    sdxs serve                                # the emoji model on 127.0.0.1:8500
    sdxs serve --local --port 9000            # the same in one process, on another port
    sdxs serve --model emoji@prod             # what the name points to in the store
    sdxs serve --print-config > serve.yaml    # for `serve deploy` and RayService
    """
    if print_config:
        typer.echo(serve_config(model, fused_controlnet), nl=False)
        return
    if port is not None:
        host = ServingSettings().gateway_address.rpartition(":")[0]
        os.environ["SDXS_GATEWAY_ADDRESS"] = f"{host}:{port}"
    began = time.monotonic()
    settings = ServingSettings()
    for address in filter(None, (settings.gateway_address, settings.gateway_http_address)):
        _check_free(address)
    with _stop_signals() as stop, _servers():
        run = _run_local if local else _run_on_ray
        run(str(_open(model, settings)), fused_controlnet, ServingSettings(), stop, began)
    _say("stopped")


def _open(model: str, before: ServingSettings) -> Path:
    """The bundle's folder: from the store the caller named, else from the embedded one. A missing model ends it here."""
    try:
        return registry.open_model(model, before)[0]
    except NotFound:
        return registry.open_model(model, ServingSettings())[0]


def _run_local(model: str, fused: bool, settings: ServingSettings, stop: threading.Event, began: float) -> None:
    """All in this process."""
    from services.local import serve_local

    async def main() -> None:
        async with serve_local(model, settings, fused):
            await asyncio.to_thread(_wait_serving, settings, stop, began)
            await asyncio.to_thread(stop.wait)

    asyncio.run(main())


def _run_on_ray(model: str, fused: bool, settings: ServingSettings, stop: threading.Event, began: float) -> None:
    """Each room in its own processes."""
    from services.cluster import application, check_application, local_cluster

    _say("starting Ray")
    with local_cluster():
        _say("starting the replicas")
        with application(model, fused):
            _wait_serving(settings, stop, began, check_application)
            stop.wait()
            _say("stopping")


def _wait_serving(
    settings: ServingSettings, stop: threading.Event, began: float, check: Callable[[], None] = lambda: None
) -> None:
    """Say so when the gateway does; `check` raises when it never will."""
    with Client(settings.gateway_address) as client:
        for turn in itertools.count():
            if client.ready():
                break
            if turn % 10 == 9:
                check()
            if stop.wait(0.2):
                return
        [model] = client.list_models()
    seconds = time.monotonic() - began
    _say(f"SERVING {model.name} ({model.digest}) on {settings.gateway_address} after {seconds:.1f} s; Ctrl-C ends it")


@contextlib.contextmanager
def _servers() -> Iterator[None]:
    """Redis and S3 for what the settings do not name; their addresses go into the environment."""
    from sdxs import embedded

    with embedded.missing(ServingSettings()) as variables:
        os.environ.update(variables)
        yield


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; a second one ends the process at once."""
    stop = threading.Event()

    def ask(number: int, _: object) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_free(address: str) -> None:
    """gRPC shares a port with whoever has it already; say so instead. Raises AlreadyExists."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise AlreadyExists(f"{address} is taken ({error.strerror}); another --port?") from None


def serve_config(model: str, fused_controlnet: bool = False) -> str:
    """deploy/serve.yaml for that model."""
    import yaml

    from services.app import AppArgs, config

    args = AppArgs(model=model, fused_controlnet=fused_controlnet)
    return "# Made by `sdxs serve --print-config`.\n" + yaml.safe_dump(config(args), sort_keys=False)


def _say(message: str) -> None:
    """Progress goes to stderr."""
    print(message, file=sys.stderr, flush=True)
