# SPDX-License-Identifier: MIT
"""Structured and extended replies, block status, and what needs them."""

import json
import os
import random
import struct
import subprocess
import sys

from harness import (EVENT_LOOPS, KIB, MIB, TRANSPORTS, Missing, Skip, case, check, check_equal,
                     pattern_file, run, sparse_file)
from nbd_client import (CHUNK_DATA, CHUNK_NONE, CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLAG_DF,
                        CMD_FLAG_FUA, CMD_FLAG_PAYLOAD_LEN, CMD_FLAG_REQ_ONE, CMD_READ,
                        CMD_RESIZE, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EINVAL, ENOSPC,
                        EOVERFLOW, EPERM, EXTENDED, EXTENDED_REQUEST_MAGIC, OPT_EXPORT_NAME,
                        OPT_EXTENDED_HEADERS, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT,
                        OPT_STRUCTURED_REPLY, REP_ACK, REP_ERR_EXT_HEADER_REQD, REP_ERR_INVALID,
                        REP_ERR_UNKNOWN, REP_META_CONTEXT, REQUEST_MAGIC, STATE_HOLE, STATE_ZERO,
                        STRUCTURED, TRANSMIT_DF, TRANSMIT_RESIZE, TRANSMIT_STATUS_PAYLOAD, Client,
                        Closed, check_still_serves, meta_request)

SIZE = 8 * MIB
STYLES = (STRUCTURED, EXTENDED)


def holey_file(path):
    """Data and holes of many sizes; returns the contents."""
    sparse_file(path, SIZE)
    rng = random.Random(11)
    with open(path, "r+b") as file:
        at = 0
        while True:
            at += rng.choice((64 * KIB, 128 * KIB, 512 * KIB))
            length = rng.choice((4 * KIB, 64 * KIB, 100 * KIB))
            if at + length > SIZE:
                break
            file.seek(at)
            file.write(rng.randbytes(length))
            at += (length + 65535) // 65536 * 65536
    with open(path, "rb") as file:
        return file.read()


def data_ranges(path):
    """What the file system calls data."""
    ranges = []
    with open(path, "rb") as file:
        end = 0
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return ranges
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            ranges.append((start, end))


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=60, sanitized=True)
def reads_in_chunks(test):
    """Of any size and alignment, many at a time: the chunks make up what is on the disk."""
    disk = test.path("disk.img")
    contents = holey_file(disk)
    with test.serve(disk) as daemon:
        for style in STYLES:
            with Client(daemon.uri, style=style) as client:
                check(client.flags & TRANSMIT_DF, "the flag DF is missing")
                rng = random.Random(5)
                wanted = {}
                for _ in range(200):
                    length = rng.choice((1, 512, 4096, 65536, 100_000, MIB))
                    offset = rng.randrange(SIZE - length)
                    flags = rng.choice((0, CMD_FLAG_DF))
                    wanted[client.request(CMD_READ, offset, length, flags=flags)] = (
                        offset, length, flags)
                    if len(wanted) == 16:
                        check_reply(client, wanted, contents)
                while wanted:
                    check_reply(client, wanted, contents)
                check_equal(client.ask(CMD_READ, 0, 0).kinds, [CHUNK_NONE], "a read of nothing")
                client.disconnect()


def check_reply(client, wanted, contents):
    cookie, error, data = client.reply()
    offset, length, flags = wanted.pop(cookie)
    check_equal(error, 0, f"error of a read at {offset}+{length}")
    check(data == contents[offset:offset + length], f"the data at {offset}+{length} differ")
    if flags & CMD_FLAG_DF:
        check_equal(client.answers[cookie].kinds, [CHUNK_DATA], "chunks of an unfragmented read")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=60, sanitized=True)
