"""CR-Net's claims (arXiv 2509.18993)."""

import statistics
from typing import Any

from crosslayer.accounting import Shape, count_operations, count_parameters, named_shape

from .claim import (
    CRNET,
    Found,
    MissingError,
    Results,
    Values,
    claim,
    compare,
    listed,
    losses,
    spread,
    untestable,
)

TEXTS = "--data FILE --validation_data FILE"
COMPARE_1M = (
    f"crosslayer compare --recipe crnet_1m_text {TEXTS} --per_device_train_batch_size 4 --max_steps 500 "
    "--warmup_steps 50 --tuning_runs 14 --validation_blocks 64"
)
COMPARE_2M = (
    f"crosslayer compare --recipe crnet_2m_text {TEXTS} --tuning_runs 16 --tuning_steps 250 --validation_blocks 148"
)
LADDER = (
    f"crosslayer compare --recipe crnet_1m_text {TEXTS} --sizes 64x6,96x9,128x13,192x13 "
    "--tokens_per_parameter 20 --tuning_steps 0.2 --tuning_runs 14,9,7,5 --seeds 2,1,1,2"
)
ABLATIONS = "python benchmarks/ablations.py --train FILE --validation FILE"
STUDIES = {"compare_2m.json": "crnet_2m_text", "compare_1m.json": "crnet_1m_text", "compare_5m.json": "crnet_5m_text"}
"""Comparisons at equal tokens, and the recipe of each."""

FROM_COLAS_START = {"compare_1m.json", "compare_5m.json"}
"""Those in which CoLA and plain low rank still began as CoLA's code does, which narrow models suffer from: they say
nothing of the two (docs/ablations.md)."""

PROTOCOL = "{recipes}, {tokens} tokens, {seeds} seeds, rates searched for each"


def tokens_of(comparison: dict[str, Any]) -> int:
    """Tokens that a run of compare.json saw."""
    training, data = comparison["recipe"]["training"], comparison["recipe"]["data"]
    return training["max_steps"] * training["per_device_train_batch_size"] * data["block_size"]


def against(results: Results, other: str) -> tuple[Values, list[int]]:
    """(values, `compare` of CR-Net's losses with the other's) over the studies at equal tokens that have both."""
    skipped = FROM_COLAS_START if other in ("cola", "low_rank") else set()
    contents = {recipe: results(name) for name, recipe in STUDIES.items() if name not in skipped}
    pairs = [(content["methods"]["crnet"], content["methods"][other]) for content in contents.values()]
    shares = [ours["parameters_without_embeddings"] / theirs["parameters_without_embeddings"] for ours, theirs in pairs]
    values = {
        "recipes": listed(f"`{recipe}`" for recipe in contents),
        "tokens": listed(f"{tokens_of(content) / 1e6:.2f}M" for content in contents.values()),
        "seeds": min(len(ours["losses"]) for ours, _ in pairs),
        "perplexities": listed(f"{ours['perplexity']:.1f} ({theirs['perplexity']:.1f})" for ours, theirs in pairs),
        "losses": listed(f"{losses(ours['losses'])} ({losses(theirs['losses'])})" for ours, theirs in pairs),
        "parameters": listed(f"{share:.2f}" for share in shares),
    }
    return values, [compare(ours["losses"], theirs["losses"]) for ours, theirs in pairs]


@claim(
    CRNET,
    text="Dense perplexity with half of the parameters or fewer: 15.22 with 583M against 15.56 with 1,339M (1B)",
    source="main table, C4",
    command=COMPARE_2M,
    run=PROTOCOL,
    result="perplexity (dense's) {perplexities}; loss {losses}; {parameters} of its parameters without embeddings",
    rule="CR-Net's loss is higher in none of the studies",
)
def dense_perplexity(results: Results) -> Found:
    values, found = against(results, "dense")
    return values, max(found) <= 0


PAPERS_LENGTH = (10, 22)
"""Tokens for each dense parameter."""


