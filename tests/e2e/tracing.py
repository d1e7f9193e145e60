# SPDX-License-Identifier: MIT
"""--trace and --stall-ms."""

import json
import os

from harness import EVENT_LOOPS, KIB, case, check, check_equal, wait_until
from nbd_client import Client, check_still_serves


@case(loops=EVENT_LOOPS, sanitized=True)
def trace_shows_a_connection(test):
    """Its coroutine hops from the thread where it negotiates to the one that it is served on."""
    path = test.path("trace.json")
    with test.serve("a=mem:8M", "b=mem:8M", "--trace", path) as daemon:
        # Each begins on another thread, and moves to the first, which has no client of its export.
        for export in ("a", "b"):
            with Client(daemon.uri, export) as client:
                client.write(0, b"x" * 64 * KIB)
                client.read(0, 64 * KIB)
        daemon.terminate()
        check(f"{path}: " in daemon.stderr(), f"no word about the file: {daemon.stderr()}")
    with open(path, encoding="utf-8") as file:
        trace = json.load(file)
    check_equal(trace["otherData"]["dropped events"], 0, "dropped events")
    events = trace["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events
              if event["name"] == "thread_name"}
    check({"main", "iothread0", "iothread1"} <= set(tracks.values()), f"tracks: {tracks}")

    turns = [event for event in events if event["ph"] == "X"]
    check(any(turn["name"] == "nbd request" for turn in turns), "no request")
    homes = {}
    for turn in turns:
        if turn["name"] == "nbd connection":
            homes.setdefault(turn["args"]["coroutine"], set()).add(tracks[turn["tid"]])
    check({"iothread0", "iothread1"} in homes.values(), f"connections were seen on {homes}")

    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    finishes = {event["id"]: event for event in events if event["ph"] == "f"}
    check_equal(starts.keys(), finishes.keys(), "arrows that start and end")
    hops = {(tracks[start["tid"]], tracks[finishes[key]["tid"]]) for key, start in starts.items()}
    for hop in (("main", "iothread0"), ("main", "iothread1"), ("iothread1", "iothread0")):
        check(hop in hops, f"no arrow from {hop[0]} to {hop[1]}, but {hops}")


@case(sanitized=True)
def trace_that_cannot_be_written_is_an_error_at_the_start(test):
    path = test.path("nowhere/trace.json")
    ended = test.roost_run("serve", "mem:8M", "--trace", path, "--listen", test.address())
    check_equal(ended.returncode, 1, f"exit code ({ended.stderr})")
    check(path in ended.stderr, f"no path in {ended.stderr!r}")


@case(sanitized=True)
def trace_that_does_not_fit_is_an_error_at_the_end(test):
    with test.serve("mem:8M", "--trace", "/dev/full") as daemon:
        check_still_serves(daemon)
        daemon.signal(15)
        check_equal(daemon.wait(), 1, "exit code")
        check("/dev/full: No space left" in daemon.stderr(), f"stderr: {daemon.stderr()}")


def thread_names(pid):
    names = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/comm", encoding="utf-8") as file:
            names.append(file.read().strip())
    return names


@case(loops=EVENT_LOOPS, sanitized=True)
def stall_detector_only_where_asked_for(test):
    """And one that never finds anything does not show. (What it finds, unit tests have.)"""
    with test.serve("mem:8M") as daemon:
        check_still_serves(daemon)
        check("roost-stalls" not in thread_names(daemon.pid), "a thread nobody asked for")
    with test.serve("mem:8M", "--stall-ms", 3_600_000) as daemon:
        wait_until(lambda: "roost-stalls" in thread_names(daemon.pid), "the detector's thread")
        check_still_serves(daemon)
        daemon.terminate()
        check("has not got on" not in daemon.stderr(), f"stderr: {daemon.stderr()}")
