#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What roost-gdb.py says about a program whose coroutines are known.

  check.py --gdb GDB --script SCRIPT --program PROGRAM
           --strip STRIP --objcopy OBJCOPY CASE

  core      gdb runs the program until it aborts and writes a core file; a second gdb reads that
  live      gdb attaches to the running program
  empty     nothing is alive; and before main()
  many      more than one chunk of control blocks
  stripped  the symbols are gone
  foreign   not a program of Roost, and no process

Exits with 77 where gdb must not trace processes or has no Python."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "inhabitants.cc")
REFUSED = ("ptrace: ", "Could not trace the inferior", "Could not attach to process")


def fail(message):
    sys.exit(f"check.py: {message}")


def skip(message):
    print(f"skipped: {message}")
    sys.exit(77)


class Gdb:
    def __init__(self, options):
        self.options = options
        answer = self.run(["-ex", "python print('there is ' + 'Python')"])
        if "there is Python" not in answer:
            if os.environ.get("ROOST_REQUIRE_PROOF") == "1":
                fail("this gdb has no Python")
            skip("this gdb has no Python")

    def run(self, arguments):
        # -nx: no user's settings. No randomization to disable, which containers forbid, no shell, and
        # no answer from a debuginfod.
        command = [self.options.gdb, "-nx", "-batch", "-iex", "set debuginfod enabled off",
                   "-iex", "set disable-randomization off", "-iex", "set startup-with-shell off",
                   *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=100)
        print(f"---- {' '.join(command)}\n{done.stdout}", flush=True)
        if any(reason in done.stdout for reason in REFUSED):
            skip("gdb is not allowed to trace processes")
        if "Traceback" in done.stdout or "Python Exception" in done.stdout:
            fail("the script failed")
        return done.stdout

    def ask(self, target, commands):
        """What each of the commands answers."""
        arguments = ["-ex", f"source {self.options.script}"]
        for number, command in enumerate(commands):
            arguments += ["-ex", f"echo <<{number}\\n", "-ex", command]
        output = self.run([*target, *arguments, "-ex", "echo <<end\\n"])
        # gdb may have something to say about the threads when it is done.
        answers = re.split(r"^<<(?:\d+|end)$\n?", output, flags=re.MULTILINE)
        if len(answers) != len(commands) + 2:
            fail("gdb did not come to the end")
        return [normal(answer) for answer in answers[1:-1]]

    def make_core(self, mode, core):
        """Also returns what the program printed."""
        output = self.run(["-ex", "run", "-ex", f"generate-core-file {core}", "--args",
                           self.options.program, mode])
        if "SIGABRT" not in output:
            fail("the program did not abort")
        return output


def normal(text):
    text = re.sub(r"0x[0-9a-f]+", "ADDRESS", text)
    text = re.sub(r", (at least )?\d+ ms", r", \1TIME", text)
    text = re.sub(r"\(LWP \d+\)( \"[^\"]*\")?", "(LWP)", text)
    text = re.sub(r"(timer\.cc):\d+", r"\1:LINE", text)
    text = re.sub(r"(io_uring|epoll), inbox", "BACK_END, inbox", text)
    return text.replace("(anonymous namespace)::", "")


def expect(what, answer, wanted):
    if answer.strip() != wanted.strip():
        fail(f"{what} answers\n{answer}\n-- and not\n{wanted}")


def lines():
    """The lines of inhabitants.cc by what is marked or created there."""
    places = {}
    with open(SOURCE, encoding="utf-8") as source:
        for number, line in enumerate(source, start=1):
            place = f"gdb/inhabitants.cc:{number}"
            if mark := re.search(r"// at: (\w+)", line):
                places[f"at {mark[1]}"] = place
            if made := re.search(r"(?:spawn|create)\(.*\"(\w+)\"\)", line):
                places[f"new {made[1]}"] = place
    return places


def by_name(paragraphs):
    """Paragraphs by the coroutine's name: their order is that of addresses."""
    found = {}
    for paragraph in re.split(r"^(?=coroutine ')", paragraphs, flags=re.MULTILINE)[1:]:
        name = re.match(r"coroutine '(\w+)'", paragraph)[1]
        found[name] = re.sub(r"^\d+ coroutines\n?|^end of census[\s\S]*", "", paragraph,
                             flags=re.MULTILINE)
    return found


