#!/usr/bin/env bash
# results/make.sh NAME: make the raw files of a section of results/README.md again, from nothing, below out/study.
# It goes on where it was stopped, and a finished run is not trained again. Do not edit it while it runs.
#   SEEDS="0 1 2" PYTHON=python3 bash results/make.sh main-gp
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-} seeds=${SEEDS:-} rules=${RULES:-id ood} python=${PYTHON:-python} study=out/study raw=results/raw
mkdir -p $raw

# Of metrics.jsonl the header, the success rates and every fourth step; of PPO at the chosen rates every iteration. Six
# decimals, no indent.
thin() { awk -v all=$3 'NR == 1 || /"seen"/ || all && /"reward"/ || NR % 4 == 0' $1 | six > $2; }
six() { sed -E 's/([.][0-9]{6})[0-9]+/\1/g; s/^ +//'; }

# A base or an init that was stopped goes on, before a run that needs it. Its folder, its stage, the task's flags.
go_on() {
  local folder=$1 stage=$2; shift 2
  if [ -d $folder ] && ! grep -qs '"done": true' $folder/checkpoint-*/state.json; then
    $python -u sft.py --stage $stage "$@" --resume
  fi
}

# One run: script, task, rule, seed, name, more flags. Its table is made later, together with the other runs' rows.
# Only at the chosen rates is success evaluated more than once on the way, for the curves. VARIANT: see variants.py.
train() {
  local script=$1 env=$2 rule=$3 seed=$4 run=$5 command=$1.py evaluations=1 prefix=; shift 5
  local home=$study/s$seed/$env task="--env $env --seed $seed --out $study/s$seed"
  local folder=$home/$rule/$run
  [ -z "${VARIANT:-}" ] || command="results/variants.py $VARIANT $script"
  if [ $run = sft-$SFT_LR ] || [ $run = rl-$RL_LR ]; then evaluations=4; fi
  if ! [ -f $folder/eval.json ]; then  # else it is finished
    go_on $home/base base $task
    go_on $home/$rule/init init $task --rule $rule
    $python -u $command $task --rule $rule --name $run --episodes 2 --evaluations $evaluations "$@" \
      $([ -d $folder ] && echo --resume)
  fi
  [ $study = out/study ] || prefix=${study#out/}-
  thin $folder/metrics.jsonl $raw/$prefix$env-$rule-s$seed-$run.jsonl $((evaluations == 4))
}

# One table: its section's name, task, rule, seed, the runs in it. 300 hands or 200 routes a cell.
tabulate() {
  local section=$1 env=$2 rule=$3 seed=$4 episodes=300; shift 4
  local home=$study/s$seed/$env
  [ $env = virl ] && episodes=200
  $python -u eval.py --env $env --rule $rule --seed $seed --out $study/s$seed --episodes $episodes \
    --models $(printf "$home/$rule/%s " "$@")
  six < $home/$rule/eval.json > $raw/$section-$env-$rule-s$seed.json
}

main() {  # the chosen rates, both rules
  local seed rule
  for seed in ${seeds:-0 1 2 3 4}; do
    for rule in $rules; do
      train sft $env $rule $seed sft-$SFT_LR --lr $SFT_LR
      train rl $env $rule $seed rl-$RL_LR --lr $RL_LR
      tabulate main $env $rule $seed init sft-$SFT_LR rl-$RL_LR
    done
  done
}

rates() {  # every cell of the grid, rule id
  local seed lr
  for seed in ${seeds:-0 1 2}; do
    for lr in $SFT_RATES; do train sft $env id $seed sft-$lr --lr $lr; done
    for lr in $RL_RATES; do train rl $env id $seed rl-$lr --lr $lr; done
    tabulate rates $env id $seed init $(printf "sft-%s " $SFT_RATES) $(printf "rl-%s " $RL_RATES)
  done
}

writers() {  # who writes the demonstrations, at two rates; V-IRL: from how many routes. Under rule ood only habit
  local seed lr runs n
  for seed in ${seeds:-0 1 2}; do
    train sft $env ood $seed sft-$SFT_LR --lr $SFT_LR
    train sft $env ood $seed habit-$SFT_LR --demos habit --lr $SFT_LR
    tabulate habit $env ood $seed init sft-$SFT_LR habit-$SFT_LR
    runs=init
    for lr in $SFT_LR $SECOND_LR; do
      train sft $env id $seed sft-$lr --lr $lr
      train sft $env id $seed habit-$lr --demos habit --lr $lr
      VARIANT=own train sft $env id $seed own-$lr --lr $lr
      VARIANT=own10 train sft $env id $seed own10-$lr --lr $lr
      runs="$runs sft-$lr habit-$lr own-$lr own10-$lr"
    done
    for n in $ROUTES; do
      VARIANT=routes=$n train sft $env id $seed routes$n --lr $SFT_LR
      runs="$runs routes$n"
    done
    tabulate writers $env id $seed $runs
  done
}

prompts() {  # demonstrations under more than one face-card rule
  local seed n
  for seed in ${seeds:-0 1 2}; do
    for n in 2 8 32; do VARIANT=rules=$n train sft gp id $seed rules$n --lr $SFT_LR; done
    tabulate prompts gp id $seed init sft-$SFT_LR rules2 rules8 rules32
  done
}

dose() {  # SFT to three times the compute, eight evaluations
  local seed
  for seed in ${seeds:-0 1 2}; do
    train sft $env id $seed sft-$SFT_LR --lr $SFT_LR
    train sft $env id $seed dose --lr $SFT_LR --tokens $DOSE --evaluations 8
    tabulate dose $env id $seed init sft-$SFT_LR dose
  done
}

rescue() {  # RL from SFT at 1/4, 1 and 3 budgets; 0 is main's rl
  local seed start
  for seed in ${seeds:-0 1 2}; do
    train sft gp id $seed quarter --lr $SFT_LR --tokens 2e5
    for start in quarter sft-$SFT_LR dose; do
      train rl gp id $seed from-$start --lr $RL_LR --init $study/s$seed/gp/id/$start
    done
    tabulate rescue gp id $seed init quarter sft-$SFT_LR dose rl-$RL_LR from-quarter from-sft-$SFT_LR from-dose
  done
}

scratch() {  # RL without the short SFT
  local seed
  for seed in ${seeds:-0 1 2}; do
    train rl gp id $seed raw --lr $RL_LR --init $study/s$seed/gp/base
    tabulate scratch gp id $seed ../base init rl-$RL_LR raw
  done
}

noform() {  # RL from a base that never saw the task's form: directly, after the short SFT, after a budget of SFT
  local seed study=out/noform
  for seed in ${seeds:-0 1 2}; do
    VARIANT=noform train rl gp id $seed rl --lr $RL_LR
    VARIANT=noform train rl gp id $seed raw --lr $RL_LR --init $study/s$seed/gp/base
    train sft gp id $seed sft --lr $INIT_LR
    train rl gp id $seed from-sft --lr $RL_LR --init $study/s$seed/gp/id/sft
    tabulate noform gp id $seed ../base init sft from-sft rl raw
  done
}

verify() {  # one compute, 1 to 10 attempts while training; tables within 5
  local seed n
  for seed in ${seeds:-0 1 2}; do
    for n in 1 3 10; do train rl gp id $seed verify$n --lr $RL_LR --verify $n; done
    tabulate verify gp id $seed init verify1 verify3 rl-$RL_LR verify10
  done
}

losses() {  # another loss, another baseline
  local seed
  for seed in ${seeds:-0 1 2}; do
    VARIANT=dft train sft $env id $seed dft --lr $SFT_LR
    VARIANT=kl=1 train sft $env id $seed sft-kl1 --lr $SFT_LR
    train rl $env id $seed nokl --lr $RL_LR --beta 0
    train rl $env id $seed gamma.9 --lr $RL_LR --gamma 0.9
    VARIANT=group train rl $env id $seed group --lr $RL_LR --coef_value 0
    tabulate losses $env id $seed init sft-$SFT_LR dft sft-kl1 rl-$RL_LR nokl gamma.9 group
  done
}

distance() {  # no training: KL from the init of all runs that are there
  local seed home models
  for seed in ${seeds:-0 1 2}; do
    home=$study/s$seed/$env/id
    models=$(ls -d $home/*/checkpoint-* | xargs -n1 dirname | uniq | grep -v '/init$')
    $python -u results/distance.py measure --env $env --seed $seed --out $study/s$seed --models $home/init $models
    six < $home/distance.json > $raw/distance-$env-id-s$seed.json
  done
}

ppo() {  # PPO's settings, one change at a time
  local seed
  for seed in ${seeds:-0}; do
    train rl gp id $seed ppo-epochs4-clip.1 --epochs 4 --clip 0.1
    train rl gp id $seed ppo-lam1 --lam 1
    train rl gp id $seed ppo-minibatch8 --minibatches 8
    tabulate ppo gp id $seed init rl-$RL_LR ppo-epochs4-clip.1 ppo-lam1 ppo-minibatch8
  done
}

pictures() {  # one run of each method, rule id, visual variation id (VISUAL=ood: the other one)
  local seed visual=${VISUAL:-id} run folder task
  for seed in ${seeds:-0 1 2}; do
    folder=$study/s$seed/$env-vl/id-$visual task="--env $env --vl --visual $visual --seed $seed --out $study/s$seed"
    for run in rl sft; do
      if [ -f $folder/$run/eval.json ]; then continue; fi
      go_on $folder/../base$([ $visual = ood ] && echo -ood) base $task
      go_on $folder/init init $task
      $python -u $run.py $task --episodes $([ $run = sft ] && echo $EPISODES || echo 2) \
        $([ -d $folder/$run ] && echo --resume)
    done
    six < $folder/sft/eval.json > $raw/pictures-$env-vl-$visual-s$seed.json
    for run in sft rl; do thin $folder/$run/metrics.jsonl $raw/$env-vl-$visual-s$seed-$run.jsonl 0; done
  done
}

env=gp SFT_RATES="1e-4 2e-4 4e-4 8e-4" RL_RATES="5e-5 1e-4 2e-4" SFT_LR=2e-4 RL_LR=1e-4 SECOND_LR=4e-4 DOSE=1.8e6
INIT_LR=3e-4 ROUTES= EPISODES=300
case $name in *-virl)
  env=virl SFT_RATES="3e-4 1e-3 2e-3 3e-3" SFT_LR=2e-3 RL_LR=1e-4 SECOND_LR=1e-3 DOSE=1.8e6
  ROUTES="16 256" EPISODES=80 ;;
esac

case $name in  # minutes on 2 cores; a base of 3 minutes a seed comes on top, once. Most want the runs of rates or main
  main-gp | main-virl) echo "SFT against RL, both rules: 5 minutes a seed" ;;
  rates-gp | rates-virl) echo "the grid of rates: 8 minutes a seed, in V-IRL 10, with the base" ;;
  writers-gp | writers-virl) echo "who writes: 7 minutes a seed, in V-IRL 12" ;;
  prompts-gp) echo "several face-card rules: 3 minutes a seed" ;;
  dose-gp | dose-virl) echo "three budgets of SFT: 3 minutes a seed" ;;
  rescue-gp) echo "RL from SFT, after dose-gp: 4 minutes a seed" ;;
  scratch-gp) echo "RL without SFT: 2 minutes a seed" ;;
  noform-gp) echo "RL from a base without the form: 8 minutes a seed with that base" ;;
  verify-gp) echo "1, 3, 10 attempts: 3 minutes a seed" ;;
  losses-gp | losses-virl) echo "other losses: 5 minutes a seed, in V-IRL 7" ;;
  distance-gp | distance-virl) echo "KL from the init, after all others: a quarter of a minute a seed, in V-IRL 2" ;;
  ppo-gp) echo "PPO's settings: 3 minutes a seed" ;;
  pictures-gp | pictures-virl) echo "from pictures: 11 to 15 minutes a seed" ;;
  *) echo "usage: bash results/make.sh main-gp | main-virl | rates-gp | rates-virl | writers-gp | writers-virl |" \
       "prompts-gp | dose-gp | dose-virl | rescue-gp | scratch-gp | noform-gp | verify-gp | losses-gp | losses-virl |" \
       "distance-gp | distance-virl | ppo-gp | pictures-gp | pictures-virl" >&2; exit 2 ;;
esac
${name%-*}
