# SPDX-License-Identifier: MIT
"""A soak: one server, many clients of every kind at once, for as long as ROOST_SOAK_S says (the
long form: ROOST_SOAK_S=600 tests/e2e/run.py --roost ... soak_of_all_kinds_of_clients). Their
connections are dropped and moved, exports come and go; whoever writes reads it back. At several
points all clients stop, and then nothing of them may be left: no coroutine, no descriptor, no
memory."""

import collections
import json
import multiprocessing
import os
import random
import socket
import struct
import subprocess
import threading
import time

import clients
import harness
import tls
from harness import (KIB, MIB, PATIENCE_S, Failure, Missing, case, check, check_equal,
                     die_with_parent, need_program, pattern_file, same_contents, sparse_file)
from nbd_client import (CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES, EXTENDED,
                        OPT_GO, OPT_INFO, OPT_LIST, OPT_STARTTLS, REP_ACK, REQUEST_MAGIC, SIMPLE,
                        STRUCTURED, Client, Closed)

SOAK_S = float(os.environ.get("ROOST_SOAK_S", "20"))
SEED = int(os.environ.get("ROOST_SOAK_SEED", "1"))
REGION = MIB  # of a client that writes and reads back
GOLDEN = 8 * MIB
# How long a client may take, on a busy machine.
STUCK_S = 120
# How long an event loop may.
SLOW_S = 10
# What was freed is not all given back: each I/O thread keeps up to 16 MiB of buffers. Filling that
# takes a minute or two: of a run that is shorter, not more may be asked.
IOTHREADS = 3
WARM_S = 300
GROWTH_WARM = 8 * MIB
GROWTH_COLD = IOTHREADS * 16 * MIB


def in_time(done, what, seconds=STUCK_S):
    """Calls `done`, which waits for a second at most, until it gives something. Counted so, a time
    in which the whole machine stands still is short."""
    for _ in range(seconds):
        result = done()
        if result is not None:
            return result
    raise Failure(f"{what} after {seconds} s")


class Pulse(threading.Thread):
    """Feels whether this process gets to run, so that others are not blamed when it does not."""

    BEAT_S = 0.2

    def __init__(self):
        super().__init__(daemon=True)
        self.longest = 0.0
        self.start()

    def run(self):
        while True:
            begin = time.monotonic()
            time.sleep(self.BEAT_S)
            self.longest = max(self.longest, time.monotonic() - begin - self.BEAT_S)


# --- the server ----------------------------------------------------------------------------------


class Server:
    """soak_server, and what it is told."""

    def __init__(self, test, folder, disks):
        program = os.path.join(test.tools, "soak_server")
        self.path = test.path("s")
        self.log_path = test.path("soak.log")
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [program, self.path, folder, str(IOTHREADS), *disks], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, cwd=test.folder,
                preexec_fn=die_with_parent)
        test.defer(self.kill)
        self.lock = threading.Lock()
        self.answers = {}
        self.number = 0
        lines = [self.process.stdout.readline() for _ in range(2)]
        check("nbd://" in lines[1], f"soak_server says {lines}: {self.log()}")
        self.tcp = lines[1].strip()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            number, _, answer = line.partition(" ")
            with self.lock:
                event, box = self.answers.pop(int(number))
            box.append(json.loads(answer))
            event.set()

    def tell(self, *words):
        event, box = threading.Event(), []
        with self.lock:
            self.number += 1
            self.answers[self.number] = (event, box)
            self.process.stdin.write(" ".join((str(self.number), *words)) + "\n")
            self.process.stdin.flush()
        in_time(lambda: event.wait(1) or None, f"{words} is not done")
        answer = box[0]
        check(not isinstance(answer, dict) or "error" not in answer, f"{words}: {answer}")
        return answer

    def uri(self, export, transport="unix", encrypted=None):
        uri = (f"nbd+unix:///{export}?socket={self.path}" if transport == "unix"
               else self.tcp + export)
        return tls.with_folder(uri.replace("nbd", "nbds", 1), encrypted) if encrypted else uri

    def log(self):
        with open(self.log_path, "rb") as log:
            return log.read().decode(errors="replace")

    def memory(self):
        """What it has for itself, and its share of the rest, in bytes; without what its allocator
        has merely not given back."""
        self.tell("trim")
        with open(f"/proc/{self.process.pid}/smaps_rollup") as rollup:
            return next(int(line.split()[1]) * KIB for line in rollup if line.startswith("Pss:"))

    def descriptors(self):
        return sorted(self.describe(fd) for fd in os.listdir(f"/proc/{self.process.pid}/fd"))

    def describe(self, fd):
        try:  # without the number of the socket, which is another one each time
            return os.readlink(f"/proc/{self.process.pid}/fd/{fd}").split(":[")[0]
        except FileNotFoundError:
            return "closed meanwhile"

    def coroutines(self):
        return collections.Counter(one["name"] for one in self.tell("census"))

    def quit(self):
        self.process.stdin.write("0 quit\n")  # others have copies of its end of the pipe
        self.process.stdin.flush()
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise Failure(f"soak_server does not end: {self.log()[-2000:]}") from None
        check_equal(code, 0, f"exit code of soak_server ({self.log()[-2000:]})")
        check("never ended" not in self.log(), f"coroutines are left: {self.log()[-2000:]}")

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


