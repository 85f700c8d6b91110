"""Open `s3://` addresses as the `aws` command does: literal keys, profiles, roles and other endpoints.

pyarrow reads and writes the objects; botocore finds endpoint, region and those credentials that
pyarrow's own library does not know (SSO, roles of profiles, programs).
"""

import functools
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ray_detox.errors import ConfigError, first_line

OPTIONS = ("endpoint_override", "scheme", "region")
"""Parameters that an address may end with, as in pyarrow."""
OWN_CREDENTIALS = frozenset({"sso", "assume-role", "custom-process", "login"})
"""Sources of credentials of which pyarrow knows less than botocore."""
_ADVICE = (
    (("ExpiredToken", "TokenRefreshRequired"), "The credentials have expired: sign in again"),
    (
        (
            "INVALID_ACCESS_KEY_ID",
            "InvalidAccessKeyId",
            "SIGNATURE_DOES_NOT_MATCH",
            "SignatureDoes",
        ),
        "Correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile",
    ),
    (("KMS", "kms:"), "Allow the role or user kms:Decrypt and kms:GenerateDataKey for this key"),
    (
        ("InvalidObjectState", "INVALID_OBJECT_STATE"),
        "The object is in an archive (Glacier): restore it with aws s3api restore-object",
    ),
    (
        ("HTTP status 301", "PermanentRedirect", "AuthorizationHeaderMalformed"),
        "The bucket is in another region: set AWS_REGION to the one that `aws s3api "
        "get-bucket-location` shows, or leave it out",
    ),
    (("RequestTimeTooSkewed", "REQUEST_TIME_TOO_SKEWED"), "Set the clock of this machine"),
    (
        ("NO_SUCH_BUCKET", "NoSuchBucket"),
        "Check the bucket's name in s3://BUCKET/KEY, and the endpoint",
    ),
    (
        ("Path does not exist", "NO_SUCH_KEY", "NoSuchKey"),
        "Check the key with `aws s3 ls`; the options of an address are " + ", ".join(OPTIONS),
    ),
    (
        ("ACCESS_DENIED", "AccessDenied", "HTTP status 403", "code: 403"),
        "Sign in if you are not (AWS_PROFILE, or aws configure); allow the role or user s3:GetObject and "
        "s3:ListBucket; if `aws s3 ls` works, export its "
        "credentials (eval $(aws configure export-credentials --format env)); from a bucket whose "
        "requester pays, copy the data with: aws s3 cp --request-payer requester",
    ),
)


def split_address(address: str) -> tuple[str, dict[str, str]]:
    """Return `bucket/key` of an address, and its options; a `?` that no option follows is of the key."""
    path, mark, query = address.removeprefix("s3://").rpartition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    if mark and pairs and all(name in OPTIONS for name, _ in pairs):
        return path.strip("/"), dict(pairs)
    return address.removeprefix("s3://").strip("/"), {}


def same_options(address: str, path: str) -> str:
    """Return the address of `bucket/key` with the options of another address."""
    _, options = split_address(address)
    query = address.rpartition("?")[2] if options else ""
    return f"s3://{path}?{query}" if query else f"s3://{path}"


def open_s3(address: str) -> tuple[Any, str]:
    """Return a pyarrow file system for an `s3://` address, and `bucket/key` in it.

    Raises:
        ConfigError: there are no credentials, or the address is none.
    """
    from pyarrow import fs

    path, options = split_address(address)
    bucket = path.partition("/")[0]
    if not bucket:
        raise ConfigError(f"{address} names no bucket; expected s3://BUCKET/KEY.")
    if "//" in path:
        raise ConfigError(
            f"{address} has an empty part between two slashes, which cannot be read. Remove one slash; if "
            "it is part of the key, copy the objects to another key with: aws s3 cp --recursive"
        )
    found = _from_botocore(address)
    endpoint = options.get("endpoint_override") or found.get("endpoint_override")
    arguments = found | options
    if "region" not in options and not endpoint:
        try:
            arguments["region"] = fs.resolve_s3_region(bucket)
        except (OSError, ValueError):  # without network, or with a bucket that does not exist
            arguments.setdefault("region", "us-east-1")
    arguments.setdefault("region", "us-east-1")
    if endpoint and "://" in endpoint:
        parts = urlsplit(endpoint)
        arguments["endpoint_override"] = parts.netloc
        arguments["scheme"] = options.get("scheme", parts.scheme)
    return fs.S3FileSystem(**arguments), path


