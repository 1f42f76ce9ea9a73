"""Text from outside, made fit to be shown and to name files.

The names of files and classes, the answers of servers and the texts in files may hold anything:
sequences that command a terminal, halves of letters at which OpenCV ends the process, passwords.
"""

import re
from urllib.parse import urlsplit

# Joiners within the letters of some scripts, and within emoji: not printable by themselves.
_JOINERS = "\u200c\u200d"
_LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")
_SECRET = re.compile(r"(?i)\b((?:pass|passwd|password|pwd|token|secret|api_?key)=)[^&#/\s]+")
_UNNAMABLE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*\ud800-\udfff]')
LONGEST_NAME = 200  # bytes of the 255 that file systems take: a number and a suffix follow


def printable(text: object) -> str:
    r"""`text` as one line for a terminal, a message or a picture, without passwords.

    White space becomes spaces, and whatever else cannot be shown is written as Python would write
    it: a byte of a file name that is not UTF-8 as `\xe9`.
    """
    line = str(text)
    if not line.isprintable():
        line = "".join(map(_shown, line))
    return without_secrets(line)


def one_line(text: object) -> str:
    """`text`, which comes from a file or a library, short enough to be part of a message."""
    return printable(str(text)[:120])


def _shown(letter: str) -> str:
    if letter.isprintable() or letter in _JOINERS:
        return letter
    if letter.isspace():
        return " "
    if "\udc80" <= letter <= "\udcff":  # what Python makes of a byte that is not UTF-8
        return f"\\x{ord(letter) & 0xFF:02x}"
    return letter.encode("unicode_escape").decode()


def without_secrets(text: str) -> str:
    """`text` without the users and passwords of the addresses in it."""
    if "://" not in text:
        return text
    return _SECRET.sub(r"\1***", _LOGIN.sub("***@", text))


def split_login(url: str) -> tuple[str, str]:
    """An address without its user and password, and these as `user:password`, empty for none."""
    login, at, host = urlsplit(url).netloc.rpartition("@")
    return (url.replace(f"{login}{at}{host}", host, 1), login) if at else (url, "")


def file_name(text: str) -> str:
    """`text` as the name of a file or folder, on every system and within its folder."""
    plain = _UNNAMABLE.sub("-", text).encode()[:LONGEST_NAME].decode(errors="ignore")
    return plain.strip(" .") or "-"


def plot_text(text: str) -> str:
    """`text` for matplotlib, which would read what stands between dollars as mathematics."""
    return printable(text).replace("$", r"\$")


def counted(number: int, noun: str) -> str:
    """`1 bus`, `2 buses`: so many of what a noun calls."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith(("ss", "us", "x", "ch", "sh")):
        return f"{number} {noun}es"
    return f"{number} {noun}" if noun.endswith("s") else f"{number} {noun}s"
