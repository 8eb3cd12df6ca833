"""The published cost tables of CR-Net, GaLore and SLTrain beside ours, all by arithmetic.

python benchmarks/accounting.py            prints the tables of docs/accounting.md
python benchmarks/accounting.py --write    puts them there, between its markers
"""

from pathlib import Path

from crosslayer.accounting import (
    Method,
    Precision,
    Shape,
    Step,
    count_operations,
    count_parameters,
    estimate_memory,
    named_shape,
    saved_bytes,
)
from crosslayer.accounting.memory import optimizer_bytes
from crosslayer.accounting.parameters import count_relora_factors
from page_tables import run, table

PAGE = Path(__file__).parents[1] / "docs" / "accounting.md"
SIZES = ("60m", "130m", "350m", "1b", "7b", "13b")
COLA_RANKS = dict(zip(SIZES, (128, 256, 256, 512, 1024, 1280), strict=True))
GALORE_RANKS = COLA_RANKS
GIB = 2**30
BF16 = Precision(weights=2, gradients=2, states=2, products=2)

# Published figures: CR-Net's paper (arXiv 2509.18993), GaLore's table 2 (arXiv 2403.03507), SLTrain's memory figure
# (arXiv 2406.02214), GaLore's and APOLLO's 7B runs (arXiv 2403.03507, 2412.05270).
PUBLISHED_PARAMETERS = {("1b", "dense"): 1339, ("1b", "CoLA"): 609, ("1b", "CR-Net, r 448"): 583}
GALORE_TABLE = {
    "60m": {"full": 0.36, "GaLore": 0.24, "low rank": 0.26, "ReLoRA": 0.36},
    "130m": {"full": 0.76, "GaLore": 0.52, "low rank": 0.54, "ReLoRA": 0.80},
    "350m": {"full": 2.06, "GaLore": 1.22, "low rank": 1.08, "ReLoRA": 1.76},
    "1b": {"full": 7.80, "GaLore": 4.38, "low rank": 3.57, "ReLoRA": 6.17},
}
SLTRAIN_FIGURE = {"full": 8.0, "GaLore": 4.8, "low rank": 3.7, "SLTrain": 4.1, "ReLoRA": 6.3}


def total(shape: Shape) -> int:
    return sum(count_parameters(shape).values())


def contenders(size: str) -> dict[str, Shape]:
    name = f"llama_{size}"
    shapes = {
        "dense": named_shape(name),
        "CoLA": named_shape(name, "cola", COLA_RANKS[size]),
        "CR-Net, r = h / 4": named_shape(name, "cross_layer"),
    }
    aligned = {"60m": 96, "130m": 224, "350m": 224, "1b": 448, "7b": 960, "13b": 1216}[size]
    return shapes | {f"CR-Net, r {aligned}": named_shape(name, "cross_layer", aligned)}


def parameters() -> str:
    rows = []
    for size in SIZES:
        row = [size.upper()]
        for name, shape in contenders(size).items():
            published = PUBLISHED_PARAMETERS.get((size, name))
            rank = f" (r {shape.rank})" if shape.factorization != "dense" else ""
            row.append(f"{total(shape) / 1e6:,.2f}{rank}" + (f"; published {published}" if published else ""))
        rows.append(row)
    return table(("", "dense", "CoLA", "CR-Net, r = h / 4", "CR-Net, recipes' rank"), rows)


def memory_without_activations() -> str:
    rows = []
    for size in SIZES:
        row = [size.upper()]
        for name, shape in contenders(size).items():
            if name != "CR-Net, r = h / 4":
                row.append(f"{8 * total(shape) / 1e9:,.2f}")
        rows.append(row)
    return table(("", "dense", "CoLA", "CR-Net, recipes' rank"), rows)


def weights_and_states(size: str) -> dict[str, float]:
    """Bytes in bf16, as GaLore's and SLTrain's papers count: without gradients and activations."""
    dense, rank = named_shape(f"llama_{size}"), GALORE_RANKS[size]
    counts = count_parameters(dense)
    factors = count_relora_factors(dense, rank)
    trained = sum(counts.values()) - counts["full_rank"] + factors
    sparse = named_shape(f"llama_{size}", "sltrain", rank, 0.03)
    return {
        "full": 6 * total(dense),
        "GaLore": 2 * total(dense) + optimizer_bytes(dense, Method(optimizer="galore", optimizer_rank=rank), 2),
        "low rank": 6 * total(named_shape(f"llama_{size}", "low_rank", rank)),
        "SLTrain": 6 * total(sparse) + 8 * count_parameters(sparse)["sparse"],
        "ReLoRA": 2 * (total(dense) + factors) + 4 * trained,
    }


def galore_table() -> str:
    rows = []
    for size, published in GALORE_TABLE.items():
        ours = weights_and_states(size)
        cells = (
            f"{ours[name] / GIB:.2f} / {value:.2f} ({ours[name] / GIB / value - 1:+.0%})"
            for name, value in published.items()
        )
        rows.append([size.upper(), *cells])
    return table(("ours / published, GiB", *next(iter(GALORE_TABLE.values()))), rows)


def sltrain_figure() -> str:
    ours = weights_and_states("1b")
    cells = (f"{ours[name] / 1e9:.2f} / {value}" for name, value in SLTRAIN_FIGURE.items())
    return table(("ours / published, GB", *SLTRAIN_FIGURE), [["1B", *cells]])


