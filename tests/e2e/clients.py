# SPDX-License-Identifier: MIT
"""Stock NBD clients on real data."""

import json
import os
import random
import urllib.parse
import xml.dom.minidom

from harness import (EVENT_LOOPS, KIB, MIB, TRANSPORTS, Missing, case, check, check_equal,
                     pattern_file, run, same_contents, sparse_file)
from nbd_client import Client

DISK_SIZE = 64 * MIB


def file_system_image(test, name="ext4.img"):
    """An ext4 file system with a tree of files of many sizes in it."""
    source = test.path("files")
    rng = random.Random(4)
    for folder in range(8):
        os.makedirs(f"{source}/{folder}")
        for number in range(12):
            with open(f"{source}/{folder}/{number}", "wb") as file:
                file.write(rng.randbytes(rng.choice((0, 1, 700, 4096, 65 * KIB, 400 * KIB))))
    image = test.path(name)
    sparse_file(image, DISK_SIZE)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", source, image)
    return image


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=120, sanitized=True)
def nbdcopy_in_and_out(test):
    image, disk, back = file_system_image(test), test.path("disk.img"), test.path("back.img")
    sparse_file(disk, DISK_SIZE)
    sparse_file(back, DISK_SIZE)
    with test.serve(disk) as daemon:
        run("nbdcopy", "--flush", image, daemon.uri)
        check(same_contents(image, disk), "what nbdcopy sent is not what is on the disk")
        run("nbdcopy", daemon.uri, back)
    check(same_contents(image, back), "what nbdcopy fetched is not what is on the disk")
    run("e2fsck", "-f", "-n", back)


@case(loops=EVENT_LOOPS, timeout_s=120, sanitized=True)
def nbdcopy_over_four_connections(test):
    image, disk, back = test.path("image"), test.path("disk.img"), test.path("back.img")
    pattern_file(image, DISK_SIZE)
    sparse_file(disk, DISK_SIZE)
    sparse_file(back, DISK_SIZE)
    with test.serve(disk, "--iothreads", 4) as daemon:
        parallel = ("--connections=4", "--requests=32", "--request-size=65536")
        run("nbdcopy", *parallel, "--flush", image, daemon.uri)
        check(same_contents(image, disk), "what nbdcopy sent is not what is on the disk")
        run("nbdcopy", *parallel, daemon.uri, back)
    check(same_contents(image, back), "what nbdcopy fetched is not what is on the disk")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=120)
def qemu_img_convert_and_compare(test):
    image, disk, back = file_system_image(test), test.path("disk.img"), test.path("back.qcow2")
    sparse_file(disk, DISK_SIZE)
    with test.serve(disk) as daemon:
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, daemon.uri)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, daemon.uri)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", daemon.uri, back)
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, back)
        # One byte makes the difference, or the comparisons above say nothing.
        with Client(daemon.uri) as client:
            old = client.read(DISK_SIZE // 2 + 17, 1)
            client.write(DISK_SIZE // 2 + 17, bytes([old[0] ^ 1]))
        differ = run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, daemon.uri,
                     check_exit=False)
        check_equal(differ.returncode, 1, f"exit code for different images ({differ.stdout})")


def qemu_io(uri, *commands, check_exit=True):
    arguments = [part for command in commands for part in ("-c", command)]
    return run("qemu-io", "-f", "raw", *arguments, uri, check_exit=check_exit)


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=60, sanitized=True)
def qemu_io_patterns(test):
    disk = test.path("disk.img")
    sparse_file(disk, DISK_SIZE)
    with test.serve(disk) as daemon:
        qemu_io(daemon.uri,
                "write -P 0xa5 0 1M",
                "read -P 0xa5 0 1M",
                "write -P 0x5a 3k 5k",  # neither end on a page
                "read -P 0xa5 0 3k", "read -P 0x5a 3k 5k", "read -P 0xa5 8k 1016k",
                "write -P 0x11 1234567 891",  # nor on a sector
                "read -P 0x11 1234567 891",
                "write -z 64k 64k",
                "read -P 0 64k 64k", "read -P 0xa5 128k 64k",
                "write -z -u 256k 128k",  # a hole is allowed
                "read -P 0 256k 128k", "read -P 0xa5 384k 64k",
                "discard 512k 256k",
                "read -P 0xa5 0 3k", "read -P 0xa5 768k 64k",
                "write -f -P 0x77 63M 1M",
                "read -P 0x77 63M 1M",
                "flush")
        # Many at once.
        qemu_io(daemon.uri,
                *(f"aio_write -P {n + 1} {n}M 1M" for n in range(32)), "aio_flush", "flush",
                *(f"aio_read -P {n + 1} {n}M 1M" for n in range(32)), "aio_flush")
        wrong = qemu_io(daemon.uri, "read -P 0x99 0 4k", check_exit=False)
        check(wrong.returncode != 0, "qemu-io does not notice a wrong pattern")
    with open(disk, "rb") as file:
        file.seek(63 * MIB)
        check_equal(file.read(4), b"\x77" * 4, "on the disk at 63M")
        file.seek(5 * MIB)
        check_equal(file.read(4), b"\x06" * 4, "on the disk at 5M")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS)
