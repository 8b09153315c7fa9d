"""Does a trained model know the edges of TokFSM, and does it follow a node that is written into its codes?

Letters: N nodes, K codes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nsm_support.crystalline.automata import TokFSM, make_machine
from nsm_support.crystalline.codes.bottleneck import Bottleneck, written
from nsm_support.crystalline.codes.transformer import CrystallineTransformer, Info
from nsm_support.training import evaluating


def _reader(model: CrystallineTransformer) -> Callable[[Tensor], Tensor]:
    device = model.head.weight.device
    return lambda tokens: model(tokens.to(device))[0].log_softmax(-1).cpu()


def first_transition(model: CrystallineTransformer, infos: list[Info]) -> dict[str, float]:
    """`TokFSM.first_transition` of a model in evaluation: `first_transition`, the share of true edges among as many of
    the likeliest next nodes, and `mass`, the probability of true neighbours. A `measure` of `experiment.Run`.
    """
    found = make_machine("tokfsm").first_transition(_reader(model))
    return {"first_transition": found.accuracy, "mass": found.mass}


def after_writing(model: CrystallineTransformer, bottleneck: Bottleneck, machine: TokFSM, codes: Tensor | None) -> Tensor:
    """P(next node | a node was read) [N, N], after code n of `codes` [N] was written over what stood for node n.

    It is written where the node's last digit was read, and nowhere else; None writes nothing. Rows may sum to less than 1.

    Raises:
        ValueError: if `codes` are not N codes of the bottleneck.
    """
    K = bottleneck.config.codebook_size
    if codes is not None and (codes.shape != (machine.num_nodes,) or codes.min() < 0 or codes.max() >= K):
        raise ValueError(f"after_writing: codes {list(codes.shape)}; [{machine.num_nodes}] from 0 to {K - 1} are accepted")
    read = _reader(model)

    def told(prompts: Tensor) -> Tensor:
        if codes is None:
            return read(prompts)
        places = torch.full_like(prompts, -1)
        places[:, machine.digits] = codes.repeat_interleave(len(prompts) // machine.num_nodes)
        with written(bottleneck, places):
            return read(prompts)

    with evaluating(model):
        return machine.first_transition(told).probabilities
