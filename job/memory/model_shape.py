"""What the memory estimate must know of a base model, read from its config.json and the sizes of its weight files: no
weights are fetched for it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

# Decoders built like llama's, whose parts are known one by one: how many norms a layer has, and whether queries and
# keys have norms of their own. Counted in transformers 5.23.
KNOWN: dict[str, tuple[int, bool]] = {
    "gemma": (2, False),
    "gemma2": (4, False),
    "gemma3_text": (4, True),
    "granite": (2, False),
    "llama": (2, False),
    "ministral": (2, False),
    "mistral": (2, False),
    "olmo2": (2, True),
    "olmo3": (2, True),
    "phi3": (2, False),
    "qwen2": (2, False),
    "qwen3": (2, True),
    "smollm3": (2, False),
}
# Those of them whose norms are more than weight * x / sqrt(mean(x^2) + epsilon): they add 1 to the weight.
_OTHER_NORMS = frozenset({"gemma", "gemma2", "gemma3_text"})
# Where a configuration says each size, by family; the first that is there counts.
_KEYS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "n_head_kv"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "vocabulary_size": ("vocab_size",),
}
_UNTIED_BY_DEFAULT = frozenset({"granite", "llama", "ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3"})
_BYTES_OF_DTYPE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. `is_known` False: it isn't built like llama, or doesn't say all of its sizes (0 stands for
    those), so that only the weights are counted well. `parameters` counts a head that is tied to the embeddings once.
    """

    model_type: str
    parameters: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary_size: int
    is_tied: bool
    norms_per_layer: int
    has_qk_norms: bool
    is_known: bool

    @property
    def query_size(self) -> int:
        """Width of all heads' queries."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all heads' keys, and of their values."""
        return self.kv_heads * self.head_dim

    @property
    def has_plain_norms(self) -> bool:
        """Say whether its norms are such as a GPU computes in one kernel (job.train.norms)."""
        return self.is_known and self.model_type not in _OTHER_NORMS

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the linear modules of one layer: name -> (inputs, outputs)."""
        hidden, inner, query, kv = self.hidden_size, self.intermediate_size, self.query_size, self.kv_size
        if self.model_type == "phi3":
            attention, gate = {"qkv_proj": (hidden, query + 2 * kv)}, {"gate_up_proj": (hidden, 2 * inner)}
        else:
            attention = {"q_proj": (hidden, query), "k_proj": (hidden, kv), "v_proj": (hidden, kv)}
            gate = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
        return {**attention, "o_proj": (query, hidden), **gate, "down_proj": (inner, hidden)}

    def layer_parameters(self) -> int:
        """Return the parameters of one layer's linear modules."""
        return sum(inputs * outputs for inputs, outputs in self.linears().values())

    def embedding_parameters(self) -> int:
        """Return the parameters of the embeddings, and of the head unless it is the same matrix."""
        return self.vocabulary_size * self.hidden_size * (1 if self.is_tied else 2)


def read_model_shape(configuration: Mapping[str, object], stored_bytes: int) -> ModelShape:
    """Return the shape that a model's config.json and the size of its weight files in bytes tell.

    Whatever isn't there, or is no number, is unknown: never an error.
    """
    nested = configuration.get("text_config")
    tree = {**configuration, **nested} if isinstance(nested, dict) else dict(configuration)
    model_type = str(tree.get("model_type", "unknown"))
    sizes = {name: _find_size(tree, keys) for name, keys in _KEYS.items()}
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    sizes["head_dim"] = sizes["head_dim"] or (sizes["hidden_size"] // sizes["heads"] if sizes["heads"] else 0)
    sizes["intermediate_size"] = sizes["intermediate_size"] or 4 * sizes["hidden_size"]
    norms_per_layer, has_qk_norms = KNOWN.get(model_type, (2, False))
    tied = tree.get("tie_word_embeddings")
    # A model with a picture or sound encoder has other weights, too.
    is_known = model_type in KNOWN and all(sizes.values()) and not isinstance(nested, dict)
    shape = ModelShape(
        model_type=model_type,
        parameters=stored_bytes // _find_itemsize(tree, configuration),
        is_tied=tied if isinstance(tied, bool) else model_type not in _UNTIED_BY_DEFAULT,
        norms_per_layer=norms_per_layer,
        has_qk_norms=has_qk_norms,
        is_known=is_known,
        **sizes,
    )
    # Names of dtypes that the files don't have are common, and so are quantised files.
    return replace(shape, parameters=_count_parameters(shape)) if is_known else shape


def _find_size(tree: Mapping[str, object], keys: tuple[str, ...]) -> int:
    found = (tree.get(key) for key in keys)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)


def _find_itemsize(tree: Mapping[str, object], configuration: Mapping[str, object]) -> int:
    """Return the bytes of a stored number, by the configuration."""
    named = (tree.get("dtype"), tree.get("torch_dtype"), configuration.get("dtype"), configuration.get("torch_dtype"))
    return next((_BYTES_OF_DTYPE[name] for name in named if isinstance(name, str) and name in _BYTES_OF_DTYPE), 4)


def _count_parameters(shape: ModelShape) -> int:
    norms = (shape.layers * shape.norms_per_layer + 1) * shape.hidden_size
    return shape.embedding_parameters() + shape.layers * shape.layer_parameters() + norms
