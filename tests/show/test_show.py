"""`show`: what is drawn, in every format. The golden files are under golden/show/."""

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from golden import check
from paths import GOLDEN
from peftc.driver.compiled import CompiledModule
from peftc.graph.printing import UniqueSuffixes, plain
from peftc.show.formats import (
    Drawing,
    DrawnEdge,
    DrawnNode,
    Format,
    as_text,
    diff,
    draw,
    render_show,
    to_dot,
    to_mermaid,
    to_svg,
    to_text,
)
from peftc.show.picture.album import Album
from peftc.show.picture.layout import lay_out
from zoo import GROUPED, ZOO

# One worker of pytest-xdist gets the file: it compiles each model once, see `compiled`.
# Its texts have the names that a capture gives.
pytestmark = [pytest.mark.xdist_group("show"), pytest.mark.captures]

SHOWN = GOLDEN / "show"

SPECS = {
    "llama": "apply lora(r=4) to attn.*, mlp.up\ntrain norm\n",
    "gpt2": "apply lora(r=4) to attn.q, attn.v\napply ia3 to mlp.down\n",
    "bert": "# three methods on one encoder\n"
    "apply lora(r=4) to attn.q, attn.v\napply adapter(size=8) to attn, mlp\n"
    "apply ia3 to attn.k, attn.v, mlp.down\ntrain norm, bias\n",
}
BLOCKS = {"llama": "model.layers.0", "gpt2": "transformer.h.0", "bert": "bert.encoder.layer.0"}
NASTY = "a\"b<c>&d\\e'f#g;h|i]j`k\u202el"


@cache
def compiled(name: str) -> CompiledModule:
    """Without fusions, so that what is drawn is the methods' own; `test_after_the_fusions` has them."""
    return peftc.compile(ZOO[name](), SPECS[name], fuse=False)


def last(name: str) -> fx.Graph:
    return list(compiled(name).history.values())[-1]


def drawing(name: str, block: str | None, *, detail: bool = False) -> Drawing:
    return draw(last(name), block, compiled(name).plan, detail=detail)


# Golden files


@pytest.mark.parametrize("name", SPECS)
def test_block(name: str, pytestconfig: pytest.Config) -> None:
    check(SHOWN / f"{name}-block.txt", render_show(compiled(name), block=BLOCKS[name]), pytestconfig)


@pytest.mark.parametrize("name", SPECS)
def test_block_before(name: str, pytestconfig: pytest.Config) -> None:
    text = render_show(compiled(name), block=BLOCKS[name], after="capture")
    check(SHOWN / f"{name}-before.txt", text, pytestconfig)


@pytest.mark.parametrize("name", SPECS)
def test_model(name: str, pytestconfig: pytest.Config) -> None:
    check(SHOWN / f"{name}-model.txt", render_show(compiled(name)), pytestconfig)


def test_detail(pytestconfig: pytest.Config) -> None:
    text = render_show(compiled("gpt2"), block=BLOCKS["gpt2"], detail=True)
    check(SHOWN / "gpt2-detail.txt", text, pytestconfig)


def test_dot(pytestconfig: pytest.Config) -> None:
    check(SHOWN / "gpt2.dot", render_show(compiled("gpt2"), block=BLOCKS["gpt2"], format="dot"), pytestconfig)


def test_mermaid(pytestconfig: pytest.Config) -> None:
    check(SHOWN / "bert.mmd", render_show(compiled("bert"), block=BLOCKS["bert"], format="mermaid"), pytestconfig)


def test_as_text(pytestconfig: pytest.Config) -> None:
    check(SHOWN / "bert-graph.txt", as_text(last("bert")), pytestconfig)


def test_diff_of_each_pass(pytestconfig: pytest.Config) -> None:
    stages = list(compiled("bert").history.items())
    text = "".join(f"== {name}\n{diff(before, after)}" for (_, before), (name, after) in pairwise(stages))
    check(SHOWN / "bert-diff.txt", text, pytestconfig)


def test_after_the_fusions(pytestconfig: pytest.Config) -> None:
    """What belongs together is one node, which says which statement it serves."""
    fused = peftc.compile(ZOO["llama"](), SPECS["llama"])
    text = render_show(fused, block=BLOCKS["llama"], after="fusions")
    check(SHOWN / "llama-fusions.txt", text, pytestconfig)
    before, after = fused.history["tidy"], fused.history["fusions"]
    assert "+ lora model.layers.0.self_attn.q_proj" in diff(before, after)


@pytest.mark.parametrize(
    ("file", "arguments"),
    [("unknown-block", {"block": "model.layer.0"}), ("unknown-pass", {"after": "tidi"})],
)
def test_mistakes(file: str, arguments: dict[str, str], pytestconfig: pytest.Config) -> None:
    with pytest.raises(peftc.PeftcError) as caught:
        render_show(compiled("llama"), block=arguments.get("block"), after=arguments.get("after"))
    check(SHOWN / f"{file}.err", f"{caught.value}\n", pytestconfig)


