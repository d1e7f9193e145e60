# SPDX-License-Identifier: MIT
"""The corners of the protocol that stock clients do not visit."""

import struct

from harness import (EVENT_LOOPS, MIB, TRANSPORTS, case, check, check_equal, pattern_file,
                     sparse_file)
from nbd_client import (CMD_DISC, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
                        CMD_WRITE_ZEROES, EINVAL, ENOSPC, ENOTSUP, EOVERFLOW, EPERM,
                        FLAG_FIXED_NEWSTYLE, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO,
                        OPT_INFO, OPT_LIST, OPT_STARTTLS, OPT_STRUCTURED_REPLY, REP_ACK,
                        REP_ERR_INVALID, REP_ERR_POLICY, REP_ERR_UNKNOWN,
                        REP_ERR_UNSUP, REP_SERVER, TRANSMIT_CACHE, TRANSMIT_FAST_ZERO,
                        TRANSMIT_FLUSH, TRANSMIT_FUA,
                        TRANSMIT_HAS_FLAGS, TRANSMIT_MULTI_CONN, TRANSMIT_READ_ONLY,
                        TRANSMIT_TRIM, TRANSMIT_WRITE_ZEROES, Client)

SIZE = 8 * MIB


def go_request(name, infos=()):
    data = name.encode()
    return (struct.pack(">I", len(data)) + data + struct.pack(">H", len(infos))
            + b"".join(struct.pack(">H", info) for info in infos))


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def negotiation_survives_refused_options(test):
    with test.serve("one=mem:8M", "two=mem:4M") as daemon:
        client = Client(daemon.uri, negotiate=False)
        client.greet()
        check_equal(client.option(99, b"what?")[0][0], REP_ERR_UNSUP, "reply to option 99")
        check(client.option(OPT_STARTTLS)[0][0] in (REP_ERR_UNSUP, REP_ERR_POLICY),
              "reply to STARTTLS")
        check_equal(client.option(OPT_STRUCTURED_REPLY, b"data")[0][0], REP_ERR_INVALID,
                    "reply to STRUCTURED_REPLY with data")
        check_equal(client.option(OPT_GO, go_request("three"))[-1][0], REP_ERR_UNKNOWN,
                    "reply to GO of an unknown export")
        check_equal(client.option(OPT_LIST, b"data")[-1][0], REP_ERR_INVALID,
                    "reply to LIST with data")
        # A name that is longer than the option that brings it.
        check_equal(client.option(OPT_INFO, struct.pack(">I", 1000) + b"one")[-1][0],
                    REP_ERR_INVALID, "reply to INFO with a wrong length")
        listed = client.option(OPT_LIST)
        check_equal([kind for kind, _ in listed], [REP_SERVER, REP_SERVER, REP_ACK], "LIST")
        names = [payload[4:4 + struct.unpack(">I", payload[:4])[0]] for _, payload in listed[:2]]
        check_equal(sorted(names), [b"one", b"two"], "listed names")
        client.go("two", option=OPT_INFO)
        check_equal(client.size, 4 * MIB, "size by INFO")
        client.go("one")
        check_equal(client.size, 8 * MIB, "size by GO")
        check_equal(client.flags, TRANSMIT_HAS_FLAGS | TRANSMIT_FLUSH | TRANSMIT_FUA |
                    TRANSMIT_TRIM | TRANSMIT_WRITE_ZEROES | TRANSMIT_MULTI_CONN |
                    TRANSMIT_CACHE | (client.flags & TRANSMIT_FAST_ZERO), "flags")
        check(client.block_sizes is not None, "no block sizes although asked for")
        client.write(0, b"x" * 512)
        client.disconnect()


