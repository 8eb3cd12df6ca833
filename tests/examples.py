"""The examples of README.md and docs/*.md: Python, recipes, and lines for a shell, each once."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
PROGRAMS = ("crosslayer", "make", "python", "pip", "torchrun", "accelerate")

_FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> dict[str, str]:
    """ "page number" -> what stands between fences of this language."""
    found = {}
    for page, text in PAGES.items():
        of_page = [code for kind, code in _FENCED.findall(text) if kind == language]
        found.update({f"{page} {number}": code for number, code in enumerate(of_page, 1)})
    return found


def command_lines() -> list[str]:
    """Lines for a shell, in blocks of bash and in indented ones, without their comments."""
    lines: dict[str, None] = {}
    for text in PAGES.values():
        bash = "".join(code for kind, code in _FENCED.findall(text) if kind == "bash")
        rest = _FENCED.sub("", text)
        indented = "".join(re.findall(r"(?:(?<=\n\n)|\A)(?: {4}.*\n)+", rest))
        for line in (bash + indented).replace("\\\n", " ").splitlines():
            command = shlex.join(shlex.split(line, comments=True)) if line.strip().startswith(PROGRAMS) else ""
            if command.partition(" ")[0] in PROGRAMS:
                lines[command.replace(" '>' ", " > ")] = None
    return list(lines)
