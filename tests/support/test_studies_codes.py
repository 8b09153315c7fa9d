"""A training of a crystalline transformer: what it returns is what its own model gives."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nsm_support.crystalline import BottleneckConfig, CrystallineConfig, CrystallineTransformer, FiniteStateMachine, FSMConfig
from nsm_support.crystalline.automata import make_machine
from nsm_support.crystalline.codes.alignment import contingency, held_out_alignment
from nsm_support.studies.codes import CodesRun, held_out_strings, sample_strings
from nsm_support.studies.protocol import measure

SIZES = FSMConfig(num_states=4, tokens_per_state=2, vocab_size=8, seed=3)
MODEL = CrystallineConfig(
    vocab_size=8,
    token_dim=16,
    num_layers=2,
    num_heads=2,
    max_length=12,
    bottleneck=BottleneckConfig(codebook_size=6, lay_every=5, temp_init=1.0, temp_min=0.5),
)


def tokens_in_view(model, infos):
    return {"seen": float(infos[0]["attn"]["hard_codes"].sum())}


RUN = CodesRun(
    model=MODEL,
    machine=SIZES,
    seed=4,
    length=12,
    batch_size=8,
    steps=20,
    learning_rate=0.01,
    records=4,
    held_out=30,
    readings=tokens_in_view,
)


@pytest.fixture(scope="module")
def result():
    return measure(RUN)


def test_what_is_reported_is_what_the_returned_model_does(result):
    machine, model, row = FiniteStateMachine(SIZES), result.model(), result.rows[-1]
    validation, test = (held_out_strings(machine, part, 30, 12) for part in ("validation", "test"))
    with torch.no_grad():
        (chosen_logits, chosen), (logits, reported) = (model(part.tokens) for part in (validation, test))
    assert row["part"] == "test" and row["accuracy"] == pytest.approx((logits.argmax(-1) == test.targets).double().mean().item())
    nats = F.cross_entropy(logits.double().flatten(0, 1), test.targets.flatten()).item()
    assert row["cross_entropy"] == pytest.approx(nats, rel=1e-5)
    last = result.history[-1]
    expected = F.cross_entropy(chosen_logits.double().flatten(0, 1), validation.targets.flatten()).item()
    assert last["cross_entropy"] == pytest.approx(expected, rel=1e-5) and last["step"] == 20 and last["seen"] == 30 * 12
    for kind in ("states", "after"):
        expected = held_out_alignment(
            (chosen, getattr(validation, kind)), (reported, getattr(test, kind)), 4, measure="ami", permutations=19
        )
        found = result.tensors["aligned"][kind]
        assert found.name == expected.name and found.all_reported.keys() == expected.all_reported.keys()
        for one, other in zip(found.all_reported.values(), expected.all_reported.values(), strict=True):
            torch.testing.assert_close(tuple(one), tuple(other), rtol=0, atol=0, equal_nan=True)
        for block, info in enumerate(chosen):
            for part in ("attn", "mlp"):
                tables = result.tensors[f"{kind}, block {block}, {part}"]
                counts = contingency(info[part]["hard_codes"], getattr(validation, kind), 4)
                assert tables.shape == (5, 6, 4) and torch.equal(tables[-1], counts)


def test_the_bottleneck_is_chosen_by_what_the_run_says():
    torch.manual_seed(8)  # a start where the two measures choose differently
    model, machine = CrystallineTransformer(MODEL).eval(), FiniteStateMachine(SIZES)
    parts = [held_out_strings(machine, part, 30, 12) for part in ("validation", "test")]
    with torch.no_grad():
        infos = [model(part.tokens)[1] for part in parts]
    names = []
    for name in ("purity", "ami"):
        expected = held_out_alignment(*zip(infos, (part.after for part in parts), strict=True), 4, measure=name, permutations=1)
        result = measure(replace(RUN, seed=8, steps=1, choose_by=name))
        assert result.tensors["untrained"]["after"].name == expected.name
        names.append(expected.name)
    assert names == ["block 1, mlp", "block 0, mlp"]


@pytest.mark.parametrize("name", ["fsm", "ambiguous", "parity"])
def test_strings_carry_the_state_that_emitted_a_token_and_the_one_after_it(name):
    machine = make_machine(name)
    text = sample_strings(machine, torch.Generator().manual_seed(0), 20, 9)
    assert all(part.shape == (20, 9) for part in text)
    if name == "parity":  # a transducer's state is that after the token
        assert torch.equal(text.after, text.states) and torch.equal(text.after, text.tokens.cumsum(1) % 2)
        return
    assert torch.equal(text.after[:, :-1], text.states[:, 1:])
    assert torch.equal(text.targets[:, :-1], text.tokens[:, 1:])
    if name == "fsm":  # what comes next belongs to the state after
        assert torch.equal(text.targets // 3, text.after) and torch.equal(text.tokens // 3, text.states)


def test_the_loss_is_prediction_and_the_means_of_entropy_and_commitment_by_their_weights():
    torch.manual_seed(0)
    model = CrystallineTransformer(MODEL).eval()
    text = sample_strings(FiniteStateMachine(SIZES), torch.Generator().manual_seed(1), 3, 12)
    logits, infos = model(text.tokens)
    every = [info[part] for info in infos for part in ("attn", "mlp")]
    entropy = sum(torch.special.entr(one["soft_codes"]).sum(-1).mean() for one in every) / 4
    commitment = sum((one["input"] - one["output"]).square().mean() for one in every) / 4
    plain = F.cross_entropy(logits.flatten(0, 1), text.targets.flatten())
    torch.testing.assert_close(replace(RUN, compress=0.0, commit=0.0).loss(model, text), plain)
    torch.testing.assert_close(replace(RUN, compress=0.3, commit=0.7).loss(model, text), plain + 0.3 * entropy + 0.7 * commitment)