def all_commands_in_chunks(test):
    disk = test.path("disk.img")
    pattern_file(disk, SIZE)
    with open(disk, "rb") as file:
        contents = file.read()
    with test.serve(disk) as daemon:
        for style in STYLES:
            with Client(daemon.uri, style=style) as client:
                client.write(1000, b"w" * 70_000, flags=CMD_FLAG_FUA)
                check(client.read(1000, 70_000) == b"w" * 70_000, "what was written")
                check_equal(client.call(CMD_WRITE_ZEROES, 5000, 20_000)[0], 0, "zeroes")
                check(client.read(5000, 20_000) == bytes(20_000), "zeroes")
                check_equal(client.call(CMD_TRIM, 4 * MIB, MIB)[0], 0, "TRIM")
                check_equal(client.call(CMD_CACHE, 0, SIZE)[0], 0, "CACHE")
                client.write(1000, contents[1000:71_000])
                client.flush()
                client.disconnect()


@case(loops=EVENT_LOOPS, sanitized=True)
def status_never_calls_data_zeroes(test):
    disk = test.path("disk.img")
    contents = holey_file(disk)
    with test.serve(disk) as daemon:
        for style in STYLES:
            with Client(daemon.uri, style=style) as client:
                at = 0
                while at < SIZE:
                    extents = client.status(at, SIZE - at)
                    check(extents and sum(length for length, _ in extents) <= SIZE - at,
                          f"extents {extents}")
                    one = client.status(at, SIZE - at, CMD_FLAG_REQ_ONE)
                    check_equal(len(one), 1, "extents with REQ_ONE")
                    for length, state in extents:
                        check(length > 0, "an extent of nothing")
                        check(not state & STATE_ZERO or
                              contents[at:at + length].count(0) == length,
                              f"data at {at}+{length} called zeroes")
                        at += length
                client.disconnect()


@case(loops=EVENT_LOOPS, sanitized=True)
def status_with_a_payload(test):
    with test.serve("mem:8M") as daemon:
        with Client(daemon.uri, style=EXTENDED) as client:
            check(client.flags & TRANSMIT_STATUS_PAYLOAD, "the flag is missing")

            def ask(*contexts, length=SIZE):
                payload = struct.pack(f">Q{len(contexts)}I", length, *contexts)
                return client.ask(CMD_BLOCK_STATUS, 0, len(payload), payload,
                                  CMD_FLAG_PAYLOAD_LEN)

            check_equal(ask(client.context).error, 0, "error")
            check(sum(length for length, _ in ask(client.context).extents) <= SIZE, "extents")
            check_equal(ask(client.context, length=SIZE + 1).error, EINVAL, "beyond the end")
            for contexts in ((), (client.context + 1,), (client.context,) * 2):
                check_equal(ask(*contexts).error, EINVAL, f"contexts {contexts}")
            client.read(0, 512)
            client.disconnect()
        with Client(daemon.uri, style=STRUCTURED) as client:
            check(not client.flags & TRANSMIT_STATUS_PAYLOAD, "the flag is out of place")
            client.disconnect()


@case(loops=EVENT_LOOPS, sanitized=True)
def long_ranges_with_extended_headers(test):
    disk = test.path("disk.img")
    sparse_file(disk, 6 << 30)
    with test.serve(disk) as daemon:
        with Client(daemon.uri, style=EXTENDED) as client:
            client.write(5 << 30, b"x" * 4096)
            check_equal(client.call(CMD_TRIM, 0, 5 << 30)[0], 0, "TRIM of 5 GiB")
            check_equal(client.read(5 << 30, 4096), b"x" * 4096, "behind what was trimmed")
            check_equal(client.call(CMD_WRITE_ZEROES, 0, 6 << 30)[0], 0, "6 GiB of zeroes")
            check_equal(client.read(5 << 30, 4096), bytes(4096), "zeroed")
            check_equal(client.call(CMD_CACHE, 0, 6 << 30)[0], 0, "CACHE of 6 GiB")
            check_equal(client.ask(CMD_READ, 0, 5 << 30).error, EOVERFLOW, "READ of 5 GiB")
            check_equal(client.call(CMD_TRIM, 1, 6 << 30)[0], EINVAL, "beyond the end")
            client.disconnect()