# What is drawn


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("detail", [True, False])
def test_a_drawing_is_a_graph_without_circles(name: str, whole: bool, detail: bool) -> None:
    drawn = drawing(name, None if whole else BLOCKS[name], detail=detail)
    keys = [node.id for node in drawn.nodes]
    assert len(set(keys)) == len(keys)
    assert {end for edge in drawn.edges for end in (edge.source, edge.target)} == set(keys)
    assert nx.is_directed_acyclic_graph(nx.DiGraph((edge.source, edge.target) for edge in drawn.edges))
    assert not re.search(r"\bs\d+\b", " ".join(node.shape for node in drawn.nodes))


@pytest.mark.parametrize("name", SPECS)
def test_every_tensor_of_a_method_in_the_block_is_drawn_with_its_statement(name: str) -> None:
    plan = compiled(name).plan
    drawn = {node.notes[0]: node for node in drawing(name, BLOCKS[name]).nodes if node.kind == "parameter"}
    for binding in plan.bindings:
        for state, spec in binding.state.items():
            path = f"{binding.path}.{state}"
            assert (path in drawn) is path.startswith(f"{BLOCKS[name]}.")
            if path in drawn:
                node = drawn[path]
                assert (node.inserted, node.trainable, node.line) == (True, spec.trainable, binding.span.line)
                assert node.statement == binding.span.text
                assert node.shape.startswith(f"[{', '.join(map(str, spec.shape))}]")


def test_what_an_existing_parameter_learns_shows_after_capture_only() -> None:
    llama, block = compiled("llama"), BLOCKS["llama"]
    trained = [n for n in drawing("llama", block).nodes if n.trainable and not n.inserted]
    assert [node.label for node in trained] == ["input_layernorm.weight", "post_attention_layernorm.weight"]
    assert {node.statement for node in trained} == {"train norm"}
    before = draw(llama.history["capture"], block, llama.plan, trained=False)
    assert not any(node.kind == "parameter" or node.inserted for node in before.nodes)


def test_fused_projections_arrive_as_three_operands() -> None:
    gpt2 = compiled("gpt2")
    drawn = draw(gpt2.history["capture"], BLOCKS["gpt2"], gpt2.plan, trained=False)
    attention = next(node.id for node in drawn.nodes if node.op == "scaled_dot_product_attention")
    arriving = [edge for edge in drawn.edges if edge.target == attention]
    assert [edge.argument for edge in arriving] == ["query", "key", "value", "attn_mask"]
    assert len({edge.source for edge in arriving[:3]}) == 1
    assert [part for edge in arriving for part in edge.through if part.startswith("part")] == [
        "part 0", "part 1", "part 2"
    ]  # fmt: skip


def test_detail_only_adds() -> None:
    some, every = (drawing("bert", BLOCKS["bert"], detail=detail) for detail in (False, True))
    assert {node.id for node in some.nodes if node.inserted} < {node.id for node in every.nodes if node.inserted}
    assert any(node.op == "transpose" for node in every.nodes)


def test_nothing_changes_between_equal_graphs() -> None:
    assert diff(last("llama"), last("llama")) == "no change\n"


def test_diff_backwards_removes_what_was_inserted() -> None:
    history = list(compiled("llama").history.values())
    head = re.compile(r"(\d+) inserted, (\d+) removed, (\d+) changed")
    forward = head.match(diff(history[0], history[-1]))
    backward = head.match(diff(history[-1], history[0]))
    assert forward is not None
    assert backward is not None
    assert forward.groups() == (backward[2], backward[1], backward[3])


def test_suffixes_tell_paths_apart() -> None:
    names = UniqueSuffixes({path: path for path in ("a.q.A", "b.q.A", "c.k.A", "d")})
    assert [names.short(path) for path in ("a.q.A", "b.q.A", "c.k.A", "d")] == ["a.q.A", "b.q.A", "k.A", "d"]
    assert names.short("c.k.A", 3) == "c.k.A"


# Layout


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("whole", [True, False])
def test_nodes_do_not_overlap_and_edges_go_down(name: str, whole: bool) -> None:
    drawn = drawing(name, None if whole else BLOCKS[name])
    layout = lay_out(drawn)
    boxes = list(layout.boxes.values())
    assert len(boxes) == len(drawn.nodes)
    for index, one in enumerate(boxes):
        assert one.width / 2 <= one.x <= layout.width - one.width / 2
        assert one.height / 2 <= one.y <= layout.height - one.height / 2
        for other in boxes[:index]:
            apart_x = abs(one.x - other.x) - (one.width + other.width) / 2
            apart_y = abs(one.y - other.y) - (one.height + other.height) / 2
            assert max(apart_x, apart_y) > 2
    for route in layout.routes:
        heights = [y for _, y in route.points]
        assert route.sideways or heights == sorted(heights)


def test_an_empty_drawing_has_a_layout() -> None:
    assert lay_out(Drawing("nothing", (), ())).boxes == {}


# Formats


