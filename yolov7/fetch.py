"""What an http or https address answers, within bounds of size and time.

A user and password in the address are sent to its host alone, and stand in no message.
"""

import urllib.request
from base64 import b64encode
from http.client import HTTPException, HTTPResponse
from time import monotonic
from typing import NoReturn
from urllib.error import URLError
from urllib.parse import quote, unquote, urlsplit

from yolov7.errors import UserError
from yolov7.text import split_login, without_secrets

LARGEST = 2**28  # bytes
TIMEOUT_S = 10.0  # until a server has to answer, and to go on
SLOWEST = 1000  # bytes per second, once TIMEOUT_S have passed
CHUNK = 2**16
# What urllib raises: no connection, an address that is none, an answer that is not HTTP.
REFUSALS = (OSError, ValueError, HTTPException)


class _NoFtp(urllib.request.FTPHandler):
    """Redirections may lead to http and https alone."""

    def ftp_open(self, req: urllib.request.Request) -> NoReturn:
        """Refuse."""
        raise URLError(f"it leads to {req.type}")


def open_url(address: str) -> HTTPResponse:
    """The answer to an address, of which nothing has been read.

    Raises:
        OSError, ValueError, HTTPException: `REFUSALS`: there is none.
    """
    url, login = split_login(address)
    parts = urlsplit(url)
    # Letters beyond ASCII as browsers send them.
    path, query = quote(parts.path, safe="/%:@!$&'()*+,;=~"), quote(parts.query, safe="/%?=&+,;:@")
    request = urllib.request.Request(parts._replace(path=path, query=query).geturl())
    if login:
        token = b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    answer: HTTPResponse = urllib.request.build_opener(_NoFtp).open(request, timeout=TIMEOUT_S)
    return answer


def fetch(address: str) -> bytes:
    """The whole answer to an address.

    Raises:
        UserError: There is none, it is too large, or comes too slowly.
    """
    name = without_secrets(address)
    data = bytearray()
    start = monotonic()
    try:
        with open_url(address) as answer:
            while chunk := answer.read1(CHUNK):
                data += chunk
                waited = monotonic() - start
                if waited > TIMEOUT_S and len(data) < SLOWEST * waited:
                    raise TimeoutError(f"{len(data)} bytes in {waited:.0f} seconds")
                if len(data) > LARGEST:
                    raise UserError(
                        f"{name}: over the limit of {LARGEST >> 20} MB: download it yourself"
                    )
            if answer.length:
                raise ConnectionError(f"it ended {answer.length} bytes too early")
    except UserError:
        raise
    except REFUSALS as error:
        raise unreachable(name, error) from None
    return bytes(data)


def unreachable(name: str, error: Exception) -> UserError:
    """The error that says why an address gave nothing."""
    reason = getattr(error, "reason", None) or error
    return UserError(f"{name}: {reason}: check the address and the connection")
