# SPDX-License-Identifier: MIT
"""What survives when the daemon is killed."""

import os
import random
import struct
import threading
import time

from harness import EVENT_LOOPS, MIB, PATIENCE_S, Failure, case, check, check_equal, sparse_file
from nbd_client import CMD_WRITE, Client, Closed, check_still_serves

BLOCK = 4096
DISK_SIZE = 64 * MIB
CONNECTIONS = 4
DEPTH = 16
ACKNOWLEDGED_BEFORE_KILL = 4000


def block_of(offset, sequence):
    return struct.pack("<QQ", offset, sequence) * (BLOCK // 16)


class Writer(threading.Thread):
    """Overwrites random blocks of its own quarter of the disk, DEPTH at once, never two on the same
    block; remembers for each block what was acknowledged and what is under way."""

    def __init__(self, uri, number):
        super().__init__(daemon=True)
        self.client = Client(uri)
        self.first = number * (DISK_SIZE // CONNECTIONS // BLOCK)
        self.rng = random.Random(number)
        self.acknowledged = {}  # offset -> sequence number
        self.under_way = {}  # offset -> sequence number
        self.count = 0
        self.problem = None

    def send(self, offsets, sequence):
        while True:
            offset = (self.first + self.rng.randrange(512)) * BLOCK
            if offset not in self.under_way:
                break
        self.under_way[offset] = sequence
        cookie = self.client.request(CMD_WRITE, offset, BLOCK, block_of(offset, sequence))
        offsets[cookie] = offset

    def run(self):
        offsets = {}
        sequence = 0
        try:
            while True:
                while len(offsets) < DEPTH:
                    sequence += 1
                    self.send(offsets, sequence)
                cookie, error, _ = self.client.reply()
                check_equal(error, 0, "error of a write")
                offset = offsets.pop(cookie)
                self.acknowledged[offset] = self.under_way.pop(offset)
                self.count += 1
        except Closed:
            pass
        except Exception as error:  # noqa: BLE001: reported by the main thread
            self.problem = error


def check_survivors(disk, writers):
    """Every acknowledged block is on the disk, unless a later write to it was under way."""
    checked = 0
    with open(disk, "rb") as file:
        for writer in writers:
            for offset, sequence in writer.acknowledged.items():
                file.seek(offset)
                seen = file.read(BLOCK)
                later = writer.under_way.get(offset)
                if later is None:
                    if seen != block_of(offset, sequence):
                        raise Failure(f"block at {offset}: acknowledged {sequence}, found "
                                      f"{struct.unpack('<QQ', seen[:16])}")
                    checked += 1
                else:
                    # A kill may come in the middle of a write, so each unit is old or new.
                    units = {block_of(offset, sequence)[:16], block_of(offset, later)[:16]}
                    found = {seen[at : at + 16] for at in range(0, BLOCK, 16)}
                    check(found <= units, f"block at {offset} is neither {sequence} nor {later}")
    return checked


@case(loops=EVENT_LOOPS, timeout_s=120, serial=True)
def acknowledged_writes_survive_kill_nine(test):
    disk = test.path("disk.img")
    sparse_file(disk, DISK_SIZE)
    daemon = test.serve(disk, "--iothreads", 2)
    writers = [Writer(daemon.uri, number) for number in range(CONNECTIONS)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + PATIENCE_S
    while sum(writer.count for writer in writers) < ACKNOWLEDGED_BEFORE_KILL:
        check(time.monotonic() < deadline, "the writers do not get on")
        check(all(writer.is_alive() for writer in writers), "a writer has stopped")
        time.sleep(0.001)
    daemon.kill()
    for writer in writers:
        writer.join(PATIENCE_S)
        check(not writer.is_alive(), "a writer does not notice that the daemon is gone")
        if writer.problem:
            raise writer.problem
    check(any(writer.under_way for writer in writers), "nothing was under way at the kill")
    checked = check_survivors(disk, writers)
    check(checked > 500, f"only {checked} blocks were left to compare")

    # Its socket is still lying there; the next daemon takes the place.
    check(os.path.exists(test.path("s")), "the killed daemon's socket file is gone")
    with test.serve(disk) as daemon:
        check_still_serves(daemon)
