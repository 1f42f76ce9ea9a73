"""`python -m yolov7` is the `yolov7` command."""

import sys

from yolov7.cli import main

sys.exit(main())
