# SPDX-License-Identifier: MIT
"""FLUSH and FUA reach the disk's own flush.

The daemon serves a file on volatile_disk, which keeps writes in memory until it is told to sync.
What has reached the file behind it has been synced; the page cache cannot answer for it."""

import os
import random
import signal
import struct
import subprocess
import threading
import time

from harness import (EVENT_LOOPS, MIB, PATIENCE_S, Missing, Skip, case, check, check_equal,
                     die_with_parent, private_mounts, sparse_file, wait_until)
from nbd_client import (CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EIO,
                        Client, Closed)
from proxy import Proxy

DISK_SIZE = 8 * MIB


class VolatileDisk:
    def __init__(self, test, *options, contents=b""):
        program = os.path.join(test.tools, "volatile_disk")
        if not os.path.exists(program):
            raise Missing("volatile_disk was not built (libfuse3-dev is missing)")
        if not os.access("/dev/fuse", os.W_OK):
            raise Skip("/dev/fuse cannot be used here")
        private_mounts()
        self.backing = test.path("backing.img")
        sparse_file(self.backing, DISK_SIZE)
        with open(self.backing, "r+b") as file:
            file.write(contents)
        self.folder = test.path("mount")
        os.mkdir(self.folder)
        self.path = os.path.join(self.folder, "disk.img")
        self.command = [program, *options, self.backing, self.folder]
        test.defer(self.end)
        self.begin()

    def begin(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL,
                                        preexec_fn=die_with_parent)
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


# --- kills at random moments ---------------------------------------------------------------------

BLOCK = 4096
WRITERS = 3
BLOCKS = DISK_SIZE // BLOCK // WRITERS  # of each writer
# The long form: ROOST_KILLS=200 tests/e2e/run.py --roost ... nothing_flushed_is_lost_by_kills
KILLS = int(os.environ.get("ROOST_KILLS", "10"))
SEED = int(os.environ.get("ROOST_KILL_SEED", "1"))


