"""What the numpy spec of paged attention gives for seeded inputs. Run as a script, this rewrites attention.json.

A change of attention.json is a change of what the op means, for every kernel, graph and engine: say why in the commit.
"""

import json
from pathlib import Path

from moevlm.plugins.ops.attention import attention
from tests.support.attention_variants import ATTENTIONS, STEPS, attention_inputs

FILE = Path(__file__).parent / "attention.json"
SEED = 20
OPTIONAL = ("v", "cos", "sin", "value_cache", "q_norm", "k_norm", "sinks", "visible_end")


def golden(name: str) -> list[list[float]]:
    """y of the mixture of sequences, with the 7 digits that a float32 holds."""
    inputs = dict.fromkeys(OPTIONAL) | attention_inputs(ATTENTIONS[name], STEPS["mixture"], SEED)
    y = attention(**inputs, spec=ATTENTIONS[name].spec)[0]
    return [[float(f"{value:.7g}") for value in row] for row in y.tolist()]


if __name__ == "__main__":
    cases = (f'"{name}": {json.dumps(golden(name))}' for name in ATTENTIONS)
    FILE.write_text("{\n" + ",\n".join(cases) + "\n}\n")
