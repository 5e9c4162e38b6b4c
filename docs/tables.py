"""Write the tables that are read from the code into README.md and docs/: `python docs/tables.py [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

from posttrain.catalogue import evaluations, makers, markdown, parts_table, recipes

ROOT = Path(__file__).resolve().parent.parent


def between(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` replaced."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def recipe_table() -> str:
    """The recipes that ship."""
    lines = ["| recipe | shows | minutes |", "|---|---|---|"]
    lines += [f"| `{row['name']}` | {row['shows']} | {row['minutes']} |" for row in recipes()]
    return "\n".join(lines)


def main() -> int:
    """Write, or with `--check` say whether anything would change."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = old
        tables = {"methods": markdown(), "recipes": recipe_table()}
        tables |= {"makers": parts_table(makers()), "evaluations": parts_table(evaluations())}
        for name, content in tables.items():
            if f"<!-- {name} -->" in new:
                new = between(new, name, content)
        if new != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    print("stale: " + ", ".join(stale) if stale else "all tables are as the code says")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    raise SystemExit(main())
