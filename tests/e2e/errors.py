# SPDX-License-Identifier: MIT
"""Disks that fail, and errors of whoever starts the daemon."""

import os
import socket

from harness import (EVENT_LOOPS, MIB, case, check, check_equal, mount_tmpfs, pattern_file,
                     sparse_file)
from nbd_client import CMD_READ, CMD_WRITE, EIO, ENOSPC, Client, check_still_serves


@case(loops=EVENT_LOOPS, sanitized=True)
def full_file_system(test):
    folder = test.path("small")
    mount_tmpfs(folder, 2 * MIB)
    disk = os.path.join(folder, "disk.img")
    sparse_file(disk, 64 * MIB)
    with test.serve(disk) as daemon:
        client = Client(daemon.uri)
        client.write(0, b"w" * MIB)
        error = 0
        for number in range(1, 8):
            error, _ = client.call(CMD_WRITE, number * MIB, MIB, b"w" * MIB)
            if error:
                break
        check_equal(error, ENOSPC, "error of a write when the file system is full")
        check_equal(client.read(0, MIB), b"w" * MIB, "what was written before")
        client.disconnect()
        check_still_serves(daemon)


@case(loops=EVENT_LOOPS, sanitized=True)
def file_truncated_under_the_daemon(test):
    disk = test.path("disk.img")
    pattern_file(disk, 8 * MIB)
    with open(disk, "rb") as file:
        start = file.read(4096)
    with test.serve(disk) as daemon:
        client = Client(daemon.uri)
        os.truncate(disk, 4 * MIB + 100)
        check_equal(client.call(CMD_READ, 6 * MIB, 4096)[0], EIO, "error of a read beyond the end")
        check_equal(client.call(CMD_READ, 4 * MIB, 4096)[0], EIO,
                    "error of a read across the end")
        check_equal(client.read(0, 4096), start, "a read before the end")
        client.disconnect()
        check_still_serves(daemon)


def refused(test, code, *arguments, names=(), cwd=None):
    """The program gives up with this code and one message about these things."""
    done = test.roost_run(*arguments, cwd=cwd)
    what = f"roost {' '.join(map(str, arguments))}"
    check_equal(done.returncode, code, f"exit code of {what} ({done.stderr})")
    check_equal(done.stdout, "", f"stdout of {what}")
    for name in names:
        check(name in done.stderr, f"{what}: no {name!r} in {done.stderr!r}")
    if code == 1:
        check_equal(len(done.stderr.splitlines()), 1, f"lines on stderr of {what}: {done.stderr}")
        check(done.stderr.startswith("roost: "), f"{what}: {done.stderr!r}")
    return done.stderr


@case(sanitized=True)
def operating_errors_exit_one(test):
    check_equal(refused(test, 1, "serve", "disk.img"),
                "roost: disk.img: No such file or directory\n", "message")
    os.mkdir(test.path("folder"))
    refused(test, 1, "serve", "folder", names=["folder", "directory"])
    sparse_file(test.path("disk.img"), MIB)
    refused(test, 1, "serve", "disk.img", "--listen", "unix:no/such/folder/s",
            names=["no/such/folder/s", "No such file or directory"])
    refused(test, 1, "serve", "disk.img", "--listen", "unix:" + "x" * 200, names=["too long"])
    # A name under .invalid never resolves.
    refused(test, 1, "serve", "disk.img", "--listen", "tcp:host.invalid:10809",
            names=["host.invalid"])
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(test, 1, "serve", "disk.img", "--listen", f"tcp:127.0.0.1:{port}",
                names=[f"127.0.0.1:{port}", "Address already in use"])
    if os.geteuid() != 0:
        os.chmod(test.path("disk.img"), 0)
        refused(test, 1, "serve", "disk.img", names=["disk.img", "Permission denied"])


@case(sanitized=True)
def usage_errors_exit_two(test):
    sparse_file(test.path("disk.img"), MIB)
    refused(test, 2, "serve")
    refused(test, 2, "sreve", "disk.img", names=["sreve"])
    refused(test, 2, "serve", "disk.img", "--no-such-option", names=["--no-such-option"])
    refused(test, 2, "serve", "disk.img", "--listen", "carrier:pigeon", names=["carrier:pigeon"])
    refused(test, 2, "serve", "disk.img", "--listen", "tcp:nowhere", names=["tcp:nowhere"])
    refused(test, 2, "serve", "disk.img", "--listen", "tcp:localhost:99999", names=["99999"])
    refused(test, 2, "serve", "disk.img", "--iothreads", "0", names=["iothreads"])
    refused(test, 2, "serve", "disk.img", "--iothreads", "many", names=["iothreads"])
    refused(test, 2, "serve", "disk.img", "--event-loop", "kqueue", names=["kqueue"])
    refused(test, 2, "serve", "mem:lots", names=["mem:lots"])
    refused(test, 2, "serve", "new.img", "--create", "12X", names=["12X"])
    refused(test, 2, "serve", "mem:1M", "mem:2M")  # two unnamed disks
    refused(test, 2, "serve", "a=mem:1M", "a=mem:2M", names=["a"])


@case(sanitized=True)
def create_makes_a_sparse_disk_once(test):
    disk = test.path("new.img")
    with test.serve(disk, "--create", "1G") as daemon:
        stat = os.stat(disk)
        check_equal(stat.st_size, 1 << 30, "size")
        check(stat.st_blocks * 512 < MIB, "the new disk is not sparse")
        with Client(daemon.uri) as client:
            check_equal(client.size, 1 << 30, "size of the export")
            client.write(0, b"kept")
            client.disconnect()
    # Of what is there already, nothing changes.
    with test.serve(disk, "--create", "2G") as daemon:
        with Client(daemon.uri) as client:
            check_equal(client.size, 1 << 30, "size of the export")
            check_equal(client.read(0, 4), b"kept", "contents")
            client.disconnect()
