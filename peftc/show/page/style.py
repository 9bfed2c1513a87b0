"""The style of the page that `peftc show --html` writes. Nothing in it depends on the model."""

from __future__ import annotations

from peftc.show.picture.colours import MONO, page_css


def css() -> str:
    """All of it: the drawings', and what is around them."""
    return page_css() + _AROUND.replace("MONO", MONO)


_AROUND = """
* { box-sizing: border-box }
html, body { margin: 0; height: 100% }
body { display: grid; grid-template-rows: auto 1fr; background: var(--ground); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
code, pre, svg text { font-family: MONO; font-variant-ligatures: none }
header { display: flex; flex-wrap: wrap; gap: 4px 28px; align-items: baseline; padding: 14px 22px 12px;
  background: var(--sheet); border-bottom: 1px solid var(--line) }
h1 { margin: 0; font-size: 17px; font-weight: 650; letter-spacing: -.01em }
h1 span { color: var(--soft); font-weight: 400 }
.facts { margin: 0; display: flex; flex-wrap: wrap; gap: 2px 22px; color: var(--soft);
  font-variant-numeric: tabular-nums }
.facts b { color: var(--ink); font-weight: 600 }
main { display: grid; grid-template-columns: minmax(0, 1fr) 400px; min-height: 0 }
.work { display: grid; grid-template-rows: auto 1fr; min-width: 0; min-height: 0 }
.bar { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; padding: 9px 22px;
  border-bottom: 1px solid var(--line) }
[role=tablist] { display: flex; flex-wrap: wrap; gap: 2px }
.bar button, select, input[type=search] { font: inherit; font-size: 13px; color: var(--soft); background: none;
  border: 1px solid transparent;
  border-radius: 7px; padding: 4px 10px; cursor: pointer }
.bar button:hover { background: var(--end); color: var(--ink) }
[role=tab][aria-selected=true] { background: var(--sheet); border-color: var(--line); color: var(--ink);
  font-weight: 600;
  box-shadow: 0 1px 2px rgb(0 0 0 / .06) }
[role=tab] small { margin-left: 5px; font-size: 11px; font-weight: 600; color: var(--soft);
  font-variant-numeric: tabular-nums }
[role=tab].same, [role=tab].idle { color: var(--faint) }
[role=tab][aria-selected=true] { color: var(--ink) }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 1px }
.tools { display: flex; gap: 4px; align-items: center; margin-left: auto }
.tools label { display: flex; gap: 7px; align-items: center; margin-right: 10px; font-size: 13px;
  color: var(--soft); cursor: pointer }
.tools label:hover { color: var(--ink) }
.tools input { accent-color: var(--focus); margin: 0 }
.tools button, .steps button, select, input[type=search], #panel button { min-width: 30px; padding: 4px 8px;
  border: 1px solid var(--line); background: var(--sheet); color: var(--ink); border-radius: 7px }
.bar button:disabled { opacity: .45; cursor: default }
.steps, .search { display: flex; gap: 4px; align-items: center }
select { max-width: 300px } input[type=search] { width: 190px }
#hits { min-width: 62px; font-size: 12px; color: var(--soft) }
[role=tablist] { flex-basis: 100% }
[role=tab].idle:not([aria-selected=true]) { display: none } .open [role=tab].idle { display: inline-block }
#idle { font-style: italic; color: var(--soft) }
.panes { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); min-height: 0 }
.pane { position: relative; min-height: 0; display: grid; overflow: hidden }
.pane + .pane { border-left: 1px solid var(--line) }
.pane[hidden] { display: none }
.pane h2 { position: absolute; z-index: 1; top: 12px; left: 20px; margin: 0; padding: 2px 9px; border-radius: 6px;
  font-size: 12px; font-weight: 600; color: var(--soft); background: var(--ground); border: 1px solid var(--line) }
.before[hidden] + .pane h2 { display: none }
.view { min-height: 0; cursor: grab; touch-action: none; overflow: hidden;
  background: radial-gradient(circle at 1px 1px, var(--grid) 1px, transparent 1.5px) 0 0 / 22px 22px }
.view.dragging { cursor: grabbing }
.view:focus-visible { outline-offset: -3px }
.panel, .panel svg { display: block; width: 100%; height: 100% }
.panel[hidden] { display: none }
aside { overflow: auto; border-left: 1px solid var(--line); background: var(--sheet); padding: 6px 22px 26px }
aside h2 { margin: 20px 0 8px; font-size: 12px; font-weight: 650; color: var(--soft); letter-spacing: .02em }
aside h2 + p { margin-top: 0 }
#panel { margin: 14px 0 20px; padding: 12px 16px 14px; border: 1px solid var(--focus); border-radius: 10px;
  font-size: 13px; overflow-wrap: anywhere }
#panel[hidden] { display: none }
#panel h2 { margin: 0 0 2px; font-size: 14px; color: var(--ink) } #panel .state { margin: 0 0 8px; color: var(--soft) }
#panel h3 { margin: 12px 0 3px; font-size: 12px; font-weight: 650; color: var(--soft) }
#panel p { margin: 0 0 3px } #panel ul { margin: 0; padding-left: 17px }
#panel pre { margin: 0; padding: 7px 10px; border-radius: 7px; background: var(--ground); font-size: 12px;
  white-space: pre-wrap; user-select: text }
#panel .buttons { display: flex; gap: 6px; margin-top: 12px; user-select: none } #panel button { cursor: pointer }
.spec { margin: 0; padding: 6px 0; list-style: none; border: 1px solid var(--line); border-radius: 9px;
  background: var(--ground);
  font-size: 12.5px; line-height: 1.65; overflow: hidden }
.spec li { display: grid; grid-template-columns: 38px minmax(0, 1fr); border-left: 3px solid transparent }
.spec li > i { padding-right: 12px; text-align: right; font-style: normal; color: var(--soft); user-select: none }
.spec li code { padding-right: 14px; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4 }
.spec li.on { border-left-color: var(--hue); background: color-mix(in srgb, var(--hue) 11%, transparent) }
.spec li.on > i { color: var(--hue); font-weight: 700 }
.spec b { font-weight: 650 } .spec em { color: var(--soft); font-style: italic }
table { width: 100%; border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums }
th, td { padding: 6px 0 6px 12px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { padding-left: 0; text-align: left }
th { font-weight: 500; color: var(--soft) }
td code { font-size: 12px; overflow-wrap: anywhere }
tr:last-child td { border-bottom: 0; font-weight: 650 }
.legend { margin: 0; padding: 0; list-style: none; display: grid; gap: 7px; font-size: 13px; color: var(--soft) }
.legend li { display: grid; grid-template-columns: 66px 1fr; gap: 12px; align-items: center }
.legend svg { display: block }
.keys { margin: 18px 0 0; font-size: 12.5px; color: var(--soft) }
kbd { font: inherit; font-size: 11.5px; padding: 0 5px; border: 1px solid var(--line); border-radius: 4px;
  background: var(--ground) }
#tip { position: fixed; z-index: 5; max-width: 460px; padding: 9px 13px 10px; border-radius: 9px;
  pointer-events: none;
  background: var(--sheet); color: var(--soft); border: 1px solid var(--line);
    box-shadow: 0 8px 28px rgb(0 0 0 / .16);
  font-size: 12.5px; line-height: 1.5; white-space: pre-line; overflow-wrap: anywhere }
#tip[hidden] { display: none }
#tip b { display: block; color: var(--ink); font-weight: 650 }
.node { cursor: pointer }
.node:focus-visible { outline: none } .node:focus-visible .body { stroke: var(--focus) !important; stroke-width: 3px }
.node.found .body { stroke: var(--found) !important; stroke-width: 3px !important }
.node.pinned .body { stroke: var(--focus) !important; stroke-width: 3.5px !important }
.dim .node:not(.lit), .dim .edge:not(.lit) { opacity: .22 }
.edge.touched path.wire { stroke-width: 2.6px; stroke: var(--ink) } .edge.touched polygon { fill: var(--ink) }
@media (max-width: 1000px) {
  html, body { height: auto } main { grid-template-columns: minmax(0, 1fr) } .panes { height: 74vh }
  aside { border-left: 0; border-top: 1px solid var(--line) }
}
@media print { aside { border: 0 } .tools, .keys { display: none } }
@media (prefers-reduced-motion: no-preference) { .node, .edge { transition: opacity .12s } }
"""
