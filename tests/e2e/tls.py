# SPDX-License-Identifier: MIT
"""TLS by certificates and by pre-shared keys: stock clients get in where they should, and only
there."""

import os
import random
import socket

from clients import fio, fio_errors
from harness import (EVENT_LOOPS, KIB, MIB, TRANSPORTS, Failure, case, check, check_equal,
                     need_program, pattern_file, run, same_contents, sparse_file)
from nbd_client import (OPT_GO, OPT_LIST, OPT_STARTTLS, REP_ACK, REP_ERR_UNSUP, Client, Closed,
                        check_still_serves)

DISK_SIZE = 8 * MIB
REP_ERR_TLS_REQD = 0x80000005
KEYS = {"alice": "a1" * 32, "bob": "b0" * 32}


class Authority:
    """A certificate authority in a folder of its own, and what it has signed."""

    def __init__(self, test, name="authority"):
        need_program("certtool")
        self.folder = test.path(name)
        os.mkdir(self.folder)
        self.key = os.path.join(self.folder, "ca-key.pem")
        self.certificate = os.path.join(self.folder, "ca-cert.pem")
        self.make_key(self.key)
        self.sign(self.certificate, self.key, "--generate-self-signed", name,
                  "ca", "cert_signing_key")

    def make_key(self, path):
        run("certtool", "--generate-privkey", "--key-type=ecdsa", "--no-text", "--outfile", path)

    def sign(self, certificate, key, how, name, *lines):
        template = certificate + ".template"
        with open(template, "w") as file:
            file.write("\n".join((f'cn = "{name}"', "expiration_days = 2", *lines)) + "\n")
        run("certtool", how, "--load-privkey", key, "--template", template, "--no-text",
            "--outfile", certificate)

    def issue(self, folder, side, name, *lines):
        """Fills a folder, as every client and server here reads them, for one side."""
        os.makedirs(folder, exist_ok=True)
        key = os.path.join(folder, f"{side}-key.pem")
        certificate = os.path.join(folder, f"{side}-cert.pem")
        self.make_key(key)
        template = certificate + ".template"
        with open(template, "w") as file:
            file.write("\n".join((f'cn = "{name}"', "expiration_days = 2", "signing_key",
                                  f"tls_www_{side}", *lines)) + "\n")
        run("certtool", "--generate-certificate", "--load-privkey", key, "--load-ca-certificate",
            self.certificate, "--load-ca-privkey", self.key, "--template", template, "--no-text",
            "--outfile", certificate)
        self.trust_in(folder)
        return folder

    def trust_in(self, folder):
        os.makedirs(folder, exist_ok=True)
        with open(self.certificate) as ours, open(f"{folder}/ca-cert.pem", "w") as copy:
            copy.write(ours.read())
        return folder

    def server(self, test):
        return self.issue(test.path("server"), "server", "localhost", 'dns_name = "localhost"',
                          'ip_address = "127.0.0.1"')


def with_options(uri, **options):
    text = "&".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())
    return uri + ("&" if "?" in uri else "?") + text


def with_folder(uri, folder):
    return with_options(uri, tls_certificates=folder)


def with_key(uri, name, file):
    # The name stands before the host; a unix socket's URI has none.
    scheme, _, rest = uri.partition("://")
    return with_options(f"{scheme}://{name}@{rest}", tls_psk_file=file)


def plain(uri):
    return uri.replace("nbds", "nbd", 1)


def key_file(test, names=tuple(KEYS)):
    # QEMU wants it to have this name.
    folder = test.path("-".join(names))
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "keys.psk")
    with open(path, "w") as file:
        file.write("".join(f"{name}:{KEYS[name]}\n" for name in names))
    return path


def qemu_image(test, daemon, tls="c"):
    """The export, as qemu's --image-opts name it."""
    if test.transport == "unix":
        server = f"server.type=unix,server.path={test.path('s')}"
    else:
        port = daemon.uri.split(":")[-1].split("/")[0]
        server = f"server.type=inet,server.host=127.0.0.1,server.port={port}"
    image = f"driver=nbd,{server}"
    if tls:
        image += f",tls-creds={tls}"
        if test.transport == "unix":
            image += ",tls-hostname=localhost"
    return image