def _from_botocore(address: str) -> dict[str, str]:
    """Return the arguments of `S3FileSystem` that the environment and ~/.aws say."""
    import botocore.session

    profile = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    found = {}
    try:
        session = botocore.session.get_session()
        region = session.get_config_variable("region")
        if region:
            found["region"] = region
        credentials = session.get_credentials()
        if credentials is not None and credentials.method in OWN_CREDENTIALS:
            frozen = credentials.get_frozen_credentials()
            found |= {"access_key": frozen.access_key, "secret_key": frozen.secret_key}
            if frozen.token:
                found["session_token"] = frozen.token
        endpoint = _endpoint(region or "us-east-1", _aws_settings())
    except Exception as error:  # of any kind: what variables, ~/.aws and its programs say
        raise ConfigError(f"{address} cannot be opened: {in_words(error, profile)}.") from None
    if not (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        found["endpoint_override"] = endpoint
    return found


def _aws_settings() -> tuple[Any, ...]:
    """Return what decides the endpoint: variables of the environment, and the state of ~/.aws/config."""
    names = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
    more = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CONFIG_FILE", "HOME")
    file = Path(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser()
    state = file.stat().st_mtime_ns if file.is_file() else 0
    return (*(os.environ.get(name) for name in (*names, *more)), state)


@functools.lru_cache(maxsize=16)
def _endpoint(region: str, settings: tuple[Any, ...]) -> str:
    """Return the address of S3 for these settings; kept, because a client takes a second to make."""
    import botocore.session

    # Without credentials: none are used to find the address.
    client = botocore.session.get_session().create_client(
        "s3", region_name=region, aws_access_key_id="none", aws_secret_access_key="none"
    )
    return str(client.meta.endpoint_url)


def in_words(error: Exception, profile: str) -> str:
    """Describe why botocore has no credentials, with the command that helps; without a full stop."""
    kind = type(error).__name__
    if "SSO" in kind or kind in ("TokenRetrievalError", "LoginRefreshTokenExpired"):
        return (
            f"the sign-in of the AWS profile {profile!r} is missing or has expired. Sign in with: "
            f"aws sso login --profile {profile}"
        )
    if kind == "ProfileNotFound":
        return (
            f"the AWS profile {profile!r} does not exist. Set AWS_PROFILE to one of those that "
            "`aws configure list-profiles` shows"
        )
    if kind == "NoRegionError":
        return f"no AWS region is set. Set AWS_REGION, or region in the AWS profile {profile!r}"
    if "Invalid endpoint" in str(error):
        return (
            f"{first_line(error)}. Set AWS_ENDPOINT_URL, or endpoint_url of the AWS profile {profile!r}, to "
            "an address such as http://127.0.0.1:9000"
        )
    if isinstance(error, ValueError | FileNotFoundError):
        return (
            f"the program in credential_process of the AWS profile {profile!r} cannot be used "
            f"({first_line(error)}). Correct it in ~/.aws/config, or choose another AWS_PROFILE"
        )
    response = getattr(error, "response", None)
    if response is not None:
        code = response.get("Error", {}).get("Code", "refused")
        return (
            f"AWS refused {error.operation_name} for the profile {profile!r} ({code}). Allow it in the "  # type: ignore[attr-defined]
            "role's trust policy, or choose another AWS_PROFILE; `aws sts get-caller-identity` shows "
            "the same error"
        )
    return f"{first_line(error)} (AWS profile {profile!r})"


def advice(error: Exception) -> str:
    """Return what helps against an error of pyarrow's S3, without a full stop."""
    text = str(error)
    for marks, sentence in _ADVICE:
        if any(mark in text for mark in marks):
            return sentence
    return "Check the address, the region and the credentials"
