# SPDX-License-Identifier: MIT
"""Starting, ending, and what is printed in between."""

import json
import os
import re
import signal
import socket
import stat
import struct
import time

from harness import (EVENT_LOOPS, KIB, MIB, PATIENCE_S, TRANSPORTS, Daemon, Skip, case,
                     check, check_equal, run, sparse_file, wait_until)
from nbd_client import CMD_READ, CMD_WRITE, REQUEST_MAGIC, Client, Closed, check_still_serves


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def sigterm_and_sigint_end_it_cleanly(test):
    disk = test.path("disk.img")
    sparse_file(disk, 8 * MIB)
    for number in (signal.SIGTERM, signal.SIGINT):
        with test.serve(disk) as daemon:
            check_still_serves(daemon)
            idle = Client(daemon.uri)
            daemon.signal(number)
            check_equal(daemon.wait(), 0, f"exit code after {number.name}")
            idle.expect_closed()
        check(not os.path.exists(test.path("s")), "the socket file is still there")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def requests_under_way_finish_before_the_end(test):
    """Whatever the daemon has begun is answered; the socket does not break in the middle of a
    reply."""
    disk = test.path("disk.img")
    sparse_file(disk, 64 * MIB)
    with test.serve(disk) as daemon:
        client = Client(daemon.uri)
        written = {}
        for number in range(64):
            data = bytes([number + 1]) * 65536
            written[client.request(CMD_WRITE, number * 65536, len(data), data)] = number
        # With the first answer, the daemon is in the midst of it.
        cookies = [client.reply()[0]]
        daemon.signal(signal.SIGTERM)
        try:
            while len(cookies) < 64:
                cookie, error, _ = client.reply()
                check_equal(error, 0, "error of a write")
                cookies.append(cookie)
        except Closed:
            pass
        check_equal(daemon.wait(), 0, "exit code")
        with open(disk, "rb") as file:
            for cookie in cookies:
                file.seek(written[cookie] * 65536)
                check_equal(file.read(65536), bytes([written[cookie] + 1]) * 65536,
                            "what was acknowledged")


@case(loops=EVENT_LOOPS, sanitized=True)
def second_signal_ends_it_at_once(test):
    """A client that does not read its replies keeps the first signal from taking effect; the second
    does not ask."""
    disk = test.path("disk.img")
    sparse_file(disk, 64 * MIB)
    with test.serve(disk) as daemon:
        client = Client(daemon.uri)
        request = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, 1, 0, MIB)
        client.send(request * 16)
        client.receive(16)
        daemon.signal(signal.SIGTERM)
        # Signals of one kind that come together are one signal.
        time.sleep(0.3)
        if daemon.alive():
            start = time.monotonic()
            daemon.signal(signal.SIGINT)
            daemon.wait()
            check(time.monotonic() - start < 2, "the second signal took its time")
        daemon.wait()


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=90)
def unread_replies_do_not_keep_it_alive(test):
    """Or any client could keep the daemon from ending."""
    disk = test.path("disk.img")
    sparse_file(disk, 64 * MIB)
    with test.serve(disk) as daemon:
        client = Client(daemon.uri)
        request = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, 1, 0, MIB)
        client.send(request * 16)
        client.receive(16)
        daemon.signal(signal.SIGTERM)
        check_equal(daemon.wait(60), 0, "exit code")


@case(sanitized=True)
def stale_socket_is_replaced(test):
    path = test.path("s")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    with test.serve("mem:8M") as daemon:
        check_still_serves(daemon)
        check(stat.S_ISSOCK(os.stat(path).st_mode), "no socket")


@case(sanitized=True)
def live_socket_is_an_error(test):
    with test.serve("mem:8M") as daemon:
        second = test.roost_run("serve", "mem:8M", "--listen", test.address())
        check_equal(second.returncode, 1, f"exit code ({second.stderr})")
        check(test.path("s") in second.stderr, f"no path in {second.stderr!r}")
        check_still_serves(daemon)


@case(sanitized=True)
def other_file_in_place_of_the_socket_is_kept(test):
    with open(test.path("s"), "w") as file:
        file.write("precious")
    refused = test.roost_run("serve", "mem:8M", "--listen", test.address())
    check_equal(refused.returncode, 1, f"exit code ({refused.stderr})")
    with open(test.path("s")) as file:
        check_equal(file.read(), "precious", "the file")


@case(sanitized=True)
def version_and_help(test):
    version = test.roost_run("--version")
    check_equal(version.returncode, 0, "exit code of --version")
    check(re.fullmatch(r"roost \d+\.\d+\.\d+\n", version.stdout), f"{version.stdout!r}")
    overview = test.roost_run("--help")
    check_equal(overview.returncode, 0, "exit code of --help")
    check("serve" in overview.stdout, "no command in --help")
    serve = test.roost_run("serve", "--help")
    check_equal(serve.returncode, 0, "exit code of serve --help")
    for word in ("--listen", "--iothreads", "--event-loop", "--read-only", "--create", "--json",
                 "--poll-max-us", "DISK", "roost serve "):
        check(word in serve.stdout, f"no {word!r} in serve --help")
    for done in (version, overview, serve):
        check_equal(done.stderr, "", "stderr")


