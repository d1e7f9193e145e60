# SPDX-License-Identifier: MIT
"""The client (`roost copy`, `info`, `bench`) on the servers of others."""

import json
import os
import random
import signal
import socket
import subprocess

from harness import (KIB, MIB, PATIENCE_S, Failure, case, check, check_equal, die_with_parent,
                     need_program, pattern_file, run, same_contents, sparse_file, wait_until)

SIZE = 12 * MIB + 512


def connects(path):
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(path)
        except OSError:
            return False
    return True


def listens(port):
    with socket.socket() as peer:
        return peer.connect_ex(("127.0.0.1", port)) == 0


class Foreign:
    """A server on a unix socket, or a port of this machine, ended with the case. `path`: what to
    wait for instead of the socket."""

    def __init__(self, test, *command, socket_name="foreign", port=None, path=None, probe=True):
        self.path = path or test.path(socket_name)
        command = [str(part).replace("SOCKET", self.path) for part in command]
        command[0] = need_program(command[0])
        self.log_path = test.path(f"{socket_name}.log")
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, cwd=test.folder,
                                            preexec_fn=die_with_parent)
        test.defer(self.kill)
        # A connection is a client: where the first one counts, only the socket file is awaited.
        wait_until(lambda: self.failed() or (listens(port) if port else
                                             connects(self.path) if probe else
                                             os.path.exists(self.path)),
                   f"{command[0]} listens")
        if self.failed():
            raise Failure(f"{' '.join(command)}: exit {self.process.returncode}\n{self.log()}")

    def failed(self):
        return self.process.poll() is not None

    def log(self):
        with open(self.log_path, "rb") as log:
            return log.read().decode(errors="replace")

    def uri(self, export=""):
        return f"nbd+unix:///{export}?socket={self.path}"

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def patchy_file(path, size=SIZE, seed=7):
    """Data, holes, and data that is zero, in pieces that begin and end anywhere."""
    rng = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(size)
        at = 0
        while at < size:
            length = min(size - at, rng.choice((512, 4096, 70 * KIB, 300 * KIB, MIB)))
            kind = rng.randrange(3)
            if kind:
                file.seek(at)
                file.write(rng.randbytes(length) if kind == 1 else bytes(length))
            at += length


def roost(test, *arguments, code=0):
    done = test.roost_run(*arguments, timeout=2 * PATIENCE_S)
    check_equal(done.returncode, code,
                f"exit code of roost {' '.join(map(str, arguments))} ({done.stdout}{done.stderr})")
    return done


def there_and_back(test, uri, behind=None, size=SIZE, **copying):
    """To the server and from it, and what the program says of it. `behind`: the server's file."""
    source, back = test.path("source"), test.path("back")
    patchy_file(source, size)
    options = [part for key, value in copying.items() for part in (f"--{key}", value)]
    roost(test, "copy", source, uri, "--verify", *options)
    if behind:
        check(same_contents(source, behind), "what was sent is not what is in the server's file")
    roost(test, "copy", uri, back, *options)
    check(same_contents(source, back), "what was fetched is not what was sent")
    # Somebody else's client agrees.
    run("nbdcopy", "--request-size=65536", uri, test.path("other"))
    check(same_contents(source, test.path("other")), "nbdcopy fetched something else")
    info = json.loads(roost(test, "info", uri, "--json").stdout)
    check_equal(info["size"], size, "size")
    return info


def measure(test, uri):
    """Destroys what the export holds."""
    several = "multi-conn" in json.loads(roost(test, "info", uri, "--json").stdout)["flags"]
    command = ("bench", uri, "--seconds", "0.3", "--warm-up", "0.1", "--writes", 30, "--json",
               "--connections")
    report = json.loads(roost(test, *command, 2 if several else 1).stdout)
    check(report["reads"]["requests"] > 0 and report["writes"]["requests"] > 0, f"{report}")
    if not several:
        refused = roost(test, *command, 2, code=1)
        check("does not allow several connections" in refused.stderr, refused.stderr)


