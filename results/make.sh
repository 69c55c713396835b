#!/usr/bin/env bash
# results/make.sh NAME: make a section of results/README.md again, from nothing: its runs below out/study, its raw files
# in results/raw, its tables in results/tables/NAME.txt. It goes on where it was stopped, and a finished run is not
# trained again. Do not edit it while it runs.
#   SEEDS="0 1" PYTHON=python3 bash results/make.sh main-gp
#   bash results/make.sh tables     # all of results/tables from the raw files, without training
set -euo pipefail
cd "$(dirname "$0")/.."
rules=${RULES:-id ood} python=${PYTHON:-python} study=out/study raw=results/raw
mkdir -p $raw results/tables

# Of metrics.jsonl the header, the success rates and every fourth step; of PPO at the chosen rates every iteration. Six
# decimals, no indent.
thin() { awk -v all=$3 'NR == 1 || /"seen"/ || all && /"reward"/ || NR % 4 == 0' $1 | six > $2; }
six() { sed -E 's/([.][0-9]{6})[0-9]+/\1/g; s/^ +//'; }

# Where the runs of a task, rule and seed are ($home, $base), and their flags ($task, $trained). With pictures (gp-vl,
# virl-vl) the rule is id, and the second word is the visual variation that is trained.
place() {
  local env=$1 rule=$2 seed=$3
  task="--env ${env%-vl} --seed $seed --out $study/s$seed" trained="--rule $rule"
  home=$study/s$seed/$env/$rule base=$study/s$seed/$env/base
  case $env in *-vl)
    task="$task --vl --visual $rule" trained="--rule id" home=$study/s$seed/$env/id-$rule
    if [ $rule = ood ]; then base=$base-ood; fi ;;
  esac
}

# A base or an init that was stopped goes on, before a run that needs it. Its folder, its stage, the task's flags.
go_on() {
  local folder=$1 stage=$2; shift 2
  if [ -d $folder ] && ! grep -qs '"done": true' $folder/checkpoint-*/state.json; then
    $python -u sft.py --stage $stage "$@" --resume
  fi
}

# One run: script, task, rule, seed, name, more flags. Its table is made later, together with the other runs' rows.
# In GeneralPoints at the chosen rates success is evaluated four times on the way, for the curves, else once. VARIANT: see variants.py.
train() {
  local script=$1 env=$2 rule=$3 seed=$4 run=$5 command=$1.py evaluations=1 prefix= task trained home base; shift 5
  place $env $rule $seed
  [ -z "${VARIANT:-}" ] || command="results/variants.py $VARIANT $script"
  case $env-$run in gp-sft-$SFT_LR | gp-rl-$RL_LR) evaluations=4 ;; esac
  if ! [ -f $home/$run/eval.json ]; then  # else it is finished
    go_on $base base $task
    go_on $home/init init $task $trained
    $python -u $command $task $trained --name $run --episodes 2 --evaluations $evaluations "$@" \
      $([ -d $home/$run ] && echo --resume)
  fi
  [ $study = out/study ] || prefix=${study#out/}-
  thin $home/$run/metrics.jsonl $raw/$prefix$env-$rule-s$seed-$run.jsonl $((evaluations == 4))
}

