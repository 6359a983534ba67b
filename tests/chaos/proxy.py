"""A TCP proxy on loopback that misbehaves on command: what lies between our processes and a server in the chaos tests.

Owns its connections and one thread with an event loop, which alone touches them. Every mode can be set from any thread,
has taken effect when the call returns, and acts on the connections that live and on those to come. Modes add up; `heal`
ends them all. Must not know what the bytes mean.
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
RST = struct.pack("ii", 1, 0)  # SO_LINGER, for no time: close() sends RST in place of FIN


class Way(StrEnum):
    FORTH = "client to server"
    BACK = "server to client"


@dataclass
class Spot:
    """An offset of a stream where something happens, as many `times`; None is without end."""

    at: int
    times: int | None

    def spend(self) -> bool:
        """Use one time up; False if none was left."""
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


@dataclass
class Rules:
    """What is wrong with the network at the moment, silence aside."""

    delay: float = 0.0
    refuse: bool = False
    answer: bytes | None = None
    cut: Spot | None = None
    flips: dict[Way, Spot] = field(default_factory=dict)


@dataclass
class Link:
    """One client's connection. There is no `server` where the proxy answers in its place."""

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
    """This connection shall end by RST, here."""


class Proxy:
    """127.0.0.1:`port` in front of a server, while the `with` block lasts.

    `connections`, and `passed` (bytes by `Way`), count what came through; `faults` what was done to it, by name: reset,
    cut, corrupt, answer (connections), latency (chunks delayed) and held (chunks and connections met by silence).
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
        """All is well again: what was held flows on, as after a cable is back; what was reset stays so."""

        def act() -> None:
            self._rules = Rules()
            self._open(*Way)

        self._now(act)

    def latency(self, seconds: float) -> None:
        """Every chunk waits this long, each way, and those behind it wait for it."""
        self._now(lambda: setattr(self._rules, "delay", seconds))

    def reset(self) -> None:
        """RST on every connection, and on each new one until `heal`."""
        self._now(lambda: setattr(self._rules, "refuse", True))
        self.sever()

    def sever(self) -> None:
        """RST on every connection, once. New ones are well."""
        asyncio.run_coroutine_threadsafe(self._sever(), self._loop).result()

    def blackhole(self) -> None:
        """Connections are accepted, and then there is silence both ways; not even an end is told."""
        self._now(self._open)

    def half_open(self) -> None:
        """The server hears and acts, but no word of it comes back."""
        self._now(lambda: self._open(Way.FORTH))

    def cut_after(self, size: int, *, times: int | None = None) -> None:
        """RST on each NEW connection once exactly `size` bytes of it have reached the server; on `times` at most."""
        self._now(lambda: setattr(self._rules, "cut", Spot(size, times)))

    def corrupt(self, at: int, *, times: int = 1) -> None:
        """Flip a bit of byte `at` of what a client sends, in the next `times` connections to get so far."""
        self._now(lambda: self._rules.flips.update({Way.FORTH: Spot(at, times)}))

    def corrupt_answer(self, at: int, *, times: int = 1) -> None:
        """The same for what the server sends."""
        self._now(lambda: self._rules.flips.update({Way.BACK: Spot(at, times)}))

    def answer(self, data: bytes) -> None:
        """What a client sends next is answered with `data`, and that is the end; the server hears nothing of it."""
        self._now(lambda: setattr(self._rules, "answer", data))

    def _now(self, act: Callable[[], T]) -> T:
        """Run on the loop's thread, and wait until it is done."""

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
        """One connection from beginning to end; `link.reset` holds unless both sides came to their end by FIN."""
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
            link.reset = True  # one side is gone, or shall be: the other hears of it

    async def _pump(self, link: Link, way: Way, source: socket.socket, sink: socket.socket) -> None:
        """Carry bytes one way until its sender has ended."""
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
        """The next chunk, empty at the end, once silence is over."""
        data = await self._loop.sock_recv(source, CHUNK)
        await self._flowing(way)
        return data

    async def _flowing(self, way: Way) -> None:
        if not self._flows[way].is_set():
            self.faults["held"] += 1
            await self._flows[way].wait()

    async def _reply(self, link: Link, data: bytes) -> None:
        """Speak in the server's place, then hear the client out: an RST could overtake the answer."""
        if link.back is not None:
            link.back.cancel()
        self.faults["answer"] += 1
        await self._loop.sock_sendall(link.client, data)
        link.client.shutdown(socket.SHUT_WR)
        while await self._loop.sock_recv(link.client, CHUNK):
            pass


def flipped(data: bytes, at: int) -> bytes:
    """The same bytes but for one bit."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
