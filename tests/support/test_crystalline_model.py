"""The crystalline transformer: causal, silent in evaluation, blocked where it says so, and what seed 003's cells need."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import AdamW

from nsm_support.crystalline import (
    BottleneckConfig,
    CrystallineConfig,
    CrystallineTransformer,
    FiniteStateMachine,
    FSMConfig,
    ModelConfig,
    commitment_loss,
    compression_loss,
    compute_state_code_alignment,
    plot_code_state_alignment,
)


def build(seed=0, laid=True, bottleneck=None, **config):
    """A small model in float64 whose codes count as laid, so that training passes go through them."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 11, "token_dim": 16, "num_layers": 2, "num_heads": 2, "max_length": 40}
    model = CrystallineTransformer(
        CrystallineConfig(**(sizes | config), bottleneck=BottleneckConfig(**(bottleneck or {})))
    ).double()
    for _, module in model.bottlenecks():
        module.passes.fill_(module.config.lay_every * laid)
    return model


def tokens(B=2, T=9, V=11, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def test_learned_positions_stand_alone_and_begin_at_the_first_place():
    model, row = build(positions="learned").eval(), tokens(B=2, T=9)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0]))
    model(row)
    assert torch.equal(seen[0], model.embedding(row) + model.places[:9])
    with torch.no_grad():
        model.places.zero_()
    turned = row[:, [3, 1, 0, 2, 4, 5, 6, 7, 8]]  # without places, attention does not know the order of what lies before
    assert not torch.equal(row, turned)
    torch.testing.assert_close(
        model.blocks[0]._attention(model.embedding(turned))[:, 4:], model.blocks[0]._attention(model.embedding(row))[:, 4:]
    )


@pytest.mark.parametrize("bypass", [True, False])
def test_bottlenecks_get_what_the_block_says(bypass):
    """x + Q(f(x)), or Q(x + f(x)): attention first, then the MLP, each under its own name."""
    model, row = build(bypass=bypass).eval(), tokens()
    block, x = model.blocks[0], model.embedding(row)
    out, info = block(x)
    change = block._attention(x)
    torch.testing.assert_close(info["attn"]["input"], change if bypass else x + change)
    between = (x if bypass else 0) + info["attn"]["output"]
    change = block._mlp(between)
    torch.testing.assert_close(info["mlp"]["input"], change if bypass else between + change)
    torch.testing.assert_close(out, (between if bypass else 0) + info["mlp"]["output"])


def test_dropout_falls_on_what_enters_the_bottlenecks():
    model = build(dropout=0.5)
    info = model(tokens())[1][0]
    for part in ("attn", "mlp"):
        assert 0.3 < (info[part]["input"] == 0).double().mean() < 0.7
    assert not (model.eval()(tokens())[1][0]["attn"]["input"] == 0).any()


def test_attention_equals_its_definition():
    """softmax(q k/√d) v over the past, rotated by hand, for one head after the other."""
    block = build().blocks[0]
    x = torch.randn(1, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = block.qkv(block.attn_norm(x))[0].split(16, -1)
    heads = []
    for h in range(2):
        qh, kh, vh = (part[:, 8 * h : 8 * h + 8] for part in (q, k, v))

        def turn(row, t):
            angle = t * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
            first, second = row.view(4, 2).T
            cos, sin = angle.cos(), angle.sin()
            return torch.stack([first * cos - second * sin, first * sin + second * cos], 1).flatten()

        rows = []
        for t in range(7):
            scores = torch.stack([turn(qh[t], t) @ turn(kh[u], u) / 8**0.5 for u in range(t + 1)])
            rows.append(scores.softmax(0) @ vh[: t + 1])
        heads.append(torch.stack(rows))
    torch.testing.assert_close(block._attention(x)[0], block.out(torch.cat(heads, 1)))


def test_choices_depend_on_the_schedule():
    """Of one network, one pass at the start of the annealing and one at its end: choices against noise-free ones."""
    x, agree = tokens(B=16, T=32), []
    for progress in (0.0, 1.0):
        model = build(bottleneck={"codebook_size": 6, "temp_init": 3.0, "temp_min": 1e-6})
        model.anneal(progress)
        codes = model(x)[1][0]["attn"]
        agree.append((codes["hard_codes"].argmax(-1) == codes["soft_codes"].argmax(-1)).double().mean().item())
    assert agree[0] < 0.8 and agree[1] == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential", "none"])
def test_anneal_sets_every_bottleneck(schedule):
    model = build(bottleneck={"schedule": schedule, "temp_init": 2.0, "temp_min": 0.5})
    model.anneal(0.5)
    middle = {"linear": 1.25, "cosine": 1.25, "exponential": 1.0, "none": 2.0}[schedule]
    assert [module.temperature.item() for _, module in model.bottlenecks()] == pytest.approx([middle] * 4)


def test_a_learned_temperature_learns_and_heeds_no_clock():
    model = build(bottleneck={"schedule": "learned", "temp_init": 1.5, "codebook_size": 6})
    model.anneal(1.0)
    before = [module.temperature.item() for _, module in model.bottlenecks()]
    assert before == pytest.approx([1.5] * 4)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens(seed=step))[0].flatten(0, 1), tokens(seed=step).flatten()).backward()
        optimizer.step()
    assert all(abs(module.temperature.item() - 1.5) > 0.05 for _, module in model.bottlenecks())


