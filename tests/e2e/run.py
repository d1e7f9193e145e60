#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs one end-to-end case against a real daemon.

  run.py --roost PATH CASE [--event-loop LOOP] [--transport TRANSPORT]
  run.py --list      every run of every case, for CMake: name;case;loop;transport;timeout;labels
"""

import argparse
import os
import sys
import traceback

import harness

# Importing a topic registers its cases.
import chunks  # noqa: F401
import clients  # noqa: F401
import crash  # noqa: F401
import direct  # noqa: F401
import durability  # noqa: F401
import errors  # noqa: F401
import foreign  # noqa: F401
import hostile  # noqa: F401
import lifecycle  # noqa: F401
import protocol  # noqa: F401
import proxy  # noqa: F401
import relays  # noqa: F401
import scarcity  # noqa: F401
import soak  # noqa: F401
import tls  # noqa: F401
import tls_client  # noqa: F401
import tracing  # noqa: F401

SKIPPED = 77  # ctest's SKIP_RETURN_CODE


def list_runs():
    for case in harness.CASES.values():
        for loop in case.loops:
            for transport in case.transports:
                name = case.name
                if loop != "any":
                    name += f".{loop}"
                if len(case.transports) > 1:
                    name += f".{transport}"
                labels = "e2e" + (",e2e-sanitized" if case.sanitized else "")
                print(name, case.name, loop, transport, case.timeout_s, labels,
                      int(case.serial), sep=";")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--roost", default="roost")
    parser.add_argument("--tools", help="folder of the helper programs", default=".")
    parser.add_argument("--event-loop", default="any")
    parser.add_argument("--transport", default="unix")
    parser.add_argument("case", nargs="?")
    args = parser.parse_args()
    if args.list:
        list_runs()
        return 0
    if args.case not in harness.CASES:
        parser.error(f"no such case: {args.case}")
    if args.event_loop == "io_uring" and not harness.io_uring_allowed():
        print("skipped: io_uring is not allowed here")
        return SKIPPED

    test = harness.Test(args.roost, args.tools, args.event_loop, args.transport)
    try:
        harness.CASES[args.case].function(test)
    except harness.Skip as why:
        if isinstance(why, harness.Missing) and os.environ.get("ROOST_REQUIRE_PROOF") == "1":
            print(f"not to be skipped: {why}")
            return 1
        print(f"skipped: {why}")
        return SKIPPED
    except Exception as error:  # noqa: BLE001: everything is a failed test
        if isinstance(error, harness.Failure):
            for frame in traceback.extract_tb(error.__traceback__)[1:]:
                if not frame.filename.endswith("harness.py"):
                    print(f"{frame.filename}:{frame.lineno}: {frame.line}")
            print(error)
        else:
            traceback.print_exc()
        for daemon in test.daemons:
            daemon.kill()
            print(f"-- daemon: {daemon.describe()}")
        return 1
    finally:
        test.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
