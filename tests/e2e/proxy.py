# SPDX-License-Identifier: MIT
"""Stock clients and our own behind `roost proxy`: what only comes late or in another order does no
harm, what is wrong is noticed."""

import json
import os
import signal

from harness import (MIB, TRANSPORTS, Daemon, case, check, check_equal, pattern_file, run,
                     same_contents, sparse_file)

DISK_SIZE = 8 * MIB


class Proxy(Daemon):
    """One `roost proxy` in front of `server`."""

    def __init__(self, test, server, *arguments):
        listen = f"unix:{test.path('p')}" if test.transport == "unix" else "tcp:127.0.0.1:0"
        super().__init__(test, server.uri, *arguments, "--json", listen=listen, loop="any",
                         command="proxy")

    def report(self):
        """Ends it; what it says was done."""
        self.process.send_signal(signal.SIGTERM)
        self.wait()
        self.kill()
        return json.loads(self.out.decode().splitlines()[-1])


@case(transports=TRANSPORTS, timeout_s=120)
def late_and_reordered_replies_do_no_harm(test):
    image, disk, back = test.path("image"), test.path("disk.img"), test.path("back")
    pattern_file(image, DISK_SIZE)
    sparse_file(disk, DISK_SIZE)
    sparse_file(back, DISK_SIZE)
    with test.serve(disk) as server:
        proxy = Proxy(test, server, "--delay", "0.1:2", "--reorder", "0.3", "--seed", 3)
        run("nbdcopy", "--requests=16", "--connections=2", "--request-size=65536", "--flush",
            image, proxy.uri)
        check(same_contents(image, disk), "what nbdcopy sent is not what is on the disk")
        run("nbdcopy", "--requests=16", "--request-size=65536", proxy.uri, back)
        check(same_contents(image, back), "what nbdcopy fetched is not what is on the disk")
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, proxy.uri)
        copied = test.roost_run("copy", proxy.uri, test.path("copy"), "--verify")
        check_equal(copied.returncode, 0, f"roost copy ({copied.stderr})")
        seen = proxy.report()
        check_equal(seen["connections_not_followed"], 0, "connections that were not followed")
        check(seen["fault_count"] > 20, f"{seen['fault_count']} replies were overtaken")
        check(all("reorder" in fault["what"] for fault in seen["faults"]), "other faults")


@case(timeout_s=120)
def what_is_wrong_is_noticed(test):
    pattern_file(test.path("disk.img"), DISK_SIZE)
    with test.serve(test.path("disk.img")) as server:
        for fault in (("--truncate", 1), ("--corrupt", 1, "--corrupt-field", "magic"),
                      ("--corrupt", 1, "--corrupt-field", "cookie"), ("--kill-at", 2),
                      ("--drop", 1), ("--drop-after", 100_000)):
            proxy = Proxy(test, server, *fault)
            for command in (("nbdcopy", proxy.uri, "null:"),
                            ("qemu-img", "convert", "-f", "raw", proxy.uri, test.path("out"))):
                done = run(*command, check_exit=False, timeout=20)
                check(done.returncode != 0, f"{command[0]} notices nothing of {fault}")
            copied = test.roost_run("copy", proxy.uri, test.path("out"), "--connections", 1,
                                    "--reconnect", 0)
            check_equal(copied.returncode, 1, f"exit code of roost copy behind {fault}")
            check(proxy.report()["fault_count"] >= 3, f"{fault} was not done")
        run("nbdcopy", server.uri, "null:")


@case()
def a_seed_brings_the_same_faults(test):
    with test.serve(f"mem:{DISK_SIZE}") as server:
        def faults(seed):
            proxy = Proxy(test, server, "--truncate", "0.05", "--seed", seed)
            for _ in range(5):
                done = run("nbdcopy", "--synchronous", "--request-size=4096", "--connections=1",
                           "--requests=1", proxy.uri, "null:", check_exit=False, timeout=20)
                check(done.returncode != 0, "nbdcopy notices nothing")
            return proxy.report()["faults"]

        first = faults(11)
        check_equal(len(first), 5, "faults")
        check_equal(faults(11), first, "faults with the same seed")
        check(faults(12) != first, "another seed makes no difference")


@case()
def a_killed_proxy_is_gone(test):
    pattern_file(test.path("disk.img"), DISK_SIZE)
    with test.serve(test.path("disk.img")) as server:
        proxy = Proxy(test, server, "--kill-at", 3, "--exit", "--verbose")
        done = run("nbdcopy", "--request-size=65536", proxy.uri, "null:", check_exit=False,
                   timeout=20)
        check(done.returncode != 0, "nbdcopy notices nothing")
        check_equal(proxy.wait(), 1, "exit code of the proxy")
        check("request 3: kill" in proxy.stderr(), proxy.stderr())
        check(os.path.exists(test.path("p")), "it has tidied up, unlike one that crashed")
