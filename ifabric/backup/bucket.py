"""Backups in S3-compatible storage.

A backup is uploaded in parts, each with the digest of its bytes, so that the server refuses a part that came damaged;
then it is asked what it has. The facts go last: an object without facts is one whose upload was not finished, and is
uploaded again by the next run. All of it blocks; whoever calls from a loop takes a thread.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from ifabric.backup.archive import sync_folder
from ifabric.backup.manifest import Kept, Sidecar, expired, parse_name
from ifabric.backup.places import check_file, encode_facts
from ifabric.config_ops import S3
from ifabric.errors import ConfigError, FabricError, Unavailable

#: of one part, in memory; S3 takes 10,000 of them
PART_BYTES = 16 << 20
CONNECT_S, READ_S, TRIES = 5, 60, 2
_MISSING = ("404", "NoSuchKey", "NotFound")
_TAKEN = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")


class Refused(FabricError):
    """The storage refused; nothing was changed there."""


class Bucket:
    """A prefix in a bucket."""

    def __init__(self, settings: S3) -> None:
        self._settings = settings
        self._client = _client(settings)
        self.where = f"s3://{settings.bucket}/{settings.prefix}"

    def backups(self) -> list[Sidecar]:
        """The facts of all whose upload was finished, oldest first."""
        with self._translated("listed"):
            sizes: dict[str, int] = {}
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._settings.bucket, Prefix=self._settings.prefix
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    sizes[item["Key"].removeprefix(self._settings.prefix)] = item["Size"]
            found = []
            for name, size in sizes.items():
                named = parse_name(name)
                if named is not None and not named.prepared and f"{name}.json" in sizes:
                    facts = self._facts(name)
                    if facts is not None and facts.size == size:
                        found.append(facts)
        return sorted(found, key=lambda facts: (facts.at, facts.revision))

    def _facts(self, name: str) -> Sidecar | None:
        try:
            body = self._client.get_object(Bucket=self._settings.bucket, Key=self._key(f"{name}.json"))["Body"]
            found = msgspec.json.decode(body.read(1 << 20), type=Sidecar)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None  # somebody else's
        return found if found.file == name else None

    def upload(self, path: Path, facts: Sidecar, progress: Callable[[int], None]) -> None:
        """Brings a backup there, and checks what the storage says it has. Raises `Unavailable` or `Refused`."""
        key = self._key(path.name)
        with self._translated(f"uploaded ({path.name})"):
            if facts.size <= PART_BYTES:
                data = path.read_bytes()
                self._put(key, data, {"sha256": facts.sha256})
                progress(len(data))
            else:
                self._multipart(path, key, facts, progress)
            head = self._client.head_object(Bucket=self._settings.bucket, Key=key)
            if head["ContentLength"] != facts.size or head["Metadata"].get("sha256") != facts.sha256:
                raise Refused(
                    f"{self.where}{path.name} has {head['ContentLength']} bytes there and {facts.size} here; the local backup stays"
                )
            self._put(self._key(f"{path.name}.json"), encode_facts(facts), {})

    def _put(self, key: str, data: bytes, metadata: dict[str, str], **more: Any) -> None:
        self._client.put_object(
            Bucket=self._settings.bucket, Key=key, Body=data, Metadata=metadata, ChecksumSHA256=_digest(data), **more
        )

    def _multipart(self, path: Path, key: str, facts: Sidecar, progress: Callable[[int], None]) -> None:
        at = {"Bucket": self._settings.bucket, "Key": key}
        begun = self._client.create_multipart_upload(
            **at, Metadata={"sha256": facts.sha256}, ChecksumAlgorithm="SHA256"
        )["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            with path.open("rb") as file:
                while data := file.read(PART_BYTES):
                    number, digest = len(parts) + 1, _digest(data)
                    said = self._client.upload_part(
                        **at, UploadId=begun, PartNumber=number, Body=data, ChecksumSHA256=digest
                    )
                    parts.append({"PartNumber": number, "ETag": said["ETag"], "ChecksumSHA256": digest})
                    progress(len(data))
            self._client.complete_multipart_upload(**at, UploadId=begun, MultipartUpload={"Parts": parts})
        except BaseException:
            with contextlib.suppress(FabricError), self._translated("given up"):
                self._client.abort_multipart_upload(**at, UploadId=begun)
            raise

    def download(self, facts: Sidecar, folder: Path, progress: Callable[[int], None]) -> Path:
        """Brings a backup here, whole and checked, or not at all; where it is."""
        path = folder / facts.file
        fresh = path.with_name(f".{path.name}.download")
        try:
            with self._translated(f"downloaded ({facts.file})"):
                body = self._client.get_object(Bucket=self._settings.bucket, Key=self._key(facts.file))["Body"]
                fresh.touch(mode=0o600)
                with fresh.open("wb") as file:
                    for data in body.iter_chunks(1 << 20):
                        file.write(data)
                        progress(len(data))
            check_file(fresh, facts)
            fresh.replace(path)
            sync_folder(folder)
        except OSError as error:
            raise Refused(f"cannot write {path}: {error.strerror}; nothing was touched") from None
        finally:
            fresh.unlink(missing_ok=True)
        return path

    def delete_expired(self, now: datetime, *, retention_days: int, keep_min: int) -> list[str]:
        """Deletes what retention lets go; the names."""
        kept = [Kept(facts.file, facts.at, good=True) for facts in self.backups()]
        gone = expired(kept, now, retention_days=retention_days, keep_min=keep_min)
        with self._translated("deleted"):
            for name in gone:
                self._client.delete_object(Bucket=self._settings.bucket, Key=self._key(name))
                self._client.delete_object(Bucket=self._settings.bucket, Key=self._key(f"{name}.json"))
        return gone

    def names(self, prefix: str) -> list[str]:
        """What is there below a prefix of ours, without it."""
        with self._translated("listed"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._settings.bucket, Prefix=self._key(prefix)
            )
            return [item["Key"].removeprefix(self._key(prefix)) for page in pages for item in page.get("Contents", ())]

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object unless there is one. False: there is."""
        try:
            with self._translated("written"):
                self._put(self._key(name), data, {}, IfNoneMatch="*")
        except Refused as refused:
            if refused.facts.get("code") in _TAKEN:
                return False
            raise
        return True

    def _key(self, name: str) -> str:
        return f"{self._settings.prefix}{name}"

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """The one table from boto3's errors to ours."""
        from botocore import exceptions  # noqa: PLC0415  # boto3 is an extra

        try:
            yield
        except exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "?"))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            said = error.response.get("Error", {}).get("Message", "")
            message = f"{self.where} refuses ({code}: {said}); nothing was {what}"
            if status >= 500:
                raise Unavailable(message, what="s3", code=code) from None
            raise Refused(message, code=code) from None
        except exceptions.NoCredentialsError:
            raise ConfigError(
                f"there are no credentials for {self.where}: set backup.s3.access_key_file and secret_key_file; nothing was {what}"
            ) from None
        except (exceptions.BotoCoreError, exceptions.HTTPClientError) as error:
            raise Unavailable(f"{self.where} does not answer ({error}); nothing was {what}", what="s3") from None


