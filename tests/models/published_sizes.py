"""The sizes that publishers gave their models: what config.json says, and how many parameters they count."""

from __future__ import annotations

from typing import Any


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, length: int, **more: Any):
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        **more,
    }


def _qwen3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int = 8, **more: Any):
    return _llama(hidden, inner, layers, heads, kv_heads, 151936, 40960, head_dim=128, **more)


def _gpt2(hidden: int, layers: int, heads: int):
    return {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 1024, "vocab_size": 50257}


def _pythia(hidden: int, layers: int, heads: int, vocab: int = 50304):
    return _llama(hidden, 4 * hidden, layers, heads, heads, vocab, 2048, rotary_pct=0.25)


def _falcon(hidden: int, layers: int, heads: int, **more: Any):
    return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


def _granite_h(hidden: int, shared: int, layers: int, attention: list[int], heads: int, mamba_heads: int, d_head: int):
    return {
        "hidden_size": hidden,
        "intermediate_size": shared,
        "shared_intermediate_size": shared,
        "num_hidden_layers": layers,
        "layer_types": ["attention" if i in attention else "mamba" for i in range(layers)],
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "mamba_n_heads": mamba_heads,
        "mamba_d_head": d_head,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "nope",
        "tie_word_embeddings": True,
        "vocab_size": 100352,
        "max_position_embeddings": 32768,
    }


TIED = {"tie_word_embeddings": True}
_QWEN2_LARGE = {"vocab": 152064, "length": 131072}
_NEMO = {"head_dim": 128, "sliding_window": None}
_GEMMA3 = {"head_dim": 256, "sliding_window": 512, "query_pre_attn_scalar": 256}

