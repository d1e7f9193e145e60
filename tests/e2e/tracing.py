# SPDX-License-Identifier: MIT
"""--trace, --stall-ms, and tracepoints."""

import json
import os
import re
import signal
import subprocess

from harness import (EVENT_LOOPS, KIB, PATIENCE_S, Failure, Skip, case, check, check_equal,
                     die_with_parent, need_program, run, shortened, wait_until)
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


class Bpftrace:
    """One bpftrace with its program. Use as a context manager; leaving it ends it."""

    def __init__(self, test, program, *arguments):
        self.path = test.path("bpftrace.out")
        with open(self.path, "wb") as out:
            self.process = subprocess.Popen(
                [need_program("bpftrace"), "-B", "line", *arguments, "-e",
                 program + ' BEGIN { printf("attached\\n"); }'],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent)

    def output(self):
        with open(self.path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def __enter__(self):
        # BEGIN runs when all probes are there.
        wait_until(lambda: "attached\n" in self.output() or self.process.poll() is not None,
                   "bpftrace's begin")
        if self.process.poll() is not None:
            raise Skip(f"bpftrace cannot attach here: {shortened(self.output())}")
        return self

    def end(self):
        """Makes it print its maps; its whole output."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise Failure(f"bpftrace does not end: {shortened(self.output())}") from None
        return self.output()

    def __exit__(self, kind, error, trace):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def need_tracepoints(test):
    if os.geteuid() != 0:
        raise Skip("tracing needs root")
    if "Provider: roost" not in run("readelf", "-n", test.roost).stdout:
        raise Skip("the program was built without tracepoints")
    with Bpftrace(test, "") as trial:
        trial.end()


EVENTS = {  # name: arguments
    "aio_co_schedule": 2, "aio_co_schedule_bh_cb": 2, "co_wake": 2, "coroutine_enter": 2,
    "coroutine_yield": 1, "coroutine_terminate": 1}


@case(timeout_s=180)
def tracepoints_carry_what_the_table_says(test):
    """The arguments' meaning and order, from outside, against what the census and the names of
    threads say. (What names and numbers of arguments there are, another test compares.)"""
    need_tracepoints(test)
    program = " ".join(
        f'usdt:{test.roost}:roost:{name} {{ printf("%lld %s {name} %llx %llx\\n", nsecs, comm, '
        f'arg0, {"arg1" if count == 2 else "0"}); }}' for name, count in EVENTS.items())
    with test.serve("mem:8M") as daemon, Client(daemon.uri) as client:
        with Bpftrace(test, program, "-p", str(daemon.pid)) as trace:
            for _ in range(20):
                client.read(0, 64 * KIB)
            with Client(daemon.uri) as another:  # it moves from thread to thread
                another.read(0, 512)
                daemon.signal(signal.SIGUSR1)
                wait_until(lambda: "nbd connection" in daemon.stderr(), "a census")
                seen = trace.end()  # while nothing happens
        connections = {int(address, 16) for address in re.findall(
            r"coroutine 'nbd connection' \((0x[0-9a-f]+)\)", daemon.stderr())}
    check_equal(len(connections), 2, "connections in the census")

    events = sorted((int(when), thread, name, int(one, 16), int(other, 16))
                    for when, thread, name, one, other in
                    re.findall(r"^(\d+) (\S+) (\w+) ([0-9a-f]+) ([0-9a-f]+)$", seen, re.MULTILINE))
    check_equal({name for _, _, name, _, _ in events}, set(EVENTS), "events that came")
    contexts = {}  # who polls each
    for _, thread, name, one, other in events:
        if name == "aio_co_schedule_bh_cb":
            contexts.setdefault(one, set()).add(thread)
    threads = [thread for polling in contexts.values() for thread in polling]
    check_equal(len(threads), len(set(threads)), f"a thread for each context {contexts}")
    check({"iothread0", "iothread1"} <= set(threads), f"no turn on an I/O thread: {contexts}")

    coroutines = {other for _, _, name, _, other in events if name == "coroutine_enter"}
    check(connections <= coroutines, f"of {connections} only {coroutines} ran")
    check(not coroutines & set(contexts), "addresses of coroutines and contexts are mixed up")
    for _, _, name, one, other in events:
        if name in ("aio_co_schedule", "aio_co_schedule_bh_cb", "co_wake"):
            check(one and one not in coroutines and other and other not in contexts,
                  f"{name} {one:x} {other:x}")
        elif name != "coroutine_enter":
            check(one in coroutines, f"{name} {one:x}")

    # What follows what: on the thread of the turn, that coroutine is entered, from outside of any;
    # and each turn was scheduled before, on that context.
    last = {}
    scheduled = {}
    for when, thread, name, one, other in events:
        if last.get(thread, ("",))[0] == "aio_co_schedule_bh_cb":
            check_equal((name, one, other), ("coroutine_enter", 0, last[thread][2]),
                        "what follows a turn")
        if name == "aio_co_schedule":
            scheduled[one, other] = scheduled.get((one, other), 0) + 1
        elif name == "aio_co_schedule_bh_cb":
            scheduled[one, other] = scheduled.get((one, other), 0) - 1
            check(scheduled[one, other] >= 0, f"a turn that nobody asked for: {one:x} {other:x}")
        last[thread] = name, one, other


@case(timeout_s=180)
def documented_one_liners_run(test):
    """Both of docs/tracing.md, on the real program."""
    need_tracepoints(test)
    page = os.path.join(os.path.dirname(__file__), "../../docs/tracing.md")
    with open(page, encoding="utf-8") as file:
        programs = re.findall(r"bpftrace -e '([^']*)'", file.read())
    check_equal(len(programs), 2, "one-liners on the page")
    turns, delays = (one.replace("./build/release/roost", test.roost) for one in programs)
    with test.serve("mem:8M") as daemon, Client(daemon.uri) as client:

        def read():
            client.read(0, 64 * KIB)
            return True

        with Bpftrace(test, turns) as trace:
            wait_until(lambda: read() and re.search(r"^@\[\d+\]: [1-9]\d*$", trace.output(),
                                                    re.MULTILINE), "a context and its turns")
        with Bpftrace(test, delays) as trace:
            for _ in range(50):
                read()
            seen = trace.end()
        counts = re.findall(r"^\[.*\s(\d+) \|", seen[seen.find("@us:"):], re.MULTILINE)
        check("@us:" in seen and sum(map(int, counts)) >= 10, f"no histogram: {shortened(seen)}")
