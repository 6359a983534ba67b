"""A TCP proxy on loopback that causes network faults, between our processes and a server in the chaos tests.

Owns its connections and one thread with an event loop; only that thread uses them. A mode can be set from any thread.
It is in effect when the call returns, for existing and new connections. Modes can be combined; `heal` ends all of them.
Must not interpret the bytes.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from threading import Thread
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")
CHUNK = 256 * 1024
RST = struct.pack("ii", 1, 0)  # SO_LINGER with zero seconds: close() sends RST instead of FIN


class Way(StrEnum):
    FORTH = "client to server"
    BACK = "server to client"


@dataclass
class Spot:
    """A stream offset where a fault happens, `times` times; None means always."""

    at: int
    times: int | None

    def spend(self) -> bool:
        """Use up one time; False if none was left."""
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


@dataclass
class Rules:
    """The current network faults, except silence."""

    delay: float = 0.0
    refuse: bool = False
    answer: bytes | None = None
    cut: Spot | None = None
    flips: dict[Way, Spot] = field(default_factory=dict)


@dataclass
class Link:
    """One client's connection. `server` is None if the proxy answers instead of the server."""

    client: socket.socket
    cut: Spot | None
    server: socket.socket | None = None
    back: asyncio.Task[None] | None = None
    passed: Counter[Way] = field(default_factory=Counter)
    reset: bool = True

    def close(self) -> None:
        for end in (self.client, self.server):
            if end is not None:
                if self.reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
                end.close()


class Cut(Exception):
    """End this connection by RST now."""


