"""The page in a headless Chromium: what opens, what a click, a key, an address and a search do. Skips without one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from peftc import api
from peftc.show.formats import first_touched, render_show
from zoo import ZOO

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
pytestmark = [
    pytest.mark.xdist_group("show"),
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium"),
]
SPECS = {
    "llama": "apply lora(r=4) to (attn.*, mlp.up) in layers[1:]\ntrain norm in layers[1:]\n",
    "t5": "apply lora to attn.q\n",
}
# Before the page's own script: its errors are kept, and a pointer that is no device's can be captured.
_BEFORE = """<script>addEventListener("error", event => { document.title = "error: " + event.message; });
Element.prototype.setPointerCapture = () => {};</script>"""
_AFTER = """<script>{
  const one = query => document.querySelector(query), all = query => [...document.querySelectorAll(query)];
  const labels = () => all(".after .node").map(node => node.textContent);
  const node = text => all(".after .node").find(found => found.textContent.includes(text));
  const type = (target, key) =>
    target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const press = target => ["pointerdown", "pointerup"].forEach(name =>
    target.dispatchEvent(new PointerEvent(name, { bubbles: true, button: 0, pointerId: 1 })));
  const seen = () => ({ block: one("#where").textContent, pass: one("[aria-selected=true]").dataset.name,
    pinned: one("#panel").hidden ? null : one("#panel").innerText, address: location.hash });
  const told = (() => { TEST })();
  document.body.append(Object.assign(document.createElement("pre"), { id: "told", textContent: JSON.stringify(told) }));
}</script>"""


@cache
def starts() -> bool:
    """Whether a browser that is there runs: one may be installed in part, or in a place that lets it do nothing."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "about:blank"]
    try:
        return "<html>" in subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


@cache
def page(name: str) -> str:
    shown = api.graphs(ZOO[name](), SPECS[name])
    return render_show(shown, block=first_touched(shown.plan), format="html")


@pytest.fixture
def browse(tmp_path: Path) -> Any:
    """What some JavaScript returns that runs behind a page's own, at some address in the page."""
    if not starts():
        pytest.skip("Chromium does not start here")

    def browse(name: str, script: str, address: str = "") -> Any:
        text = page(name).replace("<script>", f"{_BEFORE}<script>", 1)
        file = tmp_path / "page.html"
        file.write_text(text.replace("</body>", _AFTER.replace("TEST", script) + "</body>"))
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]
        run = subprocess.run([*command, f"{file.as_uri()}{address}"], capture_output=True, text=True, timeout=100)
        title = re.search("<title>(.*?)</title>", run.stdout)
        assert title is not None, run.stderr
        assert not title[1].startswith("error"), title[1]
        told = re.search('<pre id="told">(.*?)</pre>', run.stdout, re.DOTALL)
        assert told is not None
        return json.loads(html.unescape(told[1]))

    return browse


def test_it_opens_on_the_first_block_that_the_spec_touches_and_steps_from_there(browse: Any) -> None:
    first, back, whole, into = browse(
        "llama",
        """const found = [seen()];
        one("#previous").click(); found.push(seen());
        type(document.body, "w"); found.push({ ...seen(), labels: labels() });
        press(node("model.layers.1")); one("#enter").click(); found.push({ ...seen(), labels: labels() });
        return found;""",
    )
    assert (first["block"], first["pass"], first["pinned"]) == ("model.layers.1", "fusions", None)
    assert back["block"] == "model.layers.0"
    assert whole["block"] == ""
    assert any("model.layers.0" in label for label in whole["labels"])
    assert into["block"] == "model.layers.1"
    assert any("model.layers.0" in label for label in into["labels"])  # what enters it
    assert not any("⟦" in label for label in into["labels"])
    assert into["address"] == "#pass=fusions&block=1"


def test_a_pinned_node_says_what_it_is_and_why_it_matched(browse: Any) -> None:
    pinned, fused, gone, idle = browse(
        "llama",
        """const found = [];
        all("[role=tab]").find(tab => tab.dataset.name === "capture").click();
        press(node("q_proj.weight")); found.push(seen());
        all("[role=tab]").find(tab => tab.dataset.name === "fusions").click();
        type(node("{q,k,v}_proj.weight"), "Enter"); found.push(seen());
        type(document.body, "Escape"); found.push(seen());
        found.push(all("[role=tab]").filter(tab => !tab.offsetParent).map(tab => tab.dataset.name));
        return found;""",
    )
    text = pinned["pinned"]
    for words in (
        "[batch, seq, 48] f32", "model.layers.1.self_attn.q_proj.weight [48, 32] f32", "roles: attn.q, linear",
        "the queries of the attention in model.layers.1.self_attn come from it: linear → ",
        "torch.ops.aten.linear.default", "reached by line 1: apply lora(r=4) to (attn.*", "modeling_llama.py",
    ):  # fmt: skip
        assert words in text
    assert "fusions" in fused["pinned"]
    assert all(f"model.layers.1.self_attn.{letter}_proj" in fused["pinned"] for letter in "qkv")
    assert gone["pinned"] is None
    assert {"storage", "penalties"} <= {*idle}


def test_an_address_leads_to_a_node(browse: Any) -> None:
    address = "#pass=weight%20methods&block=model.layers.1&node=n3&compare"
    found = browse("llama", "return { ...seen(), panes: all('.pane:not([hidden])').length };", address)
    assert (found["block"], found["pass"], found["panes"]) == ("model.layers.1", "weight methods", 2)
    assert found["pinned"] is not None


def test_a_search_finds_here_else_elsewhere(browse: Any) -> None:
    here, elsewhere, none = browse(
        "llama",
        """const found = [], search = one("#search"), ask = text => {
          search.value = text; search.dispatchEvent(new Event("input")); };
        ask("down_proj"); type(search, "Enter"); found.push({ ...seen(), hits: one("#hits").textContent });
        ask("embed_tokens"); found.push({ hits: one("#hits").textContent });
        type(search, "Enter"); found[1] = { ...found[1], ...seen() };
        ask("no such thing"); found.push(one("#hits").textContent);
        return found;""",
    )
    assert "down_proj" in here["pinned"]
    assert here["hits"].endswith("here")
    assert elsewhere["hits"] == "⏎ model.layers.0"
    assert elsewhere["block"] == "model.layers.0"
    assert "embed_tokens" in elsewhere["pinned"]
    assert none == "none"


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_no_label_meets_another(browse: Any, name: str) -> None:
    """In each block after each pass: labels are inside their boxes, and the names of operands beside each other."""
    found = browse(
        name,
        """const found = [], box = element => element.getBBox();
        const before = (a, b) => a.x + a.width <= b.x || a.y + a.height <= b.y;
        const apart = (a, b) => before(a, b) || before(b, a);
        let count = 0;
        for (const option of one("#block").options) {
          one("#block").value = option.value; one("#block").dispatchEvent(new Event("change"));
          for (const tab of all("[role=tab]:not(.same)")) {
            tab.click();
            for (const node of all(".after .node")) {
              const text = box(node.querySelector(":scope > text")), body = box(node.querySelector(".body"));
              count += 1;
              if (text.x < body.x || text.x + text.width > body.x + body.width) found.push(node.textContent);
            }
            const names = all(".after .edge > text"), boxes = names.map(box);
            boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
              if (!apart(a, b)) found.push(names[i].textContent + " on " + names[i + j + 1].textContent); }));
          }
        }
        return { found, count };""",
    )
    assert found["count"] > 100
    assert found["found"] == []