# --- clients -------------------------------------------------------------------------------------


class Visit:
    """What a client is given for one visit: where to go, what is its own there, and for how long it
    should stay."""

    def __init__(self, soak, number, rng, tell):
        self.soak = soak
        self.server = soak.server
        self.tell = tell  # the server's, by way of the main process
        self.number = number
        self.rng = rng
        self.offset = number * REGION
        self.until = time.monotonic() + rng.uniform(0.3, 1.5)

    def goes_on(self):
        return time.monotonic() < self.until and not self.soak.pausing.is_set()

    def uri(self, export, encrypted=False):
        return self.server.uri(export, self.rng.choice(("unix", "tcp")),
                               self.soak.trusting if encrypted else None)

    def pause(self, longest_s):
        time.sleep(self.rng.uniform(0, longest_s))

    def connect(self, export, style=SIMPLE):
        return Client(self.uri(export), export, style=style)

    def run(self, *command, code=0):
        """A program that ends by itself."""
        command = [str(part) for part in command]
        command[0] = need_program(command[0])
        process = self.start(command)

        def end():
            try:
                return process.communicate(timeout=1)[0]
            except subprocess.TimeoutExpired:
                return None

        try:
            out = in_time(end, f"{' '.join(command)} has not ended")
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        check_equal(process.returncode, code, f"exit code of {' '.join(command)} ({out})")
        return out

    def start(self, command):
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, errors="replace",
                                cwd=self.soak.test.folder, preexec_fn=die_with_parent)

    def path(self, name):
        return self.soak.test.path(f"{name}.{self.number}")


def verifying(visit, export="files", style=None):
    """Reads back what it wrote, now and on its earlier visits."""
    rng, model = visit.rng, visit.soak.models[visit.number]
    with visit.connect(export, style or rng.choice((SIMPLE, STRUCTURED, EXTENDED))) as client:
        while visit.goes_on():
            wanted = {}  # cookie -> range
            for place in rng.sample(range(REGION // (64 * KIB)), 8):
                length = rng.choice((1, 512, 4 * KIB, 40000))
                at = place * 64 * KIB + rng.randrange(64 * KIB - length)
                kind = rng.choice((CMD_READ, CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES))
                data = b""
                if kind == CMD_WRITE:
                    data = rng.randbytes(length)
                    model[at:at + length] = data
                elif kind == CMD_WRITE_ZEROES:
                    model[at:at + length] = bytes(length)
                flags = CMD_FLAG_FUA if kind != CMD_READ and rng.random() < 0.05 else 0
                cookie = client.request(kind, visit.offset + at, length, data, flags)
                wanted[cookie] = (kind, at, length)
            if rng.random() < 0.1:
                wanted[client.request(CMD_FLUSH)] = (CMD_FLUSH, 0, 0)
            while wanted:
                cookie, error, data = client.reply()
                kind, at, length = wanted.pop(cookie)
                check_equal(error, 0, f"error of request {kind} at {visit.offset + at}")
                check(kind != CMD_READ or data == model[at:at + length],
                      f"{length} bytes at {visit.offset + at} of {export} are not what they were")
                del client.answers[cookie]
        client.disconnect()


def over_a_relay(visit):
    verifying(visit, "relay")


def slow_reader(visit):
    """Lets its replies wait."""
    golden = visit.soak.golden
    with visit.connect("golden") as client:
        for number in range(24):
            client.request(CMD_READ, number * 64 * KIB, 64 * KIB)
        while visit.goes_on() and client.reads:
            visit.pause(0.1)
            cookie, error, data = client.reply()
            at = (cookie - 1) * 64 * KIB
            check(error == 0 and data == golden[at:at + 64 * KIB], f"data at {at} is wrong")
        if not client.reads:
            client.disconnect()


def vanishing(visit):
    """Goes in the midst of a request, of its data, or of what it was to be given."""
    while visit.goes_on():
        with visit.connect("scratch") as client:
            header = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_WRITE, 1, 0, 64 * KIB)
            what = visit.rng.randrange(5)
            if what == 0:
                client.send(header[:visit.rng.randrange(1, len(header))])
            elif what == 1:
                client.send(header + bytes(visit.rng.randrange(64 * KIB)))
            else:
                for number in range(32):
                    client.request(CMD_READ, number * 256 * KIB, 256 * KIB)
                for _ in range(visit.rng.randrange(3)):
                    client.reply()
                if what == 3:  # by a reset
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                             struct.pack("ii", 1, 0))
                elif what == 4:
                    client.socket.shutdown(visit.rng.choice((socket.SHUT_RD, socket.SHUT_WR)))
            visit.pause(0.03)