@claim(
    CRNET,
    text="The same at the paper's length of training, 10 to 22 tokens per dense parameter",
    source="main table, C4",
    command=LADDER,
    run="dense {sizes} without embeddings, {tokens} tokens per parameter, {seeds} seeds, rates searched for each",
    result="loss {crnet} with {shares} of the parameters without embeddings, dense {dense}{average}",
    rule="CR-Net's loss is higher at no size with two seeds, nor on average (the 95 % interval of the mean ratio over "
    "the sizes is not above one)",
)
def dense_perplexity_after_long(results: Results) -> Found:
    low, high = PAPERS_LENGTH
    found, mean = at_full_length(results)
    pairs = [pair for pair in found if low <= pair["tokens"] / pair["size"] <= high]
    if not pairs:
        raise MissingError("sizes of that length")
    verdicts = [compare(p["crnet"], p["dense"]) for p in pairs if min(len(p["crnet"]), len(p["dense"])) > 1]
    values = {
        "sizes": listed(f"{pair['size'] / 1e6:.2f}M" for pair in pairs),
        "tokens": listed(f"{pair['tokens'] / pair['size']:.0f}" for pair in pairs),
        "seeds": listed(str(len(pair["crnet"])) for pair in pairs),
        "shares": listed(f"{pair['share']:.2f}" for pair in pairs),
        "crnet": listed(losses(pair["crnet"]) for pair in pairs),
        "dense": listed(losses(pair["dense"]) for pair in pairs),
        "average": f"; perplexity over dense's {estimated(mean)} on average over the sizes" if mean else "",
    }
    is_worse = mean is not None and mean["low"] is not None and mean["low"] > 1
    return values, max(verdicts, default=0) <= 0 and not is_worse


def at_full_length(results: Results) -> tuple[list[Values], Values | None]:
    """(losses of CR-Net and dense at each size of ladder.json and ablations.json, the ladder's mean ratio)."""
    pairs = []
    ladder, ablations = (results.if_there(name) for name in ("ladder.json", "ablations.json"))
    rungs = ladder["sizes"] if ladder else {}
    for rung in rungs.values():
        if {"crnet", "dense"} <= rung["methods"].keys():
            ours, theirs = (rung["methods"][name] for name in ("crnet", "dense"))
            sizes = [row["parameters_without_embeddings"] for row in (ours, theirs)]
            pair = {"size": rung["dense_parameters"], "tokens": rung["tokens"], "share": sizes[0] / sizes[1]}
            pairs.append(pair | {"crnet": ours["losses"], "dense": theirs["losses"]})
    sections = ablations["sections"] if ablations else {}
    if {"CR-Net", "dense"} <= sections.keys():
        ours, theirs = sections["CR-Net"], sections["dense"]
        sizes = [section["parameters_without_embeddings"] for section in (ours, theirs)]
        pair = {"size": sizes[1], "tokens": theirs["tokens"], "share": sizes[0] / sizes[1]}
        pairs.append(pair | {"crnet": ours["result"]["losses"], "dense": theirs["result"]["losses"]})
    return pairs, ladder["findings"]["ratios"].get("crnet", {}).get("mean") if ladder else None


def sizes_of(rungs: dict[str, Any]) -> str:
    """Dense parameters of the sizes of ladder.json."""
    return listed(f"{rung['dense_parameters'] / 1e6:.2f}M" for rung in rungs.values())


def estimated(found: dict[str, Any], digits: int = 3) -> str:
    """A value of ladder.json with its interval."""
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:.{digits}f}"
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


