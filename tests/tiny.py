"""Tiny models for the tests: two random layers, a tokenizer trained on the spot, real file layouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qe_edge.student.join import Join
from qe_edge.student.prompt import prompt_for
from qe_edge.student.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qe_edge.backends.protocol import Backend

TEXT = """\
Search engines answer short queries with long documents, and the words of the two often differ. A query
that asks what causes the tides never says moon or gravity, yet the passages that answer it do. Query
expansion adds the missing words: a language model writes a short passage, and its words are searched for
together with those of the query. Large models write good passages but run on large machines; a small
model that has learned from a large one runs on a laptop or a phone. How does bread rise? Yeast turns sugar
into gas, which the dough holds. What is a gene? A stretch of DNA that holds the recipe of a protein. Iron
deficiency makes adults tired and pale; doctors measure ferritin. In 2023 the tax rate was 19.5 percent.
You expand search queries. Answer the question in one sentence, then list related keywords. Question: Answer:
搜索引擎用长文档回答短查询，而两者的用词常常不同。询问潮汐成因的查询不会提到月球或引力，但能回答它的段落会提到。
查询扩展补上缺少的词：语言模型先写一小段话，再用这段话里的词和查询一起搜索。大模型写得好，却要在大机器上运行；
从大模型学来的小模型可以在笔记本电脑或手机上运行。糖尿病患者可以吃什么水果？苹果和梨可以少量食用。
北京到上海的高铁大约需要五个小时。你负责扩展搜索查询。用一句话回答问题，然后列出相关的关键词。问题：回答：
"""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""
THINKING_OFF = """\
{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\n\n</think>\n\n' }}
{%- endif -%}
"""
MARKUP = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMOLLM_MARKUP = [*MARKUP, "<repo_name>", "<file_sep>", "<empty_output>"]


def tiny_tokenizer(family: Literal["qwen3", "qwen2", "llama"] = "qwen3") -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 1000 tokens, built like Qwen3's, Qwen2.5's or SmolLM2's."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    if family != "llama":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SMOLLM_MARKUP if family == "llama" else [],
    )
    backend.train_from_iterator([TEXT], trainer)
    if family != "llama":
        backend.add_special_tokens(MARKUP)
    if family == "qwen3":
        backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML + THINKING_OFF if family == "qwen3" else CHATML,
    )


def save_tiny_qwen3(folder: Path, seed: int = 0, tied: bool = True, **changed: Any) -> Path:
    """A model folder as `qe-edge merge` writes it, of the Qwen3 architecture."""
    from transformers import Qwen3Config

    tokenizer = tiny_tokenizer("qwen3")
    config = Qwen3Config(
        **_shape(tokenizer) | changed,
        head_dim=128,  # not hidden_size / heads, as in the real ones
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    return _save(folder, config, tokenizer, seed)


def save_tiny_qwen2(folder: Path, seed: int = 0, tied: bool = True) -> Path:
    """A model folder as `qe-edge merge` writes it, of the Qwen2 architecture, which Qwen2.5 has too."""
    from transformers import Qwen2Config

    tokenizer = tiny_tokenizer("qwen2")
    config = Qwen2Config(
        **_shape(tokenizer),
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    return _save(folder, config, tokenizer, seed)


def save_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A model folder as `qe-edge merge` writes it, of the Llama architecture, with a head of its own."""
    from transformers import LlamaConfig

    tokenizer = tiny_tokenizer("llama")
    config = LlamaConfig(
        **_shape(tokenizer),
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    return _save(folder, config, tokenizer, seed)


def _shape(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + 7,  # real ones are padded too
        "hidden_size": 256,  # K-quants need multiples of 256
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.05,  # the usual 0.02 leaves so small a model with flat logits
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(folder: Path, config: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    from qe_edge.train.base_model import save_student

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # zeros, or one that got lost would not be missed
            torch.nn.init.normal_(parameter)
    prompt = prompt_for(tokenizer.chat_template)
    save_student(model, tokenizer, ModelSpec(prompt=prompt, join=Join(), base_model="tiny"), folder)
    return folder


def first_tokens(backend: Backend, prompt: list[int], count: int) -> list[int]:
    """What the engine writes greedily, past its end tokens."""
    batch = backend.batch(1)
    number = batch.add(prompt, prefix=0, answer=count)
    tokens = [batch.step()[number] for _ in range(count)]
    batch.remove(number)
    return tokens
