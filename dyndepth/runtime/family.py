"""What the runtime must know of a model family, as data: names of submodules and the few ways families differ."""

from __future__ import annotations

from dataclasses import dataclass

from dyndepth.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """One row of the family table (dyndepth/runtime/families.py). Paths are attribute paths, empty where a part is absent.

    The runtime calls the model's own submodules for embeddings, norms, projections and MLPs, so LoRA, biases and quantised
    linears keep working; it owns attention, the cache and the movement of rows.
    """

    #: `config.model_type` values this row serves.
    model_types: tuple[str, ...]
    #: From the CausalLM to the module that owns embeddings and layers.
    decoder: str = "model"
    embed: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    #: Module that gives cos, sin for positions; empty for learned positions.
    rotary: str = "rotary_emb"
    #: The rotary module takes the layer type as a third argument and differs between types (Gemma 3).
    rotary_by_layer_type: bool = False
    #: Learned positions: embedding module and the offset its forward adds (OPT: 2).
    positions: str = ""
    #: Linear maps after the embedding and after the final norm (OPT-350m).
    project_in: str = ""
    project_out: str = ""

    attention: str = "self_attn"
    #: Three projections, or one fused.
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    #: Layout of a fused projection's outputs: `blocks` (all q, all k, all v) or `heads` (q, k, v of head 0, of head 1, ...).
    fused: str = "blocks"
    out: str = "o_proj"
    #: Attribute of the attention module that holds head_dim.
    head_dim: str = "head_dim"
    q_norm: str = ""
    k_norm: str = ""
    #: What q_norm and k_norm run over: `head` or `projection` (OLMo 2).
    qk_norm_over: str = "head"

    #: Norms before attention and MLP, after their outputs, and (post-norm models) after the residual additions.
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    #: RMSNorm gain is 1 + weight (Gemma).
    one_plus_gain: bool = False
    #: Config flag: when false, the `before_*` norms run after the residual additions instead (OPT-350m).
    pre_norm_flag: str = ""
    #: Config flag: attention and MLP read the same residual (GPT-NeoX).
    parallel_flag: str = ""
    #: Modules applied one after the other.
    mlp: tuple[str, ...] = ("mlp",)
    #: A gated MLP's projections, `down(act(gate(x)) * up(x))`: gate, up, down, or gate and up in one; empty if it is not one.
    gated: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    #: Attribute of a gated MLP that holds its activation.
    activation: str = "act_fn"

    #: Config attributes; empty where the family has no such thing.
    attention_softcap: str = ""
    logit_softcap: str = ""
    #: `config.sliding_window`, if set, holds for every layer (Mistral, Phi-3); otherwise `config.layer_types` decides.
    window_everywhere: bool = False
    #: Config attributes that must be false or absent, with what they would need.
    refuses: tuple[tuple[str, str], ...] = ()


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Add a family; a later registration of a model type replaces the earlier one."""
    for model_type in family.model_types:
        _FAMILIES[model_type] = family
    return family


def family_of(model_type: str) -> Family:
    """The family of a `config.model_type`, or an error that lists what is supported."""
    try:
        return _FAMILIES[model_type]
    except KeyError:
        raise UnsupportedModelError(
            f"model type {model_type!r} has no family spec; supported: {', '.join(supported())}. "
            "docs/families.md shows how to add one."
        ) from None


def supported() -> list[str]:
    return sorted(_FAMILIES)
