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

FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_PEEK, OPT_STARTTLS, OPT_INFO, OPT_GO = range(1, 8)
OPT_STRUCTURED_REPLY = 8

REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_ERR_UNSUP = 0x80000001
REP_ERR_POLICY = 0x80000002
REP_ERR_INVALID = 0x80000003
REP_ERR_UNKNOWN = 0x80000006
REP_ERR_TOO_BIG = 0x80000009

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES = range(7)
CMD_FLAG_FUA = 1
CMD_FLAG_NO_HOLE = 2

TRANSMIT_HAS_FLAGS = 1 << 0
TRANSMIT_READ_ONLY = 1 << 1
TRANSMIT_FLUSH = 1 << 2
TRANSMIT_FUA = 1 << 3
TRANSMIT_TRIM = 1 << 5
TRANSMIT_WRITE_ZEROES = 1 << 6
TRANSMIT_MULTI_CONN = 1 << 8

EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 75, 95, 108


class Closed(Exception):
    """The server has ended the connection."""


class Client:
    """One connection. Requests are sent and replies received separately, so that any number may
    be under way."""

    def __init__(self, uri, export="", negotiate=True):
        self.socket = harness.connect_uri(uri)
        self.next_cookie = 1
        self.reads = {}  # cookie -> length of the data that its reply brings
        self.size = None
        self.flags = None
        self.block_sizes = None
        if negotiate:
            self.greet()
            self.go(export)

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

    def request(self, command, offset=0, length=0, data=b"", flags=0, cookie=None,
                magic=REQUEST_MAGIC):
        if cookie is None:
            cookie = self.next_cookie
            self.next_cookie += 1
        if command == CMD_READ:
            self.reads[cookie] = length
        self.send(struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length) + data)
        return cookie

    def reply(self):
        """The next reply: (cookie, error, data)."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        harness.check_equal(magic, REPLY_MAGIC, "magic of a reply")
        length = self.reads.pop(cookie, 0)
        return cookie, error, self.receive(length) if length and not error else b""

    def call(self, command, offset=0, length=0, data=b"", flags=0):
        """One request and its reply; returns (error, data)."""
        sent = self.request(command, offset, length, data, flags)
        cookie, error, data = self.reply()
        harness.check_equal(cookie, sent, "cookie of the reply")
        return error, data

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
