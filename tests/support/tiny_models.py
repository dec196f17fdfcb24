"""Tiny models of every kind, saved as a user would have them: safetensors, config, tokenizer."""

TEXT = "the norm of a query and the norm of a key bound the score of the pair that they make in a row of the map . "
KINDS = ("bert", "gpt2", "opt", "llama")


def tiny(kind, folder, **options):
    """Writes a random model of two layers and four heads, at most 64 tokens, and its tokenizer;
    returns the folder.
    """
    import torch
    import transformers as hf

    vocabulary = save_tokenizer(folder)
    small = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    usual = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    config, cls = {
        "bert": (hf.BertConfig, hf.BertModel),
        "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel),
        "opt": (hf.OPTConfig, hf.OPTForCausalLM),
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
        "bloom": (hf.BloomConfig, hf.BloomForCausalLM),
        "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM),
    }[kind]
    shape = {
        "bert": usual | {"intermediate_size": 40},
        "gpt2": {
            "n_embd": 32,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 64,
            "scale_attn_by_inverse_layer_idx": True,
        },
        "opt": usual | {"ffn_dim": 40, "word_embed_proj_dim": 32},
        "llama": usual | {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 12},
        "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
        "gemma2": usual
        | {"intermediate_size": 40, "num_key_value_heads": 2, "attn_logit_softcapping": 0.5},
    }[kind]
    torch.manual_seed(0)
    model = cls(config(**(small | shape | options))).eval()
    with (
        torch.no_grad()
    ):  # larger than at birth: scores, positions and biases that a mistake would show in
        for name, weight in model.named_parameters():
            weight.copy_(
                torch.randn_like(weight)
                * (0.3 if "norm" not in name.lower() and "ln" not in name else 1.0)
            )
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def save_tokenizer(folder):
    """A word-level tokenizer of TEXT; returns the size of its vocabulary."""
    import tokenizers
    import transformers as hf

    words = {word: n for n, word in enumerate(["[UNK]", *sorted(set(TEXT.split()))])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)
    return len(words)