@claim(
    CRNET,
    text="The loss in quality stays at about 2 % of perplexity as models grow (13B: 1.5 %)",
    source="13B table",
    command=LADDER,
    run="{sizes} parameters of dense without embeddings, {tokens} tokens",
    result="CR-Net's perplexity over dense's {ratios}; a doubling of the size multiplies it by {doubling}",
    rule="at most 1.02 at the largest size, of two or more, and the 95 % interval of the factor of a doubling is not "
    "above one",
)
def as_models_grow(results: Results) -> Found:
    content = results("ladder.json")
    ratio = content["findings"]["ratios"].get("crnet")
    if ratio is None or ratio["doubling"] is None:
        raise MissingError("two sizes")
    rungs = {name: content["sizes"][name] for name in ratio["sizes"]}
    doubling = ratio["doubling"]
    values = {
        "sizes": sizes_of(rungs),
        "tokens": listed(f"{rung['tokens'] / 1e6:.0f}M" for rung in rungs.values()),
        "ratios": listed(estimated(at["ratio"]) for at in ratio["sizes"].values()),
        "doubling": estimated(doubling, 4),
    }
    largest = [*ratio["sizes"].values()][-1]["ratio"]["value"]
    return values, largest <= 1.02 and (doubling["low"] is None or doubling["low"] <= 1)


@claim(
    CRNET,
    text="Lower perplexity than CoLA at as many parameters: 15.22 against 15.52 (1B), 18.95 against 19.40 (350M)",
    source="main table, C4",
    command=COMPARE_2M,
    run=PROTOCOL,
    result="perplexity (CoLA's) {perplexities}; loss {losses}; {parameters} of its parameters without embeddings",
    rule="CR-Net's loss is lower in every study",
)
def cola_perplexity(results: Results) -> Found:
    values, found = against(results, "cola")
    return values, max(found) < 0


@claim(
    CRNET,
    text="At 1B and above more rank beats GaLore and APOLLO at as much memory: 14.05 against 14.20",
    source="main table, C4",
    command=f"crosslayer compare --recipe crnet_1m_text {TEXTS} --methods crnet,galore,apollo",
    run="`crnet_1m_text`, {tokens:.2f}M tokens, {seeds} seeds",
    result="perplexity {crnet:.1f}, GaLore {galore:.1f}, APOLLO {apollo:.1f}",
    rule="CR-Net's loss is lower than both",
)
def optimizer_methods(results: Results) -> Found:
    content = results("compare_1m_optimizers.json")
    methods = content["methods"]
    values: Values = {name: methods[name]["perplexity"] for name in ("crnet", "galore", "apollo")}
    ours = methods["crnet"]["losses"]
    values |= {"tokens": tokens_of(content) / 1e6, "seeds": len(ours)}
    return values, all(compare(ours, methods[name]["losses"]) < 0 for name in ("galore", "apollo"))


for size, figures, table in (
    ("60M", "60M to 1B: perplexity 32.76, 24.31, 18.95, 15.22 with as many parameters as CoLA", "main table"),
    ("7B", "7B, 80,000 steps: perplexity 13.72, CoLA-M 13.82", "7B table"),
    ("13B", "13B, 40,000 steps: perplexity 18.12, 8-bit Adam 17.85", "13B table"),
):
    untestable(
        CRNET,
        text=figures,
        source=f"{table}, C4",
        command=f"crosslayer pretrain --recipe crnet_{size.lower()}_c4",
        cannot="no C4 and no machine for so many operations; the recipe is built and counted in tests",
    )


def total(shape: Shape) -> int:
    return sum(count_parameters(shape).values())


@claim(
    CRNET,
    text="56.5 % fewer parameters and 63.2 % fewer operations a step at 1B",
    source="main table",
    command="crosslayer plan --model llama_1b --method crnet --rank 448",
    run="arithmetic: the shape of `crnet_1b_c4`, rank {rank}",
    result="{parameters:.1%} fewer parameters, {operations:.1%} fewer operations in the layers' products",
    rule="both are at most one percentage point off",
)
def cost_of_1b(results: Results) -> Found:
    dense, crnet = named_shape("llama_1b"), named_shape("llama_1b", "cross_layer", 448)
    of_layers = [count_operations(shape, 256).forward["layers"] for shape in (crnet, dense)]
    values = {
        "rank": crnet.rank,
        "parameters": 1 - total(crnet) / total(dense),
        "operations": 1 - of_layers[0] / of_layers[1],
    }
    return values, abs(values["parameters"] - 0.565) <= 0.01 and abs(values["operations"] - 0.632) <= 0.01