# One table: its section's name, task, rule, seed, the runs in it (none given: base, init, rl, sft). ATTEMPTS: how many
# attempts an episode has, if not the usual number.
tabulate() {
  local section=$1 env=$2 rule=$3 seed=$4 episodes=300 task trained home base; shift 4
  place $env $rule $seed
  case $env in virl) episodes=200 ;; virl-vl) episodes=80 ;; esac
  $python -u eval.py $task $trained --episodes $episodes ${ATTEMPTS:+--verify $ATTEMPTS} \
    $([ $# = 0 ] || echo --models $(printf "$home/%s " "$@"))
  six < $home/eval.json > $raw/$section-$env-$rule-s$seed.json
}

main() {  # the chosen rates, both rules
  local seed rule
  for seed in $seeds; do
    for rule in $rules; do
      train sft $env $rule $seed sft-$SFT_LR --lr $SFT_LR
      train rl $env $rule $seed rl-$RL_LR --lr $RL_LR
      tabulate main $env $rule $seed init sft-$SFT_LR rl-$RL_LR
    done
  done
}

rates() {  # every cell of the grid, rule id
  local seed lr
  for seed in $seeds; do
    for lr in $SFT_RATES; do train sft $env id $seed sft-$lr --lr $lr; done
    for lr in $RL_RATES; do train rl $env id $seed rl-$lr --lr $lr; done
    tabulate rates $env id $seed init $(printf "sft-%s " $SFT_RATES) $(printf "rl-%s " $RL_RATES)
  done
}

writers() {  # who writes the demonstrations, at two rates; V-IRL: from how many routes. Under rule ood only habit
  local seed lr runs n
  for seed in $seeds; do
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
  for seed in $seeds; do
    for n in 2 8 32; do VARIANT=rules=$n train sft gp id $seed rules$n --lr $SFT_LR; done
    tabulate prompts gp id $seed init sft-$SFT_LR rules2 rules8 rules32
  done
}

dose() {  # SFT to three times the compute, eight evaluations
  local seed
  for seed in $seeds; do
    train sft $env id $seed sft-$SFT_LR --lr $SFT_LR
    train sft $env id $seed dose --lr $SFT_LR --tokens $DOSE --evaluations 8
    tabulate dose $env id $seed init sft-$SFT_LR dose
  done
}

rescue() {  # RL from SFT at 1/4, 1 and 3 budgets; 0 is main's rl
  local seed start
  for seed in $seeds; do
    train sft gp id $seed quarter --lr $SFT_LR --tokens 2e5
    for start in quarter sft-$SFT_LR dose; do
      train rl gp id $seed from-$start --lr $RL_LR --init $study/s$seed/gp/id/$start
    done
    tabulate rescue gp id $seed init quarter sft-$SFT_LR dose rl-$RL_LR from-quarter from-sft-$SFT_LR from-dose
  done
}

scratch() {  # RL without the short SFT
  local seed
  for seed in $seeds; do
    train rl gp id $seed raw --lr $RL_LR --init $study/s$seed/gp/base
    tabulate scratch gp id $seed ../base init rl-$RL_LR raw
  done
}

noform() {  # RL from a base that never saw the task's form: directly, after the short SFT, after a budget of SFT; and
            # after 1/3, 1 and 3 budgets of SFT from the base on all hands but the test hands, in the base's style
  local seed dose study=out/noform starts="all-2e5 all-6e5 all-1.8e6"
  for seed in $seeds; do
    VARIANT=noform train rl gp id $seed rl --lr $RL_LR
    VARIANT=noform train rl gp id $seed raw --lr $RL_LR --init $study/s$seed/gp/base
    train sft gp id $seed sft --lr $INIT_LR
    train rl gp id $seed from-sft --lr $RL_LR --init $study/s$seed/gp/id/sft
    for dose in 2e5 6e5 1.8e6; do
      VARIANT=hands=2000 train sft gp id $seed all-$dose --demos habit --lr $INIT_LR --tokens $dose \
        --init $study/s$seed/gp/base
      train rl gp id $seed from-all-$dose --lr $RL_LR --init $study/s$seed/gp/id/all-$dose
    done
    tabulate noform gp id $seed ../base init sft from-sft rl raw $starts $(printf "from-%s " $starts)
  done
}

room() {  # V-IRL: RL whose critic hardly moves the policy; with frozen embeddings; from an init with broken answers
  local seed task trained home base
  for seed in $seeds; do
    train sft virl id $seed sft-$SFT_LR --lr $SFT_LR
    train rl virl id $seed rl-$RL_LR --lr $RL_LR
    train rl virl id $seed critic --lr $RL_LR --coef_value 1e-3
    VARIANT=frozen train rl virl id $seed frozen --lr $RL_LR
    VARIANT=frozen train sft virl id $seed sft-frozen --lr $SFT_LR
    place virl id $seed
    go_on $home/damaged init $task $trained --name damaged
    [ -d $home/damaged ] || $python -u sft.py --stage init $task $trained --name damaged --lr 3e-4 --episodes 0
    train rl virl id $seed from-damaged --lr $RL_LR --init $home/damaged
    tabulate room virl id $seed init sft-$SFT_LR sft-frozen rl-$RL_LR critic frozen damaged from-damaged
  done
}

verify() {  # 1 to 10 attempts while training, at one compute and at one number of hands; tables within 1, 3, 5, 10
  local seed n
  for seed in $seeds; do
    for n in 1 3 10; do train rl gp id $seed verify$n --lr $RL_LR --verify $n; done
    train rl gp id $seed rl-$RL_LR --lr $RL_LR  # the usual 5 attempts
    # 16 iterations of 128 hands. The budget is never reached, so the rate does not decay.
    for n in 1 3 5 10; do train rl gp id $seed hands$n --lr $RL_LR --verify $n --steps 16 --tokens 1e9; done
    for n in 1 3 5 10; do
      ATTEMPTS=$n tabulate verify$([ $n = 5 ] || echo $n) gp id $seed \
        init verify1 verify3 rl-$RL_LR verify10 hands1 hands3 hands5 hands10
    done
  done
}

losses() {  # another loss, another baseline
  local seed
  for seed in $seeds; do
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
  for seed in $seeds; do
    home=$study/s$seed/$env/id
    models=$(ls -d $home/*/checkpoint-* | xargs -n1 dirname | uniq | grep -v '/init$')
    $python -u results/distance.py measure --env $env --seed $seed --out $study/s$seed --models $home/init $models
    six < $home/distance.json > $raw/distance-$env-id-s$seed.json
  done
}

ppo() {  # PPO's settings, one change at a time
  local seed
  for seed in $seeds; do
    train rl gp id $seed ppo-epochs4-clip.1 --epochs 4 --clip 0.1
    train rl gp id $seed ppo-lam1 --lam 1
    train rl gp id $seed ppo-minibatch8 --minibatches 8
    tabulate ppo gp id $seed init rl-$RL_LR ppo-epochs4-clip.1 ppo-lam1 ppo-minibatch8
  done
}

pictures() {  # one run of each method, rule id, visual variation id (VISUAL=ood: the other one)
  local seed run visual=${VISUAL:-id}
  for seed in $seeds; do
    for run in rl sft; do train $run $env-vl $visual $seed $run --evaluations 2; done
    tabulate pictures $env-vl $visual $seed
  done
}

mute() {  # from pictures: SFT without loss on the answer's field "cards"
  local seed
  for seed in $seeds; do
    train sft gp-vl id $seed sft --evaluations 2
    VARIANT=mute train sft gp-vl id $seed mute --evaluations 2
    tabulate mute gp-vl id $seed init sft mute
  done
}

# Each time a section is started, results/raw/made.txt gets a line: what its raw files come from.
made() {
  local changes=$(git status --porcelain -- . ':!results/raw' ':!results/tables')
  echo "$name, seeds $seeds, $(date -u +%Y-%m-%dT%H:%MZ), commit $(git rev-parse --short HEAD)" \
    "$([ -z "$changes" ] && echo clean || echo changed)," \
    "$(lscpu | sed -n 's/^Model name: *//p')," \
    "avx512 $(grep -qs avx512f /proc/cpuinfo && echo yes || echo no)," \
    "torch $($python -c 'import torch; print(torch.__version__)')" >> $raw/made.txt
}

# A command line of figures.py or distance.py, and what it prints; nothing where raw files are missing.
show() {
  local word
  for word in "$@"; do
    case $word in $raw/*) compgen -G "$word" > /dev/null || return 0 ;; esac
  done
  echo "python results/$*"
  $python results/$* 2>&1 || true  # unquoted: patterns become file names
  echo
}

# All tables of a section -> results/tables/NAME.txt.
tables() {
  local section=${1%-*} part rule stems parts=within with_tables name patterns=()
  settings $1
  case $section in
    main) stems="main-$env-id main-$env-ood" ;;
    writers) stems="writers-$env-id habit-$env-ood" ;;
    verify) stems="verify1-gp-id verify3-gp-id verify-gp-id verify10-gp-id" ;;
    pictures) stems="pictures-$env-vl-id pictures-$env-vl-ood" ;;
    mute) stems=mute-gp-vl-id ;;
    distance)
      stems=distance-$env-id with_tables="main rates writers losses dose"
      case $env in gp) with_tables+=" verify rescue prompts" ;; virl) with_tables+=" room" ;; esac ;;
    *) stems=$section-$env-id ;;
  esac
  case $1 in
    pictures-gp | mute-gp) parts="within read solved" ;;  # an episode is one hand, so "episode" is "within"
    pictures-virl) parts="paper turns episode read solved" ;;
    *-virl) parts="paper turns" ;;
  esac
  {
    if [ $section = distance ]; then
      for name in distance $with_tables; do patterns+=("$raw/$name-$env-id-s?.json"); done
      show distance.py fit "${patterns[@]}"
    else
      for stem in $stems; do
        for part in $parts; do show figures.py table "$raw/$stem-s?.json" --part $part; done
      done
    fi
    case $section in
      main)
        for rule in id ood; do
          [ $env = virl ] ||
            show figures.py matched "$raw/$env-$rule-s?-sft-$SFT_LR.jsonl" "$raw/$env-$rule-s?-rl-$RL_LR.jsonl"
          show figures.py ppo "$raw/$env-$rule-s?-rl-$RL_LR.jsonl"
        done ;;
      dose) for part in $parts; do show figures.py course "$raw/$env-id-s?-dose.jsonl" --part $part; done ;;
      rates) show figures.py choose "$raw/rates-$env-id-s?.json" ;;
    esac
    if grep -q "^$1 " results/claims.txt; then show figures.py claims $1; fi
  } > results/tables/$1.txt
}

# The settings of a section's task.
settings() {
  env=gp SFT_RATES="1e-4 2e-4 4e-4" RL_RATES="5e-5 1e-4" SFT_LR=2e-4 RL_LR=5e-5 SECOND_LR=4e-4 DOSE=2.1e6
  INIT_LR=3e-4 ROUTES=
  case $1 in *-virl)
    env=virl SFT_RATES="5e-4 1e-3 2e-3" RL_RATES="5e-5 1e-4" SFT_LR=2e-3 RL_LR=5e-5 SECOND_LR=1e-3 DOSE=1.8e6
    ROUTES="16 256" ;;
  esac
  seeds=${SEEDS:-0 1 2 3 4}
}

names="main-gp main-virl rates-gp rates-virl writers-gp writers-virl prompts-gp dose-gp dose-virl rescue-gp scratch-gp
noform-gp room-virl verify-gp losses-gp losses-virl distance-gp distance-virl ppo-gp pictures-gp pictures-virl mute-gp"
name=${1:-}

case $name in  # minutes of one core with AVX-512. Most want the runs of rates or main
  main-gp | main-virl) echo "SFT against RL, both rules: 8 minutes a seed, in V-IRL 10, with the base" ;;
  rates-gp | rates-virl) echo "the grid of rates, after main: 4 minutes a seed, in V-IRL 5" ;;
  writers-gp | writers-virl) echo "who writes, after main: 10 minutes a seed, in V-IRL 17" ;;
  prompts-gp) echo "several face-card rules: 5 minutes a seed" ;;
  dose-gp | dose-virl) echo "three budgets of SFT: 3 minutes a seed, in V-IRL 6" ;;
  rescue-gp) echo "RL from SFT, after dose-gp: 7 minutes a seed" ;;
  scratch-gp) echo "RL without SFT, after main: 2 minutes a seed" ;;
  noform-gp) echo "RL from a base without the form: 19 minutes a seed, with its base" ;;
  room-virl) echo "why RL does not gain the held-out rule, after main-virl: 9 minutes a seed" ;;
  verify-gp) echo "1, 3, 5, 10 attempts, after main: 16 minutes a seed, seven of them four tables" ;;
  losses-gp | losses-virl) echo "other losses: 9 minutes a seed, in V-IRL 11" ;;
  distance-gp | distance-virl) echo "KL from the init, after all others: half a minute a seed, in V-IRL 4" ;;
  ppo-gp) echo "PPO's settings: 7 minutes a seed" ;;
  pictures-gp | pictures-virl) echo "from pictures: 10 minutes a seed" ;;
  mute-gp) echo "SFT from pictures without loss on the cards, after pictures-gp: 2 minutes a seed" ;;
  tables)
    for name in $names; do tables $name; done
    show figures.py claims > results/tables/claims.txt
    exit ;;
  *) echo "usage: bash results/make.sh tables |" $(echo $names | sed 's/ / | /g') >&2; exit 2 ;;
esac
settings $name
made
${name%-*}
tables $name
