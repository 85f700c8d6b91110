"""The standalone report: the page and one run in a single HTML file, without server or network.

    index.html --+-- style sheets ------> one <style>
                 '-- entry module --.
                      its imports --+---> one <script type="module">, each module in a function
    report, samples, history -----------> <script type="application/json" id="embedded">

A Content-Security-Policy in the file allows only that style and that script, by their hashes, so
text from a model cannot run, load or send anything.

This is not a general bundler. It supports the forms of import and export that the page's modules
use, each on its own line, and raises an `AssertionError` with the line for any other form.
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

_LINK = re.compile(r"[ \t]*<link\b[^>]*>\n?")  # style sheets, icons and hints
_ENTRY = re.compile(r"[ \t]*<script\b[^>]*></script>\n?")
_ADDRESS = re.compile(r'\b(?:href|src)="(?:\./)?([^"]+)"')
_CHARSET = re.compile(r'<meta charset="utf-8"\s*/?>', re.IGNORECASE)

_IMPORT = re.compile(r"""import\s*(?:(?P<what>[^"']+?)\s*from\s*)?(["'])(?P<module>[^"']+)\2;?""")
_DECLARED = re.compile(r"export\s+((?:async\s+)?(?:function\s*\*?|class|const)\s+([\w$]+).*)")
_DEFAULT = re.compile(r"export\s+default\s+([\w$]+);?")
_LIST = re.compile(r"(?P<before>.*?)\bexport\s*\{(?P<names>[^{}]*)\};?")
_NOT_KNOWN = re.compile(r"^(?:import|export)\b.*|\bimport\s*\(.*|\bimport\.meta\b.*")

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
"""Characters to escape in JSON text, where they occur only inside strings."""


def render(
    report: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    static: Path = STATIC,
) -> str:
    """Render the page about one run as the text of an HTML file; write it as UTF-8.

    Args:
        report: as in `report.json`.
        samples: as in `samples.jsonl`; a number that is not finite becomes a missing value.
        history: as in `metrics.jsonl`.
        static: the folder of the page.

    Raises:
        StoreError: the run has a value that a store would reject.
    """
    run = prepare(report, samples, history)
    data = {
        "report": run.report,
        "history": run.curves,
        "samples": [as_row(sample) for sample in run.samples.values()],  # as the API returns them
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
    """Join the entry module and everything it imports into one script without imports.

    Each module becomes a function that is called at once and returns the module's exports, so that
    top-level names of different modules do not clash. It is async because a module may await:

        const m0 = await (async () => { const half = (x) => x / 2; return { half: half }; })();
        const m1 = await (async () => { const { half: h } = m0; show(h(3)); return {  }; })();
    """
    joined: dict[str, str] = {}  # path -> text; a module comes after its imports
    variables: dict[str, str] = {}

    def visit(path: str, importers: tuple[str, ...]) -> str:
        assert path not in importers, (
            f"modules import each other in a cycle: {' > '.join(importers)}"
        )
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
    """The licence file next to a vendored module, as a comment; empty if there is none."""
    file = module.with_suffix(".LICENSE")
    return f"/*\n{_read(file).replace('*/', '* /')}*/\n" if file.exists() else ""


def _as_function(text: str, path: str, variable_of: Callable[[str], str]) -> str:
    """Wrap a module in a function call; `variable_of` returns the variable of an imported module."""
    lines: list[str] = []
    exports: dict[str, str] = {}  # exported name -> name inside
    in_comment = False
    for line in text.split("\n"):
        stripped = line.rstrip()
        if in_comment or stripped.lstrip().startswith("/*"):
            # Skip comments, because uPlot has exports that are commented out.
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
        assert not unknown, f"{path} has an unsupported form of import or export: {unknown[0][:80]}"
        lines.append(line)
    body = "\n".join(lines)
    returned = ", ".join(f"{outer}: {inner}" for outer, inner in exports.items())
    return f"await (async () => {{\n{body}\nreturn {{ {returned} }};\n}})()"


def _imported(what: str | None, variable: str, path: str) -> str:
    """The statement that replaces an import of a joined module."""
    if what is None:
        return ""
    if match := re.fullmatch(r"\{([^{}]*)\}", what):
        names = ", ".join(f"{outer}: {inner}" for outer, inner in _renamed(match[1]))
        return f"const {{ {names} }} = {variable};"
    if match := re.fullmatch(r"\*\s*as\s+([\w$]+)", what):
        return f"const {match[1]} = {variable};"
    assert re.fullmatch(r"[\w$]+", what), (
        f"{path} has an unsupported form of import or export: import {what}"
    )
    return f"const {{ default: {what} }} = {variable};"


def _renamed(names: str) -> list[tuple[str, str]]:
    """`a, b as c` as pairs: (a, a), (b, c)."""
    pairs = [name.split(" as ") for name in map(str.strip, names.split(",")) if name]
    return [(pair[0].strip(), pair[-1].strip()) for pair in pairs]


def _address(tag: str) -> str:
    match = _ADDRESS.search(tag)
    assert match, f"{tag.strip()} in index.html has no href or src"
    return match[1].lstrip("/")


def _read(file: Path) -> str:
    """Read text with the line ends of an HTML parser, so that hashes match what the browser runs."""
    return file.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\r", "\n")


def _check_text(element: str, text: str) -> None:
    for end in (f"</{element}", "<!--", "\0"):
        assert end not in text.lower(), (
            f"the {element} contains {end!r}, which would end it in HTML"
        )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
