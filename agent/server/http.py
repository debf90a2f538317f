"""The HTTP port: metrics, health and the status page. Nothing here changes anything."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from agent.server.answers import errors_as_answers
from agent.server.status_page import HEADERS, render
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import AgentStatus, RestoreModeStatus, as_json
from agent.telemetry.status_metrics import publish


def http_application(
    metrics: Metrics,
    is_started: Callable[[], bool],
    status: Callable[[], AgentStatus | RestoreModeStatus],
) -> web.Application:
    """Build the application of the HTTP port; metrics and the status page are of `status`.

    `/healthz` says that the event loop turns, `/startupz` and `/readyz` that the socket is served. A store that is
    away shows in the metrics, not here: Kubernetes must not keep PostgreSQL down because S3 is. `/status.json` is
    `status` as it is.
    """

    async def get_metrics(_request: web.Request) -> web.Response:
        now = status()
        metrics.agent_info.labels(now.version, now.mode).set(1)
        if isinstance(now, AgentStatus):  # a restore sets its metrics itself
            publish(now, metrics)
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthy(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def started(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n") if is_started() else web.Response(status=503, text="starting\n")

    async def page(request: web.Request) -> web.Response:
        # In the address, because that is all that outlives the page's renewal.
        text = render(status(), all_backups="all" in request.query)
        return web.Response(text=text, content_type="text/html", headers=HEADERS)

    async def status_json(_request: web.Request) -> web.Response:
        return web.json_response(as_json(status()), headers={"Cache-Control": "no-store"})

    application = web.Application(middlewares=[errors_as_answers()])
    application.add_routes(
        [
            web.get("/", page),
            web.get("/metrics", get_metrics),
            web.get("/status.json", status_json),
            web.get("/healthz", healthy),
            web.get("/readyz", started),
            web.get("/startupz", started),
        ]
    )
    return application
