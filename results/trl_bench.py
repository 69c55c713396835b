"""results/trl_bench.py: one measurement of results/trl.sh, which says what is compared; without arguments their table.

    python results/trl_bench.py ours-rl 0    # then ours-sft 0, trl-rl 32, trl-sft 32: TRL's micro-batch in completions
    python results/trl_bench.py default-rl 32   # TRL with gradient checkpointing, its default; then default-sft 32
"""
import json
import os
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from statistics import mean, median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import rl
import sft
from env_gp import GeneralPoints
from eval import checkpoint_at, load

HOME, BATCH, RATE = os.environ["HOME_TRL"], 128, 1e-6  # a rate at which the model goes on speaking as the init
STEPS = int(os.environ["STEPS"]) + 1                   # the first one is left out
INIT = checkpoint_at(os.path.join(HOME, "runs/gp/id/init"))


def demonstrations():
    """Those of sft.py in all steps -> [(row, messages, answer), ...]."""
    env, (model, tok) = GeneralPoints(rule="id", split="train"), load(INIT)
    states = [state for step in range(STEPS) for i in range(BATCH)
              for state in sft.demonstrations(env, f"sft/0/{step}/0/{i}")]
    return [(sft.demonstration_row(tok, model, *state), state[0], state[2]) for state in states]


def ours(kind, _, folder):
    """-> (seconds of each step but the first, tokens of each answer, or their mean)."""
    flags = (f"--env gp --rule id --init {INIT} --out {folder} --lr {RATE} --batch {BATCH} --steps {STEPS} "
             "--tokens 1e9 --episodes 0").split()
    if kind == "rl":
        rl.main(flags + "--verify 1 --epochs 1 --minibatches 1 --beta 0.02".split())
        log = [r for r in sft.read_log(f"{folder}/gp/id/rl/metrics.jsonl") if "updates" in r]
        assert {r["updates"] for r in log} == {1}
        return [BATCH / r["episodes_per_s"] for r in log[1:]], [r["tokens_per_answer"] for r in log]
    sft.main(flags)
    log = [r for r in sft.read_log(f"{folder}/gp/id/sft/metrics.jsonl") if "loss" in r]
    return ([(r["tokens"] - before["tokens"]) / r["tokens_per_s"] for before, r in zip(log, log[1:])],
            [sum(row.action_mask) for row, *_ in demonstrations()])


def trl(kind, size, folder, checkpointing=False):
    """The same of TRL. A step begins where the one before it ended, so that the loading of data counts too.
    checkpointing: run each block again in the backward pass, as TRL does by default."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    ends, lengths, env = [], [], GeneralPoints(rule="id", split="train", verify=1)
    clock = type("Clock", (TrainerCallback,), {"on_step_end": lambda *_, **__: ends.append(time.perf_counter())})()
    shared = dict(output_dir=folder, max_steps=STEPS, learning_rate=RATE, per_device_train_batch_size=size,
                  gradient_accumulation_steps=BATCH // size, use_cpu=True, bf16=False,
                  gradient_checkpointing=checkpointing,
                  save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)

    def reward(completions, completion_ids, seed, **_):
        lengths.extend(map(len, completion_ids))
        rewards = []
        for name, (answer,) in zip(seed, completions):
            env.reset(name)
            rewards.append(env.step(answer["content"]).reward)
        return rewards

    if kind == "rl":
        rows = [{"prompt": env.reset(f"trl/{i}")[0], "seed": f"trl/{i}"} for i in range(STEPS * BATCH // 8)]
        trainer = GRPOTrainer(INIT, reward, train_dataset=Dataset.from_list(rows), callbacks=[clock], args=GRPOConfig(
            **shared, beta=0.02, num_iterations=1, num_generations=8, temperature=1.0,
            max_completion_length=sft.EVERY["max_new_tokens"][0]))
    else:
        shown = demonstrations()
        rows = [{"prompt": messages, "completion": [{"role": "assistant", "content": answer}]}
                for _, messages, answer in shown]
        trainer = SFTTrainer(INIT, train_dataset=Dataset.from_list(rows), callbacks=[clock], args=SFTConfig(
            **shared, completion_only_loss=True, packing=False, train_sampling_strategy="sequential"))
        for (row, *_), theirs in zip(shown, trainer.train_dataset, strict=True):  # the same tokens, and the same loss
            assert theirs["input_ids"] == row.ids
            assert [label != -100 for label in theirs["labels"]] == list(map(bool, row.action_mask))
            lengths.append(sum(row.action_mask))
    trainer.train()
    assert len(ends) == STEPS and len(lengths) == STEPS * BATCH
    return [end - start for start, end in zip(ends, ends[1:])], lengths


def table(rounds):
    """rounds: {(kind, threads, maker, size): [(seconds, tokens), ...]}. Of TRL's sizes the fastest has a row, once
    without and once with gradient checkpointing."""
    print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "datasets", "accelerate")), sep=", ")
    print(f"{'':30} | threads | s a step | rounds         | tokens a completion | TRL / ours")
    seconds = {key: median(s for s, _ in found) for key, found in rounds.items()}
    for kind, threads in sorted({key[:2] for key in rounds}):
        mine = kind, threads, "ours", 0
        for maker, name in (("ours", f"{kind}.py"), ("trl", {"rl": "GRPOTrainer", "sft": "SFTTrainer"}[kind]),
                            ("default", "   its default: checkpointing")):
            here = sorted((key for key in rounds if key[:3] == (kind, threads, maker)), key=seconds.get)
            for key in here[:1]:
                each, tokens = " ".join(f"{s:.3f}" for s, _ in rounds[key]), mean(n for _, n in rounds[key])
                print(f"{name:30} | {threads:7} | {seconds[key]:8.3f} | {each:14} | {tokens:19.1f} | "
                      f"{seconds[key] / seconds[mine]:.2f}" + f"   micro-batch {key[3]}" * (maker != "ours"))
            if here[1:]:
                print("   all micro-batches:", ", ".join(f"{key[3]}: {seconds[key]:.3f}" for key in sorted(here)))


if __name__ == "__main__":
    file, rounds = os.path.join(HOME, "log.jsonl"), {}
    if sys.argv[1:]:
        (maker, kind), size = sys.argv[1].split("-"), int(sys.argv[2])
        with tempfile.TemporaryDirectory() as folder:
            run = {"ours": ours, "trl": trl, "default": partial(trl, checkpointing=True)}[maker]
            seconds, tokens = run(kind, size, folder)
        record = [kind, sft.torch.get_num_threads(), maker, size], median(seconds), mean(tokens)
        with open(file, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
    else:
        for key, *found in map(json.loads, open(file, encoding="utf-8")):
            rounds.setdefault(tuple(key), []).append(found)
        table(rounds)
