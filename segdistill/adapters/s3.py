"""A bucket to read from: outages are waited for, and every other failure is one sentence."""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from segdistill.adapters.objects import CHUNK_BYTES, LIST_LIMIT, MissingObject, write_chunks
from segdistill.errors import UserError
from segdistill.files import MIB
from segdistill.patience import Patience
from segdistill.secrets import masked_text

try:
    import boto3
    from botocore import UNSIGNED, exceptions
    from botocore.config import Config
except ModuleNotFoundError as error:
    raise UserError(f"{error.name}: not installed; S3 needs the extra 'pipeline' of segdistill") from None

T = TypeVar("T")

AWS = re.compile(r"s3(-[a-z0-9-]+)?(\.dualstack)?(\.[a-z]{2}(-[a-z]+)+-\d)?\.amazonaws\.com(\.cn)?")

DENIED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired", "401"}
FORBIDDEN = {"AccessDenied", "AllAccessDisabled", "Forbidden", "403"}
NO_KEY = {"NoSuchKey", "404", "NotFound"}
BUSY = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}


class Bucket:
    """Objects of one bucket, read by several threads at a time.

    The credentials are boto3's to find: the environment, a mounted file or web identity, a node's role. They go to
    AWS, and to the server that boto3 would ask by itself (``AWS_ENDPOINT_URL_S3``): whoever can write a repository can
    name any server in it, and a request shows that server the session's token.

    Args:
        name: the bucket.
        endpoint: the server's address; None for what the environment says, and AWS if it says nothing.
        region: None for what the environment says.
        tls: whether to verify the server's certificate, or the file of the authorities to trust.
        anonymous: read without credentials.
        connections: how many threads will read.
        patience: how many seconds to wait, object by object, for a server that is away or overloaded.
    """

    def __init__(
        self, name: str, *, endpoint: str | None = None, region: str | None = None, tls: bool | str = True,
        anonymous: bool = False, connections: int = 16, patience: float = 120.0,
    ) -> None:  # fmt: skip
        self.name, self._stopped = name, threading.Event()
        # The retries are ours: boto3 counts attempts, and an outage lasts seconds. The caller verifies what comes.
        settings: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "response_checksum_validation": "when_required",
            "max_pool_connections": connections,
            "connect_timeout": 10,
            "read_timeout": 60,
        }
        if anonymous:
            settings["signature_version"] = UNSIGNED
        try:
            session = boto3.session.Session(region_name=region)
            self._client = session.client("s3", endpoint_url=endpoint, verify=tls, config=Config(**settings))
            allowed = session.client("s3", config=Config(**settings)).meta.endpoint_url
        except (ValueError, OSError, exceptions.BotoCoreError) as error:
            raise UserError(f"s3://{name}: {_one_line(error)}") from None
        self.endpoint = masked_text(self._client.meta.endpoint_url)
        self._patience = Patience(self.endpoint, patience, self._stopped)
        if not anonymous:
            _require_trust(self._client.meta.endpoint_url, allowed, tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()

    def url(self, key: str) -> str:
        """An object's name for people."""
        return f"s3://{self.name}/{key}"

    def read(self, key: str) -> bytes:
        """A small object, whole."""

        def once() -> bytes:
            content = bytearray()
            for chunk in self._chunks(key):
                content += chunk
                if len(content) > LIST_LIMIT:
                    raise UserError(f"{self.url(key)}: at most {LIST_LIMIT / MIB:g} MiB are read of such an object")
            return bytes(content)

        return self._ask(key, once)

    def download(self, key: str, target: Path) -> str:
        """Streams an object into a file; returns its md5."""
        return self._ask(key, lambda: write_chunks(self._chunks(key), target))

    def _chunks(self, key: str) -> Iterator[bytes]:
        body = self._client.get_object(Bucket=self.name, Key=key)["Body"]
        try:
            for chunk in body.iter_chunks(CHUNK_BYTES):
                self._patience.pause(0)  # the store may have been closed
                yield chunk
        finally:
            body.close()

    def _ask(self, key: str, act: Callable[[], T]) -> T:
        try:
            return self._patience.ask(act, _outage)
        except (exceptions.ClientError, exceptions.BotoCoreError) as error:
            raise self._sentence(key, error) from None

    def _sentence(self, key: str, error: Exception) -> UserError:
        """What a failure that no waiting mends means for the user."""
        if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
            return UserError(
                f"s3://{self.name}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or mount one of the other sources that boto3 knows"
            )
        if isinstance(error, exceptions.SSLError):
            return UserError(f"{self.endpoint}: its TLS certificate is not trusted; set AWS_CA_BUNDLE to its authority")
        if not isinstance(error, exceptions.ClientError):
            return UserError(f"{self.url(key)}: {_one_line(error)}")
        code, message = _code(error), _one_line(error.response.get("Error", {}).get("Message", ""))
        if code in DENIED:
            return UserError(
                f"s3://{self.name}: {self.endpoint} does not accept the S3 credentials ({code}); "
                "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
            )
        if code in FORBIDDEN:
            return UserError(
                f"{self.url(key)}: {self.endpoint} forbids reading it with these S3 credentials ({code}), "
                "which it also says of a missing object to those who may not list the bucket"
            )
        if code == "NoSuchBucket":
            return UserError(f"s3://{self.name}: {self.endpoint} has no such bucket")
        if code in NO_KEY:
            return MissingObject(f"{self.url(key)}: {self.endpoint} has no such object")
        return UserError(f"{self.url(key)}: {self.endpoint} answered {code}{f': {message}' if message else ''}")


def _require_trust(endpoint: str, allowed: str, tls: bool | str) -> None:
    """Raises a UserError where credentials would go to a server that only a repository names, or to its impostor."""
    asked, own = urlsplit(endpoint), urlsplit(allowed)
    host = asked.hostname or ""
    is_aws = asked.scheme == "https" and AWS.fullmatch(host)  # others' gateways are below amazonaws.com, too
    if not is_aws and (asked.scheme, asked.netloc.lower()) != (own.scheme, own.netloc.lower()):
        raise UserError(
            f"{masked_text(endpoint)}: named by the repository's DVC remote, and S3 credentials go to no server that "
            f"you did not name yourself; if they may go there, set AWS_ENDPOINT_URL_S3={masked_text(endpoint)}"
        )
    if asked.scheme == "https" and tls is False:
        raise UserError(
            f"{masked_text(endpoint)}: the repository's DVC remote has ssl_verify off, and S3 credentials go to no "
            "server whose certificate is not verified; remove it there, and set AWS_CA_BUNDLE to a private authority"
        )


def _outage(error: Exception) -> str | None:
    """Why waiting may help, or None where it cannot."""
    if isinstance(error, exceptions.ClientError):
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return f"S3 answers {code}" if status >= 500 or status == 429 or code in BUSY else None
    if isinstance(error, exceptions.SSLError):
        return None
    if isinstance(error, exceptions.ConnectionError):
        return "S3 cannot be reached"
    if isinstance(error, exceptions.HTTPClientError | exceptions.IncompleteReadError):
        return "the connection to S3 broke"
    return None


def _code(error: Exception) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", "an error without a code"))


def _one_line(value: object) -> str:
    return masked_text(" ".join(str(value).split()).rstrip("."))
