"""Parameters that many methods have."""

from __future__ import annotations

from pymerge.methods.spec import Parameter

__all__ = ["INT8_MASK", "MERGEKIT", "NAN", "NO_RESCALE", "SCALE", "SEED", "WEIGHT", "normalize"]

MERGEKIT = "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md"

NAN = Parameter(
    "nan",
    "str",
    "error",
    "What to do with NaN and infinity in an input: `error` names the model and the tensor and "
    "writes nothing; `keep` computes on and lets them reach the output.",
    choices=("error", "keep"),
    per_tensor=False,
)
WEIGHT = Parameter("weight", "float", 1.0, "Weight w_k of task vector k.", scope="model")
SCALE = Parameter("scale", "float", 1.0, "Scaling coefficient (lambda).", names=("lambda", "scale"))
INT8_MASK = Parameter("int8_mask", "bool", False, "Not needed: no mask is stored.", no_effect=True)
NO_RESCALE = Parameter("rescale", "bool", False, "mergekit's rescaling to the L1 norm.", only=False)
SEED = Parameter(
    "seed",
    "int",
    None,
    "Seed of the random masks; a mask depends on it, on the tensor's name, the model's number and "
    "the element's index, and on nothing else.",
    minimum=0,
    maximum=2**63 - 1,
    per_tensor=False,
    default_doc="0; in YAML, --seed",
)


def normalize(elect: bool) -> Parameter:
    divided = "the weights of the models that agree" if elect else "the weights, not 0"
    return Parameter("normalize", "bool", False, f"Divide by the sum of {divided}.")
