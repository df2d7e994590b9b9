"""What S3 objects must hash to."""

import base64
import hashlib
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.storage.s3_checksum import Crc32, PartHashes, parse_etag, parse_stored

MD5 = "0123456789abcdef" * 2


@given(st.lists(st.binary(max_size=30), max_size=8), st.integers(1, 20))
def test_parts_are_hashed_wherever_the_pieces_end(pieces: list[bytes], part_bytes: int) -> None:
    content = b"".join(pieces)
    hashes = PartHashes(hashlib.sha256, part_bytes)
    for piece in pieces:
        hashes.update(piece)
    parts = [content[start : start + part_bytes] for start in range(0, max(1, len(content)), part_bytes)]
    assert hashes.digests() == [hashlib.sha256(part).digest() for part in parts]


@given(st.lists(st.binary(max_size=30), max_size=8))
def test_without_a_size_all_is_one_part(pieces: list[bytes]) -> None:
    hashes = PartHashes(Crc32, None)
    for piece in pieces:
        hashes.update(piece)
    assert hashes.digests() == [zlib.crc32(b"".join(pieces)).to_bytes(4, "big")]


def test_etags() -> None:
    whole, parts = parse_etag(MD5), parse_etag(f"{MD5}-12")
    assert whole is not None
    assert (whole.name, whole.expected, whole.part_count) == ("MD5", bytes.fromhex(MD5), 0)
    assert parts is not None
    assert parts.part_count == 12
    digests = [hashlib.md5(part).digest() for part in (b"a", b"b")]
    assert parts.of_parts(digests) == hashlib.md5(b"".join(digests)).digest()


@pytest.mark.parametrize("etag", ["", MD5[:-1], MD5.upper(), f"{MD5}-", f"{MD5}-123456", f"{MD5}-1-2"])
def test_what_is_no_md5(etag: str) -> None:
    assert parse_etag(etag) is None


def test_stored_checksums() -> None:
    crc32, sha256 = b"1234", bytes(32)
    found = parse_stored({"ChecksumCRC32": base64.b64encode(crc32).decode() + "-3"}, 3)
    assert found is not None
    assert (found.name, found.expected) == ("CRC-32", crc32)
    found = parse_stored({"ChecksumSHA256": base64.b64encode(sha256).decode() + "-3"}, 3)
    assert found is not None
    assert (found.name, found.expected) == ("SHA-256", sha256)


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"ChecksumCRC32": "MTIzNA=="},  # of the whole object
        {"ChecksumCRC32": "MTIzNA==-4"},
        {"ChecksumCRC32": "MTIz*NA=-3"},
        {"ChecksumCRC64NVME": "MTIzNDU2Nzg="},
    ],
)
def test_checksums_that_parts_can_not_be_compared_with(head: dict[str, str]) -> None:
    assert parse_stored(head, 3) is None
