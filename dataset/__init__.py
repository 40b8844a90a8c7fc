"""Where the data is: the folder that was named, the assignment's `dataset/`, or the sample."""

from pathlib import Path

from model import InputError


def split_files(split: str) -> tuple[str, str, str]:
    """The files of train, val or test below the data set's folder: queries, index, truth."""
    return f"query_{split}.txt", f"index_{split}.txt", f"gt/pitts30k_{split}.npz"


LISTS = (*split_files("train"), *split_files("val"))
CAMERA = ("camera",)
OPTIONAL = split_files("test")
DEFAULT = Path("dataset")
SAMPLE = Path(__file__).resolve().parent / "sample" / "rendered"


def locate(given: Path | None, needed: tuple[str, ...]) -> tuple[Path, bool]:
    """The folder that holds `needed` (LISTS, CAMERA, a split's files), and whether it is the sample.

    given: what --dataset named, or None for `dataset/`. Only when None, and nothing of the
    assignment is there, the sample is taken (and rendered on first use, said in two lines).
    Raises InputError naming what is missing, and where it was found instead.
    """
    root = given if given is not None else DEFAULT
    absent = [name for name in needed if not (root / name).exists()]
    if not absent:
        return root, False
    everything = (*LISTS, *OPTIONAL, "gt", *CAMERA)
    strayed = {name: found for name in everything if (found := _find_deeper(root, name))}
    present = [name for name in everything if (root / name).exists()]
    if given is None and not strayed and not present:
        return _sample(), True
    if not root.is_dir():
        raise InputError(
            f"{root} is no folder: name the one that holds {needed[0]} with --dataset."
        )
    sentence = f"{root} lacks {', '.join(absent)}"
    if found := [str(strayed[name]) for name in absent if name in strayed]:
        sentence += f", but there is {', '.join(found)}: move the files up to {root}"
    elif found := [name for name in absent if (root / name).with_suffix(".mat").exists()]:
        sentence += " though there is a .mat file of that name: give it the ending .npz, it is read"
    elif given is None:
        there = [*present, *map(str, strayed.values())]
        sentence += f" though it has {', '.join(there)}: unpack the rest of the assignment there"
    else:
        sentence += ": name the folder that holds them with --dataset"
    raise InputError(sentence + ".")


def _find_deeper(root: Path, name: str) -> Path | None:
    """`name` one or two folders below where it belongs, the rendered sample left out."""
    for pattern in (f"*/{name}", f"*/*/{name}"):
        for found in sorted(root.glob(pattern)):
            if found.relative_to(root).parts[0] != "sample":
                return found
    return None


def _sample() -> Path:
    from dataset import sample  # only here: rendering is rarely needed

    print(
        "No data of the assignment in dataset/: using the built-in SAMPLE, a rendered town and rooms."
    )
    rendered = sample.is_rendered(SAMPLE)
    state = "already rendered" if rendered else "rendering it now, half a minute"
    print(f"The sample is in {SAMPLE} ({state}); its figures say nothing of real cities.")
    if not rendered:
        sample.render_sample(SAMPLE)
    return SAMPLE
