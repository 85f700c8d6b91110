"""Credentials in addresses: found where a setting is read, and redacted wherever a text is shown.

An address of a run is stored with it and shown on the page, so it must hold no secret. Credentials
belong into the environment, a profile of the cloud's tools, or the role of the machine.
"""

import re
from typing import Any
from urllib.parse import unquote

REDACTED = "***"

_USER = re.compile(r"([\w+.-]{0,20})://([^\s/?#\"'<>]*)@")
"""User name and password, up to the last @ before the path."""
_SPLIT_PASSWORD = re.compile(r"(?<=://)[^\s/?#@:\"'<>]+:(?!\d{1,5}(?:[/?#\s]|$))[^\s\"'<>]{0,200}@")
"""A password with an unescaped slash, as many keys of AWS have; a port is none. The bound keeps the
time linear in the text."""
_PARAMETER = re.compile(r"([?&;#])([^\s?&;#=\"'<>]+)=([^\s&;#\"'<>]+)")
_SECRET_PARTS = (
    "secret",
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "token",
    "signature",
    "credential",
    "accesskey",
    "apikey",
    "accountkey",
    "privatekey",
)
_SECRET_NAMES = frozenset(
    {"sig", "key", "sas", "auth", "pass", "pw", "jwt", "hmac", "sessionid", "jsessionid"}
)
_PUBLIC_USERS = ("anonymous",)
"""Users that need no password: pyarrow reads public buckets of gs:// as this one."""
_CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
"""Azure's addresses are scheme://container@account/path: a name before the @ is no user."""


def redact(text: str) -> str:
    """Replace user names, passwords and secret parameters in the addresses of a text by `***`."""
    if "://" in text:
        text = _USER.sub(_redact_user, text)
        text = _SPLIT_PASSWORD.sub(f"{REDACTED}@", text)
    if "=" in text:
        text = _PARAMETER.sub(_redact_parameter, text)
    return text


def redact_tree(value: Any) -> Any:
    """Return a copy of JSON values with every text redacted; they may be nested deeply."""
    root = [value]
    todo: list[Any] = [root]
    while todo:
        node = todo.pop()
        for key, inner in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(inner, str):
                node[key] = redact(inner)
            elif isinstance(inner, dict | list):
                node[key] = inner.copy()
                todo.append(node[key])
    return root[0]


def has_credentials(address: str, *, is_host: bool = False) -> bool:
    """Return whether an address contains a user, a password or a parameter that is a secret.

    Args:
        address: a folder, a hub id or a URL.
        is_host: the address is a URL or `host:port`, so that `user:password@host` is one, too.
    """
    joined = "".join(address.split())  # white space would hide the rest of a password
    return redact(joined) != joined or (is_host and "://" not in joined and "@" in joined)


def credentials_in(name: str) -> str:
    """Say that a setting or an option is an address with credentials, and where they belong."""
    return (
        f"{name} is an address with credentials, and addresses are stored and shown. Leave them out: they "
        "belong into the environment (such as AWS_ACCESS_KEY_ID), a profile (AWS_PROFILE), or the role of "
        "the machine."
    )


def _redact_user(match: re.Match[str]) -> str:
    scheme, user = match[1], match[2]
    is_container = scheme.lower() in _CONTAINER_SCHEMES and not {":", "@"} & set(user)
    return match[0] if is_container or user in _PUBLIC_USERS else f"{scheme}://{REDACTED}@"


def _redact_parameter(match: re.Match[str]) -> str:
    name = re.sub(r"[^a-z0-9]", "", unquote(match[2]).lower())
    if name in _SECRET_NAMES or any(part in name for part in _SECRET_PARTS):
        return f"{match[1]}{match[2]}={REDACTED}"
    return match[0]
