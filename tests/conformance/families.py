"""Tries DiffFit on the tiny model of every transformer and UNet that Diffusers tests, and prints a table.

    python tests/conformance/families.py DIFFUSERS [PART_OF_A_CLASS_NAME]

DIFFUSERS is a checkout of https://github.com/huggingface/diffusers, whose tests hold the configs and inputs; nothing of
it is kept in this repository. The checks are those of `tests/family_checks.py`. A cell says "yes", "refused" (a
ValueError) or "no", with the number of a reason below the table. `docs/families.md` has it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers  # noqa: E402
import diffusers.models.transformers.transformer_cosmos as cosmos  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers.models.embeddings import get_1d_rotary_pos_embed  # noqa: E402
from family_checks import Checks, output  # noqa: E402
from tiny import Tiny, grid, r  # noqa: E402
from torch import nn  # noqa: E402

TITLE = """
## Every class, tried

`python tests/conformance/families.py DIFFUSERS` makes this table, on the tiny models of Diffusers' own tests: DIFFUSERS
is a checkout of its repository. Each check is a method of `Checks` in `tests/family_checks.py`: a new adapter changes
no bit; all that is trained has a gradient; at scale 0, through `attention_kwargs` too, and disabled, the model is the
base to the last bit; an adapter is saved and loaded; a merge differs by 1e-5 at most, and is a plain model that
Diffusers saves and loads; unloaded, the model is the base to the last bit. A class with several configs has several
rows.
"""
PLACES = ("transformers", "unets")


if not hasattr(cosmos, "transforms"):  # of torchvision, which is not needed otherwise
    _functional = SimpleNamespace(resize=lambda x, size, interpolation=None: F.interpolate(x, size))
    cosmos.transforms = SimpleNamespace(functional=_functional, InterpolationMode=SimpleNamespace(NEAREST=None))


def _rotary() -> tuple[torch.Tensor, ...]:
    return get_1d_rotary_pos_embed(2, 9, use_real=True, repeat_interleave_real=False)


BY_HAND = [  # classes that Diffusers tests without a tiny model
    Tiny(
        "PRXTransformer2DModel",
        {"in_channels": 4, "patch_size": 2, "context_in_dim": 12, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2,
         "depth": 2, "axes_dim": [4, 4]},
        lambda: {"hidden_states": r(2, 4, 8, 8), "encoder_hidden_states": r(2, 5, 12),
                 "timestep": torch.tensor([0.3, 0.7])},
    ),
    Tiny(
        "HunyuanImageTransformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": (1, 1), "guidance_embeds": False,
         "text_embed_dim": 12, "text_embed_2_dim": 12, "rope_axes_dim": (4, 4)},
        lambda: {"hidden_states": r(2, 4, 4, 4), "timestep": torch.tensor([300.0, 700.0]),
                 "encoder_hidden_states": r(2, 5, 12), "encoder_attention_mask": torch.ones(2, 5).long(),
                 "encoder_hidden_states_2": r(2, 3, 12), "encoder_attention_mask_2": torch.ones(2, 3).long()},
    ),
    Tiny(
        "StableAudioDiTModel",
        {"sample_size": 4, "in_channels": 3, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 4,
         "num_key_value_attention_heads": 2, "out_channels": 3, "cross_attention_dim": 4, "time_proj_dim": 8,
         "global_states_input_dim": 8, "cross_attention_input_dim": 4},
        lambda: {"hidden_states": r(2, 3, 8), "timestep": torch.tensor([0.3, 0.5]), "rotary_embedding": _rotary(),
                 "encoder_hidden_states": r(2, 5, 4), "global_hidden_states": r(2, 1, 8)},
    ),
    Tiny(
        "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4,
         "patch_size": (1, 2, 2), "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 2,
         "axes_dims": (4, 6, 6), "visual_cond": False},
        lambda: {"hidden_states": r(1, 1, 8, 8, 4), "encoder_hidden_states": r(1, 5, 12),
                 "timestep": torch.tensor([500.0]), "pooled_projections": r(1, 8), "text_rope_pos": torch.arange(5),
                 "visual_rope_pos": (torch.arange(1), torch.arange(4), torch.arange(4))},
    ),
    Tiny(
        "Flux3Transformer2DModel",
        {"in_channels": 8, "cond_in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 12, "timestep_channels": 16, "mlp_ratio": 2.0,
         "axes_dims_rope": (4, 4, 4, 4)},
        lambda: {"hidden_states": r(2, 16, 8), "encoder_hidden_states": r(2, 5, 12), "img_ids": grid(4, 4),
                 "txt_ids": torch.zeros(5, 4), "timestep": torch.tensor([0.3, 0.7]),
                 "image_cond_hidden_states": r(2, 16, 8), "image_cond_ids": grid(4, 4)},
    ),
    Tiny(
        "QwenImage21Transformer2DModel",
        {"patch_size": 1, "in_channels": 8, "out_channels": 8, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "context_in_dim": 12, "mlp_ratio": 2, "axes_dims_rope": (4, 6, 6)},
        lambda: {"hidden_states": r(1, 16, 8), "encoder_hidden_states": r(1, 6, 12), "timestep": torch.tensor([0.5]),
                 "img_shapes": [[(1, 4, 4)]], "img_mask": torch.tensor([[False] * 6 + [True] * 4])},
    ),
    Tiny(
        "Transformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "num_layers": 2,
         "cross_attention_dim": 12, "norm_num_groups": 4},
        lambda: {"hidden_states": r(2, 16, 4, 4), "encoder_hidden_states": r(2, 5, 12)},
    ),
    Tiny(
        "T5FilmDecoder",
        {"input_dims": 8, "targets_length": 6, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24,
         "dropout_rate": 0.0},
        lambda: {"encodings_and_masks": [(r(2, 5, 16), torch.ones(2, 5))], "decoder_input_tokens": r(2, 6, 8),
                 "decoder_noise_time": torch.tensor([0.2, 0.6])},
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Tested(Tiny):
    """A model of Diffusers' tests."""

    model_class: type[nn.Module] = nn.Module

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.model_class(**self.init)
        for parameter in model.parameters():  # some are left as the memory was
            parameter.data = parameter.data.nan_to_num().clamp(-10, 10)
            parameter.data += 0.05 * torch.randn_like(parameter)
        return model.eval().requires_grad_(False)