def check_inhabitants(ask, exact_time):
    at = lines()
    since = "TIME" if exact_time else "at least TIME"
    home = {"deep": ("worker", f"idle, {since}"),
            "holder": ("worker", f"waiting for the answer, {since}"),
            "contender": ("worker", f"waiting for the ledger, {since}"),
            "sleeper": ("worker", f"waiting for a timer, {since}"),
            "notified": ("parked", "scheduled for an event"),
            "moved": ("parked", "scheduled"),
            "queued": ("parked", "scheduled"),
            "fresh": ("main loop", "idle"),
            "listed": ("main loop", "about to be woken"),
            "busy": ("main loop", "running")}
    chain = {"deep": ["innermost", "middle", "outermost"], "holder": ["hold"],
             "contender": ["contend"], "notified": ["event"],
             "moved": ["innermost", "middle", "outermost"], "listed": ["innermost"]}
    places = {name: [at[f"at {mark}"] for mark in marks] for name, marks in chain.items()}
    # The two functions of the library that are on the way.
    places["sleeper"] = ["aio/timer.cc:LINE", "aio/timer.cc:LINE", at["at sleep"]]

    titles, wanted = {}, {}
    for name, (context, doing) in home.items():
        titles[name] = f"coroutine '{name}' (ADDRESS) on {context}: {doing}"
        body = [titles[name]]
        if name == "busy":
            body.append("  running on thread 1 (LWP)")
        if name == "holder":
            body.append("  holds 1 coroutine locks")
        body.append(f"  created at {at[f'new {name}']}")
        if name == "busy":
            body.append("  runs in    stop, which awaited last at nothing yet")
            body.append(f"             {at['at work']}")
        if name in ("fresh", "queued"):
            body.append(f"  has not run: {'outermost' if name == 'fresh' else 'nothing'}")
        for label, place in zip(["awaits at ", *[" " * 10] * 9], places.get(name, [])):
            body.append(f"  {label} {place}")
        wanted[name] = "\n".join(body) + "\n"

    value = 7 << 32 | 1 << 20 | 2 << 5 | 8 | 3
    listing, verbose, chosen, none, detail, address, nonsense, contexts, _, pointer, word = ask([
        "roost coroutines", "roost coroutines -v", "roost coroutines *e[ev]*",
        "roost coroutines no such", "roost coroutine deep", "roost coroutine ADDRESS_OF_DEEP",
        "roost coroutine 12", "roost contexts",
        "set language c++", "print (roost::Coroutine*)ADDRESS_OF_DEEP",
        f"python print(gdb.Value(({value}).to_bytes(8, 'little'), "
        "gdb.lookup_type('roost::CoStateValue')).format_string())"])

    summaries = {name: title + (f", at {places[name][0]}" if name in places else "")
                 for name, title in titles.items()}
    # "busy" runs, and says nothing of its innermost task, which has not awaited anything.
    expect("roost coroutines", "\n".join(sorted(listing.strip().splitlines())),
           "\n".join(sorted([*summaries.values(), "10 coroutines"])))
    found = by_name(verbose)
    for name, paragraph in wanted.items():
        expect(f"roost coroutines -v about {name}", found.pop(name, "nothing"), paragraph)
    expect("roost coroutines -v about others", " ".join(found), "")
    expect("roost coroutines PATTERN", "\n".join(sorted(chosen.strip().splitlines())),
           "\n".join(sorted([summaries["deep"], summaries["sleeper"], "2 of 10 coroutines"])))
    expect("roost coroutines NO SUCH", none, "0 of 10 coroutines")

    expect("roost coroutine NAME", detail, f"""{titles['deep']}
  created at {at['new deep']}
  placed at  {at['new deep']}
  state word: generation 2, 0 queue entries or references outstanding
  awaits at  {places['deep'][0]} in innermost (frame ADDRESS)
             {places['deep'][1]} in middle (frame ADDRESS)
             {places['deep'][2]} in outermost (frame ADDRESS)""")
    expect("roost coroutine ADDRESS", address, detail)
    expect("roost coroutine 12", nonsense, "roost: there is no living coroutine at 12.")
    expect("roost contexts", contexts, """
worker (0, ADDRESS): asleep, thread 2 (LWP), BACK_END, inbox empty, 0 queued, 4 coroutines
main loop (1, ADDRESS): runs 'busy', thread 1 (LWP), BACK_END, inbox empty, 0 queued, 3 coroutines
parked (2, ADDRESS): polled by nobody, no thread, BACK_END, inbox 3 entries, 0 queued, 3 coroutines
3 contexts""")
    expect("print Coroutine*", pointer, "$1 = ADDRESS ('deep', idle)")
    expect("print CoStateValue", word, "scheduled (owned), context 1, generation 7, 2 entries")
    return wanted


def ask_with_address(gdb, target):
    """Finds the address of one first."""
    def ask(commands):
        listing = gdb.run([*target, "-ex", f"source {gdb.options.script}", "-ex", "roost coroutines"])
        found = re.search(r"coroutine 'deep' \((0x[0-9a-f]+)\)", listing)
        if not found:
            fail("there is no coroutine 'deep'")
        return gdb.ask(target, [c.replace("ADDRESS_OF_DEEP", found[1]) for c in commands])
    return ask


