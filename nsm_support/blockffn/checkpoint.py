"""Read checkpoints of the published BlockFFN family (0.1 B to 3 B parameters, Apache-2.0) into `BlockFFNModel`.

A checkpoint is a folder: `config.json`, and weights in safetensors or in PyTorch's zip format, in one file or in parts
with an index. Code that lies beside them is never run. What is read has to fit exactly; nothing is guessed.
"""

import json
import pickle
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel
from nsm_support.extras import extra
from nsm_support.training import CheckpointError

MODEL_TYPE = "minicpm"  #: of the published configs; the fields below tell a BlockFFN from others of that name
# What the published configuration class takes where config.json is silent, and what this package can compute.
DEFAULTS = {
    "attention_type": "vanilla", "num_key_value_heads": None, "attention_bias": False,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "q_lora_rank": 768, "kv_lora_rank": 256,
    "rope_theta": 10_000.0, "rope_scaling": None, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "ffn_type": "vanilla", "num_experts": 40, "expert_size": 128,
    "router_act": "relu", "norm_after_router": "sum", "norm_scale": 1.0,
    "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1, "tie_word_embeddings": True, "pretraining_tp": 1,
}  # fmt: skip
ACCEPTED = {
    "ffn_type": ("block", "block_linear"), "hidden_act": ("silu",), "router_act": ("relu",),
    "rope_scaling": (None,), "attention_bias": (False,), "pretraining_tp": (1,),
}  # fmt: skip
NAMES = {"hidden_size": "token_dim", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
"""Published names of what `BlockFFNConfig` calls otherwise."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_checkpoint(source: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> BlockFFNModel:
    """The model of a checkpoint, in eval mode.

    Args:
        source: a folder; or a repository's name on the Hugging Face hub, "SparseLLM/BlockFFN-3B-SFT", which is fetched
            through `huggingface_hub` (cached, and offline where its cache holds it).
        dtype: of the weights in memory; they are mostly published in bfloat16.

    Raises FileNotFoundError if there is no such folder, or a file of it is missing; CheckpointError for another model type, or
    one that this package cannot compute; for names or shapes of tensors that do not fit; for a file that is damaged or holds
    more than weights.
    """
    folder = _folder(source)
    config = read_config(folder)
    with torch.device("meta"):  # shapes without numbers: those come from the file
        model = BlockFFNModel(config)
    state = {name: tensor for part in _parts(folder) for name, tensor in _published(part)}
    if config.tie_word_embeddings and (embedding := state.get("model.embed_tokens.weight")) is not None:
        head = state.setdefault("lm_head.weight", embedding)  # stored twice, or once
        if not torch.equal(head, embedding):
            raise CheckpointError(f"{folder}: tie_word_embeddings is true, but lm_head and embed_tokens differ")
    try:
        model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {error}") from error
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # assigned apart, and one again
    return model.eval()


def read_config(folder: str | Path) -> BlockFFNConfig:
    """The config of a checkpoint's folder. Raises as `load_checkpoint`."""
    path = Path(folder) / "config.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    if given.get("model_type") != MODEL_TYPE:
        found = given.get("model_type")
        raise CheckpointError(f"{path}: model_type is {found!r}; {MODEL_TYPE!r} is accepted, with the fields of BlockFFN")
    config = DEFAULTS | given
    for name, accepted in ACCEPTED.items():
        if config[name] not in accepted:
            raise CheckpointError(f"{path}: {name} is {config[name]!r}; {' or '.join(map(repr, accepted))} is accepted")
    config = {NAMES.get(name, name): value for name, value in config.items() if name not in NAMES.values()}
    config["ffn_type"] = "block"
    try:
        return BlockFFNConfig(**{field.name: config[field.name] for field in fields(BlockFFNConfig) if field.name in config})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_tokenizer(source: str | Path):
    """The `tokenizers.Tokenizer` of a checkpoint, from its tokenizer.json. Raises FileNotFoundError if it has none."""
    with extra("checkpoints"):
        from tokenizers import Tokenizer
    path = _folder(source) / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint's tokenizer is read from tokenizer.json alone")
    return Tokenizer.from_file(str(path))


def _folder(source: str | Path) -> Path:
    if (folder := Path(source)).is_dir():
        return folder
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} is no folder, nor the name of a repository ('owner/name')")
    with extra("checkpoints"):
        from huggingface_hub import snapshot_download
    weights = [*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS)]
    weights += ["model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"]
    return Path(snapshot_download(name, allow_patterns=["config.json", "tokenizer.json", *weights]))


def _parts(folder: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file of weights."""
    for name in WEIGHTS:
        index, files = folder / f"{name}.index.json", [name]
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif not (folder / name).exists():
            continue
        yield from (_read(folder / file) for file in files)
        return
    raise FileNotFoundError(f"{folder} holds neither {' nor '.join(WEIGHTS)}, nor an index of parts of one")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # each format has its own kinds
        why = "" if isinstance(error, pickle.UnpicklingError) else f": {error}"  # whose advice is to open it all the same
        raise CheckpointError(f"{path} is damaged, or holds more than weights{why}") from error


def _published(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, those of `ffn_type` "block" brought into the shapes of "block_linear"."""
    for name, tensor in state.items():
        if name.endswith("mlp.up_proj") and tensor.dim() == 3:
            tensor = tensor.flatten(0, 1)  # (E, F, D) → (E·F, D)
        elif name.endswith("mlp.down_proj") and tensor.dim() == 3:
            tensor = tensor.transpose(0, 1).flatten(1)  # (E, D, F) → (D, E·F)
        yield name, tensor
