#!/usr/bin/env bash
# Guess: destroy_process_group() ends gloo's threads, so behind it only the main thread is left.
# What happens: so it does behind all_reduce(). But once FSDP2's fully_shard() has sharded a model, the threads stay until
#   the process ends, also when the model is gone: a cache of DTensor's sharding propagation keeps the mesh, and the
#   mesh keeps the group.
# Versions: torch 2.13.0, Linux (thread names are read from /proc).
# Why it matters here: threads that outlive Python's end can take a finished rank down (pytorch/pytorch issue 190489),
#   so a run whose files are all written is reported as failed, now and then. eval.py's script() waits a moment between
#   the end of the work and the end of the process.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/threads.py" <<'PYTHON'
import gc
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

def gloo_threads():
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)

def work(kind):
    dist.all_reduce(torch.ones(2))
    if kind == "all_reduce":
        return
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    fully_shard(model, mesh=DeviceMesh("cpu", torch.arange(1)))
    model(torch.randn(2, 4)).sum().backward()

dist.init_process_group("gloo", f"file://{sys.argv[2]}", rank=0, world_size=1)
work(sys.argv[1])
at_work = gloo_threads()
dist.destroy_process_group()
gc.collect()
print(at_work, gloo_threads())
PYTHON
"$folder/venv/bin/python" -c "import torch; print('torch', torch.__version__)"
for kind in all_reduce fully_shard; do
  echo "$kind: gloo's threads at work, after destroy_process_group():" \
    "$("$folder/venv/bin/python" "$folder/threads.py" $kind "$folder/$kind")" | tee -a "$folder/seen"
done
grep -q "all_reduce.* 0$" "$folder/seen" && grep -q "fully_shard.* [1-9]$" "$folder/seen" ||
  { echo "the behaviour has changed"; exit 1; }
