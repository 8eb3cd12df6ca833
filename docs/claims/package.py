"""Our own claims: README.md, and what docs/ says beyond it."""

from .claim import OURS, README, Found, MissingError, Results, Values, claim, compare, listed, losses
from .crnet import COMPARE_1M, COMPARE_2M, STUDIES, tokens_of


@claim(
    OURS,
    text="Half the parameters at about dense perplexity: 63.7 against 63.0, plain low rank 63.6, CoLA 67.7",
    source="first table",
    quote="**CR-Net**, rank 48 | **1.32M** | **63.7**",
    command=COMPARE_2M,
    run="`crnet_2m_text`, {tokens:.2f}M tokens, {seeds} seeds",
    result="perplexity {crnet:.1f} with {share:.2f} of the parameters, dense {dense:.1f}, CoLA {cola:.1f}, "
    "plain low rank {low_rank:.1f}",
    rule="the README has these figures",
)
def table_of_readme(results: Results) -> Found:
    content = results("compare_2m.json")
    methods = content["methods"]
    values: Values = {name: methods[name]["perplexity"] for name in ("crnet", "dense", "cola", "low_rank")}
    holds = all(f"| {value:.1f} |" in README.replace("*", "") for value in values.values())
    shares = [methods[name]["parameters_without_embeddings"] for name in ("crnet", "dense")]
    values |= {
        "share": shares[0] / shares[1],
        "tokens": tokens_of(content) / 1e6,
        "seeds": len(methods["crnet"]["losses"]),
    }
    return values, holds


@claim(
    OURS,
    text="A training step is 1.61 times as fast as transformers' Llama on two CPU cores",
    source="below the first table",
    quote="is **1.61x** as fast as transformers' Llama on two CPU cores",
    command="python benchmarks/throughput.py",
    run="hidden {hidden}, {layers} layers, rank {rank}, float32, {threads} threads",
    result="{speed:.2f} times as fast; by operations alone {operations:.2f}",
    rule="the README has this figure",
)
def faster_than_llama(results: Results) -> Found:
    content = results("throughput_cpu.json")
    shape, crnet = content["shape"], content["contenders"]["CR-Net"]
    values = {
        "hidden": shape["hidden_size"],
        "layers": shape["num_hidden_layers"],
        "rank": shape["rank"],
        "threads": content["threads"],
        "speed": crnet["speed_over_llama"],
        "operations": crnet["speed_if_operations_decided"],
    }
    return values, f"**{values['speed']:.2f}x**" in README


@claim(
    OURS,
    text="Operations: about half in the layers; the time saved is less",
    source="what it saves",
    quote="about half in the layers; the time saved is less",
    command=COMPARE_1M,
    run="`crnet_1m_text` and `crnet_5m_text` shapes, one thread a run",
    result="{operations} of dense's operations a token, {seconds} of its seconds",
    rule="both shares are below 1, and the seconds' is the larger",
)
def time_saved(results: Results) -> Found:
    files = ("compare_1m.json", "compare_5m.json")
    pairs = [[results(name, "methods", method) for method in ("crnet", "dense")] for name in files]
    operations = [a["flops_per_token"] / b["flops_per_token"] for a, b in pairs]
    seconds = [a["seconds"] / b["seconds"] for a, b in pairs]
    values = {"operations": listed(f"{x:.2f}" for x in operations), "seconds": listed(f"{x:.2f}" for x in seconds)}
    return values, all(x < y < 1 for x, y in zip(operations, seconds, strict=True))


def kept_of(results: Results) -> tuple[Values, dict[str, float]]:
    saved = results("memory_cpu.json", "sections", "saved")
    return {"hidden": saved["shape"]["hidden_size"]}, {n: m["growth_h"] for n, m in saved["methods"].items()}


@claim(
    OURS,
    text="Activations: a third less than dense as it is",
    source="what it saves",
    quote="a third less than dense as it is",
    command="python benchmarks/memory.py --sections saved",
    run="kept per token by a further layer, hidden {hidden}, float32",
    result="{crnet:.1f} h, dense {dense:.1f} h: {less:.0%} less",
    rule="it is at least 30 % less",
)
def activations(results: Results) -> Found:
    values, kept = kept_of(results)
    values |= {"crnet": kept["crnet"], "dense": kept["dense"], "less": 1 - kept["crnet"] / kept["dense"]}
    return values, values["less"] >= 0.3


