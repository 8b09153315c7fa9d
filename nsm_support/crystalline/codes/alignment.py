"""Do the codes stand for the states? Measures of agreement, each beside what knowing nothing would give.

Letters: B batch, T time, K codes, S states, D width. `hard_codes` [B,T,K] hold 1 where a code is active and 0 elsewhere;
`states` [B,T] are the states of the machine. Everything rests on the counts N_ks: how often code k was active in state s.
Purity is that of clusters (Manning, Raghavan and Schütze 2008, Introduction to Information Retrieval, section 16.3);
homogeneity and completeness are those of Rosenberg and Hirschberg (2007), adjusted mutual information (AMI) that of Vinh,
Epps and Bailey (2010), all three as scikit-learn computes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nsm_support.checks import Shape, check, refuse
from nsm_support.metrics import majority_share
from nsm_support.statistics import permutation_null

Infos = Sequence[Mapping[str, Mapping[str, Tensor]]]
"""What a crystalline model returns: for each block a mapping of "attn" and "mlp" to what its bottleneck did."""
NO_STATE = -1  #: the label of a code that was never active where the labels were chosen
Measure = Literal["purity", "homogeneity", "completeness", "ami"]


class Alignment(NamedTuple):
    """How the codes of one bottleneck stand to the states, on one set of positions.

    With k codes a position a use is one active code at one position, so that there are k times as many uses as positions.
    """

    counts: Tensor  # (K, S) int64: N_ks
    labels: Tensor  # (K,) int64: the state that each code stands for, or NO_STATE
    purity: float  # share of uses that fall into the state which the code stands for
    majority: float  # share of the commonest state: the purity of codes that know nothing
    null: float  # mean purity if the states belonged to other sequences
    null_p: float  # how often such a purity reaches this one; at least 1/(permutations + 1)
    seed_purity: float  # mean of the codes' own purities, see `seed_purity`
    active_codes: int  # codes that were active at least once
    perplexity: float  # exp of the entropy of the codes' shares of use: 1 (one code) to K (all alike)
    homogeneity: float  # 1 − H(state | code set)/H(state)
    completeness: float  # 1 − H(code set | state)/H(code set)
    ami: float  # mutual information of code set and state, adjusted: 0 by chance, 1 if they are the same
    state_precision: Tensor  # (S,) float64: of the positions with a code of this state, the share in it; NaN if none
    state_recall: Tensor  # (S,) float64: of the positions in this state, the share with a code of it; NaN if none


class HeldOut(NamedTuple):
    """The bottleneck that was chosen on one split, and all bottlenecks on another, with the first split's labels."""

    name: str
    chosen: Alignment  # of that bottleneck, on the split that it was chosen on
    reported: Alignment  # of that bottleneck, on the other one
    all_reported: dict[str, Alignment]


def contingency(hard_codes: Tensor, states: Tensor, num_states: int) -> Tensor:
    """N_ks [K,S] int64: at how many positions code k was active in state s.

    Args:
        hard_codes: [B,T,K], 1 where a code is active and 0 elsewhere; any dtype.
        states: [B,T] int64, 0 … num_states − 1.

    Raises ValueError if the shapes do not fit, a code is neither 0 nor 1, or a state is out of range.
    """
    return _count(_indicator(hard_codes, states, num_states), states, num_states)


def contingency_reference(hard_codes: Tensor, states: Tensor, num_states: int) -> Tensor:
    """The definition of `contingency`, position by position and code by code."""
    counts = torch.zeros(hard_codes.shape[-1], num_states, dtype=torch.int64)
    for i in range(hard_codes.shape[0]):
        for j in range(hard_codes.shape[1]):
            state = int(states[i, j])
            for code in (hard_codes[i, j] > 0.5).nonzero()[:, 0].tolist():
                counts[code, state] += 1
    return counts


