"""Print docs/parameters.md: what becomes of every request parameter, from the table that requests are read by.

python -m scripts.parameter_table > docs/parameters.md
"""

from __future__ import annotations

from api.arguments import EXTENSIONS, OPENAI, markdown_table

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


if __name__ == "__main__":
    main()