class _Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would see."""

    VOID = frozenset(("meta", "input", "br", "rect", "path", "polygon"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [name for name, _ in attrs if name in ("href", "src", "srcset", "action") or name[:2] == "on"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("whole", [True, False])
def test_the_page_is_well_formed_and_needs_no_network(name: str, whole: bool) -> None:
    text = render_show(compiled(name), block=None if whole else BLOCKS[name], format="html")
    page = _Page(text)
    assert page.open == []
    assert page.links == []
    assert not {"link", "img", "iframe", "object", "image", "use", "a", "base"} & set(page.tags)
    assert "://" not in text
    assert str(Path.cwd()) not in text


@pytest.mark.slow
def test_the_same_bytes_from_another_compilation() -> None:
    again = peftc.compile(ZOO["llama"](), SPECS["llama"], fuse=False)
    formats: tuple[Format, ...] = ("text", "dot", "mermaid", "html")
    for format in formats:
        for block in (None, BLOCKS["llama"]):
            one, other = (render_show(model, block=block, format=format) for model in (compiled("llama"), again))
            assert one == other
    assert as_text(last("llama")) == as_text(list(again.history.values())[-1])


def test_a_page_opens_with_the_pass_asked_for() -> None:
    text = render_show(compiled("bert"), block=BLOCKS["bert"], after="weight methods", format="html")
    assert re.findall(r'aria-selected="true"[^>]*data-name="([^"]*)"', text) == ["weight methods"]
    assert re.findall(r'<option value="(\w+)" selected', text) == ["0"]


def test_blocks_that_are_alike_share_their_drawings() -> None:
    """In a Llama of four layers the two in the middle differ in their names alone."""
    model = LlamaForCausalLM(LlamaConfig.from_dict(GROUPED | {"num_hidden_layers": 4}))
    shown = peftc.compile(model, SPECS["llama"], fuse=False)
    album = Album(shown.plan, shown.history)
    first, second, third, last = (album.looks[block] for block in album.blocks)
    assert second == third
    assert len({row[-1].drawing for row in (first, second, last)}) == 3
    assert "materialise" not in album.idle
    assert {"storage", "positions", "penalties"} <= album.idle
    drawn, (marked, _) = album.drawn(album.blocks[1], "tidy"), [*album.drawings.items()][second[-1].drawing]
    assert "⟦-1⟧" in {node.label for node in marked.nodes}
    assert album.blocks[0] in {node.label for node in drawn.nodes}


def _nasty() -> Drawing:
    origin = next(node for node in drawing("llama", BLOCKS["llama"]).nodes if node.origins).origins[0]
    origins = (replace(origin, statement=NASTY, file=NASTY),)
    nodes = (
        DrawnNode(NASTY, "input", NASTY, NASTY, NASTY),
        DrawnNode("b", "operation", NASTY, NASTY, inserted=True, origins=origins, notes=(NASTY,)),
    )
    return Drawing(NASTY, nodes, (DrawnEdge(NASTY, "b", NASTY, (NASTY,)),))


def test_dot_escapes() -> None:
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', to_dot(_nasty()))
    rest = re.sub(r'"((?:[^"\\]|\\.)*)"', "", to_dot(_nasty()))
    assert not set(rest) & set("\"<>&'\\") - {">"}
    assert NASTY in [re.sub(r"\\(.)", r"\1", string) for string in strings]


def test_mermaid_escapes() -> None:
    for line in to_mermaid(_nasty()).splitlines():
        for quoted in re.findall(r'"(.*?)"', line):
            words = re.sub(r"#\d+;|<br/>", "", quoted)
            assert re.fullmatch(r"[\w .,:\-\[\]()]*", words)
    assert "#34;" in to_mermaid(_nasty())


def test_html_escapes() -> None:
    spec = "# </style></script><script>alert(1)</script> & \"' \\\napply lora to attn.q # <img src=x onerror=y>\n"
    model = peftc.compile(ZOO["llama"](), spec, fuse=False)
    text = render_show(model, format="html")
    page = _Page(text)
    assert page.open == []
    assert page.links == []
    assert page.tags.count("script") == 2  # the data, and what reads it
    assert "img" not in page.tags
    assert spec.splitlines()[0] in page.text


def test_svg_escapes() -> None:
    tree = ElementTree.fromstring(to_svg(_nasty(), {}, NASTY))
    assert {element.tag.partition("}")[2] for element in tree.iter()} == {
        "svg", "title", "style", "rect", "text", "tspan", "g", "path", "polygon",
    }  # fmt: skip
    assert NASTY in "".join(tree.itertext())


@pytest.mark.parametrize("name", SPECS)
def test_an_image_stands_alone(name: str) -> None:
    """Well-formed, with every node in it, and in no need of what only browsers have."""
    text = render_show(compiled(name), block=BLOCKS[name], format="svg")
    tree = ElementTree.fromstring(text)
    assert sum(element.get("data-id") is not None for element in tree.iter()) == len(drawing(name, BLOCKS[name]).nodes)
    assert not re.search(r"var\(|color-mix|mix\(|--|<script|href", text)


def test_plain_text_stays_on_its_line() -> None:
    assert plain("a\n  b\x1b[0m\u202ec") == "a b\ufffd[0m\ufffdc"
    nasty = replace(_nasty(), title="t")
    assert len(to_text(nasty).splitlines()) == 3
