"""Trainings of recurrent machines, proven, read by clusters, and written into."""

from dataclasses import replace

import pytest
import torch

from nsm_support.crystalline.automata import make_machine
from nsm_support.crystalline.automata.extraction import compare
from nsm_support.crystalline.recurrent.training import History, RecurrentTraining, train
from nsm_support.studies.protocol import measure
from nsm_support.studies.recurrent import RecurrentRun, build_machines, cluster_automaton, futures_after_writing, predict_relaxed

PARITY = RecurrentRun(
    machine="parity", seeds=(0, 1, 2), training=RecurrentTraining(steps=200, record_every=50), num_codes=16, factor=5, strings=50
)


def randoms(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def strings(machines: int, strings: int, length: int, tokens: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(tokens, (machines, strings, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def parity():
    """Parity, trained and proven: the result of three seeds."""
    return measure(PARITY)


@pytest.mark.slow
def test_parity_is_learned_and_proven(parity):
    history = History(**parity.tensors)
    for seed, row in enumerate(parity.rows):
        assert (row["seed"], row["equivalent"], row["num_states"], row["counter_example"]) == (seed, True, 2, None)
        assert row["accuracy"] == row["accuracy_long"] == row["accuracy_soft"] == 1.0
    first = [compare(history.automaton(0, e), make_machine("parity")).equivalent for e in range(3)]
    last = [compare(history.automaton(-1, e), make_machine("parity")).equivalent for e in range(3)]
    assert (first, last) == ([False] * 3, [True] * 3), "the untrained machine is another one"
    assert (history.entropy[-1] < history.entropy[0]).all() and (history.nats[-1] < 0.01).all()


def test_a_codes_future_is_that_of_its_state(parity):
    moved = futures_after_writing(parity.model(), make_machine("parity"), randoms(0)[0])
    assert moved.chosen.tolist() == [1.0] * 3
    assert moved.untouched.tolist() == [0.0] * 3, "from the other state every output differs"
    assert (moved.random > 0.2).all() and (moved.random < 0.8).all()
    untrained = build_machines(make_machine("parity"), 16, (0, 1, 2))
    assert futures_after_writing(untrained, make_machine("parity"), randoms(0)[0]).chosen.max() < 0.5


def test_soft_and_hard_outputs_of_a_sharp_machine_agree(parity):
    sharp, tokens = parity.model(), strings(3, 20, 30, 2)
    vague = build_machines(make_machine("parity"), 16, (0, 1, 2))
    assert torch.equal(predict_relaxed(sharp, tokens), sharp(tokens).logits.argmax(-1))
    assert not torch.equal(predict_relaxed(vague, tokens), vague(tokens).logits.argmax(-1))
    with torch.no_grad():  # the likeliest output of all codes together, and not that of the likeliest code
        beliefs = vague.relaxed(tokens, strings(3, 20, 31, 2, seed=1), "marginal").beliefs[:, :, 1:]
        read = vague.output_logits(vague.codebook).softmax(-1)
    assert torch.equal(predict_relaxed(vague, tokens), torch.einsum("ebtk,ekc->ebtc", beliefs, read).argmax(-1))
    assert not torch.equal(
        predict_relaxed(vague, tokens), vague.tables()[1].gather(1, beliefs.argmax(-1).flatten(1)).view(3, 20, 30)
    )


def test_the_control_without_codes_is_read_by_clusters():
    found = measure(replace(PARITY, seeds=(0, 1), training=RecurrentTraining(steps=200, objective="continuous")))
    assert [(row["equivalent"], row["accuracy"]) for row in found.rows] == [(True, 1.0)] * 2
    machine, vague = make_machine("parity"), build_machines(make_machine("parity"), 16, (0,))
    assert not compare(cluster_automaton(vague, machine, 0, randoms(1)[0]), machine).equivalent
    assert found.tensors["entropy"].isnan().all() and found.tensors["revived"].sum() == 0


def test_clusters_have_a_next_state_for_every_token_also_where_no_string_went():
    """Strings of 1* hardly ever leave it: from many a cluster no string shows a 0, and the network's own step decides."""
    machine = make_machine("tomita1")
    model = build_machines(machine, 16, (0,))
    train(model, machine, model.generators, RecurrentTraining(steps=150, objective="continuous"))
    automaton = cluster_automaton(model, machine, 0, randoms(1)[0], strings=20)
    assert automaton.transition.min() >= 0 and automaton.transition.max() < 16
    assert compare(automaton, machine).equivalent
    with torch.no_grad():  # a step is the definition's
        states = model.continuous(torch.tensor([[[1, 0, 1]]]))
        torch.testing.assert_close(model.step_continuous(states[:, :, 1], torch.tensor([[0]])), states[:, :, 2])


@pytest.mark.parametrize(("name", "message"), [("tomita9", "'tomita9' is no machine"), ("fsm", "asks for no outputs")])
def test_other_machines_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        measure(replace(PARITY, machine=name))