@case(loops=EVENT_LOOPS, sanitized=True)
def errors_in_chunks_say_what_is_wrong(test):
    with test.serve("mem:8M", "--read-only") as daemon:
        for style in STYLES:
            with Client(daemon.uri, style=style) as client:
                beyond = client.ask(CMD_READ, SIZE, 512)
                check_equal((beyond.error, beyond.message),
                            (EINVAL, "beyond the end of the export"), "a read beyond the end")
                refused = client.ask(CMD_WRITE, 0, 512, b"w" * 512)
                check_equal((refused.error, refused.message), (EPERM, "the export is read-only"),
                            "a write")
                check_equal(client.ask(77).message, "unknown command", "command 77")
                client.read(0, 512)
                client.disconnect()


@case(loops=EVENT_LOOPS, sanitized=True)
def metadata_options(test):
    with test.serve("one=mem:8M", "two=mem:4M") as daemon:
        client = Client(daemon.uri, negotiate=False)
        client.greet()
        allocation = meta_request("one", "base:allocation")
        check_equal(client.option(OPT_SET_META_CONTEXT, allocation)[-1][0], REP_ERR_INVALID,
                    "a context without structured replies")
        check_equal(client.option(OPT_STRUCTURED_REPLY)[-1][0], REP_ACK, "STRUCTURED_REPLY")
        listed = client.option(OPT_LIST_META_CONTEXT, meta_request("two"))
        check_equal(listed, [(REP_META_CONTEXT, bytes(4) + b"base:allocation"), (REP_ACK, b"")],
                    "contexts")
        check_equal(client.option(OPT_SET_META_CONTEXT, meta_request("x", "base:"))[-1][0],
                    REP_ERR_UNKNOWN, "contexts of an unknown export")
        check_equal(client.option(OPT_EXTENDED_HEADERS)[-1][0], REP_ACK, "EXTENDED_HEADERS")
        check_equal(client.option(OPT_STRUCTURED_REPLY)[-1][0], REP_ERR_EXT_HEADER_REQD,
                    "STRUCTURED_REPLY after EXTENDED_HEADERS")
        check_equal(client.option(OPT_SET_META_CONTEXT, allocation)[-1][0], REP_ACK, "one")
        # It was the context of the other export.
        client.go("two")
        client.style = EXTENDED
        check_equal(client.ask(CMD_BLOCK_STATUS, 0, 4096).error, EINVAL, "status of two")
        client.read(0, 512)
        client.disconnect()
        client = Client(daemon.uri, negotiate=False)
        client.greet()
        client.option(OPT_EXTENDED_HEADERS)
        client.send_option(OPT_EXPORT_NAME, b"one")
        client.expect_closed()


@case(loops=EVENT_LOOPS, sanitized=True)
def extended_requests_that_break_the_rules(test):
    with test.serve("mem:8M") as daemon:
        with Client(daemon.uri, style=EXTENDED) as client:
            # A payload that nobody asked for is received, and forgotten.
            check_equal(client.ask(CMD_READ, 0, 512, b"p" * 512, CMD_FLAG_PAYLOAD_LEN).error,
                        EINVAL, "a read with a payload")
            check_equal(client.ask(99, 0, 70_000, b"p" * 70_000, CMD_FLAG_PAYLOAD_LEN).error,
                        EINVAL, "an unknown command with a payload")
            # A write that says it has none.
            cookie = client.request(CMD_BLOCK_STATUS, 0, 512)
            client.reply()
            client.send(struct.pack(">IHHQQQ", EXTENDED_REQUEST_MAGIC, 0, CMD_WRITE, cookie, 0,
                                    512))
            check_equal(client.reply()[1], EINVAL, "a write without a payload")
            client.read(0, 512)
            client.disconnect()
        for header in (struct.pack(">IHHQQQ", EXTENDED_REQUEST_MAGIC, CMD_FLAG_PAYLOAD_LEN,
                                   CMD_WRITE, 1, 0, 32 * MIB + 1),
                       struct.pack(">IHHQQQ", EXTENDED_REQUEST_MAGIC, CMD_FLAG_PAYLOAD_LEN, 99, 1,
                                   0, 2**64 - 1),
                       struct.pack(">IHHQQQ", REQUEST_MAGIC, 0, CMD_READ, 1, 0, 512)):
            with Client(daemon.uri, style=EXTENDED) as client:
                client.send(header)
                client.expect_closed()
        check_still_serves(daemon)


