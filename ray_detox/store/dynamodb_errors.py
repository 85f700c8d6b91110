"""Conversion of AWS and connection errors to a `StoreError` that says what to do."""

import os
from typing import Any
from urllib.parse import urlsplit

from botocore import exceptions

from ray_detox.store.errors import StoreError

_NO_CREDENTIALS = (
    "ExpiredToken",
    "ExpiredTokenException",
    "UnrecognizedClientException",
    "InvalidSignatureException",
    "IncompleteSignatureException",
    "InvalidClientTokenId",
    "MissingAuthenticationTokenException",
)
_TOO_BUSY = (
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "ThrottlingException",
)


class TableExists(StoreError):
    """A table that should be created exists, or is being changed."""


def to_store_error(
    error: Exception, operation: str, table: str, region: str | None, endpoint_url: str | None
) -> StoreError:
    """Convert an error of boto3 to a `StoreError`.

    The message leaves out AWS's own, and callers raise `from None`, to keep secrets out of logs: AWS
    answers a refused signature with the whole request, including the session token, and a URL may
    contain a password.
    """
    if isinstance(error, exceptions.NoRegionError):
        return StoreError(
            "No AWS region is set. Set results.region, AWS_REGION or AWS_DEFAULT_REGION."
        )
    if isinstance(
        error,
        exceptions.SSOError | exceptions.SSOTokenLoadError | exceptions.TokenRetrievalError,
    ):
        profile = os.environ.get("AWS_PROFILE", "default")
        return StoreError(
            f"The sign-in of the AWS profile {profile!r} is missing or has expired. Sign in with: aws sso "
            f"login --profile {profile}"
        )
    if isinstance(error, exceptions.ClientError) and error.operation_name == "AssumeRole":
        return StoreError(
            f"AWS refused AssumeRole ({error.response['Error']['Code']}) for the profile "
            f"{os.environ.get('AWS_PROFILE', 'default')!r}. Allow it in the role's trust policy, or "
            "choose another AWS_PROFILE."
        )
    if isinstance(
        error,
        exceptions.NoCredentialsError
        | exceptions.PartialCredentialsError
        | exceptions.CredentialRetrievalError,
    ):
        return StoreError(
            "No AWS credentials were found, or they are incomplete. Sign in (aws configure, or "
            "a role), or set results.store=sqlite to keep results locally."
        )
    if isinstance(error, exceptions.ProfileNotFound):
        return StoreError("The profile in AWS_PROFILE does not exist in the AWS configuration.")
    if isinstance(error, exceptions.ParamValidationError):
        return StoreError(f"{table!r} is not a valid name of a DynamoDB table.")
    if isinstance(error, exceptions.ClientError):
        return _refusal(error.response["Error"]["Code"], operation, table, region)
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError):
        return StoreError(
            f"DynamoDB could not be reached{_at(endpoint_url)}. Check the network, the region and "
            "results.endpoint_url."
        )
    if isinstance(error, ValueError):
        if endpoint_url is not None:
            return StoreError(
                f"results.endpoint_url is not a valid address{_at(endpoint_url)}; "
                "expected one such as http://127.0.0.1:8000."
            )
        # boto3 makes the address from the region, unless a variable has one.
        return StoreError(
            "The address of DynamoDB is not valid. It comes from AWS_ENDPOINT_URL, else from "
            "results.region or AWS_REGION; expected an address such as http://127.0.0.1:8000, and a "
            "region such as us-east-1."
        )
    return StoreError(f"DynamoDB could not be used ({operation}: {type(error).__name__}).")


def _refusal(code: str, operation: str, table: str, region: Any) -> StoreError:
    if code == "ResourceNotFoundException":
        return StoreError(
            f"Table {table!r} was not found in {region}. Create it (ray-detox table create, or "
            "cluster/results.yaml), or set results.store=sqlite to keep results locally."
        )
    if code == "ResourceInUseException":
        return TableExists(f"Table {table!r} exists in {region}, or is being changed.")
    if code in ("AccessDeniedException", "AccessDenied"):
        return StoreError(
            f"AWS does not allow {operation} on table {table!r} in {region}. "
            "Add the permission to the role or user that runs this."
        )
    if code in _NO_CREDENTIALS:
        return StoreError(f"AWS refused the credentials ({code}). Sign in again.")
    if code in _TOO_BUSY:
        return too_busy(table)
    if code == "ValidationException":
        return StoreError(
            f"DynamoDB refused {operation} on table {table!r} as invalid. "
            "Check its name and its keys."
        )
    return StoreError(f"DynamoDB refused {operation} on table {table!r} ({code}).")


def too_busy(table: str) -> StoreError:
    """Return the error for a table that takes no more requests for now."""
    return StoreError(f"Table {table!r} is too busy. Raise its capacity, or try again later.")


def _at(endpoint_url: str | None) -> str:
    """Return ` at HOST` for an endpoint, without user name and password; empty if none is set."""
    if not endpoint_url:
        return ""
    try:
        host = urlsplit(endpoint_url).netloc.rpartition("@")[2]
    except ValueError:
        return ""
    return f" at {host}" if host else ""
