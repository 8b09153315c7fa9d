"""Who may import whom. A reader of a thread needs the shared modules and nothing else; the science never needs the pipeline."""

import grimp
import pytest

THREADS = ("nsm", "crystalline", "blockffn")
FOR_THE_BOOK = ("nsm_support.results", "nsm_support.figures", "nsm_support.statistics")


@pytest.fixture(scope="module")
def imports() -> set[tuple[str, str]]:
    """Pairs (module, what it imports) of both packages, inside functions too."""
    graph = grimp.build_graph("nsm_support", "nsm_book", cache_dir=None)
    return {(one, other) for one in graph.modules for other in graph.find_modules_directly_imported_by(one)}


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def broken(imports: set[tuple[str, str]]) -> list[str]:
    """The imports that no layer allows, as "module → module"."""
    found = []
    for one, other in sorted(imports):
        thread = next((name for name in THREADS if within(one, f"nsm_support.{name}")), None)
        others = [f"nsm_support.{name}" for name in THREADS if name != thread]
        shared = not within(one, "nsm_support.studies") and not within(one, "nsm_book")
        if (
            (within(other, "nsm_book") and not within(one, "nsm_book"))
            or (within(one, "nsm_book") and within(other, "nsm_support") and not within(other, *FOR_THE_BOOK))
            or (within(other, "nsm_support.studies") and not within(one, "nsm_support.studies"))
            or (shared and within(other, *others))
        ):
            found.append(f"{one} → {other}")
    return found


def test_no_import_crosses_the_layers(imports):
    assert len(imports) > 100 and broken(imports) == []


@pytest.mark.parametrize(
    "wrong",
    [
        ("nsm_support.data", "nsm_book.pages"),
        ("nsm_book.gate", "nsm_support.training"),
        ("nsm_book.gate", "nsm_support.nsm.layer"),
        ("nsm_support.crystalline.codes.bottleneck", "nsm_support.nsm.layer"),
        ("nsm_support.mixers.mamba", "nsm_support.blockffn.ffn"),
        ("nsm_support.blockffn.signals", "nsm_support.studies.tables"),
    ],
)
def test_an_import_that_crosses_a_layer_is_found(imports, wrong):
    assert broken(imports | {wrong}) == [" → ".join(wrong)]
