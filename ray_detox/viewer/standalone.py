"""The page with one run inside it: a single HTML file that needs no server and no network.

    index.html --+-- style sheets ------> one <style>
                 '-- entry module --.
                      its imports --+---> one <script type="module">, each module in a function
    report, samples, curves ------------> <script type="application/json" id="embedded">

A Content-Security-Policy in the file allows that style and that script, by their hashes, and
nothing else: no text of a model can run, load or send anything.

This is no bundler. It knows the few forms of import and export that our modules use, each on a
line of its own, and stops at any other with an `AssertionError` that shows it.
"""

import base64
import hashlib
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_detox.store.pages import as_row
from ray_detox.store.prepare import prepare, to_text

STATIC = Path(__file__).with_name("static")

_LINK = re.compile(r"[ \t]*<link\b[^>]*>\n?")  # what is no style sheet is an icon or a hint
_ENTRY = re.compile(r"[ \t]*<script\b[^>]*></script>\n?")
_ADDRESS = re.compile(r'\b(?:href|src)="(?:\./)?([^"]+)"')
_CHARSET = re.compile(r'<meta charset="utf-8"\s*/?>', re.IGNORECASE)

_IMPORT = re.compile(r"""import\s*(?:(?P<what>[^"']+?)\s*from\s*)?(["'])(?P<module>[^"']+)\2;?""")
_DECLARED = re.compile(r"export\s+((?:async\s+)?(?:function\s*\*?|class|const)\s+([\w$]+).*)")
_DEFAULT = re.compile(r"export\s+default\s+([\w$]+);?")
_LIST = re.compile(r"(?P<before>.*?)\bexport\s*\{(?P<names>[^{}]*)\};?")
_NOT_KNOWN = re.compile(r"^(?:import|export)\b.*|\bimport\s*\(.*|\bimport\.meta\b.*")

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
"""Inside JSON text these occur in strings alone, where an escape means the same."""


def render(
    report: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
    static: Path = STATIC,
) -> str:
    """The page about one run as the text of an HTML file; write it as UTF-8.

    Args:
        report: as in `report.json`.
        samples: as in `samples.jsonl`; a number that is not finite is shown as missing.
        curves: as in `metrics.jsonl`.
        static: the folder of the page.

    Raises:
        StoreError: the run has what no store would take either.
    """
    run = prepare(report, samples, curves)
    data = {
        "report": run.report,
        "curves": run.curves,
        "samples": [as_row(sample) for sample in run.samples.values()],  # as the API has them
    }
    page = _read(static / "index.html")

    sheets = [link for link in _LINK.findall(page) if 'rel="stylesheet"' in link]
    style = "\n".join(_read(static / _address(link)) for link in sheets)
    entries = _ENTRY.findall(page)
    assert len(entries) == 1, f"index.html has {len(entries)} scripts; expected one module"
    script = _join_modules(static, _address(entries[0]))
    _check_text("style", style)
    _check_text("script", script)

    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    page = _LINK.sub("", _ENTRY.sub("", page))
    charset = _CHARSET.search(page)
    assert charset, 'index.html needs <meta charset="utf-8">'
    assert page.count("</body>") == 1, "index.html needs one </body>"
    head, body = page[: charset.end()], page[charset.end() :]
    before, after = body.split("</body>")
    return "".join(
        [
            head,
            f'\n<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"\n<style>{style}</style>",
            before,
            '<script type="application/json" id="embedded">',
            to_text(data).translate(_ESCAPES),
            "</script>\n",
            f'<script type="module">{script}</script>\n',
            "</body>",
            after,
        ]
    )


