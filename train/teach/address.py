"""The address of an endpoint, looked at before anything is sent to it."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from qe_edge.errors import BadArgument, NotInstalled
from qe_edge.redact import redact
from qe_edge.train.teach.config import DEFAULT_KEY

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


class Address(NamedTuple):
    """A URL in its parts. `base` has neither user, password nor query, so that it may be shown."""

    base: str
    query: dict[str, str]
    user: str
    password: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """The parts of `https://user:password@host/path?api-version=…`, of which host and path must be there.

        Raises:
            BadArgument: it is no address of HTTP.
        """
        try:
            parts = urlsplit(url.strip())
            port = parts.port  # a ValueError if it is none
        except ValueError as error:
            raise BadArgument(f"the endpoint {redact(url)!r} is no address: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise BadArgument(
                f"the endpoint {redact(url)!r} is no address; write http:// or https://, the host and the "
                "path that stands before /chat/completions, such as http://localhost:8080/v1"
            )
        host = parts.netloc.rpartition("@")[2]
        return cls(
            f"{parts.scheme}://{host}{parts.path.rstrip('/')}",
            dict(parse_qsl(parts.query, keep_blank_values=True)),
            unquote(parts.username or ""),
            unquote(parts.password or ""),
        )

    def client(self) -> Any:
        """An HTTP client for it, through the proxy that the environment names.

        Raises:
            BadArgument: that is no proxy's address.
            NotInstalled: a SOCKS proxy needs a package that isn't there.
        """
        import openai

        auth = (self.user, self.password) if self.user or self.password else None
        try:
            return openai.DefaultAsyncHttpxClient(auth=auth)
        except ImportError as error:
            raise NotInstalled(
                f"the proxy in {_named_proxies()} needs a package ({error}); "
                "install it with: pip install 'httpx[socks]', or unset the variable"
            ) from None
        except Exception as error:  # httpx.InvalidURL is no ValueError
            raise BadArgument(
                f"the proxy in {_named_proxies()} can't be used: {redact(str(error))}; "
                "correct the variable, or unset it"
            ) from None


def read_key(variable: str) -> str:
    """The API key in an environment variable; `none` without one, since local servers want no key.

    Raises:
        BadArgument: it holds what no HTTP header can hold, or isn't there though it was named.
    """
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", key):  # it is not shown: what is wrong may be one character of a real key
        raise BadArgument(
            f"the key in {variable} holds a blank, a line break or another character that can't be sent; "
            "set it again"
        )
    if not key and variable != DEFAULT_KEY:
        # Not shown either: somebody may have named the key instead.
        raise BadArgument("the environment variable that --api-key-env names is not set")
    return key or "none"


def _named_proxies() -> str:
    named = [name for name in os.environ if name.upper() in _PROXIES]
    return " or ".join(sorted(named)) or "the system's settings"
