"""What the drawings look like: one style, for a page by its variables, for a file that stands alone by colours."""

from __future__ import annotations

import re
from collections.abc import Mapping

HUES = 8
LIGHT = {
    "ground": "#f6f7f9", "sheet": "#ffffff", "ink": "#1b2230", "soft": "#566072", "faint": "#98a1b2",
    "line": "#dfe3ea", "node": "#ffffff", "node-line": "#c3cad6", "edge": "#a9b2c1", "grid": "#e7eaf0",
    "end": "#eef1f5", "focus": "#1d4ed8", "pill-ink": "#ffffff", "found": "#f59e0b",
    "h0": "#0f766e", "h1": "#b45309", "h2": "#6d28d9", "h3": "#be185d", "h4": "#1d4ed8", "h5": "#4d7c0f",
    "h6": "#b91c1c", "h7": "#0e7490",
}  # fmt: skip
DARK = {
    "ground": "#0f1319", "sheet": "#161b24", "ink": "#e6eaf2", "soft": "#a3adbf", "faint": "#8490a6",
    "line": "#2a3240", "node": "#1c2330", "node-line": "#414c5f", "edge": "#566178", "grid": "#1d2430",
    "end": "#202838", "focus": "#7aa2ff", "pill-ink": "#0d1117", "found": "#fbbf24",
    "h0": "#3fd0c0", "h1": "#f5b04c", "h2": "#b79cff", "h3": "#f78fc0", "h4": "#82aeff", "h5": "#a9d65c",
    "h6": "#ff8f8a", "h7": "#5fd3ee",
}  # fmt: skip
MONO = (
    'ui-monospace, "SF Mono", SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace'
)  # fmt: skip

# A rule with var(--hue) is for a statement's colour, and stands once for each in a file that stands alone.
DRAWING = """
svg text { font-size: 12px; fill: var(--ink); text-anchor: middle }
.node .body { fill: var(--node); stroke: var(--node-line); stroke-width: 1px }
.node .under { fill: var(--node); stroke: var(--node-line) }
.node .op { font-weight: 600 }
.node .name { fill: var(--soft); font-weight: 400 }
.node.input .body, .node.output .body { fill: var(--end); stroke: var(--node-line) }
.node.mine .body { stroke-width: 1.6px }
.node.mine.h .body { fill: var(--node); stroke: var(--ink) }
.node.mine.hue .body { fill: mix(var(--hue), var(--node)); stroke: var(--hue) }
.badge.hue rect { fill: var(--hue) }
.badge text { font-size: 10.5px; font-weight: 700; fill: var(--pill-ink) }
.node.parameter text { font-size: 11px }
.node.parameter.learns.hue .body { fill: var(--hue); stroke: var(--hue) }
.node.parameter.learns text { fill: var(--pill-ink); font-weight: 600 }
.node.parameter.still .body { stroke-dasharray: 4 3 }
.node.parameter.still.hue .body { fill: var(--node); stroke: var(--hue) }
.edge path { fill: none; stroke: var(--edge); stroke-width: 1.4px }
.edge path.hit { stroke: transparent; stroke-width: 10px }
.edge polygon { fill: var(--edge) }
.edge.mine.hue path.wire { stroke: var(--hue); stroke-width: 1.7px }
.edge.mine.hue polygon { fill: var(--hue) }
.edge text { font-size: 10px; fill: var(--soft) }
.edge rect { fill: var(--ground) }
"""
_MIX = re.compile(r"mix\((#\w{6}), (#\w{6})\)")
_PART = 0.13  # of the hue, in the ground of what a statement inserted


def page_css() -> str:
    """The style of drawings in a page, and the variables of its colours, by day and by night."""
    hues = "".join(f".h{index} {{ --hue: var(--h{index}) }}\n" for index in range(HUES))
    drawing = re.sub(
        r"mix\((var\(--hue\)), (var\(--node\))\)", rf"color-mix(in srgb, \1 {_PART:.0%}, \2)",
        DRAWING.replace(".hue ", " "),
    )  # fmt: skip
    night = f"@media (prefers-color-scheme: dark) {{\n:root {{ {_variables(DARK)} }}\n}}\n"
    return f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n{night}{hues}{drawing}"


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def file_css() -> str:
    """The same for a file that stands alone: programs other than browsers know no variables."""
    face = f"svg text {{ font-family: {MONO} }}\n.ground {{ fill: var(--ground) }}\n"
    day, night = (_settled(face + DRAWING, colours) for colours in (LIGHT, DARK))
    return f"{day}@media (prefers-color-scheme: dark) {{\n{night}}}\n"


def _settled(rules: str, colours: Mapping[str, str]) -> str:
    lines = []
    for rule in rules.strip().splitlines():
        each = [rule.replace(".hue", f".h{i}").replace("--hue", f"--h{i}") for i in range(HUES)]
        for line in each if "--hue" in rule else [rule]:
            line = re.sub(r"var\(--([\w-]+)\)", lambda found: colours[found[1]], line)
            lines.append(_MIX.sub(lambda found: _mixed(found[1], found[2]), line))
    return "\n".join(lines) + "\n"


def _mixed(one: str, other: str) -> str:
    """A little of one colour in another."""
    pairs = zip(bytes.fromhex(one[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + "".join(f"{round(_PART * a + (1 - _PART) * b):02x}" for a, b in pairs)