# name: (architecture, config.json, parameters; a tied head counts once, and some publishers round)
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen/Qwen3-0.6B": ("Qwen3ForCausalLM", _qwen3(1024, 3072, 28, 16, **TIED), 596_049_920),
    "Qwen/Qwen3-1.7B": ("Qwen3ForCausalLM", _qwen3(2048, 6144, 28, 16, **TIED), 1_720_574_976),
    "Qwen/Qwen3-4B": ("Qwen3ForCausalLM", _qwen3(2560, 9728, 36, 32, **TIED), 4_022_468_096),
    "Qwen/Qwen3-8B": ("Qwen3ForCausalLM", _qwen3(4096, 12288, 36, 32), 8_190_735_360),
    "Qwen/Qwen3-14B": ("Qwen3ForCausalLM", _qwen3(5120, 17408, 40, 40), 14_768_307_200),
    "Qwen/Qwen3-32B": ("Qwen3ForCausalLM", _qwen3(5120, 25600, 64, 64), 32_762_123_264),
    "Qwen/Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM",
        _qwen3(
            2048,
            6144,
            48,
            32,
            4,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
        ),
        30_532_122_624,
    ),
    "Qwen/Qwen2.5-0.5B": ("Qwen2ForCausalLM", _llama(896, 4864, 24, 14, 2, 151936, 32768, **TIED), 494_032_768),
    "Qwen/Qwen2.5-1.5B": ("Qwen2ForCausalLM", _llama(1536, 8960, 28, 12, 2, 151936, 131072, **TIED), 1_543_714_304),
    "Qwen/Qwen2.5-3B": ("Qwen2ForCausalLM", _llama(2048, 11008, 36, 16, 2, 151936, 32768, **TIED), 3_085_938_688),
    "Qwen/Qwen2.5-7B": ("Qwen2ForCausalLM", _llama(3584, 18944, 28, 28, 4, **_QWEN2_LARGE), 7_615_616_512),
    "Qwen/Qwen2.5-14B": ("Qwen2ForCausalLM", _llama(5120, 13824, 48, 40, 8, **_QWEN2_LARGE), 14_770_033_664),
    "Qwen/Qwen2.5-32B": ("Qwen2ForCausalLM", _llama(5120, 27648, 64, 40, 8, **_QWEN2_LARGE), 32_763_876_352),
    "Qwen/Qwen2.5-72B": ("Qwen2ForCausalLM", _llama(8192, 29568, 80, 64, 8, **_QWEN2_LARGE), 72_706_203_648),
    "meta-llama/Llama-2-7b": ("LlamaForCausalLM", _llama(4096, 11008, 32, 32, 32, 32000, 4096), 6_738_415_616),
    "meta-llama/Llama-2-13b": ("LlamaForCausalLM", _llama(5120, 13824, 40, 40, 40, 32000, 4096), 13_015_864_320),
    "meta-llama/Llama-2-70b": ("LlamaForCausalLM", _llama(8192, 28672, 80, 64, 8, 32000, 4096), 68_976_648_192),
    "meta-llama/Llama-3.1-8B": ("LlamaForCausalLM", _llama(4096, 14336, 32, 32, 8, 128256, 131072), 8_030_261_248),
    "meta-llama/Llama-3.1-70B": ("LlamaForCausalLM", _llama(8192, 28672, 80, 64, 8, 128256, 131072), 70_553_706_496),
    "meta-llama/Llama-3.2-1B": (
        "LlamaForCausalLM",
        _llama(2048, 8192, 16, 32, 8, 128256, 131072, **TIED),
        1_235_814_400,
    ),
    "meta-llama/Llama-3.2-3B": (
        "LlamaForCausalLM",
        _llama(3072, 8192, 28, 24, 8, 128256, 131072, **TIED),
        3_212_749_824,
    ),
    "TinyLlama/TinyLlama-1.1B": ("LlamaForCausalLM", _llama(2048, 5632, 22, 32, 4, 32000, 2048), 1_100_048_384),
    "codellama/CodeLlama-7b": ("LlamaForCausalLM", _llama(4096, 11008, 32, 32, 32, 32016, 16384), 6_738_546_688),
    "HuggingFaceTB/SmolLM2-135M": ("LlamaForCausalLM", _llama(576, 1536, 30, 9, 3, 49152, 8192, **TIED), 134_515_008),
    "HuggingFaceTB/SmolLM2-360M": ("LlamaForCausalLM", _llama(960, 2560, 32, 15, 5, 49152, 8192, **TIED), 361_821_120),
    "HuggingFaceTB/SmolLM2-1.7B": (
        "LlamaForCausalLM",
        _llama(2048, 8192, 24, 32, 32, 49152, 8192, **TIED),
        1_711_376_384,
    ),
    "mistralai/Mistral-7B-v0.1": (
        "MistralForCausalLM",
        _llama(4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=4096),
        7_241_732_096,
    ),
    "mistralai/Mistral-Nemo-2407": (
        "MistralForCausalLM",
        _llama(5120, 14336, 40, 32, 8, 131072, 131072, **_NEMO),
        12_247_782_400,
    ),
    "mistralai/Mistral-Large-2407": (
        "MistralForCausalLM",
        _llama(12288, 28672, 88, 96, 8, 32768, 131072, **_NEMO),
        122_610_069_504,
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        "MixtralForCausalLM",
        _llama(4096, 14336, 32, 32, 8, 32000, 32768, num_local_experts=8, num_experts_per_tok=2),
        46_702_792_704,
    ),
    "openai-community/gpt2": ("GPT2LMHeadModel", _gpt2(768, 12, 12), 124_439_808),
    "openai-community/gpt2-medium": ("GPT2LMHeadModel", _gpt2(1024, 24, 16), 354_823_168),
    "openai-community/gpt2-large": ("GPT2LMHeadModel", _gpt2(1280, 36, 20), 774_030_080),
    "openai-community/gpt2-xl": ("GPT2LMHeadModel", _gpt2(1600, 48, 25), 1_557_611_200),
    "EleutherAI/pythia-70m": ("GPTNeoXForCausalLM", _pythia(512, 6, 8), 70_426_624),
    "EleutherAI/pythia-160m": ("GPTNeoXForCausalLM", _pythia(768, 12, 12), 162_322_944),
    "EleutherAI/pythia-410m": ("GPTNeoXForCausalLM", _pythia(1024, 24, 16), 405_334_016),
    "EleutherAI/pythia-1b": ("GPTNeoXForCausalLM", _pythia(2048, 16, 8), 1_011_781_632),
    "EleutherAI/pythia-2.8b": ("GPTNeoXForCausalLM", _pythia(2560, 32, 32), 2_775_208_960),
    "EleutherAI/pythia-6.9b": ("GPTNeoXForCausalLM", _pythia(4096, 32, 32, 50432), 6_857_302_016),
    "EleutherAI/pythia-12b": ("GPTNeoXForCausalLM", _pythia(5120, 36, 40, 50688), 11_846_072_320),
    "EleutherAI/gpt-neox-20b": ("GPTNeoXForCausalLM", _pythia(6144, 44, 64, 50432), 20_554_567_680),
    "mosaicml/mpt-7b": (
        "MptForCausalLM",
        {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432, "max_seq_len": 2048},
        6_649_286_656,
    ),
    "mosaicml/mpt-30b": (
        "MptForCausalLM",
        {"d_model": 7168, "n_heads": 64, "n_layers": 48, "vocab_size": 50432, "max_seq_len": 8192},
        29_957_000_000,
    ),
    "tiiuae/falcon-rw-1b": (
        "FalconForCausalLM",
        _falcon(2048, 24, 32, alibi=True, multi_query=False, parallel_attn=False, bias=True, vocab_size=50304),
        1_311_625_216,
    ),
    "tiiuae/falcon-7b": ("FalconForCausalLM", _falcon(4544, 32, 71, vocab_size=65024), 6_921_720_704),
    "tiiuae/falcon-11B": (
        "FalconForCausalLM",
        _falcon(
            4096,
            60,
            32,
            num_kv_heads=8,
            new_decoder_architecture=True,
            num_ln_in_parallel_attn=1,
            ffn_hidden_size=16384,
            vocab_size=65024,
            tie_word_embeddings=False,
        ),
        11_103_000_000,
    ),
    "tiiuae/falcon-40b": (
        "FalconForCausalLM",
        _falcon(8192, 60, 128, num_kv_heads=8, new_decoder_architecture=True, vocab_size=65024),
        41_303_293_952,
    ),
    "tiiuae/falcon-180B": (
        "FalconForCausalLM",
        _falcon(14848, 80, 232, num_kv_heads=8, new_decoder_architecture=True, vocab_size=65024),
        178_557_000_000,
    ),
    "ibm-granite/granite-3.3-2b": (
        "GraniteForCausalLM",
        _llama(2048, 8192, 40, 32, 8, 49159, 131072, **TIED),
        2_533_539_840,
    ),
    "ibm-granite/granite-3.3-8b": (
        "GraniteForCausalLM",
        _llama(4096, 12800, 40, 32, 8, 49159, 131072, **TIED),
        8_170_864_640,
    ),
    "ibm-granite/granite-4.0-h-350m": (
        "GraniteMoeHybridForCausalLM",
        _granite_h(768, 2048, 32, [10, 13, 17, 27], 12, 48, 32),
        340_000_000,
    ),
    "ibm-granite/granite-4.0-h-1b": (
        "GraniteMoeHybridForCausalLM",
        _granite_h(1536, 4096, 40, [5, 15, 25, 35], 12, 48, 64),
        1_460_000_000,
    ),
    "google/gemma-3-270m": ("Gemma3ForCausalLM", _llama(640, 2048, 18, 4, 1, 262144, 32768, **_GEMMA3), 268_098_176),
    "google/gemma-3-1b": ("Gemma3ForCausalLM", _llama(1152, 6912, 26, 4, 1, 262144, 32768, **_GEMMA3), 999_885_952),
}