def tested(source: Path, part: str) -> Iterator[Tested]:
    """The models of Diffusers' tests, each config once."""
    sys.path.insert(0, str(source))
    os.chdir(source)
    sys.modules.setdefault("requests_mock", ModuleType("requests_mock"))
    seen = set()
    for place in PLACES:
        for file in sorted((source / "tests" / "models" / place).glob("test_*.py")):
            for case in _cases(f"tests.models.{place}.{file.stem}"):
                torch.manual_seed(0)
                try:
                    cls, (init, inputs) = case.model_class, _config_and_inputs(case)
                except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, OSError) as error:
                    print(f"{type(case).__name__}: {error}"[:200], file=sys.stderr)
                    continue
                key = (cls.__name__, json.dumps(init, sort_keys=True, default=str))
                if part in cls.__name__ and key not in seen and cls.__name__ not in {tiny.cls for tiny in BY_HAND}:
                    seen.add(key)
                    yield Tested(cls.__name__, init, lambda inputs=inputs: inputs, cls)


def _cases(module: str) -> list[Any]:
    try:
        found = vars(importlib.import_module(module))
    except ImportError as error:  # of a class that the installed Diffusers does not have
        print(f"{module}: {error}"[:200], file=sys.stderr)
        return []
    own = [case for case in found.values() if isinstance(case, type) and case.__module__ == module]
    wanted = ("get_init_dict", "prepare_init_args_and_inputs_for_common")
    return [case() for case in own if hasattr(case, "model_class") and any(hasattr(case, name) for name in wanted)]


def _config_and_inputs(case: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if hasattr(case, "get_init_dict"):
        return case.get_init_dict(), case.get_dummy_inputs()
    return case.prepare_init_args_and_inputs_for_common()


def _has_none_itself(checks: Checks) -> bool:
    """Whether the base's own weights have no gradient either, in the layers whose adapters have none."""
    model = checks.tiny.make().train()
    names = {name.removeprefix("base_model.model.").partition(".difffit_")[0] for name in checks.idle}
    layers = [layer.requires_grad_() for name, layer in model.named_modules() if name in names]
    y = output(model, checks.inputs, gradients=True)
    if y.requires_grad:
        y.square().sum().backward()
    own = [parameter.grad for layer in layers for parameter in layer.parameters()]
    return len(layers) == len(names) and not any(grad is not None and grad.any() for grad in own)


class Table:
    """The rows, printed as they come, and below them the reasons that they refer to."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.classes: set[str] = set()
        print(f"| class | {' | '.join(name.replace('_', ' ') for name in Checks.NAMES)} |")
        print("| --- |" + " --- |" * len(Checks.NAMES), flush=True)

    def add(self, tiny: Tiny) -> None:
        self.classes.add(tiny.cls)
        with TemporaryDirectory() as folder:
            try:
                checks = Checks(tiny, Path(folder))
                cells = [self._cell(checks, name) for name in Checks.NAMES]
            except Exception as error:  # of whatever model: the table says which
                cells = [self._why(error)] * len(Checks.NAMES)
        print(f"| `{tiny.cls}` | {' | '.join(cells)} |", flush=True)

    def _cell(self, checks: Checks, name: str) -> str:
        try:
            getattr(checks, name)()
        except Exception as error:  # of whatever model: the table says which
            if name == "gradients" and checks.idle and _has_none_itself(checks):
                return self._with_reason("yes", f"{checks.tiny.cls}: {error}. The base has no gradient there either.")
            return self._why(error)
        return "yes"

    def _why(self, error: Exception) -> str:
        lines = str(error).splitlines() or [traceback.extract_tb(error.__traceback__)[-1].line or ""]
        return self._with_reason(
            "refused" if type(error) is ValueError else "no", f"{type(error).__name__}: {lines[0]}"
        )

    def _with_reason(self, cell: str, reason: str) -> str:
        reason = reason.replace("base_model.model.", "")[:300]
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"{cell} ({self.reasons.index(reason) + 1})"

    def end(self) -> None:
        print()
        for number, reason in enumerate(self.reasons, 1):
            print(f"{number}. {reason}")
        all_classes = {name for name in dir(diffusers) if re.search(r"Transformer|UNet|DiT\w*Model", name)}
        models = {name for name in all_classes if re.search(r"(Model|Transformer|Decoder)$", name)}
        left = sorted(models - self.classes - {name for name in models if "ControlNet" in name})
        print(f"\nNo tiny model was there of these classes of Diffusers {diffusers.__version__}: {', '.join(left)}.")


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(TITLE)
    table = Table()
    source, part = Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else ""
    by_hand = (tiny for tiny in BY_HAND if part in tiny.cls and hasattr(diffusers, tiny.cls))
    for tiny in chain(tested(source, part), by_hand):
        table.add(tiny)
    table.end()


if __name__ == "__main__":
    main()
