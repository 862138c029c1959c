"""Keeps off the console what PEFT, Diffusers and Transformers log at each start of parts that nobody asked for.

They import torchao and bitsandbytes wherever these are installed, and what does not suit the machine is then said on
behalf of a user who may never have heard of them. Importing this module adds a filter to the logger of each such line;
all other lines of the same loggers are shown.
"""

import logging
import re
import warnings
from collections.abc import Callable

_NOISE = {
    "torchao": r"Failed to load .*\.so: ",
    "torch.utils._pytree": r"<enum '\w+'> is an Enum subclass and is now natively supported ",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: ",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    # said of every pipeline with class names: JSON has no keys but strings
    "diffusers.pipelines.pipeline_utils": r"Expected types for id2label: .* got (typing\.Dict|dict)\[str, str\]",
}


def _other_than(pattern: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not re.match(pattern, record.getMessage())


for _name, _pattern in _NOISE.items():
    logging.getLogger(_name).addFilter(_other_than(_pattern))
# said by Diffusers 0.36 when it imports one of its transformers
warnings.filterwarnings("ignore", "CUDA is not available or torch_xla is imported", module="diffusers")