@claim(
    CRNET,
    text="r = 0.25 h has about half of the parameters, and r < 0.5 h fewer operations than full rank",
    source="section on cost",
    command="crosslayer plan --model llama_1b --method crnet",
    run="arithmetic: LLaMA 1B, rank {quarter} and {half}",
    result="{parameters:.2f} of the parameters at {quarter}, {operations:.2f} of the layers' operations at {half}",
    rule="the first is 0.4 to 0.6 and the second below 1",
)
def cost_by_rank(results: Results) -> Found:
    dense = named_shape("llama_1b")
    quarter, half = dense.hidden_size // 4, dense.hidden_size // 2 - 1
    at = {rank: named_shape("llama_1b", "cross_layer", rank) for rank in (quarter, half)}
    operations = [count_operations(shape, 256).forward["layers"] for shape in (at[half], dense)]
    values = {
        "quarter": quarter,
        "half": half,
        "parameters": total(at[quarter]) / total(dense),
        "operations": operations[0] / operations[1],
    }
    return values, 0.4 <= values["parameters"] <= 0.6 and values["operations"] < 1


@claim(
    CRNET,
    text="1.326 times as fast as CoLA (1B)",
    source="throughput table",
    command="python benchmarks/throughput.py",
    run="hidden {hidden}, {layers} layers, rank {rank} for both, float32, {threads} threads of a CPU",
    result="{ratio:.2f} of CoLA's tokens per second, with {parameters:.2f} of its parameters",
    rule="CR-Net is faster",
)
def faster_than_cola(results: Results) -> Found:
    content = results("throughput_cpu.json")
    shape, crnet, cola = content["shape"], content["contenders"]["CR-Net"], content["contenders"]["CoLA"]
    values = {
        "hidden": shape["hidden_size"],
        "layers": shape["num_hidden_layers"],
        "rank": shape["rank"],
        "threads": content["threads"],
        "ratio": crnet["tokens_per_s"] / cola["tokens_per_s"],
        "parameters": crnet["parameters"] / cola["parameters"],
    }
    return values, values["ratio"] > 1


@claim(
    CRNET,
    text="Recomputation keeps 0.456 of the activation memory of gradient checkpointing (7B, r = 512)",
    source="recomputation table",
    command="python benchmarks/memory.py --sections peak",
    run="`invert`, peak of a step, hidden {hidden}, {layers} layers, {batch} x {sequence} tokens, float32",
    result="activations and what is rebuilt {activations:.2f} of dense + checkpointing's; with weights, gradients and "
    "states {whole:.2f}",
    rule="the first is at most 0.456",
)
def activation_memory(results: Results) -> Found:
    peak = results("memory_cpu.json", "sections", "peak")
    layers = max(peak["layers"], key=int)
    ours, theirs = (peak["layers"][layers][name] for name in ("crnet_invert", "dense_checkpointing"))
    values = {
        "hidden": peak["shape"]["hidden_size"],
        "layers": layers,
        "batch": peak["batch"],
        "sequence": peak["sequence"],
        "activations": (ours["activations"] + ours["temporary"]) / (theirs["activations"] + theirs["temporary"]),
        "whole": ours["total"] / theirs["total"],
    }
    return values, values["activations"] <= 0.456