def negotiating(visit):
    """Never gets to an export."""
    while visit.goes_on():
        with Client(visit.uri("files"), negotiate=False) as client:
            what = visit.rng.randrange(6)
            if what == 0:
                visit.pause(0.2)
                continue
            client.greet()
            if what == 1:
                check_equal(client.option(OPT_LIST)[-1][0], REP_ACK, "reply to LIST")
                name = b"golden"
                request = struct.pack(">I", len(name)) + name + bytes(2)
                check_equal(client.option(OPT_INFO, request)[-1][0], REP_ACK, "reply to INFO")
            elif what == 2:
                client.send_option(OPT_GO, b"half", length=40)
            elif what == 3:
                client.send_option(OPT_LIST, magic=1)
                client.expect_closed()
            elif what == 4:
                check_equal(client.option(OPT_STARTTLS)[-1][0], REP_ACK, "reply to STARTTLS")
            elif what == 5:
                client.option(OPT_STARTTLS)
                client.send(b"\x16\x03\x01\x00\x05hello and goodbye")
                client.expect_closed()


def nbdsh(visit, encrypted=False):
    data = f"random.Random({visit.rng.randrange(1 << 32)}).randbytes({REGION // 2})"
    uri = visit.uri("files", encrypted)
    begin = "h.set_uri_allow_local_file(True)\n" if encrypted else ""
    visit.run("env", "PATH=/usr/bin:/bin", "nbdsh", "-c",
              f"import random\n{begin}h.connect_uri({uri!r})\ndata = {data}\n"
              f"for at in range(0, len(data), 65536):\n"
              f"    h.aio_pwrite(nbd.Buffer.from_bytearray(data[at:at + 65536]),"
              f" {visit.offset} + at)\n"
              f"while h.aio_in_flight(): h.poll(-1)\nh.flush()\n"
              f"assert h.pread(len(data), {visit.offset}) == data\nh.shutdown()")


def nbdsh_tls(visit):
    nbdsh(visit, encrypted=True)


def qemu_io(visit, encrypted=False):
    at, pattern = visit.offset, visit.rng.randrange(1, 256)
    script = [f"aio_write -P {pattern} {at + part * 65536} 64k" for part in range(8)]
    script += ["aio_flush", "flush", f"read -P {pattern} {at} 512k", f"write -z {at + 4096} 64k",
               f"read -P 0 {at + 4096} 64k", f"read -P {pattern} {at + 69632} 64k"]
    words = [word for command in script for word in ("-c", command)]
    if not encrypted:
        visit.run("qemu-io", "-f", "raw", *words, visit.uri("files"))
        return
    out = visit.run("qemu-io", "--object",
                    f"tls-creds-x509,id=c,endpoint=client,dir={visit.soak.trusting}",
                    "--image-opts", f"driver=nbd,server.type=unix,server.path={visit.server.path},"
                    "export=files,tls-creds=c,tls-hostname=localhost", *words)
    check("fail" not in out.lower(), out)


def qemu_io_tls(visit):
    qemu_io(visit, encrypted=True)


def fio(visit):
    visit.run("fio", f"--name=soak{visit.number}", "--ioengine=nbd", f"--uri={visit.uri('files')}",
              f"--offset={visit.offset}", f"--size={REGION}", "--rw=randwrite", "--bsrange=4k-64k",
              "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
              f"--randseed={visit.rng.randrange(1 << 30)}")


