"""A causal language model of BlockFFN layers, with the published names and arithmetic; or of dense layers, its twin.

Letters: B batch, T tokens, D token width, E experts (blocks), F width of a block, L layers, V vocabulary.

Song et al. 2025 (BlockFFN, arXiv:2507.08771) train their models in the frame of MiniCPM (Hu et al. 2024,
arXiv:2404.06395, section 3.1): embeddings times `scale_emb`, each residual branch times `scale_depth`/√L, and the last
hidden state divided by D/`dim_model_base`.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.blockffn.attention import Attention, CausalAttention, LatentAttention
from nsm_support.blockffn.ffn import BlockFFN
from nsm_support.blockffn.objectives import chunk_sparsity_loss, locality_loss
from nsm_support.blockffn.router import NORMS, Routed
from nsm_support.checks import check, check_choice, check_shape, check_sizes
from nsm_support.mixers.cache import Cache
from nsm_support.models import Stream, StreamedModel, Trace

ATTENTIONS, FFNS = ("vanilla", "mla"), ("block", "dense")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFFNConfig:
    """Everything that makes a model and its loss, under the published names; raises ValueError for what does not fit."""

    vocab_size: int  # V
    token_dim: int = 256  # D
    num_layers: int = 4  # L
    num_heads: int = 4
    num_key_value_heads: int | None = None  # None: as many as heads
    attention_type: str = "vanilla"  # or "mla", which takes the next four
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    q_lora_rank: int = 768
    kv_lora_rank: int = 256
    rope_theta: float = 10_000.0
    ffn_type: str = "block"  # or "dense", which takes intermediate_size
    num_experts: int = 32  # E
    expert_size: int = 32  # F
    norm_after_router: str = "rms"
    norm_scale: float = 1.0
    intermediate_size: int | None = None
    rms_norm_eps: float = 1e-5
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    dim_model_base: int = 256
    tie_word_embeddings: bool = False
    locality_weight: float = 0.0  # of the two objectives in the loss; the paper's are 1e-3 … 2e-3
    chunk_sparsity_weight: float = 0.0  # and 5e-2
    sparsity_chunk: int = 64  # tokens of a chunk

    def __post_init__(self):
        check_choice(self, ATTENTIONS, "attention_type")
        check_choice(self, FFNS, "ffn_type")
        check_choice(self, NORMS, "norm_after_router")
        sizes = ["vocab_size", "token_dim", "num_layers", "num_heads", "dim_model_base"]
        sizes += ["num_experts", "expert_size"] if self.ffn_type == "block" else ["intermediate_size"]
        latent = ["qk_nope_head_dim", "qk_rope_head_dim", "q_lora_rank", "kv_lora_rank"]
        sizes += latent if self.attention_type == "mla" else []
        check_sizes(self, *sizes)
        whole = not (self.token_dim % self.num_heads or self.num_heads % self.key_value_heads)
        accepted = "each a multiple of the next"
        check(self, whole, accepted, "token_dim", "num_heads", num_key_value_heads=self.key_value_heads)
        rotary = self.qk_rope_head_dim if self.attention_type == "mla" else self.token_dim // self.num_heads
        check(self, not rotary % 2, "even, for rotary positions", **{"width of a head": rotary})
        positive = min(self.locality_weight, self.chunk_sparsity_weight) >= 0
        check(self, positive, "0 or more", "locality_weight", "chunk_sparsity_weight")

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads


def dense_twin(config: BlockFFNConfig, active_experts: float) -> BlockFFNConfig:
    """The dense model whose FFN has as many parameters as a token uses of the routed one.

    These are the router's and its norm's, E·(D + 1), and 2·F·D of each active expert, of which a token of the trained model
    uses `active_experts` on average, (1 − sparsity)·E; a dense FFN has 2·D of each unit.
    """
    active = config.num_experts * (config.token_dim + 1) + 2 * active_experts * config.expert_size * config.token_dim
    width = round(active / (2 * config.token_dim))
    return replace(config, intermediate_size=width, ffn_type="dense", locality_weight=0.0, chunk_sparsity_weight=0.0)


class DenseFFN(nn.Module):
    """y = W_down SiLU(W_up x): a BlockFFN of one block that every token uses."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(dim, width, bias=False), nn.Linear(width, dim, bias=False)
        for layer in (self.up_proj, self.down_proj):  # as `BlockFFN` begins
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)))

    def forward_with_routing(self, x: Tensor) -> tuple[Tensor, None]:
        return self(x), None


