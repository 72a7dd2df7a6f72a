"""The family table. Each entry was read off transformers and is tested against it (tests/test_families.py)."""

from __future__ import annotations

from dyndepth.runtime.family import Family, register

LLAMA = register(Family(model_types=("llama",)))

MISTRAL = register(Family(model_types=("mistral",), window_everywhere=True))

QWEN2 = register(Family(model_types=("qwen2",)))

QWEN3 = register(Family(model_types=("qwen3",), q_norm="q_norm", k_norm="k_norm"))

GEMMA2 = register(
    Family(
        model_types=("gemma2",),
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        one_plus_gain=True,
        attention_softcap="attn_logit_softcapping",
        logit_softcap="final_logit_softcapping",
        refuses=(("use_bidirectional_attention", "bidirectional attention"),),
    )
)

GEMMA3 = register(
    Family(
        model_types=("gemma3_text",),
        rotary_by_layer_type=True,
        q_norm="q_norm",
        k_norm="k_norm",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        one_plus_gain=True,
        logit_softcap="final_logit_softcapping",
        refuses=(("use_bidirectional_attention", "bidirectional attention"),),
    )
)

PHI3 = register(
    Family(
        model_types=("phi3",),
        qkv=("qkv_proj",),
        window_everywhere=True,
        gated=("gate_up_proj", "down_proj"),
        activation="activation_fn",
    )
)

OLMO2 = register(
    Family(
        model_types=("olmo2",),
        q_norm="q_norm",
        k_norm="k_norm",
        qk_norm_over="projection",
        before_attention="",
        after_attention="post_attention_layernorm",
        before_mlp="",
        after_mlp="post_feedforward_layernorm",
    )
)

GPT2 = register(
    Family(
        model_types=("gpt2",),
        decoder="transformer",
        embed="wte",
        layers="h",
        final_norm="ln_f",
        rotary="",
        positions="wpe",
        attention="attn",
        qkv=("c_attn",),
        out="c_proj",
        before_attention="ln_1",
        before_mlp="ln_2",
        gated=(),
        refuses=(("add_cross_attention", "cross-attention"),),
    )
)

OPT = register(
    Family(
        model_types=("opt",),
        decoder="model.decoder",
        final_norm="final_layer_norm",
        rotary="",
        positions="embed_positions",
        project_in="project_in",
        project_out="project_out",
        out="out_proj",
        before_attention="self_attn_layer_norm",
        before_mlp="final_layer_norm",
        pre_norm_flag="do_layer_norm_before",
        mlp=("fc1", "activation_fn", "fc2"),
        gated=(),
    )
)

GPT_NEOX = register(
    Family(
        model_types=("gpt_neox",),
        decoder="gpt_neox",
        embed="embed_in",
        final_norm="final_layer_norm",
        attention="attention",
        qkv=("query_key_value",),
        fused="heads",
        out="dense",
        head_dim="head_size",
        parallel_flag="use_parallel_residual",
        gated=(),
    )
)
