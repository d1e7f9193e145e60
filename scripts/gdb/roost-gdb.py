# SPDX-License-Identifier: MIT
"""Commands for gdb that show the coroutines and contexts of a program made with Roost.

    (gdb) source roost-gdb.py
    (gdb) help roost

They read memory alone and run nothing in the program, so they work on core files too. What they need
is the description of a few types. Every build keeps that of coroutine.cc, frame_allocator.cc,
aio_context.cc and aio_context_life.cc, whatever its type; only `strip` takes it away.
docs/debugging.md has examples.
"""

import fnmatch
import functools
import re
import struct
import time

import gdb

# A longer chain is cut. (One that a bug has closed to a ring ends anyway.)
MAX_CHAIN = 1000
# How the descriptors of a frame begin: where to resume it and how to destroy it; then the promise.
PROMISE_OFFSET = 16
# std::source_location points to: file, function, line, column.
PLACE = struct.Struct("<QQII")
# The values of Inbox::head_ that are no list.
INBOX = {0: "empty", 1: "empty", 2: "closed"}
INBOX_SLEEPING = 1
# CoStateValue, should its constants have been optimised away.
STATE_WORD = {"kStateMask": 7, "kOwned": 8, "kEntriesShift": 5, "kMaxEntries": 0x7FFF,
              "kContextShift": 20, "kMaxContexts": 0x1000, "kGenerationShift": 32}
# As to_string(CoState) says.
STATE_TEXT = {"kListed": "about to be woken", "kInspected": "idle"}
TICK_NS = 1 << 20  # CoContext::kTickNs


# ---- Reading memory


def lookup_type(name):
    try:
        return gdb.lookup_type(name)
    except gdb.error:
        raise gdb.GdbError(missing(f"type {name}"))


def lookup_variable(name):
    symbol = gdb.lookup_static_symbol(f"roost::(anonymous namespace)::{name}")
    if symbol is None:
        raise gdb.GdbError(missing(f"variable {name}"))
    return symbol


def missing(what):
    if not gdb.objfiles():
        return ("roost: there is no program. Start gdb with the program and its core file, or attach "
                "to a process.")
    return (f"roost: there is no debug information about the {what}.\n"
            "Either the program does not use Roost (or is another than the one that ran), or it was "
            "stripped. Then give\ngdb the program as it was built, or put its debug symbols where gdb "
            "looks for them (`show debug-file-directory`).\nNo special build is needed: each contains "
            "what these commands read.")


def read(address, size):
    return gdb.selected_inferior().read_memory(address, size).tobytes()


def read_pointer(address):
    return int.from_bytes(read(address, 8), "little")


def read_string(address):
    return gdb.Value(address).cast(char_pointer()).string(errors="replace") if address else ""


def char_pointer():
    return gdb.lookup_type("char").const().pointer()


def symbol_at(address):
    """What stands at an address, as far as symbols tell; empty if they do not."""
    text = gdb.Value(address).cast(gdb.lookup_type("void").pointer()).format_string(symbols=True)
    found = re.search(r"<(.*?)(\+\d+)?>$", text)
    return found.group(1) if found else ""


def field_offset(type_, name):
    """Offset of a field in bytes, bases included."""
    type_ = type_.strip_typedefs()
    for field in type_.fields():
        if not hasattr(field, "bitpos"):
            continue  # static
        if field.name == name:
            return field.bitpos // 8, field.type
        if field.is_base_class:
            try:
                offset, found = field_offset(field.type, name)
                return field.bitpos // 8 + offset, found
            except KeyError:
                pass
    raise KeyError(f"{type_} has no member {name}")


class Record:
    """Takes words out of the bytes of one type. (A gdb.Value for each would take a thousand times as
    long, and there may be a million coroutines.)"""

    def __init__(self, type_name, **paths):
        type_ = lookup_type(type_name)
        self.size = type_.sizeof
        self.words = {}
        for name, path in paths.items():
            offset, current = 0, type_
            for part in path.split("."):
                more, current = field_offset(current, part)
                offset += more
            self.words[name] = (offset, current.strip_typedefs().sizeof)

    def take(self, data, start=0):
        return {name: int.from_bytes(data[start + offset:start + offset + size], "little")
                for name, (offset, size) in self.words.items()}