def _indicator(hard_codes: Tensor, states: Tensor, num_states: int) -> Tensor:
    """Codes [B,T,K] as float64, whose sums are exact, or an error."""
    fits = hard_codes.ndim == 3 and states.shape == hard_codes.shape[:2] and states.numel()
    shapes = {"hard_codes": Shape(hard_codes.shape), "states": Shape(states.shape)}
    check("alignment", fits, "[B, T, K] and [B, T], at least one position", **shapes)
    low, high = states.min().item(), states.max().item()
    fits = not states.is_floating_point() and 0 <= low <= high < num_states
    check("alignment", fits, f"integers from 0 to {num_states - 1}", states=states.dtype, lowest=low, highest=high)
    if not torch.equal(hard_codes * hard_codes, hard_codes):  # x² = x for 0 and 1 alone
        raise refuse("alignment", "0 and 1, without weights", hard_codes=hard_codes.unique().tolist()[:3])
    return hard_codes.detach().double()


def _count(codes: Tensor, states: Tensor, num_states: int) -> Tensor:
    counts = codes.new_zeros(num_states, codes.shape[-1])
    return counts.index_add_(0, states.flatten(), codes.flatten(0, 1)).T.long()


def code_labels(counts: Tensor) -> Tensor:
    """The state that each code stands for [K]: the one it is active in most often (the first of equals), or NO_STATE."""
    return counts.argmax(1).where(counts.sum(1) > 0, NO_STATE)


def purity(counts: Tensor, labels: Tensor | None = None) -> float:
    """Σ_k N_k,label(k) / Σ_ks N_ks: the share of uses [K,S] that fall into the state which the code stands for.

    A mean over the active codes, weighted by use. Without `labels` [K] a code stands for its commonest state here; with
    labels from elsewhere the purity is held out, and a code that had no use there counts as wrong. Raises ValueError if no
    code was ever active.
    """
    uses = counts.sum().item()
    if not uses:
        raise ValueError("purity: no code is active at any position; at least one use is needed")
    labels = code_labels(counts) if labels is None else labels
    right = counts.gather(1, labels.clamp(min=0)[:, None])[:, 0]  # (K,)
    return right[labels >= 0].sum().item() / uses


def seed_purity(counts: Tensor) -> float:
    """1/K Σ_k max_s N_ks / Σ_s N_ks: every code counts alike, a dead one as zero.

    It stands here for comparison only. A code used once is pure by necessity and counts as much as one used a thousand
    times, and codes that were never used pull the mean down: it has no chance level of its own.
    """
    counts = counts.double()
    return (counts.amax(1) / counts.sum(1).clamp(min=1)).mean().item()


def compute_state_code_alignment(hard_codes: Tensor, states: Tensor, num_states: int) -> dict[str, Any]:
    """A short summary: `purity` (as `seed_purity`), `active_codes`, and what they were made of.

    Beside these `code_state_counts` [K,S], `dominant_states` [K] (NO_STATE for a dead code), `weighted_purity`, and the
    `majority_share` that a purity has to be compared with. `align` measures more.
    """
    counts = contingency(hard_codes, states, num_states)
    return {
        "purity": seed_purity(counts),
        "active_codes": int((counts.sum(1) > 0).sum()),
        "code_state_counts": counts,
        "dominant_states": code_labels(counts),
        "weighted_purity": purity(counts),
        "majority_share": majority_share(states),
    }


def code_sets(hard_codes: Tensor) -> np.ndarray:
    """One number [B·T] for each set of active codes: equal where the same codes are active. With k = 1, the code."""
    bits = np.packbits(hard_codes.detach().cpu().numpy().astype(bool).reshape(-1, hard_codes.shape[-1]), axis=1)
    return np.unique(np.ascontiguousarray(bits).view(f"V{bits.shape[1]}"), return_inverse=True)[1].reshape(-1)


