# SPDX-License-Identifier: MIT
"""A small NBD client over a raw socket, for what stock clients cannot be made to do: break the
rules, stop halfway, and record exactly which request was acknowledged when."""

import struct

import harness

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C

FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_PEEK, OPT_STARTTLS, OPT_INFO, OPT_GO = range(1, 8)
OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 8, 9, 10
OPT_EXTENDED_HEADERS = 11

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERR_UNSUP = 0x80000001
REP_ERR_POLICY = 0x80000002
REP_ERR_INVALID = 0x80000003
REP_ERR_UNKNOWN = 0x80000006
REP_ERR_TOO_BIG = 0x80000009
REP_ERR_EXT_HEADER_REQD = 0x8000000A

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES = range(7)
CMD_BLOCK_STATUS, CMD_RESIZE = 7, 8
CMD_FLAG_FUA = 1
CMD_FLAG_NO_HOLE = 2
CMD_FLAG_DF = 4
CMD_FLAG_REQ_ONE = 8
CMD_FLAG_FAST_ZERO = 16
CMD_FLAG_PAYLOAD_LEN = 32

CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE = 0, 1, 2
CHUNK_STATUS, CHUNK_STATUS_EXT = 5, 6
CHUNK_ERROR, CHUNK_ERROR_OFFSET = 0x8001, 0x8002

STATE_HOLE, STATE_ZERO = 1, 2

SIMPLE, STRUCTURED, EXTENDED = "simple", "structured", "extended"

TRANSMIT_HAS_FLAGS = 1 << 0
TRANSMIT_READ_ONLY = 1 << 1
TRANSMIT_FLUSH = 1 << 2
TRANSMIT_FUA = 1 << 3
TRANSMIT_TRIM = 1 << 5
TRANSMIT_WRITE_ZEROES = 1 << 6
TRANSMIT_DF = 1 << 7
TRANSMIT_MULTI_CONN = 1 << 8
TRANSMIT_RESIZE = 1 << 9
TRANSMIT_CACHE = 1 << 10
TRANSMIT_FAST_ZERO = 1 << 11
TRANSMIT_STATUS_PAYLOAD = 1 << 12

EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 75, 95, 108


def meta_request(export, *queries):
    strings = [struct.pack(">I", len(text.encode())) + text.encode()
               for text in (export, *queries)]
    return strings[0] + struct.pack(">I", len(queries)) + b"".join(strings[1:])


class Closed(Exception):
    """The server has ended the connection."""


class Answer:
    """What the chunks of one request have said so far."""

    def __init__(self, command, offset, length):
        self.command = command
        self.offset = offset
        self.data = bytearray(length if command == CMD_READ else 0)
        self.covered = []  # ranges of the request that chunks have described
        self.kinds = []
        self.error = 0
        self.message = ""
        self.error_offset = None
        self.extents = []  # (length, state)

    def cover(self, offset, length):
        start, end = offset - self.offset, offset - self.offset + length
        harness.check(0 <= start < end <= len(self.data), f"a chunk at {offset}+{length}")
        harness.check(all(end <= a or b <= start for a, b in self.covered), "chunks overlap")
        self.covered.append((start, end))
        return start, end

    def add(self, kind, payload):
        self.kinds.append(kind)
        if kind == CHUNK_DATA:
            start, end = self.cover(struct.unpack(">Q", payload[:8])[0], len(payload) - 8)
            self.data[start:end] = payload[8:]
        elif kind == CHUNK_HOLE:
            self.cover(*struct.unpack(">QI", payload))
        elif kind in (CHUNK_STATUS, CHUNK_STATUS_EXT):
            harness.check_equal(self.command, CMD_BLOCK_STATUS, "command of a status")
            self.context = struct.unpack(">I", payload[:4])[0]
            if kind == CHUNK_STATUS_EXT:
                count = struct.unpack(">I", payload[4:8])[0]
                harness.check_equal(len(payload), 8 + 16 * count, "length of a status")
                self.extents += struct.iter_unpack(">QQ", payload[8:])
            else:
                self.extents += struct.iter_unpack(">II", payload[4:])
        elif kind & 0x8000:
            self.error, length = struct.unpack(">IH", payload[:6])
            self.message = payload[6:6 + length].decode()
            if kind == CHUNK_ERROR_OFFSET:
                self.error_offset = struct.unpack(">Q", payload[6 + length:])[0]
        else:
            harness.check_equal((kind, payload), (CHUNK_NONE, b""), "chunk")

    def finish(self):
        if not self.error:
            harness.check_equal(sum(b - a for a, b in self.covered), len(self.data),
                                "bytes that the chunks of a read describe")