@case(timeout_s=120)
def roost_copy_with_qemu_nbd(test):
    disk = test.path("disk")
    sparse_file(disk, SIZE)
    server = Foreign(test, "qemu-nbd", "-t", "-e", "8", "-f", "raw", "--discard=unmap", "-x", "a",
                     "-k", "SOCKET", disk)
    info = there_and_back(test, server.uri("a"), disk)
    check("base:allocation" in info["contexts"], f"{info}")
    listed = json.loads(roost(test, "info", server.uri(), "--list", "--json").stdout)
    check_equal([one["name"] for one in listed], ["a"], "exports")
    # The holes that the server tells are those of the file.
    extents = json.loads(roost(test, "info", server.uri("a"), "--map", "--json").stdout)
    check_equal(sum(one["length"] for one in extents), SIZE, "bytes in the map")
    check({one["description"] for one in extents} >= {"data", "hole,zero"}, f"{extents}")
    measure(test, server.uri("a"))


@case(timeout_s=120)
def roost_copy_with_nbdkit(test):
    disk = test.path("disk")
    sparse_file(disk, SIZE)
    servers = (
        ("file", ("file", disk)),
        ("memory", ("memory", SIZE)),
        ("delay", ("--filter=delay", "file", disk, "rdelay=2ms", "wdelay=2ms")),
        ("one", ("--filter=noparallel", "memory", SIZE, "serialize=connections")),
        ("turns", ("--filter=noparallel", "file", disk, "serialize=requests")),
        ("noextents", ("--filter=noextents", "--filter=nozero", "memory", SIZE)),
    )
    for name, arguments in servers:
        sparse_file(disk, SIZE)
        server = Foreign(test, "nbdkit", "-f", "-U", "SOCKET", *arguments, socket_name=name)
        try:
            there_and_back(test, server.uri(), disk if disk in arguments else None)
            measure(test, server.uri())
        except Failure as what:
            raise Failure(f"nbdkit {name}: {what}") from None
        server.kill()


@case(timeout_s=120)
def roost_copy_keeps_to_the_block_sizes_of_nbdkit(test):
    # Whoever asks for less, for more, or for something in between is refused.
    server = Foreign(test, "nbdkit", "-f", "-U", "SOCKET", "--filter=blocksize-policy", "memory",
                     SIZE, "blocksize-minimum=512", "blocksize-preferred=4096",
                     "blocksize-maximum=65536", "blocksize-error-policy=error")
    info = there_and_back(test, server.uri(), **{"request-size": "1M"})
    check_equal(info["block_size"]["minimum"], 512, "minimum")
    check_equal(info["block_size"]["maximum_payload"], 65536, "maximum")
    measure(test, server.uri())


@case(timeout_s=120)
def roost_says_goodbye_to_nbdkit(test):
    """A server that ends with its last client ends."""
    server = Foreign(test, "nbdkit", "-f", "-U", "SOCKET", "--filter=exitlast", "memory", SIZE,
                     probe=False)
    patchy_file(test.path("source"))
    roost(test, "copy", test.path("source"), server.uri(), "--verify", "--connections", 4)
    check_equal(server.process.wait(PATIENCE_S), 0, "exit code of nbdkit")
    check("error" not in server.log(), f"nbdkit complains: {server.log()}")


@case(timeout_s=120)
def roost_copy_reports_the_errors_of_nbdkit(test):
    """Errors are the server's answer, and are told; once it is well, all is well."""
    patchy_file(test.path("source"))
    sick = test.path("sick")
    server = Foreign(test, "nbdkit", "-f", "-U", "SOCKET", "--filter=error", "memory", SIZE,
                     "error=ENOSPC", "error-pwrite-rate=1", "error-pread=EIO",
                     "error-pread-rate=1", f"error-file={sick}")
    roost(test, "copy", test.path("source"), server.uri(), "--verify")
    with open(sick, "wb"):
        pass
    wrote = roost(test, "copy", test.path("source"), server.uri(), code=1)
    check("No space left on device" in wrote.stderr and "WRITE" in wrote.stderr, wrote.stderr)
    read = roost(test, "copy", server.uri(), test.path("back"), code=1)
    check("Input/output error" in read.stderr and "READ" in read.stderr, read.stderr)
    os.unlink(sick)
    roost(test, "copy", server.uri(), test.path("back"))
    check(same_contents(test.path("source"), test.path("back")), "the copy is not right")


