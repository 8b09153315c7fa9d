"""Published checkpoints: tiny random ones of both attention types, against a plain re-computation from their tensors."""

import json
import math
import random
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nsm_support.blockffn.checkpoint import load_checkpoint, load_tokenizer, read_config
from nsm_support.corpus import train_tokenizer
from nsm_support.training import CheckpointError

ROOT = Path(__file__).parents[2]

# The fields as the published conversion writes them (thunlp/BlockFFN, pretrain/convert_bmt_to_hf.py).
COMMON = json.loads("""
    {"architectures": ["MiniCPMForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    "model_type": "minicpm", "torch_dtype": "bfloat16", "vocab_size": 19, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "ffn_type": "block_linear", "hidden_act": "silu", "router_act": "relu", "num_experts": 5,
    "expert_size": 3, "norm_after_router": "rms", "norm_scale": 1.0, "rms_norm_eps": 1e-05, "scale_emb": 12, "scale_depth": 1.4,
    "dim_model_base": 8, "tie_word_embeddings": false, "rope_theta": 500.0, "max_position_embeddings": 4096,
    "block_implementation": "torch", "use_cache": true}
""")
KINDS = json.loads("""
    {"vanilla": {"attention_type": "vanilla", "num_key_value_heads": 2},
    "mla": {"attention_type": "mla", "num_key_value_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 7, "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 4, "v_head_dim": 6}}
""")


