"""The proxy does what each of its modes says, seen from a client and from a real server on loopback."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread

import pytest

from tests.chaos.proxy import Proxy, Way

RESET = (ConnectionResetError, BrokenPipeError)


class Echo(ThreadingTCPServer):
    """Sends back what it hears, and remembers it: one `bytearray` a connection, and how each one ended."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EchoHandler)
        self.heard: list[bytearray] = []
        self.ends: list[str] = []


class EchoHandler(BaseRequestHandler):
    server: Echo

    def handle(self) -> None:
        heard = bytearray()
        self.server.heard.append(heard)
        try:
            while data := self.request.recv(1 << 18):
                heard += data
                self.request.sendall(data)
            self.server.ends.append("FIN")
        except RESET:
            self.server.ends.append("RST")


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo.server_address[1]) as proxy:
        yield proxy


@pytest.fixture
def dial(proxy: Proxy) -> Iterator[Callable[[], socket.socket]]:
    """Opens connections that end with the test."""
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", proxy.port), timeout=5))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


Dial = Callable[[], socket.socket]


def test_bytes_pass_unchanged_and_are_counted(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    assert said(dial(), b"hat") == b"hat"
    assert said(dial(), b"wig") == b"wig"
    assert [bytes(heard) for heard in echo.heard] == [b"hat", b"wig"]
    assert (proxy.connections, dict(proxy.passed), dict(proxy.faults)) == (2, dict.fromkeys(Way, 6), {})


def test_each_side_may_end_its_half_alone(dial: Dial) -> None:
    connection = dial()
    connection.sendall(b"last words")
    connection.shutdown(socket.SHUT_WR)
    assert everything(connection) == b"last words"


def test_an_end_by_reset_is_passed_on(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    connection = dial()
    assert said(connection, b"a") == b"a"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    soon(lambda: echo.ends == ["RST"])


def test_a_server_that_is_down_is_a_reset() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as gone:
        port = gone.getsockname()[1]
    with (
        Proxy("127.0.0.1", port) as proxy,
        pytest.raises(RESET),  # in `recv`, or in `connect` already
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection,
    ):
        connection.recv(1)


def test_latency_is_each_way(proxy: Proxy, dial: Dial) -> None:
    connection = dial()
    said(connection, b"a")
    proxy.latency(0.1)
    began = time.monotonic()
    assert said(connection, b"b") == b"b"
    assert time.monotonic() - began >= 0.2
    assert proxy.faults == {"latency": 2}


def test_reset_takes_all_connections_and_refuses_new_ones(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = [dial(), dial()]
    for connection in old:
        said(connection, b"a")
    proxy.reset()
    assert all(map(is_reset, old))
    with pytest.raises(RESET):  # in `recv`, or in `connect` already
        dial().recv(1)
    soon(lambda: echo.ends == ["RST", "RST"])
    soon(lambda: proxy.faults == {"reset": 3})
    proxy.heal()
    assert said(dial(), b"b") == b"b"


def test_sever_takes_all_connections_once(proxy: Proxy, dial: Dial) -> None:
    old = dial()
    said(old, b"a")
    proxy.sever()
    assert said(dial(), b"b") == b"b"
    assert is_reset(old)
    assert proxy.faults == {"reset": 1}


def test_a_connection_that_is_severed_at_once_is_closed_too(proxy: Proxy, dial: Dial) -> None:
    for count in range(1, 51):
        connection = dial()
        soon(lambda: proxy.connections == count)  # noqa: B023 (called at once)
        proxy.sever()
        assert is_reset(connection)


def test_a_blackhole_is_silence_for_old_and_new_until_healed(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = dial()
    said(old, b"a")
    proxy.blackhole()
    new = dial()
    old.sendall(b"b")
    new.sendall(b"c")
    assert is_silent(old)
    assert is_silent(new)
    assert [bytes(heard) for heard in echo.heard] == [b"a"]
    assert proxy.faults == {"held": 2}
    proxy.heal()
    assert (old.recv(9), new.recv(9)) == (b"b", b"c")


def test_a_blackhole_tells_nobody_of_an_end(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    connection = dial()
    said(connection, b"a")
    proxy.blackhole()
    connection.close()
    soon(lambda: proxy.faults == {"held": 1})
    assert echo.ends == []
    proxy.heal()
    soon(lambda: echo.ends == ["FIN"])


def test_half_open_the_server_hears_and_is_not_heard(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = dial()
    said(old, b"a")
    proxy.half_open()
    new = dial()
    old.sendall(b"b")
    new.sendall(b"c")
    soon(lambda: [bytes(heard) for heard in echo.heard] == [b"ab", b"c"])
    assert is_silent(old)
    assert is_silent(new)
    proxy.heal()
    assert (old.recv(9), new.recv(9)) == (b"b", b"c")


def test_silence_ends_by_reset_too(proxy: Proxy, dial: Dial) -> None:
    connection = dial()
    proxy.blackhole()
    connection.sendall(b"a")
    assert is_silent(connection)
    proxy.sever()
    assert is_reset(connection)


def test_a_cut_is_after_exactly_so_many_bytes_of_a_new_connection(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = dial()
    said(old, b"a")
    proxy.cut_after(100_000, times=2)
    for _ in range(2):
        new = dial()
        assert said(new, b"first") == b"first"
        with pytest.raises(RESET):  # noqa: PT012 (which of the two meets the RST is the kernel's choice)
            new.sendall(bytes(200_000))
            everything(new)
    soon(lambda: echo.ends == ["RST", "RST"])
    assert proxy.passed[Way.FORTH] == 1 + 2 * 100_000  # the server may meet the RST before it has read all of it
    assert all(len(heard) <= 100_000 for heard in echo.heard)
    assert said(dial(), bytes(200_000)) == bytes(200_000)
    assert said(old, bytes(200_000)) == bytes(200_000)
    assert proxy.faults == {"cut": 2}


def test_healing_takes_a_cut_off_connections_that_were_new(proxy: Proxy, dial: Dial) -> None:
    proxy.cut_after(10)
    connection = dial()
    said(connection, b"a")
    proxy.heal()
    assert said(connection, bytes(20)) == bytes(20)


def test_corruption_is_one_bit_of_one_byte_going_out(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = dial()
    said(old, b"aa")
    proxy.corrupt(3)
    assert said(old, b"aaaa") == b"a`aa"
    assert said(dial(), b"aaaaaa") == b"aaaaaa"
    assert bytes(echo.heard[0]) == b"aaa`aa"
    assert proxy.faults == {"corrupt": 1}


def test_corruption_may_last_for_some_connections(proxy: Proxy, dial: Dial) -> None:
    proxy.corrupt(0, times=2)
    assert [said(dial(), b"a") for _ in range(3)] == [b"`", b"`", b"a"]


def test_corruption_of_the_answer_leaves_the_question_alone(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    proxy.corrupt_answer(1)
    assert said(dial(), b"aaa") == b"a`a"
    assert said(dial(), b"aaa") == b"aaa"
    assert [bytes(heard) for heard in echo.heard] == [b"aaa", b"aaa"]


def test_an_answer_of_its_own_for_old_and_new(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = dial()
    said(old, b"a")
    proxy.answer(b"HTTP/1.1 500 No\r\n\r\n")
    for connection in (old, dial()):
        connection.sendall(bytes(2_000_000))  # more than any buffer: the client is heard out
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == b"HTTP/1.1 500 No\r\n\r\n"
    assert [bytes(heard) for heard in echo.heard] == [b"a"]
    assert proxy.faults == {"answer": 2}
    proxy.heal()
    assert said(dial(), b"b") == b"b"


def test_hundreds_of_connections_at_once(proxy: Proxy, dial: Dial) -> None:
    many = [dial() for _ in range(300)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda c: said(c[1], str(c[0]).encode()), enumerate(many)))
    assert answers == [str(i).encode() for i in range(300)]
    proxy.sever()
    assert all(map(is_reset, many))


def test_large_streams_pass_whole(proxy: Proxy, dial: Dial) -> None:
    size = 64 * 1024 * 1024
    connection = dial()
    sender = Thread(target=connection.sendall, args=(bytes(size),))
    sender.start()
    got = 0
    while got < size:
        got += len(connection.recv(1 << 20))
    sender.join()
    assert dict(proxy.passed) == dict.fromkeys(Way, size)


def test_leaving_ends_what_lives_and_frees_the_port(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.server_address[1]) as proxy:
        connection = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
        said(connection, b"a")
        proxy.blackhole()
    with connection:
        assert is_reset(connection)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def said(connection: socket.socket, data: bytes) -> bytes:
    """Send, and hear as much back."""
    connection.sendall(data)
    heard = bytearray()
    while len(heard) < len(data):
        heard += connection.recv(len(data) - len(heard))
    return bytes(heard)


def everything(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 18), b""))


def is_reset(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"?")
        return connection.recv(1) == b"never"
    except RESET:
        return True


def is_silent(connection: socket.socket) -> bool:
    connection.settimeout(0.15)
    try:
        return connection.recv(1) == b"never"
    except TimeoutError:
        return True
    finally:
        connection.settimeout(5)


def soon(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)
