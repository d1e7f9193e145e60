#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes the hand-made inputs of the TLS fuzzer to fuzz/corpus/nbd_tls/.

An input is one byte that says which end is ours and which TLS it is, then bytes that are asked for
one after the other: what the peer does next, and what becomes of each record it sends for that
(see fuzz/nbd_tls.cc). A raw input's bytes are what the peer sends.
"""
import pathlib

HERE = pathlib.Path(__file__).resolve().parent / "corpus" / "nbd_tls"
CLIENT, OLD, RAW = 1, 2, 4
# What becomes of a record, and what is asked for then.
PASS, JOIN, FLIP, CUT, TWICE, LATER, DROP, INSERT, SHORTEN, SPLIT = (
    [0], [0x80], [0xc0], [0xc1], [0xc2], [0xc3], [0xc4], [0xc5], [0xc6], [0xc7])
# What the peer does.
NEW_KEYS, WARN, FATAL, BYE, OURS = [3], [4], [5], [6], [7]


def write(name, kind, rest):
    HERE.mkdir(parents=True, exist_ok=True)
    (HERE / name).write_bytes(bytes([kind, *rest]))


def data(low, high=0):
    """The peer sends 1 + low + 80 * high bytes."""
    return [0, low, high]


def handshakes(write, records):
    """Something goes wrong before there is a session."""
    write("shake_pieces", sum(([*SPLIT, 1 + at] for at in range(records)), []) + data(40) + PASS)
    write("shake_joined", JOIN * records + data(40) + PASS)
    write("shake_after_bye", INSERT + [2, 0x15, 0, 0, 0, 0, 1, 0])
    write("shake_flip_first", FLIP + [20, 0, 1])
    write("shake_flip_last", PASS * (records - 1) + FLIP + [20, 0, 1])
    write("shake_flip_type", PASS + FLIP + [0, 0, 1])
    write("shake_flip_length", FLIP + [3, 0, 6])
    write("shake_cut", PASS * (records - 1) + CUT + [4])
    write("shake_drop", PASS + DROP)
    write("shake_twice", TWICE)
    write("shake_swapped", PASS * (records - 2) + LATER + PASS)
    write("shake_after_data", INSERT + [3, 1, 2, 3, 4, 5, 6, 7, 0x17])
    write("shake_after_alert", INSERT + [2, 0x15, 0, 0, 0, 0, 1, 90])
    write("shake_shorter", SHORTEN + [10])
    write("shake_empty", SHORTEN + [0])


def sessions(write, records):
    """A session is there; what comes for it?"""
    def say(name, *rest):
        write(name, PASS * records + sum(rest, []))

    say("data", data(200, 2), PASS, data(0, 255), PASS * 2, data(0), PASS)
    say("data_and_ours", data(9), PASS, OURS, [3], data(0, 99), PASS, OURS, [255], BYE, PASS)
    say("joined", data(40), JOIN, data(0, 255), JOIN * 2, BYE, JOIN)
    say("new_keys_joined", NEW_KEYS, [0], JOIN, data(40), JOIN, NEW_KEYS, [1], JOIN, data(9), PASS)
    say("flip_joined", data(40), JOIN, data(40), FLIP, [9, 0, 3])
    say("close_by_alert", data(40), PASS, WARN, [0], PASS, data(3), PASS)
    say("bye_first", BYE, PASS, data(7), OURS, [2])
    say("bye_twice", data(7), PASS, BYE, PASS, BYE, PASS)
    say("new_keys", NEW_KEYS, [0], PASS, data(40), PASS, NEW_KEYS, [1], PASS, OURS, [1], data(1),
        PASS)
    say("new_keys_too_often", *[[*NEW_KEYS, 1, 0]] * 10)
    say("warnings", WARN, [90], PASS, data(40), PASS, WARN, [255], PASS, data(1), PASS)
    say("fatal", data(40), PASS, FATAL, [40], PASS, data(1), PASS)
    say("flip_data", data(40), FLIP, [9, 0, 3], data(3), PASS)
    say("flip_tag", data(0, 200), FLIP, [255, 60, 3])
    say("flip_bye", data(40), PASS, BYE, FLIP, [5, 0, 0])
    say("flip_keys", NEW_KEYS, [0], FLIP, [6, 0, 0], data(40), PASS)
    say("cut_data", data(40), PASS, data(90), CUT, [12])
    say("cut_header", data(40), PASS, data(90), CUT, [3])
    say("cut_between", data(40), PASS, data(90), CUT, [0])
    say("cut_bye", data(40), PASS, BYE, CUT, [6])
    say("drop_data", data(40), PASS, data(90), DROP, data(3), PASS)
    say("drop_bye", data(40), PASS, BYE, DROP)
    say("twice", data(40), TWICE, data(3), PASS)
    say("swapped", data(40), PASS, data(90), LATER, data(3), PASS)
    say("pieces", data(40), SPLIT, [1], data(0, 255), SPLIT, [255], SPLIT, [5], BYE, SPLIT, [4])
    say("after_alert", data(40), INSERT, [2, 0x15, 0, 0, 0, 0, 1, 0])
    say("after_handshake", data(40), INSERT, [4, 0x16, 0, 0, 0, 0, 0, 0, 0, 0])
    say("after_cipher_change", data(40), INSERT, [1, 0x14, 0, 0, 0, 0, 1])
    say("shorter", data(40), SHORTEN, [12], data(3), PASS)
    say("empty", data(40), SHORTEN, [0], data(3), PASS)


def raw():
    for name, kind in (("server", RAW), ("client", RAW | CLIENT)):
        write(f"{name}_raw_nothing", kind, b"")
        write(f"{name}_raw_alert", kind, b"\x15\3\3\0\2\2\x28")
        write(f"{name}_raw_warnings", kind, b"\x15\3\3\0\2\1\x5a" * 40)
        write(f"{name}_raw_no_tls", kind, b"NBDMAGICIHAVEOPT\0\3")
        write(f"{name}_raw_ssl2", kind, b"\x80\x2e\1\3\1\0\x15\0\0\0\x10" + bytes(37))
        write(f"{name}_raw_too_long", kind, b"\x16\3\3\xff\xff" + bytes(80))
        # A part of a message, and nothing that could be the rest of it.
        write(f"{name}_raw_pieces", kind, b"\x16\3\1\0\5\1\0\1\0\3\x16\3\1\0\5world\x17\3\3\0\1x")
        write(f"{name}_raw_empty_records", kind, b"\x16\3\3\0\0" * 30)


if __name__ == "__main__":
    raw()
    for end, end_bit in (("server", 0), ("client", CLIENT)):
        for version, version_bit in (("1_3", 0), ("1_2", OLD)):
            def write_one(name, rest, end=end, version=version, kind=end_bit | version_bit):
                write(f"{end}_{version}_{name}", kind, rest)

            # The records of the peer's handshake.
            count = 3 + bool(end_bit) + bool(version_bit)
            handshakes(write_one, count)
            sessions(write_one, count)