@case(loops=EVENT_LOOPS, sanitized=True)
def clients_resize_where_they_may(test):
    disk = test.path("disk.img")
    pattern_file(disk, SIZE)
    with test.serve(disk) as daemon:
        with Client(daemon.uri) as client:
            check(not client.flags & TRANSMIT_RESIZE, "resizing is offered unasked")
            check_equal(client.call(CMD_RESIZE, 2 * SIZE)[0], EINVAL, "RESIZE")
            client.disconnect()
    with test.serve(disk, "--allow-resize") as daemon:
        with Client(daemon.uri, style=STRUCTURED) as client:
            check_equal(client.call(CMD_RESIZE, 2 * SIZE)[0], 0, "RESIZE")
            check_equal(os.path.getsize(disk), 2 * SIZE, "size of the file")
            check_equal(client.read(2 * SIZE - 4096, 4096), bytes(4096), "what is new")
            with Client(daemon.uri) as other:
                check_equal(other.size, 2 * SIZE, "what others are told")
                check_equal(client.call(CMD_RESIZE, SIZE)[0], EPERM, "RESIZE under another")
                other.disconnect()
            wait_for_one_client(client)
            check_equal(client.call(CMD_READ, SIZE, 512)[0], ENOSPC, "a read of what was cut off")
            check_equal(os.path.getsize(disk), SIZE, "size of the file")
            client.disconnect()


def wait_for_one_client(client):
    """The server learns in its own time that the other client has gone."""
    for _ in range(10_000):
        error = client.call(CMD_RESIZE, SIZE)[0]
        if error == 0:
            return
        check_equal(error, EPERM, "RESIZE")
    check(False, "the other client does not go")


@case(loops=EVENT_LOOPS, sanitized=True)
def a_client_too_many_is_turned_away(test):
    with test.serve("mem:8M", "--max-connections", 2) as daemon:
        with Client(daemon.uri) as one, Client(daemon.uri) as two:
            try:
                Client(daemon.uri)
                check(False, "a third client was served")
            except Closed:
                pass
            two.disconnect()
            one.read(0, 512)
            one.disconnect()


# --- stock clients


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def nbdinfo_and_qemu_img_map_the_disk(test):
    disk = test.path("disk.img")
    contents = holey_file(disk)
    with test.serve(disk) as daemon:
        for entry in json.loads(run("nbdinfo", "--map", "--json", daemon.uri).stdout):
            check_map_entry(entry["offset"], entry["length"], entry["type"] & STATE_ZERO, contents)
        covered = 0
        for entry in json.loads(run("qemu-img", "map", "--output=json", "-f", "raw",
                                    daemon.uri).stdout):
            check_map_entry(entry["start"], entry["length"], entry["zero"], contents)
            check_equal(entry["start"], covered, "start of what qemu-img maps")
            covered += entry["length"]
        check_equal(covered, SIZE, "what qemu-img maps")


def check_map_entry(offset, length, zero, contents):
    check(not zero or contents[offset:offset + length].count(0) == length,
          f"{offset}+{length} is called zeroes")


