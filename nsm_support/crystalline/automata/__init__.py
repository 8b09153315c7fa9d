"""Machines that make data whose states are known, and the best that any model can do on each.

`make_machine(name)` builds one, `sample_batch(generator, batch_size, length)` draws from it. Hidden Markov models (fsm,
ambiguous, tokfsm) are predicted token by token; transducers (the others) are asked for the output of the state after each token.
"""

import difflib
from collections.abc import Callable
from functools import partial

from nsm_support.crystalline.automata.filtering import Beliefs, Optimum, beliefs, controls, optimum, predict, predictive_automaton
from nsm_support.crystalline.automata.hidden_markov import AmbiguousFSM, FiniteStateMachine, FSMConfig, HiddenMarkovModel, TokFSM
from nsm_support.crystalline.automata.machines import UNASKED, UNDEFINED, Automaton, Machine, Process, Sample
from nsm_support.crystalline.automata.structure import Survey, refine, survey, table_edges
from nsm_support.crystalline.automata.transducers import TOMITA, Transducer, modular_counter, permutation_group, tomita

MACHINES: dict[str, Callable[[], Machine]] = {
    "fsm": lambda: FiniteStateMachine(FSMConfig(num_states=8, tokens_per_state=3, vocab_size=24, seed=42)),
    "ambiguous": lambda: AmbiguousFSM(FSMConfig(num_states=8, tokens_per_state=3, vocab_size=6, seed=42)),
    "tokfsm": TokFSM,
    **{f"tomita{number}": partial(tomita, number) for number in TOMITA},
    "parity": partial(permutation_group, "parity"),
    "mod5": partial(modular_counter, 5),
    **{name: partial(permutation_group, name) for name in ("s3", "a5", "s5")},
}
"""The book's machines; the classes build others."""

__all__ = [
    "MACHINES", "UNASKED", "UNDEFINED", "AmbiguousFSM", "Automaton", "Beliefs", "FSMConfig", "FiniteStateMachine",
    "HiddenMarkovModel", "Machine", "Optimum", "Process", "Sample", "Survey", "TokFSM", "Transducer",
    "beliefs", "controls", "make_machine", "modular_counter", "optimum", "permutation_group", "predict", "predictive_automaton",
    "refine", "survey", "table_edges", "tomita",
]  # fmt: skip


def make_machine(name: str) -> Machine:
    """Build one of `MACHINES` by its name. Raises ValueError for another name, naming those there are."""
    if name not in MACHINES:
        near = "".join(f"; did you mean {other!r}?" for other in difflib.get_close_matches(str(name), MACHINES, n=1))
        raise ValueError(f"make_machine: {name!r} is no machine; accepted are {', '.join(MACHINES)}{near}")
    return MACHINES[name]()
