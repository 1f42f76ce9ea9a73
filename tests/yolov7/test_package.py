"""What an installation brings, and what `import yolov7` shows."""

import subprocess
import sys
from pathlib import Path

import pytest

import yolov7

ROOT = Path(yolov7.__file__).parent.parent


def test_types_and_assets_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without py.typed, everything of ours is Any to a user's type checker."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    distribution.include_package_data = False  # only what pyproject.toml states
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    packed = {Path(folder, name) for _, folder, _, names in build.data_files for name in names}
    there = {
        path.relative_to(ROOT)
        for path in (ROOT / "yolov7").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert Path("yolov7/py.typed") in packed
    assert there <= packed


def test_public_names_are_shown_and_importing_stays_cheap() -> None:
    """Before any of them is used; completion in notebooks asks for `dir`."""
    code = (
        "import sys, yolov7; print(*dir(yolov7)); print(*sys.modules);"
        "print(all(hasattr(yolov7, name) for name in yolov7.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, modules, there = done.stdout.splitlines()
    assert set(shown.split()) >= {*yolov7.__all__, "__version__"}
    assert not {"Any", "TYPE_CHECKING", "import_module"} & set(shown.split())
    assert not {"torch", "cv2", "numpy"} & set(modules.split())
    assert there == "True"


def test_an_unknown_name_is_said() -> None:
    with pytest.raises(AttributeError, match="module 'yolov7' has no attribute 'Yolo'"):
        _ = yolov7.Yolo