@case(loops=EVENT_LOOPS, sanitized=True)
def sigusr1_prints_every_coroutine(test):
    with test.serve("mem:8M", "--iothreads", "2") as daemon:
        clients = [Client(daemon.uri) for _ in range(3)]
        for client in clients:
            client.request(CMD_READ, 0, 512)
            client.reply()
        daemon.signal(signal.SIGUSR1)
        wait_until(lambda: re.search(r"\d+ coroutines\n", daemon.stderr()), "a census on stderr")
        wait_until(lambda: daemon.stderr().count("awaits at") >= 3, "await chains")
        report = daemon.stderr()
        check(re.search(r"coroutine '\S.*' \(0x[0-9a-f]+\) on iothread[01]: waiting for I/O, \d+ ms",
                        report), report)
        check(re.search(r"created at \S+nbd_\S+\.cc:\d+", report), report)
        check("did not answer" not in report, report)
        check_still_serves(daemon)


def check_census(daemon, *coroutines):
    """SIGUSR1 to something other than `serve`: it says what waits, and goes on."""
    daemon.signal(signal.SIGUSR1)
    wait_until(lambda: re.search(r"\d+ coroutines\n", daemon.stderr()), "a census on stderr")
    report = daemon.stderr()
    for name in ("command", *coroutines):
        check(re.search(rf"coroutine '{name}' \(0x[0-9a-f]+\) on (main|iothread\d+): ", report),
              f"no coroutine '{name}' in {report}")
    check("did not answer" not in report, report)
    check(daemon.alive(), f"ended: {daemon.describe()}")


@case(sanitized=True)
def sigusr1_is_heeded_by_a_proxy(test):
    with test.serve("mem:8M") as server:
        with Daemon(test, server.uri, listen=f"unix:{test.path('p')}", loop="any",
                    command="proxy") as proxy:
            with Client(proxy.uri):
                check_census(proxy, "clients")
            check_still_serves(proxy)