@claim(
    OURS,
    text='`recompute="invert"`: 12 times less than dense, for about a tenth more time',
    source="what it saves",
    quote="12 times less than dense, for about a tenth more time",
    command="python benchmarks/memory.py --threads 1 --restarts 2 --sections saved speed",
    run="kept per token by a further layer, hidden {hidden}; a step of {layers} layers on one thread, float32",
    result="{times:.1f} times less; {time:.1%} more time than `none`",
    rule="it is at least 11.5 times, for at most 15 %",
)
def invert(results: Results) -> Found:
    values, kept = kept_of(results)
    by_depth = results("memory_cpu.json", "sections", "speed")["dtypes"]["float32"]
    layers = min(by_depth, key=int)
    times = kept["dense"] / kept["crnet_invert"]
    time = by_depth[layers]["crnet_invert"]["step_over_none"] - 1
    values |= {"layers": layers, "times": times, "time": time}
    return values, values["times"] >= 11.5 and values["time"] <= 0.15


@claim(
    OURS,
    text='`recompute="reversible"`: activations that do not grow with depth',
    source="what it saves",
    quote="none that grow with depth",
    command="python benchmarks/memory.py --sections saved",
    run="kept per token by a further layer, hidden {hidden}, no state between the first and the last",
    result="{kept:.2f} h",
    rule="it is 0",
)
def reversible(results: Results) -> Found:
    values, kept = kept_of(results)
    return values | {"kept": kept["crnet_reversible_whole"]}, kept["crnet_reversible_whole"] == 0


@claim(
    OURS,
    text="A resumed run has the same losses as one without the interruption",
    source="from the command line",
    quote="same losses as without the interruption",
    command="python benchmarks/kills.py --kills 50",
    run="{runs} runs on one and two processes, killed {kills} times at random moments",
    result="{different} of {runs} differ from runs left alone, in losses or weights",
    rule="none does",
)
def resumed(results: Results) -> Found:
    kills = results("kills.json", "sections", "kills")
    different = sum(bool(run["differences"]) for run in kills["runs"])
    return {"runs": len(kills["runs"]), "kills": kills["kills"], "different": different}, different == 0


@claim(
    OURS,
    text="Ranks suggested from spectra are better than uniform ones",
    source="docs/spectra.md, which says that they are not",
    command="python benchmarks/rank_suggestion.py --train FILE --validation FILE",
    run="the shape of `crnet_1m_text`, {tokens:.2f}M tokens, {seeds} seeds",
    result="loss {suggested} against {uniform} of uniform ranks",
    rule="the loss is lower",
)
def suggested_ranks(results: Results) -> Found:
    content = results("rank_suggestion.json")
    uniform, suggested = (content["choices"][name]["losses"] for name in ("uniform", "suggested"))
    values = {
        "tokens": content["tokens"] / 1e6,
        "seeds": len(content["seeds"]),
        "suggested": losses(suggested),
        "uniform": losses(uniform),
    }
    return values, compare(suggested, uniform) < 0


@claim(
    OURS,
    text="Weights, gradients and optimizer states: about half in the layers at rank = hidden / 4",
    source="what it saves",
    quote="about half in the layers at rank = hidden / 4",
    command=COMPARE_2M,
    run="`crnet_2m_text`, `crnet_1m_text` and `crnet_5m_text`, all at a quarter of the width",
    result="{shares} of dense's parameters without embeddings",
    rule="each is 0.45 to 0.55",
)
def half_of_the_layers(results: Results) -> Found:
    methods = [results(name, "methods") for name in STUDIES]
    sizes = [[m[name]["parameters_without_embeddings"] for name in ("crnet", "dense")] for m in methods]
    shares = [ours / theirs for ours, theirs in sizes]
    return {"shares": listed(f"{share:.2f}" for share in shares)}, all(0.45 <= share <= 0.55 for share in shares)


@claim(
    OURS,
    text="Decoding is faster than with transformers' Llama",
    source="docs/crnet.md",
    command="crosslayer bench speed --hidden-size 1024 --parts generation --methods dense,cola,crnet --turns 12 --json",
    run="hidden {hidden}, {layers} layers, float32, {threads} threads, one row, {turns} turns",
    result="{decode:.2f} times as fast, prefill {prefill:.2f} times; CoLA {cola:.2f}",
    rule="the first is above 1",
)
def decoding(results: Results) -> Found:
    content = results("generation_cpu.json")
    crnet, cola = (content["generation"][name] for name in ("crnet", "cola"))
    values = {
        "hidden": content["shape"]["hidden_size"],
        "layers": content["shape"]["num_hidden_layers"],
        "threads": content["run"]["threads"],
        "turns": content["turns"],
        "decode": crnet["decode"]["speed_over_llama"],
        "prefill": crnet["prefill"]["speed_over_llama"],
        "cola": cola["decode"]["speed_over_llama"],
    }
    return values, values["decode"] > 1


