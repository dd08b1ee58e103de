"""The HTTP endpoints: OpenAI's API over the engine, health and metrics."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from flame_composer.serve import protocol
from flame_composer.serve.answers import (
    Choice,
    Form,
    error,
    error_body,
    to_event,
    to_json,
    usage_of,
)
from flame_composer.serve.engine import Closed, Engine, Event, Failure, Full, Job, PromptScores
from flame_composer.serve.inbox import Inbox
from flame_composer.serve.page import page_endpoint
from flame_composer.serve.prepare import Preparation
from flame_composer.serve.protocol import BadRequest, Limits

BODY_SECONDS = 30  # for the whole body of a request to arrive
FAREWELL_SECONDS = 1  # for the last words to a client that may not be reading
CLIENT_LEFT = 499  # nginx's status for it; nobody sees it but the log


@dataclass(frozen=True)
class Service:
    """What the endpoints share."""

    name: str  # of the model, to clients
    engine: Engine
    preparation: Preparation
    limits: Limits
    max_body_bytes: int
    request_seconds: float


def build_app(service: Service) -> Starlette:
    """Return the ASGI application."""
    endpoints = Endpoints(service)
    app = Starlette(
        routes=[
            Route("/", page_endpoint(), methods=["GET"]),
            Route("/v1/completions", endpoints.complete, methods=["POST"]),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/models", endpoints.models, methods=["GET"]),
            Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
            Route("/health", endpoints.health, methods=["GET"]),
            Route("/metrics", endpoints.metrics, methods=["GET"]),
        ],
        exception_handlers={
            BadRequest: _refuse,
            HTTPException: _refuse_http,
            Exception: _fail,
        },
    )
    app.router.redirect_slashes = False
    return app


async def _refuse(_: Request, refusal: Any) -> Response:
    return error(
        refusal.status, refusal.message, refusal.param, refusal.code, logged=refusal.logged
    )


async def _refuse_http(_: Request, refusal: Any) -> Response:
    told = {404: "there is nothing here; see docs/serving.md for what there is"}
    told[405] = "this method is not for this address"
    message = told.get(refusal.status_code, str(refusal.detail))
    return error(refusal.status_code, message, headers=refusal.headers)


async def _fail(_: Request, __: Exception) -> Response:
    return error(500, "the server failed; see its log")


class Endpoints:
    """The functions behind the addresses."""

    def __init__(self, service: Service):
        self.service = service
        self.started = int(time.time())

    async def health(self, _: Request) -> Response:
        """Tell whether requests are taken."""
        engine = self.service.engine
        if engine.is_draining or not engine.is_alive:
            return error(503, "the server is about to end")
        return Response(to_json({"status": "ok"}), media_type="application/json")

    async def metrics(self, _: Request) -> Response:
        """Tell what has been counted, for Prometheus."""
        engine = self.service.engine
        return PlainTextResponse(
            engine.metrics.text({**engine.gauges(), **engine.prefixes.gauges()}),
            media_type="text/plain; version=0.0.4",
        )

    async def models(self, _: Request) -> Response:
        """Name the model."""
        listed = {"object": "list", "data": [self._card()]}
        return Response(to_json(listed), media_type="application/json")

    async def model(self, request: Request) -> Response:
        """Name the model, if it is the one that is asked for."""
        if request.path_params["name"] != self.service.name:
            return error(404, "there is no such model here", "model", "model_not_found")
        return Response(to_json(self._card()), media_type="application/json")

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.service.name,
            "object": "model",
            "created": self.started,
            "owned_by": "flame_composer",
            # Our own, for the page
            "chat": self.service.preparation.template is not None,
            "max_new_tokens": self.service.limits.max_new_tokens,
        }

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        return await self._answer(request, protocol.parse_completion)

    async def chat(self, request: Request) -> Response:
        """Answer in a conversation."""
        return await self._answer(request, protocol.parse_chat)

    async def _answer(
        self, request: Request, parse: Callable[[dict[str, Any], str, Limits], protocol.Request]
    ) -> Response:
        service = self.service
        content = protocol.parse_json(await read_body(request, service.max_body_bytes))
        asked = parse(content, service.name, service.limits)
        inbox, deadline = Inbox(), time.monotonic() + service.request_seconds
        try:
            with service.engine.room_for(max(1, len(asked.prompts))):
                jobs = await self._prepared(request, asked, inbox, deadline)
                service.engine.submit(jobs)
        except Full:
            return error(
                429, "too many requests are waiting; try again later", headers={"Retry-After": "1"}
            )
        except Closed:
            return error(503, "the server is about to end", headers={"Retry-After": "10"})
        exchange = Exchange(service, asked, jobs, inbox, deadline)
        request.state.exchange = exchange
        request.state.tokens = exchange.count
        if asked.stream:
            return Streamed(exchange)
        return await exchange.whole(request.receive)

    async def _prepared(
        self, request: Request, asked: protocol.Request, inbox: Inbox, deadline: float
    ) -> list[Job]:
        """Return the jobs of a request, or raise BadRequest, if only as the client has left.

        They are prepared in threads, for that may take seconds.
        """
        preparation, has_ended = self.service.preparation, threading.Event()
        jobs: list[Job] = []

        async def prepare() -> None:
            rendered = None
            if asked.is_chat:
                rendered = await asyncio.to_thread(preparation.render, asked)
            jobs.extend(
                await asyncio.to_thread(
                    preparation.jobs,
                    asked,
                    rendered,
                    inbox.deliver,
                    lambda: not has_ended.is_set(),
                )
            )

        try:
            if not await first_of(prepare(), until_left(request.receive), deadline):
                raise BadRequest("the client left", status=CLIENT_LEFT)
        except asyncio.TimeoutError:
            raise BadRequest(_too_long(self.service.request_seconds), status=504) from None
        finally:
            has_ended.set()
        return jobs


def _too_long(seconds: float) -> str:
    return f"the answer took longer than {seconds:g} seconds"


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request; raise BadRequest if it is no JSON, too large, or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no page of another site can send unasked
        raise BadRequest("the Content-Type must be application/json", status=415)
    too_large = BadRequest(f"the body must have {limit:,} bytes at most", status=413)
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()

    async def collect() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > limit:
                raise too_large

    try:
        await asyncio.wait_for(collect(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise BadRequest("the body did not arrive in time", status=408) from None
    except ClientDisconnect:
        raise BadRequest("the client left", status=CLIENT_LEFT) from None
    return bytes(body)


class Exchange:
    """A request under way, and what has come of it."""

    def __init__(
        self,
        service: Service,
        asked: protocol.Request,
        jobs: Sequence[Job],
        inbox: Inbox,
        deadline: float,  # of time.monotonic
    ):
        self.service, self.asked, self.jobs, self.inbox = service, asked, jobs, inbox
        preparation = service.preparation
        self.form = Form(asked, service.name, preparation.tokenizer, preparation.surfaces)
        self.choices = [Choice(row.job.echo) for job in jobs for row in job.rows]
        self.num_tokens = [0] * len(self.choices)
        self.deadline = deadline

    def count(self) -> tuple[int, int, int]:
        """Return the numbers of tokens of the prompts, of those written, and of those known."""
        cached = sum(job.num_cached for job in self.jobs)
        return sum(len(job.ids) for job in self.jobs), sum(self.num_tokens), cached

    def note(self, event: Event) -> tuple[int, Choice] | None:
        """Take an event into the choices; return the part of an answer that it adds, if any.

        A failure raises BadRequest.
        """
        if isinstance(event, Failure):
            raise BadRequest(event.message, status=event.status)
        if isinstance(event, PromptScores):
            for index in event.numbers:
                self.choices[index].of_prompt = event.scores
            return None
        choice, written = self.choices[event.number], event.written
        before = len(self.jobs[event.number // self.asked.n].echo)
        scores = [score._replace(start=score.start + before) for score in written.scores]
        part = Choice(written.text, scores, written.finish)
        choice.text += part.text
        choice.scores += part.scores
        choice.finish = part.finish
        self.num_tokens[event.number] = event.num_tokens
        return event.number, part

    @property
    def is_done(self) -> bool:
        """Whether all answers have ended."""
        return all(choice.finish is not None for choice in self.choices)

    def give_up(self) -> None:
        """Free what the request has taken."""
        self.service.engine.cancel(self.jobs)

    async def whole(self, receive: Callable[[], Awaitable[Any]]) -> Response:
        """Return the whole answer, once it is written."""

        async def collect() -> None:
            while not self.is_done:
                self.note(await self.inbox.get())

        try:
            if not await first_of(collect(), until_left(receive), self.deadline):
                return error(CLIENT_LEFT, "the client left")
        except asyncio.TimeoutError:
            return error(504, _too_long(self.service.request_seconds))
        finally:
            self.give_up()
        content = await asyncio.to_thread(self.form.whole, self.choices, usage_of(*self.count()))
        return Response(content, media_type="application/json")


class Streamed(Response):
    """An answer that is sent in parts, as server-sent events."""

    def __init__(self, exchange: Exchange):
        super().__init__(media_type="text/event-stream")
        self.exchange = exchange
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # for nginx

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the answer; whatever happens, free what the request has taken."""
        exchange = self.exchange
        try:
            if not await first_of(self._send(send), until_left(receive), exchange.deadline):
                scope["state"]["error"] = "the client left"
        except BadRequest as refusal:
            scope["state"]["error"] = refusal.logged
            await self._part(send, refusal.status, refusal.message)
        except asyncio.TimeoutError:
            scope["state"]["error"] = message = _too_long(exchange.service.request_seconds)
            await self._part(send, 504, message)
        finally:
            exchange.give_up()

    has_begun = False

    async def _begin(self, send: Any) -> None:
        if not self.has_begun:
            self.has_begun = True
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})

    async def _send(self, send: Any) -> None:
        """Send all parts. The status is sent only once there is something to show."""
        exchange = self.exchange
        form, begun = exchange.form, set()
        while not exchange.is_done:
            noted = exchange.note(await exchange.inbox.get())
            if noted is None:
                continue
            index, part = noted
            lines = b""
            if exchange.asked.is_chat and index not in begun:
                begun.add(index)
                lines = to_event(form.first_chunk(index))
            lines += to_event(form.chunk(index, part))
            await self._begin(send)
            await send({"type": "http.response.body", "body": lines, "more_body": True})
        lines = b"data: [DONE]\n\n"
        if exchange.asked.include_usage:
            lines = to_event(form.usage_chunk(usage_of(*exchange.count()))) + lines
        await send({"type": "http.response.body", "body": lines, "more_body": False})

    async def _part(self, send: Any, status: int, message: str) -> None:
        """Tell the client why the answer ends, in a form for where the answer is."""
        body = error_body(status, message)
        if not self.has_begun:
            self.status_code = status
            self.headers["content-type"] = "application/json"
        content = to_event(body) if self.has_begun else to_json(body)

        async def say() -> None:
            await self._begin(send)
            await send({"type": "http.response.body", "body": content, "more_body": False})

        try:
            await asyncio.wait_for(say(), FAREWELL_SECONDS)
        except asyncio.TimeoutError:  # it is not reading; serve.connections ends the connection
            return


async def until_left(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return once the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(work: Any, end: Any, deadline: float) -> bool:
    """Run `work` until it is done or `end` is; return whether it was done, or raise its error.

    Raise TimeoutError at the deadline (of time.monotonic). What is not done is cancelled.
    """
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(end)]
    try:
        timeout = max(0.0, deadline - time.monotonic())
        done, _ = await asyncio.wait(tasks, timeout=timeout, return_when="FIRST_COMPLETED")
        if not done:
            raise asyncio.TimeoutError
        if tasks[0] not in done:
            return False
        tasks[0].result()
        return True
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
