"""Automata as plain SVG, and two of them side by side that a reader steps a string through.

States stand on a circle in the order of the shortest strings that reach them; a double ring accepts. The drawing takes
its ink from the page. `static/automata.js` moves the marks; without it, drawings and a still table remain.
"""

import html
import json
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

from nsm_support.crystalline.automata import Automaton, Transducer, table_edges
from nsm_support.crystalline.automata.extraction import compare, minimise
from nsm_support.figures import STATIC

SIZE, RING, RADIUS = 350, 105, 19  #: of the drawing, of the circle of states, of a state, in CSS pixels
MOST = 12  #: states that one drawing can hold
BEND = 20  #: how far an arrow bows out to the right of its way


class Pair(NamedTuple):
    """A learned automaton beside the true one, under the name that the reader chooses it by."""

    name: str
    learned: Automaton
    true: Automaton | Transducer


def automaton_svg(automaton: Automaton | Transducer) -> str:
    """Draw an automaton as inline SVG: its states that strings reach, numbered as `minimise` numbers them.

    Two classes of output are drawn as plain and double rings; of more, each state says its own. Raises ValueError if there are
    more than 12 states.
    """
    start, transition, output = minimise(automaton)
    states = len(output)
    if states > MOST:
        raise ValueError(f"automaton_svg: {states} states; up to {MOST} are accepted, more could not be read")
    acceptor, ring = int(output.max()) <= 1, RING if states > 1 else 0
    turn = [2 * math.pi * state / states - math.pi / 2 for state in range(states)]
    places = [(SIZE / 2 + ring * math.cos(angle), SIZE / 2 + ring * math.sin(angle)) for angle in turn]
    ways: dict[tuple[int, int], list[int]] = {}
    for state, token, following, _ in table_edges(transition):
        ways.setdefault((state, following), []).append(token)
    parts = [
        _loop(places[a], turn[a], tokens) if a == b else _arrow(places[a], places[b], tokens) for (a, b), tokens in ways.items()
    ]
    (x, y), side = places[start], -1 if states > 1 else 1
    tip = x - RADIUS - 1, y + 6 * side
    path = f"M{x - 45:.1f} {y + 18 * side:.1f}L{tip[0]:.1f} {tip[1]:.1f}"
    parts.append(_stroke(path, tip, math.atan2(-12 * side, 26)))
    for state, (x, y) in enumerate(places):
        words = str(state) if acceptor else f"{state}/{int(output[state])}"
        inner = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS - 4}"/>' if acceptor and output[state] == 1 else ""
        parts.append(
            f'<g class="nsm-state" data-state="{state}"><circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>{inner}'
            f'<text x="{x:.1f}" y="{y + 5:.1f}">{words}</text></g>'
        )
    return f'<svg aria-hidden="true" focusable="false" class="nsm-automaton" viewBox="0 0 {SIZE} {SIZE}">{"".join(parts)}</svg>'


def _stroke(path: str, tip: tuple[float, float], angle: float) -> str:
    """A line and the head of an arrow at its tip, pointing along `angle`."""
    x, y = tip
    wings = "".join(f"L{x - 9 * math.cos(angle + turn):.1f} {y - 9 * math.sin(angle + turn):.1f}" for turn in (0.4, -0.4))
    return f'<path d="{path}"/><path class="nsm-head" d="M{x:.1f} {y:.1f}{wings}Z"/>'


def _label(x: float, y: float, tokens: Sequence[int]) -> str:
    return f'<text class="nsm-token" x="{x:.1f}" y="{y + 4:.1f}">{",".join(map(str, tokens))}</text>'


def _arrow(source: tuple[float, float], target: tuple[float, float], tokens: Sequence[int]) -> str:
    """An arrow between two states, bowed to the right, so that the one back does not cover it."""
    dx, dy = target[0] - source[0], target[1] - source[1]
    length = math.hypot(dx, dy)
    across = (-dy / length, dx / length)
    bow = (source[0] + dx / 2 - 2 * BEND * across[0], source[1] + dy / 2 - 2 * BEND * across[1])

    def edge(point: tuple[float, float], gap: float) -> tuple[float, float]:
        far = math.hypot(bow[0] - point[0], bow[1] - point[1])
        return point[0] + (bow[0] - point[0]) * gap / far, point[1] + (bow[1] - point[1]) * gap / far

    begin, end = edge(source, RADIUS), edge(target, RADIUS + 2)
    path = f"M{begin[0]:.1f} {begin[1]:.1f}Q{bow[0]:.1f} {bow[1]:.1f} {end[0]:.1f} {end[1]:.1f}"
    # Nearer to where it begins (at 0.35 of the curve), so that crossing arrows do not put their labels in one place.
    x, y = (0.4225 * a + 0.455 * b + 0.1225 * c - 9 * d for a, b, c, d in zip(begin, bow, end, across, strict=True))
    return _stroke(path, end, math.atan2(end[1] - bow[1], end[0] - bow[0])) + _label(x, y, tokens)


def _loop(place: tuple[float, float], angle: float, tokens: Sequence[int]) -> str:
    """An arrow from a state to itself, outside the circle."""

    def at(turn: float, far: float) -> tuple[float, float]:
        return place[0] + far * math.cos(angle + turn), place[1] + far * math.sin(angle + turn)

    begin, one, two, end = at(-0.5, RADIUS), at(-0.65, RADIUS + 34), at(0.65, RADIUS + 34), at(0.5, RADIUS + 2)
    path = "M{:.1f} {:.1f}C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(*begin, *one, *two, *end)
    return _stroke(path, end, math.atan2(end[1] - two[1], end[0] - two[0])) + _label(*at(0, RADIUS + 36), tokens)


