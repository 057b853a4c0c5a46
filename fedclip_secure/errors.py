"""Every error this package raises on purpose.

FedClipError
├── ConfigError      what a person wrote in a YAML file or on the command line
├── DataError        images, feature files, caches, disks
├── ModelError       checkpoints, encoders, adapters
├── TrustError       certificates, signatures, pins and identities that do not check out
├── ProtocolError    a message of the secure round that breaks a rule; has a code
├── TransportError   the network, a proxy, or a server that answers with a problem
└── PolicyError      stopped on purpose by this silo's own policy

A message states the fact, the file or key or silo, and the remedy. The library raises; only the
command line turns an error into text and an exit code.
"""

from __future__ import annotations


class FedClipError(Exception):
    """Base of all errors that are meant to be read by a person."""

    exit_code = 1


class ConfigError(FedClipError):
    """A value in a YAML file or on the command line cannot be used."""


class DataError(FedClipError):
    """Images, feature files or caches cannot be read or written."""


class ModelError(FedClipError):
    """A checkpoint, an encoder or an adapter is not the one that was agreed."""


class TrustError(FedClipError):
    """A certificate, signature, pin or identity does not check out."""


class ProtocolError(FedClipError):
    """A message of the secure round breaks a rule of the protocol.

    `code` is the stable name of the rule; `silo`, where known, is the sender who broke it.
    """

    def __init__(self, code: str, message: str, *, silo: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.silo = silo


class TransportError(FedClipError):
    """The network or the server refused, or did not answer.

    `status` is the HTTP status and `code` the problem type (RFC 9457), where there was an answer.
    """

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class PolicyError(FedClipError):
    """This silo's policy forbids going on. Nothing failed: it was stopped on purpose."""

    exit_code = 3
