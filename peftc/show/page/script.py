"""The script of the page that `peftc show --html` writes. Nothing in it depends on the model.

The address keeps what is seen, so that it can be passed on: `#pass=fusions&block=3&node=n12&compare`.
"""

SCRIPT = r"""
"use strict";
(() => {
  const one = (query, from = document) => from.querySelector(query);
  const all = (query, from = document) => [...from.querySelectorAll(query)];
  const make = (tag, text = "", name = "") =>
    Object.assign(document.createElement(tag), { textContent: text, className: name });
  const data = JSON.parse(one("#data").textContent), { blocks, passes, rows, views, drawings, places } = data;
  const tabs = all("[role=tab]"), tip = one("#tip"), panel = one("#panel"), compare = one("#compare");
  const before = one(".before"), after = one(".after"), search = one("#search"), picker = one("#block");
  const WHOLE = -1, cameras = new WeakMap();
  const state = { pass: tabs.findIndex(tab => tab.ariaSelected === "true"),
    block: picker.value === "whole" ? WHOLE : +picker.value, node: null };

  // Which drawing: blocks that are alike share one, with marks where their names stand
  const rowOf = block => rows[views[block + 1][0]];
  const lookOf = (pass, block) => rowOf(block)[pass];
  const drawingOf = (pass = state.pass, block = state.block) => drawings[lookOf(pass, block)[0]];
  const placesOf = block => places[views[block + 1][1]];
  const named = (text, block = state.block) => text.replace(/⟦([+-]?\d)⟧/g, (_, step) => blocks[block + +step]);
  const shown = pane => one("svg", one(".panel", pane));
  const visible = () => [before, after].filter(pane => !pane.hidden).map(shown).filter(Boolean);
  const put = (pane, pass) => {
    const number = lookOf(pass, state.block)[0], drawing = drawings[number];
    const svg = one("#drawing-" + number).content.firstElementChild.cloneNode(true);
    for (const text of all("text, tspan", svg))
      if (!text.firstElementChild && text.textContent.includes("⟦")) text.textContent = named(text.textContent);
    for (const node of all(".node", svg)) {
      node.setAttribute("aria-label", named(node.getAttribute("aria-label")));
      node.setAttribute("tabindex", "0");
    }
    const holder = make("div", "", "panel");
    holder.setAttribute("role", "tabpanel");
    holder.append(svg);
    one(".view", pane).replaceChildren(holder);
    one("h2", pane).textContent = passes[pass];
    watch(svg, drawing);
  };

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
  const reveal = element => {
    const box = element.getBoundingClientRect(), pane = element.closest(".view").getBoundingClientRect();
    const svg = element.ownerSVGElement;
    if (box.top < pane.top || box.bottom > pane.bottom) move(svg, 0, box.top - pane.top - pane.height / 2);
    if (box.left < pane.left || box.right > pane.right) move(svg, box.left - pane.left - pane.width / 2, 0);
  };
  const refit = whole => fit(visible(), whole);

  // What is seen
  const draw = () => {
    const changed = pass => pass > 0 && lookOf(pass, state.block)[0] !== lookOf(pass - 1, state.block)[0];
    tabs.forEach((tab, pass) => {
      const on = pass === state.pass, added = lookOf(pass, state.block)[1];
      tab.setAttribute("aria-selected", on);
      tab.tabIndex = on ? 0 : -1;
      tab.classList.toggle("same", pass > 0 && !changed(pass));
      one("small", tab).textContent = added ? "+" + added : "";
    });
    const drawing = drawingOf(), count = Object.keys(drawing.nodes).length;
    one("#where").textContent = state.block === WHOLE ? "" : blocks[state.block];
    one("#count").replaceChildren(make("b", drawing.inserted), ` of ${count} nodes inserted here`);
    picker.value = state.block === WHOLE ? "whole" : state.block;
    one("#previous").disabled = state.block <= 0;
    one("#next").disabled = state.block >= blocks.length - 1;
    one("#up").disabled = state.block === WHOLE;
    before.hidden = !compare.checked;
    put(after, state.pass);
    if (compare.checked) put(before, 0);
    tip.hidden = true;
    refit(false);
    find();
    tellAll();
  };
  const keep = () => {
    const block = state.block === WHOLE ? "whole" : state.block;
    const parts = [`pass=${encodeURIComponent(passes[state.pass])}`, `block=${block}`];
    if (state.node) parts.push("node=" + state.node);
    if (compare.checked) parts.push("compare");
    try { history.replaceState(null, "", "#" + parts.join("&")); } catch { /* a page inside another has no address */ }
  };
  const go = (change, focus) => {
    const last = state.node && drawingOf().nodes[state.node], block = state.block;
    Object.assign(state, change);
    if (last && !("node" in change)) {
      const same = ([, node]) => node.label === last.label && node.kind === last.kind;
      state.node = (block === state.block || block !== WHOLE && state.block !== WHOLE)
        ? (Object.entries(drawingOf().nodes).find(same) || [null])[0] : null;
    }
    draw();
    keep();
    if (focus) focus.focus();
  };
  const open = block => go({ block, node: null });
  const step = by => {
    const to = state.block + by;
    if (to >= 0 && to < blocks.length) go({ block: to });
  };

  // The pinned node
  const section = (title, lines, tag = "p") => {
    const found = lines.filter(Boolean);
    if (!found.length) return [];
    const body = tag === "li" ? make("ul") : tag === "pre" ? make("pre", found.join("\n")) : null;
    if (tag !== "pre") for (const line of found) body ? body.append(make(tag, line)) : 0;
    return [make("h3", title), ...(body ? [body] : found.map(line => make("p", line)))];
  };
  function tellAll() {
    for (const svg of visible()) all(".node", svg).forEach(node => node.classList.remove("pinned"));
    const svg = shown(after), node = state.node && drawingOf().nodes[state.node];
    panel.hidden = !node;
    if (!node) { state.node = null; panel.replaceChildren(); return; }
    const element = one(`[data-id="${state.node}"]`, svg), own = placesOf(state.block);
    element.classList.add("pinned");
    reveal(element);
    const why = (node.sites || []).filter(name => own[name]).flatMap(name => {
      const place = own[name];
      const reached = place.statements.map(line => `reached by ${line}`);
      return section(`Why it matched: ${named(name)}`, [
        `roles: ${place.roles.join(", ") || "none"}`, ...place.evidence.map(line => named(line)),
        ...(reached.length ? reached : ["no statement reaches it"])], "li");
    });
    const copy = make("button", "Copy"), close = make("button", "Close"), buttons = make("div", "", "buttons");
    copy.onclick = () => {
      const range = document.createRange(), selection = getSelection();
      range.selectNodeContents(panel); selection.removeAllRanges(); selection.addRange(range);
      document.execCommand("copy");
      copy.textContent = "Copied";
    };
    close.onclick = () => pin(null);
    buttons.append(copy, close);
    const target = node.opens ? blocks.indexOf(named(node.opens)) : -1;
    if (target >= 0 && target !== state.block) {
      const enter = make("button", "Open " + blocks[target]);
      enter.id = "enter";
      enter.onclick = () => open(target);
      buttons.prepend(enter);
    }
    panel.replaceChildren(make("h2", named(node.label)), make("p", node.state, "state"),
      ...section("Shape", node.shape ? node.shape.split(/(?<=\w), (?=\[)/) : []),
      ...section("Reads", (node.reads || []).map(line => named(line)), "li"),
      ...section("Statement", node.statements || []),
      ...section("Pass", [node.pass]),
      ...section("Notes", (node.notes || []).map(line => named(line))),
      ...why,
      ...section("Python", (node.python || []).map(line => named(line)), "pre"),
      ...section("Asked for by the model at", [node.source], "pre"), buttons);
    panel.scrollIntoView({ block: "nearest" });
  }
  const pin = id => { state.node = id; tellAll(); keep(); };

  // Search: here first, else the first block that has it
  const words = (node, block) => named([node.label, node.tip, ...(node.sites || [])].join("\n"), block).toLowerCase();
  const matches = (query, block) => Object.entries(drawingOf(state.pass, block).nodes)
    .filter(([, node]) => words(node, block).includes(query)).map(([id]) => id);
  const elsewhere = query => {
    const path = blocks.findIndex((name, index) => index !== state.block && name.toLowerCase().includes(query));
    return path >= 0 && query.length > 1 && !matches(query, state.block).length ? path
      : blocks.findIndex((_, index) => index !== state.block && matches(query, index).length);
  };
  function find() {
    const query = search.value.trim().toLowerCase(), hits = one("#hits"), svg = shown(after);
    const found = query ? matches(query, state.block) : [];
    for (const node of all(".node", svg)) node.classList.toggle("found", found.includes(node.dataset.id));
    const other = query && !found.length ? elsewhere(query) : -1;
    hits.textContent = !query ? "" : found.length ? `${found.length} here` : other >= 0 ? `⏎ ${blocks[other]}` : "none";
    return [found, other];
  }
  search.addEventListener("input", find);
  search.addEventListener("keydown", event => {
    if (event.key === "Escape") { search.value = ""; find(); return; }
    if (event.key !== "Enter") return;
    event.preventDefault();
    const [found, other] = find();
    if (found.length) pin(found[(found.indexOf(state.node) + (event.shiftKey ? found.length - 1 : 1)) % found.length]);
    else if (other >= 0) { open(other); const [there] = find(); if (there.length) pin(there[0]); }
  });

  // Stages and blocks
  const tablist = one("[role=tablist]"), more = one("#idle");
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => go({ pass: index }));
    tab.addEventListener("keydown", event => {
      const seen = tabs.filter(other => other.offsetParent), place = seen.indexOf(tab);
      const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: seen.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = seen[(to + seen.length) % seen.length];
      go({ pass: tabs.indexOf(next) }, next);
    });
  });
  if (more) more.addEventListener("click", () => {
    more.setAttribute("aria-expanded", tablist.classList.toggle("open"));
    refit(false);
  });
  compare.addEventListener("change", () => go({}));
  picker.addEventListener("change", () => go({ block: picker.value === "whole" ? WHOLE : +picker.value }));
  one("#previous").addEventListener("click", () => step(-1));
  one("#next").addEventListener("click", () => step(1));
  one("#up").addEventListener("click", () => open(WHOLE));
  one("#closer").addEventListener("click", () => visible().forEach(svg => zoom(svg, 1.25)));
  one("#farther").addEventListener("click", () => visible().forEach(svg => zoom(svg, 0.8)));
  one("#fit").addEventListener("click", () => refit(true));
  addEventListener("resize", () => refit(false));
  addEventListener("keydown", event => {
    if (/^(INPUT|SELECT)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = { "[": () => step(-1), "]": () => step(1), w: () => open(WHOLE), Escape: () => pin(null),
      "/": () => search.focus() }[event.key];
    if (act) { event.preventDefault(); act(); }
  });

  for (const view of all(".view")) {
    const pane = view.parentElement;
    let last = null, pressed = null, far = 0;
    view.addEventListener("pointerdown", event => {
      if (event.button !== 0) return;
      last = event; far = 0; pressed = event.target.closest(".node");
      view.setPointerCapture(event.pointerId);
      view.classList.add("dragging");
    });
    view.addEventListener("pointermove", event => {
      if (!last) return;
      far += Math.abs(last.clientX - event.clientX) + Math.abs(last.clientY - event.clientY);
      move(shown(pane), last.clientX - event.clientX, last.clientY - event.clientY);
      last = event; tip.hidden = true;
    });
    for (const name of ["pointerup", "pointercancel"])
      view.addEventListener(name, event => {
        if (last && far < 5 && pressed && name === "pointerup" && pane === after) pin(pressed.dataset.id);
        last = null; view.classList.remove("dragging");
      });
    view.addEventListener("dblclick", () => { if (pressed && one("#enter")) one("#enter").click(); });
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
  const tell = (text, x, y) => {
    const [first, ...rest] = text.split("\n");
    tip.replaceChildren(make("b", first), rest.join("\n"));
    tip.hidden = false;
    tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 12)) + "px";
    tip.style.top = Math.max(8, y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 12 : y + 18) + "px";
  };
  function watch(svg, drawing) {
    const edges = all(".edge", svg), block = state.block;
    for (const element of [...edges, ...all(".node", svg)]) {
      const { edge, id } = element.dataset, about = named(edge ? drawing.edges[edge] : drawing.nodes[id].tip, block);
      const wires = edge ? [element] : edges.filter(other => other.dataset.from === id || other.dataset.to === id);
      const touch = on => wires.forEach(wire => wire.classList.toggle("touched", on));
      element.addEventListener("pointermove", event => tell(about, event.clientX, event.clientY));
      element.addEventListener("pointerenter", () => touch(true));
      element.addEventListener("pointerleave", () => { touch(false); tip.hidden = true; });
      if (edge) continue;
      element.addEventListener("focus", () => {
        if (!element.matches(":focus-visible")) return;
        reveal(element);
        const now = element.getBoundingClientRect();
        tell(about, now.left, now.bottom - 10);
      });
      element.addEventListener("blur", () => { tip.hidden = true; });
      element.addEventListener("keydown", event => {
        if ((event.key !== "Enter" && event.key !== " ") || !svg.closest(".after")) return;
        event.preventDefault();
        if (state.node === id && one("#enter")) one("#enter").click();
        else pin(id);
      });
    }
  }
  const light = origin => {
    for (const svg of visible()) {
      svg.classList.toggle("dim", origin !== null);
      for (const part of all("[data-origin]", svg))
        part.classList.toggle("lit", origin !== null && part.dataset.origin.split(" ").includes(origin));
    }
  };
  for (const line of all("aside [data-origin]"))
    for (const [name, on] of [["pointerenter", 1], ["focus", 1], ["pointerleave", 0], ["blur", 0]])
      line.addEventListener(name, () => light(on ? line.dataset.origin : null));

  const read = () => {
    const parts = location.hash.slice(1).split("&").filter(Boolean);
    const wish = new Map(parts.map(part => part.split("=").map(decodeURIComponent)));
    const pass = passes.indexOf(wish.get("pass")), block = wish.get("block");
    if (pass >= 0) state.pass = pass;
    if (block === "whole") state.block = WHOLE;
    else if (block !== undefined) {
      const index = /^\d+$/.test(block) ? +block : blocks.indexOf(block);
      if (index in blocks) state.block = index;
    }
    state.node = wish.get("node") in drawingOf().nodes ? wish.get("node") : null;
    compare.checked = wish.has("compare");
    draw();
  };
  addEventListener("hashchange", read);
  document.body.classList.add("live");
  read();
})();
"""