class Place:
    def __init__(self, address):
        self.line = 0
        if address:
            file, function, self.line, _ = PLACE.unpack(read(address, PLACE.size))
            self.file = read_string(file)
            self.function = read_string(function)

    def __bool__(self):
        return self.line != 0

    def __str__(self):
        # The last two parts of the path, as in the program's own messages.
        return f"{'/'.join(self.file.split('/')[-2:])}:{self.line}" if self else "nowhere"


def elements(vector):
    """The pointers in a std::vector of such. It begins with those to its begin and its end."""
    begin, end = struct.unpack("<QQ", read(int(vector.address), 16))
    return struct.unpack(f"<{(end - begin) // 8}Q", read(begin, end - begin)) if end > begin else ()


def queue_length(entry):
    """How many entries are linked by next, from a QueueEntry*."""
    seen = set()
    offset, _ = field_offset(lookup_type("roost::QueueEntry"), "next")
    while entry and entry not in seen and len(seen) < 1_000_000:
        seen.add(entry)
        entry = read_pointer(entry + offset)
    return len(seen)


# ---- What the program consists of


class Thread:
    """What ThreadState says about one thread of the program."""

    def __init__(self, thread, state):
        self.thread = thread
        self.context = int(state["context"])
        self.coroutine = int(state["self"])  # what it is resuming now
        self.running = {self.coroutine}      # and what it was resuming further down its stack
        driver = state["driver"]
        while int(driver) and len(self.running) < MAX_CHAIN:
            self.running.add(int(driver["outer_self"]))
            driver = driver["outer"]
        self.running.discard(0)

    def __str__(self):
        return describe_thread(self.thread)


def describe_thread(thread):
    name = f' "{thread.name}"' if thread.name else ""
    return f"thread {thread.num} (LWP {thread.ptid[1] or thread.ptid[0]}){name}"


class Context:
    def __init__(self, address):
        value = gdb.Value(address).cast(lookup_type("roost::AioContext").pointer())
        self.address = address
        self.index = int(value["index_"])
        name = value["name_"]
        self.name = name["_M_dataplus"]["_M_p"].string(
            length=int(name["_M_string_length"]), errors="replace")
        self.tick = int(value["tick_"])
        self.clock = int(value["options_"]["clock"])
        self.asleep = bool(value["asleep_"])
        self.polls = int(value["polls_"])
        self.back_end = read_string(read_pointer(int(value["back_end_name_"].address)))
        head = read_pointer(int(value["inbox_"]["head_"].address))
        self.sleeping = head == INBOX_SLEEPING
        count = 0 if head in INBOX else queue_length(head)
        self.inbox = INBOX.get(head, f"{count} {'entry' if count == 1 else 'entries'}")
        self.queued = sum(queue_length(int(value[queue]["head_"])) for queue in ("batch_", "added_"))

    def activity(self, program, thread):
        if self.sleeping:
            return "asleep"
        if self.asleep:
            return "being woken"
        if thread is None:
            return "polled by nobody"
        if thread.coroutine:
            running = program.coroutine_at(thread.coroutine)
            return f"runs {running.quoted() if running else hex(thread.coroutine)}"
        return "awake" if self.polls else "current, but not polled"


