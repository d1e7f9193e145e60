# SPDX-License-Identifier: MIT
"""Clients that break the rules lose their connection, and nothing else happens."""

import os
import random
import socket
import struct
import time

from harness import (EVENT_LOOPS, KIB, MIB, TRANSPORTS, Failure, case, check, check_equal,
                     connect_uri, sparse_file, wait_until)
from nbd_client import (CMD_READ, CMD_WRITE, IHAVEOPT, OPT_GO, OPT_LIST, REQUEST_MAGIC, Client,
                        Closed, check_still_serves)

SIZE = 64 * MIB


def log_lines(daemon):
    """What it has logged, but for the line that it starts with."""
    return [line for line in daemon.stderr().splitlines() if "serving with" not in line]


class Attack:
    """Expects that what happens inside costs the attacker its connection, with one line in the log
    that names it, and leaves the daemon as it was."""

    def __init__(self, test, daemon, hang_up=False, negotiate=True):
        self.test = test
        self.daemon = daemon
        self.hang_up = hang_up
        self.before = len(log_lines(daemon))
        self.client = Client(daemon.uri, negotiate=negotiate)
        self.name = self.client.socket.getsockname()
        if not negotiate:
            self.client.greet()

    def __enter__(self):
        return self.client

    def __exit__(self, kind, *_):
        if kind is not None and kind is not Closed:
            return False
        if not self.hang_up:
            self.client.expect_closed()
        self.client.socket.close()
        wait_until(lambda: len(log_lines(self.daemon)) > self.before, "a line in the log")
        check_still_serves(self.daemon)
        lines = log_lines(self.daemon)[self.before:]
        check_equal(len(lines), 1, f"lines in the log ({lines})")
        peer = f":{self.name[1]}" if self.test.transport == "tcp" else f"pid {os.getpid()}"
        check(peer in lines[0], f"the line does not name the peer {self.name}: {lines[0]}")
        return True


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def garbage_in_negotiation(test):
    rng = random.Random(7)
    with test.serve("mem:64M") as daemon:
        for _ in range(20):
            with Attack(test, daemon, negotiate=False) as client:
                client.send(rng.randbytes(rng.randrange(16, 5000)))


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def garbage_in_transmission(test):
    rng = random.Random(8)
    with test.serve("mem:64M") as daemon:
        for _ in range(20):
            with Attack(test, daemon) as client:
                client.send(rng.randbytes(rng.randrange(28, 5000)))


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def wrong_magic_or_flags(test):
    with test.serve("mem:64M") as daemon:
        with Attack(test, daemon, negotiate=False) as client:
            client.send_option(OPT_LIST, magic=IHAVEOPT ^ 1)
        with Attack(test, daemon) as client:
            client.request(CMD_READ, 0, 512, magic=REQUEST_MAGIC ^ 1)
        # A good request, and a bad one right behind it: the good one is answered all the same or
        # goes down with the connection, but nothing hangs.
        with Attack(test, daemon) as client:
            good = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, 1, 0, 512)
            client.send(good + b"\xff" * 28)
    with test.serve("mem:64M") as daemon:
        client = Client(daemon.uri, negotiate=False)
        client.greet(flags=0xFFFFFFFF)  # a client must not claim what the server does not know
        client.expect_closed()
        check_still_serves(daemon)


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def option_of_four_gigabytes(test):
    with test.serve("mem:64M") as daemon:
        for option in (OPT_GO, OPT_LIST, 1234):
            before = daemon.rss_bytes()
            with Attack(test, daemon, hang_up=True, negotiate=False) as client:
                client.send_option(option, length=0xFFFFFFFF)
                # The server may end the connection at any moment; until then, feed it.
                client.socket.settimeout(2)
                try:
                    for _ in range(64):
                        client.send(bytes(MIB))
                except TimeoutError:
                    pass
            grown = daemon.rss_bytes() - before
            check(grown < 24 * MIB, f"memory has grown by {grown // MIB} MiB")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def write_above_the_limit(test):
    with test.serve("mem:64M") as daemon:
        before = daemon.rss_bytes()
        for length in (32 * MIB + 1, 0xFFFFFFFF):
            with Attack(test, daemon) as client:
                client.request(CMD_WRITE, 0, length)
                client.send(bytes(64 * KIB))
        grown = daemon.rss_bytes() - before
        check(grown < 48 * MIB, f"memory has grown by {grown // MIB} MiB")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def vanishing_mid_request(test):
    with test.serve("mem:64M") as daemon:
        with Attack(test, daemon, hang_up=True) as client:
            client.send(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, 1, 0, 512)[:20])
        with Attack(test, daemon, hang_up=True) as client:
            client.send(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_WRITE, 1, 0, MIB))
        with Attack(test, daemon, hang_up=True) as client:
            client.send(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_WRITE, 1, 0, MIB))
            client.send(bytes(300000))
        # Before it has chosen an export, a client may leave as it came.
        client = Client(daemon.uri, negotiate=False)
        client.greet()
        client.send_option(OPT_GO, b"abc", length=100)
        client.socket.close()
        check_still_serves(daemon)


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=120, sanitized=True)
def vanishing_with_requests_under_way(test):
    """Whenever the connection breaks, what it held is given back."""
    disk = test.path("disk.img")
    sparse_file(disk, SIZE)
    with test.serve(disk, quarantine_mib=8) as daemon:
        check_still_serves(daemon)
        descriptors = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        memory = daemon.rss_bytes()
        rng = random.Random(9)
        for number in range(60):
            client = Client(daemon.uri)
            for _ in range(rng.randrange(1, 40)):
                if rng.random() < 0.5:
                    client.request(CMD_READ, rng.randrange(512) * 65536, 65536)
                else:
                    client.request(CMD_WRITE, rng.randrange(512) * 65536, 4096, bytes(4096))
            if number % 2:
                # A reset instead of a close; a unix socket knows no difference.
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                         struct.pack("ii", 1, 0))
            client.socket.close()
        check_still_serves(daemon)
        wait_until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= descriptors + 2,
                   "the descriptors of broken connections closed")
        grown = daemon.rss_bytes() - memory
        check(grown < 64 * MIB, f"memory has grown by {grown // MIB} MiB")