@case(sanitized=True)
def sigusr1_is_heeded_by_what_hangs(test):
    """Each command, with a server that takes connections and says nothing."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(test.path("silent"))
        silent.listen(8)
        silent.settimeout(PATIENCE_S)
        uri = f"nbd+unix:///?socket={test.path('silent')}"
        for command in (["info", uri], ["bench", uri], ["copy", uri, test.path("copy.img")]):
            with Daemon(test, *command[1:], listen=[], loop="any", command=command[0],
                        ready=False) as hangs, silent.accept()[0]:
                check_census(hangs)
                hangs.signal(signal.SIGINT)
                check_equal(hangs.wait(), 130, f"exit code of {command[0]} ({hangs.describe()})")


@case()
def json_output_is_json(test):
    with test.serve("a=mem:1M", "b=mem:2M", "--json") as daemon:
        daemon.wait_for_uris(2)
        uris = daemon.uris
        for uri, size in zip(uris, (MIB, 2 * MIB)):
            check_equal(int(run("nbdinfo", "--size", uri).stdout), size, uri)
        daemon.terminate()
        out = daemon.out + daemon.process.stdout.read()
    for line in out.decode().splitlines():
        check(isinstance(json.loads(line), dict), f"not a JSON object: {line!r}")
    text = json.dumps([json.loads(line) for line in out.decode().splitlines()])
    for uri in uris:
        check(uri in text, f"{uri} is not in {text}")


@case(sanitized=True)
def prints_one_uri_for_each_export_and_address(test):
    addresses = [f"unix:{test.path('s')}", "tcp:127.0.0.1:0", f"unix:{test.path('t')}"]
    with test.serve("a=mem:1M", "b=mem:2M", listen=addresses) as daemon:
        daemon.wait_for_uris(6)
        check_equal(sum(uri.startswith("nbd+unix:///") for uri in daemon.uris), 4, "unix URIs")
        check_equal(sum(uri.startswith("nbd://127.0.0.1:") for uri in daemon.uris), 2, "tcp URIs")
        for uri in daemon.uris:
            size = 1 if "/a" in uri.split("?")[0] else 2
            check_equal(int(run("nbdinfo", "--size", uri).stdout), size * MIB, uri)
        daemon.terminate()
        check_equal(len(re.findall(rb"^nbd", daemon.out, re.M)), 6, "lines with URIs")
    check(not os.path.exists(test.path("s")) and not os.path.exists(test.path("t")),
          "a socket file is still there")


@case(loops=EVENT_LOOPS)
def ipv6(test):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        raise Skip(f"no IPv6: {error}") from None
    with test.serve("mem:8M", listen="tcp:[::1]:0") as daemon:
        check(daemon.uri.startswith("nbd://[::1]:"), daemon.uri)
        check_equal(int(run("nbdinfo", "--size", daemon.uri).stdout), 8 * MIB, "size")
        check_still_serves(daemon)


@case(loops=EVENT_LOOPS)
def sockets_of_a_service_manager(test):
    """LISTEN_FDS: listening sockets that are there already, and stay when it ends."""
    path = test.path("handed")
    with socket.socket(socket.AF_UNIX) as local, socket.socket() as remote:
        local.bind(path)
        local.listen()
        remote.bind(("127.0.0.1", 0))
        remote.listen()
        port = remote.getsockname()[1]
        # Whoever is first in line is served by whoever takes the sockets.
        early = socket.socket(socket.AF_UNIX)
        early.settimeout(PATIENCE_S)
        early.connect(path)
        with early, test.serve("mem:8M", sockets=(local, remote)) as daemon:
            check_equal(early.recv(8), b"NBDMAGIC", "greeting for who came before the daemon")
            check_equal(len(daemon.uris), 2, f"URIs of two sockets ({daemon.uris})")
            check(f":{port}/" in daemon.uris[1], daemon.uris[1])
            for uri in daemon.uris:
                check_equal(int(run("nbdinfo", "--size", uri).stdout), 8 * MIB, f"size by {uri}")
            check(not os.path.exists(test.path("roost.sock")), "it listens on its default, too")
        check(os.path.exists(path), "the daemon has removed a socket that is not its own")
        # The sockets are still those of the manager, which starts the next one.
        with test.serve("mem:16M", sockets=(local,)) as daemon:
            check_equal(int(run("nbdinfo", "--size", daemon.uri).stdout), 16 * MIB, "size")
    # A socket that does not listen is nobody's to serve.
    with socket.socket(socket.AF_UNIX) as idle:
        daemon = test.serve("mem:8M", sockets=(idle,), ready=False)
        check_equal(daemon.wait(), 1, f"exit code with an idle socket ({daemon.describe()})")
        check("LISTEN_FDS" in daemon.stderr(), daemon.stderr())


@case(loops=EVENT_LOOPS)
def abstract_unix_socket(test):
    name = f"roost-e2e-{os.getpid()}"
    with test.serve("mem:8M", listen=f"unix:@{name}") as daemon:
        check_still_serves(daemon)
        image = f"driver=nbd,server.type=unix,server.path={name},server.abstract=on"
        done = run("qemu-io", "--image-opts", image, "-c", "write -P 7 0 1M", "-c",
                   "read -P 7 0 1M")
        check("failed" not in done.stdout, done.stdout)
        check_equal(test.roost_run("info", daemon.uri).returncode, 0, "exit code of roost info")
        second = test.roost_run("serve", "mem:8M", "--listen", f"unix:@{name}")
        check_equal(second.returncode, 1, "exit code of a second one in its place")
        check("in use" in second.stderr, second.stderr)
        check(not os.path.exists(test.path(f"@{name}")), "it has made a file")


@case()
def without_arguments(test):
    """Serves ./roost-disk.img on ./roost.sock, and makes the disk first."""
    daemon = Daemon(test, bare=True)
    with daemon:
        disk = test.path("roost-disk.img")
        check_equal(os.stat(disk).st_size, 1 << 30, "size of the disk")
        check(os.stat(disk).st_blocks * 512 < MIB, "the disk is not sparse")
        check(stat.S_ISSOCK(os.stat(test.path("roost.sock")).st_mode), "no socket")
        check("roost.sock" in daemon.uri, daemon.uri)
        check_equal(int(run("nbdinfo", "--size", daemon.uri, cwd=test.folder).stdout), 1 << 30,
                    "size")
    check(not os.path.exists(test.path("roost.sock")), "the socket file is still there")


@case(loops=EVENT_LOOPS, timeout_s=60)
def idle_costs_nothing(test):
    """Less than 0.2 % of a core with a client that has been busy and now only waits."""
    disk = test.path("disk.img")
    sparse_file(disk, 8 * MIB)
    with test.serve(disk, "--iothreads", 2) as daemon:
        with Client(daemon.uri) as client, Client(daemon.uri) as other:
            for _ in range(2000):
                client.read(0, 4 * KIB)
                other.read(0, 4 * KIB)
            # Spinning after the last request may go on for a moment, but not for long.
            time.sleep(0.5)
            wall, cpu = time.monotonic(), daemon.cpu_seconds()
            time.sleep(5)
            used = (daemon.cpu_seconds() - cpu) / (time.monotonic() - wall)
            print(f"idle: {used * 100:.4f} % of a core")
            check(used < 0.002, f"{used * 100:.3f} % of a core while idle")
            client.disconnect()
            other.disconnect()


@case(loops=EVENT_LOOPS)
def says_which_event_loop_runs(test):
    with test.serve("mem:8M") as daemon:
        wait_until(lambda: test.loop in daemon.stderr() + daemon.out.decode(),
                   "the name of the event loop")
