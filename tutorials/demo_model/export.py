"""From a trained model to Hugging Face files: write them, check them with transformers, complete a few prompts."""

import json
import shutil
from dataclasses import asdict

import torch
import transformers
from llama import BEGIN, END, Llama
from safetensors.torch import load_file, save_file

PROMPTS = [
    "def quicksort(",
    "class Stack:",
    "import os\n\n\ndef read_file(path):",
    "def is_empty(self):\n",
    "for i in range(",
    "if __name__ ==",
]


def export(model, config, data, out):
    """Write the Hugging Face files; what evaluation and samples use afterwards is what was written."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.to(torch.bfloat16).cpu() for name, value in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    model.load_state_dict(load_file(out / "model.safetensors"))
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    fixed |= {"bos_token_id": BEGIN, "eos_token_id": END, "hidden_act": "silu", "tie_word_embeddings": True}
    fixed |= {"attention_bias": False, "mlp_bias": False, "use_cache": True}
    sampling = {"bos_token_id": BEGIN, "eos_token_id": END, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    sampling["repetition_penalty"] = 1.1  # a model this small likes to loop
    for name, content in (("config.json", fixed | asdict(config)), ("generation_config.json", sampling)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / name, out / name)


@torch.no_grad()
def check_transformers(model, tokenizer, out):
    """Assert that transformers reads the exported files as this script does: same ids, same float32 logits."""
    text = 'def area(width, height):\n    """Return width * height ."""\n\n    return width  *  height\n'
    ids = transformers.AutoTokenizer.from_pretrained(out)(text)["input_ids"]
    assert ids == tokenizer.encode(text).ids, "transformers' tokenizer gives other ids"
    theirs = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    ours = Llama(model.config).set_rope("cpu").eval()
    ours.load_state_dict(load_file(out / "model.safetensors"))
    ids = torch.tensor([ids])
    worst = (ours(ids) - theirs(ids).logits).abs().max().item()
    assert worst < 1e-4, f"transformers' logits differ by {worst}"
    print(f"transformers {transformers.__version__} agrees: largest logit difference {worst:.1e}", flush=True)


@torch.no_grad()
def complete(model, tokenizer, prompt, temperature, device, length=96):
    """The model's continuation of `prompt`, without a cache: clear, and fast enough for a few samples."""
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    prompt_length = ids.shape[1]
    generator = torch.Generator(device).manual_seed(0)
    while ids.shape[1] < prompt_length + length:
        logits = model(ids)[0, -1].float()
        if temperature == 0:
            token = logits.argmax().view(1)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        if token.item() == END:
            break
        ids = torch.cat([ids, token[None]], dim=1)
    return tokenizer.decode(ids[0, prompt_length:].tolist())


def sample(model, tokenizer, device):
    """Complete each prompt greedily and at temperature 0.7; print and return the texts."""
    samples = []
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            text = complete(model, tokenizer, prompt, temperature, device)
            samples.append({"prompt": prompt, "temperature": temperature, "completion": text})
            print(f"--- temperature {temperature}\n{prompt}{text}", flush=True)
    return samples