def nbdinfo_describes_the_export(test):
    disk = test.path("disk.img")
    sparse_file(disk, DISK_SIZE)
    with test.serve(disk) as daemon:
        answer = json.loads(run("nbdinfo", "--json", daemon.uri).stdout)
        check_equal(answer["protocol"], "newstyle-fixed", "protocol")
        export = answer["exports"][0]
        check_equal(export["export-name"], "", "export name")
        check_equal(export["export-size"], DISK_SIZE, "size")
        for key, wanted in (("is_read_only", False), ("can_flush", True), ("can_fua", True),
                            ("can_trim", True), ("can_zero", True), ("can_multi_conn", True)):
            check_equal(export[key], wanted, key)
        least = export["block_size_minimum"]
        check(1 <= least <= 512 and least & (least - 1) == 0, f"minimum block size {least}")
        check(export["block_size_preferred"] >= 4096, f"preferred {export['block_size_preferred']}")
        check_equal(export["block_size_maximum"], 32 * MIB, "maximum block size")
    with test.serve(disk, "--read-only") as daemon:
        export = json.loads(run("nbdinfo", "--json", daemon.uri).stdout)["exports"][0]
        check_equal(export["is_read_only"], True, "is_read_only")


@case(transports=TRANSPORTS)
def nbdinfo_lists_named_exports(test):
    sizes = {"alpha": 1 * MIB, "beta": 2 * MIB, "with space": 3 * MIB}
    disks = []
    for number, (name, size) in enumerate(sizes.items()):
        sparse_file(test.path(f"{number}.img"), size)
        disks.append(f"{name}={test.path(f'{number}.img')}")
    with test.serve(*disks) as daemon:
        daemon.wait_for_uris(3)
        server = daemon.uris[0].replace("alpha", "")
        answer = json.loads(run("nbdinfo", "--list", "--json", server).stdout)
        seen = {export["export-name"]: export["export-size"] for export in answer["exports"]}
        check_equal(seen, sizes, "exports")
        # Each printed URI leads to its export.
        for uri, size in zip(daemon.uris, sizes.values()):
            check_equal(int(run("nbdinfo", "--size", uri).stdout), size, uri)
        missing = run("nbdinfo", "--size", daemon.uris[0].replace("alpha", "gamma"),
                      check_exit=False)
        check(missing.returncode != 0, "an export that is not there was opened")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS)
def stock_clients_list_the_exports(test):
    with test.serve("alpha=mem:1M", "beta=mem:2M") as daemon:
        daemon.wait_for_uris(2)
        if test.transport == "unix":
            qemu, other = ("-k", test.path("s")), ("-unix", test.path("s"), "-l")
        else:
            port = urllib.parse.urlsplit(daemon.uri).port
            qemu, other = ("-b", "127.0.0.1", "-p", port), ("-l", "127.0.0.1", port)
        listed = run("qemu-nbd", "-L", *qemu).stdout
        check(listed.count("base:allocation") == 2, f"qemu-nbd: {listed}")
        names = ("export: 'alpha'", "export: 'beta'", f"size:  {MIB}", f"size:  {2 * MIB}")
        check(all(name in listed for name in names), f"qemu-nbd: {listed}")
        # nbd-client does the rest in the kernel.
        listed = run("nbd-client", *other)
        check({"alpha", "beta"} <= set(listed.stdout.split()), f"nbd-client: {listed.stdout}")