class Coroutine:
    def __init__(self, address, words, program):
        self.program = program
        self.address = address
        self.words = words
        self.name = program.string(words["name"])
        state = program.state_word(words["state"])
        self.state = state.text
        self.word = state
        owned = state.name == "kWaiting" or state.owned
        self.waits_for = program.string(words["waits_for"]) if owned else ""
        self.locks = words["locks"]
        self.created_at = program.place(words["created_at"])
        self.placed_at = program.place(words["placed_at"])
        self.awaits_at = program.place(words["awaits_at"])

    @property
    def context(self):
        """None for one that was made outside of any and has not been scheduled."""
        if not self.words["home"] and self.word.name != "kScheduled":
            return None
        return self.program.context_by_index.get(self.word.context)

    def quoted(self):
        return f"'{self.name}'"

    def doing(self):
        return self.state + (f" for {self.waits_for}" if self.waits_for else "")

    def started(self):
        return self.words["suspended_at"] != self.words["root"] or bool(self.awaits_at)

    def innermost_frame(self):
        """As the program's own census reads it; null where there is none to be read."""
        if self.word.name == "kRunning":
            return self.words["next"]
        return self.words["suspended_at"] if self.started() else 0

    def chain(self):
        """The frames, innermost first: each with its place, which is false if it has not awaited
        anything yet, and None after the last that is to be shown."""
        frame, seen = self.innermost_frame(), set()
        while frame and frame not in seen and len(seen) < MAX_CHAIN:
            seen.add(frame)
            record = self.program.promises
            promise = record.take(read(frame + PROMISE_OFFSET, record.size))
            yield frame, self.program.place(promise["awaits_at"])
            frame = promise["continuation"]
        if frame:
            yield frame, None

    def title(self):
        where = self.context.name if self.context else "no context"
        age = self.program.age(self)
        return (f"coroutine {self.quoted()} ({self.address:#x}) on {where}: {self.doing()}"
                + (f", {age}" if age else ""))

    def summary(self):
        at = f", at {self.awaits_at}" if self.awaits_at and self.word.name != "kRunning" else ""
        return self.title() + at

    def body(self, frames):
        """The paragraph below the title; with `frames`, all that can be told."""
        running = self.word.name == "kRunning"
        if running:
            thread = self.program.thread_of(self)
            yield f"  running on {thread}" if thread else "  running on a thread that is not known"
        if self.locks:
            yield f"  holds {self.locks} coroutine locks"
        yield f"  created at {self.created_at}"
        if frames and self.placed_at:
            yield f"  placed at  {self.placed_at}"
        if frames:
            yield (f"  state word: generation {self.word.generation}, {self.word.entries} queue "
                   "entries or references outstanding")
        if not self.innermost_frame():
            if self.words["next"] == 0 and running:
                yield "  it is about to suspend or to end"
            else:
                yield f"  has not run: {self.function_of(self.words['root'])}"
        label = "awaits at "
        try:
            for frame, place in self.chain():
                if place is None:
                    yield f"  {label:10} (and more)"
                    break
                text = str(place) if place else "nothing yet"
                if running and label:
                    # The innermost task of one that runs has gone on from there.
                    text = f"{self.function_of(frame)}, which awaited last at {text}"
                    label = "runs in   "
                elif frames:
                    text += f" in {self.function_of(frame)}"
                yield f"  {label:10} {text}" + (f" (frame {frame:#x})" if frames else "")
                label = ""
        except gdb.MemoryError as error:
            yield f"  {label:10} a frame that cannot be read: {error}"

    @staticmethod
    def function_of(frame):
        """The function behind a frame. One that has reached its end has nothing to resume any more."""
        name = symbol_at(read_pointer(frame)) or symbol_at(read_pointer(frame + 8)) or "?"
        return without_parameters(re.sub(r" \[clone [^]]*\]", "", name))


def without_parameters(name):
    """"f" of "f(int)", and of GCC's "f(f(int)::_Z1fi.Frame*)"."""
    depth = 0
    for position in range(len(name) - 1, -1, -1) if name.endswith(")") else ():
        depth += {")": 1, "(": -1}.get(name[position], 0)
        if depth == 0:
            return name if name[:position].endswith("operator") else name[:position]
    return name


class StateWord:
    constants = None

    def __init__(self, bits):
        if StateWord.constants is None:
            StateWord.constants = StateWord.read_constants()
        constant = StateWord.constants
        number = bits & constant["kStateMask"]
        names = {field.enumval: field.name.split("::")[-1]
                 for field in lookup_type("roost::CoState").fields()}
        self.name = names.get(number, str(number))
        self.text = STATE_TEXT.get(self.name, self.name[1:].lower())
        self.owned = bool(bits & constant["kOwned"])
        self.entries = bits >> constant["kEntriesShift"] & constant["kMaxEntries"]
        self.context = bits >> constant["kContextShift"] & constant["kMaxContexts"] - 1
        self.generation = bits >> constant["kGenerationShift"]

    @staticmethod
    def read_constants():
        value = gdb.Value(bytes(8), lookup_type("roost::CoStateValue"))
        found = {}
        for name, otherwise in STATE_WORD.items():
            try:
                found[name] = int(value[name])
            except gdb.error:
                found[name] = otherwise
        return found