@claim(
    CRNET,
    text="Recomputation costs 0.326 of the operations that gradient checkpointing runs again (7B, r = 512)",
    source="recomputation table",
    command="python benchmarks/memory.py --threads 1 --restarts 2 --sections speed",
    run="`invert`, hidden {hidden}, {layers} layers, {batch} x {sequence} tokens, float32, one thread",
    result="it adds {ours:.1%} to a step, checkpointing {theirs:.1%} to dense's; in seconds {ratio:.2f} of that",
    rule="the ratio of the seconds is at most 0.326",
)
def recomputation(results: Results) -> Found:
    speed = results("memory_cpu.json", "sections", "speed")
    layers = min(speed["dtypes"]["float32"], key=int)
    over = {name: row["step_over_none"] for name, row in speed["dtypes"]["float32"][layers].items()}
    ours, dense, checkpointing = (over[name] for name in ("crnet_invert", "dense", "dense_checkpointing"))
    values = {
        "hidden": speed["shape"]["hidden_size"],
        "layers": layers,
        "batch": speed["batch"],
        "sequence": speed["sequence"],
        "ours": ours - 1,
        "theirs": checkpointing / dense - 1,
        "ratio": (ours - 1) / (checkpointing - dense),
    }
    return values, values["ratio"] <= 0.326


@claim(
    CRNET,
    text="States kept at every eighth layer bound the error of the inversion",
    source="algorithm 1",
    command="python benchmarks/memory.py --sections interval",
    run="{layers} layers, the worst gradient of a layer against float64",
    result="error over plain autograd's with a state every eighth layer: {ratios}",
    rule="none is above 1.2",
)
def inversion(results: Results) -> Found:
    section = results("memory_cpu.json", "sections", "interval")
    ratios = {name: errors["8"] / errors["plain"] for name, errors in section["errors"].items()}
    values = {"layers": section["layers"], "ratios": listed(f"{value:.2f} ({name})" for name, value in ratios.items())}
    return values, max(ratios.values()) <= 1.2


def ablation(results: Results, name: str) -> tuple[Values, int]:
    """(values, `compare` of the contender's losses with CR-Net's)."""
    crnet, other = (results("ablations.json", "sections", key) for key in ("CR-Net", name))
    ours, theirs = crnet["result"]["losses"], other["result"]["losses"]
    means = [section["result"]["loss_mean"] for section in (other, crnet)]
    values = {
        "hidden": crnet["model"]["hidden_size"],
        "tokens": crnet["tokens"] / 1e6,
        "seeds": len(ours),
        "without": losses(theirs),
        "crnet": losses(ours),
        "nats": "" if None in means else f", {means[0] - means[1]:+.4f} nats",
        "parameters": other["parameters_without_embeddings"] / crnet["parameters_without_embeddings"],
    }
    return values, compare(theirs, ours)


ABLATION: dict[str, str] = {
    "command": f"{ABLATIONS} --only ablations",
    "run": "`crnet_1m_text` at hidden {hidden}, {tokens:.1f}M tokens, {seeds} seeds, rates searched for each",
    "result": "loss {without}, CR-Net {crnet}{nats}, with {parameters:.2f} of the parameters without embeddings",
}


@claim(
    CRNET,
    text="Ablation: a learnable b is better than a fixed one",
    source="method and ablations",
    rule="b = 1, fixed, has the higher loss",
    **ABLATION,
)
def learnable_b(results: Results) -> Found:
    values, found = ablation(results, "b = 1, fixed")
    return values, found > 0


@claim(
    CRNET,
    text="Ablation: the carried term is what makes low rank work; without it X A B alone fails",
    source="motivation; plain low rank in the main table",
    rule="no carried term (first layer full rank) has the higher loss",
    **ABLATION,
)
def carried_term(results: Results) -> Found:
    values, found = ablation(results, "no carried term")
    return values, found > 0


@claim(
    CRNET,
    text="Plain low rank is far behind at as many parameters (142.53 against 15.56 at 1B in GaLore's table)",
    source="main table, arXiv 2403.03507",
    command=COMPARE_2M,
    run=PROTOCOL,
    result="perplexity (plain low rank's) {perplexities}; loss {losses}; {parameters} of its parameters",
    rule="CR-Net's loss is lower wherever both ran",
)
def plain_low_rank(results: Results) -> Found:
    values, found = against(results, "low_rank")
    return values, max(found) < 0


