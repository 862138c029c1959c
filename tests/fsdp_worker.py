"""`examples/train_difffit.py` under FSDP2 on CPUs.

Accelerate 1.15 gives FSDP to accelerators alone, so it is told that there are some.
"""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import train_difffit  # noqa: E402

PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU
train_difffit.main(train_difffit.parse_args())
