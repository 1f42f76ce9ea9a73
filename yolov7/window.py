"""A window on the screen."""

import subprocess
import sys

import cv2

from yolov7.errors import UserError
from yolov7.letterbox import Image
from yolov7.text import printable

TIMEOUT_S = 30


class Window:
    """Shows pictures, one in the place of the other.

    Args:
        title: Stands above it.

    Raises:
        UserError: There is no display.
    """

    def __init__(self, title: str) -> None:
        self.title = printable(title)
        if sys.platform == "linux" and not _opens():
            raise _no_display()

    def show(self, picture: Image, *, wait: int) -> str | None:
        """Show a picture for at least so many milliseconds.

        Returns:
            The key that was pressed, "closed" if the window was, else None.
        """
        try:
            cv2.imshow(self.title, picture)
            key = cv2.waitKey(wait)
            if key >= 0:
                return chr(key & 0xFF)
            visible = cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE)
            return None if visible > 0 else "closed"
        except cv2.error:
            raise _no_display() from None

    def close(self) -> None:
        """Close it, if the user has not."""
        if cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) > 0:
            cv2.destroyWindow(self.title)


def _opens() -> bool:
    """Whether another process can open a window: Qt ends the one that cannot."""
    words = [sys.executable, "-c", "import cv2; cv2.namedWindow('yolov7')"]
    try:
        done = subprocess.run(words, capture_output=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _no_display() -> UserError:
    return UserError("show needs a display, and none can be opened here: leave it out")