def show_stepper(pairs: Sequence[Pair], *, name: str, caption: str) -> None:
    """Show pairs of automata over the tokens 0 … 9; the reader types a string, and sees where the two part.

    Args:
        pairs: the first one is what the page opens with.
        name: unique on the page; the figure can be linked to as `#fig-NAME`.
        caption: HTML.

    Raises ValueError without a pair, or if one has more than 10 tokens or an automaton of more than 12 states.
    """
    from IPython.display import display

    if not pairs:
        raise ValueError("show_stepper: no pair was given; at least one is accepted")
    text = stepper(pairs, name=name, caption=caption)
    if "NSM_BOOK_RUN" not in os.environ:  # a live notebook has neither script nor style
        text = (
            f"<style>{(STATIC / 'figures.css').read_text()}{(STATIC / 'automata.css').read_text()}</style>{text}"
            f"<script>{(STATIC / 'automata.js').read_text()}</script>"
        )
    words = "; ".join(pair.name for pair in pairs)
    display({"text/html": text, "text/plain": f"Figure {name}: learned automata beside the true ones: {words}"}, raw=True)


def stepper(pairs: Sequence[Pair], *, name: str, caption: str) -> str:
    """The HTML of `show_stepper`."""
    options = "".join(f'<option value="{i}">{html.escape(pair.name)}</option>' for i, pair in enumerate(pairs))
    tokens = max(pair.true.transition.shape[1] for pair in pairs)
    if tokens > 10:
        raise ValueError(f"stepper: {tokens} tokens; up to 10 are accepted, a digit each")
    keys = "".join(f'<button type="button" data-token="{token}">{token}</button>' for token in range(tokens))
    controls = (
        f'<div class="nsm-controls nsm-needs-script" hidden><label>machine <select data-role="pair">{options}</select></label>'
        f'<label>string <input type="text" data-role="string" inputmode="numeric" autocomplete="off" spellcheck="false">'
        f'</label><span class="nsm-keys" role="group" aria-label="Add a token or take one back">{keys}'
        f'<button type="button" data-role="back">take one back</button><button type="button" data-role="example">'
        f"where they part</button></span></div>"
    )
    drawn = "".join(_pair(pair, i) for i, pair in enumerate(pairs))
    data = json.dumps([_data(pair) for pair in pairs], separators=(",", ":"))
    return (
        f'<figure class="nsm-figure nsm-stepper" id="fig-{name}">{controls}{drawn}'
        f'<p class="nsm-message nsm-needs-script" data-role="message" role="status" hidden></p>'
        f'<script type="application/json" class="nsm-machines">{data}</script>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _pair(pair: Pair, number: int) -> str:
    verdict, states = compare(pair.learned, pair.true), len(minimise(pair.true).output)
    words = f"{pair.name}: the true automaton with {states} states, and the learned one with {verdict.num_states}; "
    words += f"{'the same machine' if verdict.equivalent else 'another machine'}."
    sides = "".join(
        f'<div data-side="{side}"><strong>{title}</strong>{automaton_svg(one)}</div>'
        for side, title, one in (("true", "true", pair.true), ("learned", "learned", pair.learned))
    )
    return (
        f'<div class="nsm-pair" data-pair="{number}"><p class="nsm-pair-name">{html.escape(pair.name)}</p>'
        f'<div class="nsm-drawing nsm-both" role="img" tabindex="0" aria-label="{html.escape(words)}">{sides}</div>'
        f"{_still(pair, verdict.counter_example)}</div>"
    )


def _still(pair: Pair, example: Sequence[int] | None) -> str:
    """What stands there without a script: the shortest string on which the two part, step by step; or that there is none."""
    if example is None:
        return '<p class="nsm-still-run">No string tells them apart: the two are equivalent.</p>'
    both = [minimise(pair.true), minimise(pair.learned)]
    state = [automaton.start for automaton in both]
    heads = "".join(f'<th scope="col">{word}</th>' for word in ("read", "true state", "output", "learned state", "output"))
    rows = []
    for step in range(len(example) + 1):
        if step:
            state = [int(machine.transition[s, example[step - 1]]) for machine, s in zip(both, state, strict=True)]
        cells = "".join(f"<td>{s}</td><td>{int(machine.output[s])}</td>" for machine, s in zip(both, state, strict=True))
        rows.append(f'<tr><th scope="row">{"".join(map(str, example[:step])) or "nothing"}</th>{cells}</tr>')
    return (
        f'<table class="nsm-still-run"><caption>A shortest string on which they part</caption><thead><tr>{heads}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _data(pair: Pair) -> dict:
    machines = {}
    for side, given in (("true", pair.true), ("learned", pair.learned)):
        start, transition, output = minimise(given)
        machines[side] = {"start": start, "transition": transition.tolist(), "output": output.tolist()}
    example, acceptor = compare(pair.learned, pair.true).counter_example, int(pair.true.output.max()) <= 1
    return {**machines, "example": example, "acceptor": acceptor, "tokens": pair.true.transition.shape[1]}
