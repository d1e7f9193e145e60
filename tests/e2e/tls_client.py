# SPDX-License-Identifier: MIT
"""The client (`roost copy`, `info`, `bench`) on TLS servers of others, by certificates and by
pre-shared keys: it gets in where it should, and says what is wrong where it does not."""

import os

from foreign import Foreign, free_port, measure, nbd_server, roost, there_and_back
from harness import (MIB, TRANSPORTS, Failure, Skip, case, check, check_equal, run, same_contents,
                     sparse_file)
from tls import KEYS, Authority, key_file, with_folder, with_key, with_options

SIZE = 4 * MIB + 512


def where(test, name):
    """How qemu-nbd and nbdkit are told where to listen, the port if it is one, and the URI."""
    if test.transport == "unix":
        uri = f"nbds+unix:///?socket={test.path(name)}"
        return ("-k", "SOCKET"), ("-U", "SOCKET"), None, uri
    port = free_port()
    return (("-b", "127.0.0.1", "-p", port), ("-i", "127.0.0.1", "-p", port), port,
            f"nbds://127.0.0.1:{port}/")


def qemu_nbd(test, name, disk, credentials):
    listen, _, port, uri = where(test, name)
    server = Foreign(test, "qemu-nbd", "-t", "-e", 8, "-f", "raw", "--discard=unmap", *listen,
                     "--object", f"{credentials},id=t,endpoint=server", "--tls-creds", "t", disk,
                     socket_name=name, port=port)
    return server, uri


def nbdkit(test, name, disk, *credentials):
    _, listen, port, uri = where(test, name)
    server = Foreign(test, "nbdkit", "-f", *listen, "--tls=require", *credentials, "file", disk,
                     socket_name=name, port=port)
    return server, uri


def check_works(test, uri, disk):
    info = there_and_back(test, uri, disk, SIZE)
    check_equal(info["tls"], True, "whether it is encrypted")
    measure(test, uri)


def check_refused(test, uri, *words):
    for command in (("info", uri), ("copy", uri, test.path("refused"), "--reconnect", 0),
                    ("bench", uri, "--seconds", 0.1)):
        done = roost(test, *command, code=1)
        check(any(word in done.stderr for word in words),
              f"roost {command[0]} says {done.stderr!r}, and none of {words}")
        check(len(done.stderr.splitlines()) == 1, f"roost {command[0]} says more: {done.stderr!r}")


def plain(uri):
    return uri.replace("nbds", "nbd", 1)


def try_certificates(test, serve):
    authority, disk = Authority(test), test.path("disk")
    stranger = Authority(test, "stranger")
    folder = authority.server(test)
    trusting = authority.trust_in(test.path("trusting"))
    sparse_file(disk, SIZE)
    server, uri = serve("open", disk, folder, False)
    check_works(test, with_folder(uri, trusting), disk)
    check_refused(test, with_folder(uri, stranger.trust_in(test.path("elsewhere"))),
                  "not trusted", "issuer is unknown")
    check_refused(test, with_options(with_folder(uri, trusting), tls_hostname="other.example"),
                  "name in the certificate does not match")
    roost(test, "info", with_options(with_folder(uri, trusting), tls_hostname="localhost"))
    check_refused(test, plain(uri), "TLS")
    server.kill()

    # A server that wants to know who its clients are.
    server, uri = serve("closed", disk, folder, True)
    known = authority.issue(test.path("known"), "client", "alice")
    check_works(test, with_folder(uri, known), disk)
    foreign = stranger.issue(test.path("foreign"), "client", "alice")
    authority.trust_in(foreign)
    for uninvited in (trusting, foreign):
        check_refused(test, with_folder(uri, uninvited), "TLS", "closed", "reset")
    roost(test, "info", with_folder(uri, known))
    server.kill()


def try_keys(test, serve):
    disk, keys = test.path("disk"), key_file(test)
    sparse_file(disk, SIZE)
    server, uri = serve("keys", disk, keys)
    check_works(test, with_key(uri, "alice", keys), disk)
    roost(test, "info", with_key(uri, "bob", keys))
    wrong = test.path("wrong.psk")
    with open(wrong, "w") as file:
        file.write(f"alice:{KEYS['bob']}\ncarol:{KEYS['alice']}\n")
    for name in ("alice", "carol"):  # the wrong key, a name that the server does not know
        check_refused(test, with_key(uri, name, wrong), "TLS")
    check_refused(test, with_key(uri, "dave", wrong), "no key of 'dave'")
    check_refused(test, plain(uri), "TLS")
    check_refused(test, with_folder(uri, Authority(test).trust_in(test.path("trusting"))), "TLS")
    roost(test, "info", with_key(uri, "alice", keys))


@case(transports=TRANSPORTS, timeout_s=120)
def roost_copy_by_certificates_with_qemu_nbd(test):
    def serve(name, disk, folder, verify):
        return qemu_nbd(test, name, disk,
                        f"tls-creds-x509,dir={folder},verify-peer={'yes' if verify else 'no'}")

    try_certificates(test, serve)


@case(transports=TRANSPORTS, timeout_s=120)
def roost_copy_by_certificates_with_nbdkit(test):
    def serve(name, disk, folder, verify):
        return nbdkit(test, name, disk, f"--tls-certificates={folder}",
                      *(("--tls-verify-peer",) if verify else ()))

    try_certificates(test, serve)


@case(transports=TRANSPORTS, timeout_s=120)
def roost_copy_by_shared_keys_with_qemu_nbd(test):
    try_keys(test, lambda name, disk, keys: qemu_nbd(
        test, name, disk, f"tls-creds-psk,dir={os.path.dirname(keys)}"))


@case(transports=TRANSPORTS, timeout_s=120)
def roost_copy_by_shared_keys_with_nbdkit(test):
    try_keys(test, lambda name, disk, keys: nbdkit(test, name, disk, f"--tls-psk={keys}"))


@case(timeout_s=120)
def roost_copy_by_certificates_with_nbd_server(test):
    authority, disk = Authority(test), test.path("disk")
    folder = authority.server(test)
    sparse_file(disk, SIZE)
    path = nbd_server(test, disk, certfile=f"{folder}/server-cert.pem",
                      keyfile=f"{folder}/server-key.pem", cacertfile=f"{folder}/ca-cert.pem",
                      force_tls="true")
    uri = f"nbds+unix:///disk?socket={path}"
    known = authority.issue(test.path("known"), "client", "alice")
    check_works(test, with_folder(uri, known), disk)
    check_refused(test, plain(uri), "TLS")