@case(loops=EVENT_LOOPS, sanitized=True)
def export_name_starts_transmission(test):
    disk = test.path("disk.img")
    pattern_file(disk, SIZE)
    with open(disk, "rb") as file:
        start = file.read(4096)
    with test.serve(f"data={disk}") as daemon:
        for flags, padding in ((FLAG_FIXED_NEWSTYLE, 124), (FLAG_FIXED_NEWSTYLE | 2, 0)):
            client = Client(daemon.uri, negotiate=False)
            client.greet(flags)
            client.send_option(OPT_EXPORT_NAME, b"data")
            answer = client.receive(10 + padding)
            check_equal(struct.unpack(">Q", answer[:8])[0], SIZE, "size")
            check_equal(answer[10:], bytes(padding), "padding")
            check_equal(client.read(0, 4096), start, "data")
            client.disconnect()
        # This option has no way to report an error but to hang up.
        client = Client(daemon.uri, negotiate=False)
        client.greet()
        client.send_option(OPT_EXPORT_NAME, b"nothing")
        client.expect_closed()


@case(loops=EVENT_LOOPS)
def abort_is_acknowledged(test):
    with test.serve("mem:8M") as daemon:
        client = Client(daemon.uri, negotiate=False)
        client.greet()
        client.send_option(OPT_ABORT)
        check_equal(client.receive_option_reply()[1], REP_ACK, "reply to ABORT")
        client.expect_closed()


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def bad_requests_get_errors(test):
    """A request that can be told from the next one costs no connection."""
    disk = test.path("disk.img")
    pattern_file(disk, SIZE)
    with open(disk, "rb") as file:
        contents = file.read()
    with test.serve(disk) as daemon:
        client = Client(daemon.uri)

        def refused(command, offset, length, errors, data=b"", flags=0):
            error, _ = client.call(command, offset, length, data, flags)
            check(error in errors, f"command {command} at {offset}+{length}: error {error}")
            check_equal(client.read(4096, 64), contents[4096:4160], "the request after it")

        refused(CMD_READ, SIZE, 512, (EINVAL,))
        refused(CMD_READ, SIZE - 512, 1024, (EINVAL,))
        refused(CMD_READ, 2**64 - 512, 512, (EINVAL,))
        refused(CMD_READ, 2**64 - 512, 1024, (EINVAL,))
        refused(CMD_READ, 2**63, 512, (EINVAL,))
        refused(CMD_WRITE, SIZE, 512, (ENOSPC, EINVAL), b"w" * 512)
        refused(CMD_WRITE, SIZE - 512, 1024, (ENOSPC, EINVAL), b"w" * 1024)
        refused(CMD_WRITE, 2**64 - 512, 1024, (ENOSPC, EINVAL), b"w" * 1024)
        refused(CMD_TRIM, SIZE, 512, (EINVAL, ENOSPC))
        refused(CMD_TRIM, 512, 2**32 - 1, (EINVAL, ENOSPC))
        refused(CMD_WRITE_ZEROES, SIZE - 512, 1024, (EINVAL, ENOSPC))
        refused(CMD_WRITE_ZEROES, 512, 2**32 - 1, (EINVAL, ENOSPC))
        refused(77, 0, 0, (EINVAL, ENOTSUP))
        refused(CMD_READ, 0, 512, (EINVAL,), flags=1 << 14)
        refused(CMD_READ, 0, 32 * MIB + 512, (EINVAL, EOVERFLOW))
        client.disconnect()
    with open(disk, "rb") as file:
        check(file.read() == contents, "a refused request has changed the disk")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def zeroes_and_trims(test):
    disk = test.path("disk.img")
    pattern_file(disk, SIZE)
    with open(disk, "rb") as file:
        contents = file.read()
    with test.serve(disk) as daemon:
        with Client(daemon.uri) as client:
            check_equal(client.call(CMD_WRITE_ZEROES, 1000, 100000)[0], 0, "WRITE_ZEROES")
            check_equal(client.read(1000, 100000), bytes(100000), "zeroed")
            check(client.read(0, 1000) == contents[:1000], "zeroed what stands before")
            check(client.read(101000, 9000) == contents[101000:110000], "zeroed what follows")
            check_equal(client.call(CMD_WRITE_ZEROES, MIB, MIB, flags=CMD_FLAG_NO_HOLE)[0], 0,
                        "WRITE_ZEROES with NO_HOLE")
            check_equal(client.read(MIB, MIB), bytes(MIB), "zeroed")
            check_equal(client.call(CMD_TRIM, 4 * MIB, MIB)[0], 0, "TRIM")
            check_equal(client.call(CMD_FLUSH)[0], 0, "FLUSH")
            check(client.read(3 * MIB, MIB) == contents[3 * MIB:4 * MIB], "trimmed before")
            check(client.read(5 * MIB, MIB) == contents[5 * MIB:6 * MIB], "trimmed behind")
            client.disconnect()


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=60, sanitized=True)
def pipelined_requests_are_all_answered(test):
    """Everything in one stream, sizes mixed, answers in any order."""
    disk = test.path("disk.img")
    pattern_file(disk, SIZE)
    with open(disk, "rb") as file:
        contents = file.read()
    with test.serve(disk) as daemon:
        client = Client(daemon.uri)
        wanted = {}
        for round_number in range(20):
            # 64 reads, of 1 byte to 64 KiB, none aligned.
            for number in range(64):
                offset = (round_number * 64 + number) * 4099
                length = 1 + (number * 1021) % 65536
                cookie = client.request(CMD_READ, offset, length)
                wanted[cookie] = contents[offset:offset + length]
            for _ in range(64):
                cookie, error, data = client.reply()
                check_equal(error, 0, "error")
                check(data == wanted.pop(cookie), "wrong data")
        check_equal(wanted, {}, "unanswered requests")
        # The largest request there may be, both ways.
        with Client(daemon.uri) as other:
            data = other.read(0, SIZE)
            check(data == contents, "8 MiB read at once differ")
            other.write(0, data[::-1])
            check(other.read(0, SIZE) == contents[::-1], "8 MiB written at once differ")
        client.disconnect()