def qemu_io(image, *commands, credentials=None, check_exit=True):
    options = ["--object", credentials] if credentials else []
    script = [word for command in commands for word in ("-c", command)]
    done = run("qemu-io", *options, "--image-opts", image, *script, check_exit=False)
    # It ends with 0 where a command failed.
    bad = done.returncode != 0 or "fail" in done.stdout.lower() or "error" in done.stdout.lower()
    if check_exit:
        check(not bad, f"qemu-io: exit {done.returncode}\n{done.stdout}{done.stderr}")
    else:
        check(bad, f"qemu-io got in: {done.stdout}{done.stderr}")
    return done


def nbdsh(uri, script):
    # The system's Python, which libnbd's module belongs to, goes before any other.
    environment = dict(os.environ, PATH="/usr/bin:/bin:" + os.environ.get("PATH", ""))
    begin = f"h.set_uri_allow_local_file(True); h.connect_uri({uri!r}); "
    return run("nbdsh", "-c", begin + script, env=environment)


def check_refused(uri, *words):
    done = run("nbdinfo", "--size", uri, check_exit=False)
    check(done.returncode != 0, f"nbdinfo got in by {uri}: {done.stdout}")
    for word in words:
        check(word in done.stderr.lower(), f"nbdinfo says {done.stderr!r}, not {word!r}")


def check_tools_work(test, daemon, disk, uri, credentials):
    """Each stock client moves data, which is compared with what is on the disk."""
    image, back = test.path("image"), test.path("back")
    pattern_file(image, DISK_SIZE)
    sparse_file(back, DISK_SIZE)
    check_equal(int(run("nbdinfo", "--size", uri).stdout), DISK_SIZE, "size")
    run("nbdcopy", "--connections=2", "--flush", image, uri)
    check(same_contents(image, disk), "what nbdcopy sent is not what is on the disk")
    run("nbdcopy", uri, back)
    check(same_contents(image, back), "what nbdcopy fetched is not what is on the disk")
    nbdsh(uri, "assert h.get_tls_negotiated(); h.pwrite(b'n' * 70000, 1000); h.flush();"
               "assert h.pread(70000, 1000) == b'n' * 70000")
    with open(disk, "rb") as file:
        file.seek(1000)
        check(file.read(70000) == b"n" * 70000, "what nbdsh wrote is not on the disk")

    remote = qemu_image(test, daemon)
    run("qemu-img", "compare", "--object", credentials, "--image-opts", remote,
        f"driver=raw,file.driver=file,file.filename={disk}")
    run("qemu-img", "convert", "-n", "--object", credentials, "--target-image-opts", "-f", "raw",
        image, remote)
    check(same_contents(image, disk), "what qemu-img sent is not what is on the disk")
    qemu_io(remote, "write -P 0x5a 1M 300k", "read -P 0x5a 1M 300k", "flush",
            credentials=credentials)
    with open(disk, "rb") as file:
        file.seek(MIB)
        check(file.read(300 * KIB) == b"\x5a" * 300 * KIB, "what qemu-io wrote is not on the disk")

    info = test.roost_run("info", uri)
    check("encrypted" in info.stdout, f"roost info: {info.stdout}{info.stderr}")
    copied = test.roost_run("copy", uri, test.path("fetched"))
    check_equal(copied.returncode, 0, f"roost copy ({copied.stderr})")
    check(same_contents(disk, test.path("fetched")), "what roost copy fetched")


def check_plain_is_refused(test, daemon):
    check_refused(plain(daemon.uri), "tls")
    qemu_io(qemu_image(test, daemon, tls=None), "read 0 4k", check_exit=False)
    with Client(plain(daemon.uri), negotiate=False) as client:
        client.greet()
        for option in (OPT_LIST, OPT_GO):
            replies = client.option(option, b"" if option == OPT_LIST else bytes(6))
            check_equal([kind for kind, _ in replies], [REP_ERR_TLS_REQD],
                        f"reply to option {option} without TLS")


@case(transports=TRANSPORTS, timeout_s=120)
def tls_by_certificates(test):
    authority, disk = Authority(test), test.path("disk.img")
    server = authority.server(test)
    trusting = authority.trust_in(test.path("trusting"))
    sparse_file(disk, DISK_SIZE)
    with test.serve(disk, "--tls-creds", server) as daemon:
        check(daemon.uri.startswith("nbds"), f"TLS is required, but the URI is {daemon.uri}")
        check_tools_work(test, daemon, disk, with_folder(daemon.uri, trusting),
                         f"tls-creds-x509,id=c,endpoint=client,dir={trusting}")
        check_plain_is_refused(test, daemon)
        # It is the client that refuses a server of somebody else's.
        stranger = Authority(test, "stranger").trust_in(test.path("elsewhere"))
        if test.transport == "tcp":  # without a host, libnbd does not look whom it talks to
            check_refused(with_folder(daemon.uri, stranger))
        check_equal(test.roost_run("info", with_folder(daemon.uri, stranger)).returncode, 1,
                    "exit code of roost info that does not trust the server")
        check_equal(int(run("nbdinfo", "--size", with_folder(daemon.uri, trusting)).stdout),
                    DISK_SIZE, "size, after all that")


