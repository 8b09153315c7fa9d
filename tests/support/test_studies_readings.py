"""Readings of entropy in closed form and each moved by one thing alone; TokFSM's edges; codes written into a model."""

import math

import pytest
import torch
import torch.nn.functional as F

from nsm_support.crystalline import BottleneckConfig, CrystallineConfig, CrystallineTransformer
from nsm_support.crystalline.automata import make_machine
from nsm_support.crystalline.codes.bottleneck import written
from nsm_support.studies.readings import after_writing, entropy_readings, first_transition, read_entropy

MACHINE = make_machine("tokfsm")


def fresh(bypass=True):
    torch.manual_seed(0)
    config = CrystallineConfig(
        vocab_size=11,
        token_dim=16,
        num_layers=2,
        num_heads=2,
        max_length=8,
        bypass=bypass,
        positions="learned",
        bottleneck=BottleneckConfig(codebook_size=20),
    )
    return CrystallineTransformer(config).eval()


def test_first_transition_is_the_machines_question_to_the_model():
    model = fresh()
    with torch.no_grad():
        expected = MACHINE.first_transition(lambda tokens: model(tokens)[0].log_softmax(-1))
        assert first_transition(model, []) == {"first_transition": expected.accuracy, "mass": expected.mass}


@pytest.mark.parametrize("bypass", [False, True])
def test_a_written_code_stands_where_it_was_written_and_nowhere_else(bypass):
    model = fresh(bypass)
    tokens = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(1))
    codes = torch.full_like(tokens, -1)
    codes[:, 3] = torch.arange(5)
    last = model.blocks[-1].mlp_bottleneck
    with torch.no_grad():
        untouched = model(tokens)[0]
        with written(last, codes):
            touched = model(tokens)[0]
        again = model(tokens)[0]
        code = last.codebook[codes[:, 3]]
        kept = _stream(model, tokens)[:, 3] if bypass else 0  # without bypass the code is all that goes on
        expected = model.head(model.norm(code + kept))
    torch.testing.assert_close(touched[:, 3], expected)
    assert not torch.allclose(touched[:, 3], untouched[:, 3])
    others = [place for place in range(7) if place != 3]
    assert torch.equal(touched[:, others], untouched[:, others]) and torch.equal(again, untouched)


def _stream(model, tokens):
    """What flows past the last bottleneck of a model with bypass."""
    seen = []
    hook = model.blocks[-1].mlp_norm.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    model(tokens)
    hook.remove()
    return seen[0]


def test_writing_a_nodes_own_code_changes_nothing_and_another_one_does():
    model = fresh()
    place = model.blocks[0].mlp_bottleneck
    prompts = torch.cat([torch.full((100, 1), 10), MACHINE.spelling], 1)
    with torch.no_grad():
        own = model(prompts)[1][0]["mlp"]["hard_codes"][:, 2].argmax(-1)
    untouched = after_writing(model, place, MACHINE, None)
    assert untouched.shape == (100, 100)
    torch.testing.assert_close(after_writing(model, place, MACHINE, own), untouched)
    assert not torch.allclose(after_writing(model, place, MACHINE, (own + 1) % 20), untouched, rtol=0.01)


@pytest.mark.parametrize("codes", [torch.zeros(99, dtype=torch.long), torch.full((100,), 20), torch.full((100,), -1)])
def test_codes_that_there_are_not_are_refused(codes):
    model = fresh()
    with pytest.raises(ValueError, match="0 to 19"):
        after_writing(model, model.blocks[0].mlp_bottleneck, MACHINE, codes)


def entropy(*shares):
    return -sum(p * math.log(p) for p in shares if p)