@claim(
    OURS,
    text="LoR2C takes less time and memory than LoRA of the same rank to train",
    source="docs/lor2c.md",
    command="python benchmarks/lor2c_cost.py --model FOLDER",
    run="{models}, {batch} x {length} tokens, float32, one thread",
    result="time {time}, activations kept {kept}, resident memory above the model {resident} of LoRA's",
    rule="all are below 1",
)
def cost_of_lor2c(results: Results) -> Found:
    rows = results("lor2c_cost.json")["rows"]
    keys = {"time": "time_ratio", "kept": "saved_activation_ratio", "resident": "peak_rss_above_model_ratio"}
    values: Values = {name: listed(f"{row[key]:.2f}" for row in rows) for name, key in keys.items()}
    values |= {"models": listed(row["model"] for row in rows), "batch": rows[0]["batch"], "length": rows[0]["length"]}
    return values, all(row[key] < 1 for row in rows for key in keys.values())


@claim(
    OURS,
    text="CoLA and plain low rank train better from the norm of a dense matrix than from CoLA's own start",
    source="docs/ablations.md",
    command="python benchmarks/starts.py --train FILE --validation FILE",
    run="`crnet_1m_text`, {seeds} seeds, rates searched for each",
    result="loss of CoLA {cola} (from its own start {cola_own}), of plain low rank {low_rank} ({low_rank_own})",
    rule="the loss of both is lower",
)
def start_of_factors(results: Results) -> Found:
    ours, own = (
        results("starts.json", "sections", f"low_rank_initializer_range {value}")["methods"] for value in (0.02, "cola")
    )
    pairs = {name: (ours[name]["losses"], own[name]["losses"]) for name in ("cola", "low_rank")}
    values: Values = {name: losses(pair[0]) for name, pair in pairs.items()}
    values |= {f"{name}_own": losses(pair[1]) for name, pair in pairs.items()}
    values["seeds"] = len(pairs["cola"][0])
    return values, all(compare(*pair) < 0 for pair in pairs.values())


@claim(
    OURS,
    text="CR-Net is faster than dense on a GPU too",
    source="our question",
    command="python benchmarks/gpu.py",
    run="LLaMA shapes, {device}",
    result="speed over dense: {speeds}",
    rule="without recomputation it is faster at every size",
)
def on_a_gpu(results: Results) -> Found:
    content = results("gpu.json")
    speeds = {name: speed for name, speed in content["speed_over_dense"].items() if name.endswith(" crnet")}
    if not speeds:
        raise MissingError("speed_over_dense")
    device = next(iter(content["sections"].values()))["run"]["device"]
    values = {"device": device, "speeds": listed(f"{speed:.2f} ({name})" for name, speed in speeds.items())}
    return values, all(speed > 1 for speed in speeds.values())


@claim(
    OURS,
    text="At 1B (rank 448) a GPU trains CR-Net at 1.4 of dense's speed, 0.95 of CoLA's, `invert` within 8 % of `none`",
    source="our aim",
    command="python benchmarks/gpu.py",
    run="LLaMA 1B, {device}",
    result="{targets}",
    rule="every one of the script's targets holds",
)
def gpu_targets(results: Results) -> Found:
    content = results("gpu.json")
    found = content.get("targets")
    if not found:
        raise MissingError("targets")
    values = {
        "device": next(iter(content["sections"].values()))["run"]["device"],
        "targets": listed(f"{row['measured']:.2f} ({row['what']})" for row in found),
    }
    return values, all(row["holds"] for row in found)


@claim(
    OURS,
    text="The 7B shape trains under 24 GiB, where dense cannot begin",
    source="docs/benchmarks.md, by arithmetic",
    command="python benchmarks/seven_billion.py",
    run="bf16 weights, {optimizer}, gradients released, at most {cap:.0f} GiB, {device}",
    result="tokens in the largest micro-batch: {tokens}",
    rule="some for every CR-Net, none for dense",
)
def seven_billion(results: Results) -> Found:
    content = results("seven_billion.json")
    tokens = {name: section["tokens_per_micro_batch"] for name, section in content["sections"].items()}
    values = {
        "cap": content["setting"]["cap_gib"],
        "optimizer": listed(sorted({section["optimizer"] for section in content["sections"].values()})),
        "device": next(iter(content["sections"].values()))["run"]["device"],
        "tokens": listed(f"{number:,} ({name})" for name, number in tokens.items()),
    }
    trains = {name: number > 0 for name, number in tokens.items()}
    return values, all(trains[name] is name.startswith("crnet") for name in tokens if not name.startswith("cola"))