class Proxy:
    """A proxy on 127.0.0.1:`port` in front of a server, while the `with` block lasts.

    `connections` counts connections, `passed` bytes by `Way`. `faults` counts faults by name: reset, cut, corrupt,
    answer (connections), latency (delayed chunks) and held (chunks and connections that met silence).
    """

    def __init__(self, host: str, port: int) -> None:
        self.connections = 0
        self.passed: Counter[Way] = Counter()
        self.faults: Counter[str] = Counter()
        self._server = (host, port)
        self._rules = Rules()
        self._links: dict[asyncio.Task[None], Link] = {}
        self._flows = {way: asyncio.Event() for way in Way}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.heal()
        self._accepting = self._now(lambda: self._loop.create_task(self._accept()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(self._accepting, *self._links), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._listener.close()

    # ------------------------------------------------------------ modes

    def heal(self) -> None:
        """End all faults. Held bytes flow again, as after a cable is replugged; closed connections stay closed."""

        def act() -> None:
            self._rules = Rules()
            self._open(*Way)

        self._now(act)

    def latency(self, seconds: float) -> None:
        """Delay every chunk by this long in each direction; later chunks wait behind it."""
        self._now(lambda: setattr(self._rules, "delay", seconds))

    def reset(self) -> None:
        """Reset every connection, and each new one until `heal`."""
        self._now(lambda: setattr(self._rules, "refuse", True))
        self.sever()

    def sever(self) -> None:
        """Reset every existing connection once. New connections work."""
        asyncio.run_coroutine_threadsafe(self._sever(), self._loop).result()

    def blackhole(self) -> None:
        """Accept connections but pass no bytes in either direction, and no end of a connection."""
        self._now(self._open)

    def half_open(self) -> None:
        """Pass bytes to the server but none back: the server acts, and its answers are lost."""
        self._now(lambda: self._open(Way.FORTH))

    def cut_after(self, size: int, *, times: int | None = None) -> None:
        """Reset each NEW connection after exactly `size` bytes from client to server; `times` connections at most."""
        self._now(lambda: setattr(self._rules, "cut", Spot(size, times)))

    def corrupt(self, at: int, *, times: int = 1) -> None:
        """Flip a bit in byte `at` of what a client sends, in the next `times` connections that get so far."""
        self._now(lambda: self._rules.flips.update({Way.FORTH: Spot(at, times)}))

    def corrupt_answer(self, at: int, *, times: int = 1) -> None:
        """Like `corrupt`, for what the server sends."""
        self._now(lambda: self._rules.flips.update({Way.BACK: Spot(at, times)}))

    def answer(self, data: bytes) -> None:
        """Answer a client's next bytes with `data` and close; the server does not get them."""
        self._now(lambda: setattr(self._rules, "answer", data))

    def _now(self, act: Callable[[], T]) -> T:
        """Run `act` on the loop's thread and wait for its result."""

        async def acted() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(acted(), self._loop).result()

    def _open(self, *ways: Way) -> None:
        for way, flow in self._flows.items():
            if way in ways:
                flow.set()
            else:
                flow.clear()

    async def _sever(self) -> None:
        self.faults["reset"] += len(self._links)
        await self._end(*self._links)

    async def _end(self, *tasks: asyncio.Task[None]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------ connections

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            self.connections += 1
            link = Link(client, self._rules.cut)
            if self._rules.refuse:
                self.faults["reset"] += 1
                link.close()
                continue
            task = self._loop.create_task(self._serve(link))
            self._links[task] = link
            task.add_done_callback(self._ended)  # a `finally` would not run in a task that is cancelled unstarted

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._links.pop(task).close()

    async def _serve(self, link: Link) -> None:
        """Serve one connection to its end. `link.reset` stays true unless both sides ended by FIN."""
        link.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._flowing(Way.FORTH)
            if self._rules.answer is not None:
                if await self._loop.sock_recv(link.client, CHUNK):
                    await self._reply(link, self._rules.answer)
            else:
                link.server = socket.socket()
                link.server.setblocking(False)
                await self._loop.sock_connect(link.server, self._server)
                link.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with asyncio.TaskGroup() as both:
                    link.back = both.create_task(self._pump(link, Way.BACK, link.server, link.client))
                    both.create_task(self._pump(link, Way.FORTH, link.client, link.server))
            link.reset = False
        except* (OSError, Cut):
            link.reset = True  # one side ended by an error, or is cut: reset the other too

    async def _pump(self, link: Link, way: Way, source: socket.socket, sink: socket.socket) -> None:
        """Pass bytes in one direction until its sender ends."""
        while data := await self._received(way, source):
            rules, begin = self._rules, link.passed[way]
            if way is Way.FORTH and rules.answer is not None:
                return await self._reply(link, rules.answer)
            if rules.delay:
                self.faults["latency"] += 1
                await asyncio.sleep(rules.delay)
            flip = rules.flips.get(way)
            if flip is not None and begin <= flip.at < begin + len(data) and flip.spend():
                self.faults["corrupt"] += 1
                data = flipped(data, flip.at - begin)
            cut = link.cut if way is Way.FORTH and link.cut is rules.cut else None
            cutting = cut is not None and begin + len(data) >= cut.at and cut.spend()
            if cut is not None and cutting:
                data = data[: cut.at - begin]
            link.passed[way] += len(data)
            self.passed[way] += len(data)
            await self._loop.sock_sendall(sink, data)
            if cutting:
                self.faults["cut"] += 1
                raise Cut
        sink.shutdown(socket.SHUT_WR)
        return None

    async def _received(self, way: Way, source: socket.socket) -> bytes:
        """The next chunk, once silence is over; empty at the end of the stream."""
        data = await self._loop.sock_recv(source, CHUNK)
        await self._flowing(way)
        return data

    async def _flowing(self, way: Way) -> None:
        if not self._flows[way].is_set():
            self.faults["held"] += 1
            await self._flows[way].wait()

    async def _reply(self, link: Link, data: bytes) -> None:
        """Send `data` to the client, then read until it ends: otherwise an RST could overtake the answer."""
        if link.back is not None:
            link.back.cancel()
        self.faults["answer"] += 1
        await self._loop.sock_sendall(link.client, data)
        link.client.shutdown(socket.SHUT_WR)
        while await self._loop.sock_recv(link.client, CHUNK):
            pass


def flipped(data: bytes, at: int) -> bytes:
    """A copy of `data` with one bit of byte `at` flipped."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
