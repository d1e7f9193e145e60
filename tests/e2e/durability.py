# SPDX-License-Identifier: MIT
"""FLUSH and FUA reach the disk's own flush.

The daemon serves a file on volatile_disk, which keeps writes in memory until it is told to sync.
What has reached the file behind it has been synced; the page cache cannot answer for it."""

import os
import signal
import subprocess

from harness import (EVENT_LOOPS, MIB, Skip, case, check, check_equal, die_with_parent,
                     private_mounts, sparse_file, wait_until)
from nbd_client import (CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EIO,
                        Client)

DISK_SIZE = 8 * MIB


class VolatileDisk:
    def __init__(self, test, *options, contents=b""):
        program = os.path.join(test.tools, "volatile_disk")
        if not os.path.exists(program):
            raise Skip("volatile_disk was not built (libfuse3-dev is missing)")
        if not os.access("/dev/fuse", os.W_OK):
            raise Skip("/dev/fuse cannot be used here")
        private_mounts()
        self.backing = test.path("backing.img")
        sparse_file(self.backing, DISK_SIZE)
        with open(self.backing, "r+b") as file:
            file.write(contents)
        folder = test.path("mount")
        os.mkdir(folder)
        self.path = os.path.join(folder, "disk.img")
        self.process = subprocess.Popen([program, *options, self.backing, folder],
                                        stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
        test.defer(self.end)
        wait_until(lambda: self.process.poll() is not None or os.path.exists(self.path),
                   "the mount")
        if self.process.poll() is not None:
            raise Skip("FUSE does not mount here")

    def end(self):
        self.process.terminate()
        self.process.wait()

    def stored(self, offset, length):
        with open(self.backing, "rb") as file:
            file.seek(offset)
            return file.read(length)

    def lose_power(self):
        """Forgets what was not synced."""
        self.process.send_signal(signal.SIGUSR1)


@case()
def volatile_disk_keeps_its_promise(test):
    """The tool itself: without this, the cases below would prove nothing."""
    disk = VolatileDisk(test, contents=b"O" * 4096)
    fd = os.open(disk.path, os.O_RDWR)
    try:
        os.pwrite(fd, b"A" * 5000, 100)
        check_equal(os.pread(fd, 5000, 100), b"A" * 5000, "read back")
        check_equal(disk.stored(0, 4096), b"O" * 4096, "stored before fdatasync")
        os.fdatasync(fd)
        check_equal(disk.stored(100, 5000), b"A" * 5000, "stored after fdatasync")
        check_equal(disk.stored(0, 100), b"O" * 100, "stored before it")
        os.pwritev(fd, [b"B" * 4096], 8192, os.RWF_DSYNC)
        check_equal(disk.stored(8192, 4096), b"B" * 4096, "stored after a write with RWF_DSYNC")
        os.pwrite(fd, b"C" * 4096, 16384)
        disk.lose_power()
        wait_until(lambda: os.pread(fd, 4096, 16384) == bytes(4096), "the loss of the write")
        os.fdatasync(fd)
        check_equal(disk.stored(16384, 4096), bytes(4096), "stored after the loss")
    finally:
        os.close(fd)


@case(loops=EVENT_LOOPS, sanitized=True)
def write_without_flush_stays_volatile(test):
    """If this fails, every write is synced, and the tests of FLUSH and FUA cannot fail."""
    disk = VolatileDisk(test)
    with test.serve(disk.path) as daemon:
        with Client(daemon.uri) as client:
            client.write(0, b"w" * 4096)
            check_equal(client.read(0, 4096), b"w" * 4096, "read back")
            check_equal(disk.stored(0, 4096), bytes(4096), "stored without a flush")


@case(loops=EVENT_LOOPS, sanitized=True)
def flush_reaches_the_disk(test):
    disk = VolatileDisk(test)
    with test.serve(disk.path) as daemon:
        with Client(daemon.uri) as client:
            for step in range(1, 20):
                data = bytes([step]) * 12345
                client.write(step * 65536 + 77, data)
                client.flush()
                check_equal(disk.stored(step * 65536 + 77, len(data)), data,
                            "stored when FLUSH was acknowledged")


@case(loops=EVENT_LOOPS)
def flush_covers_other_connections(test):
    """That is what the multi-conn flag promises."""
    disk = VolatileDisk(test)
    with test.serve(disk.path, "--iothreads", 2) as daemon:
        clients = [Client(daemon.uri) for _ in range(4)]
        for step in range(1, 12):
            offset = step * 65536
            clients[step % 4].write(offset, bytes([step]) * 4096)
            clients[(step + 1) % 4].flush()
            check_equal(disk.stored(offset, 4096), bytes([step]) * 4096,
                        "stored when another connection's FLUSH was acknowledged")
        for client in clients:
            client.disconnect()


@case(loops=EVENT_LOOPS, sanitized=True)
def fua_reaches_the_disk(test):
    disk = VolatileDisk(test, contents=b"x" * MIB)
    with test.serve(disk.path) as daemon:
        with Client(daemon.uri) as client:
            for step in range(1, 20):
                data = bytes([step]) * 12345
                client.write(step * 65536 + 77, data, flags=CMD_FLAG_FUA)
                check_equal(disk.stored(step * 65536 + 77, len(data)), data,
                            "stored when a write with FUA was acknowledged")
            # A big one, which a server may split.
            data = os.urandom(4 * MIB)
            client.write(MIB, data, flags=CMD_FLAG_FUA)
            check(disk.stored(MIB, len(data)) == data, "4 MiB with FUA are not all stored")
            error, _ = client.call(CMD_WRITE_ZEROES, 0, 65536, flags=CMD_FLAG_FUA)
            check_equal(error, 0, "error of WRITE_ZEROES with FUA")
            check_equal(disk.stored(0, 65536), bytes(65536), "stored after WRITE_ZEROES with FUA")


@case(loops=EVENT_LOOPS)
def terminating_flushes(test):
    disk = VolatileDisk(test)
    with test.serve(disk.path) as daemon:
        with Client(daemon.uri) as client:
            client.write(4096, b"t" * 4096)
            check_equal(disk.stored(4096, 4096), bytes(4096), "stored before the end")
            daemon.terminate()
    check_equal(disk.stored(4096, 4096), b"t" * 4096, "stored after SIGTERM")


@case(loops=EVENT_LOOPS)
def failed_sync_is_reported(test):
    disk = VolatileDisk(test, "--fail-sync")
    daemon = test.serve(disk.path)
    with Client(daemon.uri) as client:
        client.write(0, b"w" * 4096)
        check_equal(client.call(CMD_FLUSH)[0], EIO, "error of FLUSH")
        error, _ = client.call(CMD_WRITE, 4096, 4096, b"f" * 4096, flags=CMD_FLAG_FUA)
        check_equal(error, EIO, "error of a write with FUA")
        check_equal(client.read(0, 4096), b"w" * 4096, "a read after the failure")
        client.disconnect()
    check(daemon.alive(), f"the daemon has ended: {daemon.describe()}")


@case(loops=EVENT_LOOPS, sanitized=True)
def media_errors_are_reported(test):
    """EIO of a bad sector reaches the client that asked for it, and nobody else."""
    disk = VolatileDisk(test, f"--fail-reads-from={4 * MIB}", f"--fail-writes-from={6 * MIB}",
                        contents=b"g" * 4096)
    with test.serve(disk.path) as daemon:
        with Client(daemon.uri) as client:
            check_equal(client.call(CMD_READ, 5 * MIB, 4096)[0], EIO, "error of a bad read")
            check_equal(client.call(CMD_READ, 4 * MIB - 4096, 8192)[0], EIO,
                        "error of a read that runs into the bad part")
            check_equal(client.call(CMD_WRITE, 7 * MIB, 4096, b"b" * 4096)[0], EIO,
                        "error of a bad write")
            check(client.call(CMD_TRIM, 7 * MIB, 4096)[0] in (0, EIO), "error of a bad trim")
            check_equal(client.read(0, 4096), b"g" * 4096, "a good read")
            client.write(MIB, b"h" * 4096)
            check_equal(client.read(MIB, 4096), b"h" * 4096, "a good write")
            client.disconnect()