def align(
    hard_codes: Tensor, states: Tensor, num_states: int, *, labels: Tensor | None = None, permutations: int = 99, seed: int = 0
) -> Alignment:
    """Measure how the codes of one bottleneck stand to the states.

    For k > 1 codes a position, purity, precision and recall look at each use of a code by itself; homogeneity,
    completeness and AMI need one label a position, which is the *set* of its active codes. Of the sets there can be many,
    so their homogeneity is high by chance alone: AMI is adjusted for that.

    Args:
        hard_codes, states, num_states: as in `contingency`, from B ≥ 2 sequences.
        labels: [K] the state of each code, chosen on another split; None chooses them here, where they flatter.
        permutations: of the null, which gives each sequence of codes the states of another one. Shuffled single positions
            would be no fair null: positions of a sequence depend on each other.
        seed: of the permutations.

    Raises ValueError as `contingency`, if no code is active, or if labels are not of the stated shape and range.
    """
    from sklearn.metrics import adjusted_mutual_info_score, homogeneity_completeness_v_measure

    codes = _indicator(hard_codes, states, num_states)
    counts = _count(codes, states, num_states)
    if labels is not None:
        fits = labels.shape == codes.shape[-1:] and not labels.is_floating_point()
        fits = fits and NO_STATE <= int(labels.min()) <= int(labels.max()) < num_states
        accepted = f"{codes.shape[-1]} integers from {NO_STATE} to {num_states - 1}"
        check("alignment", fits, accepted, labels=labels.tolist()[:8], dtype=labels.dtype)
    null = permutation_null(
        lambda own, other: purity(_count(own, other, num_states), labels), codes, states, permutations=permutations, seed=seed
    )
    labels = code_labels(counts) if labels is None else labels.to(counts.device)
    sets, truth = code_sets(hard_codes), states.flatten().cpu().numpy()
    homogeneity, completeness, _ = homogeneity_completeness_v_measure(truth, sets)
    uses, there = counts.sum(1).double(), states.flatten().bincount(minlength=num_states).double()  # (K,), (S,)
    known, own = labels >= 0, labels.clamp(min=0)
    # A state is detected wherever a code of it is active: with k > 1, several may be, and more than one state.
    member = F.one_hot(own, num_states).double() * known[:, None]  # (K, S)
    detected = (codes.flatten(0, 1) @ member > 0).double()  # (B·T, S)
    right = detected.gather(1, states.reshape(-1, 1))[:, 0]  # (B·T,)
    right = torch.zeros_like(there).index_add_(0, states.flatten(), right)
    return Alignment(
        counts=counts,
        labels=labels,
        purity=null.observed,
        majority=majority_share(states),
        null=float(null.null.mean()),
        null_p=null.p_value,
        seed_purity=seed_purity(counts),
        active_codes=int((uses > 0).sum()),
        perplexity=torch.special.entr(uses / uses.sum()).sum().exp().item(),
        homogeneity=float(homogeneity),
        completeness=float(completeness),
        ami=float(adjusted_mutual_info_score(truth, sets)),
        state_precision=right / detected.sum(0),
        state_recall=right / there,
    )


def by_bottleneck(infos: Infos) -> dict[str, Mapping[str, Tensor]]:
    """What a crystalline model returns of its blocks, under the names of its bottlenecks: "block 0, attn", …"""
    return {f"block {i}, {part}": info for i, block in enumerate(infos) for part, info in block.items()}


def align_all(
    infos: Infos, states: Tensor, num_states: int, *, labels: Mapping[str, Tensor] | None = None, **options: Any
) -> dict[str, Alignment]:
    """`align`, with its options, for every bottleneck by its name; `labels` by name were chosen on another split."""
    return {
        name: align(info["hard_codes"], states, num_states, labels=labels[name] if labels else None, **options)
        for name, info in by_bottleneck(infos).items()
    }


