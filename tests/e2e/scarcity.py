# SPDX-License-Identifier: MIT
"""When there is too little of something (memory, descriptors, threads, somebody who reads the log),
requests fail and clients are turned away; the daemon stays, or says why it cannot start."""

import resource
import signal
import socket
import struct
import subprocess

from harness import (EVENT_LOOPS, MIB, Failure, case, check, check_equal, connect_uri, wait_until)
from nbd_client import CMD_READ, REQUEST_MAGIC, Client, Closed


@case(loops=EVENT_LOOPS, sanitized=True)
def nobody_reads_the_log(test):
    """A log pipe whose reader has died is no reason to die, too."""
    command = [test.roost, "serve", "mem:1M", "--event-loop", test.loop, "--listen", test.address()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    test.defer(process.wait)
    test.defer(process.kill)
    uri = process.stdout.readline().decode().strip()
    process.stderr.close()
    for _ in range(3):
        with connect_uri(uri) as client:
            client.sendall(b"\xff" * 64)
            client.settimeout(10)
            try:
                while client.recv(4096):
                    pass
            except ConnectionResetError:
                pass
    Client(uri).read(0, 512)
    process.send_signal(signal.SIGTERM)
    check_equal(process.wait(20), 0, "exit code")


@case(loops=EVENT_LOOPS)
def too_few_descriptors_for_the_threads(test):
    result = subprocess.run(
        [test.roost, "serve", "mem:1M", "--event-loop", test.loop, "--listen", test.address(),
         "--iothreads", "300"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=30,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
    check_equal(result.returncode, 1, f"exit code ({result.stderr})")
    check("Too many open files" in result.stderr, f"no cause is named: {result.stderr}")
    check(result.stderr.startswith("roost: "), f"not our message: {result.stderr}")


@case(loops=EVENT_LOOPS, timeout_s=90)
def too_little_memory_for_the_clients(test):
    """Address space for a few greedy clients and not for all: some are told, or turned away."""
    # (Of a file in the page cache, the server needs no memory for what it sends.)
    process = subprocess.Popen(
        [test.roost, "serve", "mem:64M", "--event-loop", test.loop, "--listen", test.address()],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (700 * MIB, 700 * MIB)))
    test.defer(process.wait)
    test.defer(process.kill)
    uri = process.stdout.readline().decode().strip()
    greedy = []
    refused = errors = 0
    for _ in range(24):
        try:
            client = Client(uri)
            client.socket.settimeout(10)
            for number in range(8):
                client.request(CMD_READ, number * 8 * MIB, 8 * MIB)
            greedy.append(client)
        except (Closed, OSError):
            refused += 1
    for client in greedy:
        try:
            for _ in range(8):
                errors += client.reply()[1] != 0
        except (Closed, OSError):
            refused += 1
        client.socket.close()
    check(errors + refused > 0, "memory sufficed for all: a weak test")
    check_equal(process.poll(), None, "exit code while it should be running")
    wait_until(lambda: still_serves(uri), "the daemon to serve again")


def still_serves(uri):
    try:
        return Client(uri).read(0, 512) == bytes(512)
    except (Closed, Failure, OSError):
        return False


@case(loops=EVENT_LOOPS, transports=("tcp",), sanitized=True)
def a_client_that_asked_for_too_much_gets_its_answers_at_the_end(test):
    """Requests that were not read any more must not cost the replies to those that were."""
    with test.serve("mem:64M") as daemon:
        client = Client(daemon.uri)
        count = 12000
        request = struct.Struct(">IHHQQI")
        client.socket.setblocking(False)
        stream = b"".join(request.pack(REQUEST_MAGIC, 0, CMD_READ, number, 0, 4096)
                          for number in range(count))
        sent = 0
        while sent < len(stream):
            try:
                sent += client.socket.send(stream[sent:])
            except BlockingIOError:
                break
        client.socket.setblocking(True)
        client.socket.settimeout(30)
        client.socket.recv(1, socket.MSG_PEEK)  # with the first answer, it is in the midst of it
        daemon.signal(signal.SIGTERM)
        received = 0
        while True:
            try:
                chunk = client.socket.recv(1 << 20)
            except ConnectionResetError:
                raise Failure(f"the connection was reset after {received} bytes") from None
            if not chunk:
                break
            received += len(chunk)
        check(received > 0, "no answer at all")
        check_equal(received % (16 + 4096), 0, "bytes of a reply that was cut")
        check_equal(daemon.wait(), 0, "exit code")
