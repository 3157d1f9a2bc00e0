"""The object store: the S3 API through the minio SDK, its blocking calls on threads."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import stamina
import urllib3
from minio import Minio
from minio.commonconfig import CopySource
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, S3Error, ServerError

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_core import tls
from alveary_core.errors import FailedPrecondition, NotFound, Unavailable

T = TypeVar("T")
BUCKETS = ("datasets", "snapshots", "images", "runs", "models", "archive")
_CHUNK = 1 << 20
_PART = 16 << 20
_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchObject"}


class DigestMismatch(Exception):
    """What came is not what was asked for."""


class ObjectStore:
    """One client. All methods are coroutines; at most `threads` transfers are under way at once."""

    def __init__(
        self, endpoint: str, access_key: str, secret_key: str, *, secure: bool = False, public_endpoint: str = "",
        public_secure: bool = False, threads: int = 16, ca: Path | None = None,
    ) -> None:  # fmt: skip
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="s3")
        http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=5, read=60), maxsize=threads, retries=False,
            ssl_context=tls.context(ca),
        )  # fmt: skip
        # A region in hand saves the SDK a look-up before it can sign.
        self._client = Minio(endpoint, access_key=access_key, secret_key=secret_key, secure=secure, region="us-east-1", http_client=http)
        self._public = (
            Minio(public_endpoint, access_key=access_key, secret_key=secret_key, secure=public_secure, region="us-east-1")
            if public_endpoint and public_endpoint != endpoint
            else self._client
        )

    async def _call(self, work: Callable[[], T], what: str, patience: float = 60.0) -> T:
        def retried() -> T:
            for attempt in stamina.retry_context(on=_transient, attempts=None, timeout=patience, wait_max=2.0):
                with attempt:
                    return work()
            raise AssertionError("unreachable")

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, retried)
        except S3Error as error:
            if error.code in _MISSING:
                raise NotFound("object", what) from error
            raise Unavailable(f"object store: {what}: {error.code}: {error.message}") from error
        except (urllib3.exceptions.HTTPError, OSError, InvalidResponseError, ServerError) as error:
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

    async def put(self, bucket: str, key: str, data: bytes) -> None:
        """Store `data`."""
        await self._call(lambda: self._client.put_object(bucket, key, io.BytesIO(data), len(data)), f"{bucket}/{key}")

    async def put_file(self, bucket: str, key: str, path: Path, progress: Callable[[int], None] | None = None) -> c.FileEntry:
        """Store a file, streamed in parts; returns its entry (path empty) with the digest of what was sent.

        `progress` is called with numbers of bytes, from a thread.
        """

        def work() -> c.FileEntry:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                reader = _Hashing(file, progress)
                self._client.put_object(bucket, key, reader, size, part_size=_PART)  # type: ignore[arg-type]
                executable = bool(os.fstat(file.fileno()).st_mode & 0o100)
                return c.FileEntry(size=size, sha256=reader.sha256.hexdigest(), executable=executable)

        return await self._call(work, f"{bucket}/{key}")

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
        """Write an object to `path`, which appears whole or not at all.

        Raises:
            DigestMismatch: its content is not `sha256`.
            NotFound: there is none.
        """

        def work() -> None:
            response = self._client.get_object(bucket, key)
            part = path.with_name(f"{path.name}.part{os.getpid()}")
            digest = hashlib.sha256()
            try:
                with part.open("wb") as file:
                    while chunk := response.read(_CHUNK):
                        digest.update(chunk)
                        file.write(chunk)
                if digest.hexdigest() != sha256:
                    raise DigestMismatch(f"{bucket}/{key}: sha256 is {digest.hexdigest()}, expected {sha256}")
                part.rename(path)
            finally:
                part.unlink(missing_ok=True)
                response.close()
                response.release_conn()

        await self._call(work, f"{bucket}/{key}")

    async def size(self, bucket: str, key: str) -> int | None:
        """Bytes of an object, None where there is none."""
        try:
            return (await self._call(lambda: self._client.stat_object(bucket, key), f"{bucket}/{key}")).size
        except NotFound:
            return None

    async def copy(self, bucket: str, key: str, source_bucket: str, source_key: str) -> None:
        """Copy inside the store."""
        source = CopySource(source_bucket, source_key)
        await self._call(lambda: self._client.copy_object(bucket, key, source), f"{source_bucket}/{source_key}")

    async def keys(self, bucket: str, prefix: str) -> list[str]:
        """All keys that begin with `prefix`."""

        def work() -> list[str]:
            listing = self._client.list_objects(bucket, prefix, recursive=True)
            return [str(o.object_name) for o in listing if not o.is_dir]

        return await self._call(work, f"{bucket}/{prefix}*")

    async def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """Remove objects; those that are missing do not matter."""
        doomed = [DeleteObject(k) for k in keys]

        def work() -> None:
            for error in self._client.remove_objects(bucket, doomed):
                raise Unavailable(f"object store: {error}")

        if doomed:
            await self._call(work, f"{bucket}: {len(doomed)} objects")

    def get_url(self, bucket: str, key: str, seconds: int = 3600) -> str:
        """Link to GET an object, valid for `seconds` (at most seven days). Makes no call."""
        return str(self._public.presigned_get_object(bucket, key, expires=timedelta(seconds=seconds)))

    def put_url(self, bucket: str, key: str, seconds: int = 3600) -> str:
        """Link to PUT an object, valid for `seconds`. Makes no call."""
        return str(self._public.presigned_put_object(bucket, key, expires=timedelta(seconds=seconds)))

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Hashing:
    """A reader that digests what passes."""

    def __init__(self, file: io.BufferedReader, progress: Callable[[int], None] | None) -> None:
        self._file, self._progress = file, progress
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        if self._progress:
            self._progress(len(data))
        return data


def _transient(error: Exception) -> bool:
    if isinstance(error, S3Error):
        return bool(error.response is not None and error.response.status >= 500)
    # What is not XML comes from a proxy in front of the object store, which does not reach it.
    proxy = (InvalidResponseError, ServerError)
    return isinstance(error, (urllib3.exceptions.HTTPError, ConnectionError, json.JSONDecodeError, *proxy))


async def missing_blobs(store: ObjectStore, bucket: str, files: Sequence[c.FileEntry]) -> list[str]:
    """Digests among `files` whose blob `blobs/<sha256>` is missing or of another size."""
    wanted = {f.sha256: f.size for f in files}
    sizes = await asyncio.gather(*(store.size(bucket, f"blobs/{digest}") for digest in wanted))
    return [digest for (digest, size), found in zip(wanted.items(), sizes, strict=True) if found != size]


async def require_blobs(store: ObjectStore, bucket: str, files: Sequence[c.FileEntry]) -> None:
    """Make sure that all blobs are there.

    Raises:
        FailedPrecondition: some are not.
    """
    missing = set(await missing_blobs(store, bucket, files))
    if missing:
        names = [f.path for f in files if f.sha256 in missing]
        raise FailedPrecondition(f"{len(names)} of {len(files)} files were not uploaded, {names[0]!r} first: PUT them, then try again")