def bench(visit):
    told = json.loads(visit.run(visit.soak.test.roost, "bench", visit.uri("scratch"), "--writes",
                                30, "--seconds", 0.5, "--warm-up", 0, "--connections", 2,
                                "--json"))
    check(sum(told[kind]["requests"] for kind in ("reads", "writes") if kind in told) > 0,
          f"the bench did nothing: {told}")


def fetch(visit, uri=None, *options):
    uri = uri or visit.uri("golden", encrypted=visit.rng.random() < 0.3)
    back = visit.path("fetched")
    visit.run(visit.soak.test.roost, "copy", uri, back, "--progress", "none", *options)
    check(same_contents(back, visit.soak.golden_path), "what was fetched is wrong")


def send(visit, uri=None):
    visit.run(visit.soak.test.roost, "copy", visit.soak.golden_path,
              uri or visit.uri(f"send{visit.number}", encrypted=visit.rng.random() < 0.3),
              "--verify", "--progress", "none")


def fetch_over_bad_lines(visit):
    fetch(visit, f"nbd+unix:///golden?socket={visit.soak.proxy_path}", "--request-size", "64K")


def send_over_bad_lines(visit):
    send(visit, f"nbd+unix:///send{visit.number}?socket={visit.soak.proxy_path}")


def nbdcopy(visit):
    back = visit.path("nbdcopy")
    visit.run("nbdcopy", "--connections=2", visit.uri("golden"), back)
    check(same_contents(back, visit.soak.golden_path), "what nbdcopy fetched is wrong")


def killed(visit):
    """A client that is killed while it is busy."""
    uri, roost = visit.uri("scratch", encrypted=visit.rng.random() < 0.3), visit.soak.test.roost
    process = visit.start(visit.rng.choice((
        [roost, "bench", uri, "--writes", "50", "--seconds", "60", "--connections", "3"],
        [roost, "bench", uri, "--size", "1M", "--seconds", "60", "--depth", "64"],
        [need_program("nbdcopy"), "--requests=64", uri, "null:"])))
    try:
        visit.pause(1.0)
    finally:
        process.kill()
        process.communicate()


def passing_exports(visit):
    """Its export comes, is used, hidden and removed, while it has requests in flight."""
    tell, rng, name = visit.tell, visit.rng, f"passing{visit.number}"
    tell("add", name, "mem:8M")
    with visit.connect(name) as busy, visit.connect(name) as idle:
        data = rng.randbytes(256 * KIB)
        for number in range(32):
            busy.write(number * 256 * KIB, data)
        check(idle.read(5 * MIB, 256 * KIB) == data, "one client does not see what another wrote")
        if rng.random() < 0.5:
            tell("hide", name)
            with Client(visit.uri(name), negotiate=False) as late:
                late.greet()
                text = name.encode()
                replies = late.option(OPT_GO, struct.pack(">I", len(text)) + text + bytes(2))
                check(replies[-1][0] != REP_ACK, "a hidden export takes clients")
            check(busy.read(0, 256 * KIB) == data, "a hidden export forgets its clients")
        for number in range(32):
            busy.request(CMD_READ, number * 256 * KIB, 256 * KIB)
        reading = threading.Thread(target=busy.expect_closed) if rng.random() < 0.5 else None
        if reading:
            reading.start()
        tell("remove", name)
        if reading:
            reading.join(STUCK_S)
            check(not reading.is_alive(), "a client of a removed export is not disconnected")
        idle.expect_closed()


KINDS = ((verifying, 4), (over_a_relay, 2), (slow_reader, 2), (vanishing, 2), (negotiating, 3),
         (nbdsh, 1), (nbdsh_tls, 1), (qemu_io, 1), (qemu_io_tls, 1), (fio, 2), (bench, 2),
         (fetch, 2), (send, 2), (fetch_over_bad_lines, 1), (send_over_bad_lines, 1), (nbdcopy, 1),
         (killed, 2), (passing_exports, 2))


