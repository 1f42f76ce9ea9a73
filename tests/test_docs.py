"""The documents: what they link to is there, what they tell is true, what they show runs."""

import ast
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import pytest

import yolov7
from tests.train.conftest import write_split
from tests.yolov7.pictures import picture, write_video
from yolov7.cli import main
from yolov7.export import Settings, Suppression, write
from yolov7.export.report import input_port, output_ports
from yolov7.formats import FORMATS
from yolov7.model import create_model
from yolov7.train import loop
from yolov7.train.options import Train
from yolov7.train.report import Result
from yolov7.variants import VARIANTS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "README.md"])
PACKAGES = ("kernels", "yolov7", "train")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")


def prose(path: Path) -> str:
    """A document without what it shows of code."""
    return FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """What can be linked to in a document: its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in LINK.findall(prose(path)):
        there = path.parent / target if target else path
        assert there.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(there), f"{target} has no heading {anchor}"


def modules(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in (ROOT / folder).rglob("*.py"))


def variables(*folders: str) -> set[str]:
    """Environment variables that are read: strings and constants in statements with `environ`."""
    trees = [ast.parse(path.read_text()) for path in modules(*folders)]
    constants = {
        node.targets[0].id: node.value.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign)
        if isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
    }
    found = set()
    for tree in trees:
        for statement in (node for node in ast.walk(tree) if isinstance(node, ast.stmt)):
            own = [node for part in own_parts(statement) for node in ast.walk(part)]
            if any(isinstance(node, ast.Attribute) and node.attr == "environ" for node in own):
                named = [node.value for node in own if isinstance(node, ast.Constant)]
                named += [constants.get(node.id) for node in own if isinstance(node, ast.Name)]
                found |= {n for n in named if isinstance(n, str) and VARIABLE.fullmatch(n)}
    return found


def own_parts(statement: ast.stmt) -> Iterator[ast.AST]:
    """The expressions of a statement, without the statements that it holds."""
    yield from (n for n in ast.iter_child_nodes(statement) if not isinstance(n, ast.stmt))


def table() -> set[str]:
    """The variables of the table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Environment variables")[2]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_every_variable_is_in_the_table() -> None:
    read = variables(*PACKAGES)
    assert {"YOLOV7_CACHE", "TORCHINDUCTOR_CACHE_DIR", "RANK"} <= read  # the search finds some
    assert read <= table()
    assert table() <= read | variables("tests")


def test_floor_plan_is_that_of_the_house() -> None:
    """It names every module of yolov7/ and of its engines, and none that is not there."""
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Inside yolov7/")[2]
    (_, plan), *_ = FENCE.findall(text)
    house = ROOT / "yolov7"
    rooms = {path.stem for path in (*house.glob("*.py"), *house.glob("engine/**/*.py"))}
    rooms |= {path.parent.name for path in (*house.glob("*/*.py"), *house.glob("engine/*/*.py"))}
    hidden = {"__init__", "__main__", "assets", "kernels", "train"}
    starts = [re.split(r" {3,}", line.strip())[0] for line in plan.strip().splitlines()]
    named = {name for start in starts for name in re.findall(r"(\w+)(?:\.py|/|\b)", start)}
    assert named == rooms - hidden


def recipes(document: str) -> dict[str, str]:
    """Section of a document -> its Python."""
    _, *sections = re.split(r"^## ", (ROOT / "docs" / document).read_text(), flags=re.MULTILINE)
    blocks = {
        section.partition("\n")[0]: [
            code for language, code in FENCE.findall(section) if language == "python"
        ]
        for section in sections
    }
    return {name: "\n\n".join(found) for name, found in blocks.items() if found}


