"""What an http or https address answers, within bounds of size and time.

A user and password in the address are sent to its host alone, and stand in no message.
"""

import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from http.client import HTTPException, HTTPMessage, HTTPResponse
from queue import Empty, Queue
from threading import Thread
from typing import IO
from urllib.parse import quote, unquote, urlsplit

from yolov7.errors import UserError
from yolov7.text import one_line, split_login, without_secrets

LARGEST = 2**28  # bytes of an image
TIMEOUT_S = 10.0  # until an image's server has to answer, and to go on
SLOWEST = 1000  # bytes per second, over each such time
CHUNK = 2**16
# What urllib raises: no connection, an address that is none, an answer that is not HTTP.
REFUSALS = (OSError, ValueError, HTTPException)

Answer = HTTPResponse | urllib.error.HTTPError


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows where a server sends us, but not away from HTTPS, nor to FTP."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("https", req.type):
            raise urllib.error.URLError(f"it sends us to {one_line(newurl)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def answer_to(request: urllib.request.Request, patience: float) -> Answer:
    """The answer to a request, of which nothing but the head has been read.

    Args:
        request: What is asked.
        patience: Seconds within which the head has to come, however slowly it drips.

    Raises:
        OSError, ValueError, HTTPException: `REFUSALS`: there is none. An answer of 400 or more is
            one, returned as it is.
    """
    answers: Queue[Answer | Exception] = Queue()

    def ask() -> None:
        try:
            answers.put(urllib.request.build_opener(_Redirects).open(request, timeout=patience))
        except Exception as error:
            answers.put(error)

    Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=patience)
    except Empty:
        raise TimeoutError(f"no answer within {patience:.0f} s") from None
    if isinstance(answer, HTTPResponse | urllib.error.HTTPError):
        return answer
    raise answer


def chunks(answer: Answer, patience: float, slowest: float) -> Iterator[bytes]:
    """What comes of an answer, as long as it comes at some speed.

    Args:
        answer: Whose body is read.
        patience: Seconds over which the speed is taken.
        slowest: Bytes per second.

    Raises:
        OSError, ValueError, HTTPException: `REFUSALS`: it was cut off, or is too slow.
    """
    since, received = time.monotonic(), 0
    while chunk := answer.read1(CHUNK):
        yield chunk
        received += len(chunk)
        seconds = time.monotonic() - since
        if seconds > patience:
            if received < slowest * seconds:
                raise TimeoutError(f"too slow, {received} bytes in {seconds:.0f} s")
            since, received = time.monotonic(), 0


def open_url(address: str) -> HTTPResponse:
    """The answer to an address, of which nothing but the head has been read.

    Raises:
        OSError, ValueError, HTTPException: `REFUSALS`: there is none, or it is none of what was
            asked for.
    """
    url, login = split_login(address)
    parts = urlsplit(url)
    # Letters beyond ASCII as browsers send them.
    path, query = quote(parts.path, safe="/%:@!$&'()*+,;=~"), quote(parts.query, safe="/%?=&+,;:@")
    request = urllib.request.Request(parts._replace(path=path, query=query).geturl())
    if login:
        token = b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    answer = answer_to(request, TIMEOUT_S)
    if isinstance(answer, urllib.error.HTTPError):
        raise answer
    return answer


def fetch(address: str) -> bytes:
    """The whole answer to an address.

    Raises:
        UserError: There is none, it is too large, or comes too slowly.
    """
    name = without_secrets(address)
    data = bytearray()
    try:
        with open_url(address) as answer:
            for chunk in chunks(answer, TIMEOUT_S, SLOWEST):
                data += chunk
                if len(data) > LARGEST:
                    raise UserError(
                        f"{name}: over the limit of {LARGEST >> 20} MB: download it yourself"
                    )
            if answer.length:
                raise ConnectionError(f"it ended {answer.length} bytes too early")
    except REFUSALS as error:
        raise unreachable(name, error) from None
    return bytes(data)


def unreachable(name: str, error: Exception) -> UserError:
    """The error that says why an address gave nothing."""
    return UserError(f"{name}: {reason_of(error)}: check the address and the connection")


def reason_of(error: Exception) -> str:
    """One of `REFUSALS` in a line that is never empty."""
    return one_line(getattr(error, "reason", None) or str(error) or type(error).__name__)
