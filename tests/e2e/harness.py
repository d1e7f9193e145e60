# SPDX-License-Identifier: MIT
"""What the end-to-end tests share: starting and ending `roost serve`, running stock clients,
registering cases, and checks that say what they saw."""

import ctypes
import fcntl
import hashlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.parse

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

EVENT_LOOPS = ("io_uring", "epoll")
TRANSPORTS = ("unix", "tcp")

# How long something that should happen at once may take on a busy machine or under a sanitizer.
PATIENCE_S = 20.0


class Skip(Exception):
    """This machine cannot run the case; the text says why."""


class Missing(Skip):
    """Something is not installed, or was not built. No reason to skip where nothing may be left out."""


class Failure(Exception):
    """What was seen is not what was promised."""


def check(condition, message):
    if not condition:
        raise Failure(message)


def shortened(value):
    text = repr(value)
    return text if len(text) < 500 else f"{text[:200]}... ({len(value)} long)"


def check_equal(seen, wanted, what):
    if seen != wanted:
        raise Failure(f"{what}: {shortened(seen)} instead of {shortened(wanted)}")


# --- cases -------------------------------------------------------------------------------------


class Case:
    def __init__(self, function, loops, transports, timeout_s, sanitized, serial):
        self.name = function.__name__
        self.function = function
        self.loops = loops
        self.transports = transports
        self.timeout_s = timeout_s
        self.sanitized = sanitized
        self.serial = serial


CASES = {}


def case(loops=("any",), transports=("unix",), timeout_s=60, sanitized=False, serial=False):
    """Registers a test function, run once for each event loop and transport.

    The loop "any" leaves the choice to the daemon. `sanitized` cases also run in the sanitizer
    builds; `serial` ones do not share the machine with other tests."""

    def register(function):
        if function.__name__ in CASES:
            raise RuntimeError(f"two cases are called {function.__name__}")
        CASES[function.__name__] = Case(function, loops, transports, timeout_s, sanitized, serial)
        return function

    return register


# --- the machine -------------------------------------------------------------------------------


_libc = ctypes.CDLL(None, use_errno=True)


def io_uring_allowed():
    """Whether this kernel lets us make a ring (containers often do not)."""
    params = ctypes.create_string_buffer(120)  # struct io_uring_params
    fd = _libc.syscall(ctypes.c_long(425), ctypes.c_uint(1), params)
    if fd < 0:
        return False
    os.close(fd)
    return True


def die_with_parent():
    """For a child, before exec: a test that is killed does not leave its processes behind."""
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def private_mounts():
    """From here on, what this process and its children mount is seen by them alone, and gone when
    they are. Needs root, or a kernel that allows user namespaces."""
    new_namespace, new_user = 0x00020000, 0x10000000
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(new_namespace) != 0:
        if _libc.unshare(new_namespace | new_user) != 0:
            raise Skip("mounting is not allowed here")
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"),
                           ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    recursive, private = 0x4000, 1 << 18
    if _libc.mount(b"none", b"/", None, recursive | private, None) != 0:
        raise Skip("mounts cannot be made private here")


def mount_tmpfs(path, size):
    private_mounts()
    os.mkdir(path)
    if _libc.mount(b"tmpfs", path.encode(), b"tmpfs", 0, f"size={size}".encode()) != 0:
        raise Skip(f"no tmpfs: {os.strerror(ctypes.get_errno())}")


def need_program(name):
    # mke2fs and friends live where only root's PATH looks.
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    found = shutil.which(name, path=path)
    if found is None:
        raise Missing(f"{name} is not installed")
    return found


