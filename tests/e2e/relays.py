# SPDX-License-Identifier: MIT
"""Programs that are clients of `roost serve` and servers of `roost copy` at once: their own clients
are tried on our server, with nbdkit's filters in between."""

import json
import os

from foreign import Foreign, copy_over_crashes, measure, patchy_file, roost, there_and_back
from harness import (EVENT_LOOPS, KIB, MIB, PATIENCE_S, Failure, Skip, case, check, check_equal,
                     pattern_file, private_mounts, run, same_contents, sparse_file)

SIZE = 4 * MIB + 512


def nbdkit(test, uri, *arguments, name="relay", filters=()):
    return Foreign(test, "nbdkit", "-f", "-U", "SOCKET", *(f"--filter={one}" for one in filters),
                   "nbd", uri, *arguments, socket_name=name)


@case(loops=EVENT_LOOPS, timeout_s=120)
def qemu_nbd_serves_our_export(test):
    disk = test.path("disk")
    sparse_file(disk, SIZE)
    with test.serve(disk) as daemon:
        relay = Foreign(test, "qemu-nbd", "-t", "-e", 4, "-f", "raw", "--discard=unmap",
                        "-k", "SOCKET", daemon.uri)
        info = there_and_back(test, relay.uri(), disk, SIZE)
        check("base:allocation" in info["contexts"], f"{info}")
        # What we say of holes comes through.
        extents = json.loads(roost(test, "info", relay.uri(), "--map", "--json").stdout)
        check({one["description"] for one in extents} >= {"data", "hole,zero"}, f"{extents}")
        measure(test, relay.uri())


@case(loops=EVENT_LOOPS, timeout_s=120)
def nbdkit_serves_our_export(test):
    """With each filter, nbdkit is another kind of client to us."""
    disk = test.path("disk")
    relays = (
        ("plain", (), ()),
        ("several", (), ("shared=true",)),
        ("delay", ("delay",), ("rdelay=1ms", "wdelay=1ms")),
        ("turns", ("noparallel",), ("serialize=requests",)),
        ("policy", ("blocksize-policy",), ("blocksize-minimum=512", "blocksize-preferred=4096",
                                           "blocksize-maximum=65536",
                                           "blocksize-error-policy=error")),
        ("pieces", ("blocksize",), ("minblock=4096", "maxdata=16384", "maxlen=1M")),
    )
    with test.serve(f"a={disk}", "--create", SIZE) as daemon:
        for name, filters, arguments in relays:
            relay = nbdkit(test, daemon.uri, *arguments, name=name, filters=filters)
            # minblock cuts a disk off at a multiple.
            size = SIZE // 4096 * 4096 if name == "pieces" else SIZE
            try:
                there_and_back(test, relay.uri(), None if name == "pieces" else disk, size)
                measure(test, relay.uri())
            except Failure as what:
                raise Failure(f"nbdkit {name}: {what}") from None
            relay.kill()


@case(loops=EVENT_LOOPS, timeout_s=120)
def nbdkit_compares_with_our_export(test):
    disk, source = test.path("disk"), test.path("source")
    patchy_file(disk, SIZE)
    patchy_file(source, SIZE)
    with test.serve(disk, "--read-only") as daemon:
        relay = nbdkit(test, daemon.uri, filters=("checkwrite",))
        roost(test, "copy", source, relay.uri(), "--verify")
        run("nbdcopy", source, relay.uri())
        with open(source, "r+b") as file:
            file.seek(SIZE - 1)
            byte = file.read(1)
            file.seek(SIZE - 1)
            file.write(bytes([byte[0] ^ 1]))
        differs = roost(test, "copy", source, relay.uri(), code=1)
        check("WRITE" in differs.stderr, differs.stderr)


@case(loops=EVENT_LOOPS, timeout_s=120)
def nbdkit_takes_leave_of_our_export(test):
    """exitlast: nbdkit goes with its last client, and its connections to us end as they should."""
    with test.serve(f"mem:{SIZE}", "--max-connections", 4) as daemon:
        patchy_file(test.path("source"), SIZE)
        for _ in range(3):
            relay = Foreign(test, "nbdkit", "-f", "-U", "SOCKET", "--filter=exitlast", "nbd",
                            daemon.uri, probe=False)
            roost(test, "copy", test.path("source"), relay.uri(), "--verify")
            check_equal(relay.process.wait(PATIENCE_S), 0, "exit code of nbdkit")
            os.unlink(relay.path)
        roost(test, "copy", daemon.uri, test.path("back"))
        check(same_contents(test.path("source"), test.path("back")), "the copy is not right")
        check("turned away" not in daemon.stderr(), f"connections are left: {daemon.stderr()}")


@case(loops=EVENT_LOOPS, timeout_s=120)
def nbdkit_comes_back_to_a_server_that_crashes(test):
    """retry: nbdkit connects again to a server that was killed, and its client does not notice."""
    disk, source = test.path("disk"), test.path("source")
    pattern_file(source, 16 * MIB)
    sparse_file(disk, 16 * MIB)
    daemon = test.serve(disk)
    relay = nbdkit(test, daemon.uri, "retries=60", "retry-delay=1", "retry-exponential=no",
                   filters=("retry",))
    copy_over_crashes(test, daemon, disk, [source, relay.uri(), "--flush", "--reconnect", "0"],
                      grows=disk, crashes=2)
    check(same_contents(source, disk), "the copy is not right")


@case(loops=EVENT_LOOPS, timeout_s=120)
def nbdfuse_mounts_our_export(test):
    if not os.access("/dev/fuse", os.W_OK):
        raise Skip("/dev/fuse cannot be used here")
    private_mounts()
    folder, source = test.path("mount"), test.path("source")
    os.mkdir(folder)
    patchy_file(source, SIZE)
    with test.serve(f"mem:{SIZE}") as daemon:
        file = os.path.join(folder, "disk")
        mounted = Foreign(test, "nbdfuse", file, daemon.uri, path=file, probe=False)
        with open(source, "rb") as ours, open(file, "r+b") as theirs:
            while piece := ours.read(100 * KIB):
                theirs.write(piece)
            theirs.flush()
            os.fsync(theirs.fileno())
        check(same_contents(source, file), "what was written is not read back")
        roost(test, "copy", daemon.uri, test.path("back"))
        check(same_contents(source, test.path("back")), "what was written is not on the disk")
        run("fusermount3", "-u", folder)
        check_equal(mounted.process.wait(PATIENCE_S), 0, "exit code of nbdfuse")