@case(timeout_s=120)
def roost_copy_waits_for_nbdkit_to_retry(test):
    """A server that tries again for a second what failed is slow, and no more."""
    disk, sick = test.path("disk"), test.path("sick")
    faults = ("--filter=error", "file", disk, "error-pread-rate=1", "error-pwrite-rate=1",
              "error-zero-rate=1", f"error-file={sick}")
    for name, retrying in (
            ("retry", ("--filter=retry", "retries=60", "retry-delay=1", "retry-exponential=no")),
            ("request", ("--filter=retry-request", "retry-request-retries=60",
                         "retry-request-delay=1"))):
        sparse_file(disk, SIZE)
        server = Foreign(test, "nbdkit", "-f", "-v", "-U", "SOCKET", retrying[0], *faults,
                         *retrying[1:], socket_name=name)

        def copy_while_sick(*arguments):
            """Errors happen until nbdkit is seen to retry."""
            log_before = len(server.log())
            with open(sick, "wb"):
                pass
            copying = subprocess.Popen([test.roost, "copy", *arguments], stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       preexec_fn=die_with_parent)
            try:
                wait_until(lambda: "injecting EIO error" in server.log()[log_before:],
                           f"nbdkit --filter={name} has injected an error")
                check(copying.poll() is None, "an error of the plugin has come through")
                os.unlink(sick)
                out, _ = copying.communicate(timeout=2 * PATIENCE_S)
                check_equal(copying.returncode, 0, f"exit code of roost copy ({out})")
            finally:
                if copying.poll() is None:
                    copying.kill()
                copying.wait()

        patchy_file(test.path("source"))
        copy_while_sick(test.path("source"), server.uri(), "--flush")
        check(same_contents(test.path("source"), disk), "what was sent is not in the file")
        copy_while_sick(server.uri(), test.path("back"))
        check(same_contents(test.path("source"), test.path("back")), "the copy is not right")
        server.kill()
    # Without somebody who tries again, they are errors.
    server = Foreign(test, "nbdkit", "-f", "-U", "SOCKET", *faults)
    with open(sick, "wb"):
        pass
    failed = roost(test, "copy", server.uri(), test.path("back"), code=1)
    check("Input/output error" in failed.stderr, failed.stderr)