class Program:
    """A snapshot; made anew for every command. What one need not know is not looked at: looking at
    threads, in particular, selects one after the other, which must not happen while gdb prints."""

    def __init__(self):
        inferior = gdb.selected_inferior()
        if not inferior.pid and not inferior.threads():
            raise gdb.GdbError("roost: there is neither a process nor a core file.")
        self.strings, self.places, self.states = {}, {}, {}
        self.coroutine_record = Record(
            "roost::Coroutine", root="root_", state="state_.word_", placed_at="placed_at_",
            home="home_", created_at="created_at_", suspended_at="suspended_at_", next="next_",
            waits_for="waits_for_", awaits_at="awaits_at_", name="name_", since="since_",
            locks="locks_")
        self.promises = Record("roost::PromiseBase", continuation="continuation",
                               awaits_at="awaits_at")
        self.threads_unknown = ""

    def string(self, address):
        if address not in self.strings:
            self.strings[address] = read_string(address)
        return self.strings[address]

    def place(self, address):
        if address not in self.places:
            self.places[address] = Place(address)
        return self.places[address]

    def state_word(self, bits):
        if bits not in self.states:
            self.states[bits] = StateWord(bits)
        return self.states[bits]

    @functools.cached_property
    def contexts(self):
        symbol = gdb.lookup_static_symbol("roost::(anonymous namespace)::every_context")
        if symbol is None:  # a program without event loops
            return []
        every = symbol.value()
        if int(every) == 0:  # main() is still to come
            return []
        # What points there are AioContexts; their bases come first, but need not stand first.
        return [Context(address) for address in elements(every.dereference()["living_"])]

    @functools.cached_property
    def context_by_index(self):
        return {context.index: context for context in self.contexts}

    @functools.cached_property
    def threads(self):
        """Thread-local variables are found through libthread_db, which may be missing."""
        symbol = lookup_variable("thread_state")
        selected = gdb.selected_thread()
        frame = gdb.selected_frame() if selected else None
        threads = []
        try:
            for thread in sorted(gdb.selected_inferior().threads(), key=lambda thread: thread.num):
                try:
                    thread.switch()
                    state = Thread(thread, symbol.value())
                    if state.context or state.running:
                        threads.append(state)
                except gdb.error as error:
                    self.threads_unknown = str(error).strip().splitlines()[0]
        finally:
            if selected:
                selected.switch()
                try:
                    frame.select()
                except gdb.error:
                    pass
        return threads

    @functools.cached_property
    def clock(self):
        """The time in ticks, if there is one clock; and whether that is the time now. A core file
        does not tell when it was written, only when a loop last looked at its clock."""
        clocks = {context.clock for context in self.contexts}
        if len(clocks) != 1:
            return None, False
        connection = gdb.selected_inferior().connection
        if connection is not None and connection.type == "native" and \
                "MonotonicClock" in symbol_at(read_pointer(clocks.pop())):
            return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // TICK_NS & 0xFFFFFFFF, True
        ticks = [context.tick for context in self.contexts]
        # They wrap around.
        return max(ticks, key=lambda tick: signed(tick - ticks[0])), False

    def age(self, coroutine):
        # None: it was made before its loop first looked at its clock.
        now, exact = self.clock
        if now is None or coroutine.words["since"] == 0:
            return ""
        ticks = max(signed(now - coroutine.words["since"]), 0)
        return f"{'' if exact else 'at least '}{ticks * TICK_NS // 1_000_000} ms"

    def coroutines(self):
        """Those that live, by address."""
        record = self.coroutine_record
        chunk = lookup_variable("control_block_chunks").value()
        found, chunks = [], set()
        while int(chunk) and int(chunk) not in chunks:
            chunks.add(int(chunk))
            first = int(chunk) + chunk.type.target().sizeof
            data = read(first, int(chunk["carved"]) * record.size)
            for start in range(0, len(data), record.size):
                if coroutine := self.living(first + start, record.take(data, start)):
                    found.append(coroutine)
            chunk = chunk["all_next"]
        return sorted(found, key=lambda coroutine: coroutine.address)

    def living(self, address, words):
        # A block without a name is free. One that has ended may still have queue entries.
        if not words["name"] or self.state_word(words["state"]).name == "kEnded":
            return None
        return Coroutine(address, words, self)

    def coroutine_at(self, address):
        """The one whose control block is there, if it is one."""
        try:
            record = self.coroutine_record
            return self.living(address, record.take(read(address, record.size)))
        except gdb.error:
            return None

    def thread_on(self, context):
        return next((t for t in self.threads if t.context == context.address), None)

    def thread_of(self, coroutine):
        return next((t for t in self.threads if coroutine.address in t.running), None)


