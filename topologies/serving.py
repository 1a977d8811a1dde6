"""Serving a run on Ray Serve: the OpenAI-compatible server of `actors/server.py` as a deployment named "server".

`serve_run` picks what the run has to offer (a palettized package with its adapters, else its newest policy), deploys it
and returns once a request has been answered; every wait has a deadline. It joins the Ray that this process is connected
to (the serve stage's), else starts one on this machine. Only the loopback interface listens unless `host` says
otherwise; Ray's HAProxy mode, which binds every interface, is refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from actors.server import ChatServer
from actors.server_app import build_app
from actors.server_backend import AdapterBackend
from afm_rl.errors import UserError
from afm_rl.tokenizer import FAST_FILE, SENTENCEPIECE_FILE
from quant.package import is_package
from topologies.run_folder import RunFolder
from topologies.stage_options import QuantizeStage

APP_NAME = "afm-rl"
#: Seconds a replica may take to load the model, and the server to answer its first request.
DEPLOY_DEADLINE_S = 180.0
#: Requests a replica works on or holds at once, and those that wait outside it; beyond both, clients get 503.
MAX_ONGOING, MAX_QUEUED = 16, 64
_POLL_S = 0.1


class ServingError(RuntimeError):
    """The deployment failed or did not come up in time; the message has Ray Serve's own reason."""


class Server:
    """One replica: loads the model, then answers through the FastAPI app."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        backend = AdapterBackend(folder, **options)
        self._server = ChatServer(backend, backend.tokenizer)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._server)


@dataclass(frozen=True)
class Serving:
    """A running server: `address` like http://127.0.0.1:8000 (OpenAI's base URL is `address`/v1), and its models."""

    address: str
    models: list[str]
    folder: Path
    _stop: Callable[[], None]

    def stop(self) -> None:
        """End the deployment and whatever was started for it."""
        self._stop()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve_run(
    run_path: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    block: bool = False,
    folder: str | os.PathLike[str] | None = None,
    replicas: int = 1,
    num_cpus: float = 0.1,
    compute_dtype: str = "float32",
    deadline_s: float = DEPLOY_DEADLINE_S,
) -> Serving:
    """Deploy a run's model; print its address and model names. With `block`, return after Ctrl-C or SIGTERM, stopped.

    `folder` overrides what `served_folder` picks; `port` 0 takes a free one. Raises UserError when there is nothing to
    serve, the port is taken or the replicas do not fit the cluster's free CPUs; ServingError when the deployment fails.
    """
    chosen = Path(folder) if folder is not None else served_folder(run_path)
    port = _free_port(host, port)
    started_ray = _ensure_ray()
    cleanup = contextlib.ExitStack()
    if started_ray:
        cleanup.callback(ray.shutdown)
    try:
        _require_cpus(replicas * num_cpus)
        address = _start_http(host, port, cleanup)
        deployment = serve.deployment(
            name="server",
            num_replicas=replicas,
            ray_actor_options={"num_cpus": num_cpus},
            max_ongoing_requests=MAX_ONGOING,
            max_queued_requests=MAX_QUEUED,
        )(serve.ingress()(Server))
        application = deployment.bind(str(chosen.resolve()), {"compute_dtype": compute_dtype})
        models = _deploy(application, address, deadline_s=deadline_s)
    except BaseException:
        cleanup.close()
        raise
    serving = Serving(address, models, chosen, cleanup.close)
    print(f"serving {chosen} at {address}/v1, models: {', '.join(models)}", flush=True)
    if block:
        with serving:
            _wait_for_signal()
    return serving


def served_folder(run_path: str | os.PathLike[str]) -> Path:
    """What a run offers: the package of its first target, else its newest policy. Raises UserError for neither."""
    run = RunFolder.open(Path(run_path))
    for stage in run.topology.stages:
        if isinstance(stage, QuantizeStage):
            package = run.packages / f"{stage.bits_per_weight[0]:g}bpw"
            if is_package(package):
                return package
    # A policy has its tokenizer beside it; a reward model has none.
    policies = [path for name in (SENTENCEPIECE_FILE, FAST_FILE) for path in run.policies.glob(f"*/*/{name}")]
    if not policies:
        raise UserError(
            f"{run.path} has no package and no policy: nothing to serve yet; let `afm-rl launch` get as far as the sft "
            "or quantize stage"
        )
    return max(policies, key=lambda path: (path.stat().st_mtime_ns, str(path))).parent


def _ensure_ray() -> bool:
    """Whether a Ray had to be started here."""
    if ray.is_initialized():
        return False
    # Ray's uv hook would build a second environment for every worker when launched through `uv run`.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    return True


def _require_cpus(num_cpus: float) -> None:
    free = ray.available_resources().get("CPU", 0.0)
    if free + 1e-6 < num_cpus:
        raise UserError(
            f"the server's replicas ask for {num_cpus:g} CPUs and {free:g} are free: lower actors.server.replicas or "
            "actors.server.num_cpus"
        )


def _start_http(host: str, port: int, cleanup: contextlib.ExitStack) -> str:
    """Start Ray Serve's HTTP proxy on this node; returns the address to reach it at."""
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise UserError("RAY_SERVE_ENABLE_HA_PROXY=1 would listen on every interface, without authentication: unset it")
    if serve.status().proxies:
        raise UserError(
            "Ray Serve already runs on this cluster, and its host and port cannot be changed: stop it with "
            "`serve shutdown`, or serve with a Ray of its own"
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    cleanup.callback(serve.shutdown)
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _free_port(host: str, port: int) -> int:
    """`port` if nothing listens there, any free one for 0. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host} port {port}: {error.strerror}; choose another port or host") from error
        return probe.getsockname()[1]


def _deploy(application: serve.Application, address: str, *, deadline_s: float) -> list[str]:
    """Wait until the application runs and answers; returns the names of its models."""
    end = time.monotonic() + deadline_s
    target = serve.RunTarget(application, name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    while True:
        app = serve.status().applications.get(APP_NAME)
        status = app.status.value if app else "unknown"
        if status == "RUNNING" and (models := _health(address)) is not None:
            return models
        reason = "; ".join([app.message, *(d.message for d in app.deployments.values())]) if app else ""
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServingError(f"the server could not start ({status}): {reason}")
        if time.monotonic() > end:
            raise ServingError(f"the server at {address} was not up after {deadline_s:g} s (status {status}): {reason}")
        time.sleep(_POLL_S)


def _health(address: str) -> list[str] | None:
    """The model names /health gives, or None while nothing answers."""
    # A proxy from the environment must not come between us and the loopback interface.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/health", timeout=5.0) as response:
            return json.load(response)["models"]
    except (OSError, urllib.error.HTTPError):
        return None


def _wait_for_signal() -> None:
    """Return after Ctrl-C or SIGTERM."""
    done = threading.Event()
    previous = {number: signal.signal(number, lambda *_: done.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        print("press Ctrl-C to stop", flush=True)
        while not done.wait(1.0):
            pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
