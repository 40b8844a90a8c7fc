"""Work shared among threads: they start alike on every platform and share what they work on, as
processes do not.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from model import usable_cores

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """function of each item, in order; progress(done, of) is called in the caller's thread as
    results arrive.
    """
    results = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for result in pool.map(function, items):
            results.append(result)
            if progress:
                progress(len(results), len(items))
    return results
