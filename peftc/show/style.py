"""The style and the script of the page that `peftc show --html` writes. Nothing in them depends on the model."""

CSS = """
:root {
  color-scheme: light dark;
  --ground: #f6f7f9; --sheet: #ffffff; --ink: #1b2230; --soft: #566072; --faint: #98a1b2; --line: #dfe3ea;
  --node: #ffffff; --node-line: #c3cad6; --edge: #a9b2c1; --grid: #e7eaf0; --end: #eef1f5; --focus: #1d4ed8;
  --pill-ink: #ffffff;
  --h0: #0f766e; --h1: #b45309; --h2: #6d28d9; --h3: #be185d; --h4: #1d4ed8; --h5: #4d7c0f; --h6: #b91c1c;
    --h7: #0e7490;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0f1319; --sheet: #161b24; --ink: #e6eaf2; --soft: #a3adbf; --faint: #69748a; --line: #2a3240;
    --node: #1c2330; --node-line: #414c5f; --edge: #566178; --grid: #1d2430; --end: #202838; --focus: #7aa2ff;
    --pill-ink: #0d1117;
    --h0: #3fd0c0; --h1: #f5b04c; --h2: #b79cff; --h3: #f78fc0; --h4: #82aeff; --h5: #a9d65c; --h6: #ff8f8a;
    --h7: #5fd3ee;
  }
}
.h0 { --hue: var(--h0) } .h1 { --hue: var(--h1) } .h2 { --hue: var(--h2) } .h3 { --hue: var(--h3) }
.h4 { --hue: var(--h4) } .h5 { --hue: var(--h5) } .h6 { --hue: var(--h6) } .h7 { --hue: var(--h7) }
* { box-sizing: border-box }
html, body { margin: 0; height: 100% }
body { display: grid; grid-template-rows: auto 1fr; background: var(--ground); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
code, pre, .mono, svg text { font-family: ui-monospace, "SF Mono", SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; font-variant-ligatures: none }
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
[role=tab], .tools button { font: inherit; font-size: 13px; color: var(--soft); background: none;
  border: 1px solid transparent;
  border-radius: 7px; padding: 4px 10px; cursor: pointer }
[role=tab]:hover, .tools button:hover { background: var(--end); color: var(--ink) }
[role=tab][aria-selected=true] { background: var(--sheet); border-color: var(--line); color: var(--ink);
  font-weight: 600;
  box-shadow: 0 1px 2px rgb(0 0 0 / .06) }
[role=tab] small { margin-left: 5px; font-size: 11px; font-weight: 600; color: var(--soft);
  font-variant-numeric: tabular-nums }
[role=tab].same { color: var(--faint) }
[role=tab].same[aria-selected=true] { color: var(--ink) }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 1px }
.tools { display: flex; gap: 4px; align-items: center; margin-left: auto }
.tools label { display: flex; gap: 7px; align-items: center; margin-right: 10px; font-size: 13px;
  color: var(--soft); cursor: pointer }
.tools label:hover { color: var(--ink) }
.tools input { accent-color: var(--focus); margin: 0 }
.tools button { min-width: 30px; padding: 4px 8px; border-color: var(--line); background: var(--sheet) }
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
svg text { font-size: 12px; fill: var(--ink); dominant-baseline: central; text-anchor: middle }
.node rect.body { fill: var(--node); stroke: var(--node-line); rx: 8px }
.node .op { font-weight: 600 } .node .name { fill: var(--soft); font-weight: 400 }
.node.input rect.body, .node.output rect.body { fill: var(--end); stroke: var(--node-line); rx: 15px }
.node.mine rect.body { fill: color-mix(in srgb, var(--hue) 13%, var(--node)); stroke: var(--hue);
  stroke-width: 1.6px }
.node.mine.h rect.body { fill: var(--node); stroke: var(--ink) }
.badge rect { fill: var(--hue); rx: 5px }
.badge text { font-size: 10.5px; font-weight: 700; fill: var(--pill-ink) }
.node.parameter rect.body { rx: 11px }
.node.parameter text { font-size: 11px }
.node.parameter.learns rect.body { fill: var(--hue); stroke: var(--hue) }
.node.parameter.learns text { fill: var(--pill-ink); font-weight: 600 }
.node.parameter.still rect.body { fill: var(--node); stroke: var(--hue); stroke-dasharray: 4 3 }
.edge path { fill: none; stroke: var(--edge); stroke-width: 1.4px }
.edge path.hit { stroke: transparent; stroke-width: 10px }
.edge polygon { fill: var(--edge) }
.edge.mine path.wire { stroke: var(--hue); stroke-width: 1.7px }
.edge.mine polygon { fill: var(--hue) }
.edge text { font-size: 10px; fill: var(--soft) }
.edge rect { fill: var(--ground) }
.node:focus-visible { outline: none } .node:focus-visible rect.body { stroke: var(--focus); stroke-width: 3px }
.dim .node:not(.lit), .dim .edge:not(.lit) { opacity: .22 }
.edge.touched path.wire { stroke-width: 2.6px; stroke: var(--ink) } .edge.touched polygon { fill: var(--ink) }
@media (max-width: 1000px) {
  html, body { height: auto } main { grid-template-columns: minmax(0, 1fr) } .panes { height: 74vh }
  aside { border-left: 0; border-top: 1px solid var(--line) }
}
@media print { aside { border: 0 } .tools, .keys { display: none } }
@media (prefers-reduced-motion: no-preference) { .node, .edge { transition: opacity .12s } }
"""

