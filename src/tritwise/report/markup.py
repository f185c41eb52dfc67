"""Small pieces of HTML, each of which escapes the text it is given."""

import base64
import html
from collections.abc import Sequence

from tritwise.report.style import STYLE

_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a second lock behind the escaping


def escape(value: object) -> str:
    """Any text as HTML text or attribute value.

    Control characters become their visible symbols and halves of surrogate pairs a question mark: generated text and
    hand-made files may hold either, and neither is allowed in a page.
    """
    text = str(value).encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n")
    return html.escape(text.translate(_CONTROLS), quote=True)


def document(title: str, body: str) -> str:
    """A whole page with everything in it: no script, no font, no file from anywhere else."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def note(text: str) -> str:
    """One quiet line."""
    return f'<p class="note">{escape(text)}</p>'


def facts(items: Sequence[tuple[str, str, str]]) -> str:
    """Cards of (label, value, explanation)."""
    cards = [
        f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd><dd class="sub">{escape(sub)}</dd></div>'
        for label, value, sub in items
    ]
    return '<dl class="facts">\n' + "\n".join(cards) + "\n</dl>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = (), keys: Sequence[int] = ()
) -> str:
    """A table in a card. `numeric` columns are aligned to the right, `keys` columns are set in a fixed-width font."""
    names = ["num" if column in numeric else "key" if column in keys else "long" for column in range(len(head))]
    top = "".join(f'<th scope="col" class="{name}">{escape(cell)}</th>' for name, cell in zip(names, head, strict=True))
    lines = [
        "<tr>"
        + "".join(f'<td class="{name}">{escape(cell)}</td>' for name, cell in zip(names, row, strict=True))
        + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="card"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def details(title: str, body: str) -> str:
    """Folded until it is clicked; unfolded on paper."""
    return f"<details>\n<summary>{escape(title)}</summary>\n{body}\n</details>"


def picture(png: bytes, alt: str, caption: str) -> str:
    """A PNG inside the page, on white in either colour scheme."""
    data = base64.b64encode(png).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
    return f"<figure>\n<div>{image}</div>\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