def send_until_held_back(client, requests, limit):
    """Sends whole requests until the socket has taken nothing for a second; returns the bytes it
    took."""
    client.socket.settimeout(1)
    sent = 0
    try:
        while sent < limit:
            sent += client.socket.send(requests[sent % 28:])
    except (TimeoutError, BlockingIOError):
        return sent
    raise Failure(f"{sent} bytes of requests were taken although no reply was read")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=120)
def unread_replies_hold_the_client_back(test):
    disk = test.path("disk.img")
    sparse_file(disk, SIZE)
    with test.serve(disk) as daemon:
        check_still_serves(daemon)
        before = daemon.rss_bytes()
        request = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, 1, 4096, 16 * KIB)
        clients = [Client(daemon.uri) for _ in range(4)]
        for client in clients:
            # Else the kernel takes a hundred thousand requests before the server sees one.
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
        taken = [send_until_held_back(client, request * 1000, 256 * MIB) for client in clients]
        grown = daemon.rss_bytes() - before
        check(grown < 4 * 48 * MIB, f"memory has grown by {grown // MIB} MiB")
        check_still_serves(daemon)
        # It was only held back: every request that was taken is answered in the end.
        client = clients[0]
        client.socket.settimeout(20)
        for _ in range(taken[0] // 28):
            header = client.receive(16)
            check_equal(header, struct.pack(">IIQ", 0x67446698, 0, 1), "reply")
            check(client.receive(16 * KIB) == bytes(16 * KIB), "data of a reply")
        for client in clients:
            client.socket.close()
        check_still_serves(daemon)


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=120)
def staying_in_negotiation(test):
    """One says nothing, one stops after the greeting, one sends a byte now and then."""
    with test.serve("mem:64M", "--handshake-timeout", 2) as daemon:
        start = time.monotonic()
        silent = Client(daemon.uri, negotiate=False)
        greeted = Client(daemon.uri, negotiate=False)
        greeted.greet()
        dripping = Client(daemon.uri, negotiate=False)
        dripping.greet()
        drips = struct.pack(">QII", IHAVEOPT, OPT_GO, 1000) + bytes(1000)
        served = Client(daemon.uri)
        open_clients = {"silent": silent, "greeted": greeted, "dripping": dripping}
        for client in open_clients.values():
            client.socket.setblocking(False)
        position = 0
        while open_clients:
            check(time.monotonic() - start < 20,
                  f"still connected after 20 s: {list(open_clients)}")
            for name, client in list(open_clients.items()):
                try:
                    if name == "dripping":
                        client.socket.send(drips[position:position + 1])
                        position += 1
                    if not client.socket.recv(65536):
                        del open_clients[name]
                except BlockingIOError:
                    pass
                except (BrokenPipeError, ConnectionResetError):
                    del open_clients[name]
            time.sleep(0.1)
        check(time.monotonic() - start > 1, "dropped before anyone could have negotiated")
        wait_until(lambda: len(log_lines(daemon)) >= 3, "a line in the log for each")
        # Whoever has come through negotiation may be as quiet as it likes.
        served.read(0, 512)
        served.disconnect()
        check_still_serves(daemon)


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def connections_come_and_go(test):
    with test.serve("mem:64M") as daemon:
        check_still_serves(daemon)
        descriptors = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        for _ in range(100):
            connect_uri(daemon.uri).close()
            Client(daemon.uri).disconnect()
        many = [Client(daemon.uri) for _ in range(64)]
        for client in many:
            client.write(0, b"x" * 512)
        for client in many:
            client.socket.close()
        check_still_serves(daemon)
        wait_until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= descriptors + 2,
                   "the descriptors of ended connections closed")