@case(timeout_s=120)
def roost_copy_sends_what_nbdkit_has_already(test):
    """With checkwrite, nbdkit takes a write, or a hole, only where it changes nothing."""
    disk, source = test.path("disk"), test.path("source")
    patchy_file(disk)
    patchy_file(source)
    server = Foreign(test, "nbdkit", "-f", "-U", "SOCKET", "--filter=checkwrite", "file", disk)
    for options in ((), ("--no-detect-zeroes",), ("--depth", "1", "--request-size", "4K"),
                    ("--connections", "4", "--iothreads", "4", "--request-size", "32M")):
        roost(test, "copy", source, server.uri(), "--verify", *options)
    roost(test, "copy", server.uri(), server.uri())  # onto itself
    run("nbdcopy", server.uri(), server.uri())

    # One byte: of data, and in what is a hole at the source and data in the server's file.
    extents = json.loads(roost(test, "info", server.uri(), "--map", "--json").stdout)
    at = {kind: next(one["offset"] for one in extents if one["description"] == kind) + 77
          for kind in ("data", "hole,zero")}
    for kind, offset in at.items():
        with open(source, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))
        refused = roost(test, "copy", source, server.uri(), code=1)
        check("WRITE" in refused.stderr and "Input/output error" in refused.stderr,
              f"a different byte of {kind}: {refused.stderr}")
        check("does not match expected" in server.log(), f"nbdkit has no complaint: {server.log()}")
        patchy_file(source)
    with open(disk, "r+b") as file:
        file.seek(at["hole,zero"])
        file.write(b"x")
    refused = roost(test, "copy", source, server.uri(), code=1)
    check("WRITE_ZEROES" in refused.stderr, f"a hole over data: {refused.stderr}")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def nbd_server(test, disk, **generic):
    """nbd-server's socket; `generic`: more of its configuration."""
    program = need_program("nbd-server")
    path, pid_file = test.path("foreign"), test.path("pid")
    with open(test.path("config"), "w") as config:
        # It listens on a port in any case.
        config.write(f"[generic]\nunixsock = {path}\nport = {free_port()}\n"
                     "listenaddr = 127.0.0.1\nallowlist = true\n" +
                     "".join(f"{key} = {value}\n" for key, value in generic.items()) +
                     f"[disk]\nexportname = {disk}\nflush = true\nfua = true\ntrim = true\n")
    # It goes into the background: staying, it would serve one client only.
    run(program, "-C", test.path("config"), "-p", pid_file)

    def end():
        with open(pid_file) as file:
            os.kill(int(file.read()), signal.SIGTERM)

    wait_until(lambda: os.path.exists(pid_file) and os.path.getsize(pid_file), "nbd-server's pid")
    test.defer(end)
    wait_until(lambda: connects(path), "nbd-server listens")
    return path


@case(timeout_s=120)
def roost_copy_with_nbd_server(test):
    disk = test.path("disk")
    sparse_file(disk, SIZE)
    uri = f"nbd+unix:///disk?socket={nbd_server(test, disk)}"
    info = there_and_back(test, uri, disk)
    check_equal(info["replies"], "simple", "style of replies")
    listed = json.loads(roost(test, "info", uri, "--list", "--json").stdout)
    check_equal([one["name"] for one in listed], ["disk"], "exports")
    measure(test, uri)


def copy_over_crashes(test, daemon, disk, arguments, grows, crashes):
    """`roost copy ARGUMENTS`. Each time that `grows` has got 4 MiB more, `daemon`, which serves
    `disk`, is killed and started again."""
    # Small requests, one at a time, so that it is not over too soon.
    copying = subprocess.Popen([test.roost, "copy", *arguments, "--depth", "1", "--iothreads", "1",
                                "--request-size", "4K"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
    try:
        for part in range(1, crashes + 1):
            wait_until(lambda: copying.poll() is not None or
                       (os.path.exists(grows) and
                        os.stat(grows).st_blocks * 512 >= part * 4 * MIB), "the copy goes on")
            check(copying.poll() is None, f"the copy was over too soon: {copying.poll()}")
            daemon.kill()
            daemon = test.serve(disk)
        out, _ = copying.communicate(timeout=3 * PATIENCE_S)
        check_equal(copying.returncode, 0, f"exit code of roost copy ({out})")
    finally:
        if copying.poll() is None:
            copying.kill()
        copying.wait()
    daemon.terminate()


@case(timeout_s=120)
def roost_copy_to_a_server_that_crashes(test):
    source, disk = test.path("source"), test.path("disk")
    pattern_file(source, 64 * MIB)
    sparse_file(disk, 64 * MIB)
    daemon = test.serve(disk)
    copy_over_crashes(test, daemon, disk, [source, daemon.uri, "--verify"], grows=disk, crashes=3)
    check(same_contents(source, disk), "the copy is not right")


@case(timeout_s=120)
def roost_copy_from_a_server_that_crashes(test):
    disk, back = test.path("disk"), test.path("back")
    pattern_file(disk, 64 * MIB)
    daemon = test.serve(disk)
    copy_over_crashes(test, daemon, disk, [daemon.uri, back, "--verify"], grows=back, crashes=3)
    check(same_contents(disk, back), "the copy is not right")