def block_of(offset, sequence):
    return struct.pack("<QQ", offset, sequence) * (BLOCK // 16)


class Ledger:
    """What may be on the disk: for each block the newest write that has to be there, and those
    after it, which may. Shared by the writers, for a flush of one covers the writes of all."""

    def __init__(self):
        self.lock = threading.Lock()
        self.sequence = 0
        self.flushed = {}  # offset -> sequence
        self.acknowledged = {}  # offset -> sequence, of the newest acknowledged write
        self.possible = {}  # offset -> sequences that were sent since the flushed one
        self.durable = 0  # acknowledgements that something is durable

    def send(self, offset):
        with self.lock:
            self.sequence += 1
            self.possible.setdefault(offset, []).append(self.sequence)
            return self.sequence

    def acknowledge(self, offset, sequence, fua=False):
        with self.lock:
            self.acknowledged[offset] = sequence
            if fua:
                self.make_durable({offset: sequence})

    def before_flush(self):
        with self.lock:
            return dict(self.acknowledged)

    def after_flush(self, covered):
        with self.lock:
            self.make_durable(covered)

    def make_durable(self, covered):
        self.durable += 1
        for offset, sequence in covered.items():
            if self.flushed.get(offset, 0) < sequence:
                self.flushed[offset] = sequence
                self.possible[offset] = [s for s in self.possible[offset] if s > sequence]

    def check(self, read):
        """Compares with the disk. What was lost may not come back, what is there stays."""
        for offset in range(0, WRITERS * BLOCKS * BLOCK, BLOCK):
            seen = read(offset, BLOCK)
            flushed = self.flushed.get(offset, 0)
            allowed = {block_of(offset, flushed)[:16] if flushed else bytes(16): flushed}
            for sequence in self.possible.get(offset, ()):
                allowed[block_of(offset, sequence)[:16]] = sequence
            # A kill may come in the middle of a write, so each unit is old or new.
            for at in range(0, BLOCK, 16):
                check(seen[at:at + 16] in allowed,
                      f"block at {offset}: {struct.unpack('<QQ', seen[at:at + 16])}, flushed was "
                      f"{flushed}, sent since {self.possible.get(offset, [])}")
            units = {allowed[seen[at:at + 16]] for at in range(0, BLOCK, 16)}
            self.acknowledged.pop(offset, None)
            if len(units) == 1:
                self.flushed[offset] = units.pop()
                self.possible[offset] = []


class RandomWriter(threading.Thread):
    """Writes to blocks of its own, several at a time, never two at one block; some with FUA, and
    now and then a flush. Ends when the connection does."""

    DEPTH = 6

    def __init__(self, uri, number, ledger, seed):
        super().__init__(daemon=True)
        self.client = Client(uri)
        self.number = number
        self.ledger = ledger
        self.rng = random.Random(seed)
        self.problem = None

    def run(self):
        under_way = {}  # cookie -> (offset, sequence, fua), or what a flush covers
        busy = set()
        try:
            while True:
                while len(under_way) < self.DEPTH:
                    if self.rng.random() < 0.1:
                        covered = self.ledger.before_flush()
                        under_way[self.client.request(CMD_FLUSH)] = covered
                        continue
                    offset = (self.number * BLOCKS + self.rng.randrange(BLOCKS)) * BLOCK
                    if offset in busy:
                        continue
                    busy.add(offset)
                    fua = self.rng.random() < 0.1
                    sequence = self.ledger.send(offset)
                    cookie = self.client.request(CMD_WRITE, offset, BLOCK,
                                                 block_of(offset, sequence),
                                                 flags=CMD_FLAG_FUA if fua else 0)
                    under_way[cookie] = (offset, sequence, fua)
                cookie, error, _ = self.client.reply()
                check_equal(error, 0, "error of a request")
                done = under_way.pop(cookie)
                if isinstance(done, dict):
                    self.ledger.after_flush(done)
                else:
                    busy.remove(done[0])
                    self.ledger.acknowledge(*done)
        except Closed:
            pass
        except Exception as error:  # noqa: BLE001: reported by the main thread
            self.problem = error
        finally:
            self.client.socket.close()


@case(timeout_s=60, serial=True)
def nothing_flushed_is_lost_by_kills(test):
    """The server, or the proxy before it, is killed, and the disk loses what was not synced."""
    disk = VolatileDisk(test)
    ledger = Ledger()
    rng = random.Random(SEED)
    counts = {"server": 0, "proxy": 0}
    for round in range(KILLS):
        server = test.serve(disk.path, "--iothreads", 2)
        proxy = Proxy(test, server, "--delay", "0:2", "--reorder", "0.2", "--seed", SEED + round)
        writers = [RandomWriter(proxy.uri, number, ledger, rng.random())
                   for number in range(WRITERS)]
        # Not by time: so many writes after the first flush as the seed says.
        before, enough = ledger.durable, rng.randrange(3, 30)
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + PATIENCE_S
        while ledger.durable - before < enough:
            check(all(writer.is_alive() for writer in writers),
                  f"a writer has stopped: {[writer.problem for writer in writers]}")
            check(time.monotonic() < deadline, "the writers do not get on")
            time.sleep(0.001)
        victim = rng.choice(("server", "proxy"))
        counts[victim] += 1
        {"server": server, "proxy": proxy}[victim].kill()
        for writer in writers:
            writer.join(PATIENCE_S)
            check(not writer.is_alive(), "a writer does not notice that the connection is gone")
            if writer.problem:
                raise writer.problem
        server.kill()
        proxy.kill()
        test.daemons.clear()
        # What has not reached the file behind the disk is lost with the process.
        disk.end()
        ledger.check(disk.stored)
        disk.begin()
    print(f"{KILLS} kills ({counts}), {ledger.sequence} writes, {ledger.durable} flushes and FUA")