NBDSH = """
import errno, random
assert h.get_size() == 64 << 20 and h.can_meta_context("base:allocation")
assert h.get_structured_replies_negotiated() and h.can_df() and h.can_multi_conn()
rng = random.Random(5)

# Many at a time, and what comes back is compared, however it is cut.
here, there = {}, []
for n in range(48):
    data, at = rng.randbytes(rng.choice((1, 700, 4096, 100000))), (n << 18) + rng.randrange(4096)
    here[at] = data
    there.append(h.aio_pwrite(nbd.Buffer.from_bytearray(data), at))
while h.aio_in_flight():
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in there)
h.flush()
def read(at, size, flags=0):
    got, seen = bytearray(size), []
    def chunk(data, offset, status, error):
        assert status in (nbd.READ_DATA, nbd.READ_HOLE) and error.value == 0
        got[offset - at:offset - at + len(data)] = data
        seen.append(len(data))
    whole = h.pread_structured(size, at, chunk, flags)
    assert whole == got, "the pieces are not the whole"
    return bytes(whole), len(seen)
for at, data in here.items():
    assert read(at, len(data))[0] == data
assert read(0, 13 << 20)[1] > 1
assert read(0, 1 << 20, nbd.CMD_FLAG_DF)[1] == 1

h.trim(1 << 18, 1 << 18, nbd.CMD_FLAG_FUA)
h.zero(1 << 18, 1 << 19, nbd.CMD_FLAG_FAST_ZERO)
h.zero(3 << 18, 1 << 16, nbd.CMD_FLAG_NO_HOLE)
h.cache(1 << 20, 1 << 18)
assert h.pread(1 << 19, 1 << 18) == bytes(1 << 19)
h.pwrite(b"f" * 5000, 40 << 20, nbd.CMD_FLAG_FUA)
extents = []
def extent(context, offset, entries, error):
    assert context == "base:allocation"
    extents.extend(zip(entries[0::2], entries[1::2]))
h.block_status(64 << 20, 0, extent)
assert len(extents) > 2 and sum(length for length, _ in extents) <= 64 << 20, extents

# Our refusals are theirs: past the end, which libnbd would not even send.
h.set_strict_mode(0)
for call in (lambda: h.pread(4096, 64 << 20), lambda: h.pwrite(b"x" * 4096, (64 << 20) - 1),
             lambda: h.trim(4096, 64 << 20)):
    try:
        call()
    except nbd.Error as refused:
        assert refused.errnum in (errno.EINVAL, errno.ENOSPC), refused
    else:
        raise AssertionError("a request beyond the end was carried out")
assert h.pread(5000, 40 << 20) == b"f" * 5000
h.shutdown()
"""


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def nbdsh_script(test):
    disk = test.path("disk.img")
    sparse_file(disk, DISK_SIZE)
    # The system's Python, which libnbd's module belongs to, goes before any other.
    environment = dict(os.environ, PATH="/usr/bin:/bin:" + os.environ.get("PATH", ""))
    with test.serve(disk) as daemon:
        run("nbdsh", "--base-allocation", "-u", daemon.uri, "-c", NBDSH, env=environment)
    with open(disk, "rb") as file:
        file.seek(40 * MIB)
        check_equal(file.read(5001), b"f" * 5000 + b"\0", "on the disk")


def fio(test, uri, *options, **how):
    if "nbd" not in run("fio", "--enghelp").stdout.split():
        raise Missing("this fio has no nbd engine")
    # fio leaves files where it stands.
    how.setdefault("cwd", test.folder)
    return run("fio", "--name=e2e", "--ioengine=nbd", f"--uri={uri}", "--randrepeat=1",
               "--output-format=json", *options, **how)