@claim(
    CRNET,
    text="Ablation: a low-rank first layer costs 3.9 % of perplexity (18.95 to 19.68 at 350M)",
    source="ablation of the first layer",
    rule="it has the higher loss at the same rank",
    **ABLATION,
)
def first_layer(results: Results) -> Found:
    values, found = ablation(results, "low-rank first layer")
    return values, found > 0


@claim(
    CRNET,
    text="Ablation: so it does where all ranks are raised to as many parameters",
    source="our question",
    command="python benchmarks/first_layer.py --train FILE --validation FILE",
    run="`crnet_1m_text` at hidden {hidden}, {tokens:.1f}M tokens, {seeds} seeds, CR-Net's rates, three of A and B",
    result="loss {ours}, CR-Net {crnet}; {cola} where A and B start as in CoLA's code, {later} where the layer is "
    "full rank for a fifth of the steps and factorised then",
    rule="with A and B started as ours are it has the higher loss",
)
def first_layer_at_equal_parameters(results: Results) -> Found:
    names = {
        "crnet": "full rank (CR-Net)",
        "ours": "the norm of a dense start",
        "cola": "low rank",
        "later": "full rank for 20 % of the steps",
    }
    settings = results("first_layer.json", "sections", "settings")
    found = {short: results("first_layer.json", "sections", name)["losses"] for short, name in names.items()}
    values: Values = {short: losses(each) for short, each in found.items()}
    values |= {"hidden": settings["model"]["hidden_size"], "tokens": settings["tokens"] / 1e6}
    values["seeds"] = len(found["crnet"])
    return values, compare(found["ours"], found["crnet"]) > 0


@claim(
    CRNET,
    text="Ablation: ranks high in the middle and low at both ends are better than uniform ones",
    source="ablation of the rank profile",
    command="python benchmarks/rank_suggestion.py --train FILE --validation FILE",
    run="the shape of `crnet_1m_text`, {tokens:.2f}M tokens, {seeds} seeds",
    result="loss {middle} against {uniform}; by seed {differences}",
    rule="it has the lower loss",
)
def rank_profile(results: Results) -> Found:
    content = results("rank_suggestion.json")
    uniform, middle = (content["choices"][name] for name in ("uniform", "middle_high"))
    values = {
        "tokens": content["tokens"] / 1e6,
        "seeds": len(content["seeds"]),
        "middle": spread(middle["losses"], 4),
        "uniform": spread(uniform["losses"], 4),
        "differences": listed(f"{x:+.4f}" for x in middle["minus_uniform"]),
    }
    return values, compare(middle["losses"], uniform["losses"]) < 0


@claim(
    CRNET,
    text="Ablation: so they are at 20 tokens per dense parameter",
    source="ablation of the rank profile",
    rule="it has the lower loss",
    **ABLATION,
)
def rank_profile_after_long(results: Results) -> Found:
    values, found = ablation(results, "ranks middle high, ends low")
    return values, found < 0


@claim(
    CRNET,
    text="r = 0.25 h is enough",
    source="section on cost",
    command=f"{ABLATIONS} --only ranks",
    run="hidden {hidden}, {tokens:.1f}M tokens, {seeds} seeds a rank, rates searched for each",
    result="loss by rank: {losses}",
    rule="the loss at the rank next to 0.3 h is not higher than at the largest",
)
def enough_rank(results: Results) -> Found:
    sections = results("ablations.json", "sections")
    ranks = sorted((s for name, s in sections.items() if name.startswith("rank ")), key=lambda s: s["model"]["rank"])
    if len(ranks) < 3:
        raise MissingError("three ranks")
    middle = min(ranks, key=lambda s: abs(s["rank_over_width"] - 0.3))
    values = {
        "hidden": middle["model"]["hidden_size"],
        "tokens": middle["tokens"] / 1e6,
        "seeds": len(middle["losses"]),
        "losses": listed(f"{s['rank_over_width']:.2f} h: {losses(s['losses'])}" for s in ranks),
    }
    return values, compare(middle["losses"], ranks[-1]["losses"]) <= 0


