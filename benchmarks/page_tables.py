"""Tables of a page that a script makes: between `<!-- table: name -->` and `<!-- end: name -->`."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Tables = Mapping[str, Callable[[], str]]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def filled(page: str, tables: Tables, name: str) -> str:
    """The page with every table between its markers made again; SystemExit where one has no place."""
    for title, make in tables.items():
        start, end = f"<!-- table: {title} -->\n", f"\n<!-- end: {title} -->"
        before, found, rest = page.partition(start)
        if not found or end not in rest:
            raise SystemExit(f"{name} has no place for the table {title!r}")
        page = before + start + make() + end + rest.partition(end)[2]
    return page


def run(page: Path, tables: Tables, description: str | None) -> None:
    """The command of such a script: prints the tables, or with --write puts them into the page."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write them into docs/{page.name}")
    if parser.parse_args().write:
        page.write_text(filled(page.read_text(encoding="utf-8"), tables, page.name), encoding="utf-8")
        return
    for name, make in tables.items():
        print(f"{name}\n\n{make()}\n")
