#!/usr/bin/env bash
# results/gpu.sh [MODEL]: all that a first GPU should be asked, in one command of at most 25 minutes on one card of 80 GB.
# MODEL: a released model's transformers folder, for SFT against RL at size. Plain files come out in $OUT/files, and
# summary.txt there has a line a check. A step that fails is named, and the next one begins. A second start leaves out the
# steps that are done. To try every line on a CPU:
#   DEVICE=cpu DTYPES=bf16 SIZES=tiny JOBS=1 LIMIT=9999 BASE="--tokens 2e4" RL="--tokens 2e3 --batch 4" EPISODES=2 \
#     SIZE="--dtype bf16 --batch 4" INIT_TOKENS=500 GP_TOKENS=2e3 VIRL_TOKENS=2e3 GP_BATCH=4,4 VIRL_BATCH=1,4 PLAYED=2 \
#     bash results/gpu.sh out/gpu/model-tiny
set -uo pipefail
cd "$(dirname "$0")/.."
: ${OUT:=out/gpu} ${DEVICE:=cuda} ${DTYPES:=bf16 fp16} ${LIMIT:=1500} ${PYTHON:=python}
: ${JOBS:=6} ${OMP_NUM_THREADS:=2}        # tiny jobs at a time, and cores of each
: ${BASE:=} ${RL:=} ${EPISODES:=300}      # of the tiny jobs: more flags; hands or routes a column of every table
: ${SIZES:=0.5B 1.5B} ${SIZE:=--verify 2} # see gpu.py; more flags
: ${INIT_TOKENS:=2e5} ${GP_TOKENS:=4e6} ${VIRL_TOKENS:=4e6} ${SFT_LR:=2e-5} ${RL_LR:=1e-5}  # of the released model
: ${GP_BATCH:=64,128} ${VIRL_BATCH:=8,32} # episodes a step of SFT, an iteration of PPO
: ${PLAYED:=80} ${RL_SECONDS:=120}        # episodes a column; PPO is stopped then, and SFT gets as much compute
model=${1:-} files=$OUT/files
export OMP_NUM_THREADS TQDM_DISABLE=1 OUT DEVICE PYTHON BASE RL EPISODES SIZE INIT_TOKENS SFT_LR RL_LR
export RL_SECONDS PLAYED model files
mkdir -p $files
rm -f $files/failed.txt

# A step: the file that it leaves, and its command. What it prints goes to a text file of its own.
step() {
  local begin=$SECONDS left=$((LIMIT - SECONDS))
  [ -f $files/$1 ] && return
  timeout -k 30 $((left > 0 ? left : 1)) bash -c "${*:2}" > $files/${1%.*}.txt 2>&1
  local code=$?
  [ -f $files/$1 ] || echo "$1: exit code $code: $(tail -n 1 $files/${1%.*}.txt)" | tee -a $files/failed.txt
  echo "$1: $((SECONDS - begin)) s"
}

tiny() {  # task, rule, device, dtype: base, init and PPO from nothing, and the table
  local home=$OUT/tiny-$1-$3-$4 run=$files/tiny-$1-$3-$4
  local flags="--env $1 --rule $2 --device $3 --dtype $4 --out $home"
  rm -rf $home
  $PYTHON -u sft.py --stage base $flags $BASE --episodes 0 && $PYTHON -u rl.py $flags $RL --episodes $EPISODES || return 1
  cp $home/$1/base/metrics.jsonl $run-base.jsonl
  cp $home/$1/$2/rl/metrics.jsonl $run-rl.jsonl
  cp $home/$1/$2/rl/eval.json $run-table.json
}

weights() {  # task, rule, dtype: the model that the CPU trained plays on this device
  $PYTHON -u eval.py --env $1 --rule $2 --device $DEVICE --dtype $3 --out $OUT/weights-$3 --episodes $EPISODES \
    --models $OUT/tiny-$1-cpu-fp32/$1/$2/rl && cp $OUT/weights-$3/$1/$2/eval.json $files/weights-$1-$3.json
}

size() {  # size, sft or rl: a few steps in this device's own dtype
  [ -d $OUT/model-$1 ] || $PYTHON -u results/gpu.py build $OUT/model-$1 $1 || return 1
  rm -rf $OUT/size-$1/gp/id/$2
  $PYTHON -u results/gpu.py measure $files/size-$1-$2.json $2 --init $OUT/model-$1 --out $OUT/size-$1 --steps 4 \
    --device $DEVICE $SIZE
}

at_size() {  # script, flags: with PLAYED episodes a column on the way
  $PYTHON -uc "import sft, rl; sft.EVERY['eval_episodes'] = $PLAYED; $1.script($1.main)" ${@:2} --episodes 0
}

released() {  # task, budget, episodes a step of SFT and PPO, flags: a short SFT; then PPO, and SFT at PPO's compute
  local home=$OUT/released/$1/id run=$files/released-$1 name flags="--env $1 --model $model --out $OUT/released"
  flags="$flags --device $DEVICE ${*:5}"
  rm -rf $home
  at_size sft --stage init $flags --lr $SFT_LR --tokens $INIT_TOKENS --batch $3 || return 1
  timeout $RL_SECONDS bash -c "at_size rl $flags --lr $RL_LR --tokens $2 --batch $4"
  at_size sft $flags --lr $SFT_LR --tokens $($PYTHON results/gpu.py spent $home/rl) --batch $3 || return 1
  $PYTHON -u eval.py $flags --episodes $PLAYED --models $model $home/{init,sft,rl} || return 1
  for name in sft rl; do
    $PYTHON results/gpu.py curve $home/$name $home/eval.json $run-$name.jsonl
    $PYTHON results/figures.py course $run-$name.jsonl
  done
  $PYTHON results/figures.py curves $run.png $run-{sft,rl}.jsonl  # needs matplotlib
  cp $home/eval.json $run-table.json
}

export -f tiny weights size at_size released
{ nvidia-smi; $PYTHON -c "import torch, transformers; print(torch.__version__, transformers.__version__)"
  git log -1 --format=%h; } &> $files/machine.txt
$PYTHON results/figures.py memory > $files/memory.txt
for job in "gp ood" "virl id"; do
  for on in "cpu fp32" $(printf "$DEVICE-%s " $DTYPES); do
    while [ $(jobs -rp | wc -l) -ge $JOBS ]; do wait -n; done
    set -- $job ${on/-/ }
    step tiny-$1-$3-$4-table.json tiny $* &
  done
done
wait
for dtype in fp32 $DTYPES; do
  step same-$dtype.json $PYTHON results/gpu.py same $files/same-$dtype.json $OUT/tiny-gp-cpu-fp32/gp/ood/rl $DEVICE $dtype
done
for dtype in $DTYPES; do
  step weights-gp-$dtype.json weights gp ood $dtype
  step weights-virl-$dtype.json weights virl id $dtype
done
for size in $SIZES; do
  step size-$size-sft.json size $size sft
  step size-$size-rl.json size $size rl
done
if [ -n "$model" ]; then
  step released-gp-table.json released gp $GP_TOKENS ${GP_BATCH/,/ } --max_new_tokens 60 --verify 3
  step released-virl-table.json released virl $VIRL_TOKENS ${VIRL_BATCH/,/ } --max_new_tokens 56 --verify 1
fi
$PYTHON results/gpu.py summary $files | tee $files/summary.txt
