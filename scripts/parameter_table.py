"""Print what becomes of every request parameter, as markdown, from the table that requests are read by.

python scripts/parameter_table.py
"""

from __future__ import annotations

from api.arguments import EXTENSIONS, OPENAI, markdown_table


def main() -> None:
    print(markdown_table(OPENAI))
    print()
    print("Extensions, on both endpoints unless said otherwise:")
    print()
    print(markdown_table(EXTENSIONS))


if __name__ == "__main__":
    main()
