#!/usr/bin/env bash
# results/make.sh NAME: make the raw files of a section of results/README.md again, from nothing, below out/study.
# It goes on where it was stopped: a finished run is not trained again.
#   SEEDS="0 1 2" PYTHON=python3 bash results/make.sh rates-gp
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-} seeds=${SEEDS:-0 1 2} WRITERS_RULES=${RULES:-id ood} python=${PYTHON:-python} raw=results/raw
mkdir -p $raw

# One run: script, task, seed, name, more flags. Its table is made later, together with all others'. Success is
# measured on the way (for the curves) at the chosen rates alone.
train() {
  local script=$1 env=$2 rule=$3 seed=$4 run=$5; shift 5
  local folder=out/study/s$seed/$env/$rule/$run monitors=1
  if [ $run = sft-$SFT_LR ] || [ $run = rl-$RL_LR ]; then monitors=4; fi
  if ! [ -f $folder/eval.json ]; then
    $python -u $script.py --env $env --rule $rule --seed $seed --out out/study/s$seed --name $run --episodes 2 --monitors $monitors "$@" \
      $([ -d $folder ] && echo --resume)
  fi
  cp $folder/metrics.jsonl $raw/$env-$rule-s$seed-$run.jsonl
}

# One table: task, rule, seed, its file's name, the runs in it. 300 hands or 200 routes a cell.
tabulate() {
  local env=$1 rule=$2 seed=$3 file=$4; shift 4
  local home=out/study/s$seed/$env episodes=300
  [ $env = virl ] && episodes=200
  $python -u eval.py --env $env --rule $rule --seed $seed --out out/study/s$seed --episodes $episodes \
    --models $(printf "$home/$rule/%s " "$@")
  cp $home/$rule/eval.json $raw/$file-s$seed.json
}

main() {  # the chosen rates, both rules
  local env=$1 seed rule
  for seed in $seeds; do
    for rule in $WRITERS_RULES; do
      train sft $env $rule $seed sft-$SFT_LR --lr $SFT_LR
      train rl $env $rule $seed rl-$RL_LR --lr $RL_LR
      tabulate $env $rule $seed main-$env-$rule init sft-$SFT_LR rl-$RL_LR
    done
  done
}

dose() {  # SFT to three times the compute, eight monitors
  local env=$1 seed
  for seed in $seeds; do train sft $env id $seed dose --lr $SFT_LR --tokens $DOSE --monitors 8; done
}

rescue() {  # RL from SFT at 1/4, 1 and 3 budgets; 0 is main's rl
  local seed
  for seed in $seeds; do
    train sft gp id $seed quarter --lr $SFT_LR --tokens 2e5 --monitors 1
    for start in quarter sft-$SFT_LR dose; do
      train rl gp id $seed from-$start --lr $RL_LR --monitors 1 --init out/study/s$seed/gp/id/$start
    done
    tabulate gp id $seed rescue-gp init quarter sft-$SFT_LR dose rl-$RL_LR from-quarter from-sft-$SFT_LR from-dose
  done
}

verify() {  # one compute, 1 to 10 attempts while training; tables within 5
  local seed n
  for seed in $seeds; do
    for n in 1 3 10; do train rl gp id $seed verify$n --verify $n --monitors 1; done
    tabulate gp id $seed verify-gp init verify1 verify3 rl-$RL_LR verify10
  done
}

rates() {  # every cell of the grid, rule id
  local env=$1 seed
  for seed in $seeds; do
    for lr in $SFT_RATES; do train sft $env id $seed sft-$lr --lr $lr; done
    for lr in $RL_RATES; do train rl $env id $seed rl-$lr --lr $lr; done
    tabulate $env id $seed $env-id init $(printf "sft-%s " $SFT_RATES) $(printf "rl-%s " $RL_RATES)
  done
}

writers() {  # the chosen rate, demonstrations in the base's own habit
  local env=$1 seed rule
  for seed in $seeds; do
    for rule in $WRITERS_RULES; do
      train sft $env $rule $seed habit --demos habit --lr $SFT_LR
      if [ $rule = id ]; then
        tabulate $env id $seed $env-id-habit init habit
      else  # mirror's table again, with one row more
        tabulate $env ood $seed $env-ood init sft-$SFT_LR rl-$RL_LR habit
      fi
    done
  done
}

mirror() {  # rule ood at the rates that rule id chose
  local env=$1 seed
  for seed in $seeds; do
    train sft $env ood $seed sft-$SFT_LR --lr $SFT_LR
    train rl $env ood $seed rl-$RL_LR --lr $RL_LR
    tabulate $env ood $seed $env-ood init sft-$SFT_LR rl-$RL_LR
  done
}

