#!/usr/bin/env bash
# results/trl.sh: seconds a step of this repository's PPO beside TRL's GRPOTrainer, and of its SFT beside TRL's
# SFTTrainer, on the CPU in fp32, with 1 and 2 threads. GeneralPoints, rule id: one tiny init and tokenizer, 128 answers
# in an optimizer step, T = 1, at most 32 tokens. A measurement is a process; ours and TRL's take turns, ROUNDS times.
# Alike: AdamW; beta 0.02 against a frozen init; one pass over the data; the verifier is the reward. In SFT both have
#   the same rows in the same order with loss on the same tokens, which is asserted.
# Not alike: PPO scores its policy before the update and has a value head, GRPO has neither. PPO has 128 prompts, GRPO
#   takes advantages from 8 answers to each of 16. TRL makes its dataset before it starts (in SFT as tokens), we
#   make prompts and demonstrations in the step. In SFT TRL makes logits of all positions on a CPU, we of the answers.
# In favour of TRL: no logging, and the fastest of several micro-batches. TRL checkpoints gradients by default, which
#   takes time to save memory: its rows are without (as ours) and with that default.
# A quick try: STEPS=2 ROUNDS=1 SIZES=32 THREADS=1 bash results/trl.sh
set -euo pipefail
cd "$(dirname "$0")/.."
: ${STEPS:=10} ${ROUNDS:=2} ${THREADS:=1 2} ${SIZES:=16 32 64 128}
export HOME_TRL=out/trl STEPS TQDM_DISABLE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HOME=$PWD/out/trl/cache
python=$HOME_TRL/venv/bin/python runs=$HOME_TRL/runs
if ! [ -f $HOME_TRL/venv/ready ]; then
  ${PYTHON:-python3} -m venv $HOME_TRL/venv
  $python -m pip install --quiet torch==2.13.0
  $python -m pip install --quiet -r requirements.txt torch==2.13.0 transformers==5.24.0 trl==1.16.0 datasets==5.2.0 \
    accelerate==1.15.0
  touch $HOME_TRL/venv/ready
fi
[ -d $runs/gp/base ] || $python sft.py --env gp --stage base --tokens 2e5 --out $runs --episodes 0
[ -d $runs/gp/id/init ] || $python sft.py --env gp --rule id --stage init --out $runs --episodes 0

rm -f $HOME_TRL/log.jsonl
for threads in $(for _ in $(seq $ROUNDS); do echo $THREADS; done); do
  for what in $(for kind in rl sft; do
    echo ours-$kind=0; printf "trl-$kind=%s default-$kind=%s " $(for size in $SIZES; do echo $size $size; done); done); do
    OMP_NUM_THREADS=$threads $python results/trl_bench.py ${what/=/ } > $HOME_TRL/last.txt 2>&1 || {
      tail -n 20 $HOME_TRL/last.txt; exit 1; }
    tail -n 1 $HOME_TRL/log.jsonl
  done
done
$python results/trl_bench.py | tee $HOME_TRL/table.txt