def signed(ticks):
    return (ticks + 0x80000000 & 0xFFFFFFFF) - 0x80000000


# ---- Commands


class RoostCommand(gdb.Command):
    """One that answers in words if something is not as it should be."""

    def invoke(self, argument, from_tty):
        try:
            self.run(argument)
        except gdb.GdbError:
            raise
        except gdb.MemoryError as error:
            raise gdb.GdbError(f"roost: memory cannot be read; is the core file complete? {error}")
        except (gdb.error, KeyError, AttributeError, struct.error) as error:
            raise gdb.GdbError(f"roost: {error}\nDoes this script ({__file__}) come from the same "
                               "version of Roost as the program?")


class RoostPrefix(gdb.Command):
    """Coroutines and event loops of a program made with Roost.

roost coroutines [-v] [PATTERN]   all living coroutines, or those with such names
roost coroutine ADDRESS|NAME      one of them, with everything known about it
roost contexts                    the event loops, and what each is doing

They run nothing in the program and work on processes and core files alike. No special build is
needed, but a stripped program needs its debug symbols."""

    def __init__(self):
        super().__init__("roost", gdb.COMMAND_STATUS, gdb.COMPLETE_NONE, True)


class Coroutines(RoostCommand):
    """The living coroutines, one a line.
Usage: roost coroutines [-v] [PATTERN]

PATTERN selects by name, with * ? [] as in a shell. A line tells the name, the control block, the
context it is at home on, what it is doing, for how long, and the co_await that it is in:

  coroutine 'request' (0x7f...) on iothread0: waiting for I/O, 12 ms, at block/file_disk.cc:55

  idle               created or suspended; whoever holds it will wake it
  waiting for X      suspended by a lock, a timer, ..., which will wake it
  scheduled          its turn in that context's queue will come (what it waited for has happened)
  about to be woken  once another coroutine on the same thread suspends
  running            on some thread

-v also tells where each was created, and its await chain: the co_await expressions that it is in,
innermost first. In a core file times are lower bounds: it does not say when it was written."""

    def __init__(self):
        super().__init__("roost coroutines", gdb.COMMAND_STATUS)

    @staticmethod
    def run(argument):
        verbose, _, rest = argument.strip().partition(" ")
        pattern = rest.strip() if verbose == "-v" else argument.strip()
        program = Program()
        everything = program.coroutines()
        chosen = [c for c in everything if not pattern or fnmatch.fnmatchcase(c.name, pattern)]
        for coroutine in chosen:
            if verbose == "-v":
                print("\n".join([coroutine.title(), *coroutine.body(frames=False)]))
            else:
                print(coroutine.summary())
        counted = f"{len(chosen)} of " if pattern else ""
        print(f"{counted}{len(everything)} coroutine{'' if len(everything) == 1 else 's'}")


