"""`python -m graphopt.ir.ops > docs/ops.md` writes the op table in Markdown."""

from __future__ import annotations

import sys

from graphopt.ir.ops.markdown import table_as_markdown

if __name__ == "__main__":
    sys.stdout.write(table_as_markdown())