def wait_until(condition, what, timeout_s=PATIENCE_S):
    """Waits for something outside of this process, which cannot tell us when it happens."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise Failure(f"not seen within {timeout_s:g} s: {what}")
        time.sleep(0.01)


def run(*command, check_exit=True, **kwargs):
    """Runs a client to its end and returns it, with what it printed."""
    command = [str(part) for part in command]
    command[0] = need_program(command[0])
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, errors="replace", **kwargs)
    if check_exit and done.returncode != 0:
        raise Failure(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def same_contents(path, other):
    with open(path, "rb") as left, open(other, "rb") as right:
        while True:
            a, b = left.read(MIB), right.read(MIB)
            if a != b:
                return False
            if not a:
                return True


def pattern_file(path, size, seed=1):
    """A file without zeroes, in which every 4 KiB block differs from every other."""
    with open(path, "wb") as file:
        for block in range(0, size, 4096):
            unit = hashlib.sha256(f"{seed}:{block}".encode()).digest().replace(b"\0", b"\1")
            file.write((unit * 128)[: min(4096, size - block)])


def sparse_file(path, size):
    with open(path, "wb") as file:
        file.truncate(size)


# --- the daemon --------------------------------------------------------------------------------


class Daemon:
    """One `roost serve`. Use as a context manager: leaving it ends the process, by its pid.

    `sockets`, which listen already, are passed to it instead of addresses. `quarantine_mib` bounds
    what AddressSanitizer keeps of freed memory, for cases that look at how much the daemon takes.

    After a `with` block that did not end the daemon itself, it must still be alive, end on
    SIGTERM with exit code 0, and must not have left a sanitizer's report."""

    def __init__(self, test, *arguments, listen=None, loop=None, ready=True, cwd=None,
                 bare=False, sockets=(), command="serve", quarantine_mib=None):
        self.test = test
        self.log_path = os.path.join(test.folder, f"stderr.{len(test.daemons)}")
        loop = loop or test.loop
        if listen is None:
            listen = [] if sockets else [test.address()]
        elif isinstance(listen, str):
            listen = [listen]

        def begin():
            die_with_parent()
            if quarantine_mib:
                os.environ["ASAN_OPTIONS"] = ":".join(filter(None, (
                    os.environ.get("ASAN_OPTIONS"), f"quarantine_size_mb={quarantine_mib}")))
            if sockets:  # handed over as a service manager does
                # First out of the way of each other.
                copies = [fcntl.fcntl(one, fcntl.F_DUPFD, 100) for one in sockets]
                for number, one in enumerate(copies):
                    os.dup2(one, 3 + number)
                os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(sockets)))

        if bare:  # just the program
            command = [test.roost]
        else:
            command = [test.roost, command, *map(str, arguments)]
            if loop != "any":
                command += ["--event-loop", loop]
            for address in listen:
                command += ["--listen", address]
        self.command = command
        self.log = open(self.log_path, "wb")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=self.log, cwd=cwd or test.folder,
                                        preexec_fn=begin,
                                        pass_fds=range(3, 3 + len(sockets)))
        self.pid = self.process.pid
        self.out = b""
        self.uris = []
        test.daemons.append(self)
        if ready:
            self.wait_for_uris(len(listen) + len(sockets) if not bare else 1)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None and self.process.returncode is None:
            check(self.alive(), f"the daemon has ended by itself: {self.describe()}")
            self.terminate()
        self.kill()
        report = re.search(r"(ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|runtime error:).*",
                           self.stderr())
        if report and kind is None:
            raise Failure(f"a sanitizer complains:\n{self.stderr()}")

    def wait_for_uris(self, count, timeout_s=PATIENCE_S):
        deadline = time.monotonic() + timeout_s
        while len(self.uris) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Failure(f"no URI within {timeout_s:g} s: {self.describe()}")
            readable, _, _ = select.select([self.process.stdout], [], [], left)
            if not readable:
                continue
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                self.process.wait()
                raise Failure(f"ended before it printed a URI: {self.describe()}")
            self.out += chunk
            complete = self.out[: self.out.rfind(b"\n") + 1].decode()
            self.uris = re.findall(r"nbds?(?:\+unix)?://[^\s\"]+", complete)

    @property
    def uri(self):
        return self.uris[0]

    def connect(self, export=None, uri=None):
        """A raw socket to the daemon; says nothing yet."""
        return connect_uri(uri or self.uri)

    def alive(self):
        return self.process.poll() is None

    def stderr(self):
        with open(self.log_path, "rb") as log:
            return log.read().decode(errors="replace")

    def describe(self):
        return (f"{' '.join(self.command)}\nexit code {self.process.poll()}\n"
                f"stdout:\n{self.out.decode(errors='replace')}\nstderr:\n{self.stderr()}")

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, timeout_s=PATIENCE_S):
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise Failure(f"still running after {timeout_s:g} s: {self.describe()}") from None

    def terminate(self):
        self.signal(signal.SIGTERM)
        code = self.wait()
        check_equal(code, 0, f"exit code after SIGTERM ({self.describe()})")

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if not self.process.stdout.closed:
            self.out += self.process.stdout.read() or b""
            self.process.stdout.close()
        self.log.close()

    def rss_bytes(self):
        with open(f"/proc/{self.pid}/status") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * KIB
        raise Failure("no VmRSS")

    def cpu_seconds(self):
        """CPU time of all threads, counted in nanoseconds by the scheduler."""
        total = 0
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            with open(f"/proc/{self.pid}/task/{thread}/schedstat") as stat:
                total += int(stat.read().split()[0])
        return total / 1e9


def connect_uri(uri):
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme.endswith("+unix"):
        path = urllib.parse.parse_qs(parts.query)["socket"][0]
        if path.startswith("@"):  # an abstract name
            path = "\0" + path[1:]
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(PATIENCE_S)
        peer.connect(path)
    else:
        peer = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S)
        # A small message must not wait for the acknowledgement of the one before.
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


# --- one run of one case -----------------------------------------------------------------------


class Test:
    """What a case is given: where the program is, which event loop and transport to use, and a
    folder of its own that goes away afterwards."""

    def __init__(self, roost, tools, loop, transport):
        self.roost = os.path.abspath(roost)
        self.tools = os.path.abspath(tools)
        self.loop = loop
        self.transport = transport
        self.daemons = []
        self.cleanups = []
        # Short: the path of a unix socket has 108 bytes.
        self.folder = tempfile.mkdtemp(prefix="roost-e2e.", dir="/tmp")

    def path(self, name):
        return os.path.join(self.folder, name)

    def address(self):
        return f"unix:{self.path('s')}" if self.transport == "unix" else "tcp:127.0.0.1:0"

    def serve(self, *arguments, **kwargs):
        return Daemon(self, *arguments, **kwargs)

    def roost_run(self, *arguments, timeout=PATIENCE_S, cwd=None):
        """A call of the program that is expected to end by itself."""
        try:
            return subprocess.run([self.roost, *map(str, arguments)], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  timeout=timeout, cwd=cwd or self.folder)
        except subprocess.TimeoutExpired as late:
            raise Failure(f"roost {' '.join(map(str, arguments))} is still running after "
                          f"{timeout:g} s; {late.stdout} {late.stderr}") from None

    def defer(self, function):
        """Runs `function` when the case is over, whatever happened; last in, first out."""
        self.cleanups.append(function)

    def close(self):
        for daemon in self.daemons:
            daemon.kill()
        for function in reversed(self.cleanups):
            function()
        shutil.rmtree(self.folder, ignore_errors=True)
