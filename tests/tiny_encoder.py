"""A tiny encoder of the BERT architecture as a GGUF, and as transformers computes it."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, LAYERS, HEADS, INNER, CONTEXT = 64, 2, 4, 128, 512
MARKUP = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["moon", "tide", "tides", "bread", "yeast", "sea", "the", "what", "causes", "rises"]
LETTERS = string.ascii_lowercase + string.digits + ".,'"
VOCABULARY = [*MARKUP, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]


def tiny_bert(seed: int = 0) -> Any:
    """transformers' model with random weights."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def save_tiny_encoder(path: Path, *, seed: int = 0, pooling: int | None = 1) -> Path:
    """The GGUF; pooling 1 is the mean of the tokens, 2 the first one, None is not said."""
    import gguf

    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if pooling is not None:
        writer.add_pooling_type(gguf.PoolingType(pooling))
    writer.add_tokenizer_model("bert")
    # llama.cpp marks a word's beginning, where BERT marks what is none.
    tokens = [
        token if token in MARKUP else token[2:] if token.startswith("##") else f"\u2581{token}"
        for token in VOCABULARY
    ]
    writer.add_token_list(tokens)
    kind = gguf.TokenType
    writer.add_token_types([int(kind.CONTROL if token in MARKUP else kind.NORMAL) for token in VOCABULARY])
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)  # llama.cpp takes it for [CLS]
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, LAYERS)
    for name, tensor in tiny_bert(seed).state_dict().items():
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert short, name
        writer.add_tensor(short, np.ascontiguousarray(tensor.numpy(), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_tiny_ranker(folder: Path, *, cross: bool, seed: int = 0) -> Path:
    """The same weights as a folder of sentence-transformers; or below random ones, as a cross-encoder."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    bert = tiny_bert(seed)
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=CONTEXT).save_pretrained(folder)
    if cross:
        torch.manual_seed(seed)
        config = BertConfig.from_dict(bert.config.to_dict() | {"num_labels": 1})
        model = BertForSequenceClassification(config)
        model.bert.load_state_dict(bert.state_dict(), strict=False)
        model.save_pretrained(folder)
        return folder
    bert.save_pretrained(folder)
    words = Transformer(str(folder))
    SentenceTransformer(modules=[words, Pooling(HIDDEN, "mean")], device="cpu").save(str(folder))
    return folder


def vectors(texts: list[str], *, seed: int = 0, tokens: int = 256) -> np.ndarray:
    """[texts, HIDDEN] of length 1 by transformers: the mean of the tokens' vectors, one text at a time."""
    import torch
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer({token: i for i, token in enumerate(VOCABULARY)}, lowercase=True)
    model, found = tiny_bert(seed), []
    for text in texts:
        ids = tokenizer.encode(text).ids
        ids = [*ids[: 1 + tokens], ids[-1]] if len(ids) > 2 + tokens else ids
        with torch.inference_mode():
            hidden = model(torch.tensor([ids])).last_hidden_state[0].numpy().mean(0)
        found.append(hidden / np.linalg.norm(hidden))
    return np.stack(found)