def fio_errors(done):
    # Before the JSON, fio may have warned.
    report = json.loads(done.stdout[done.stdout.index("{"):])
    return [(job["error"], job["read"]["total_ios"], job["write"]["total_ios"])
            for job in report["jobs"]]


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, timeout_s=120)
def fio_verifies_random_writes(test):
    disk = test.path("disk.img")
    sparse_file(disk, DISK_SIZE)
    with test.serve(disk) as daemon:
        done = fio(test, daemon.uri, "--rw=randwrite", "--bsrange=4k-64k", "--size=64M",
                   "--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
                   "--fsync=64")
        for error, reads, writes in fio_errors(done):
            check_equal(error, 0, "fio's error")
            check(writes > 500 and reads > 500, f"fio did {reads} reads and {writes} writes")


@case(loops=EVENT_LOOPS, timeout_s=120)
def fio_verifies_over_four_connections(test):
    disk = test.path("disk.img")
    sparse_file(disk, DISK_SIZE)
    with test.serve(disk, "--iothreads", 4) as daemon:
        done = fio(test, daemon.uri, "--rw=randwrite", "--bs=4k", "--size=8M", "--numjobs=4",
                   "--offset_increment=16M", "--iodepth=16", "--verify=crc32c",
                   "--verify_fatal=1", "--do_verify=1", "--thread")
        jobs = fio_errors(done)
        check_equal(len(jobs), 4, "jobs")
        for error, reads, writes in jobs:
            check_equal(error, 0, "fio's error")
            check(writes == 2048 and reads == 2048, f"{reads} reads and {writes} writes")


@case(loops=EVENT_LOOPS)
def memory_disk(test):
    with test.serve("mem:16M") as daemon:
        qemu_io(daemon.uri, "read -P 0 0 16M", "write -P 0x3c 1M 2M", "read -P 0x3c 1M 2M",
                "write -z 1M 1M", "read -P 0 1M 1M", "discard 2M 1M", "flush",
                "read -P 0 15M 1M")


@case(loops=EVENT_LOOPS)
def null_disk(test):
    with test.serve("null:1T") as daemon:
        check_equal(int(run("nbdinfo", "--size", daemon.uri).stdout), 1 << 40, "size")
        qemu_io(daemon.uri, "write -P 0x3c 512G 1M", "read -P 0 512G 1M", "flush")


@case()
def bench_tells_what_it_measured(test):
    picture = test.path("latency.svg")
    with test.serve("mem:16M") as daemon:
        done = test.roost_run("bench", daemon.uri, "--seconds", 0.3, "--warm-up", 0, "--writes", 50,
                              "--depth", 4, "--json", "--plot", picture)
        check_equal(done.returncode, 0, f"exit code ({done.stderr})")
        told = json.loads(done.stdout)
        for kind in ("reads", "writes"):
            latency = told[kind]["latency_us"]
            check(told[kind]["requests"] > 0, f"no {kind}")
            order = [latency["min"], *(latency["percentiles"][p] for p in ("50", "90", "99")),
                     latency["max"]]
            check_equal(order, sorted(order), f"percentiles of {kind}")
        # 4 requests in flight for 0.3 s or more, each as long as the mean says.
        busy_s = sum(told[kind]["requests"] * told[kind]["latency_us"]["mean"]
                     for kind in ("reads", "writes")) / 1e6
        check(busy_s > 0.6, f"the latencies add up to {busy_s:.2f} s of 1.2 s")
        bars = xml.dom.minidom.parse(picture).getElementsByTagName("rect")
        check(len(bars) > 2, "the picture is empty")
        refused = test.roost_run("bench", daemon.uri, "--size", "1G")
        check_equal(refused.returncode, 2, "exit code for a request that is too long")
    gone = test.roost_run("bench", daemon.uri, "--seconds", 0.1)
    check_equal(gone.returncode, 1, "exit code without a server")
    check("connect" in gone.stderr, f"what is wrong is not said: {gone.stderr}")