@case(transports=TRANSPORTS, timeout_s=120)
def tls_by_shared_keys(test):
    keys, disk = key_file(test), test.path("disk.img")
    sparse_file(disk, DISK_SIZE)
    with test.serve(disk, "--tls-psk", keys) as daemon:
        folder = os.path.dirname(keys)
        check_tools_work(test, daemon, disk, with_key(daemon.uri, "alice", keys),
                         f"tls-creds-psk,id=c,endpoint=client,dir={folder},username=alice")
        check_plain_is_refused(test, daemon)
        wrong = test.path("wrong.psk")
        with open(wrong, "w") as file:
            file.write(f"alice:{KEYS['bob']}\ncarol:{KEYS['alice']}\n")
        for name in ("alice", "carol"):  # the wrong key, an unknown name
            check_refused(with_key(daemon.uri, name, wrong))
        check_equal(int(run("nbdinfo", "--size", with_key(daemon.uri, "bob", keys)).stdout),
                    DISK_SIZE, "size for bob")


@case(loops=EVENT_LOOPS, transports=("tcp",), timeout_s=120)
def fio_verifies_over_tls(test):
    """By a certificate in fio's home: it takes neither a folder nor a file of keys with the URI."""
    authority, home = Authority(test), test.path("home")
    server = authority.server(test)
    authority.trust_in(f"{home}/.pki/libnbd")
    # As root, libnbd looks in the system's folders only.
    user = {}
    if os.geteuid() == 0:
        user = {"user": 65534, "group": 65534, "extra_groups": []}
        os.chmod(test.folder, 0o755)
        os.chown(home, 65534, 65534)

    def verified(daemon, *options):
        return fio(test, daemon.uri, "--rw=randwrite", "--bsrange=4k-64k", "--size=4M",
                   "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", *options,
                   cwd=home, env=dict(os.environ, HOME=home), **user)

    with test.serve(f"mem:{DISK_SIZE}", "--tls-creds", server) as daemon:
        jobs = fio_errors(verified(daemon, "--numjobs=2", "--offset_increment=4M", "--thread"))
        check_equal(len(jobs), 2, "jobs")
        for error, reads, writes in jobs:
            check_equal(error, 0, "fio's error")
            check(reads == writes > 50, f"fio did {reads} reads and {writes} writes")
    # It does look whom it talks to.
    stranger = Authority(test, "stranger")
    os.unlink(f"{home}/.pki/libnbd/ca-cert.pem")
    stranger.trust_in(f"{home}/.pki/libnbd")
    with test.serve(f"mem:{DISK_SIZE}", "--tls-creds", server) as daemon:
        try:
            done = fio_errors(verified(daemon))
        except Failure as refused:
            check("certificate" in str(refused), f"fio says {refused}")
        else:
            raise Failure(f"fio believes a server that it does not trust: {done}")


@case(transports=TRANSPORTS)
def tls_allowed(test):
    """Each client as it likes."""
    authority = Authority(test)
    server = authority.server(test)
    trusting = authority.trust_in(test.path("trusting"))
    with test.serve(f"mem:{DISK_SIZE}", "--tls", "allowed", "--tls-creds", server) as daemon:
        check(not daemon.uri.startswith("nbds"), f"TLS is not required, but {daemon.uri}")
        check_still_serves(daemon)
        check_equal(int(run("nbdinfo", "--size", daemon.uri).stdout), DISK_SIZE, "size in plain")
        encrypted = with_folder(daemon.uri.replace("nbd", "nbds", 1), trusting)
        nbdsh(encrypted, "assert h.get_tls_negotiated(); h.pread(4096, 0)")
        qemu_io(qemu_image(test, daemon), "read 0 1M",
                credentials=f"tls-creds-x509,id=c,endpoint=client,dir={trusting}")
        qemu_io(qemu_image(test, daemon, tls=None), "read 0 1M")


@case()
def tls_off(test):
    with test.serve("mem:8M") as daemon:
        with Client(daemon.uri, negotiate=False) as client:
            client.greet()
            check_equal(client.option(OPT_STARTTLS)[-1][0], REP_ERR_UNSUP, "reply to STARTTLS")
            check_equal(client.option(OPT_LIST)[-1][0], REP_ACK, "reply to LIST")
        check_refused(daemon.uri.replace("nbd", "nbds", 1), "tls")


