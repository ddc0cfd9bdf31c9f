"""The pages as somebody follows them: every command that can run here is run, every link leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chart import helm
from tests.conftest import lacking
from tests.servers import Missing, SeaweedFS, free_ports

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
LANGUAGES = {"sh", "python", "yaml", "promql", "dockerfile", "mermaid", "text", ""}
CLIENTS = Path(sys.executable).parents[1] / "clients" / "bin"
DEADLINE = 300

BLOCK = re.compile(
    r"^```(?P<language>\w*)[ \t]*(?:\{(?P<note>[^}\n]*)\})?[ \t]*\n(?P<text>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block. ``note`` stands in braces behind the language, where no reader sees it."""

    language: str
    note: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python", "yaml") and not self.note


def blocks(page: Path) -> list[Block]:
    return [Block(found["language"], found["note"] or "", found["text"]) for found in BLOCK.finditer(page.read_text())]


def script(page: Path) -> str:
    """The page's commands as one: a file for each YAML block that has a name, and a process for each Python block."""
    lines = []
    for block in blocks(page):
        if not block.runs:
            continue
        if block.language == "sh":
            lines.append(block.text)
        elif block.language == "python":
            lines.append(f"python3 - <<'END_OF_PYTHON'\n{block.text}END_OF_PYTHON")
        elif name := re.match(r"# ([\w.-]+\.yaml)\n", block.text):
            lines.append(f"cat > {name[1]} <<'END_OF_YAML'\n{block.text}END_OF_YAML")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def model(s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the pages call s3://models/llama-3-8b, much smaller."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
    return s3.upload(folder, "llama-3-8b")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with programs that the pages take for granted."""
    folder = tmp_path_factory.mktemp("tools")
    try:
        (folder / "helm").symlink_to(helm.program())
    except Missing as error:
        lacking(str(error))
    if not (CLIENTS / "aws").exists():
        lacking("aws: make .venv/clients.stamp")
    (folder / "aws").symlink_to(CLIENTS / "aws")
    return str(folder)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what the repository has, in which pages may write."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if script(page)], ids=lambda page: page.name)
def test_every_command_that_can_run_here_does(page: Path, place: Path, s3: SeaweedFS, model: str, tools: str) -> None:
    port, over_s3 = free_ports(2)
    own = {
        "PATH": f"{Path(sys.executable).parent}:{tools}:{os.environ['PATH']}",
        "HOME": str(place),
        "WEIGHTD_RUNTIME_DIR": str(place / "run"),
        "WEIGHTD_CACHE_DIR": str(place / "cache"),
        "WEIGHTD_LISTEN": f"127.0.0.1:{port}",
        "WEIGHTD_CAPACITY": "cpu=1GiB",
        **s3.env,
    }
    text = script(page).replace("7400", str(port)).replace("7404", str(over_s3))
    needs_daemon = "weightd serve" not in text and re.search(r"^(curl|weightd) ", text, re.M)
    if needs_daemon:
        text = f"weightd serve &\nuntil weightd doctor --quick >/dev/null; do sleep 0.1; done\n{text}"
    text = f"set -eEu -m -o pipefail\ntrap 'end=$?; set +e; kill $(jobs -p) 2>/dev/null; wait; exit $end' EXIT\n{text}"
    shell = subprocess.Popen(
        ["bash", "-x", "-c", text],
        cwd=place, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = shell.communicate(timeout=DEADLINE)
    finally:
        for process in _session(shell.pid):
            os.kill(process, 9)
    assert shell.returncode == 0, output[-4000:]


def _session(leader: int) -> Iterator[int]:
    """Processes of a session that still live, background jobs of the shell among them."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            yield int(folder.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is_and_why_where_it_is_not_run(page: Path) -> None:
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a fence that is no block"
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        if block.language == "sh" and block.note:
            assert re.fullmatch(r"not run: .{10,}", block.note), block


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_something(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, fragment = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if fragment:
            headings = [anchor(line.lstrip("#")) for line in found.read_text().splitlines() if line.startswith("#")]
            assert fragment in headings, f"{page.name}: {target}"


def test_every_page_is_found_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    paths = [page.relative_to(ROOT).as_posix() for page in PAGES]
    assert not [path for path in paths if path != "README.md" and f"({path}" not in readme]


def test_what_contributing_names_is_there() -> None:
    text = CONTRIBUTING.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)(?=[ `\n])", text):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    for path in re.findall(r"(?:`|=\"?)((?:api|charts|daemon|docs|ipc|tests)/[\w./-]*)", text):
        assert (ROOT / path).exists() or path.rstrip("/").endswith("ROOM"), path
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for constant, path in re.findall(r"`([A-Z_]{4,})` of \[[\w./]+\]\(([\w./]+)\)", text):
        assert re.search(rf"^{constant} = ", (ROOT / path).read_text(), re.M), f"{constant} of {path}"


def test_every_folder_of_tests_is_a_rooms_or_contributing_says_why_not() -> None:
    text = CONTRIBUTING.read_text()
    folders = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}
    rooms = {path.name for path in (ROOT / "daemon").iterdir() if (path / "__init__.py").exists()}
    assert not [name for name in folders - rooms if f"`tests/{name}/`" not in text]
