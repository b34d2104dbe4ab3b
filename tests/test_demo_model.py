"""The model that ships with the package: small, complete, lossless; and for transformers the same model as for us."""

from __future__ import annotations

import json
from math import prod

import pytest

from cupyinfer import LLM, SamplingParams
from cupyinfer.demo import demo_model_path
from cupyinfer.model.tensor_files import read_header

FOLDER = demo_model_path()
GREEDY = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
PROMPTS = [
    "def quicksort(",
    "class Stack:\n    ",
    "import os\n",
    "x",
    "  ",
    " \n\t",
    "\r\n",
    "a  b   c    d\n",
    "# gr\u00fc\u00dfe \U0001f600 \u65e5\u672c\n",
    "A\u0300E\u0301 \ufb01 \u200b\ufeff",
    "print('a' + \"b\")\n",
    "for i in range(10):\n        ",
    "1234567890123 1_000 0x1f 1e-5",
    "lambda x: x**2",
    "'''doc'''",
    "if __name__ == '__main__':\n",
    "    def __init__(self, *args, **kwargs):\n        ",
    "try:\n    import ssl\nexcept ImportError:\n",
    "x" * 300,
    "def f(self, *args, **kwargs):\n    return super().f(*args, **kwargs)\n" * 10,
]


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", dtype="float32") as made:
        yield made


def settings(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_it_is_a_bfloat16_llama_of_about_six_million_parameters_in_at_most_16_mb():
    tensors = read_header(FOLDER / "model.safetensors").values()
    assert settings("config.json")["architectures"] == ["LlamaForCausalLM"]
    assert {tensor.dtype_name for tensor in tensors} == {"BF16"}
    parameters = sum(prod(tensor.shape) for tensor in tensors)
    assert 5_500_000 < parameters < 6_500_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 16_000_000


def test_its_tokenizer_has_about_four_thousand_entries_and_loses_nothing(llm):
    assert 3900 < llm.tokenizer.vocab_size < 4300
    assert llm.tokenizer.vocab_size == settings("config.json")["vocab_size"]
    for text in PROMPTS:
        assert llm.tokenizer.decode(llm.tokenizer.encode(text)) == text


def test_its_record_names_data_licence_and_a_held_out_perplexity():
    record = settings("training.json")
    page = (FOLDER.parent / "README.md").read_text(encoding="utf-8") if FOLDER.name == "model" else ""
    perplexity = record["held_out"]["all"]["perplexity"]
    assert 2 < perplexity < 12
    assert not page or (f"{perplexity:.2f}" in page and "PSF-2.0" in page and "loss_curve.svg" in page)


def test_it_writes_code(llm):
    """Not what the code means, but its form: each prompt leads to what must follow it."""
    for prompt, follows in (
        ("import os\nimport", " sys"),
        ("for i in range(", ")"),
        ("if __name__ == '__main__':\n    unittest", ".main()"),
        ("    def __init__(self", "self."),
        ("try:\n    import ssl\nexcept", " ImportError"),
    ):
        text = llm.generate(prompt, GREEDY)[0].outputs[0].text
        assert follows in text, (prompt, text)


@pytest.mark.hf
def test_transformers_makes_the_same_tokens_of_it(llm):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER).float().eval()
    outputs = llm.generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert tokenizer(prompt).input_ids == output.prompt_token_ids
        ids = torch.tensor([output.prompt_token_ids])
        settings = {"do_sample": False, "max_new_tokens": 48, "eos_token_id": None, "pad_token_id": 1}
        settings["repetition_penalty"] = 1.0  # generation_config.json has another, which greedy decoding heeds too
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
        assert theirs == output.outputs[0].token_ids, prompt
        assert tokenizer.decode(theirs, skip_special_tokens=True) == output.outputs[0].text