class Resident:
    """A process that is one client after the other, all of one kind. (Threads of one Python would
    keep each other from answering in time.)"""

    def __init__(self, soak, number, kind):
        self.soak, self.number, self.kind = soak, number, kind
        forking = multiprocessing.get_context("fork")
        self.pipe, theirs = forking.Pipe()
        self.process = forking.Process(target=self.live, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        soak.test.defer(self.end)

    def live(self, pipe):
        die_with_parent()
        harness.PATIENCE_S = 10 * STUCK_S  # the main process knows when it is too long

        def tell(*words):
            pipe.send(words)
            answer = pipe.recv()
            if isinstance(answer, Failure):
                raise answer
            return answer

        visits = 0
        while True:
            pipe.recv()
            problem = None
            while not self.soak.pausing.is_set():
                rng = random.Random(f"{SEED} {self.number} {visits}")
                try:
                    self.kind(Visit(self.soak, self.number, rng, tell))
                except Exception as error:  # noqa: BLE001: told by the main process
                    problem = f"{self.kind.__name__}: {type(error).__name__}: {error}"
                    self.soak.pausing.set()
                visits += 1
            pipe.send((visits, problem))

    def accompany(self):
        """A phase, seen from the main process."""
        self.visits, self.problem = 0, "is stuck"
        self.pipe.send("go")
        while True:
            said = self.pipe.recv()
            if isinstance(said[0], int):
                self.visits, self.problem = said
                return
            try:
                self.pipe.send(self.soak.server.tell(*said))
            except Failure as error:
                self.pipe.send(error)

    def end(self):
        self.process.kill()
        self.process.join()


# --- the whole -----------------------------------------------------------------------------------


class Soak:
    def __init__(self, test, kinds):
        if not os.path.exists(os.path.join(test.tools, "soak_server")):
            raise Missing("soak_server was not built")
        for program in ("nbdsh", "qemu-io", "fio", "nbdcopy", "certtool"):
            need_program(program)
        self.test = test
        self.kinds = [kind for kind, count in kinds for _ in range(count)]
        self.pausing = multiprocessing.get_context("fork").Event()
        self.counts = collections.Counter()
        self.models = [bytearray(REGION) for _ in self.kinds]
        authority = tls.Authority(test)
        self.trusting = authority.trust_in(test.path("trusting"))
        disks = {"files": len(self.kinds) * REGION, "behind": len(self.kinds) * REGION}
        for number, kind in enumerate(self.kinds):
            if kind in (send, send_over_bad_lines):
                disks[f"send{number}"] = GOLDEN
        for name, size in disks.items():
            sparse_file(test.path(name), size)
        self.server = Server(test, authority.server(test),
                             [f"{name}={test.path(name)}" for name in disks] +
                             [f"golden=mem:{GOLDEN}", "scratch=mem:16M"])
        self.golden_path = test.path("golden")
        pattern_file(self.golden_path, GOLDEN)
        with open(self.golden_path, "rb") as file:
            self.golden = file.read()
        clients.run("nbdcopy", self.golden_path, self.server.uri("golden"))
        clients.run("nbdcopy", self.golden_path, self.server.uri("scratch"))
        clients.run("nbdinfo", self.server.uri("scratch", "tcp", self.trusting))
        self.server.tell("relay", "relay", self.server.uri("behind"))
        self.proxy_path = test.path("p")
        # 0.3 of a hundred requests is one connection of each copy, or so.
        test.serve(f"unix:{self.server.path}", "--drop", "0.01", "--truncate", "0.005", "--delay",
                   "0:2", "--seed", SEED, listen=f"unix:{self.proxy_path}", command="proxy",
                   loop="any")
        self.residents = [Resident(self, *one) for one in enumerate(self.kinds)]
        self.pulse = Pulse()  # after the residents: a process with threads should not fork
        self.rest = None
        self.rest = self.state_of_rest()

    def state_of_rest(self):
        """Waits until nothing is left of the clients, once it is known how that looks."""
        for _ in range(int(PATIENCE_S / 0.05)):
            told = self.server.tell("statistics")
            check_equal(told["problems"], [], "what the server's own clients say")
            state = {"connections": told["connections"],
                     "coroutines": self.server.coroutines(),
                     "descriptors": collections.Counter(self.server.descriptors())}
            if self.rest is None and state["connections"] == IOTHREADS:  # the relay's
                return state
            if state == self.rest:
                return state
            time.sleep(0.05)
        check(self.rest, f"the server does not come to rest: {state}")
        for what, seen in state.items():
            if seen == self.rest[what]:
                continue
            if what == "connections":
                raise Failure(f"{seen} connections are left of clients that have gone, "
                              f"{self.rest[what]} were there before")
            more = {key: seen[key] - self.rest[what][key] for key in seen | self.rest[what]
                    if seen[key] != self.rest[what][key]}
            chains = "".join(one["text"] for one in self.server.tell("census")
                             if one["name"] in more)
            raise Failure(f"{what} are left of clients that have gone: {more}\n{chains}")
        return state

    def busy_phase(self, seconds):
        """All clients at once; ends with the state of rest. Returns the most that was seen."""
        self.pausing.clear()
        self.server.tell("load", "on")
        threads = [threading.Thread(target=resident.accompany, daemon=True)
                   for resident in self.residents]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        most = collections.Counter()
        unanswered = 0
        while time.monotonic() < end and not self.pausing.wait(min(1.0, seconds / 4)):
            began = time.monotonic()
            census = self.server.tell("census")
            # It waits for a second for each context to answer.
            unanswered = unanswered + 1 if time.monotonic() - began > 1 else 0
            check(unanswered < 3 * SLOW_S, "an I/O thread of the server does not answer")
            requests = [one for one in census if one["name"] == "nbd request"]
            for one in requests:
                check(one["age_s"] < STUCK_S + 2 * self.pulse.longest,
                      f"a request is stuck: {one['text']}")
            began = time.monotonic()
            told = self.server.tell("statistics")
            late = time.monotonic() - began
            check(late < SLOW_S or self.pulse.longest > late / 2,
                  f"the server's main loop took {late:g} s to answer")
            seen = {"connections": told["connections"],
                    "coroutines": len(census), "descriptors": len(self.server.descriptors()),
                    "MiB": told["allocated"] // MIB, "answer in ms": round(late * 1000),
                    "unanswered": unanswered}
            for key, value in seen.items():
                most[key] = max(most[key], value)
        self.pausing.set()
        for _ in range(2 * STUCK_S):
            for thread in threads:
                thread.join(1 / len(threads))
        problems = [f"{resident.kind.__name__} {resident.problem}" for resident in self.residents
                    if resident.problem]
        check(not problems, "\n".join(problems) + "\nThe machine stood still for "
              f"{self.pulse.longest:.1f} s at most.\n" + self.server.log()[-2000:])
        self.counts.clear()
        for resident in self.residents:
            self.counts[resident.kind.__name__] += resident.visits
        self.server.tell("load", "off")
        self.state_of_rest()
        return most


def soak(test, seconds, kinds, phases=None, sabotage=None):
    """`sabotage`: what is lost after the first third."""
    everything = Soak(test, kinds)
    server = everything.server
    phases = phases or max(3, round(seconds / 60))
    memory = [server.memory()]
    for phase in range(phases):
        most = everything.busy_phase(seconds / phases)
        memory.append(server.memory())
        allocated = server.tell("statistics")["allocated"]
        print(f"phase {phase + 1}: {memory[-1] / MIB:.1f} MiB at rest, {allocated / MIB:.1f} "
              f"allocated; at most {dict(most)}", flush=True)
        if sabotage and phase == phases // 3:
            server.tell("leak", sabotage)
    # The first third fills what is kept for later.
    warm = memory[phases // 3]
    growth = memory[-1] - warm
    check(growth < (GROWTH_WARM if seconds >= WARM_S else GROWTH_COLD),
          f"{growth / MIB:.1f} MiB more than after the first third: "
          f"{[round(one / MIB, 1) for one in memory]} MiB")
    told = server.tell("statistics")
    kind_names = {kind.__name__ for kind, _ in kinds}
    check(all(everything.counts[name] for name in kind_names),
          f"not all have come: {dict(everything.counts)}")
    print(f"visits {dict(everything.counts)}; {told['requests']} requests and {told['moves']} "
          f"moves in the process; grew by {growth / KIB:.0f} KiB; at rest "
          f"{len(everything.rest['descriptors'])} kinds of descriptors, "
          f"{sum(everything.rest['coroutines'].values())} coroutines; the machine stood still for "
          f"{everything.pulse.longest:.1f} s at most")
    server.quit()


@case(timeout_s=300, serial=True)
def soak_of_all_kinds_of_clients(test):
    soak(test, SOAK_S, KINDS)


@case(timeout_s=300)
def soak_notices_what_is_left(test):
    """Or it would prove nothing."""
    for what, words in ((None, ""), ("descriptor", "descriptors are left"),
                        ("coroutine", "coroutines are left"), ("memory", "MiB more than")):
        inner = type(test)(test.roost, test.tools, test.loop, test.transport)
        try:
            soak(inner, 1.5, ((verifying, 2), (passing_exports, 1)), phases=3, sabotage=what)
        except Failure as noticed:
            check(what and words in str(noticed), f"a lost {what} is noticed so: {noticed}")
        else:
            check(what is None, f"nobody notices a lost {what}")
        finally:
            inner.close()
