"""DiffFit (Xie et al., ICCV 2023) for PEFT and Diffusers. Importing this package registers the method with PEFT."""

from typing import TYPE_CHECKING

from . import log_filters  # noqa: F401 (before PEFT)

from .plugin import register as _register  # isort: skip (checks PEFT's version first)
from .components import save_pipeline
from .config import DiffFitConfig
from .explanation import Explanation, explain
from .hotswap import hotswap_adapter
from .layer import DiffFitLayer
from .loader import (
    delete_adapters,
    disable_adapters,
    enable_adapters,
    fuse_adapters,
    get_active_adapters,
    get_list_adapters,
    load_adapter,
    push_adapter,
    save_adapter,
    set_adapters,
    unfuse_adapters,
    unload_adapters,
)
from .model import DiffFitModel
from .pipelines import DiffFitLoaderMixin, load_pipeline
from .pool import AdapterPool

if TYPE_CHECKING:
    from .families.dit.pipeline import DiffFitDiTPipeline

_register()


def __getattr__(name: str) -> type:
    """`DiffFitDiTPipeline` when it is asked for: Diffusers, too, imports its pipelines and models only then."""
    if name == "DiffFitDiTPipeline":
        from .families.dit.pipeline import DiffFitDiTPipeline

        return DiffFitDiTPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AdapterPool",
    "DiffFitConfig",
    "DiffFitDiTPipeline",
    "DiffFitLayer",
    "DiffFitLoaderMixin",
    "DiffFitModel",
    "Explanation",
    "delete_adapters",
    "disable_adapters",
    "enable_adapters",
    "explain",
    "fuse_adapters",
    "get_active_adapters",
    "get_list_adapters",
    "hotswap_adapter",
    "load_adapter",
    "load_pipeline",
    "push_adapter",
    "save_adapter",
    "save_pipeline",
    "set_adapters",
    "unfuse_adapters",
    "unload_adapters",
]
__version__ = "0.1.0"