def held_out_alignment(
    choose_on: tuple[Infos, Tensor],
    report_on: tuple[Infos, Tensor],
    num_states: int,
    *,
    measure: Measure = "purity",
    **options: Any,
) -> HeldOut:
    """Choose code labels, and the bottleneck that is best in a measure, on one split (infos, states); report on another.

    The best of several bottlenecks, and the commonest state of each code, flatter on the data that they were chosen on.
    Options are those of `align`. Raises ValueError as `align`, or if both splits are the same data.
    """
    chosen = align_all(*choose_on, num_states, **options)
    name = max(chosen, key=lambda name: getattr(chosen[name], measure))
    labels = {name: alignment.labels for name, alignment in chosen.items()}
    reported = align_all(*report_on, num_states, labels=labels, **options)
    if torch.equal(choose_on[1], report_on[1]) and all(torch.equal(chosen[n].counts, reported[n].counts) for n in chosen):
        raise ValueError("held_out_alignment: both splits hold the same codes in the same states; two splits are needed")
    return HeldOut(name, chosen[name], reported[name], reported)


# Controls: codes that know nothing of the states but what lies in the input -------------------------------------------


def random_codebook_codes(inputs: Tensor, codebook_size: int, num_codes_k: int, generator: Generator) -> Tensor:
    """Hard codes [B,T,K] of a bottleneck's inputs [B,T,D] by a random codebook: the k most similar of K random directions.

    What is pure here is so because the network's activations already lie in clusters, whatever the codes were trained to.
    Raises ValueError unless 1 ≤ num_codes_k ≤ codebook_size.
    """
    accepted = f"1 to codebook_size ({codebook_size})"
    check("random_codebook_codes", 1 <= num_codes_k <= codebook_size, accepted, num_codes_k=num_codes_k)
    codebook = F.normalize(torch.randn(codebook_size, inputs.shape[-1], generator=generator), dim=1).to(inputs)
    chosen = (inputs @ codebook.T).topk(num_codes_k, -1).indices
    return inputs.new_zeros(*inputs.shape[:-1], codebook_size).scatter_(-1, chosen, 1)


def token_codes(tokens: Tensor, codebook_size: int) -> Tensor:
    """Hard codes [B,T,K] of tokens [B,T], one code a token: as pure as the token alone makes it, without any state.
    Raises ValueError if there are more tokens than codes: then no such labelling exists.
    """
    if tokens.max() >= codebook_size:
        raise ValueError(f"token_codes: token {tokens.max().item()} has no code of its own among {codebook_size}")
    return F.one_hot(tokens, codebook_size).float()


def plot_code_state_alignment(
    matrix: Tensor | np.ndarray,
    n_states: int,
    codebook_size: int,
    purity: float | None = None,
    title: str = "Code-state alignment",
):
    """How each active code's uses are spread over the states, as a Matplotlib figure: rows are codes, columns states.

    The codes stand in the order of their commonest states, so that codes which stand for states make a staircase. Dead
    codes are left out and counted in the title.

    Args:
        matrix: [codebook_size, n_states] counts, as `contingency` gives them.
        purity: written into the title, if given.

    Raises ValueError if the matrix is of another shape, holds negative counts, or no code is active.
    """
    import matplotlib.pyplot as plt

    counts = np.asarray(matrix, dtype=np.float64)
    if counts.shape != (codebook_size, n_states) or not counts.any() or (counts < 0).any():
        accepted = f"counts [{codebook_size}, {n_states}], not all zero"
        raise refuse("plot_code_state_alignment", accepted, shape=counts.shape, sum=counts.sum().item())
    uses = counts.sum(1)
    order = np.lexsort((-uses, counts.argmax(1)))  # by commonest state, then by use
    order = order[uses[order] > 0]
    figure, axis = plt.subplots(figsize=(5.6, min(1.6 + 0.19 * len(order), 9.0)))
    image = axis.imshow(counts[order] / uses[order, None], vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set_xticks(range(n_states) if n_states <= 12 else range(0, n_states, -(-n_states // 10)))
    axis.set_yticks(range(len(order)), order, fontsize="x-small") if len(order) <= 40 else axis.set_yticks([])
    axis.set(xlabel="state", ylabel="code, in the order of its commonest state")
    found = f"{len(order)} of {codebook_size} codes active"
    axis.set_title(f"{title}\n{found}" + ("" if purity is None else f", purity {purity:.3f}"))
    figure.colorbar(image, ax=axis, label="share of the code's uses")
    return figure
