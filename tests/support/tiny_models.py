"""Tiny models of every kind, saved as a user would have them: safetensors, config, tokenizer."""

TEXT = "the norm of a query and the norm of a key bound the score of the pair that they make in a row of the map . "
KINDS = ("bert", "gpt2", "opt", "llama")

USUAL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
WIDE = USUAL | {"intermediate_size": 40}
GROUPED = WIDE | {"num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
# kind: (config and model class of transformers, shape)
MODELS = {
    "bert": ("BertConfig", "BertModel", WIDE),
    "bert-masked": ("BertConfig", "BertForMaskedLM", WIDE),
    "bert-classes": ("BertConfig", "BertForSequenceClassification", WIDE),
    "roberta": (
        "RobertaConfig",
        "RobertaForMaskedLM",
        WIDE | {"max_position_embeddings": 66, "pad_token_id": 1},
    ),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 40, "max_position_embeddings": 64},
    ),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", WIDE | {"embedding_size": 16}),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", WIDE | {"embedding_size": 16}),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", WIDE),
    "deberta": ("DebertaV2Config", "DebertaV2ForMaskedLM", WIDE),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        WIDE | {"num_hidden_layers": 3, "local_attention": 16},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt-bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT),
    "gpt-bigcode-heads": (
        "GPTBigCodeConfig",
        "GPTBigCodeForCausalLM",
        GPT | {"multi_query": False},
    ),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", GPT | {"rotary_dim": 4}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", WIDE | {"rotary_pct": 0.5}),
    "opt": ("OPTConfig", "OPTForCausalLM", USUAL | {"ffn_dim": 40, "word_embed_proj_dim": 32}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED | {"head_dim": 12}),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED | {"head_dim": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GROUPED | {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        GROUPED | {"head_dim": 8, "attn_logit_softcapping": 0.5},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        GROUPED | {"head_dim": 8, "sliding_window": 8, "num_hidden_layers": 6},
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        GROUPED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", WIDE | {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", GROUPED),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED),
    "cohere": ("CohereConfig", "CohereForCausalLM", GROUPED),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        GROUPED | {"attention_multiplier": 0.4, "logits_scaling": 4.0},
    ),
    "glm": ("GlmConfig", "GlmForCausalLM", GROUPED | {"head_dim": 8}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", GROUPED),
    "falcon": ("FalconConfig", "FalconForCausalLM", USUAL),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_head": 4, "n_layer": 2}),
    "mpt": ("MptConfig", "MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "bart": (
        "BartConfig",
        "BartForCausalLM",
        {
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 40,
            "max_position_embeddings": 64,
            "is_decoder": True,
            "is_encoder_decoder": False,
        },
    ),
    "vit": ("ViTConfig", "ViTModel", WIDE),
    "dinov2": ("Dinov2Config", "Dinov2Model", WIDE),
    "clip": ("CLIPConfig", "CLIPModel", {}),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model", WIDE),
}


def tiny(kind, folder, *, seed=0, **options):
    """Writes a random model of two layers and four heads, at most 64 tokens, and its tokenizer;
    returns the folder.
    """
    import torch
    import transformers as hf

    vocabulary = save_tokenizer(folder)
    small = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config, cls, shape = MODELS[kind]
    small = {} if kind == "clip" else small
    torch.manual_seed(seed)
    model = getattr(hf, cls)(getattr(hf, config)(**(small | shape | options))).eval()
    # larger than at birth: scores, positions and biases that a mistake would show in
    with torch.no_grad():
        for name, weight in model.named_parameters():
            plain = "norm" not in name.lower() and "ln" not in name
            weight.copy_(torch.randn_like(weight) * (0.3 if plain else 1.0))
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def save_tokenizer(folder):
    """A word-level tokenizer of TEXT; returns the size of its vocabulary."""
    import tokenizers
    import transformers as hf

    words = {word: n for n, word in enumerate(["[UNK]", "[MASK]", *sorted(set(TEXT.split()))])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(folder)
    return len(words)