def _digest(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _client(settings: S3) -> Any:
    try:
        import boto3  # noqa: PLC0415  # an extra
        from botocore.config import Config  # noqa: PLC0415
    except ImportError:
        raise ConfigError("backup.s3 needs boto3: pip install 'ifabric[s3]'; nothing was uploaded") from None
    keys: dict[str, str] = {}
    if settings.access_key_file is not None and settings.secret_key_file is not None:
        keys = {
            "aws_access_key_id": _secret(settings.access_key_file, "access_key_file"),
            "aws_secret_access_key": _secret(settings.secret_key_file, "secret_key_file"),
        }
    elif settings.access_key_file is not None or settings.secret_key_file is not None:
        raise ConfigError("backup.s3: access_key_file and secret_key_file are given together or not at all")
    own = settings.endpoint_url is not None and "amazonaws.com" not in settings.endpoint_url
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=settings.endpoint_url,
            region_name=settings.region or ("us-east-1" if own else None),
            config=Config(
                connect_timeout=CONNECT_S,
                read_timeout=READ_S,
                retries={"max_attempts": TRIES, "mode": "standard"},
                s3={"addressing_style": "path"} if own else None,  # a server of one's own has no name for each bucket
            ),
            **keys,
        )
    except ValueError as error:
        raise ConfigError(f"backup.s3: {error}") from None


def _secret(path: str, name: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"backup.s3.{name}: cannot read {path}: {why}") from None