def tensors(config, seed=0):
    """Random numbers under the names and in the shapes of the published files."""
    generator = torch.Generator().manual_seed(seed)
    D, E, F = config["hidden_size"], config["num_experts"], config["expert_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,)}
    shapes["lm_head.weight"] = (config["vocab_size"], D)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm.weight": (D,), f"{layer}.post_attention_layernorm.weight": (D,)}
        if config["attention_type"] == "mla":
            nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
            q, kv = config["q_lora_rank"], config["kv_lora_rank"]
            shapes |= {
                f"{layer}.self_attn.q_a_proj.weight": (q, D),
                f"{layer}.self_attn.q_a_layernorm.weight": (q,),
                f"{layer}.self_attn.q_b_proj.weight": (heads * (nope + rope), q),
                f"{layer}.self_attn.kv_a_proj_with_mqa.weight": (kv + rope, D),
                f"{layer}.self_attn.kv_a_layernorm.weight": (kv,),
                f"{layer}.self_attn.kv_b_proj.weight": (heads * (nope + D // heads), kv),
                f"{layer}.self_attn.o_proj.weight": (D, D),
            }
        else:
            width = D // heads * groups
            for name, rows in (("q", D), ("k", width), ("v", width), ("o", D)):
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, D)
        shapes |= {
            f"{layer}.mlp.router_proj.weight": (E, D),
            f"{layer}.mlp.router_norm.weight": (E,),
            f"{layer}.mlp.up_proj": (E * F, D),
            f"{layer}.mlp.down_proj": (D, E * F),
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder, config, state, file="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / file)
    else:
        torch.save(state, folder / file)
    return folder


def plain_forward(config, state, tokens):
    """Logits [T,V] of tokens [T], number by number from the tensors: no module of the package, one token at a time."""
    w = {name: tensor.double() for name, tensor in state.items()}
    D, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]

    def rms(x, weight, eps):
        return x / torch.sqrt((x * x).mean() + eps) * weight

    def turn(x, place):
        half, out = len(x) // 2, x.clone()
        for i in range(half):
            angle = place / config["rope_theta"] ** (2 * i / len(x))
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    def project(h, place, name):
        """Queries, keys and values of one token, a list of heads each."""
        if config["attention_type"] == "vanilla":
            q, k, v = (w[f"{name}.{letter}_proj.weight"] @ h for letter in "qkv")
            K, share = D // heads, heads // config["num_key_value_heads"]
            q = [turn(q[i * K : (i + 1) * K], place) for i in range(heads)]
            k = [turn(k[i // share * K : (i // share + 1) * K], place) for i in range(heads)]
            v = [v[i // share * K : (i // share + 1) * K] for i in range(heads)]
            return q, k, v
        nope, rope, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
        q = w[f"{name}.q_a_proj.weight"] @ h
        q = w[f"{name}.q_b_proj.weight"] @ rms(q, w[f"{name}.q_a_layernorm.weight"], 1e-6)
        low = w[f"{name}.kv_a_proj_with_mqa.weight"] @ h
        shared = turn(low[rank:], place)
        kv = w[f"{name}.kv_b_proj.weight"] @ rms(low[:rank], w[f"{name}.kv_a_layernorm.weight"], 1e-6)
        q, kv = q.view(heads, nope + rope), kv.view(heads, nope + D // heads)
        q = [torch.cat((row[:nope], turn(row[nope:], place))) for row in q]
        return q, [torch.cat((row[:nope], shared)) for row in kv], [row[nope:] for row in kv]

    xs = [w["model.embed_tokens.weight"][token] * config["scale_emb"] for token in tokens]
    branch = config["scale_depth"] / math.sqrt(layers)
    for i in range(layers):
        name = f"model.layers.{i}"
        hs = [rms(x, w[f"{name}.input_layernorm.weight"], config["rms_norm_eps"]) for x in xs]
        made = [project(h, place, f"{name}.self_attn") for place, h in enumerate(hs)]
        for t, (q, _, _) in enumerate(made):
            heard = []
            for head in range(heads):
                logits = torch.stack([q[head] @ made[s][1][head] for s in range(t + 1)]) / math.sqrt(len(q[head]))
                heard.append(sum(p * made[s][2][head] for s, p in enumerate(logits.softmax(0))))
            xs[t] = xs[t] + branch * (w[f"{name}.self_attn.o_proj.weight"] @ torch.cat(heard))
        for t, x in enumerate(xs):
            h = rms(x, w[f"{name}.post_attention_layernorm.weight"], config["rms_norm_eps"])
            scores = (w[f"{name}.mlp.router_proj.weight"] @ h).clamp(min=0)
            if config["norm_after_router"] == "rms":
                scores = rms(scores, w[f"{name}.mlp.router_norm.weight"], config["rms_norm_eps"])
            elif config["norm_after_router"] == "sum":
                scores = scores / (scores.sum() * config["norm_scale"] + 1e-5)
            up, down, F = w[f"{name}.mlp.up_proj"], w[f"{name}.mlp.down_proj"], config["expert_size"]
            y = torch.zeros(D, dtype=torch.float64)
            for e, score in enumerate(scores):
                z = up[e * F : (e + 1) * F] @ h
                y += down[:, e * F : (e + 1) * F] @ (score * z / (1 + torch.exp(-z)))
            xs[t] = x + branch * y
    wide = [rms(x, w["model.norm.weight"], config["rms_norm_eps"]) for x in xs]
    return torch.stack([w["lm_head.weight"] @ (x / (D / config["dim_model_base"])) for x in wide])


@pytest.mark.parametrize(
    ("kind", "file", "norm"),
    [("vanilla", "model.safetensors", "rms"), ("mla", "pytorch_model.bin", "rms"), ("vanilla", "pytorch_model.bin", "sum")],
)
def test_logits_equal_a_plain_computation(tmp_path, kind, file, norm):
    config = COMMON | KINDS[kind] | {"norm_after_router": norm, "norm_scale": 0.5}
    state = {name: tensor for name, tensor in tensors(config).items() if norm == "rms" or "router_norm" not in name}
    model = load_checkpoint(write(tmp_path, config, state, file), dtype=torch.float64)
    tokens = torch.tensor([[3, 7, 7, 0, 18, 2, 11], [1, 1, 4, 9, 3, 5, 0]])
    assert not model.training and {name for name, _ in model.named_parameters()} == set(state)
    for row, logits in zip(tokens, model(tokens), strict=True):
        torch.testing.assert_close(logits, plain_forward(config, state, row))
    loaded = load_checkpoint(tmp_path)
    torch.testing.assert_close(loaded(tokens).double(), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_lie_where_and_as_they_are_asked_for(tmp_path, tied):
    config = COMMON | KINDS["vanilla"] | {"tie_word_embeddings": tied}
    state = {name: tensor.bfloat16() for name, tensor in tensors(config).items() if not (tied and name == "lm_head.weight")}
    write(tmp_path, config, state)
    assert {tensor.dtype for tensor in load_checkpoint(tmp_path).parameters()} == {torch.float32}
    model = load_checkpoint(tmp_path, device="meta", dtype=torch.bfloat16)  # a device that every machine has
    assert {(tensor.device.type, tensor.dtype) for tensor in model.parameters()} == {("meta", torch.bfloat16)}


def test_blocks_of_three_axes_are_those_of_two(tmp_path):
    config = COMMON | KINDS["vanilla"]
    state = tensors(config)
    flat = load_checkpoint(write(tmp_path / "flat", config, state))
    blocks = {name: tensor for name, tensor in state.items()}
    for name in state:
        if name.endswith("up_proj"):
            blocks[name] = torch.stack([state[name][3 * e : 3 * e + 3] for e in range(5)])  # (E, F, D)
        elif name.endswith("down_proj"):
            blocks[name] = torch.stack([state[name][:, 3 * e : 3 * e + 3] for e in range(5)])  # (E, D, F)
    model = load_checkpoint(write(tmp_path / "blocks", config | {"ffn_type": "block"}, blocks))
    for name, tensor in flat.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kept", ["both", "embedding"])
def test_tied_embeddings(tmp_path, kept):
    config = COMMON | KINDS["vanilla"] | {"tie_word_embeddings": True}
    state = tensors(config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    full = state if kept == "both" else {name: t for name, t in state.items() if name != "lm_head.weight"}
    model = load_checkpoint(write(tmp_path, config, full), dtype=torch.float64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.tensor([3, 7, 7, 0])
    torch.testing.assert_close(model(tokens[None])[0], plain_forward(config, state, tokens))
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match="differ"):
        load_checkpoint(write(tmp_path / "other", config, state))


@pytest.mark.parametrize(("stem", "ending"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_parts_with_an_index(tmp_path, stem, ending):
    config = COMMON | KINDS["mla"]
    state = tensors(config)
    whole = load_checkpoint(write(tmp_path / "whole", config, state))
    folder, names = tmp_path / "parts", sorted(state)
    files = {f"{stem}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
    for file, held in files.items():
        write(folder, config, {name: state[name] for name in held}, file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    write(folder, config, {"x": torch.ones(1)}, f"{stem}-00003-of-00003.{ending}")  # in no index: not read
    for name, tensor in load_checkpoint(folder).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    (folder / [*files][1]).unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        load_checkpoint(folder)


def test_safetensors_come_before_a_pickle(tmp_path):
    config = COMMON | KINDS["vanilla"]
    write(tmp_path, config, tensors(config, seed=1), "pytorch_model.bin")
    state = tensors(config)
    model = load_checkpoint(write(tmp_path, config, state))
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def test_silent_fields_mean_what_the_published_class_means(tmp_path):
    """Its defaults are not those of this package: a config that omits `ffn_type` is a dense model, and is refused."""
    config = {name: COMMON[name] for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")}
    config["num_attention_heads"] = 4
    with pytest.raises(CheckpointError, match="ffn_type is 'vanilla'"):
        read_config(write(tmp_path, config, {"x": torch.ones(1)}))
    read = read_config(write(tmp_path, config | {"ffn_type": "block"}, {"x": torch.ones(1)}))
    # thunlp/BlockFFN, pretrain/bmt_to_hf/configuration_minicpm.py
    published = json.loads("""
        {"attention_type": "vanilla", "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "q_lora_rank": 768, "kv_lora_rank": 256,
        "num_experts": 40, "expert_size": 128, "norm_after_router": "sum", "norm_scale": 1, "rms_norm_eps": 1e-6,
        "rope_theta": 10000, "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1, "tie_word_embeddings": true}
    """)
    assert {name: getattr(read, name) for name in published} == published and read.key_value_heads == 4


def test_a_checkpoint_runs_no_code(tmp_path):
    """Neither a Python file beside the weights nor a pickle that would call something."""

    class Call:
        def __reduce__(self):
            return print, ("called",)

    config = COMMON | KINDS["vanilla"]
    state = tensors(config)
    (tmp_path / "modeling_minicpm.py").write_text("raise SystemExit('ran')")
    assert load_checkpoint(write(tmp_path, config, state)).config.vocab_size == 19
    folder = write(tmp_path / "pickle", config, state | {"model.norm.weight": Call()}, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than weights"):
        load_checkpoint(folder)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder, nor the name"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(COMMON | KINDS["vanilla"]))
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_repository_is_fetched_by_name_without_its_code(tmp_path, monkeypatch):
    import huggingface_hub

    config = COMMON | KINDS["mla"]
    write(tmp_path / "cache", config, tensors(config))
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load_checkpoint("owner/BlockFFN")
    assert model.config.attention_type == "mla" and asked["name"] == "owner/BlockFFN"
    assert not any(pattern.endswith((".py", "*")) for pattern in asked["patterns"])
    parts = [f"{stem}-00001-of-00002.{end}" for stem, end in (("model", "safetensors"), ("pytorch_model", "bin"))]
    for file in ("config.json", "tokenizer.json", "model.safetensors.index.json", *parts):
        assert any(fnmatch(file, pattern) for pattern in asked["patterns"]), file
    for name in ("./owner/BlockFFN", "/owner", "~/BlockFFN", "owner/BlockFFN/main", "BlockFFN"):
        with pytest.raises(FileNotFoundError, match="no folder, nor the name"):
            load_checkpoint(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    with pytest.raises(ImportError, match=r"huggingface_hub is not installed.* pip install 'nsm-support\[checkpoints\]'"):
        load_checkpoint("owner/BlockFFN")


def small_text(lines=2_000):
    """Paragraphs of words of all kinds, with nothing in them to learn."""
    words = ["the", "and", "of", "in", "to", "he", "said", "unto", "Moses", "light", "waters", "beginning", "firmament"]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=10)) + "." for _ in range(lines)]
    return "\n\n".join("\n".join(lines[start : start + 60]) for start in range(0, len(lines), 60))


PAGES = {
    "model": {"window": 64, "held_out": 2, "rounds": 2},
    "routing_signals": {"prompts": 3, "window": 32, "windows": 2, "places": 12, "horizon": 8, "resamples": 19, "permutations": 9},
    "alpha_sweep": {"window": 32, "distil_steps": 1, "tune_steps": 1, "lengths": [32, 64], "rounds": 2, "workers": 1},
}


@pytest.mark.kernel
@pytest.mark.parametrize(("page", "kind"), [("model", "vanilla"), ("routing_signals", "mla"), ("alpha_sweep", "vanilla")])
def test_a_page_runs_on_a_checkpoint(checkout, page, kind):
    """From a folder alone, in a real kernel: what the page before made is not read, and one model says nothing for six."""
    shutil.copytree(ROOT / "book", checkout.folder / "book", dirs_exist_ok=True)
    (checkout.folder / "text.txt").write_text(small_text())
    config = COMMON | KINDS[kind] | {"vocab_size": 330}  # published vocabularies are padded
    folder = write(checkout.folder / "weights", config, tensors(config))
    train_tokenizer(small_text(), 290).save(str(folder / "tokenizer.json"))
    checkout.edit("book/pages.yml", "  needs: [blockffn/models.pt]\n", "")  # they have not been made
    given = PAGES[page] | {"checkpoint": folder, "text": checkout.folder / "text.txt"}
    words = [word for name, value in given.items() for word in ("-p", name, str(value))]
    code, output = checkout.book("run", f"blockffn/{page}", "--profile", "quick", *words, "-o", "runs")
    assert code == 0, output
    (record,) = json.loads(next(checkout.folder.glob("runs/*/*/results.json")).read_text())
    values = {name: entry["value"] for name, entry in record["values"].items()}
    verdicts = [value for name, value in values.items() if name.endswith("_verdict")]
    assert set(verdicts) == (set() if page == "model" else {"undecided"})
    if page == "routing_signals":
        assert values["all_blocks"] == 10 and 0 < values["sparsity_trained"] < 1
        written = json.loads(next(checkout.folder.glob("runs/**/routing_signals.json")).read_text())
        assert written["model_name"] == str(folder) and len(written["prompts"]) == 3
    elif page == "model":
        assert values["blocks"] == 10 and 0 < values["chunk_8_sparsity"] < values["token_sparsity"] < 1
        assert values["test_chapters"] == 2 and values["nine_gram"] > 1 and values["routed"] > 1 and "dense" not in values
    else:
        assert (values["bases"], values["runs"], values["layers"]) == (1, 2, 2)
        table = next(checkout.folder.glob("runs/**/alpha_sweep_results.csv")).read_text().splitlines()
        assert [line.split(",")[0] for line in table] == ["alpha", "baseline", "0", "0.5", "1"]


def spoilt(change):
    """A config and tensors with one thing wrong."""
    config, name = COMMON | KINDS["vanilla"], "model.layers.1.mlp.router_proj.weight"
    state = tensors(config)
    if isinstance(change, dict):
        return config | change, state
    new = {"missing": {}, "no head": {}, "extra": {f"{name}.scale": torch.ones(1)}, "shape": {name: state[name][:4]}}[change]
    gone = {"missing": name, "no head": "lm_head.weight"}.get(change)
    return config, {key: value for key, value in (state | new).items() if key != gone}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "router_proj"),
        ("extra", "router_proj"),
        ("shape", "router_proj"),
        ("no head", "lm_head"),  # where the embedding is not tied, it does not stand in for a head that is missing
        ({"model_type": "llama"}, "'llama'; 'minicpm' is accepted"),
        ({"ffn_type": "vanilla"}, "ffn_type is 'vanilla'; 'block' or 'block_linear'"),
        ({"norm_after_router": "layer"}, "norm_after_router"),
        ({"router_act": "sigmoid"}, "router_act is 'sigmoid'; 'relu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2; 1 is accepted"),
    ],
)
def test_what_is_no_such_model_is_refused_by_name(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(write(tmp_path, *spoilt(change)))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_named(tmp_path, file):
    path = write(tmp_path, *spoilt({}), file) / file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        load_checkpoint(tmp_path)