class OneCoroutine(RoostCommand):
    """Everything about one coroutine.
Usage: roost coroutine ADDRESS|NAME

ADDRESS is that of its control block, or any expression that gives one (`co`, `*this`, $rdi). A NAME
selects all of that name. Each line of the await chain has its function and the address of its frame.
"placed at" is who scheduled, woke or entered it last."""

    def __init__(self):
        super().__init__("roost coroutine", gdb.COMMAND_STATUS, gdb.COMPLETE_EXPRESSION)

    @staticmethod
    def run(argument):
        argument = argument.strip()
        if not argument:
            raise gdb.GdbError("roost: which one? Give its name or the address of its control block.")
        program = Program()
        everything = program.coroutines()
        chosen = [c for c in everything if c.name == argument.strip("'\"")]
        if not chosen:
            try:
                value = gdb.parse_and_eval(argument)
                if value.type.code in (gdb.TYPE_CODE_REF, gdb.TYPE_CODE_STRUCT):
                    value = value.address if value.type.code == gdb.TYPE_CODE_STRUCT else \
                        value.referenced_value().address
                address = int(value)
            except (gdb.error, TypeError):
                raise gdb.GdbError(f"roost: no living coroutine has the name {argument}, and it is no "
                                   "address.")
            chosen = [c for c in everything if c.address == address & (1 << 64) - 1]
        if not chosen:
            raise gdb.GdbError(f"roost: there is no living coroutine at {argument}.")
        for coroutine in chosen:
            print("\n".join([coroutine.title(), *coroutine.body(frames=True)]))


class Contexts(RoostCommand):
    """The event loops, one a line.
Usage: roost contexts

A line tells the name, the index that state words use, what it is doing, the thread that polls it, its
back end, what other threads have put into its inbox, what it has taken and not run yet, and how many
coroutines are at home there:

  iothread0 (1, 0x55...): asleep, thread 2 (LWP 4711), io_uring, inbox empty, 0 queued, 3 coroutines

  asleep            in the system call that waits; nothing was posted since
  being woken       something was posted; the system call has not returned yet
  awake             polling, but in no coroutine
  runs 'name'       in that coroutine
  polled by nobody  no thread has it current"""

    def __init__(self):
        super().__init__("roost contexts", gdb.COMMAND_STATUS)

    @staticmethod
    def run(argument):
        program = Program()
        at_home = {}
        for coroutine in program.coroutines():
            if coroutine.context:
                at_home[coroutine.context.index] = at_home.get(coroutine.context.index, 0) + 1
        for context in sorted(program.contexts, key=lambda context: context.index):
            count = at_home.get(context.index, 0)
            thread = program.thread_on(context)
            print(f"{context.name} ({context.index}, {context.address:#x}): "
                  f"{context.activity(program, thread)}, {thread or 'no thread'}, {context.back_end}, "
                  f"inbox {context.inbox}, {context.queued} queued, {count} "
                  f"coroutine{'' if count == 1 else 's'}")
        count = len(program.contexts)
        print(f"{count} context{'' if count == 1 else 's'}")
        if program.threads_unknown:
            print(f"(Of some threads it is not known what they poll: {program.threads_unknown})")


# ---- What `print` shows


class Summary:
    def __init__(self, value, text):
        self.value = value
        self.text = text

    def to_string(self):
        return self.text


def print_as(value):
    """gdb asks this for every value it prints."""
    type_ = value.type.strip_typedefs().unqualified()
    try:
        if type_.code == gdb.TYPE_CODE_STRUCT and type_.name == "roost::CoStateValue":
            word = StateWord(int(value["bits_"]))
            return Summary(value, f"{word.text}{' (owned)' if word.owned else ''}, context "
                           f"{word.context}, generation {word.generation}, {word.entries} entries")
        if type_.code == gdb.TYPE_CODE_PTR and int(value) and \
                type_.target().strip_typedefs().unqualified().name == "roost::Coroutine":
            coroutine = Program().coroutine_at(int(value))
            about = f"{coroutine.quoted()}, {coroutine.doing()}" if coroutine else "no living coroutine"
            return Summary(value, f"{int(value):#x} ({about})")
    except (gdb.error, gdb.GdbError, KeyError):
        pass
    return None


print_as.name = "roost"

for command in (RoostPrefix, Coroutines, OneCoroutine, Contexts):
    command()
gdb.pretty_printers[:] = [printer for printer in gdb.pretty_printers
                          if getattr(printer, "name", None) != "roost"]
gdb.pretty_printers.append(print_as)