SCRIPT = """
"use strict";
(() => {
  const one = (query, from = document) => from.querySelector(query);
  const all = (query, from = document) => [...from.querySelectorAll(query)];
  const tabs = all("[role=tab]"), panels = all(".after .panel"), compare = one("#compare"), tip = one("#tip");
  const before = one(".before"), after = one(".after");
  const shown = pane => one(".panel:not([hidden]) svg", pane);
  const cameras = new WeakMap();

  // Pan and zoom: a camera is the corner of the drawing at the top left of the pane, and pixels per unit.
  const apply = svg => {
    const { x, y, scale } = cameras.get(svg), box = svg.parentElement.getBoundingClientRect();
    svg.setAttribute("viewBox", [x, y, box.width / scale, box.height / scale].join(" "));
  };
  const size = svg => [+svg.dataset.width, +svg.dataset.height, svg.parentElement.getBoundingClientRect()];
  const fit = (svgs, whole) => {
    const scales = svgs.map(svg => {
      const [width, height, box] = size(svg), across = Math.min(1.15, box.width / width), down = box.height / height;
      const least = svgs.length > 1 ? 0.5 : 0.62;
      return whole ? Math.min(across, down) : Math.max(least, Math.min(across, Math.max(down, 0.8)));
    });
    const scale = Math.min(...scales);
    for (const svg of svgs) {
      const [width, height, box] = size(svg), spare = box.height / scale - height;
      const y = svgs.length > 1 || spare < 0 ? 0 : -spare / 2;
      cameras.set(svg, { scale, x: (width - box.width / scale) / 2, y });
      apply(svg);
    }
  };
  const zoom = (svg, factor, at) => {
    const camera = cameras.get(svg), box = svg.parentElement.getBoundingClientRect();
    const px = at ? at.clientX - box.left : box.width / 2, py = at ? at.clientY - box.top : box.height / 2;
    const scale = Math.min(4, Math.max(0.08, camera.scale * factor));
    camera.x += px / camera.scale - px / scale;
    camera.y += py / camera.scale - py / scale;
    camera.scale = scale;
    apply(svg);
  };
  const move = (svg, dx, dy) => {
    const camera = cameras.get(svg);
    camera.x += dx / camera.scale; camera.y += dy / camera.scale;
    apply(svg);
  };
  const visible = () => [before, after].filter(pane => !pane.hidden).map(shown).filter(Boolean);
  const refit = whole => fit(visible(), whole);

  // Stages
  const select = (tab, focus) => {
    for (const other of tabs) {
      other.setAttribute("aria-selected", other === tab);
      other.tabIndex = other === tab ? 0 : -1;
    }
    panels.forEach(panel => { panel.hidden = panel.id !== tab.getAttribute("aria-controls"); });
    one("h2", after).textContent = tab.dataset.name;
    if (focus) tab.focus();
    tip.hidden = true;
    refit(false);
  };
  const together = () => {
    if (!one(".panel", before)) {
      const copy = panels.find(panel => panel.id === tabs[0].getAttribute("aria-controls")).cloneNode(true);
      copy.removeAttribute("id"); copy.hidden = false;
      one(".view", before).append(copy);
      watch(before);
    }
    before.hidden = !compare.checked;
    refit(false);
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", event => {
      const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      select(tabs[(to + tabs.length) % tabs.length], true);
    });
  });
  compare.addEventListener("change", together);
  one("#closer").addEventListener("click", () => visible().forEach(svg => zoom(svg, 1.25)));
  one("#farther").addEventListener("click", () => visible().forEach(svg => zoom(svg, 0.8)));
  one("#whole").addEventListener("click", () => refit(true));
  addEventListener("resize", () => refit(false));

  for (const view of all(".view")) {
    const pane = view.parentElement;
    let last = null;
    view.addEventListener("pointerdown", event => {
      if (event.button === 0) { last = event; view.setPointerCapture(event.pointerId);
    view.classList.add("dragging"); }
    });
    view.addEventListener("pointermove", event => {
      if (!last) return;
      move(shown(pane), last.clientX - event.clientX, last.clientY - event.clientY);
      last = event; tip.hidden = true;
    });
    for (const name of ["pointerup", "pointercancel"])
      view.addEventListener(name, () => { last = null; view.classList.remove("dragging"); });
    view.addEventListener("wheel", event => {
      event.preventDefault();
      if (event.ctrlKey || event.metaKey) zoom(shown(pane), Math.exp(-event.deltaY / 180), event);
      else move(shown(pane), event.shiftKey ? event.deltaY : event.deltaX, event.shiftKey ? 0 : event.deltaY);
    }, { passive: false });
    view.addEventListener("keydown", event => {
      const svg = shown(pane), far = 70;
      const act = {
        "+": () => zoom(svg, 1.25), "=": () => zoom(svg, 1.25), "-": () => zoom(svg, 0.8), "0": () => refit(true),
        ArrowLeft: () => move(svg, -far, 0), ArrowRight: () => move(svg, far, 0),
        ArrowUp: () => move(svg, 0, -far), ArrowDown: () => move(svg, 0, far),
      }[event.key];
      if (act) { event.preventDefault(); act(); }
    });
  }

  // What a node or an edge is, and which belong to one statement
  const tell = (element, x, y) => {
    const [first, ...rest] = element.dataset.tip.split("\\n"), head = document.createElement("b");
    head.textContent = first;
    tip.replaceChildren(head, rest.join("\\n"));
    tip.hidden = false;
    tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 12)) + "px";
    tip.style.top = Math.max(8, y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 12 : y + 18) + "px";
  };
  const light = origin => {
    for (const svg of visible()) {
      svg.classList.toggle("dim", origin !== null);
      for (const part of all("[data-origin]", svg))
        part.classList.toggle("lit", origin !== null && part.dataset.origin.split(" ").includes(origin));
    }
  };
  function watch(root) {
    for (const element of all(".node, .edge", root)) {
      const title = one("title", element);
      if (title) { element.dataset.tip = title.textContent; title.remove(); }
      const wires = element.classList.contains("edge") ? [element] : all(".edge", element.ownerSVGElement)
        .filter(edge => edge.dataset.from === element.dataset.id || edge.dataset.to === element.dataset.id);
      const touch = on => wires.forEach(edge => edge.classList.toggle("touched", on));
      element.addEventListener("pointermove", event => tell(element, event.clientX, event.clientY));
      element.addEventListener("pointerenter", () => touch(true));
      element.addEventListener("pointerleave", () => { touch(false); tip.hidden = true; });
      element.addEventListener("focus", () => {
        const box = element.getBoundingClientRect(), pane = element.closest(".view").getBoundingClientRect();
        const svg = element.ownerSVGElement;
        if (box.top < pane.top || box.bottom > pane.bottom) move(svg, 0, box.top - pane.top - pane.height / 2);
        if (box.left < pane.left || box.right > pane.right) move(svg, box.left - pane.left - pane.width / 2, 0);
        const now = element.getBoundingClientRect();
        tell(element, now.left, now.bottom - 10);
      });
      element.addEventListener("blur", () => { tip.hidden = true; });
    }
  }
  watch(document);
  for (const line of all("aside [data-origin]")) {
    line.addEventListener("pointerenter", () => light(line.dataset.origin));
    line.addEventListener("pointerleave", () => light(null));
  }

  document.body.classList.add("live");
  const wish = decodeURIComponent(location.hash.slice(1)).split("&");
  select(tabs.find(tab => wish.includes(tab.dataset.name)) || one("[aria-selected=true]"));
  if (wish.includes("compare")) { compare.checked = true; together(); }
})();
"""