def check_core(gdb, folder):
    core = os.path.join(folder, "core")
    output = gdb.make_core("crash", core)
    target = [gdb.options.program, core]
    wanted = check_inhabitants(ask_with_address(gdb, target), exact_time=False)
    # The program's own census says the same of those that it lists.
    own = by_name(normal(output))
    expect("the program's census", " ".join(sorted(own)), "contender deep holder sleeper")
    for name, paragraph in own.items():
        expect(f"the program's census about {name}", paragraph,
               wanted[name].replace("at least ", ""))


def check_live(gdb, _):
    program = subprocess.Popen([gdb.options.program, "wait"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    try:
        for line in program.stdout:
            if line == "ready\n":
                break
        check_inhabitants(ask_with_address(gdb, ["-p", str(program.pid)]), exact_time=True)
        # It was not disturbed: it ends as if nobody had looked.
        program.stdin.close()
        if program.wait(timeout=30) != 0:
            fail(f"the program ended with {program.returncode}")
    finally:
        program.kill()
        program.wait()


def check_empty(gdb, folder):
    core = os.path.join(folder, "core")
    gdb.make_core("empty", core)
    listing, verbose, gone, contexts = gdb.ask(
        [gdb.options.program, core],
        ["roost coroutines", "roost coroutines -v", "roost coroutine gone", "roost contexts"])
    expect("roost coroutines", listing, "0 coroutines")
    expect("roost coroutines -v", verbose, "0 coroutines")
    expect("roost coroutine gone", gone,
           "roost: no living coroutine has the name gone, and it is no address.")
    expect("roost contexts", contexts, "main loop (0, ADDRESS): current, but not polled, "
           "thread 1 (LWP), BACK_END, inbox empty, 0 queued, 0 coroutines\n1 context")
    listing, contexts = gdb.ask(["-ex", "break main", "-ex", "run", gdb.options.program],
                                ["roost coroutines", "roost contexts"])
    expect("roost coroutines before main()", listing, "0 coroutines")
    expect("roost contexts before main()", contexts, "0 contexts")


def check_many(gdb, folder):
    core = os.path.join(folder, "core")
    gdb.make_core("many", core)
    listing, = gdb.ask([gdb.options.program, core], ["roost coroutines"])
    expect("roost coroutines", listing,
           "coroutine 'one of many' (ADDRESS) on main loop: idle\n" * 1000 + "1000 coroutines")


def check_stripped(gdb, folder):
    core = os.path.join(folder, "core")
    gdb.make_core("empty", core)
    stripped = os.path.join(folder, "stripped")
    shutil.copy(gdb.options.program, stripped)
    symbols = os.path.join(folder, "symbols.debug")
    subprocess.run([gdb.options.objcopy, "--only-keep-debug", stripped, symbols], check=True)
    subprocess.run([gdb.options.strip, stripped], check=True)
    for answer in gdb.ask([stripped, core],
                          ["roost coroutines", "roost coroutine gone", "roost contexts"]):
        if not answer.startswith("roost: there is no debug information about the"):
            fail(f"a stripped program makes it say\n{answer}")
    # As distributions do it: the symbols are in another file, which the program names.
    subprocess.run([gdb.options.objcopy, f"--add-gnu-debuglink={symbols}", stripped], check=True)
    listing, = gdb.ask([stripped, core], ["roost coroutines"])
    expect("roost coroutines with symbols from elsewhere", listing, "0 coroutines")


def check_foreign(gdb, _):
    nothing, = gdb.ask([], ["roost coroutines"])
    expect("roost coroutines without anything", nothing,
           "roost: there is neither a process nor a core file.")
    for answer in gdb.ask(["-ex", "starti", sys.executable], ["roost coroutines", "roost contexts"]):
        if not answer.startswith("roost: there is no debug information about the"):
            fail(f"another program makes it say\n{answer}")
    text, contexts = gdb.ask([], ["help roost", "help roost contexts"])
    for name in ("coroutines", "coroutine", "contexts"):
        if f"roost {name} " not in text:
            fail(f"help roost does not name {name}")
    if "Usage: roost contexts" not in contexts:
        fail("help roost contexts does not tell its usage")


def main():
    parser = argparse.ArgumentParser()
    for option in ("--gdb", "--script", "--program", "--strip", "--objcopy"):
        parser.add_argument(option, required=True)
    parser.add_argument("case", choices=["core", "live", "empty", "many", "stripped", "foreign"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="roost-gdb.") as folder:
        globals()[f"check_{options.case}"](Gdb(options), folder)
    print("as expected")


if __name__ == "__main__":
    main()