ppo() {  # PPO's settings, one change at a time, seed 0
  train rl gp id 0 ppo-epochs4-clip.1 --epochs 4 --clip 0.1
  train rl gp id 0 ppo-lam1 --lam 1
  train rl gp id 0 ppo-gamma.9 --gamma 0.9
  train rl gp id 0 ppo-minibatch8 --minibatches 8
  tabulate gp id 0 gp-ppo init rl-$RL_LR ppo-epochs4-clip.1 ppo-lam1 ppo-gamma.9 ppo-minibatch8
}

class() {  # what assignments/ lets a class try: no KL, one attempt, RL without the short SFT
  local seed
  for seed in $seeds; do
    train rl gp id $seed nokl --beta 0
    train rl gp id $seed verify1 --verify 1
    train rl gp id $seed raw --init out/study/s$seed/gp/base
    tabulate gp id $seed gp-class init rl-$RL_LR nokl verify1 raw
  done
}

pictures() {  # one run of each method, rule id, look id, seed 0
  local env=$1 folder=out/study/s0/$1-vl/id-id
  $python -u rl.py --env $env --vl --visual id --out out/study/s0 --episodes $2
  $python -u sft.py --env $env --vl --visual id --out out/study/s0 --episodes $2
  cp $folder/sft/eval.json $raw/$env-vl-s0.json
  for run in sft rl; do cp $folder/$run/metrics.jsonl $raw/$env-vl-s0-$run.jsonl; done
}

gp() { SFT_RATES="1e-4 2e-4 4e-4 8e-4" RL_RATES="5e-5 1e-4 2e-4" SFT_LR=${SFT_LR:-2e-4} RL_LR=${RL_LR:-1e-4} DOSE=2.4e6; }
virl() { SFT_RATES="3e-4 1e-3 2e-3 3e-3" RL_RATES="5e-5 1e-4 2e-4" SFT_LR=${SFT_LR:-2e-3} RL_LR=${RL_LR:-2e-4} DOSE=1.8e6; }

case $name in
  main-gp) echo "GeneralPoints, SFT against RL, both rules: about 11 minutes a seed"; gp; main gp ;;
  main-virl) echo "V-IRL, SFT against RL, both rules: about 9 minutes a seed"; virl; main virl ;;
  dose-gp) echo "GeneralPoints, three budgets of SFT: about 5 minutes a seed, after main-gp"; gp; dose gp ;;
  dose-virl) echo "V-IRL, three budgets of SFT: about 5 minutes a seed, after main-virl"; virl; dose virl ;;
  rescue) echo "RL from SFT checkpoints: about 8 minutes a seed, after main-gp and dose-gp"; gp; rescue ;;
  verify) echo "Attempts: about 6 minutes a seed, after main-gp"; gp; verify ;;
  rates-gp) echo "GeneralPoints, rule id: about 11 minutes a seed on 2 cores"; gp; rates gp ;;
  rates-virl) echo "V-IRL, rule id: about 8 minutes a seed"; virl; rates virl ;;
  mirror-gp) echo "GeneralPoints, rule ood: about 3 minutes a seed, after rates-gp"; gp; mirror gp ;;
  mirror-virl) echo "V-IRL, rule ood: about 4 minutes a seed, after rates-virl"; virl; mirror virl ;;
  writers-gp) echo "GeneralPoints, demonstrations by habit: about 2 minutes a seed, after mirror-gp"; gp; writers gp ;;
  writers-virl) echo "V-IRL, demonstrations by habit: about 2 minutes a seed, after mirror-virl"; virl; writers virl ;;
  ppo) echo "PPO's settings: about 8 minutes, after rates-gp"; gp; ppo ;;
  class) echo "The class's experiments on GeneralPoints: about 7 minutes a seed, after rates-gp"; gp; class ;;
  pictures-gp) echo "GeneralPoints from pictures: about 11 minutes"; pictures gp 300 ;;
  pictures-virl) echo "V-IRL from pictures: about 15 minutes"; pictures virl 80 ;;
  *) echo "usage: bash results/make.sh main-gp | main-virl | dose-gp | dose-virl | rescue | verify | rates-gp | rates-virl | mirror-gp | mirror-virl |" \
       "writers-gp | writers-virl | ppo | class | pictures-gp | pictures-virl" >&2; exit 2 ;;
esac
