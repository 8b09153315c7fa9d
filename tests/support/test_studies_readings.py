"""What is asked of a model about TokFSM's edges, and codes that are written into it."""

import pytest
import torch

from nsm_support.crystalline import BottleneckConfig, CrystallineConfig, CrystallineTransformer
from nsm_support.crystalline.automata import make_machine
from nsm_support.crystalline.codes.bottleneck import written
from nsm_support.studies.tokfsm import after_writing, first_transition

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


def test_a_model_that_knows_the_edges_scores_one():
    model = fresh()

    def know(tokens):  # P(tens | node) at the node's end, and P(ones | node, tens) after that
        node = tokens[:, 1] * 10 + tokens[:, 2]
        joint = MACHINE.edges[node].double().view(-1, 10, 10)
        logits = torch.full((*tokens.shape, 11), -30.0)
        logits[:, 2, :10] = (joint.sum(2) / 10).clamp(min=1e-12).log().float()
        last = joint[torch.arange(len(tokens)), tokens[:, 3]]
        logits[:, 3, :10] = (last / last.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-12).log().float()
        return logits, []

    model.forward = know
    found = first_transition(model, [])
    assert found["first_transition"] == 1.0 and found["mass"] == pytest.approx(1.0, abs=1e-6)


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


def test_a_model_in_training_is_asked_without_noise_and_stays_in_training():
    model = fresh()
    place = model.blocks[0].mlp_bottleneck
    expected = after_writing(model, place, MACHINE, None)
    assert torch.equal(after_writing(model.train(), place, MACHINE, None), expected) and model.training


@pytest.mark.parametrize("codes", [torch.zeros(99, dtype=torch.long), torch.full((100,), 20), torch.full((100,), -1)])
def test_codes_that_there_are_not_are_refused(codes):
    model = fresh()
    with pytest.raises(ValueError, match="0 to 19"):
        after_writing(model, model.blocks[0].mlp_bottleneck, MACHINE, codes)