def seven_billion() -> str:
    shape = named_shape("llama_7b")
    weights = 2 * total(shape) / GIB
    rows = []
    for name, method, states, everything in (
        ("8-bit Adam", Method(optimizer="adamw_8bit"), "13", "26"),
        ("8-bit GaLore, r 1024", Method(optimizer="galore_8bit", optimizer_rank=1024), "4.9", "18"),
        ("APOLLO, r 256", Method(optimizer="apollo", optimizer_rank=256), "1.6", ""),
        ("APOLLO-Mini", Method(optimizer="apollo_mini"), "0.0", ""),
    ):
        own = optimizer_bytes(shape, method, 2) / GIB
        rows.append([name, f"{own:.2f}", states, f"{weights + own:.1f}", everything])
    return table(("", "states, GiB", "published", "with weights", "published"), rows)


def study_operations() -> str:
    """Recomputation operations of one step: 7B, r = 512, 16 sequences."""
    rows = []
    products = ("layers", "attention")
    for sequence in (256, 2048, 4096, 8192):
        tokens = 16 * sequence
        whole = count_operations(named_shape("llama_7b"), sequence).forward
        again = {"dense, whole forward": tokens * sum(whole[part] for part in products)} | {
            name: tokens * sum(count_operations(shape, sequence, method).recompute[part] for part in products)
            for name, (shape, method) in study_methods().items()
            if method.recompute != "none"
        }
        base = again["dense, whole forward"]
        rows.append([f"{sequence:,}", *(f"{value:.3g} ({value / base:.3f})" for value in again.values())])
    published = ["published", "2.12e+15 (1)", "", "about 7.5e+14", "", "6.92e+14 (0.326)", "", "", ""]
    return table(("T", *again), [*rows, published])


def study_methods() -> dict[str, tuple[Shape, Method]]:
    dense = named_shape("llama_7b")
    cola, crnet = named_shape("llama_7b", "cola", 512), named_shape("llama_7b", "cross_layer", 512)
    return {
        "dense, checkpointing": (dense, Method(recompute="layers")),
        "CoLA-M": (cola, Method(recompute="cola_m")),
        "CoLA, invert": (cola, Method(recompute="invert")),
        "CR-Net, none": (crnet, Method()),
        "CR-Net, invert": (crnet, Method(recompute="invert")),
        "CR-Net, replay": (crnet, Method(recompute="replay")),
        "CR-Net, reversible": (crnet, Method(recompute="reversible")),
        "CR-Net, checkpointing": (crnet, Method(recompute="layers")),
    }


def study_memory() -> str:
    """Stored between forward and backward, per token, and for 16 sequences of some lengths."""
    hidden, mlp, rank, layers = 4096, 11008, 512, 32
    step = Step(sequence=1, precision=BF16)
    algorithm = layers * hidden + (layers - 1) * 7 * rank + layers // 8 * (5 * hidden + 2 * mlp)
    kept = {"as Algorithm 1 says (X, X A, Y of every eighth layer)": 2 * algorithm}
    for name, (shape, method) in study_methods().items():
        if name == "CR-Net, checkpointing":
            kept[name + " (h and seven Y at each layer)"] = 2 * layers * (hidden + 5 * hidden + 2 * mlp)
            continue
        kept[name] = sum(saved_bytes(shape, step, method, layer) for layer in range(layers))
    base = kept["dense, checkpointing"]
    rows = [
        [
            name,
            f"{size / 2 / layers / hidden:.2f}",
            *(f"{size * 16 * T / 1e9:,.2f}" for T in (256, 2048, 8192)),
            f"{size / base:.3f}",
        ]
        for name, size in kept.items()
    ]
    published = ["published: CR-Net 23.35, checkpointing 51.2", "", "", "", "", "0.456"]
    header = ("bf16", "h per layer", "T = 256, GB", "T = 2,048", "T = 8,192", "over dense, checkpointing")
    return table(header, [*rows, published])


def peak_of_a_step() -> str:
    """Whole steps by part: 7B, bf16 autocast, one sequence of 4,096 tokens."""
    rows = []
    for name, (factorization, method) in {
        "dense": ("dense", Method()),
        "dense, checkpointing": ("dense", Method(recompute="layers")),
        "CoLA, none": ("cola", Method()),
        "CoLA, invert": ("cola", Method(recompute="invert")),
        "CR-Net, none": ("cross_layer", Method()),
        "CR-Net, replay": ("cross_layer", Method(recompute="replay")),
        "CR-Net, invert": ("cross_layer", Method(recompute="invert")),
        "CR-Net, reversible": ("cross_layer", Method(recompute="reversible")),
    }.items():
        shape = named_shape("llama_7b", factorization)
        parts = estimate_memory(shape, Step(sequence=4096, precision=Precision(products=2), accumulates=True), method)
        operations = count_operations(shape, 4096, method)
        sizes = (f"{size / 1e9:.1f}" for size in (*parts.values(), sum(parts.values())))
        rows.append([name, *sizes, f"{operations.total / 1e9:.1f}"])
    return table(("GB", *parts, "sum", "GFLOP per token"), rows)


def operations_of_a_step() -> str:
    rows = []
    for size in SIZES:
        dense = count_operations(named_shape(f"llama_{size}"), 256)
        row = [size.upper(), f"{dense.model / 1e9:,.3f}"]
        for name, shape in contenders(size).items():
            if name not in ("dense", "CR-Net, r = h / 4"):
                own = count_operations(shape, 256)
                row.append(f"{own.model / dense.model:.3f} ({own.forward['layers'] / dense.forward['layers']:.3f})")
        rows.append(row)
    return table(("T = 256", "dense, GFLOP per token", "CoLA", "CR-Net, recipes' rank"), rows)


TABLES = {
    "parameters": parameters,
    "memory": memory_without_activations,
    "galore": galore_table,
    "sltrain": sltrain_figure,
    "7b": seven_billion,
    "operations": operations_of_a_step,
    "study-operations": study_operations,
    "study-memory": study_memory,
    "peak": peak_of_a_step,
}


if __name__ == "__main__":
    run(PAGE, TABLES, __doc__)
