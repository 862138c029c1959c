"""Two real processes against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_dit
from distributed_worker import train
from peft import PeftModel

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_the_adapter_that_one_trains(how, tmp_path, inputs):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, str(HERE / "distributed_worker.py"), how, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    loaded = PeftModel.from_pretrained(make_dit(), tmp_path)
    alone = train(lambda model: model)
    ours, theirs = (
        {name: p for name, p in model.named_parameters() if "difffit_" in name} for model in (loaded, alone)
    )
    assert ours.keys() == theirs.keys()
    # δ of keys has no effect (softmax ignores a shift): its gradient is rounding, which AdamW scales to full steps
    for name in [name for name in ours if "to_k.difffit_delta" not in name]:
        torch.testing.assert_close(ours[name].data, theirs[name].data, rtol=1e-5, atol=1e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).sample, alone(**inputs).sample, rtol=1e-4, atol=1e-5)
