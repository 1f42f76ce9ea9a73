"""The pages of the site that lie outside of docs/, the README first, and examples as pages.

Links are written for the repository, where it is read too; here they are turned to the pages.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {  # file of the repository -> page
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "bench/README.md": "bench.md",
    "examples/camera.py": "camera.md",
    "examples/ray_batch.py": "ray.md",
}
LINK = re.compile(r"(\]\()([\w./-]+)((?:#[\w-]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        if source.endswith(".py"):
            text = f"# {source}\n```python\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    sources = {there: here for here, there in PAGES.items()}
    place = ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def turned(link: re.Match[str]) -> str:
        target = (place.parent / link[2]).resolve()
        if not target.is_relative_to(ROOT):
            return link[0]
        path = target.relative_to(ROOT).as_posix()
        page = PAGES.get(path) or path.removeprefix("docs/")
        return f"{link[1]}{page}{link[3]}"

    return LINK.sub(turned, markdown)