@case(loops=EVENT_LOOPS, sanitized=True)
def largest_request(test):
    with test.serve("mem:64M") as daemon:
        with Client(daemon.uri) as client:
            data = bytes(range(256)) * (32 * MIB // 256)
            client.write(MIB + 1, data)
            check(client.read(MIB + 1, 32 * MIB) == data, "32 MiB differ")
            client.disconnect()


@case(loops=EVENT_LOOPS, sanitized=True)
def requests_before_a_disconnect_are_done(test):
    disk = test.path("disk.img")
    sparse_file(disk, SIZE)
    with test.serve(disk) as daemon:
        client = Client(daemon.uri)
        for number in range(32):
            client.request(CMD_WRITE, number * 65536, 65536, bytes([number + 1]) * 65536)
        client.request(CMD_DISC)
        client.expect_closed()
        with open(disk, "rb") as file:
            for number in range(32):
                check_equal(file.read(65536), bytes([number + 1]) * 65536, f"write {number}")


@case(loops=EVENT_LOOPS)
def read_only_refuses_changes(test):
    disk = test.path("disk.img")
    pattern_file(disk, SIZE)
    with open(disk, "rb") as file:
        contents = file.read()
    with test.serve(disk, "--read-only") as daemon:
        with Client(daemon.uri) as client:
            check(client.flags & TRANSMIT_READ_ONLY, "the read-only flag is missing")
            for command, data in ((CMD_WRITE, b"w" * 512), (CMD_TRIM, b""),
                                  (CMD_WRITE_ZEROES, b"")):
                check_equal(client.call(command, 0, 512, data)[0], EPERM, f"command {command}")
            check_equal(client.read(0, 512), contents[:512], "a read after it")
            client.disconnect()
    with open(disk, "rb") as file:
        check(file.read() == contents, "a read-only disk has changed")
