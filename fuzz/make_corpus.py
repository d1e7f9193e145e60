#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes the hand-made inputs of the NBD fuzzers below fuzz/corpus/.

An input is one byte that picks exports, four bytes that seed the cuts, and a client's stream
(see src/nbd/fuzz_checks.h).
"""
import pathlib
import struct

HERE = pathlib.Path(__file__).resolve().parent / "corpus"
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO = 1, 2, 3, 5, 6, 7
STRUCTURED, LIST_META, SET_META, EXTENDED = 8, 9, 10, 11
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS, RESIZE = range(9)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
# Added to the setup byte.
TLS_FORBIDDEN, TLS_ALLOWED, TLS_REQUIRED = 4, 8, 12
CHUNKS, LONG_HEADERS, STATUS_PAYLOAD = 64, 128, 192


def write(target, name, setup, seed, stream):
    folder = HERE / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(struct.pack(">BI", setup, seed) + stream)


def option(number, data=b"", length=None):
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def go(name, *requests):
    return (struct.pack(">I", len(name)) + name + struct.pack(">H", len(requests))
            + b"".join(struct.pack(">H", r) for r in requests))


def request(command, offset=0, length=0, flags=0, cookie=0x0102030405060708, data=b""):
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + data


def meta(name, *queries):
    strings = [struct.pack(">I", len(s)) + s for s in (name, *queries)]
    return strings[0] + struct.pack(">I", len(queries)) + b"".join(strings[1:])


def extended(command, offset=0, length=0, flags=0, cookie=0x0102030405060708, data=b""):
    return struct.pack(">IHHQQQ", 0x21e41c71, flags, command, cookie, offset, length) + data


def negotiations():
    fixed, zeroes = struct.pack(">I", 3), struct.pack(">I", 1)
    streams = {
        "export_name": (1, fixed + option(EXPORT_NAME)),
        "export_name_with_zeroes": (2, zeroes + option(EXPORT_NAME, b"disk")),
        "export_name_unknown": (2, fixed + option(EXPORT_NAME, b"no\nsuch")),
        "export_name_not_fixed": (2, struct.pack(">I", 0) + option(EXPORT_NAME, b"a")),
        "export_name_too_long": (1, fixed + option(EXPORT_NAME, length=4097)),
        "go_then_request": (2, fixed + option(GO, go(b"a", 3)) + request(READ, 0, 512)),
        "info_all_then_go": (2, fixed + option(INFO, go(b"a", 0, 1, 2, 3))
                             + option(GO, go(b"", 0, 1, 2, 3, 77))),
        "go_unknown_then_go": (2, fixed + option(GO, go(b"x")) + option(GO, go(b"disk"))),
        "go_malformed": (1, fixed + option(GO, b"\0\0\0") + option(GO, b"\0\0\0\2a\0\0")
                         + option(GO, b"\0\0\0\0\0\2\0\0") + option(GO, b"\xff" * 6)),
        "go_too_long": (1, fixed + option(GO, length=8193)),
        "list_abort": (2, fixed + option(LIST) + option(ABORT, b"bye")),
        "list_with_data": (1, fixed + option(LIST, b"x") + option(LIST)),
        "list_long": (3, fixed + option(LIST) * 3 + option(ABORT)),
        "unsupported": (1, fixed + option(STARTTLS) + option(STRUCTURED)
                        + option(SET_META, b"12345678") + option(0xffffffff) + option(ABORT)),
        "unknown_client_flag": (1, struct.pack(">I", 7)),
        "wrong_magic": (1, fixed + b"GET / HTTP/1.1\r\n\r\n"),
        "four_gigabytes": (1, fixed + option(STRUCTURED, length=0xffffffff)),
        "structured_then_go": (2, fixed + option(STRUCTURED) + option(GO, go(b"a"))),
        "extended_then_go": (2, fixed + option(EXTENDED) + option(STRUCTURED)
                             + option(SET_META, meta(b"a", b"base:allocation"))
                             + option(INFO, go(b"disk")) + option(GO, go(b"a", 3))),
        "extended_export_name": (2, fixed + option(EXTENDED, b"x") + option(EXTENDED)
                                 + option(EXPORT_NAME, b"a")),
        "contexts_listed": (2, fixed + option(STRUCTURED) + option(LIST_META, meta(b"a"))
                            + option(LIST_META, meta(b"", b"base:", b"qemu:x"))
                            + option(LIST_META, meta(b"x", b"base:"))),
        "context_of_another": (2, fixed + option(STRUCTURED)
                               + option(SET_META, meta(b"disk", b"x:y", b"base:allocation"))
                               + option(GO, go(b"a"))),
        "context_lost": (2, fixed + option(EXTENDED)
                         + option(SET_META, meta(b"a", b"base:allocation"))
                         + option(SET_META, meta(b"a", b"no colon")) + option(GO, go(b"a"))),
        "context_malformed": (2, fixed + option(STRUCTURED) + option(SET_META, b"\0\0\0\0\xff\xff")
                              + option(SET_META, struct.pack(">III", 0, 0xffffffff, 0))
                              + option(LIST_META, struct.pack(">III", 0, 1, 0xfffffffc))),
        "context_without_chunks": (2, fixed + option(SET_META, meta(b"a", b"base:allocation"))
                                   + option(EXPORT_NAME, b"a")),
        "tls_forbidden": (1 + TLS_FORBIDDEN, fixed + option(STARTTLS) + option(LIST)),
        "tls_started": (1 + TLS_ALLOWED, fixed + option(LIST) + option(STARTTLS, b"x")
                        + option(STARTTLS)),
        "tls_and_plain_text": (1 + TLS_ALLOWED, fixed + option(STARTTLS) + option(GO, go(b""))),
        "tls_required": (1 + TLS_REQUIRED, fixed + option(LIST) + option(GO, go(b""))
                         + option(0xffff) + option(STARTTLS)),
        "tls_required_name": (1 + TLS_REQUIRED, fixed + option(EXPORT_NAME)),
        "no_exports": (0, fixed + option(LIST) + option(GO, go(b"")) + option(EXPORT_NAME)),
    }
    for seed, (name, (setup, stream)) in enumerate(streams.items()):
        write("nbd_negotiation", name, setup, seed, stream)


def transmissions():
    block = bytes(range(256)) * 2
    streams = {
        "read_disc": (2, request(READ, 4096, 4096) + request(DISC)),
        "write_fua_flush": (2, request(WRITE, 0, 512, 1, data=block) + request(FLUSH)),
        "writes_in_a_row": (2, request(WRITE, 512, 512, data=block) * 3 + request(READ, 0, 1)),
        "write_refused_then_read": (10, request(WRITE, 0, 512, data=block) + request(READ, 0, 1)),
        "write_empty": (2, request(WRITE) + request(READ)),
        "write_cut_off": (2, request(WRITE, 0, 512, data=block[:100])),
        "write_too_big": (2, request(WRITE, 0, (32 << 20) + 1)),
        "trim_and_zeroes": (2, request(TRIM, 0, 1 << 29) + request(ZEROES, 0, 1 << 29, 2)),
        "beyond_the_end": (1, b"".join(request(c, 4000, 100) for c in (READ, TRIM, ZEROES))),
        "wraps_around": (3, request(READ, 0xffffffffffffffff, 0xffffffff)),
        "unknown_command": (2, request(99, 0, 512) + request(CACHE, 0, 512)),
        "unknown_flags": (2, request(READ, 0, 512, 0x8000) + request(READ, 0, 1, 2)),
        "flush_with_length": (2, request(FLUSH, 0, 1) + request(FLUSH, 1, 0)),
        "unaligned": (18, request(READ, 1, 512) + request(READ, 512, 512)),
        "wrong_magic": (2, request(READ, 0, 1) + b"\x25\x60\x95\x14" + bytes(24)),
        "chunks": (2 + CHUNKS, request(READ, 0, 65536, DF) + request(STATUS, 0, 4096, REQ_ONE)
                   + request(ZEROES, 0, 512, FAST_ZERO) + request(CACHE, 0, 512)
                   + request(READ, 0, (32 << 20) + 1) + request(STATUS, 0, 0)
                   + request(READ, 0, 1, PAYLOAD_LEN)),
        "resize": (1 + CHUNKS, request(RESIZE, 4096) + request(RESIZE, 1 << 63)
                   + request(READ, 4096, 512)),
        "resize_read_only": (9 + CHUNKS, request(RESIZE, 4096)),
        "extended": (3 + LONG_HEADERS, extended(TRIM, 0, 1 << 40) + extended(READ, 0, 1 << 40)
                     + extended(WRITE, 0, 512, PAYLOAD_LEN | FUA, data=block)
                     + extended(WRITE, 0, 512) + extended(READ, 0, 512, PAYLOAD_LEN, data=block)),
        "extended_status": (3 + STATUS_PAYLOAD,
                            extended(STATUS, 512, 12, PAYLOAD_LEN,
                                     data=struct.pack(">QI", 1 << 40, 1))
                            + extended(STATUS, 512, 12, PAYLOAD_LEN,
                                       data=struct.pack(">QI", 1 << 40, 2))
                            + extended(STATUS, 0, 16, PAYLOAD_LEN,
                                       data=struct.pack(">QII", 1, 1, 1))
                            + extended(STATUS, 0, 1 << 33)),
        "extended_too_big": (35 + LONG_HEADERS, extended(WRITE, 0, (1 << 20) + 1, PAYLOAD_LEN)),
        "extended_wraps": (3 + LONG_HEADERS, extended(ZEROES, 2, 0xffffffffffffffff)),
        "extended_compact": (3 + LONG_HEADERS, extended(READ, 0, 1) + request(READ, 0, 512)),
        "header_cut_off": (2, request(READ, 0, 1)[:27]),
    }
    for seed, (name, (setup, stream)) in enumerate(streams.items()):
        write("nbd_transmission", name, setup, seed, stream)


negotiations()
transmissions()