@claim(
    CRNET,
    text="It trains with plain Adam: no projection, QR or SVD step is needed",
    source="method; ablations",
    command=COMPARE_1M,
    run=PROTOCOL,
    result="{ended} of {all} runs with AdamW ended (without those of the search)",
    rule="none diverged",
)
def plain_adam(results: Results) -> Found:
    values, _ = against(results, "dense")
    runs = [loss for name in STUDIES for loss in results(name, "methods", "crnet")["losses"]]
    ended = sum(loss is not None for loss in runs)
    return values | {"ended": ended, "all": len(runs)}, ended == len(runs)


def error_ratios(spectra: dict[str, Any]) -> list[float]:
    """Of all linears: error at rank h / 4 of Y_l - b0 Y_{l-1} over that of Y_l."""
    at = spectra["ranks"].index(spectra["quarter_rank"])
    errors = [linear["relative_error"] for linear in spectra["linears"]]
    return [error["least_squares"][at] / error["output"][at] for error in errors if "least_squares" in error]


@claim(
    CRNET,
    text="In trained models Y_l - b0 Y_{l-1} is closer to low rank than Y_l: error ratios of 0.4 to 0.97 at r = h / 4",
    source="observation, LLaMA-3 8B and GPT-2 small",
    command="crosslayer analyze MODEL --data FILE --max_tokens 65536",
    run="a dense {dense_layers}-layer model trained here and all-MiniLM-L6-v2, {tokens} tokens of held-out text",
    result="over the linears median {dense:.2f} and {minilm:.2f}, smallest {dense_low:.2f} and {minilm_low:.2f}",
    rule="both medians are at most 0.97; LLaMA-3 8B and GPT-2 were not at hand",
)
def low_rank_differences(results: Results) -> Found:
    dense, minilm = (results(f"spectra/{name}.json") for name in ("dense_1m", "minilm"))
    ratios = [error_ratios(spectra) for spectra in (dense, minilm)]
    values = {
        "dense_layers": dense["layers"],
        "tokens": f"{dense['tokens']:,} and {minilm['tokens']:,}",
        "dense": statistics.median(ratios[0]),
        "minilm": statistics.median(ratios[1]),
        "dense_low": min(ratios[0]),
        "minilm_low": min(ratios[1]),
    }
    return values, max(values["dense"], values["minilm"]) <= 0.97


@claim(
    CRNET,
    text="It carries over to GPT-2 and to Qwen3-MoE",
    source="further experiments, whose figures were not to be had",
    command="python benchmarks/families.py --train FILE --validation FILE",
    run="blocks of Llama, GPT-2 and Qwen3-MoE at about one million parameters, {tokens:.2f}M tokens, {seeds} seeds",
    result="perplexity over dense: Llama {llama:.2f}, GPT-2 {gpt2:.2f}, Qwen3-MoE {moe:.2f}",
    rule="GPT-2 and Qwen3-MoE are at most 2 % above dense",
)
def families(results: Results) -> Found:
    content = results("families.json")
    found, first = content["summary"], next(iter(content["sections"].values()))
    names = {"llama": "CR-Net", "gpt2": "CR-Net", "moe": "the mixture carries"}
    values: Values = {
        family: found[family][name]["perplexity"] / found[family]["dense"]["perplexity"]
        for family, name in names.items()
    }
    values |= {"tokens": first["tokens"] / 1e6, "seeds": len(found["moe"]["dense"]["perplexities"])}
    return values, max(values["gpt2"], values["moe"]) <= 1.02
