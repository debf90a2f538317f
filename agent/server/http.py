"""The HTTP port: metrics and health. Nothing here changes anything."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from agent.telemetry.metrics import Metrics


def http_application(
    metrics: Metrics, is_started: Callable[[], bool], publish: Callable[[], None] = lambda: None
) -> web.Application:
    """Build the application of the HTTP port; `publish` brings the metrics up to date before they are read.

    `/healthz` says that the event loop turns, `/startupz` and `/readyz` that the socket is served. A store that is
    away shows in the metrics, not here: Kubernetes must not keep PostgreSQL down because S3 is.
    """

    async def get_metrics(_request: web.Request) -> web.Response:
        publish()
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthy(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def started(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n") if is_started() else web.Response(status=503, text="starting\n")

    application = web.Application()
    application.add_routes(
        [
            web.get("/metrics", get_metrics),
            web.get("/healthz", healthy),
            web.get("/readyz", started),
            web.get("/startupz", started),
        ]
    )
    return application
