"""`AdapterPool`: many adapters on one base, loaded when they are first asked for."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from .config import nearest, short
from .layer import Entry, names_in


class AdapterPool:
    """Draws with any of many adapters, of which at most `max_adapters` are in memory.

        pool = AdapterPool(pipe, "adapters", max_adapters=64)
        images = pool(["ramen", "fox"], adapter_names=["food", "animals"]).images

    An adapter is loaded when it is first asked for. When there is no room, it takes the place of the one that was asked
    for the longest time ago: its values, where the two have the same layers, so that nothing else of the model changes.
    Where they have not, it is loaded before the other one goes.
    A batch may name an adapter for each image. Calls from several threads are done one after the other, and give what
    single ones give.

    Args:
        pipe: a pipeline without adapters, which takes `adapter_names`, as `DiffFitDiTPipeline` does.
        adapters: a folder of adapters, each a folder in it, by whose names they are called; or ids of the Hub or
            folders, by their names in a dict, or a list of those that are called as they are written.
        max_adapters: how many are in memory at most.

    Raises:
        ValueError: for a folder without adapters; for a pipeline that has adapters.
    """

    def __init__(
        self,
        pipe: Any,
        adapters: str | os.PathLike | Mapping[str, str | os.PathLike] | Iterable[str],
        max_adapters: int = 64,
    ) -> None:
        if max_adapters < 1:
            raise ValueError(f"max_adapters={max_adapters}: there must be room for one adapter at least.")
        if pipe.get_list_adapters():
            raise ValueError(f"The pipeline has the adapters {pipe.get_list_adapters()}: give one that has none.")
        if isinstance(adapters, Mapping):
            self.places = {name: os.fspath(place) for name, place in adapters.items()}
        elif isinstance(adapters, (str, os.PathLike)):
            folders = sorted(path.parent for path in Path(adapters).expanduser().glob(f"*/{CONFIG_NAME}"))
            if not folders:
                raise ValueError(f"{adapters} holds no folder with {CONFIG_NAME}: give a folder of adapters.")
            self.places = {folder.name: str(folder) for folder in folders}
        else:
            self.places = {name: name for name in adapters}
        self.pipe, self.max_adapters = pipe, max_adapters
        self._slots: OrderedDict[str, str] = OrderedDict()  # adapter to its name in the model, the oldest first
        self._one_at_a_time = threading.Lock()

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters in memory, the one asked for last at the end."""
        return [*self._slots]

    def __call__(self, class_labels: list[int | str], adapter_names: list[Entry], **kwargs: Any) -> Any:
        """What `pipe(class_labels, adapter_names=adapter_names, **kwargs)` gives, with the adapters loaded before.

        Raises:
            ValueError: for a name that is not in the pool; for more adapters than have room; and as the pipeline does,
                when it loads or draws.
            HfHubHTTPError: of `huggingface_hub`, if the Hub does not give an adapter.
        """
        wanted = {name: None for entry in adapter_names for name in names_in(entry) if name != "__base__"}
        for name in wanted:
            if name not in self.places:
                raise ValueError(
                    f"There is no adapter {short(name)} among the {len(self.places)} of the pool."
                    f"{nearest(name, [*self.places])}"
                )
        if len(wanted) > self.max_adapters:
            raise ValueError(f"The batch names {len(wanted)} adapters, and max_adapters is {self.max_adapters}.")
        with self._one_at_a_time:
            for name in wanted:  # what is here already must not make room
                if name in self._slots:
                    self._slots.move_to_end(name)
            for name in wanted:
                if name not in self._slots:
                    self._load(name)
            entries = [tuple(self._slots.get(name, name) for name in names_in(entry)) for entry in adapter_names]
            return self.pipe(class_labels, adapter_names=entries, **kwargs)

    def _load(self, name: str) -> None:
        place = self.places[name]
        oldest = next(iter(self._slots)) if len(self._slots) == self.max_adapters else None
        if oldest is not None and self._takes_the_place(place, self._slots[oldest]):
            self._slots[name] = self._slots.pop(oldest)
            return
        free = next(slot for i in range(self.max_adapters + 1) if (slot := f"slot_{i}") not in self._slots.values())
        self.pipe.load_difffit_weights(place, free)  # first, so that one that is broken takes nobody's place
        if oldest is not None:
            self.pipe.delete_adapters(self._slots.pop(oldest))
        self._slots[name] = free

    def _takes_the_place(self, place: str, slot: str) -> bool:
        """Puts an adapter's values in the place of another's; `False` if it has other layers, or is broken."""
        try:
            self.pipe.load_difffit_weights(place, slot, hotswap=True)
        except ValueError:
            return False
        return True
