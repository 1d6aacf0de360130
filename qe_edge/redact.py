"""Keys, tokens and passwords taken out of whatever is printed or kept in a file."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
# What calls itself a secret. A bare `key` names too much else, but for a URL's query.
_NAMED = (
    r"(?:[\w-]*[_-])?(?:token|secret|password|passwd|authorization)"
    r"|[\w-]*(?:api|access|auth|private|subscription)[_-]?key"
)
_SECRET_NAME = re.compile(_NAMED, re.IGNORECASE)
_PATTERNS = [
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"(://[^/\s:@]*):[^/\s]*@", rf"\1:{HIDDEN}@"),  # a URL's password, which may itself hold an @
        (r"([?&](?:[\w-]*[_-])?(?:key|token|secret|password|sig|signature)=)[^&\s\"']+", rf"\1{HIDDEN}"),
        (r"\b(bearer)\s+[\w.~+/=-]{8,}", rf"\1 {HIDDEN}"),
        (rf"\b((?:{_NAMED})[\"']?\s*[:=]\s*[\"']?)(?!bearer )[^\s\"',}}&]+", rf"\1{HIDDEN}"),
        # Keys of several services, by how they begin.
        (r"\b(?:sk-|hf_|gsk_|xai-|nvapi-|pplx-|ghp_)[\w-]{12,}|\bAIza[\w-]{20,}", HIDDEN),
    )
]
_VARIABLE = re.compile(r"\w*(?:KEY|TOKEN|SECRET|PASSWORD|AUTH)", re.IGNORECASE)
# A shorter value is a word like `none`, which also stands where it is no secret.
_SHORTEST = 6


class Secrets:
    """Known secrets, to be taken out of texts that may repeat them."""

    def __init__(self, *values: str):
        self._values = sorted({value for value in values if len(value) >= _SHORTEST}, key=len, reverse=True)

    def hide(self, text: object) -> str:
        """The text without them, and without whatever else looks like a secret."""
        hidden = str(text)
        for value in self._values:
            hidden = hidden.replace(value, HIDDEN)
        for pattern, replacement in _PATTERNS:
            hidden = pattern.sub(replacement, hidden)
        return hidden


def redact(value: Any) -> Any:
    """A text, or any JSON value, without the secrets that it shows or that the environment holds."""
    return _redact(value, Secrets(*_of_environment()))


def _of_environment() -> list[str]:
    values = [value.strip() for name, value in os.environ.items() if _VARIABLE.fullmatch(name)]
    # user:password, of which the password alone may be repeated
    return values + [value.partition(":")[2] for value in values]


def _redact(value: Any, secrets: Secrets) -> Any:
    if isinstance(value, str):
        return secrets.hide(value)
    if isinstance(value, dict):
        return {
            name: HIDDEN if _is_secret(name) and isinstance(part, str) and part else _redact(part, secrets)
            for name, part in value.items()
        }
    if isinstance(value, list | tuple):
        # `--token VALUE`, as a command line has it
        return [
            HIDDEN
            if isinstance(name, str) and name.startswith("--") and _is_secret(name[2:])
            else _redact(part, secrets)
            for name, part in zip(["", *value], value, strict=False)
        ]
    return value


def _is_secret(name: object) -> bool:
    return isinstance(name, str) and _SECRET_NAME.fullmatch(name) is not None
