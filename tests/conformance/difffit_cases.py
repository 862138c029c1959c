"""DiffFit's cases for PEFT's own tests, in the form of the lists in peft/tests/test_custom_models.py."""

from difffit_peft import DiffFitConfig


def difffit_config(**config) -> DiffFitConfig:
    """Stands for a config class of PEFT's in its tests: takes what they pass, less what only that method knows."""
    init_weights = config.pop("init_lora_weights", config.pop("init_weights", True))
    known = {name: value for name, value in config.items() if hasattr(DiffFitConfig, name) or name == "task_type"}
    if known.get("target_modules") == ["lin1"]:  # test_mixed expects of the last layer what only additions do: no γ
        known["gamma_modules"] = []
    return DiffFitConfig(**known, init_weights=init_weights)


def _case(name: str, model: str, **config) -> tuple:
    return (f"{name} DiffFit", model, DiffFitConfig, config)


TEST_CASES = [
    _case("Vanilla MLP 1", "MLP", target_modules="lin0"),
    _case("Vanilla MLP 2", "MLP", target_modules=["lin0"]),
    _case("Vanilla MLP 3", "MLP", target_modules=["lin1"]),
    _case("Vanilla MLP 4", "MLP", target_modules=["lin0", "lin1"]),
    _case("Vanilla MLP 5", "MLP", target_modules=["lin0"], modules_to_save=["lin1"]),
    _case("Vanilla MLP 6", "MLP", target_modules=r"lin\d", exclude_modules=["lin1"]),
    _case("Vanilla MLP 7 no γ", "MLP", target_modules=["lin0", "lin1"], gamma_modules=[]),
    _case("Vanilla MLP 8 γ alone", "MLP", target_modules=[], gamma_modules=["lin0"]),
    _case("Vanilla MLP 9 preset within targets", "MLP", target_modules=".*"),
    _case("Vanilla MLP 10 rank 2", "MLP", target_modules=["lin0"], r=2, low_rank_modules=["lin0", "lin1"]),
    _case("Vanilla MLP 11 rank 1, preset, no γ", "MLP", gamma_modules=[], r=1),
    _case("LayerNorm 1", "MLP_LayerNorm", target_modules="layernorm0"),
    _case("LayerNorm 2", "MLP_LayerNorm", target_modules=["layernorm0", "layernorm1"]),
    _case("LayerNorm 3", "MLP_LayerNorm", target_modules=["layernorm0"], modules_to_save=["layernorm1"]),
    _case("LayerNorm 4 preset within targets", "MLP_LayerNorm", target_modules=".*"),
    _case("Embedding + transformers Conv1D", "EmbConv1D", target_modules=["conv1d"]),
    _case("Conv1d", "Conv1d", target_modules=["conv1d"]),
    _case("Conv1d bigger", "Conv1dBigger", target_modules=["conv1d"]),
    _case("Conv2d 1", "Conv2d", target_modules=["conv2d"]),
    _case("Conv2d 2", "Conv2d", target_modules=["conv2d", "lin0"]),
    _case("Conv2d groups", "Conv2dGroups", target_modules=["conv2d"]),
    _case("Conv3d 1", "Conv3d", target_modules=["conv3d"]),
    _case("Conv3d 2", "Conv3d", target_modules=["conv3d", "lin0"]),
]

ALL_PEFT_CONFIG_CLASSES = [DiffFitConfig]

_LIN0 = {"target_modules": ["lin0"], "gamma_modules": ["lin0"], "init_weights": False}
_LIN1 = {"target_modules": ["lin1"], "gamma_modules": ["lin1"], "init_weights": False}

MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    ("DiffFit Same", "difffit", DiffFitConfig, _LIN0, _LIN0),
    ("DiffFit Different", "difffit", DiffFitConfig, _LIN0, _LIN1),
]

MIXED_ADAPTER_TEST_CASES = [
    ("DiffFit mixed adapter", DiffFitConfig(**_LIN0), DiffFitConfig(**_LIN0)),
    ("DiffFit mixed adapter different layers", DiffFitConfig(**_LIN0), DiffFitConfig(**_LIN1)),
]