@case(loops=EVENT_LOOPS)
def maps_show_the_holes(test):
    """What the file system calls a hole, clients are told to be one."""
    disk = test.path("disk.img")
    holey_file(disk)
    data = data_ranges(disk)
    if data == [(0, SIZE)]:
        raise Skip("this file system has no holes")
    with test.serve(disk) as daemon:
        seen = [(entry["offset"], entry["offset"] + entry["length"])
                for entry in json.loads(run("nbdinfo", "--map", "--json", daemon.uri).stdout)
                if not entry["type"] & STATE_HOLE]
        check_equal(seen, data, "data by nbdinfo")
        with Client(daemon.uri, style=EXTENDED) as client:
            whole = client.ask(CMD_READ, 0, SIZE)
            check(CHUNK_DATA in whole.kinds and len(whole.kinds) > 1, f"chunks {whole.kinds}")
            client.disconnect()


LIBNBD = """
import errno, sys
import nbd

h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
assert h.get_structured_replies_negotiated()
assert h.can_meta_context("base:allocation")
assert h.can_df() and h.can_cache() and h.can_multi_conn()
size = h.get_size()
whole = bytearray(size)
kinds = set()

def chunk(part, offset, kind, error):
    assert error.value == 0, error.value
    kinds.add(kind)
    whole[offset:offset + len(part)] = part

for at in range(0, size, 1 << 20):
    data = h.pread_structured(1 << 20, at, chunk)
    assert data == whole[at:at + (1 << 20)]
    assert h.pread_structured(1 << 20, at, lambda *_: 0, flags=nbd.CMD_FLAG_DF) == data
assert whole == open(sys.argv[2], "rb").read()

extents = []
def status(context, offset, entries, error):
    assert context == "base:allocation"
    extents.extend(zip(entries[::2], entries[1::2]))

at = 0
while at < size:
    extents.clear()
    h.block_status(size - at, at, status)
    at += sum(length for length, _ in extents)
extents.clear()
h.block_status(size, 0, status, flags=nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 1

h.cache(size, 0)
h.zero(1 << 20, 0, flags=nbd.CMD_FLAG_NO_HOLE)
if h.can_fast_zero():
    try:
        h.zero(1 << 20, 1 << 20, flags=nbd.CMD_FLAG_FAST_ZERO)
    except nbd.Error as error:
        assert error.errnum == errno.ENOTSUP, error
h.set_strict_mode(0)
try:
    h.pread(512, size)
    assert False, "a read beyond the end"
except nbd.Error as error:
    assert error.errnum == errno.EINVAL, error
h.shutdown()
print("done")
"""


def python_with_libnbd():
    """Debian's module is for Debian's Python, which need not be the one that runs this."""
    for python in (sys.executable, "/usr/bin/python3"):
        if subprocess.run([python, "-c", "import nbd"], capture_output=True,
                          check=False).returncode == 0:
            return python
    raise Missing("python3-libnbd is not installed")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def libnbd_uses_what_it_can(test):
    python = python_with_libnbd()
    disk = test.path("disk.img")
    holey_file(disk)
    with test.serve(disk) as daemon:
        check_equal(run(python, "-c", LIBNBD, daemon.uri, disk).stdout, "done\n", "libnbd")


@case(loops=EVENT_LOOPS)
def qemu_io_zeroes_quickly_or_not_at_all(test):
    disk = test.path("disk.img")
    pattern_file(disk, SIZE)
    with test.serve(disk) as daemon:
        done = run("qemu-io", "-f", "raw", "-c", "write -z -n -u 1M 1M", daemon.uri,
                   check_exit=False)
        wanted = 0 if done.returncode == 0 else None
        with open(disk, "rb") as file, Client(daemon.uri) as client:
            file.seek(MIB)
            data = client.read(MIB, MIB)
            if wanted == 0:
                check_equal(data, bytes(MIB), "zeroed")
            else:
                check("not supported" in (done.stdout + done.stderr).lower(), done.stderr)
                check(data == file.read(MIB) and data.count(0) < MIB, "half zeroed")
            client.disconnect()
