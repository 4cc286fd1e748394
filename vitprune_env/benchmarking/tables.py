"""Tables as markdown, CSV and LaTeX: rows are dictionaries from column headings to text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

ESCAPES = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
           "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}  # fmt: skip


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A markdown table with the columns of the first row."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    head, rule, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, rule.replace(" ", ""), *body])


def comma_separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """A CSV file's text with the columns of the first row; None is an empty cell."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def booktabs(groups: Sequence[Sequence[Sequence[str]]], heading: Sequence[str], note: str = "") -> str:
    """A LaTeX table in the style of booktabs.

    Args:
        groups: blocks of rows, set apart by a rule; cells are LaTeX already (see `escape`).
        heading: LaTeX of the column headings; the first column is set flush left, the others centred.
        note: LaTeX of a small line below the table.
    """

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    body = "\n\\midrule\n".join("\n".join(map(line, group)) for group in groups if group)
    below = [rf"\multicolumn{{{len(heading)}}}{{l}}{{\footnotesize {note}}} \\"] if note else []
    columns = "l" + "c" * (len(heading) - 1)
    return "\n".join(
        [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(heading), r"\midrule",
         body, r"\bottomrule", *below, r"\end{tabular}", ""]
    )  # fmt: skip


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(ESCAPES.get(character, character) for character in text)
