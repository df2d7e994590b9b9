"""What an S3 object must hash to: the MD5 in its ETag, or a checksum that is stored with it.

An object that was uploaded in parts has the checksum of its parts' checksums, with their number behind it.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

import base64
import binascii
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

_MD5_ETAG = re.compile(r"([0-9a-f]{32})(?:-(\d{1,5}))?")


class Hash(Protocol):
    """What hashlib's hashes are, as far as it is needed here."""

    def update(self, piece: bytes | memoryview, /) -> None:
        """Take more bytes."""
        ...

    def digest(self) -> bytes:
        """Return the hash of all that was taken."""
        ...


class Crc32:
    """CRC-32 in the manner of hashlib: several times as fast as MD5, and stored by S3's clients unasked."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, piece: bytes | memoryview, /) -> None:
        """Take more bytes."""
        self._value = zlib.crc32(piece, self._value)

    def digest(self) -> bytes:
        """Return the checksum, as S3 stores it: four bytes, the most significant first."""
        return self._value.to_bytes(4, "big")


def _md5() -> Hash:
    return hashlib.md5(usedforsecurity=False)


_STORED: dict[str, tuple[str, Callable[[], Hash]]] = {
    "ChecksumCRC32": ("CRC-32", Crc32),
    "ChecksumSHA256": ("SHA-256", hashlib.sha256),
}


@dataclass(frozen=True)
class Checksum:
    """A hash by its name, how one is begun, and which one the whole object has; of how many parts, or of none."""

    name: str
    new: Callable[[], Hash]
    expected: bytes
    part_count: int

    def of_parts(self, digests: list[bytes]) -> bytes:
        """Return the hash of the whole from those of its parts, in their order."""
        whole = self.new()
        whole.update(b"".join(digests))
        return whole.digest()


class PartHashes:
    """The hashes of an object's parts, which come one after the other: each of so many bytes, or all that come."""

    def __init__(self, new: Callable[[], Hash], part_bytes: int | None) -> None:
        self._new = new
        self._part_bytes = part_bytes
        self._hash, self._room_bytes = new(), part_bytes
        self._digests: list[bytes] = []

    def update(self, piece: bytes) -> None:
        """Take more bytes, of as many parts as they reach into."""
        rest = memoryview(piece)
        while rest:
            taken = rest[: self._room_bytes]
            self._hash.update(taken)
            rest = rest[len(taken) :]
            if self._room_bytes is not None:
                self._room_bytes -= len(taken)
                if self._room_bytes == 0:
                    self._end_part()

    def digests(self) -> list[bytes]:
        """Return the hashes of the parts, when the last has come."""
        if self._room_bytes != self._part_bytes or not self._digests:
            self._end_part()
        return self._digests

    def _end_part(self) -> None:
        self._digests.append(self._hash.digest())
        self._hash, self._room_bytes = self._new(), self._part_bytes


def parse_etag(etag: str) -> Checksum | None:
    """Return the MD5 that an ETag looks like."""
    match = _MD5_ETAG.fullmatch(etag)
    return Checksum("MD5", _md5, bytes.fromhex(match[1]), int(match[2] or 0)) if match else None


def parse_stored(head: Mapping[str, object], part_count: int) -> Checksum | None:
    """Return the checksum of so many parts' checksums that a HEAD's answer names; None where there is none.

    One over the whole object is none either: what each part must have can't be told from it.
    """
    for field, (name, new) in _STORED.items():
        value, _, parts = str(head.get(field, "")).partition("-")
        if parts == str(part_count):
            try:
                expected = base64.b64decode(value, validate=True)
            except binascii.Error:
                continue
            return Checksum(name, new, expected, part_count)
    return None
