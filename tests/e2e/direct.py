# SPDX-License-Identifier: MIT
"""Files past the page cache (--direct), by each of what can read and write them (--aio)."""

import json
import os

from harness import (EVENT_LOOPS, MIB, Skip, case, check, check_equal, pattern_file, run,
                     same_contents, sparse_file, wait_until)
from nbd_client import CMD_WRITE_ZEROES, Client

SIZE = 16 * MIB


def need_direct(test):
    path = test.path("probe")
    sparse_file(path, 4096)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        raise Skip(f"the file system of {test.folder} does not allow O_DIRECT") from error


def engines(test):
    """What --aio may say under the event loop of this run."""
    by_loop = ["io_uring"] if test.loop == "io_uring" else []
    return ["auto", "threads", "native", *by_loop]


def serve(test, image, aio):
    return test.serve("--direct", "--aio", aio, image)


@case(loops=EVENT_LOOPS, sanitized=True)
def direct_copy_in_and_out(test):
    need_direct(test)
    source = test.path("source.img")
    pattern_file(source, SIZE)
    for aio in engines(test):
        image = test.path(f"{aio}.img")
        sparse_file(image, SIZE)
        with serve(test, image, aio) as daemon:
            wanted = {"auto": "io_uring" if test.loop == "io_uring" else "native"}.get(aio, aio)
            # The URI is printed before that line.
            said = f"files by {wanted}, directly"
            wait_until(lambda: said in daemon.stderr(), f"'{said}'")  # noqa: B023
            run("nbdcopy", "--flush", source, daemon.uri)
            copy = test.path(f"{aio}.copy")
            run("nbdcopy", daemon.uri, copy)
            check(same_contents(source, copy), f"--aio {aio}: what was read is not what was written")
        check(same_contents(source, image), f"--aio {aio}: the image differs")


@case(loops=EVENT_LOOPS, sanitized=True)
def direct_requests_of_any_alignment(test):
    need_direct(test)
    for aio in engines(test):
        image = test.path(f"{aio}.img")
        sparse_file(image, SIZE)
        model = bytearray(SIZE)
        with serve(test, image, aio) as daemon, Client(daemon.uri) as client:
            for i, (offset, length) in enumerate(
                    [(0, 512), (1, 1), (511, 2), (4095, 2), (4096, 4096), (4097, 12345),
                     (1 * MIB - 7, 2 * MIB + 14), (SIZE - 1, 1), (SIZE - 5000, 5000)]):
                data = bytes([i + 1]) * length
                client.write(offset, data)
                model[offset:offset + length] = data
            check_equal(client.call(CMD_WRITE_ZEROES, 5000, 3000)[0], 0, "zeroes")
            model[5000:8000] = bytes(3000)
            client.flush()
            for offset, length in [(0, 9000), (3, 4093), (4096, 8192), (1 * MIB - 9, 3 * MIB)]:
                check_equal(client.read(offset, length), bytes(model[offset:offset + length]),
                            f"{aio}: {offset}+{length}")
        with open(image, "rb") as file:
            check(file.read() == model, f"--aio {aio}: the image differs")


@case()
def direct_says_what_it_cannot(test):
    image = test.path("odd.img")
    sparse_file(image, 10_001)
    native = test.roost_run("serve", "--aio", "native", image)
    check_equal(native.returncode, 2, "--aio native without --direct")
    check("--direct" in native.stderr, native.stderr)
    mixed = test.roost_run("serve", "--aio", "io_uring", "--event-loop", "epoll", image)
    check_equal(mixed.returncode, 2, "--aio io_uring under epoll")
    need_direct(test)
    odd = test.roost_run("serve", "--direct", image)
    check_equal(odd.returncode, 1, "a size that is not aligned")
    check("10001" in odd.stderr, odd.stderr)
    with test.serve("--direct", "--read-only", "--json", image) as daemon:
        check_equal(json.loads(daemon.out)["direct"], True, "direct in the JSON")