@case(loops=EVENT_LOOPS, transports=TRANSPORTS, sanitized=True)
def nonsense_in_a_handshake_ends_one_connection_only(test):
    """Records that are whole, cut off, or of a kind that does not belong there, in pieces of any
    size, by somebody who need not be anybody."""
    authority, rng = Authority(test), random.Random(7)
    with test.serve(f"mem:{DISK_SIZE}", "--tls-creds", authority.server(test)) as daemon:
        for _ in range(200):
            said = b""
            for _ in range(rng.randrange(1, 5)):
                kind = rng.choice((0x14, 0x15, 0x16, 0x16, 0x16, 0x17, rng.randrange(256)))
                body = rng.choice((b"", rng.randbytes(rng.randrange(1, 40)),
                                   bytes((rng.choice((1, 2, 11, 24)), 0, 0, rng.randrange(64))) +
                                   rng.randbytes(rng.randrange(60))))
                length = rng.choice((len(body), len(body), rng.randrange(1 << 16)))
                said += bytes((kind, 3, rng.randrange(1, 4))) + length.to_bytes(2, "big") + body
            with Client(plain(daemon.uri), negotiate=False) as client:
                client.greet()
                check_equal(client.option(OPT_STARTTLS)[-1][0], REP_ACK, "reply to STARTTLS")
                try:
                    if rng.random() < 0.3:
                        cut = rng.randrange(len(said))
                        client.send(said[:cut])
                        said = said[cut:]
                    client.send(said)
                    if rng.random() < 0.3:
                        client.socket.shutdown(socket.SHUT_WR)
                        client.expect_closed()
                except (Closed, OSError):  # it was quicker
                    pass
            check(daemon.alive(), f"{said!r} has ended the daemon: {daemon.describe()}")
        encrypted = with_folder(daemon.uri, authority.trust_in(test.path("trusting")))
        check_equal(int(run("nbdinfo", "--size", encrypted).stdout), DISK_SIZE, "size afterwards")


@case()
def clients_without_our_certificate_are_refused(test):
    authority, stranger = Authority(test), Authority(test, "stranger")
    server = authority.server(test)
    known = authority.issue(test.path("known"), "client", "alice")
    nameless = authority.trust_in(test.path("nameless"))
    # It trusts the server, but its own certificate is of another authority.
    foreign = stranger.issue(test.path("foreign"), "client", "alice")
    authority.trust_in(foreign)
    with test.serve(f"mem:{DISK_SIZE}", "--tls-creds", server, "--tls-verify-peer") as daemon:
        for folder in (nameless, foreign):
            check_refused(with_folder(daemon.uri, folder))
            qemu_io(qemu_image(test, daemon), "read 0 4k", check_exit=False,
                    credentials=f"tls-creds-x509,id=c,endpoint=client,dir={folder}")
        run("nbdinfo", "--size", with_folder(daemon.uri, known))
        qemu_io(qemu_image(test, daemon), "read 0 4k",
                credentials=f"tls-creds-x509,id=c,endpoint=client,dir={known}")
    # The reason is the certificate: who is not asked for one gets in.
    with test.serve(f"mem:{DISK_SIZE}", "--tls-creds", server) as daemon:
        for folder in (nameless, foreign, known):
            run("nbdinfo", "--size", with_folder(daemon.uri, folder))


@case()
def only_named_clients_are_let_in(test):
    authority = Authority(test)
    server = authority.server(test)
    folders = {name: authority.issue(test.path(name), "client", name)
               for name in ("alice", "bob", "mallory")}
    allow = ("--tls-allow", "CN=alice", "--tls-allow", "CN=bob")
    with test.serve(f"mem:{DISK_SIZE}", "--tls-creds", server, *allow) as daemon:
        for name in ("alice", "bob"):
            run("nbdinfo", "--size", with_folder(daemon.uri, folders[name]))
        check_refused(with_folder(daemon.uri, folders["mallory"]))
        check("mallory" in daemon.stderr(), f"nothing is said of mallory: {daemon.stderr()}")
    keys = key_file(test)
    with test.serve(f"mem:{DISK_SIZE}", "--tls-psk", keys, "--tls-allow", "bob") as daemon:
        run("nbdinfo", "--size", with_key(daemon.uri, "bob", keys))
        check_refused(with_key(daemon.uri, "alice", keys))
