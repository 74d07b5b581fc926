"""Ray Serve deployment of a bundle.

Replicas run the server's application on all machines of a cluster:

    serve run --app-dir deploy/ray ray_server:build bundle=/bundle threads=2 max_replicas=4
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.applications import Starlette

from freeexport.commands.serve import KEY
from freeexport.serving.routes import application
from freeexport.serving.service import ServerOptions, Service
from runtime.options.generation_options import Mode
from runtime.options.session_options import SessionOptions


class Arguments(BaseModel):
    """Arguments of `build`.

    Attributes:
        bundle: Path of the bundle on every machine.
        name: Model name. Default: the name of the bundle's directory.
        mode: Mode for requests that set none. Default: the session's default.
        threshold: Threshold for requests that set none. Default: the bundle's threshold.
        threads: Cores per replica.
        slots: Requests that a replica decodes at once.
        queue: Requests that may wait at each proxy for any replica.
        deadline: Time limit for a request, in seconds.
        min_replicas: Minimum number of replicas.
        max_replicas: Maximum number of replicas.
        upscale_delay: Time for which the load must exceed the replicas before Ray adds some, in
            seconds.
        downscale_delay: Time for which replicas must be idle before Ray removes them, in seconds.
    """

    model_config = ConfigDict(extra="forbid")
    bundle: Path
    name: str | None = None
    mode: Mode | None = None
    threshold: float | None = Field(None, ge=0, le=1)
    threads: int = Field(2, ge=1)
    slots: int = Field(4, ge=1)
    queue: int = Field(256, ge=0)
    deadline: float = Field(120, gt=0)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    upscale_delay: float = Field(30, ge=0)
    downscale_delay: float = Field(600, ge=0)


@serve.ingress()
class Replica:
    """One session. Replicas on the same machine share the memory of its weights."""

    def __init__(self, arguments: Arguments) -> None:
        session = SessionOptions(
            threads=arguments.threads, slots=arguments.slots, threshold=arguments.threshold
        )
        options = ServerOptions(
            [arguments.bundle],
            [arguments.name] if arguments.name else [],
            session=session,
            mode=arguments.mode,
            deadline=arguments.deadline,
            api_key=os.environ.get(KEY),
        )
        self._service = Service(options, lambda line: print(line, flush=True))
        self._service.open()

    def __serve_build_asgi_app__(self) -> Starlette:
        return application(self._service)

    def check_health(self) -> None:
        """Check that the replica is ready. Ray replaces replicas that raise or do not respond."""
        if self._service.state != "ready":
            raise RuntimeError(f"the session is {self._service.state}")

    async def __del__(self) -> None:
        """Shut down. Ray calls this when no request is left or their grace period has ended."""
        await self._service.drain()


def build(arguments: Arguments) -> serve.Application:
    """Return the application for `serve run` and `serve deploy`."""
    deployment = serve.deployment(
        Replica,
        name="freeexport",
        # Twice the slots, so that a free slot gets its next request at once. Further requests wait
        # at the proxy, for any replica.
        max_ongoing_requests=2 * arguments.slots,
        max_queued_requests=arguments.queue,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.slots,
            "upscale_delay_s": arguments.upscale_delay,
            "downscale_delay_s": arguments.downscale_delay,
        },
        ray_actor_options={"num_cpus": arguments.threads},
        health_check_period_s=5,
        health_check_timeout_s=30,
        # A stopping replica takes no new requests, and its last one ends by the deadline.
        graceful_shutdown_timeout_s=arguments.deadline + 10,
        graceful_shutdown_wait_loop_s=1,
    )
    return deployment.bind(arguments)
