"""The tasks on which sequence models are compared: one protocol, eleven tasks, and the controls of each.

`make_task(name)` builds one. What is asked of a model is its `head`: "classification" (targets [B]), "labelling" or
"language_model" (targets [B, T], `IGNORE` where nothing is asked). The sequences of a batch share one length. Where
texts differ in length (ListOps, verses) the token 0 pads them at the right, and models see it as an ordinary token.
"""

import difflib
import inspect
from typing import Any

from nsm_support.tasks.generated import PERMUTATIONS, PREFIX, ListOps, Recall, SelectiveCopying, WordProblem
from nsm_support.tasks.protocol import IGNORE, Batch, Control, Score, Task, score
from nsm_support.tasks.real import SECTIONS, CharacterText, Digits, VerseSection

TASKS = {"mnist": Digits, "permuted_mnist": Digits, "recall": Recall, "selective_copying": SelectiveCopying}
TASKS |= dict.fromkeys(PERMUTATIONS, WordProblem)
TASKS |= {"listops": ListOps, "verse_section": VerseSection, "text": CharacterText}

__all__ = [
    "IGNORE", "PREFIX", "SECTIONS", "TASKS", "Batch", "CharacterText", "Control", "Digits", "ListOps", "Recall", "Score",
    "SelectiveCopying", "Task", "VerseSection", "WordProblem", "make_task", "score",
]  # fmt: skip


def make_task(name: str, *, fold: int = 0, seed: int = 0, **sizes: Any) -> Task:
    """Build a task by its name, one of `TASKS`.

    Args:
        fold: of five, of the digits; every other task has fold 0 alone.
        seed: of what is held out: the shuffle of the folds, the chapters, or the held-out strings.
        sizes: keyword arguments of the task's class: `pairs` of recall, `max_length` of a group, …

    Raises ValueError for a name, a size or a fold that the task does not have, naming those it has.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"make_task: {name!r} is no task; accepted are {', '.join(TASKS)}{hint}")
    parameters = inspect.signature(TASKS[name]).parameters
    accepted = [parameter for parameter in parameters if parameter not in ("name", "fold", "seed")]
    if unknown := [size for size in sizes if size not in accepted]:
        raise ValueError(f"make_task: {name} has no {', '.join(unknown)}; accepted are {', '.join(accepted)}")
    if "fold" in parameters:
        sizes["fold"] = fold
    elif fold != 0:
        raise ValueError(f"make_task: {name} has no fold {fold}; only mnist and permuted_mnist have folds, others a seed")
    named = (name,) if "name" in parameters else ()  # a class of several tasks is told which
    return TASKS[name](*named, seed=seed, **sizes)