def _join_modules(static: Path, entry: str) -> str:
    """The entry module and all that it imports, as one script that imports nothing.

    Each module becomes a function that is called on the spot and returns what the module
    exports, so that names of one are not in the way of another; async, for a module may await:

        const m0 = await (async () => { const half = (x) => x / 2; return { half: half }; })();
        const m1 = await (async () => { const { half: h } = m0; show(h(3)); return {  }; })();
    """
    joined: dict[str, str] = {}  # path -> text, imported before importing
    variables: dict[str, str] = {}

    def visit(path: str, importers: tuple[str, ...]) -> str:
        assert path not in importers, f"modules import in a circle: {' > '.join(importers)}"
        if path not in joined:
            text = _as_function(
                _read(static / path), path, lambda other: visit(other, (*importers, path))
            )
            variables[path] = f"m{len(variables)}"
            joined[path] = (
                f"// {path}\n{_licence(static / path)}const {variables[path]} = {text};\n"
            )
        return variables[path]

    visit(posixpath.normpath(entry), ())
    return "\n" + "".join(joined.values())


def _licence(module: Path) -> str:
    """The licence that lies beside a module of others, as a comment: it goes where they go."""
    file = module.with_suffix(".LICENSE")
    return f"/*\n{_read(file).replace('*/', '* /')}*/\n" if file.exists() else ""


def _as_function(text: str, path: str, variable_of: Callable[[str], str]) -> str:
    """A module's text as a called function; `variable_of` gives what another module is called."""
    lines: list[str] = []
    exports: dict[str, str] = {}  # exported name -> name inside
    in_comment = False
    for line in text.split("\n"):
        stripped = line.rstrip()
        if in_comment or stripped.lstrip().startswith("/*"):
            # What was commented out, uPlot's own exports among it, is no code.
            in_comment = "*/" not in stripped
        if in_comment:
            lines.append(line)
            continue
        if match := _IMPORT.fullmatch(stripped):
            module = match["module"]
            assert module.startswith(("./", "../")), (
                f"{path} imports {module!r}; expected ./{module}"
            )
            other = posixpath.normpath(posixpath.join(posixpath.dirname(path), module))
            assert not other.startswith(".."), (
                f"{path} imports {module!r}, outside the page's folder"
            )
            line = _imported(match["what"], variable_of(other), path)
        elif match := _DECLARED.fullmatch(stripped):
            line = match[1]
            exports[match[2]] = match[2]
        elif match := _DEFAULT.fullmatch(stripped):
            line = ""
            exports["default"] = match[1]
        elif match := _LIST.fullmatch(stripped):
            line = match["before"]
            exports |= {outer: inner for inner, outer in _renamed(match["names"])}
        unknown = _NOT_KNOWN.search(line)
        assert not unknown, f"{path} has a form that cannot be inlined: {unknown[0][:80]}"
        lines.append(line)
    body = "\n".join(lines)
    returned = ", ".join(f"{outer}: {inner}" for outer, inner in exports.items())
    return f"await (async () => {{\n{body}\nreturn {{ {returned} }};\n}})()"


def _imported(what: str | None, variable: str, path: str) -> str:
    """The statement that takes from a joined module what an import named."""
    if what is None:
        return ""
    if match := re.fullmatch(r"\{([^{}]*)\}", what):
        names = ", ".join(f"{outer}: {inner}" for outer, inner in _renamed(match[1]))
        return f"const {{ {names} }} = {variable};"
    if match := re.fullmatch(r"\*\s*as\s+([\w$]+)", what):
        return f"const {match[1]} = {variable};"
    assert re.fullmatch(r"[\w$]+", what), f"{path} has a form that cannot be inlined: import {what}"
    return f"const {{ default: {what} }} = {variable};"


def _renamed(names: str) -> list[tuple[str, str]]:
    """`a, b as c` as pairs: (a, a), (b, c)."""
    pairs = [name.split(" as ") for name in map(str.strip, names.split(",")) if name]
    return [(pair[0].strip(), pair[-1].strip()) for pair in pairs]


def _address(tag: str) -> str:
    match = _ADDRESS.search(tag)
    assert match, f"{tag.strip()} of index.html names no file"
    return match[1].lstrip("/")


def _read(file: Path) -> str:
    """Text as an HTML parser would see it, so that its hash is that of what the browser runs."""
    return file.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\r", "\n")


def _check_text(element: str, text: str) -> None:
    for end in (f"</{element}", "<!--", "\0"):
        assert end not in text.lower(), f"the {element} has {end!r}, which would end it in HTML"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