class BlockFFNLayer(nn.Module):
    """Attention, then the FFN, each with a norm before it and a residual around it."""

    def __init__(self, config: BlockFFNConfig):
        super().__init__()
        D, heads, eps = config.token_dim, config.num_heads, config.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(D, eps=eps), nn.RMSNorm(D, eps=eps)
        if config.attention_type == "vanilla":
            self.self_attn: CausalAttention = Attention(D, heads, config.key_value_heads, config.rope_theta)
        else:
            widths = config.qk_nope_head_dim, config.qk_rope_head_dim, config.q_lora_rank, config.kv_lora_rank
            self.self_attn = LatentAttention(D, heads, *widths, config.rope_theta)
        if config.ffn_type == "block":
            router: dict[str, Any] = {"norm_after_router": config.norm_after_router, "norm_scale": config.norm_scale, "eps": eps}
            self.mlp: BlockFFN | DenseFFN = BlockFFN(D, config.num_experts, config.expert_size, **router)
        else:
            self.mlp = DenseFFN(D, config.intermediate_size or 0)
        self.scale = config.scale_depth / config.num_layers**0.5

    def forward(self, x: Tensor, previous: Routed | None = None) -> tuple[Tensor, Routed | None]:
        """Tokens [B,T,D] → [B,T,D], and how this layer's FFN routed them (None if it is dense).

        `previous` is how the layer before routed the same tokens: nothing here, but a `GatedHybridLayer` in the place of
        this layer may gate by it.
        """
        return self.finish(x, self.self_attn(self.input_layernorm(x)))

    def start(self, batch_size: int) -> Cache:
        return self.self_attn.start(batch_size)

    def go_on(self, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        mixed, cache = self.self_attn.go_on(self.input_layernorm(x), cache)
        return self.finish(x, mixed)[0], cache

    def finish(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Routed | None]:
        """What follows the mixing of tokens: the residual around it, and the FFN with its own."""
        x = x + self.scale * mixed
        y, routed = self.mlp.forward_with_routing(self.post_attention_layernorm(x))
        return x + self.scale * y, routed


class Decoder(nn.Module):
    """Embedding, layers and norm: what the checkpoints call `model`."""

    def __init__(self, config: BlockFFNConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.token_dim)
        nn.init.normal_(self.embed_tokens.weight, std=1 / config.scale_emb)  # unit spread where the layers begin
        self.layers = nn.ModuleList(BlockFFNLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.token_dim, eps=config.rms_norm_eps)


class BlockFFNModel(StreamedModel):
    """A causal language model: token numbers [B,T] → logits [B,T,V] of the next ones."""

    Config = BlockFFNConfig

    def __init__(self, config: BlockFFNConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.token_dim, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=0.02)

    def stack(self) -> Any:
        return self.layers

    @property
    def layers(self) -> nn.ModuleList:
        """The L layers; a `GatedHybridLayer` may stand in the place of some."""
        return self.model.layers

    def forward(self, tokens: Tensor) -> Tensor:
        return self.trace(tokens).outputs

    def trace(self, tokens: Tensor) -> Trace:
        """`forward`, and how each layer routed the tokens, scores and logits [B,T,E] (None where a layer is dense).
        Raises ValueError for tokens that are not [B,T], or none.
        """
        x, routing, routed = self._embed(tokens), [], None
        for layer in self.layers:
            x, routed = layer(x, routed)
            routing.append(routed)
        return Trace(self._read_out(x), tuple(routing))

    def start(self, batch_size: int) -> Stream:
        """The stream before the first token. Raises ValueError where sidecars are attached: they do not stream."""
        plain = all(isinstance(layer, BlockFFNLayer) for layer in self.layers)
        check(self, plain, "layers without sidecars (see `detach`)", layers=[type(layer).__name__ for layer in self.layers])
        return super().start(batch_size)

    def _embed(self, inputs: Tensor, start: int = 0) -> Tensor:
        check_shape(self, "tokens", inputs, "B T")
        check(self, inputs.numel(), "at least one token", tokens=list(inputs.shape))
        return self.model.embed_tokens(inputs) * self.config.scale_emb  # (B, T, D)

    def _read_out(self, x: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(x) / (self.config.token_dim / self.config.dim_model_base))

    def _conclude(self, tokens: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        return self._read_out(tokens), stream


class Losses(NamedTuple):
    """What training minimises: total = cross_entropy + the objectives of routing (means over layers) by their weights."""

    total: Tensor
    cross_entropy: Tensor  # nats a token
    locality: Tensor
    chunk_sparsity: Tensor


def losses(model: BlockFFNModel, batch: tuple[Tensor, Tensor]) -> Losses:
    """The loss of inputs and targets [B,T], and its parts; `losses(model, batch).total` is a `training.fit` loss."""
    inputs, targets = batch
    config = model.config
    logits, routing = model.trace(inputs)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    locality = chunk_sparsity = cross_entropy.new_zeros(())
    if config.ffn_type == "block" and config.locality_weight:
        locality = sum((locality_loss(routed) for routed in routing), locality) / len(routing)
    if config.ffn_type == "block" and config.chunk_sparsity_weight:
        parts = (chunk_sparsity_loss(routed, config.sparsity_chunk) for routed in routing)
        chunk_sparsity = sum(parts, chunk_sparsity) / len(routing)
    total = cross_entropy + config.locality_weight * locality + config.chunk_sparsity_weight * chunk_sparsity
    return Losses(total, cross_entropy, locality, chunk_sparsity)
