#!/usr/bin/env bash
# Guess: a GGUF file holds the whole model, and from_pretrained(folder, gguf_file=...) gives what other readers run.
# What happens: the scaling of Llama 3.1's and 3.2's rotary embedding is lost. GGUF keeps it as a tensor of factors,
#   rope_freqs.weight, which llama.cpp reads and transformers does not. The weights are equal bit for bit, the config
#   says "default", and no warning comes. The error grows with the position: such a model is right in a short test, and
#   wrong by nats further on. YaRN has keys in the file, rope.scaling.*, and they are read for gpt-oss alone.
# Versions: transformers 5.24.0, gguf 0.19.0, torch 2.13.0; a random Llama in a file as llama.cpp's converter makes it.
# Why it matters here: a GGUF file is the usual small copy of a released model. Training from it fits the weights to
#   other positions, and its log-probabilities are not those of a sampler that reads the same file. Give config= with
#   the rope_parameters of the original config.json, and compare one long prompt with another reader.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 gguf==0.19.0 \
  accelerate==1.15.0
"$folder/venv/bin/python" - "$folder" 2> >(grep -v "de-quantizing\|Loading weights" >&2) <<'PYTHON'
import os, sys
import gguf, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
torch.manual_seed(0)
ids, places, seen = torch.randint(64, (1, 4000)), [1, 100, 1000, 3999], []
llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0, "original_max_position_embeddings": 8192}

def write(model, kind):
    file = gguf.GGUFWriter(os.path.join(sys.argv[1], "model.gguf"), "llama")
    for key, value in (("context_length", 131072), ("embedding_length", 64), ("block_count", 2), ("vocab_size", 64),
                       ("feed_forward_length", 64), ("attention.head_count", 2), ("rope.dimension_count", 32)):
        file.add_uint32("llama." + key, value)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_freq_base(5e5)
    if kind == "llama3":
        usual = 5e5 ** (-torch.arange(0, 32, 2) / 32)
        file.add_tensor("rope_freqs.weight", (usual / model.model.rotary_emb.inv_freq).numpy())
    for name, x in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # the two rows of each angle stand side by side
            x = x.view(2, 2, 16, 64).transpose(1, 2).reshape(64, 64)
        file.add_tensor(names.get_name(name, try_suffixes=(".weight",)), x.contiguous().numpy())
    for finish in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file, file.close):
        finish()

print("transformers", transformers.__version__, "torch", torch.__version__, "- errors of log-probabilities at", places)
for kind, rope in (("default", {}), ("llama3", llama3)):
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=131072, initializer_range=0.2,
                         rope_parameters={"rope_type": kind, "rope_theta": 5e5, **rope})
    model = LlamaForCausalLM(config).eval()
    write(model, kind)
    for given in ({}, {"config": config}):
        loaded = LlamaForCausalLM.from_pretrained(sys.argv[1], gguf_file="model.gguf", dtype=torch.float32, **given)
        equal = all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
        a, b = (m.eval()(ids).logits.log_softmax(-1)[0, places] for m in (model, loaded))
        errors = [round(e, 4) for e in (a - b).abs().amax(-1).tolist()]
        seen.append((equal, max(errors) < 0.001, errors[-1] > 1))
        print(kind, *given, "- equal weights:", equal, "read as", loaded.config.rope_parameters["rope_type"], errors)
still = seen == [(True, True, False)] * 2 + [(True, False, True), (True, True, False)]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