class Client:
    """One connection. Requests are sent and replies received separately, so that any number may
    be under way. The style says how replies come: SIMPLE, STRUCTURED or EXTENDED; with the latter
    two, base:allocation is asked for, and answers keeps what was said of each request."""

    def __init__(self, uri, export="", negotiate=True, style=SIMPLE):
        self.socket = harness.connect_uri(uri)
        self.next_cookie = 1
        self.reads = {}  # cookie -> length of the data that its reply brings
        self.size = None
        self.flags = None
        self.block_sizes = None
        self.style = SIMPLE
        self.answers = {}  # cookie -> Answer, with chunks
        if negotiate:
            self.greet()
            self.choose_style(style, export)
            self.go(export)

    def choose_style(self, style, export=""):
        if style == SIMPLE:
            return
        option = OPT_EXTENDED_HEADERS if style == EXTENDED else OPT_STRUCTURED_REPLY
        harness.check_equal(self.option(option), [(REP_ACK, b"")], f"reply to option {option}")
        replies = self.option(OPT_SET_META_CONTEXT, meta_request(export, "base:allocation"))
        harness.check_equal([kind for kind, _ in replies], [REP_META_CONTEXT, REP_ACK],
                            "replies to SET_META_CONTEXT")
        self.context = struct.unpack(">I", replies[0][1][:4])[0]
        self.style = style

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def receive(self, length):
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                count = self.socket.recv_into(view)
            except ConnectionResetError as error:
                raise Closed from error
            if count == 0:
                raise Closed
            view = view[count:]
        return bytes(data)

    def expect_closed(self):
        """Reads whatever is still to come, until the server ends the connection."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            pass

    # --- negotiation

    def greet(self, flags=FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
        magic, option_magic, server_flags = struct.unpack(">QQH", self.receive(18))
        harness.check_equal((magic, option_magic), (NBDMAGIC, IHAVEOPT), "greeting")
        harness.check(server_flags & FLAG_FIXED_NEWSTYLE, "the server is not fixed newstyle")
        self.send(struct.pack(">I", flags))

    def send_option(self, option, data=b"", length=None, magic=IHAVEOPT):
        self.send(struct.pack(">QII", magic, option, len(data) if length is None else length)
                  + data)

    def receive_option_reply(self):
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        harness.check_equal(magic, OPTION_REPLY_MAGIC, "magic of an option reply")
        return option, kind, self.receive(length)

    def option(self, option, data=b""):
        """Sends an option and returns its replies, the last of which is an ACK or an error."""
        self.send_option(option, data)
        replies = []
        while True:
            seen, kind, payload = self.receive_option_reply()
            harness.check_equal(seen, option, "option of the reply")
            replies.append((kind, payload))
            if kind == REP_ACK or kind & 0x80000000:
                return replies

    def go(self, export="", option=OPT_GO):
        name = export.encode()
        request = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, INFO_BLOCK_SIZE)
        replies = self.option(option, request)
        harness.check_equal(replies[-1][0], REP_ACK, f"last reply to GO of {export!r}")
        for kind, payload in replies:
            if kind != REP_INFO:
                continue
            info = struct.unpack(">H", payload[:2])[0]
            if info == INFO_EXPORT:
                self.size, self.flags = struct.unpack(">QH", payload[2:])
            elif info == INFO_BLOCK_SIZE:
                self.block_sizes = struct.unpack(">III", payload[2:])
        harness.check(self.size is not None, "no NBD_INFO_EXPORT before the ACK")

    # --- transmission

    def request(self, command, offset=0, length=0, data=b"", flags=0, cookie=None, magic=None):
        if cookie is None:
            cookie = self.next_cookie
            self.next_cookie += 1
        if command == CMD_READ:
            self.reads[cookie] = length
        # Nobody makes room for the data of a read that has to be refused.
        self.answers[cookie] = Answer(command, offset, min(length, 64 << 20))
        if self.style == EXTENDED:
            if command == CMD_WRITE:
                flags |= CMD_FLAG_PAYLOAD_LEN
            header = struct.pack(">IHHQQQ", magic or EXTENDED_REQUEST_MAGIC, flags, command,
                                 cookie, offset, length)
        else:
            header = struct.pack(">IHHQQI", magic or REQUEST_MAGIC, flags, command, cookie, offset,
                                 length)
        self.send(header + data)
        return cookie

    def simple_reply(self, header):
        magic, error, cookie = struct.unpack(">IIQ", header)
        harness.check_equal(magic, REPLY_MAGIC, "magic of a reply")
        length = self.reads.pop(cookie, 0)
        self.answers[cookie].error = error
        return cookie, error, self.receive(length) if length and not error else b""

    def reply(self):
        """The next reply that is complete: (cookie, error, data)."""
        while True:
            if self.style == EXTENDED:
                magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ",
                                                                           self.receive(32))
                harness.check_equal(magic, EXTENDED_REPLY_MAGIC, "magic of a reply")
                harness.check_equal(offset, self.answers[cookie].offset, "offset of the request")
            else:
                header = self.receive(16)
                magic, flags, kind, cookie = struct.unpack(">IHHQ", header)
                if magic != STRUCTURED_REPLY_MAGIC or self.style == SIMPLE:
                    answer = self.simple_reply(header)
                    harness.check(self.style == SIMPLE or not answer[2],
                                  "a simple reply to a read")
                    return answer
                length = struct.unpack(">I", self.receive(4))[0]
            answer = self.answers[cookie]
            answer.add(kind, self.receive(length))
            if flags & 1:
                answer.finish()
                self.reads.pop(cookie, None)
                return cookie, answer.error, b"" if answer.error else bytes(answer.data)

    def call(self, command, offset=0, length=0, data=b"", flags=0):
        """One request and its reply; returns (error, data)."""
        sent = self.request(command, offset, length, data, flags)
        cookie, error, data = self.reply()
        harness.check_equal(cookie, sent, "cookie of the reply")
        return error, data

    def ask(self, command, offset=0, length=0, data=b"", flags=0):
        """One request, and all that was said of it."""
        sent = self.request(command, offset, length, data, flags)
        harness.check_equal(self.reply()[0], sent, "cookie of the reply")
        return self.answers.pop(sent)

    def status(self, offset, length, flags=0):
        answer = self.ask(CMD_BLOCK_STATUS, offset, length, flags=flags)
        harness.check_equal((answer.error, answer.message), (0, ""), "error of a block status")
        harness.check_equal(answer.context, self.context, "context of a block status")
        return answer.extents

    def read(self, offset, length):
        error, data = self.call(CMD_READ, offset, length)
        harness.check_equal(error, 0, f"error of a read at {offset}+{length}")
        return data

    def write(self, offset, data, flags=0):
        error, _ = self.call(CMD_WRITE, offset, len(data), data, flags)
        harness.check_equal(error, 0, f"error of a write at {offset}+{len(data)}")

    def flush(self):
        harness.check_equal(self.call(CMD_FLUSH)[0], 0, "error of a flush")

    def disconnect(self):
        self.request(CMD_DISC)
        self.expect_closed()
        self.socket.close()


def check_still_serves(daemon, export=""):
    """A well-behaved client gets what it asks for."""
    with Client(daemon.uri, export) as client:
        before = client.read(0, 4096)
        client.write(0, b"still here".ljust(4096, b"\0"))
        harness.check_equal(client.read(0, 10), b"still here", "what was just written")
        client.write(0, before)
        client.disconnect()
