"""Print docs/parameters.md: what becomes of every request parameter, from the table that requests are read by.

python -m scripts.parameter_table > docs/parameters.md
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from api.arguments import ENDPOINTS, EXTENSIONS, OPENAI, Row
from api.checks import Context
from llama.config import Limits

HEAD = """# Parameters

Every request parameter, and what becomes of it. What is ignored is named in the answer's `ignored_parameters`;
`strict=True` refuses it instead. Fields that are in neither table are ignored, and told, too.

This page is made by `python -m scripts.parameter_table` from the table in `api/arguments.py`, and a test compares them.
"""


def main() -> None:
    print(HEAD)
    print(markdown_table(OPENAI))
    print()
    print("Extensions, on both endpoints unless said otherwise:")
    print()
    print(markdown_table(EXTENSIONS))


def markdown_table(rows: Sequence[Row]) -> str:
    """The table as docs/parameters.md shows it, with the default limits."""
    lines = ["| parameter | endpoints | default | what becomes of it | |", "|---|---|---|---|---|"]
    for row in rows:
        where = "both" if row.endpoints == ENDPOINTS else row.endpoints[0]
        schema = row.kind.schema(Context(row.endpoints[-1], Limits(), vocab_size=1)) if row.kind else {}
        note = row.note.format(**dict(_keywords(schema)))
        lines.append(f"| `{row.name}` | {where} | {row.default} | {row.action} | {note} |")
    return "\n".join(lines)


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """The keywords of a JSON Schema and of those inside it."""
    for name, value in schema.items() if isinstance(schema, dict) else ():
        yield name, value
        for inner in value if isinstance(value, list) else [value]:
            yield from _keywords(inner)


if __name__ == "__main__":
    main()
