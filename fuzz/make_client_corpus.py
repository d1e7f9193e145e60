#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes the hand-made inputs of the NBD client's fuzzer to fuzz/corpus/nbd_client/.

An input is one byte that says what the client wishes for, or which headers were negotiated; four
bytes that seed the cuts; and a server's stream (see src/nbd/client_fuzz_checks.h).
"""
import pathlib
import struct

HERE = pathlib.Path(__file__).resolve().parent / "corpus" / "nbd_client"
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = (
    1, 2, 3, 5, 6, 7, 8, 9, 10, 11)
ACK, SERVER, INFO_REPLY, CONTEXT = 1, 2, 3, 4
UNSUP, TLS_REQD, UNKNOWN = 0x80000001, 0x80000005, 0x80000006
DATA, HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 1, 2, 5, 6, 0x8001, 0x8002
NAMED, MODE_INFO, MODE_LIST, MODE_LIST_META, TLS, REQUIRED, CONTEXTS = 1, 2, 4, 6, 8, 16, 32
# With bit 7 set, the rest of a division by 3 is the style.
PLAIN, STRUCT, EXT = (next(n for n in range(128, 131) if n % 3 == style) for style in range(3))


def write(name, setup, stream):
    HERE.mkdir(parents=True, exist_ok=True)
    seed = sum(name.encode()) * 2654435761 % (1 << 32)
    (HERE / name).write_bytes(struct.pack(">BI", setup, seed) + stream)


def reply(option, kind, data=b""):
    return struct.pack(">QIII", 0x3e889045565a9, option, kind, len(data)) + data


def info_export(size=4096, flags=0x8d):
    return struct.pack(">HQH", 0, size, flags)


def simple(cookie, error=0, data=b""):
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def chunk(cookie, kind, data=b"", done=True):
    return struct.pack(">IHHQI", 0x668e33ef, done, kind, cookie, len(data)) + data


OFFSETS = (4096, 16, 512, 0, 512, 0)


def extended(cookie, kind, data=b"", done=True):
    return struct.pack(">IHHQQQ", 0x6e8a278c, done, kind, cookie, OFFSETS[cookie], len(data)) + data


def data(at, size):
    return struct.pack(">Q", at) + b"x" * size


def hole(at, size):
    return struct.pack(">QI", at, size)


def error(code, message=b"", at=None):
    tail = b"" if at is None else struct.pack(">Q", at)
    return struct.pack(">IH", code, len(message)) + message + tail


def status(context, *extents):
    return struct.pack(">I", context) + b"".join(struct.pack(">II", *e) for e in extents)


def status_ext(context, *extents):
    return struct.pack(">II", context, len(extents)) + b"".join(
        struct.pack(">QQ", *e) for e in extents)


def handshakes():
    fixed = b"NBDMAGICIHAVEOPT\0\3"
    newstyle = b"NBDMAGICIHAVEOPT\0\0"
    oldstyle = b"NBDMAGIC" + struct.pack(">QQI", 0x00420281861253, 4096, 3) + bytes(124)
    go = reply(GO, INFO_REPLY, info_export()) + reply(GO, ACK)
    contexts = (reply(SET_META, CONTEXT, b"\0\0\0\7base:allocation")
                + reply(SET_META, CONTEXT, b"\0\0\0\11qemu:x") + reply(SET_META, ACK))
    sizes = reply(GO, INFO_REPLY, struct.pack(">HIII", 3, 512, 4096, 1 << 20))
    write("go_extended", NAMED, fixed + reply(EXTENDED, ACK) + sizes + go + extended(5, 0))
    write("go_structured", NAMED, fixed + reply(EXTENDED, UNSUP) + reply(STRUCTURED, ACK) + go
          + chunk(0, HOLE, hole(4096, 64)))
    write("go_simple", 0, fixed + reply(EXTENDED, UNSUP) + reply(STRUCTURED, UNSUP) + go
          + simple(0, 0, bytes(64)))
    write("go_contexts", NAMED | CONTEXTS, fixed + reply(EXTENDED, ACK) + contexts + go)
    write("go_contexts_refused", CONTEXTS,
          fixed + reply(EXTENDED, ACK) + reply(SET_META, UNKNOWN, b"?") + go)
    write("go_same_context_twice", CONTEXTS, fixed + reply(EXTENDED, ACK)
          + reply(SET_META, CONTEXT, b"\0\0\0\7base:allocation") * 2)
    write("go_unknown", NAMED, fixed + reply(EXTENDED, ACK) + reply(GO, UNKNOWN, b"no such\nthing"))
    write("go_name_description", NAMED, fixed + reply(EXTENDED, ACK)
          + reply(GO, INFO_REPLY, b"\0\1disk0") + reply(GO, INFO_REPLY, b"\0\2a disk")
          + reply(GO, INFO_REPLY, b"\0\x63?") + go)
    write("go_without_size", 0, fixed + reply(EXTENDED, ACK) + reply(GO, ACK))
    write("go_size_twice", 0, fixed + reply(EXTENDED, ACK) + go[:32] * 2)
    write("go_other_option", 0, fixed + reply(EXTENDED, ACK) + reply(INFO, ACK))
    write("go_odd_sizes", 0, fixed + reply(EXTENDED, ACK)
          + reply(GO, INFO_REPLY, struct.pack(">HIII", 3, 3, 4, 5)) + go)
    write("export_name", NAMED, fixed + reply(EXTENDED, UNSUP) + reply(STRUCTURED, ACK)
          + reply(GO, UNSUP) + struct.pack(">QH", 4096, 3))
    write("newstyle", NAMED, newstyle + struct.pack(">QH", 4096, 3) + bytes(124) + simple(5))
    write("oldstyle", 0, oldstyle + simple(5))
    write("oldstyle_tls_required", TLS | REQUIRED, oldstyle)
    write("info", NAMED | MODE_INFO, fixed + reply(EXTENDED, ACK)
          + reply(INFO, INFO_REPLY, info_export()) + reply(INFO, ACK))
    write("list", MODE_LIST, fixed + reply(LIST, SERVER, b"\0\0\0\4disk")
          + reply(LIST, SERVER, b"\0\0\0\0the default") + reply(LIST, ACK))
    write("list_bad_length", MODE_LIST, fixed + reply(LIST, SERVER, b"\0\0\0\5disk"))
    write("list_contexts", MODE_LIST_META | CONTEXTS, fixed + reply(EXTENDED, ACK)
          + reply(LIST_META, CONTEXT, b"\0\0\0\0base:allocation") + reply(LIST_META, ACK))
    write("tls", TLS | REQUIRED, fixed + reply(STARTTLS, ACK) + reply(STRUCTURED, ACK) + go)
    write("tls_refused", TLS, fixed + reply(STARTTLS, UNSUP) + reply(EXTENDED, TLS_REQD))
    write("tls_required_refused", TLS | REQUIRED, fixed + reply(STARTTLS, UNSUP))
    write("http", 0, b"HTTP/1.1 400 Bad Request\r\n\r\n")


def replies():
    write("simple_reads", PLAIN, simple(0, 0, b"x" * 64) + simple(2) + simple(1, 5) + simple(5))
    write("simple_cookie", PLAIN, simple(99))
    write("simple_twice", PLAIN, simple(5) * 2)
    write("chunks_any_order", STRUCT, chunk(0, DATA, data(4128, 32), False)
          + simple(5) + chunk(0, HOLE, hole(4096, 16), False) + chunk(0, DATA, data(4112, 16)))
    write("chunks_overlap", STRUCT, chunk(0, DATA, data(4096, 33), False)
          + chunk(0, HOLE, hole(4128, 32)))
    write("chunks_beyond", STRUCT, chunk(0, DATA, data(4096, 65)) + chunk(5, 0))
    write("chunks_before", STRUCT, chunk(1, HOLE, hole(0xffffffffffffffff, 64)))
    write("chunks_missing", STRUCT, chunk(0, DATA, data(4096, 63), False) + chunk(0, 0))
    write("chunks_df_cut", STRUCT, chunk(1, DATA, data(16, 32), False)
          + chunk(1, DATA, data(48, 32)))
    write("error_messages", STRUCT, chunk(0, ERROR_OFFSET, error(5, b"bad\n", 4100), False)
          + chunk(0, DATA, data(4096, 4), False) + chunk(0, HOLE, hole(4101, 59), False)
          + chunk(0, 0) + chunk(2, ERROR, error(28, b"full")) + chunk(5, 0x8123, error(1)))
    write("error_behind_error", STRUCT, chunk(0, ERROR_OFFSET, error(5, b"", 4100), False)
          + chunk(0, DATA, data(4096, 64)))
    write("error_flush_offset", STRUCT, chunk(5, ERROR_OFFSET, error(5, b"", 0)))
    write("read_simple_though", STRUCT, simple(0, 22))
    write("status", STRUCT, chunk(3, STATUS, status(7, (512, 3), (512, 0)), False)
          + chunk(3, STATUS, status(9, (4096, 1))) + chunk(4, STATUS, status(7, (512, 0)), False)
          + chunk(4, STATUS, status(9, (512, 0))))
    write("status_lies", STRUCT, chunk(3, STATUS, status(7, (512, 3), (0, 0)), False)
          + chunk(3, STATUS, status(8, (1, 1)), False) + chunk(3, STATUS, status(7, (1, 1)))
          + chunk(4, STATUS, status(9, (513, 1)), False)
          + chunk(4, STATUS, status(7, (1, 1), (1, 1))))
    write("status_too_many", STRUCT, chunk(3, STATUS, status(7, (1024, 3), (1, 0))))
    write("extended", EXT, extended(0, DATA, data(4096, 64)) + extended(2, 0)
          + extended(3, STATUS_EXT, status_ext(7, (512, 3)), False)
          + extended(3, STATUS_EXT, status_ext(9, (1 << 40, 1 << 63)))
          + extended(5, ERROR, error(108, b"bye")))
    write("extended_wraps", EXT, extended(3, STATUS_EXT, status_ext(7, ((1 << 64) - 1, 0))))
    write("extended_upper_flags", EXT, extended(3, STATUS_EXT, status_ext(7, (1, 1 << 32))))
    write("extended_other_offset", EXT, extended(0, DATA, data(4096, 64)).replace(
        b"\0\0\x10\0", b"\0\0\x10\1", 1))
    write("extended_count", EXT, extended(3, STATUS_EXT, status_ext(7, (1, 1))[:4] + b"\0\0\0\2"
                                          + bytes(16)))
    write("wrong_type_for_request", STRUCT, chunk(2, DATA, data(512, 512)))
    write("unknown_chunk", STRUCT, chunk(0, 77))


handshakes()
replies()