def test_entropy_in_closed_form():
    p = torch.tensor([[0.8, 0.2]])  # l = (ln 4, 0): τ = 2 gives odds of 2, τ = 1/2 odds of 16
    for temperature, odds in ((1.0, 4), (2.0, 2), (0.5, 16)):
        expected = entropy(odds / (odds + 1), 1 / (odds + 1)) / math.log(2)
        assert read_entropy(p, temperature) == pytest.approx(expected, abs=1e-6)
    assert read_entropy(torch.full((3, 4, 5), 0.2), 0.01) == pytest.approx(1)
    both = torch.tensor([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]])  # the mean over tokens; a share of 0 adds nothing
    assert read_entropy(both) == pytest.approx(entropy(0.25, 0.25, 0.5) / math.log(3) / 2)
    assert read_entropy(p, 0) == 0 and read_entropy(p, 1e-3) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("codes", "temperature"), [(2, -1.0), (2, float("nan")), (1, 1.0)])
def test_misfits_are_refused(codes, temperature):
    with pytest.raises(ValueError, match="0 or more, and at least 2, are accepted"):
        read_entropy(torch.full((3, codes), 1 / codes), temperature)


@pytest.fixture
def model():
    torch.manual_seed(0)
    bottleneck = BottleneckConfig(codebook_size=6, num_codes_k=2, temp_init=2.0, temp_min=0.5, scale_init=4.0)
    return CrystallineTransformer(
        CrystallineConfig(vocab_size=9, token_dim=16, num_layers=2, num_heads=2, bottleneck=bottleneck)
    ).eval()


def read(model):
    tokens = torch.arange(9).repeat(3, 2)
    with torch.no_grad():
        return entropy_readings(model, model(tokens)[1]), model(tokens)[1]


def test_readings_are_what_the_cosines_say(model):
    found, infos = read(model)
    every = [one for info in infos for one in info.values()]
    cosines = [
        F.normalize(one["input"], dim=-1) @ F.normalize(bottleneck.codebook, dim=-1).T
        for one, (_, bottleneck) in zip(every, model.bottlenecks(), strict=True)
    ]

    def mean(scale):
        return sum(torch.special.entr((scale * c).softmax(-1)).sum(-1).mean().item() for c in cosines) / 4 / math.log(6)

    assert found["as_learned"] == pytest.approx(mean(4.0), abs=1e-5)
    assert found["on_schedule"] == pytest.approx(mean(4.0 / 2.0), abs=1e-5)
    assert found["fixed"] == pytest.approx(mean(4.0), abs=1e-5) and found["scale"] == pytest.approx(4)
    assert found["as_learned"] == pytest.approx(sum(one["entropy"].item() for one in every) / 4, abs=1e-5)


def test_each_reading_moves_alone(model):
    """The temperature moves one reading, the scale two, and codes that move all three."""
    before, _ = read(model)
    model.anneal(1.0)
    cold, _ = read(model)
    assert cold["on_schedule"] < before["on_schedule"] - 0.05
    assert all(cold[name] == before[name] for name in ("as_learned", "fixed", "scale"))
    with torch.no_grad():
        for _, bottleneck in model.bottlenecks():
            bottleneck.log_scale += math.log(3)
    grown, infos = read(model)
    assert grown["as_learned"] < cold["as_learned"] - 0.05 and grown["on_schedule"] < cold["on_schedule"] - 0.05
    assert grown["fixed"] == pytest.approx(cold["fixed"], abs=1e-5) and grown["scale"] == pytest.approx(12)
    with torch.no_grad():
        model.blocks[0].attn_bottleneck.codebook.copy_(infos[0]["attn"]["input"][0, :6])
    moved, _ = read(model)
    assert abs(moved["fixed"] - grown["fixed"]) > 0.01


def test_a_learned_temperature_is_read():
    torch.manual_seed(0)
    bottleneck = BottleneckConfig(codebook_size=6, temp_init=0.5, temp_min=0.1, schedule="learned")
    model = CrystallineTransformer(
        CrystallineConfig(vocab_size=9, token_dim=16, num_layers=1, num_heads=2, bottleneck=bottleneck)
    ).eval()
    learned, infos = read(model)
    every = [one["soft_codes"] for info in infos for one in info.values()]
    assert learned["on_schedule"] == pytest.approx(sum(read_entropy(soft, 0.5) for soft in every) / 2, abs=1e-6)
