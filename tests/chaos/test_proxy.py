"""Each mode of the proxy does what its docstring says, tested with a client and a real server on loopback."""

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
    """Sends back what it receives, and records it: one `bytearray` per connection, and how each connection ended."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EchoHandler)
        self.received: list[bytearray] = []
        self.ends: list[str] = []


class EchoHandler(BaseRequestHandler):
    server: Echo

    def handle(self) -> None:
        received = bytearray()
        self.server.received.append(received)
        try:
            while data := self.request.recv(1 << 18):
                received += data
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
    """Opens connections that are closed after the test."""
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", proxy.port), timeout=5))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


Dial = Callable[[], socket.socket]


def test_bytes_pass_unchanged_and_are_counted(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    assert echoed(dial(), b"hat") == b"hat"
    assert echoed(dial(), b"wig") == b"wig"
    assert [bytes(received) for received in echo.received] == [b"hat", b"wig"]
    assert (proxy.connections, dict(proxy.passed), dict(proxy.faults)) == (2, dict.fromkeys(Way, 6), {})


def test_half_closed_connections_are_passed_on(dial: Dial) -> None:
    connection = dial()
    connection.sendall(b"last words")
    connection.shutdown(socket.SHUT_WR)
    assert read_to_end(connection) == b"last words"


def test_a_client_reset_reaches_the_server(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    connection = dial()
    assert echoed(connection, b"a") == b"a"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    eventually(lambda: echo.ends == ["RST"])


def test_a_dead_server_causes_a_reset() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    with (
        Proxy("127.0.0.1", port) as proxy,
        pytest.raises(RESET),  # in `recv`, or in `connect` already
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection,
    ):
        connection.recv(1)


def test_latency_applies_in_each_direction(proxy: Proxy, dial: Dial) -> None:
    connection = dial()
    echoed(connection, b"a")
    proxy.latency(0.1)
    began = time.monotonic()
    assert echoed(connection, b"b") == b"b"
    assert time.monotonic() - began >= 0.2
    assert proxy.faults == {"latency": 2}


def test_reset_ends_old_and_new_connections(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = [dial(), dial()]
    for connection in old:
        echoed(connection, b"a")
    proxy.reset()
    assert all(map(is_reset, old))
    with pytest.raises(RESET):  # in `recv`, or in `connect` already
        dial().recv(1)
    eventually(lambda: echo.ends == ["RST", "RST"])
    eventually(lambda: proxy.faults == {"reset": 3})
    proxy.heal()
    assert echoed(dial(), b"b") == b"b"


def test_sever_resets_existing_connections_only(proxy: Proxy, dial: Dial) -> None:
    old = dial()
    echoed(old, b"a")
    proxy.sever()
    assert echoed(dial(), b"b") == b"b"
    assert is_reset(old)
    assert proxy.faults == {"reset": 1}


def test_a_connection_that_is_severed_immediately_is_closed(proxy: Proxy, dial: Dial) -> None:
    for count in range(1, 51):
        connection = dial()
        eventually(lambda: proxy.connections == count)  # noqa: B023 (called at once)
        proxy.sever()
        assert is_reset(connection)


def test_a_blackhole_silences_old_and_new_connections_until_healed(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = dial()
    echoed(old, b"a")
    proxy.blackhole()
    new = dial()
    old.sendall(b"b")
    new.sendall(b"c")
    assert is_silent(old)
    assert is_silent(new)
    assert [bytes(received) for received in echo.received] == [b"a"]
    assert proxy.faults == {"held": 2}
    proxy.heal()
    assert (old.recv(9), new.recv(9)) == (b"b", b"c")


def test_a_blackhole_hides_the_end_of_a_connection(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    connection = dial()
    echoed(connection, b"a")
    proxy.blackhole()
    connection.close()
    eventually(lambda: proxy.faults == {"held": 1})
    assert echo.ends == []
    proxy.heal()
    eventually(lambda: echo.ends == ["FIN"])


def test_half_open_passes_bytes_to_the_server_only(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = dial()
    echoed(old, b"a")
    proxy.half_open()
    new = dial()
    old.sendall(b"b")
    new.sendall(b"c")
    eventually(lambda: [bytes(received) for received in echo.received] == [b"ab", b"c"])
    assert is_silent(old)
    assert is_silent(new)
    proxy.heal()
    assert (old.recv(9), new.recv(9)) == (b"b", b"c")


def test_sever_ends_a_silent_connection(proxy: Proxy, dial: Dial) -> None:
    connection = dial()
    proxy.blackhole()
    connection.sendall(b"a")
    assert is_silent(connection)
    proxy.sever()
    assert is_reset(connection)


def test_a_cut_comes_after_an_exact_number_of_bytes(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = dial()
    echoed(old, b"a")
    proxy.cut_after(100_000, times=2)
    for _ in range(2):
        new = dial()
        assert echoed(new, b"first") == b"first"
        with pytest.raises(RESET):  # noqa: PT012 (which of the two meets the RST is the kernel's choice)
            new.sendall(bytes(200_000))
            read_to_end(new)
    eventually(lambda: echo.ends == ["RST", "RST"])
    assert proxy.passed[Way.FORTH] == 1 + 2 * 100_000  # the server may meet the RST before it has read all of it
    assert all(len(received) <= 100_000 for received in echo.received)
    assert echoed(dial(), bytes(200_000)) == bytes(200_000)
    assert echoed(old, bytes(200_000)) == bytes(200_000)
    assert proxy.faults == {"cut": 2}


def test_healing_removes_a_cut_from_existing_connections(proxy: Proxy, dial: Dial) -> None:
    proxy.cut_after(10)
    connection = dial()
    echoed(connection, b"a")
    proxy.heal()
    assert echoed(connection, bytes(20)) == bytes(20)


def test_corruption_flips_one_bit_of_one_sent_byte(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = dial()
    echoed(old, b"aa")
    proxy.corrupt(3)
    assert echoed(old, b"aaaa") == b"a`aa"
    assert echoed(dial(), b"aaaaaa") == b"aaaaaa"
    assert bytes(echo.received[0]) == b"aaa`aa"
    assert proxy.faults == {"corrupt": 1}


def test_corruption_can_repeat_on_several_connections(proxy: Proxy, dial: Dial) -> None:
    proxy.corrupt(0, times=2)
    assert [echoed(dial(), b"a") for _ in range(3)] == [b"`", b"`", b"a"]


def test_corruption_of_the_answer_leaves_the_request_unchanged(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    proxy.corrupt_answer(1)
    assert echoed(dial(), b"aaa") == b"a`a"
    assert echoed(dial(), b"aaa") == b"aaa"
    assert [bytes(received) for received in echo.received] == [b"aaa", b"aaa"]


def test_the_proxy_can_answer_instead_of_the_server(proxy: Proxy, echo: Echo, dial: Dial) -> None:
    old = dial()
    echoed(old, b"a")
    proxy.answer(b"HTTP/1.1 500 No\r\n\r\n")
    for connection in (old, dial()):
        connection.sendall(bytes(2_000_000))  # larger than any buffer: the proxy reads to the client's end
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b"HTTP/1.1 500 No\r\n\r\n"
    assert [bytes(received) for received in echo.received] == [b"a"]
    assert proxy.faults == {"answer": 2}
    proxy.heal()
    assert echoed(dial(), b"b") == b"b"


def test_hundreds_of_connections_at_once(proxy: Proxy, dial: Dial) -> None:
    many = [dial() for _ in range(300)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda c: echoed(c[1], str(c[0]).encode()), enumerate(many)))
    assert answers == [str(i).encode() for i in range(300)]
    proxy.sever()
    assert all(map(is_reset, many))


def test_large_streams_pass_completely(proxy: Proxy, dial: Dial) -> None:
    size = 64 * 1024 * 1024
    connection = dial()
    sender = Thread(target=connection.sendall, args=(bytes(size),))
    sender.start()
    got = 0
    while got < size:
        got += len(connection.recv(1 << 20))
    sender.join()
    assert dict(proxy.passed) == dict.fromkeys(Way, size)


def test_leaving_closes_connections_and_frees_the_port(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.server_address[1]) as proxy:
        connection = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
        echoed(connection, b"a")
        proxy.blackhole()
    with connection:
        assert is_reset(connection)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def echoed(connection: socket.socket, data: bytes) -> bytes:
    """Send data and return as many received bytes."""
    connection.sendall(data)
    received = bytearray()
    while len(received) < len(data):
        received += connection.recv(len(data) - len(received))
    return bytes(received)


def read_to_end(connection: socket.socket) -> bytes:
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


def eventually(condition: Callable[[], bool]) -> None:
    """Wait up to 5 s until the condition is true."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