@pytest.mark.parametrize("part", ["attn", "mlp"])
@pytest.mark.parametrize("layer", [0, 1])
def test_without_bypass_nothing_passes_a_constant_code(layer, part):
    for bypass in (True, False):
        model = build(bypass=bypass, bottleneck={"codebook_size": 6}).eval()
        codebook = getattr(model.blocks[layer], f"{part}_bottleneck").codebook
        codebook.copy_(codebook[:1].expand_as(codebook))  # whichever wins, it is the same
        logits = model(tokens())[0]
        constant = torch.allclose(logits, logits[:1, :1].expand_as(logits), atol=1e-12, rtol=0)
        assert constant is not bypass


def test_every_parameter_has_a_gradient():
    model = build(bottleneck={"codebook_size": 6, "schedule": "learned"})
    logits, infos = model(tokens())
    soft = [compression_loss(one["soft_codes"]) for info in infos for one in info.values()]
    (logits.square().mean() + sum(soft)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_first_loss_is_that_of_knowing_nothing():
    model = build(laid=False, token_dim=64, vocab_size=24)
    loss = F.cross_entropy(model(tokens(V=24, B=32))[0].flatten(0, 1), tokens(V=24, B=32, seed=1).flatten())
    assert abs(loss.item() - np.log(24)) < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_dim": 18, "num_heads": 4}, "token_dim = 18, num_heads = 4; accepted is token_dim a multiple of 2 · num_heads"),
        ({"num_layers": 0}, "num_layers = 0; accepted is a whole number"),
        ({"positions": "sine"}, "positions = 'sine'; accepted is one of 'rotary', 'learned'"),
        ({"dropout": 1.0}, r"dropout = 1\.0"),
        ({"embedding_std": 0.0}, r"embedding_std = 0\.0"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        CrystallineConfig(**({"vocab_size": 5} | options))


def test_shape_errors():
    with pytest.raises(ValueError, match="T = 41; accepted is at most max_length = 40"):
        build()(tokens(B=1, T=41))
    with pytest.raises(ValueError, match=r"tokens = \[9\]; accepted is \[B, T\]"):
        build()(tokens()[0])


@pytest.mark.slow
def test_cells_of_seed_003_run_with_other_imports(capsys):
    """The seed notebook's code cells as they stand, but for its imports, its plots of curves, and fewer steps."""
    NUM_STATES = 8
    TOKENS_PER_STATE = 3
    SEED = 42

    fsm_config = FSMConfig(
        num_states=NUM_STATES, tokens_per_state=TOKENS_PER_STATE, vocab_size=NUM_STATES * TOKENS_PER_STATE, seed=SEED
    )

    fsm = FiniteStateMachine(fsm_config)

    for i in range(NUM_STATES):
        for j in range(NUM_STATES):
            if fsm.transition_matrix[i, j] > 0:
                pass
    assert fsm.transition_matrix.sum(1) == pytest.approx(np.ones(8))

    batch_size = 4
    seq_len = 32

    inputs, targets, states = fsm.generate_batch(batch_size, seq_len)

    assert inputs.shape == targets.shape == states.shape == (4, 32)
    assert inputs[0, :10].tolist() and states[0, :10].tolist() == (inputs[0, :10] // 3).tolist()

    model_config = ModelConfig(
        vocab_size=fsm_config.vocab_size,
        dim=128,
        n_layers=3,
        n_heads=4,
        max_seq_len=seq_len,
        dropout=0.0,
        bottleneck=BottleneckConfig(
            codebook_size=32,  # Small codebook to encourage state mapping
            num_codes_k=4,
            temp_init=2.0,
            temp_min=0.1,
        ),
    )

    model = CrystallineTransformer(model_config)
    print(f"Model parameters: {sum(p.numel() for p in model.parameters()):,}")

    # Training config
    N_STEPS = 102  # 500 in the seed; the codes are laid after 100
    BATCH_SIZE = 6  # 32 in the seed
    LR = 3e-4
    LAMBDA_COMPRESS = 0.01
    LAMBDA_COMMIT = 0.25

    # Temperature annealing
    TEMP_START = 2.0
    TEMP_END = 0.3

    optimizer = AdamW(model.parameters(), lr=LR)

    # Tracking
    history = {"steps": [], "loss": [], "accuracy": [], "temperature": [], "entropy": []}

    # Training loop
    model.train()
    torch.manual_seed(SEED)

    for step in range(N_STEPS):
        # Temperature annealing
        progress = step / max(N_STEPS - 1, 1)
        target_temp = TEMP_START + progress * (TEMP_END - TEMP_START)

        with torch.no_grad():
            for block in model.blocks:
                block.attn_bottleneck._temperature.fill_(target_temp)
                block.mlp_bottleneck._temperature.fill_(target_temp)

        # Generate batch
        inputs, targets, states = fsm.generate_batch(BATCH_SIZE, seq_len)

        # Forward
        logits, infos = model(inputs)

        # Losses
        pred_loss = F.cross_entropy(logits.reshape(-1, fsm_config.vocab_size), targets.reshape(-1))

        compress_loss_val = torch.tensor(0.0)
        commit_loss_val = torch.tensor(0.0)
        for layer_info in infos:
            for bn_type in ["attn", "mlp"]:
                compress_loss_val = compress_loss_val + compression_loss(layer_info[bn_type]["soft_codes"])
                commit_loss_val = commit_loss_val + commitment_loss(layer_info[bn_type]["input"], layer_info[bn_type]["output"])

        n_bottlenecks = len(infos) * 2
        compress_loss_val = compress_loss_val / n_bottlenecks
        commit_loss_val = commit_loss_val / n_bottlenecks

        loss = pred_loss + LAMBDA_COMPRESS * compress_loss_val + LAMBDA_COMMIT * commit_loss_val

        # Backward
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        # Track metrics
        if step % 50 == 0:
            with torch.no_grad():
                preds = logits.argmax(dim=-1)
                acc = (preds == targets).float().mean().item()

                # Entropy
                entropies = [layer_info["attn"]["entropy"].item() for layer_info in infos]
                avg_entropy = sum(entropies) / len(entropies)

            history["steps"].append(step)
            history["loss"].append(loss.item())
            history["accuracy"].append(acc)
            history["temperature"].append(target_temp)
            history["entropy"].append(avg_entropy)

            print(
                f"Step {step:4d} | Loss: {loss.item():.4f} | Acc: {acc:.3f} | "
                f"Temp: {target_temp:.2f} | Entropy: {avg_entropy:.3f}"
            )

    print("\nTraining complete!")

    # Evaluate alignment
    model.eval()

    all_hard_codes = []
    all_states = []

    with torch.no_grad():
        for _ in range(20):  # Collect statistics
            inputs, targets, states = fsm.generate_batch(BATCH_SIZE, seq_len)
            _, infos = model(inputs)

            # Use first layer's attention bottleneck
            hard_codes = infos[0]["attn"]["hard_codes"]
            all_hard_codes.append(hard_codes)
            all_states.append(states)

    all_hard_codes = torch.cat(all_hard_codes, dim=0)
    all_states = torch.cat(all_states, dim=0)

    print(f"Collected codes shape: {all_hard_codes.shape}")

    alignment = compute_state_code_alignment(all_hard_codes, all_states, NUM_STATES)

    print(f"  Purity: {alignment['purity']:.3f}")
    print(f"  Active codes: {alignment['active_codes']}")

    # Build alignment matrix (over the first of the sequences here, which the seed's triple loop takes long for)
    codebook_size = model_config.bottleneck.codebook_size
    alignment_matrix = np.zeros((codebook_size, NUM_STATES))

    for i in range(40):
        for j in range(all_hard_codes.shape[1]):
            state = all_states[i, j].item()
            active_codes = (all_hard_codes[i, j] > 0.5).nonzero(as_tuple=True)[0]
            for code_idx in active_codes:
                alignment_matrix[code_idx.item(), state] += 1

    fig = plot_code_state_alignment(
        alignment_matrix,
        n_states=NUM_STATES,
        codebook_size=codebook_size,
        purity=alignment["purity"],
        title="Code-State Alignment (Layer 0 Attention)",
    )

    # What the cells rest on
    assert hasattr(fig, "savefig") and alignment_matrix.sum() == 40 * 32 * 4
    assert abs(history["loss"][0] - np.log(24)) < 0.6 and history["loss"][-1] < history["loss"][0] - 0.5
    assert history["temperature"] == pytest.approx([2.0, 2.0 - 1.7 * 50 / 101, 2.0 - 1.7 * 100 / 101])
    assert 0 <= alignment["purity"] <= 1 and 4 <= alignment["active_codes"] <= 32
    assert "Training complete!" in capsys.readouterr().out