@pytest.fixture
def registries() -> Iterator[None]:
    """What a recipe adds is gone behind it."""
    before: list[tuple[dict[str, Any], dict[str, Any]]]
    before = [(registry, dict(registry)) for registry in (VARIANTS, FORMATS)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("name", recipes("extend.md"))
@pytest.mark.usefixtures("registries")
def test_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.py"
    file.write_text(recipes("extend.md")[name])
    runpy.run_path(str(file))


def imported(code: str) -> set[str]:
    """The packages that a program imports."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


README = (ROOT / "README.md").read_text()
GUIDES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("predict", "latency"))]
SHOWN = {
    f"{path.stem}-{number}": code
    for path in GUIDES
    for number, (language, code) in enumerate(FENCE.findall(path.read_text()))
    if language == "python" and "yolov7/assets" not in code
}


@pytest.mark.parametrize("name", SHOWN)
def test_detecting_runs_as_it_is_shown(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the embedded weights in the place of the published ones."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.avi", 3).rename("clip.mp4")
    cv2.imwrite("street.jpg", picture(64, 96))
    file = tmp_path / "shown.py"
    file.write_text(SHOWN[name].replace('"yolov7.pt"', '"blood-cells"'))
    runpy.run_path(str(file))


def test_readme_shows_what_its_program_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a pixel and a hundredth, which the processor decides."""
    found = re.search(
        r"```python\n(from yolov7 import Detector.*?)```\n```text\n(.*?)```", README, re.S
    )
    assert found is not None
    monkeypatch.chdir(ROOT)
    exec(compile(found[1], "README.md", "exec"), {})
    printed, shown = (re.split(r"[ :\n]+", text) for text in (capsys.readouterr().out, found[2]))
    assert len(printed) == len(shown)
    for word, other in zip(printed, shown, strict=True):
        if other[:1].isdigit():
            assert float(word) == pytest.approx(float(other), abs=0.011 if "." in other else 1.1)
        else:
            assert word == other


COMMAND = re.compile(r"(?:^|python -m |-m )(?:\$ )?yolov7 ([a-z][^\n`]*)", re.MULTILINE)
COMMANDS = sorted(
    {
        re.split(r"\s#|[|>]", command)[0].strip()
        for path in DOCUMENTS
        for _, block in FENCE.findall(path.read_text())
        for command in re.findall(COMMAND, block.replace("\\\n", " "))
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_what_the_command_line_takes(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb, *words = shlex.split(command)
    if words == ["..."]:
        words = []
    ran: list[Any] = []

    def run(options: Any) -> int:
        ran.append(options)
        return 0

    monkeypatch.setattr(import_module(f"yolov7.cli.{verb.replace('-', '_')}"), "run", run)
    with suppress(SystemExit):  # of --help
        main([verb, *(word for word in words if word != "...")])
    assert ran or words == ["--help"]


def test_servers_configuration_is_what_the_server_reads() -> None:
    """By the server's own schema, and with the ports of what the command beside it exports."""
    schema = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed"
    )
    text_format = import_module("google.protobuf.text_format")
    blocks = FENCE.findall((ROOT / "docs/deploy.md").read_text())
    (text,) = [code for language, code in blocks if language == "pbtxt"]
    config = text_format.Parse(text, schema.ModelConfig())
    model = create_model("yolov7")
    nms = Suppression(conf=0.25, iou=0.45, max_det=300)
    metadata = write._metadata(model, Settings(batch="dynamic", nms=nms))
    types = {"float32": schema.TYPE_FP32, "int32": schema.TYPE_INT32}
    ports = [input_port(metadata), *output_ports(metadata)]
    for stated, port in zip([*config.input, *config.output], ports, strict=True):
        dims = stated.reshape.shape if stated.HasField("reshape") else stated.dims
        assert (stated.name, stated.data_type) == (port.name, types[port.type])
        assert ["batch", *dims] == list(port.shape)


def test_site_builds(tmp_path: Path) -> None:
    """Strictly: every page is in the navigation, every link leads to one, every name is found."""
    pytest.importorskip("mkdocs", reason="mkdocs, the extra docs, is missing")
    words = ["build", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    api = (tmp_path / "site/api/index.html").read_text()
    assert 'id="yolov7.detector.Detector.stream"' in api
    assert 'id="train.loop.train"' in api


def test_public_names_are_in_the_reference_and_say_what_they_take() -> None:
    """Each parameter of a public function or class is in its docstring."""
    reference = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    public = {f"{getattr(yolov7, name).__module__}.{name}" for name in yolov7.__all__}
    assert public <= set(reference)
    for name in reference:
        module, _, attribute = name.rpartition(".")
        module = module if module.startswith("yolov7") else f"yolov7.{module}"
        found = getattr(import_module(module), attribute)
        said = inspect.getdoc(found) or ""
        assert said, name
        if inspect.isfunction(found):
            for parameter in inspect.signature(found).parameters:
                line = rf"^    \**{parameter}\b.*:"
                assert re.search(line, said, re.MULTILINE), f"{name}: {parameter}"


@pytest.mark.parametrize("name", recipes("train.md"))
def test_training_runs_as_it_is_shown(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model, for two epochs, on small images; loggers without a server."""
    code = recipes("train.md")[name]
    for package in imported(code) - {"yolov7"}:
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    for variable, value in {
        "YOLOV7_CACHE": str(tmp_path / "cache"),
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }.items():
        monkeypatch.setenv(variable, value)
    folder = tmp_path / "my"
    for split in ("train", "val"):
        write_split(folder, split, 4)
    names = "names: [red, blue]"
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\n{names}\n")
    results = []

    def small(options: Train, *callbacks: Any, **given: Any) -> Result:
        small = replace(options, imgsz=64, width=0.125, epochs=2, batch=4, workers=0, device="cpu")
        results.append(loop_train(small, *callbacks, **given))
        return results[0]

    loop_train = loop.train
    monkeypatch.setattr(loop, "train", small)
    monkeypatch.setattr(loop, "can_plot", lambda: False)
    file = tmp_path / "recipe.py"
    file.write_text(code)
    runpy.run_path(str(file), run_name="__main__")
    assert results[0].epochs == 2
    if name == "Weights & Biases":
        assert list(tmp_path.glob("wandb/offline-run*"))
    if name == "MLflow":
        assert (tmp_path / "mlflow.db").stat().st_size
