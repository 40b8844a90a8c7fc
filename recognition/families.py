"""Families of recipes: the modules that train.py and eval.py are made of, and how one is chosen.

A family is recipes that share flags, data and batches. It is a module that offers

    FLAGS               flags that no other family has: a command line with one of them is its own
    RECIPE              the recipe that these flags mean
    LAST                name of its last checkpoint
    SCORED              what the judge shows by which epochs are compared
    SAMPLE_SETTINGS     what differs on the built-in sample
    add_data_flags(parser)                 where the data is; of eval.py, too
    add_training_flags(parser)             what is its own beside flags.add_training_flags
    settle(args)                           finish and check the arguments, of eval.py, too
    locate(args, training) -> Where        where the data is
    read(args, where) -> data              the images of training and val: printed, refused if bad
    prepare(args, data, model, device, store) -> Job

Everything else is shared: the model by recipes.py, the command by train_command.py, the loop by train.py.
"""

import argparse
from collections.abc import Sequence
from types import ModuleType

from recognition import benchmark, cosplace, gsv_cities
from recognition.recipes import RECIPES

FAMILIES: dict[str, ModuleType] = {
    "benchmark": benchmark,
    "cosplace": cosplace,
    "gsv_cities": gsv_cities,
}


def choose(
    argv: Sequence[str], recipe: str | None, saved: str | None = None
) -> tuple[ModuleType, str]:
    """The family and the recipe of a command line.

    recipe: the one it names, if any; else it is that of its flags, else `saved`, of its checkpoint.
    """
    given = {word.split("=")[0] for word in argv}
    of_flags = [family.RECIPE for family in FAMILIES.values() if given & family.FLAGS]
    saved = saved if saved in RECIPES else benchmark.RECIPE
    recipe = recipe or (of_flags[0] if of_flags else saved)
    return FAMILIES[RECIPES[recipe].family], recipe


def with_data(argv: Sequence[str], family: ModuleType) -> ModuleType:
    """The family whose flags say where the data of a test is: `family`, or one that has all of them."""

    def flags(of: ModuleType) -> set[str]:
        parser = argparse.ArgumentParser(add_help=False)
        of.add_data_flags(parser)
        return {flag for action in parser._actions for flag in action.option_strings}

    known = {each: flags(each) for each in FAMILIES.values()}
    given = {word.split("=")[0] for word in argv} & set().union(*known.values())
    return next((each for each in (family, *known) if given <= known[each]), family)
