"""The object store: the S3 API, its blocking calls on threads.

What is written is checked by the server against a SHA-256 that goes with it, so that nothing but what was digested is kept.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import os
import re
import threading
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import quote

import stamina
import urllib3
from minio import Minio
from minio.commonconfig import ComposeSource
from minio.datatypes import Part
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, S3Error, ServerError

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_core import telemetry, tls
from alveary_core.errors import FailedPrecondition, NotFound, Unavailable
from alveary_core.presign import REGION, Signer, checksum

T = TypeVar("T")
BUCKETS = ("datasets", "snapshots", "images", "runs", "models", "archive", "views")
_CHUNK = 1 << 20
_PART = 16 << 20
# S3 takes no more parts of one object.
_MAX_PARTS = 10_000
# Larger objects are copied in parts: S3 takes 5 GiB at once.
_COPIED = 4 << 30
# Buffers of parts that are being sent, of all large files together.
_PARTS_AT_ONCE = 4
# How often one transfer may be cut and go on.
_CUTS = 100
_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchObject", "NoSuchUpload"}
_AGAIN = {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable"}


class DigestMismatch(Exception):
    """What came is not what was asked for."""


class FileChanged(FailedPrecondition):
    """A file changed, shrank or vanished while it was stored; nothing of it was kept."""


@dataclass(frozen=True)
class Upload:
    """An upload in parts that was begun."""

    key: str
    id: str
    # Seconds since 1970.
    begun: float


class ObjectStore:
    """One client. All methods are coroutines; at most `threads` transfers are under way at once."""

    def __init__(
        self, endpoint: str, access_key: str, secret_key: str, *, secure: bool = False, public_endpoint: str = "",
        public_secure: bool = False, threads: int = 32, ca: Path | None = None,
    ) -> None:  # fmt: skip
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="s3")
        self._part_pool = ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="s3-part")
        self._buffers = threading.BoundedSemaphore(_PARTS_AT_ONCE)
        self._http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=5, read=60), maxsize=threads + _PARTS_AT_ONCE, retries=False, ssl_context=tls.context(ca)
        )
        # A region in hand saves the SDK a look-up before it can sign.
        self._client = Minio(endpoint, access_key=access_key, secret_key=secret_key, secure=secure, region=REGION, http_client=self._http)
        self._signer = Signer(endpoint, access_key, secret_key, secure=secure)
        public = public_endpoint and public_endpoint != endpoint
        self._public = Signer(public_endpoint, access_key, secret_key, secure=public_secure) if public else self._signer

    async def _call(self, work: Callable[[], T], what: str, patience: float = 60.0) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, _retried, work, patience)
        except S3Error as error:
            if error.code in _MISSING:
                raise NotFound("object", what) from error
            raise Unavailable(f"object store: {what}: {error.code}: {error.message}") from error
        except (urllib3.exceptions.HTTPError, OSError, json.JSONDecodeError, InvalidResponseError, ServerError) as error:
            raise Unavailable(f"object store: {what}: {error}") from error

    async def ensure_buckets(self) -> None:
        """Create the buckets that are missing, waiting up to a minute for the server."""

        def work() -> None:
            for bucket in BUCKETS:
                if not self._client.bucket_exists(bucket):
                    try:
                        self._client.make_bucket(bucket)
                    except S3Error as error:
                        if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                            raise

        await self._call(work, "buckets")

    # ---- writing --------------------------------------------------------------------------------------------------

    def _send(
        self, bucket: str, key: str, data: bytes, sha256: str, query: dict[str, str] | None = None, more: dict[str, str] | None = None
    ) -> str:
        """PUT `data`, which the server checks against its digest, or where that is empty against its CRC 32; returns the ETag.

        `more`: further headers.
        """
        if sha256:
            headers = {"x-amz-checksum-sha256": checksum(sha256), "content-length": str(len(data))}
        else:
            crc = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
            headers = {"x-amz-checksum-crc32": crc, "content-length": str(len(data))}
        url, headers = self._signer.request("PUT", bucket, key, headers | (more or {}), query)
        # A store that hangs over a small object is asked again before the caller's deadline; a part has its minute.
        timeout = urllib3.Timeout(connect=5, read=20 + 40 * min(len(data) / _PART, 1))
        reply = self._http.urlopen("PUT", url, body=data, headers=headers, redirect=False, timeout=timeout)
        if reply.status >= 300:
            raise _refusal(reply, f"{bucket}/{key}")
        return reply.headers.get("etag", "").strip('"')

    async def put(self, bucket: str, key: str, data: bytes) -> None:
        """Store `data`."""
        await self._call(lambda: self._send(bucket, key, data, hashlib.sha256(data).hexdigest()), f"{bucket}/{key}")

    async def put_new(self, bucket: str, key: str, data: bytes) -> bool:
        """Store `data` where nothing is; False: something is, or came of an earlier try whose answer was lost."""

        def work() -> bool:
            try:
                self._send(bucket, key, data, hashlib.sha256(data).hexdigest(), more={"if-none-match": "*"})
            except S3Error as error:
                if error.code == "PreconditionFailed":
                    return False
                raise
            return True

        return await self._call(work, f"{bucket}/{key}")

    async def put_file(
        self, bucket: str, key: str, path: Path, progress: Callable[[int], None] | None = None, *, sha256: str = ""
    ) -> c.FileEntry:
        """Store a file; returns its entry (path empty) with the digest of what was sent. A large one goes in parts, several at once.

        `progress` is called with numbers of bytes, from threads. Where `sha256` is given nothing else is stored.

        Raises:
            FileChanged: it vanished or shrank meanwhile, or is not `sha256`. Nothing was stored.
        """

        def work() -> c.FileEntry:
            try:
                opened = path.open("rb")
            except FileNotFoundError as error:
                raise FileChanged(f"{path} vanished while it was stored") from error
            with opened as file:
                info = os.fstat(file.fileno())
                if info.st_size <= _PART:
                    data = file.read(info.st_size)
                    digest = hashlib.sha256(data).hexdigest()
                    _same(path, len(data), info.st_size, digest, sha256)
                    _retried(lambda: self._send(bucket, key, data, digest))
                    if progress:
                        progress(len(data))
                else:
                    digest = self._send_parts(bucket, key, path, file, info.st_size, progress, sha256)
            return c.FileEntry(size=info.st_size, sha256=digest, executable=bool(info.st_mode & 0o100))

        # Retried inside, piece by piece: what was sent of a large file is not sent again.
        return await self._call(work, f"{bucket}/{key}", 0.0)

    def _send_parts(
        self, bucket: str, key: str, path: Path, file: BinaryIO, size: int, progress: Callable[[int], None] | None, sha256: str
    ) -> str:
        """Read and digest a file in order, and send its parts side by side; it appears whole, when all of it was right."""
        each = max(_PART, -(-size // _MAX_PARTS))
        upload_id = _retried(lambda: self._client._create_multipart_upload(bucket, key, {}))
        whole = hashlib.sha256()
        sent: list[Future[Part]] = []

        def send(number: int, data: bytes) -> Part:
            try:
                query = {"partNumber": str(number), "uploadId": upload_id}
                # The whole is digested as it is read; a part has to survive its way alone, which CRC 32 tells at a tenth of the cost.
                etag = _retried(lambda: self._send(bucket, key, data, "", query))
                if progress:
                    progress(len(data))
                return Part(number, etag)
            finally:
                self._buffers.release()

        try:
            left = size
            for number in itertools.count(1):
                if not left or any(f.done() and f.exception() for f in sent):
                    break
                self._buffers.acquire()
                try:
                    data = file.read(min(each, left))
                    if not data:
                        raise FileChanged(f"{path} shrank from {size} to {size - left} bytes while it was stored")
                    whole.update(data)
                    left -= len(data)
                    sent.append(self._part_pool.submit(send, number, data))
                except BaseException:
                    self._buffers.release()
                    raise
            parts = [future.result() for future in sent]
            _same(path, size - left, size, whole.hexdigest(), sha256)
            _retried(lambda: self._client._complete_multipart_upload(bucket, key, upload_id, parts))
        except BaseException:
            for future in sent:
                if future.cancel():
                    self._buffers.release()
            for future in sent:
                if not future.cancelled():
                    future.exception()  # wait: a part that arrives after the abort would stay
            try:
                self._client._abort_multipart_upload(bucket, key, upload_id)
            except (S3Error, urllib3.exceptions.HTTPError, InvalidResponseError, ServerError) as error:
                # The collector removes it with other unfinished uploads.
                telemetry.logger().warning("store.abort", bucket=bucket, key=key, error=str(error))
            raise
        return whole.hexdigest()

    async def copy(self, bucket: str, key: str, source_bucket: str, source_key: str, size: int | None = None) -> None:
        """Copy inside the store. `size` in bytes, where it is known, saves asking for it.

        Raises:
            NotFound: there is no source.
        """

        def work() -> None:
            if (self._client.stat_object(source_bucket, source_key).size or 0 if size is None else size) > _COPIED:
                self._client.compose_object(bucket, key, [ComposeSource(source_bucket, source_key)])
                return
            # One request, where the SDK's copy_object makes two.
            url, headers = self._signer.request("PUT", bucket, key, {"x-amz-copy-source": quote(f"/{source_bucket}/{source_key}")})
            reply = self._http.urlopen("PUT", url, headers=headers, redirect=False)
            # A copy may fail after the answer began.
            if reply.status >= 300 or b"<Error>" in reply.data:
                raise _refusal(reply, f"{source_bucket}/{source_key}")

        await self._call(work, f"{source_bucket}/{source_key}")

    async def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """Remove objects; those that are missing do not matter."""
        doomed = [DeleteObject(k) for k in keys]

        def work() -> None:
            for error in self._client.remove_objects(bucket, doomed):
                raise Unavailable(f"object store: {error}")

        if doomed:
            await self._call(work, f"{bucket}: {len(doomed)} objects")

    # ---- reading --------------------------------------------------------------------------------------------------

    async def get(self, bucket: str, key: str, offset: int = 0, length: int = 0) -> bytes:
        """The object, or `length` bytes of it from `offset` (0: to the end).

        Raises:
            NotFound: there is none.
        """

        def work() -> bytes:
            response = self._client.get_object(bucket, key, offset=offset, length=length)
            try:
                return bytes(response.read())
            finally:
                response.close()
                response.release_conn()

        return await self._call(work, f"{bucket}/{key}")

    async def get_file(self, bucket: str, key: str, path: Path, sha256: str) -> None:
        """Write an object to `path`, which appears whole or not at all. A transfer that is cut goes on where it was.

        Raises:
            DigestMismatch: its content is not `sha256`.
            NotFound: there is none.
        """

        def work() -> None:
            part = path.with_name(f".{uuid.uuid4().hex}.part")
            try:
                with part.open("wb") as file:
                    digest = self._read_into(bucket, key, file.write)
                if digest != sha256:
                    raise DigestMismatch(f"{bucket}/{key}: sha256 is {digest}, expected {sha256}")
                part.rename(path)
            finally:
                part.unlink(missing_ok=True)

        await self._call(work, f"{bucket}/{key}", 0.0)

    async def digest(self, bucket: str, key: str) -> str:
        """SHA-256 of an object's content, read from the store.

        Raises:
            NotFound: there is none.
        """
        return await self._call(lambda: self._read_into(bucket, key, lambda _: None), f"{bucket}/{key}", 0.0)

    def _read_into(self, bucket: str, key: str, write: Callable[[bytes], object]) -> str:
        """Read an object in order; returns its digest."""
        digest, done, total = hashlib.sha256(), 0, None

        def read() -> None:
            nonlocal done, total
            if done == total:
                return
            response = self._client.get_object(bucket, key, offset=done)
            try:
                total = done + int(response.headers.get("content-length", "0"))
                while chunk := response.read(_CHUNK):
                    digest.update(chunk)
                    write(chunk)
                    done += len(chunk)
                if done < total:
                    raise urllib3.exceptions.IncompleteRead(done, total - done)
            finally:
                response.close()
                response.release_conn()

        # The number of tries starts again after a cut that followed some bytes.
        for left in reversed(range(_CUTS)):
            before = done
            try:
                _retried(read, 20.0)
                break
            except (urllib3.exceptions.HTTPError, ConnectionError):
                if done == before or not left:
                    raise
        return digest.hexdigest()

    async def size(self, bucket: str, key: str) -> int | None:
        """Bytes of an object, None where there is none."""
        try:
            return (await self._call(lambda: self._client.stat_object(bucket, key), f"{bucket}/{key}")).size
        except NotFound:
            return None

    async def keys(self, bucket: str, prefix: str) -> list[str]:
        """All keys that begin with `prefix`."""

        def work() -> list[str]:
            listing = self._client.list_objects(bucket, prefix, recursive=True)
            return [str(o.object_name) for o in listing if not o.is_dir]

        return await self._call(work, f"{bucket}/{prefix}*")

    async def page(self, bucket: str, prefix: str, after: str = "", limit: int = 1000) -> list[tuple[str, int, float]]:
        """The first `limit` (at most 1000) keys that begin with `prefix` and come behind `after`: key, bytes, time of change since 1970."""

        def work() -> list[tuple[str, int, float]]:
            found = self._client.list_objects(bucket, prefix, recursive=True, start_after=after or None)
            return [
                (str(o.object_name), o.size or 0, o.last_modified.timestamp() if o.last_modified else 0.0)
                for o in itertools.islice((o for o in found if not o.is_dir), limit)
            ]

        return await self._call(work, f"{bucket}/{prefix}*")

    # ---- links ----------------------------------------------------------------------------------------------------

    def get_url(self, bucket: str, key: str, seconds: int = 3600) -> str:
        """Link to GET an object, valid for `seconds` (at most seven days). Makes no call."""
        return self._public.url("GET", bucket, key, seconds=seconds)

    def put_url(
        self, bucket: str, key: str, seconds: int = 3600, *, headers: dict[str, str] | None = None, query: dict[str, str] | None = None
    ) -> str:
        """Link to PUT an object, or a part of one, with these very headers, valid for `seconds`. Makes no call."""
        return self._public.url("PUT", bucket, key, seconds=seconds, headers=headers, query=query)

    async def enforces_checksums(self, bucket: str) -> bool:
        """Whether the server refuses a PUT whose content is not what x-amz-checksum-sha256 says. Tries it."""
        key = f"probe/{uuid.uuid4().hex}"
        digest = hashlib.sha256(b"right").hexdigest()

        def work() -> bool:
            try:
                self._send(bucket, key, b"wrong", digest)
            except S3Error as error:
                if error.response is not None and error.response.status == 400:
                    return True
                raise
            self._client.remove_object(bucket, key)
            return False

        return await self._call(work, f"{bucket}/{key}")

    # ---- uploads in parts, whose parts others send ----------------------------------------------------------------

    async def begin_upload(self, bucket: str, key: str) -> str:
        """Id of a new upload in parts."""
        return await self._call(lambda: self._client._create_multipart_upload(bucket, key, {}), f"{bucket}/{key}")

    async def uploads(self, bucket: str, prefix: str) -> list[Upload]:
        """Uploads in parts that were begun and not completed, of keys that begin with `prefix`."""

        def work() -> list[Upload]:
            found: list[Upload] = []
            marker: str | None = None
            id_marker: str | None = None
            while True:
                page = self._client._list_multipart_uploads(bucket, prefix=prefix, key_marker=marker, upload_id_marker=id_marker)
                for one in page.uploads:
                    begun = one.initiated_time.timestamp() if one.initiated_time else 0.0
                    found.append(Upload(str(one.object_name), str(one.upload_id), begun))
                if not page.is_truncated:
                    return found
                marker, id_marker = page.next_key_marker, page.next_upload_id_marker

        return await self._call(work, f"{bucket}/{prefix}*")

    async def parts(self, bucket: str, key: str, upload_id: str) -> dict[int, tuple[int, str]]:
        """What came of an upload: bytes and ETag by number.

        Raises:
            NotFound: there is no such upload.
        """

        def work() -> dict[int, tuple[int, str]]:
            found: dict[int, tuple[int, str]] = {}
            marker: str | None = None
            while True:
                page = self._client._list_parts(bucket, key, upload_id, part_number_marker=marker)
                found |= {p.part_number: (p.size or 0, p.etag) for p in page.parts}
                if not page.is_truncated:
                    return found
                marker = str(page.next_part_number_marker)

        return await self._call(work, f"{bucket}/{key}")

    async def complete(self, bucket: str, key: str, upload_id: str, etags: Sequence[str]) -> None:
        """Make an object of the parts, in order of their numbers from 1."""
        parts = [Part(number, etag) for number, etag in enumerate(etags, 1)]
        await self._call(lambda: self._client._complete_multipart_upload(bucket, key, upload_id, parts), f"{bucket}/{key}")

    async def abort(self, bucket: str, key: str, upload_id: str) -> None:
        """Forget an upload and its parts; one that is gone does not matter."""
        try:
            await self._call(lambda: self._client._abort_multipart_upload(bucket, key, upload_id), f"{bucket}/{key}")
        except NotFound:
            return

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._part_pool.shutdown(wait=True, cancel_futures=True)


def _same(path: Path, size: int, expected_size: int, sha256: str, expected: str) -> None:
    if size != expected_size:
        raise FileChanged(f"{path} shrank from {expected_size} to {size} bytes while it was stored")
    if expected and sha256 != expected:
        raise FileChanged(f"{path} changed while it was stored: its sha256 is {sha256}, it was {expected}")


def _retried(work: Callable[[], T], patience: float = 60.0) -> T:
    """`work()`, again with growing pauses while it fails by what passes, for `patience` seconds; 0: once."""
    try:  # what goes well at once does not pay for the machinery
        return work()
    except Exception as error:
        if not patience or not _transient(error):
            raise
    for attempt in stamina.retry_context(on=_transient, attempts=None, timeout=patience, wait_max=2.0):
        with attempt:
            return work()
    raise AssertionError("unreachable")


def _refusal(reply: urllib3.BaseHTTPResponse, what: str) -> S3Error | ServerError:
    """The error that an answer is."""
    text = reply.data.decode(errors="replace")
    code, message = re.search(r"<Code>(.*?)</Code>", text), re.search(r"<Message>(.*?)</Message>", text)
    if code is None:  # not the object store's words: a proxy in front of it
        return ServerError(f"{what}: the server said {reply.status}: {text[:200]}", reply.status)
    return S3Error(reply, code[1], message[1] if message else "", what, "", "", None, None)


def _transient(error: Exception) -> bool:
    if isinstance(error, S3Error):
        return error.code in _AGAIN or bool(error.response is not None and error.response.status >= 500)
    # What is not XML comes from a proxy in front of the object store, which does not reach it.
    proxy = (InvalidResponseError, ServerError)
    return isinstance(error, (urllib3.exceptions.HTTPError, ConnectionError, json.JSONDecodeError, *proxy))
